//! Where tokenised datasets are kept, so that a second run need not tokenise again.
//!
//! A store is named by a hash of everything that it is made from: the bytes of the data, the
//! tokenizer and template, and the knobs. What changed has another name, so nothing stale is ever
//! found. Stores appear whole (written under another name, then renamed), so any number of
//! processes may read and write at once; the least recently used go when the limit is passed.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use super::store::{Store, StoreWriter};
use crate::cache_dir::{CacheDir, Partial};
use crate::recipe::plan::DataPlan;

/// What stores are called.
const EXTENSION: &str = "tokens";

/// The directory of stores.
#[derive(Debug)]
pub struct Cache(CacheDir);

impl Cache {
    /// The cache of a plan; `None` where it keeps nothing or there is no place for it.
    pub fn of(plan: &DataPlan) -> Option<Self> {
        CacheDir::in_gib(plan.cache_dir.clone(), plan.cache_limit, EXTENSION).map(Self)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.0.dir()
    }

    /// The store of this name, if it is there and whole; it counts as used now.
    pub fn find(&self, key: &str) -> Option<Store> {
        let store = Store::open(&self.0.path(key)).ok()?;
        self.0.touch(key);
        Some(store)
    }

    /// Begins a store.
    ///
    /// # Errors
    /// The directory cannot be made or written.
    pub fn begin(&self, key: &str) -> io::Result<Pending> {
        let data_file = self.0.partial(key, "")?;
        let index_file = self.0.partial(key, ".index")?;
        let data = BufWriter::with_capacity(1 << 20, File::create(data_file.path())?);
        let index = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(index_file.path())?;
        Ok(Pending {
            writer: StoreWriter::new(data, BufWriter::with_capacity(1 << 16, index))?,
            data: data_file,
            index: index_file,
            target: self.0.path(key),
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
            data,
            index,
            target,
        } = pending;
        writer.into_file(meta)?;
        fs::rename(data.path(), &target)?;
        drop(index); // removes it
        let store = Store::open(&target)?;
        self.0.shrink(&target);
        Ok(store)
    }
}

/// A store that is being written; nothing is left of it unless it is finished.
pub struct Pending {
    /// Takes the samples.
    pub writer: StoreWriter<BufWriter<File>>,
    data: Partial,
    index: Partial,
    target: PathBuf,
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    fn cache(dir: &Path, limit: u64) -> Cache {
        Cache(CacheDir::new(dir.to_owned(), limit, EXTENSION))
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
