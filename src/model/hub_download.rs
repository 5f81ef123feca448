//! Downloads a model of the hub into the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTypeModel;
use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync};

use super::hub::{Progress, Repo, is_commit};
use super::hub_error::HubError;
use super::weights::{INDEX, SINGLE, read_index};

/// What the downloading thread tells the one that waits.
enum Message {
    Progress(Progress),
    Done(Result<PathBuf, HubError>),
}

/// Downloads in a thread of its own, so that a hub that falls silent does not hold up the caller:
/// hf-hub sets no timeouts.
pub(super) fn download(
    repo: &Repo,
    client: HFClient,
    patience: Duration,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, HubError> {
    let endpoint = client.endpoint().to_string();
    let (sender, receiver) = channel();
    let job = Job {
        repo: repo.clone(),
        client,
        sender,
    };
    let spawned = std::thread::Builder::new()
        .name("hub".into())
        .spawn(move || {
            let result = job.run();
            // The caller may have lost patience: nobody is left to tell.
            let _ = job.sender.send(Message::Done(result));
        });
    if let Err(error) = spawned {
        return Err(HubError::Other {
            model: repo.id(),
            reason: error.to_string(),
        });
    }
    wait(&receiver, patience, progress).unwrap_or_else(|reason| {
        Err(HubError::Unreachable {
            model: repo.id(),
            endpoint,
            reason,
        })
    })
}

/// Passes progress on until the download is done or nothing has arrived for too long.
fn wait(
    receiver: &Receiver<Message>,
    patience: Duration,
    progress: &mut dyn FnMut(Progress),
) -> Result<Result<PathBuf, HubError>, String> {
    loop {
        match receiver.recv_timeout(patience) {
            Ok(Message::Progress(event)) => progress(event),
            Ok(Message::Done(result)) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("nothing arrived for {} s", patience.as_secs_f32()));
            }
            Err(RecvTimeoutError::Disconnected) => return Err("the download broke off".into()),
        }
    }
}

/// One download.
struct Job {
    repo: Repo,
    client: HFClient,
    sender: Sender<Message>,
}

impl Job {
    fn run(&self) -> Result<PathBuf, HubError> {
        let client = HFClientSync::from_inner(self.client.clone()).map_err(|e| self.explain(e))?;
        let remote = client.model(&self.repo.owner, &self.repo.name);
        let info = remote
            .info()
            .revision(&self.repo.revision)
            .send()
            .map_err(|error| self.explain(error))?;
        let commit = info.sha.filter(|sha| is_commit(sha)).ok_or_else(|| {
            let reason = "the hub does not say which commit the revision is".to_string();
            let model = self.repo.id();
            HubError::Other { model, reason }
        })?;
        let files = info.siblings.unwrap_or_default();
        // Only files at the top: a name with a separator could lead out of the cache.
        let files: Vec<String> = files
            .into_iter()
            .map(|file| file.rfilename)
            .filter(|file| !file.contains(['/', '\\']) && file != "..")
            .collect();
        let found = self.fetch_model(&remote, &files, &commit)?;
        self.keep_reference(&commit)?;
        Ok(found)
    }

    fn explain(&self, error: HFError) -> HubError {
        match error {
            HFError::Io(source) => HubError::Cache {
                path: self.client.cache_dir().to_path_buf(),
                source,
            },
            other => self.repo.explain(other, self.client.endpoint()),
        }
    }

    /// Downloads the files that are read; returns the directory, or the one GGUF file.
    fn fetch_model(
        &self,
        remote: &HFRepositorySync<RepoTypeModel>,
        files: &[String],
        commit: &str,
    ) -> Result<PathBuf, HubError> {
        let has = |wanted: &str| files.iter().any(|file| file == wanted);
        let fetch = |file: &str| self.fetch(remote, file, commit);
        if !has(SINGLE) && !has(INDEX) {
            return fetch(self.only_gguf(files)?);
        }
        if !has("config.json") {
            return Err(self
                .repo
                .no_weights("there is no config.json beside them".into()));
        }
        for file in files.iter().filter(|file| is_companion(file)) {
            fetch(file)?;
        }
        let weights = match has(SINGLE) {
            true => fetch(SINGLE)?,
            false => {
                let index = fetch(INDEX)?;
                let mut shards: Vec<String> = read_index(&index)?.into_values().collect();
                shards.sort();
                shards.dedup();
                if let Some(absent) = shards.iter().find(|shard| !has(shard)) {
                    let what = format!("its index names {absent}, which is not there");
                    return Err(self.repo.no_weights(what));
                }
                for shard in &shards {
                    fetch(shard)?;
                }
                index
            }
        };
        Ok(weights.parent().unwrap_or(&weights).to_path_buf())
    }

    /// The one GGUF file of a model without safetensors.
    fn only_gguf<'a>(&self, files: &'a [String]) -> Result<&'a str, HubError> {
        let with = |extensions: &[&str]| -> Vec<&'a str> {
            let wanted = |file: &&str| extensions.iter().any(|extension| file.ends_with(extension));
            files.iter().map(String::as_str).filter(wanted).collect()
        };
        match with(&[".gguf"]).as_slice() {
            [one] => Ok(one),
            [] => match with(&[".bin", ".pt", ".pth"]).first() {
                Some(pickle) => Err(self.repo.no_weights(format!(
                    "there are only pickles ({pickle}), which can run code; use a model with safetensors, \
                     or convert a copy with save_pretrained on a machine you trust"
                ))),
                None => Err(self.repo.no_weights(format!("expected {SINGLE}, {INDEX} or a .gguf file"))),
            },
            several => Err(self.repo.no_weights(format!(
                "there are several GGUF files; download one and give its path: {}",
                several.join(", ")
            ))),
        }
    }

    /// Downloads one file at `commit` into the cache, unless it is there.
    fn fetch(
        &self,
        remote: &HFRepositorySync<RepoTypeModel>,
        file: &str,
        commit: &str,
    ) -> Result<PathBuf, HubError> {
        let forward = Arc::new(Forward {
            file: file.to_string(),
            sender: self.sender.clone(),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
        });
        let path = remote
            .download_file()
            .filename(file)
            .revision(commit)
            .progress(Arc::clone(&forward))
            .send()
            .map_err(|error| self.explain(error))?;
        match damage(&path, forward.total.load(Ordering::Relaxed)) {
            None => Ok(path),
            Some(what) => {
                // The blob behind the link too, or it would be taken for the file for ever.
                if let Ok(blob) = fs::canonicalize(&path) {
                    let _ = fs::remove_file(blob);
                }
                let _ = fs::remove_file(&path);
                Err(HubError::Damaged {
                    model: self.repo.id(),
                    file: file.to_string(),
                    what,
                })
            }
        }
    }

    /// Notes which commit a branch or tag is, so that it is found without the hub.
    fn keep_reference(&self, commit: &str) -> Result<(), HubError> {
        if is_commit(&self.repo.revision) {
            return Ok(());
        }
        let path = self.repo.reference(self.client.cache_dir());
        let write = || {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let sibling = path.with_added_extension(format!("{}.tmp", std::process::id()));
            fs::write(&sibling, commit)?;
            fs::rename(&sibling, &path)
        };
        write().map_err(|source| HubError::Cache {
            path: path.clone(),
            source,
        })
    }
}

/// Whether a file beside the weights is read: configuration, tokenizer, chat template.
fn is_companion(file: &str) -> bool {
    matches!(
        file,
        "config.json"
            | "generation_config.json"
            | "special_tokens_map.json"
            | "chat_template.jinja"
    ) || file.starts_with("tokenizer")
        && [".json", ".model", ".jinja", ".txt"]
            .iter()
            .any(|extension| file.ends_with(extension))
}

/// What is wrong with a file that has arrived. hf-hub looks neither at the status of the answer
/// nor at its length, so an error page can take a file's place. A longer file is let pass: behind
/// some mirrors the length announced is that of a redirect.
fn damage(path: &Path, announced: u64) -> Option<String> {
    let length = fs::metadata(path).map_or(0, |metadata| metadata.len());
    if length < announced {
        return Some(format!("{length} of {announced} bytes"));
    }
    if path
        .extension()
        .is_some_and(|extension| extension == "json")
    {
        let text = fs::read(path).unwrap_or_default();
        if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(&text) {
            return Some(format!("not JSON: {error}"));
        }
    }
    None
}

/// Turns hf-hub's events into messages to the thread that waits. An event without new bytes says
/// only that hf-hub is alive, not the hub, and is dropped.
struct Forward {
    file: String,
    sender: Sender<Message>,
    total: AtomicU64,
    done: AtomicU64,
}

impl Forward {
    fn tell(&self, done: u64, total: u64) {
        let total = match total {
            0 => self.total.load(Ordering::Relaxed),
            known => known,
        };
        if done > self.done.fetch_max(done, Ordering::Relaxed) {
            let file = self.file.clone();
            let _ = self
                .sender
                .send(Message::Progress(Progress { file, done, total }));
        }
    }
}

impl ProgressHandler for Forward {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else {
            return;
        };
        match event {
            DownloadEvent::Start { total_bytes, .. } => {
                self.total.store(*total_bytes, Ordering::Relaxed);
            }
            DownloadEvent::Progress { files } => {
                for file in files {
                    self.tell(file.bytes_completed, file.total_bytes);
                }
            }
            DownloadEvent::AggregateProgress {
                bytes_completed,
                total_bytes,
                ..
            } => self.tell(*bytes_completed, *total_bytes),
            DownloadEvent::Complete => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pickles_are_never_companions() {
        for file in [
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "config.json",
        ] {
            assert!(is_companion(file), "{file}");
        }
        for file in [
            "pytorch_model.bin",
            "tokenizer.bin",
            "tokenizer.pkl",
            "modeling.py",
        ] {
            assert!(!is_companion(file), "{file}");
        }
    }
}
