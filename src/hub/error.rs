//! Why a model or dataset cannot be found or downloaded, with the remedy.

use std::error::Error;
use std::path::{Path, PathBuf};

use hf_hub::HFError;

use super::{Repo, RepoKind};
use crate::model::weights::WeightsError;
use crate::recipe::nearest;

/// Most names listed in one error.
const MAX_LISTED: usize = 30;

/// Why a model or dataset cannot be found.
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
    /// A path that begins with `hf://` and names no dataset.
    #[error(
        "`{path}`: {what}; a dataset of the Hugging Face hub is named hf://owner/name, or \
         hf://owner/name/path/in/it/*.parquet for some of its files; `revision` stands beside the path"
    )]
    BadDataset {
        /// What was asked for.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// Offline, and not in the cache.
    #[error(
        "`{id}` at {revision} is not complete in the cache {} ({missing}), and HF_HUB_OFFLINE is set; \
         unset it, or give the path of a local copy", cache.display()
    )]
    Offline {
        /// The id.
        id: String,
        /// The revision.
        revision: String,
        /// The cache.
        cache: PathBuf,
        /// What is not there.
        missing: String,
    },
    /// No answer from the hub.
    #[error(
        "cannot download the {} `{id}` from {endpoint}: {reason}; check the network (HTTPS_PROXY, HF_ENDPOINT), \
         or give the path of a local copy; files already downloaded are kept", kind.name()
    )]
    Unreachable {
        /// What it is.
        kind: RepoKind,
        /// The id.
        id: String,
        /// The hub.
        endpoint: String,
        /// What happened.
        reason: String,
    },
    /// The hub has no such model or dataset.
    #[error(
        "{endpoint} has no {0} `{id}`, or it is private; check the name, and for a private {0} set HF_TOKEN \
         or run `hf auth login`", kind.name()
    )]
    NoSuchRepo {
        /// What was looked for.
        kind: RepoKind,
        /// The id.
        id: String,
        /// The hub.
        endpoint: String,
    },
    /// The model or dataset has no such revision.
    #[error(
        "`{id}` at {endpoint} has no revision `{revision}`, or there is no such {}; check both names",
        kind.name()
    )]
    NoSuchRevision {
        /// What was looked for.
        kind: RepoKind,
        /// The id.
        id: String,
        /// The revision.
        revision: String,
        /// The hub.
        endpoint: String,
    },
    /// The hub wants a token, or the token is not good enough.
    #[error(
        "the hub refuses the {} `{id}`: {reason}; accept its terms on {endpoint}/{}{id} if it is gated, \
         then set HF_TOKEN or run `hf auth login`", kind.name(), kind.page()
    )]
    Refused {
        /// What was asked for.
        kind: RepoKind,
        /// The id.
        id: String,
        /// The hub.
        endpoint: String,
        /// What the hub said.
        reason: String,
    },
    /// The model has no weights that lorafit reads.
    #[error("`{id}` has no weights that can be read: {what}")]
    NoWeights {
        /// The id.
        id: String,
        /// What it has, and what to do.
        what: String,
    },
    /// The dataset has no files that lorafit reads.
    #[error("the dataset `{id}` has no data that can be read: {what}")]
    NoData {
        /// The id.
        id: String,
        /// What it has, and what to do.
        what: String,
    },
    /// The dataset's card does not describe its data.
    #[error(
        "the dataset `{id}`: its card README.md {what}; name the files yourself, as in hf://{id}/data/*.parquet"
    )]
    Card {
        /// The id.
        id: String,
        /// What is wrong with it.
        what: String,
    },
    /// The dataset has several configs and none was chosen.
    #[error(
        "the dataset `{id}` has several configs; set `config` to one of {}",
        listed(known)
    )]
    ConfigWanted {
        /// The id.
        id: String,
        /// The configs.
        known: Vec<String>,
    },
    /// The dataset has no such config.
    #[error(
        "the dataset `{id}` has no config `{config}`{}; it has {}",
        meant(config, known),
        listed(known)
    )]
    NoSuchConfig {
        /// The id.
        id: String,
        /// What was asked for.
        config: String,
        /// The configs there are.
        known: Vec<String>,
    },
    /// The dataset has no such split.
    #[error(
        "the dataset `{id}` (config {config}) has no split `{split}`{}; set `split` to one of {}",
        meant(split, known),
        listed(known)
    )]
    NoSuchSplit {
        /// The id.
        id: String,
        /// The config.
        config: String,
        /// What was asked for.
        split: String,
        /// The splits there are.
        known: Vec<String>,
    },
    /// A file did not arrive whole.
    #[error("`{file}` of `{id}` did not arrive whole ({what}); it was discarded: try again")]
    Damaged {
        /// The id.
        id: String,
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
    #[error("cannot download `{id}`: {reason}")]
    Other {
        /// The id.
        id: String,
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
        let (kind, id, endpoint) = (self.kind, self.id(), endpoint.to_string());
        let no_such_repo = |code: &Option<String>| code.as_deref() == Some("RepoNotFound");
        let unreachable = |endpoint, reason| HubError::Unreachable {
            kind,
            id: self.id(),
            endpoint,
            reason,
        };
        match error {
            HFError::AuthRequired { context } if no_such_repo(&context.error_code) => {
                HubError::NoSuchRepo { kind, id, endpoint }
            }
            HFError::AuthRequired { context } | HFError::Forbidden { context } => {
                let status = context.status;
                HubError::Refused {
                    kind,
                    id,
                    endpoint,
                    reason: context.server_message.unwrap_or_else(|| status.to_string()),
                }
            }
            HFError::RepoNotFound { .. } => HubError::NoSuchRepo { kind, id, endpoint },
            HFError::RevisionNotFound { context, .. } => {
                match context.is_some_and(|context| no_such_repo(&context.error_code)) {
                    true => HubError::NoSuchRepo { kind, id, endpoint },
                    false => HubError::NoSuchRevision {
                        kind,
                        id,
                        revision: self.revision.clone(),
                        endpoint,
                    },
                }
            }
            HFError::Request { source, .. } if !source.is_decode() => {
                unreachable(endpoint, innermost(&source))
            }
            HFError::Http { context } if context.status.is_server_error() => {
                unreachable(endpoint, format!("it answers {}", context.status))
            }
            HFError::RateLimited { .. } => {
                let reason = "it has had too many requests from here; wait a while";
                unreachable(endpoint, reason.into())
            }
            other => self.other(other.to_string()),
        }
    }

    /// An error that has no name of its own.
    pub(super) fn other(&self, reason: String) -> HubError {
        HubError::Other {
            id: self.id(),
            reason,
        }
    }

    /// What the cache lacks.
    pub(super) fn offline(&self, cache: &Path, missing: String) -> HubError {
        HubError::Offline {
            id: self.id(),
            revision: self.revision.clone(),
            cache: cache.to_path_buf(),
            missing,
        }
    }

    /// Weights that lorafit does not read.
    pub(super) fn no_weights(&self, what: String) -> HubError {
        HubError::NoWeights {
            id: self.id(),
            what,
        }
    }
}

/// Names as a list, the first [`MAX_LISTED`] of them.
fn listed(names: &[String]) -> String {
    let mut text = names[..names.len().min(MAX_LISTED)].join(", ");
    if names.is_empty() {
        text.push_str("none");
    }
    if names.len() > MAX_LISTED {
        text.push_str(&format!(" and {} more", names.len() - MAX_LISTED));
    }
    text
}

/// The known name that was probably meant, as a question.
fn meant(name: &str, known: &[String]) -> String {
    match nearest(name, known.iter().map(String::as_str)) {
        Some(near) => format!(" (did you mean `{near}`?)"),
        None => String::new(),
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
