//! The Hugging Face hub: base models and datasets, downloaded into the cache that
//! `huggingface_hub` uses too.
//!
//! [`locate`] finds a base model, [`locate_dataset`] the files of one split of a dataset. Only
//! configuration, tokenizer, safetensors and GGUF files are ever asked for, and of datasets only
//! files of rows and the card; pickles never, and no script is run. Files are pinned to the commit
//! that the revision names when the download starts.

mod card;
mod dataset;
mod download;
mod error;
mod model;
mod pattern;
mod shelf;
mod split;

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::{HFClient, HFError};

pub use dataset::{DatasetId, locate_dataset};
pub use error::HubError;
pub use model::{locate, locate_with};

/// The revision where none is named.
const MAIN: &str = "main";

/// Tells of a download; called often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The file.
    pub file: String,
    /// Bytes that have arrived.
    pub done: u64,
    /// Bytes in all; 0 where the hub does not say.
    pub total: u64,
}

/// Where the hub is and what may be asked of it.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// The hub; `None` means `HF_ENDPOINT`, or huggingface.co.
    pub endpoint: Option<String>,
    /// The cache; `None` means `HF_HUB_CACHE`, `$HF_HOME/hub`, or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// The access token; `None` means `HF_TOKEN`, or the one that `hf auth login` saved.
    pub token: Option<String>,
    /// Use the cache alone.
    pub offline: bool,
    /// How long nothing may arrive before the download is given up.
    pub patience: Duration,
}

impl HubOptions {
    /// As the environment has it (`HF_HUB_OFFLINE`; the other variables are read where an option
    /// is `None`).
    pub fn from_env() -> Self {
        let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
        Self {
            endpoint: None,
            cache_dir: None,
            token: None,
            offline: ["1", "on", "yes", "true"].contains(&offline.to_lowercase().as_str()),
            patience: Duration::from_secs(60),
        }
    }
}

fn client(options: &HubOptions) -> Result<HFClient, HFError> {
    let mut builder = HFClient::builder().retry_max_attempts(3);
    if let Some(endpoint) = &options.endpoint {
        builder = builder.endpoint(endpoint);
    }
    if let Some(cache) = &options.cache_dir {
        builder = builder.cache_dir(cache);
    }
    if let Some(token) = &options.token {
        builder = builder.token(token);
    }
    builder.build()
}

/// What a repository of the hub holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// A base model.
    Model,
    /// A dataset.
    Dataset,
}

impl RepoKind {
    /// As messages call it.
    fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }

    /// What stands before the id in the address of its page.
    fn page(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

/// A model or dataset of the hub at a revision.
#[derive(Debug, Clone)]
struct Repo {
    kind: RepoKind,
    /// The first half of the id.
    owner: String,
    /// The second.
    name: String,
    /// Branch, tag or commit.
    revision: String,
}

impl Repo {
    /// `owner/name`.
    fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The same repository at another revision.
    fn at(&self, revision: &str) -> Self {
        Self {
            revision: revision.to_string(),
            ..self.clone()
        }
    }

    /// The repository's folder in the cache.
    fn folder(&self, cache: &Path) -> PathBuf {
        let kind = self.kind.name();
        cache.join(format!("{kind}s--{}--{}", self.owner, self.name))
    }

    /// The file that keeps the commit of a branch or tag.
    fn reference(&self, cache: &Path) -> PathBuf {
        self.folder(cache).join("refs").join(&self.revision)
    }

    /// Where a commit's files are.
    fn snapshot(&self, cache: &Path, commit: &str) -> PathBuf {
        self.folder(cache).join("snapshots").join(commit)
    }

    /// The revision's commit, if the cache knows it.
    fn cached_commit(&self, cache: &Path) -> Option<String> {
        let commit = match is_commit(&self.revision) {
            true => self.revision.clone(),
            false => fs::read_to_string(self.reference(cache))
                .ok()?
                .trim()
                .to_string(),
        };
        is_commit(&commit).then_some(commit)
    }
}

/// Whether a revision is a commit's full hash.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a half of an id is one.
fn is_id_part(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(allowed)
}

/// Whether a name from outside stays inside the directory that it is put into.
fn stays_inside(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let normal = components.all(|part| matches!(part, Component::Normal(_)));
    // Components forgive `a//b` and `a/.`, which would be other names on the hub.
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    normal && name.split('/').all(plain) && !name.contains(|c: char| c == '\\' || c.is_control())
}

/// A revision becomes a path in the cache.
fn check_revision(revision: &str) -> Result<(), HubError> {
    match stays_inside(revision) {
        true => Ok(()),
        false => Err(HubError::BadRevision {
            revision: revision.to_string(),
        }),
    }
}

/// Writes a small file of the cache whole or not at all.
fn write_whole(path: &Path, text: &str) -> Result<(), HubError> {
    let write = || {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let sibling = path.with_added_extension(format!("{}.tmp", std::process::id()));
        fs::write(&sibling, text)?;
        fs::rename(&sibling, path)
    };
    write().map_err(|source| HubError::Cache {
        path: path.to_path_buf(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside() {
        for name in [
            "a",
            "data/train-00000-of-00001.parquet",
            "a b/ü.jsonl",
            "..a/b..",
        ] {
            assert!(stays_inside(name), "{name}");
        }
        for name in [
            "", "..", "../a", "a/../b", "/a", "a/", "a//b", "./a", "a/./b", "a\\b", "..\\a", "a\0",
            "a\nb",
        ] {
            assert!(!stays_inside(name), "{name:?}");
        }
    }

    #[test]
    fn revisions_stay_inside() {
        for revision in ["main", "refs/pr/1", "v1.0"] {
            assert!(check_revision(revision).is_ok());
        }
        for revision in ["", "..", "/etc", "a/../b", "a\\b"] {
            assert!(matches!(
                check_revision(revision),
                Err(HubError::BadRevision { .. })
            ));
        }
    }
}
