//! Finds a base model: a local directory or GGUF file, or a Hugging Face id, downloaded into the
//! cache that `huggingface_hub` uses too.
//!
//! Only configuration, tokenizer, safetensors and GGUF files are ever asked for; pickles never.
//! Files are pinned to the commit that the revision names when the download starts.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::{HFClient, HFError};

use super::hub_download::download;
pub use super::hub_error::HubError;
use super::weights::{INDEX, SINGLE, read_index};

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

/// The directory or GGUF file of `model`: a local path, or a Hugging Face id at `revision`,
/// downloaded as the environment says.
///
/// # Errors
/// When there is no such model, it has no safetensors or GGUF, or it cannot be downloaded.
pub fn locate(
    model: &str,
    revision: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, HubError> {
    locate_with(model, revision, &HubOptions::from_env(), progress)
}

/// [`locate`] with explicit options.
///
/// # Errors
/// As [`locate`].
pub fn locate_with(
    model: &str,
    revision: &str,
    options: &HubOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, HubError> {
    let path = Path::new(model);
    if path.exists() {
        return local(path);
    }
    let repo = Repo::parse(model, revision)?;
    let client = client(options).map_err(|error| repo.explain(error, "the hub"))?;
    let cached = cached(&repo.snapshot_dir(client.cache_dir()));
    if options.offline || is_commit(revision) {
        match cached {
            Ok(found) => return Ok(found),
            Err(missing) if options.offline => {
                return Err(HubError::Offline {
                    model: repo.id(),
                    revision: revision.to_string(),
                    cache: client.cache_dir().to_path_buf(),
                    missing,
                });
            }
            Err(_) => {}
        }
    }
    match download(&repo, client, options.patience, progress) {
        // The hub is away, but what it gave before is whole.
        Err(HubError::Unreachable { .. }) if cached.is_ok() => Ok(cached.unwrap_or_default()),
        result => result,
    }
}

/// A path that exists: a directory or a GGUF file.
fn local(path: &Path) -> Result<PathBuf, HubError> {
    let gguf = path
        .extension()
        .is_some_and(|extension| extension == "gguf");
    match path.is_dir() || gguf {
        true => Ok(path.to_path_buf()),
        false => Err(HubError::NotAModel {
            path: path.to_path_buf(),
        }),
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

/// A model of the hub at a revision.
#[derive(Debug, Clone)]
pub(super) struct Repo {
    /// The first half of the id.
    pub(super) owner: String,
    /// The second.
    pub(super) name: String,
    /// Branch, tag or commit.
    pub(super) revision: String,
}

impl Repo {
    /// Splits `owner/name`; anything else was meant as a path.
    fn parse(model: &str, revision: &str) -> Result<Self, HubError> {
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(allowed)
        };
        let parts = model
            .split_once('/')
            .filter(|(owner, name)| plain(owner) && plain(name) && !name.ends_with(".gguf"));
        let Some((owner, name)) = parts else {
            return Err(HubError::NoSuchPath {
                model: model.to_string(),
            });
        };
        // It becomes a path in the cache.
        let components = || Path::new(revision).components();
        let normal = components().all(|part| matches!(part, Component::Normal(_)));
        if components().next().is_none() || !normal || revision.contains('\\') {
            return Err(HubError::BadRevision {
                revision: revision.to_string(),
            });
        }
        Ok(Self {
            owner: owner.to_string(),
            name: name.to_string(),
            revision: revision.to_string(),
        })
    }

    /// `owner/name`.
    pub(super) fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The model's folder in the cache.
    fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}--{}", self.owner, self.name))
    }

    /// The file that keeps the commit of a branch or tag.
    pub(super) fn reference(&self, cache: &Path) -> PathBuf {
        self.folder(cache).join("refs").join(&self.revision)
    }

    /// Where the revision's files are, if the cache knows it.
    fn snapshot_dir(&self, cache: &Path) -> Option<PathBuf> {
        let commit = match is_commit(&self.revision) {
            true => self.revision.clone(),
            false => fs::read_to_string(self.reference(cache))
                .ok()?
                .trim()
                .to_string(),
        };
        is_commit(&commit).then(|| self.folder(cache).join("snapshots").join(commit))
    }
}

/// Whether a revision is a commit's full hash.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The model in a snapshot, or what it lacks.
fn cached(snapshot: &Option<PathBuf>) -> Result<PathBuf, String> {
    let Some(dir) = snapshot else {
        return Err("that revision was never downloaded".into());
    };
    let has = |file: &str| dir.join(file).is_file();
    if !has(SINGLE) && !has(INDEX) {
        let files = fs::read_dir(dir).map_err(|error| error.to_string())?;
        let gguf = |path: &PathBuf| {
            path.extension()
                .is_some_and(|extension| extension == "gguf")
        };
        let mut ggufs = files.flatten().map(|entry| entry.path()).filter(gguf);
        return match (ggufs.next(), ggufs.next()) {
            (Some(file), None) if file.is_file() => Ok(file),
            _ => Err("no weights".into()),
        };
    }
    if !has("config.json") {
        return Err("no config.json".into());
    }
    if !has(SINGLE) {
        let index = read_index(&dir.join(INDEX)).map_err(|error| error.to_string())?;
        if let Some(shard) = index.values().find(|shard| !has(shard)) {
            return Err(format!("no {shard}"));
        }
    }
    Ok(dir.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths_are_told_apart() {
        assert!(Repo::parse("HuggingFaceTB/SmolLM2-135M", "main").is_ok());
        assert!(Repo::parse("a/b", "refs/pr/1").is_ok());
        for path in [
            "./a/b", "../b", "/a/b", "~/b", "a", "a/b/c", "", "a/", "/", "a/b.gguf", "a\\b", "a/..",
        ] {
            let error = Repo::parse(path, "main").unwrap_err();
            assert!(matches!(error, HubError::NoSuchPath { .. }), "{path}");
        }
        for revision in ["", "..", "/etc", "a/../b", "a\\b"] {
            assert!(matches!(
                Repo::parse("a/b", revision),
                Err(HubError::BadRevision { .. })
            ));
        }
    }
}
