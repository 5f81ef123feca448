//! Why a model cannot be found or downloaded, with the remedy.

use std::error::Error;
use std::path::PathBuf;

use hf_hub::HFError;

use super::hub::Repo;
use super::weights::WeightsError;

/// Why a model cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A path with nothing there.
    #[error(
        "`{model}`: no such directory or .gguf file; a model of the Hugging Face hub is named owner/name"
    )]
    NoSuchPath {
        /// What was asked for.
        model: String,
    },
    /// A file that is not a model.
    #[error("{}: not a model; expected a directory with config.json and safetensors, or a .gguf file", path.display())]
    NotAModel {
        /// The file.
        path: PathBuf,
    },
    /// A revision that cannot be one.
    #[error("`{revision}` is not a revision; expected a branch, a tag or a commit")]
    BadRevision {
        /// What was asked for.
        revision: String,
    },
    /// Offline, and not in the cache.
    #[error(
        "`{model}` at {revision} is not complete in the cache {} ({missing}), and HF_HUB_OFFLINE is set; \
         unset it, or give the path of a local copy", cache.display()
    )]
    Offline {
        /// The id.
        model: String,
        /// The revision.
        revision: String,
        /// The cache.
        cache: PathBuf,
        /// What is not there.
        missing: String,
    },
    /// No answer from the hub.
    #[error(
        "cannot download `{model}` from {endpoint}: {reason}; check the network (HTTPS_PROXY, HF_ENDPOINT), \
         or give the path of a local copy; files already downloaded are kept"
    )]
    Unreachable {
        /// The id.
        model: String,
        /// The hub.
        endpoint: String,
        /// What happened.
        reason: String,
    },
    /// The hub has no such model.
    #[error(
        "{endpoint} has no model `{model}`, or it is private; check the name, and for a private model set HF_TOKEN or run `hf auth login`"
    )]
    NoSuchModel {
        /// The id.
        model: String,
        /// The hub.
        endpoint: String,
    },
    /// The model has no such revision.
    #[error(
        "`{model}` at {endpoint} has no revision `{revision}`, or there is no such model; check both names"
    )]
    NoSuchRevision {
        /// The id.
        model: String,
        /// The revision.
        revision: String,
        /// The hub.
        endpoint: String,
    },
    /// The hub wants a token, or the token is not good enough.
    #[error(
        "the hub refuses `{model}`: {reason}; accept its terms on {endpoint}/{model} if it is gated, \
         then set HF_TOKEN or run `hf auth login`"
    )]
    Refused {
        /// The id.
        model: String,
        /// The hub.
        endpoint: String,
        /// What the hub said.
        reason: String,
    },
    /// The model has no weights that lorafit reads.
    #[error("`{model}` has no weights that can be read: {what}")]
    NoWeights {
        /// The id.
        model: String,
        /// What it has, and what to do.
        what: String,
    },
    /// A file did not arrive whole.
    #[error("`{file}` of `{model}` did not arrive whole ({what}); it was discarded: try again")]
    Damaged {
        /// The id.
        model: String,
        /// The file.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// The cache cannot be written.
    #[error("{}: cannot write to the cache: {source}; set HF_HOME to a directory with room", path.display())]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The index of shards is damaged.
    #[error(transparent)]
    Index(#[from] WeightsError),
    /// Anything else that hf-hub reports.
    #[error("cannot download `{model}`: {reason}")]
    Other {
        /// The id.
        model: String,
        /// What hf-hub said.
        reason: String,
    },
}

impl HubError {
    /// Whether the network or the disk is to blame and not what was asked for: the same command
    /// may work later.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Damaged { .. }
                | Self::Cache { .. }
                | Self::Other { .. }
        )
    }
}

impl Repo {
    /// An error of hf-hub's, in terms of what to do about it.
    pub(super) fn explain(&self, error: HFError, endpoint: &str) -> HubError {
        let (model, endpoint) = (self.id(), endpoint.to_string());
        let no_such_model = |code: &Option<String>| code.as_deref() == Some("RepoNotFound");
        match error {
            HFError::AuthRequired { context } if no_such_model(&context.error_code) => {
                HubError::NoSuchModel { model, endpoint }
            }
            HFError::AuthRequired { context } | HFError::Forbidden { context } => {
                let status = context.status;
                HubError::Refused {
                    model,
                    endpoint,
                    reason: context.server_message.unwrap_or_else(|| status.to_string()),
                }
            }
            HFError::RepoNotFound { .. } => HubError::NoSuchModel { model, endpoint },
            HFError::RevisionNotFound { context, .. } => {
                match context.is_some_and(|context| no_such_model(&context.error_code)) {
                    true => HubError::NoSuchModel { model, endpoint },
                    false => HubError::NoSuchRevision {
                        model,
                        revision: self.revision.clone(),
                        endpoint,
                    },
                }
            }
            HFError::Request { source, .. } if !source.is_decode() => HubError::Unreachable {
                model,
                endpoint,
                reason: innermost(&source),
            },
            HFError::Http { context } if context.status.is_server_error() => {
                HubError::Unreachable {
                    model,
                    endpoint,
                    reason: format!("it answers {}", context.status),
                }
            }
            HFError::RateLimited { .. } => HubError::Unreachable {
                model,
                endpoint,
                reason: "it has had too many requests from here; wait a while".into(),
            },
            other => HubError::Other {
                model,
                reason: other.to_string(),
            },
        }
    }

    /// Weights that lorafit does not read.
    pub(super) fn no_weights(&self, what: String) -> HubError {
        HubError::NoWeights {
            model: self.id(),
            what,
        }
    }
}

/// What lies at the bottom of an error, which is what says something.
fn innermost(error: &dyn Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
