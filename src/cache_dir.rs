//! The directory where lorafit keeps what it can make again: which it is, and what must go.
//!
//! Files appear whole, written under another name and renamed, so any number of processes may read and
//! write at once; the least recently used go when the limit of their kind is passed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// What files are called while they are written.
const PARTIAL: &str = "partial";
/// A file that is being written is left alone for this long.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
const GIB: f64 = (1u64 << 30) as f64;

/// Files of one kind, told by their extension, in a directory.
#[derive(Debug)]
pub(crate) struct CacheDir {
    dir: PathBuf,
    limit: u64,
    extension: &'static str,
}

impl CacheDir {
    /// With a limit in bytes.
    pub(crate) fn new(dir: PathBuf, limit: u64, extension: &'static str) -> Self {
        Self {
            dir,
            limit,
            extension,
        }
    }

    /// With a limit in GiB, in the user's cache directory where none is named; `None` where nothing is kept
    /// or there is no place for it.
    pub(crate) fn in_gib(
        dir: Option<PathBuf>,
        limit: f64,
        extension: &'static str,
    ) -> Option<Self> {
        let limit = (limit * GIB) as u64;
        let dir = dir.or_else(default_dir)?;
        (limit > 0).then(|| Self::new(dir, limit, extension))
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file of this key is, if it is.
    pub(crate) fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.{}", self.extension))
    }

    /// Lets a file count as used now.
    pub(crate) fn touch(&self, key: &str) {
        if let Ok(file) = File::options().append(true).open(self.path(key)) {
            // Only the order of removal depends on it.
            let _ = file.set_modified(SystemTime::now());
        }
    }

    /// A name, in this directory, under which a file of this key can be written; `part` tells several apart.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub(crate) fn partial(&self, key: &str, part: &str) -> io::Result<Partial> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(&self.dir)?;
        self.remove_abandoned();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{key}.{}-{number}{part}.{PARTIAL}", std::process::id());
        Ok(Partial(self.dir.join(name)))
    }

    /// Removes the least recently used files until the rest is within the limit, `newest` last.
    pub(crate) fn shrink(&self, newest: &Path) {
        let mut files = files_of(&self.dir, self.extension);
        files.sort_by_key(|(path, metadata)| (path == newest, modified(metadata)));
        let mut total: u64 = files.iter().map(|(_, metadata)| metadata.len()).sum();
        for (path, metadata) in files {
            if total <= self.limit {
                break;
            }
            // A file that cannot be removed is somebody else's business, or gone already.
            let _ = fs::remove_file(path);
            total = total.saturating_sub(metadata.len());
        }
    }

    /// Removes what processes that were killed left behind.
    fn remove_abandoned(&self) {
        for (path, metadata) in files_of(&self.dir, PARTIAL) {
            let age = modified(&metadata).elapsed().unwrap_or_default();
            if age > ABANDONED {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// The path of a file that is being written; nothing is left of it once this is dropped, unless it was
/// renamed.
#[derive(Debug)]
pub(crate) struct Partial(PathBuf);

impl Partial {
    /// The path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn modified(metadata: &fs::Metadata) -> SystemTime {
    metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH)
}

fn files_of(dir: &Path, extension: &str) -> Vec<(PathBuf, fs::Metadata)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .filter_map(|path| Some((path.clone(), fs::metadata(&path).ok()?)))
        .collect()
}

/// `LORAFIT_CACHE`, or `lorafit` in the directory that the system has for caches.
fn default_dir() -> Option<PathBuf> {
    let directory = |name: &str| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
        Some(PathBuf::from(value))
    };
    let of_the_system = || {
        if cfg!(windows) {
            directory("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            directory("HOME").map(|home| home.join("Library/Caches"))
        } else {
            directory("XDG_CACHE_HOME").or_else(|| Some(directory("HOME")?.join(".cache")))
        }
    };
    directory("LORAFIT_CACHE").or_else(|| Some(of_the_system()?.join("lorafit")))
}
