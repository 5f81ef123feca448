//! Where tokenised datasets are kept, so that a second run need not tokenise again.
//!
//! A store is named by a hash of everything that it is made from: the bytes of the data, the
//! tokenizer and template, and the knobs. What changed has another name, so nothing stale is ever
//! found. Stores appear whole (written under another name, then renamed), so any number of
//! processes may read and write at once; the least recently used go when the limit is passed.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::store::{Store, StoreWriter};
use crate::recipe::plan::DataPlan;

/// What stores are called.
const EXTENSION: &str = "tokens";
/// What they and their index are called while they are written.
const PARTIAL: &str = "partial";
/// A file that is being written is left alone for this long.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
const GIB: f64 = (1u64 << 30) as f64;

/// The directory of stores.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    limit: u64,
}

impl Cache {
    /// The cache of a plan; `None` where it keeps nothing or there is no place for it.
    pub fn of(plan: &DataPlan) -> Option<Self> {
        let limit = (plan.cache_limit * GIB) as u64;
        let dir = plan.cache_dir.clone().or_else(default_dir)?;
        (limit > 0).then_some(Self { dir, limit })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The store of this name, if it is there and whole; it counts as used now.
    pub fn find(&self, key: &str) -> Option<Store> {
        let path = self.path(key);
        let store = Store::open(&path).ok()?;
        if let Ok(file) = File::options().append(true).open(&path) {
            // Only the order of removal depends on it.
            let _ = file.set_modified(SystemTime::now());
        }
        Some(store)
    }

    /// Begins a store.
    ///
    /// # Errors
    /// The directory cannot be made or written.
    pub fn begin(&self, key: &str) -> io::Result<Pending> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(&self.dir)?;
        self.remove_abandoned();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{key}.{}-{number}", std::process::id());
        let files = PartialFiles {
            data: self.dir.join(format!("{name}.{PARTIAL}")),
            index: self.dir.join(format!("{name}.index.{PARTIAL}")),
        };
        let data = BufWriter::with_capacity(1 << 20, File::create(&files.data)?);
        let index = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&files.index)?;
        Ok(Pending {
            writer: StoreWriter::new(data, BufWriter::with_capacity(1 << 16, index))?,
            files,
            target: self.path(key),
        })
    }

    /// Ends a store and maps it. Where it alone passes the limit it is removed at once: what is
    /// mapped stays until it is let go.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    pub fn finish(&self, pending: Pending, meta: &[u8]) -> io::Result<Store> {
        let Pending {
            writer,
            files,
            target,
        } = pending;
        writer.into_file(meta)?;
        fs::rename(&files.data, &target)?;
        drop(files); // removes the index
        let store = Store::open(&target)?;
        self.shrink(&target);
        Ok(store)
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.{EXTENSION}"))
    }

    /// Removes the least recently used stores until the rest is within the limit, `newest` last.
    fn shrink(&self, newest: &Path) {
        let mut stores = files_of(&self.dir, EXTENSION);
        stores.sort_by_key(|(path, metadata)| (path == newest, modified(metadata)));
        let mut total: u64 = stores.iter().map(|(_, metadata)| metadata.len()).sum();
        for (path, metadata) in stores {
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

/// A store that is being written; nothing is left of it unless it is finished.
pub struct Pending {
    /// Takes the samples.
    pub writer: StoreWriter<BufWriter<File>>,
    files: PartialFiles,
    target: PathBuf,
}

struct PartialFiles {
    data: PathBuf,
    index: PathBuf,
}

impl Drop for PartialFiles {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.data);
        let _ = fs::remove_file(&self.index);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(dir: &Path, limit: u64) -> Cache {
        Cache {
            dir: dir.to_owned(),
            limit,
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), 1 << 20);
        assert!(cache.find("a").is_none());
        drop(cache.begin("a").unwrap());
        assert!(names(dir.path()).is_empty());
        let (first, second) = (cache.begin("a").unwrap(), cache.begin("a").unwrap());
        assert_eq!(cache.finish(first, b"1").unwrap().meta(), b"1");
        assert_eq!(cache.finish(second, b"2").unwrap().meta(), b"2");
        assert_eq!(names(dir.path()), ["a.tokens"]);
        assert_eq!(cache.find("a").unwrap().meta(), b"2");
        fs::write(dir.path().join("a.tokens"), "damaged").unwrap();
        assert!(cache.find("a").is_none());
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let add = |limit: u64, key: &str| {
            let cache = cache(dir.path(), limit);
            let pending = cache.begin(key).unwrap();
            cache.finish(pending, &[0; 100]).unwrap()
        };
        add(1000, "a");
        add(1000, "b");
        let old = SystemTime::now() - Duration::from_secs(100);
        for (key, age) in [("a", 1), ("b", 0)] {
            let path = dir.path().join(format!("{key}.tokens"));
            let file = File::options().append(true).open(path).unwrap();
            file.set_modified(old + Duration::from_secs(age)).unwrap();
        }
        cache(dir.path(), 1000).find("b").unwrap();
        add(500, "c");
        assert_eq!(names(dir.path()), ["b.tokens", "c.tokens"]);
        // One that is too large by itself can be used but is not kept.
        assert_eq!(add(100, "d").meta(), [0; 100]);
        assert!(names(dir.path()).is_empty());
    }
}
