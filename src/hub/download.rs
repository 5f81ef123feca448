//! Downloads files of the hub into the cache.

use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::{HFClient, HFClientSync, HFError, RepoTypeAny};

use super::{HubError, Progress, Repo, RepoKind, is_commit, stays_inside, write_whole};

/// What the downloading thread tells the one that waits.
enum Message {
    Progress(Progress),
    Done,
}

/// Does `job` in a thread of its own, so that a hub that falls silent does not hold up the caller:
/// hf-hub sets no timeouts.
pub(super) fn download<T: Send + 'static>(
    repo: &Repo,
    client: HFClient,
    patience: Duration,
    progress: &mut dyn FnMut(Progress),
    job: impl FnOnce(&Remote) -> Result<T, HubError> + Send + 'static,
) -> Result<T, HubError> {
    let endpoint = client.endpoint().to_string();
    let (sender, receiver) = channel();
    let whose = repo.clone();
    let thread = std::thread::Builder::new()
        .name("hub".into())
        .spawn(move || {
            let remote = Remote::new(&whose, client, sender)?;
            let result = job(&remote);
            // The caller may have lost patience: nobody is left to tell.
            let _ = remote.sender.send(Message::Done);
            result
        })
        .map_err(|error| repo.other(error.to_string()))?;
    let unreachable = |reason: &str| HubError::Unreachable {
        kind: repo.kind,
        id: repo.id(),
        endpoint,
        reason: reason.to_string(),
    };
    match wait(&receiver, patience, progress) {
        true => match thread.join() {
            Ok(result) => result,
            Err(_) => Err(unreachable("the download broke off")),
        },
        false => {
            let silence = format!("nothing arrived for {} s", patience.as_secs_f32());
            Err(unreachable(&silence))
        }
    }
}

/// Passes progress on until the download is over; false when nothing has arrived for too long.
fn wait(
    receiver: &Receiver<Message>,
    patience: Duration,
    progress: &mut dyn FnMut(Progress),
) -> bool {
    loop {
        match receiver.recv_timeout(patience) {
            Ok(Message::Progress(event)) => progress(event),
            Ok(Message::Done) | Err(RecvTimeoutError::Disconnected) => return true,
            Err(RecvTimeoutError::Timeout) => return false,
        }
    }
}

/// The hub, as the downloading thread sees it.
pub(super) struct Remote {
    client: HFClientSync,
    endpoint: String,
    cache: PathBuf,
    sender: Sender<Message>,
}

impl Remote {
    fn new(repo: &Repo, client: HFClient, sender: Sender<Message>) -> Result<Self, HubError> {
        let (endpoint, cache) = (client.endpoint().to_string(), client.cache_dir().into());
        let client =
            HFClientSync::from_inner(client).map_err(|error| repo.explain(error, &endpoint))?;
        Ok(Self {
            client,
            endpoint,
            cache,
            sender,
        })
    }

    /// The cache.
    pub(super) fn cache(&self) -> &Path {
        &self.cache
    }

    fn explain(&self, repo: &Repo, error: HFError) -> HubError {
        match error {
            HFError::Io(source) => HubError::Cache {
                path: self.cache.clone(),
                source,
            },
            other => repo.explain(other, &self.endpoint),
        }
    }

    /// The commit that the revision names now, and the repository's files there. Names that could
    /// lead out of the cache are left out.
    pub(super) fn files(&self, repo: &Repo) -> Result<(String, Vec<String>), HubError> {
        let (owner, name, revision) = (&repo.owner, &repo.name, &repo.revision);
        let info = match repo.kind {
            RepoKind::Model => {
                let model = self.client.model(owner, name);
                let info = model.info().revision(revision).send();
                info.map(|info| (info.sha, info.siblings))
            }
            RepoKind::Dataset => {
                let dataset = self.client.dataset(owner, name);
                let info = dataset.info().revision(revision).send();
                info.map(|info| (info.sha, info.siblings))
            }
        };
        let (sha, siblings) = info.map_err(|error| self.explain(repo, error))?;
        let commit = sha.filter(|sha| is_commit(sha)).ok_or_else(|| {
            repo.other("the hub does not say which commit the revision is".into())
        })?;
        let names = siblings
            .into_iter()
            .flatten()
            .map(|sibling| sibling.rfilename);
        Ok((commit, names.filter(|name| stays_inside(name)).collect()))
    }

    /// Downloads one file at `commit` into the cache, unless it is there.
    pub(super) fn fetch(&self, repo: &Repo, file: &str, commit: &str) -> Result<PathBuf, HubError> {
        let kind = match repo.kind {
            RepoKind::Model => RepoTypeAny::Model,
            RepoKind::Dataset => RepoTypeAny::Dataset,
        };
        let forward = Arc::new(Forward {
            file: file.to_string(),
            sender: self.sender.clone(),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
        });
        let path = self
            .client
            .repository(kind, &repo.owner, &repo.name)
            .download_file()
            .filename(file)
            .revision(commit)
            .progress(Arc::clone(&forward))
            .send()
            .map_err(|error| self.explain(repo, error))?;
        match damage(repo.kind, &path, forward.total.load(Ordering::Relaxed)) {
            None => Ok(path),
            Some(what) => {
                // The blob behind the link too, or it would be taken for the file for ever.
                if let Ok(blob) = fs::canonicalize(&path) {
                    let _ = fs::remove_file(blob);
                }
                let _ = fs::remove_file(&path);
                Err(HubError::Damaged {
                    id: repo.id(),
                    file: file.to_string(),
                    what,
                })
            }
        }
    }

    /// Notes which commit a branch or tag is, so that it is found without the hub.
    pub(super) fn keep_reference(&self, repo: &Repo, commit: &str) -> Result<(), HubError> {
        match is_commit(&repo.revision) {
            true => Ok(()),
            false => write_whole(&repo.reference(&self.cache), commit),
        }
    }
}

/// What is wrong with a file that has arrived. hf-hub looks neither at the status of the answer
/// nor at its length, so an error page can take a file's place. A longer file is let pass: behind
/// some mirrors the length announced is that of a redirect.
fn damage(kind: RepoKind, path: &Path, announced: u64) -> Option<String> {
    let length = fs::metadata(path).map_or(0, |metadata| metadata.len());
    if length < announced {
        return Some(format!("{length} of {announced} bytes"));
    }
    match kind {
        RepoKind::Model => {
            let is_json = path
                .extension()
                .is_some_and(|extension| extension == "json");
            let reader = BufReader::new(File::open(path).ok().filter(|_| is_json)?);
            serde_json::from_reader::<_, serde::de::IgnoredAny>(reader)
                .err()
                .map(|error| format!("not JSON: {error}"))
        }
        RepoKind::Dataset => match looks_right(path) {
            Ok(true) => None,
            Ok(false) => Some("its first or last bytes are not of its format".into()),
            Err(error) => Some(error.to_string()),
        },
    }
}

/// Whether a dataset's file begins (and Parquet ends) as its extension says; data may be larger
/// than memory, so no more is read.
fn looks_right(path: &Path) -> std::io::Result<bool> {
    const START: u64 = 64;
    let mut file = File::open(path)?;
    let mut start = Vec::new();
    (&mut file).take(START).read_to_end(&mut start)?;
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    let text = String::from_utf8_lossy(&start).to_lowercase();
    let text = text.trim_start_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
    Ok(match extension.to_str().unwrap_or_default() {
        "parquet" => {
            let mut end = Vec::new();
            let length = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(length.saturating_sub(4)))?;
            file.read_to_end(&mut end)?;
            start.starts_with(b"PAR1") && end == b"PAR1"
        }
        "gz" => start.starts_with(&[0x1f, 0x8b]),
        "zst" => start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]),
        "json" | "jsonl" => text.is_empty() || text.starts_with(['{', '[']),
        "csv" | "tsv" | "txt" => !text.starts_with("<!doctype html") && !text.starts_with("<html"),
        _ => true,
    })
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
