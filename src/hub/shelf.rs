//! Where the files of a dataset come from: the hub, or the cache alone.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::download::Remote;
use super::split::{Shard, is_data};
use super::{HubError, Repo, write_whole};

/// Folders nest no deeper in a cache that is listed.
const MAX_DEPTH: usize = 16;
/// A dataset's card.
const CARD: &str = "README.md";
/// Endings of data that lorafit does not read.
const OTHER_DATA: &[&str] = &[
    ".arrow", ".tar", ".zip", ".tgz", ".gz", ".zst", ".xz", ".bz2", ".7z", ".rar", ".lz4", ".xml",
    ".xlsx", ".h5", ".hdf5", ".npy", ".npz", ".pkl", ".pickle", ".pt", ".bin", ".db", ".sqlite",
    ".sqlite3", ".avro", ".orc", ".png", ".jpg", ".jpeg", ".webp", ".wav", ".mp3", ".flac", ".mp4",
];

/// What a dataset's repository holds at one commit.
#[derive(Debug)]
pub(super) struct Listing {
    /// The commit.
    pub(super) commit: String,
    /// The files of rows that lorafit reads, sorted.
    pub(super) files: Vec<String>,
    /// Whether there is a card.
    pub(super) has_card: bool,
    /// The script that would make the rows; it is never run.
    pub(super) script: Option<String>,
    /// Files of data that lorafit does not read.
    pub(super) unread: Vec<String>,
}

impl Listing {
    fn new(repo: &Repo, commit: String, mut names: Vec<String>) -> Self {
        names.sort();
        names.dedup();
        let script = format!("{}.py", repo.name);
        let (files, others): (Vec<String>, Vec<String>) =
            names.into_iter().partition(|name| is_data(name));
        let is_unread = |name: &&String| {
            let name = name.to_lowercase();
            OTHER_DATA.iter().any(|ending| name.ends_with(ending))
        };
        Self {
            commit,
            files,
            has_card: others.iter().any(|name| name == CARD),
            script: others.iter().find(|name| **name == script).cloned(),
            unread: others.iter().filter(is_unread).cloned().collect(),
        }
    }
}

/// Gives the files of datasets.
pub(super) trait Shelf {
    /// What the repository holds at its revision.
    fn listing(&self, repo: &Repo) -> Result<Listing, HubError>;

    /// Where a file of the commit is.
    fn file(&self, repo: &Repo, commit: &str, name: &str) -> Result<PathBuf, HubError>;

    /// Where the card is.
    fn card(&self, repo: &Repo, commit: &str) -> Result<PathBuf, HubError> {
        self.file(repo, commit, CARD)
    }
}

/// The hub. Remembers in the cache what each commit holds, for [`Cached`].
pub(super) struct Online<'a> {
    remote: &'a Remote,
    listed: RefCell<Vec<(Repo, String)>>,
}

impl<'a> Online<'a> {
    /// A shelf on the hub.
    pub(super) fn new(remote: &'a Remote) -> Self {
        Self {
            remote,
            listed: RefCell::default(),
        }
    }

    /// Notes which commits the revisions are that were used. Last, when the files are there: a
    /// download that fails must not hide what an earlier commit has in the cache.
    pub(super) fn keep_references(&self) -> Result<(), HubError> {
        let listed = self.listed.borrow();
        listed
            .iter()
            .try_for_each(|(repo, commit)| self.remote.keep_reference(repo, commit))
    }
}

impl Shelf for Online<'_> {
    fn listing(&self, repo: &Repo) -> Result<Listing, HubError> {
        let (commit, names) = self.remote.files(repo)?;
        let path = names_path(repo, self.remote.cache(), &commit);
        if !path.is_file() {
            let text = serde_json::to_string(&names).map_err(|e| repo.other(e.to_string()))?;
            write_whole(&path, &text)?;
        }
        self.listed
            .borrow_mut()
            .push((repo.clone(), commit.clone()));
        Ok(Listing::new(repo, commit, names))
    }

    fn file(&self, repo: &Repo, commit: &str, name: &str) -> Result<PathBuf, HubError> {
        self.remote.fetch(repo, name, commit)
    }
}

/// The cache alone.
pub(super) struct Cached<'a> {
    /// The cache.
    pub(super) cache: &'a Path,
    /// Whether to believe that a snapshot that others downloaded is whole, as far as its files'
    /// names do not say otherwise.
    pub(super) trusts_snapshots: bool,
}

impl Shelf for Cached<'_> {
    fn listing(&self, repo: &Repo) -> Result<Listing, HubError> {
        let absent = |what: &str| repo.offline(self.cache, what.into());
        let Some(commit) = repo.cached_commit(self.cache) else {
            return Err(absent("that revision was never downloaded"));
        };
        let path = names_path(repo, self.cache, &commit);
        let noted = fs::read(path)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        let names = match noted {
            Some(names) => names,
            None if self.trusts_snapshots => {
                let mut names = Vec::new();
                walk(&repo.snapshot(self.cache, &commit), "", 0, &mut names);
                add_missing_shards(&mut names);
                names
            }
            None => return Err(absent("its list of files was never downloaded")),
        };
        if names.is_empty() {
            return Err(absent("that revision was never downloaded"));
        }
        Ok(Listing::new(repo, commit, names))
    }

    fn file(&self, repo: &Repo, commit: &str, name: &str) -> Result<PathBuf, HubError> {
        let path = repo.snapshot(self.cache, commit).join(name);
        match path.is_file() {
            true => Ok(path),
            false => Err(repo.offline(self.cache, format!("no {name}"))),
        }
    }
}

/// Where lorafit notes what a commit holds, beside what `huggingface_hub` keeps there: without it,
/// nobody could tell from the cache whether a split is whole.
fn names_path(repo: &Repo, cache: &Path, commit: &str) -> PathBuf {
    let folder = repo.folder(cache).join(".lorafit");
    folder.join(format!("{commit}.json"))
}

/// The files below a folder, named from the top. Links to folders are not followed.
fn walk(top: &Path, below: &str, depth: usize, names: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(top.join(below)) else {
        return;
    };
    for entry in entries.flatten() {
        let (Ok(kind), Ok(name)) = (entry.file_type(), entry.file_name().into_string()) else {
            continue;
        };
        let name = match below {
            "" => name,
            _ => format!("{below}/{name}"),
        };
        if !kind.is_dir() {
            names.push(name);
        } else if depth < MAX_DEPTH {
            walk(top, &name, depth + 1, names);
        }
    }
}

/// Adds the files that must be there by the names of others: `a-00000-of-00002.parquet` has a
/// sibling.
fn add_missing_shards(names: &mut Vec<String>) {
    let mut present: BTreeSet<(String, String)> = BTreeSet::new();
    let mut series: BTreeSet<(String, u32, String)> = BTreeSet::new();
    for name in names.iter().filter(|name| is_data(name)) {
        if let Some(shard) = Shard::parse(name) {
            let extensions = shard.rest.find('.').map_or("", |dot| &shard.rest[dot..]);
            let numbered = name.len() - shard.rest.len();
            present.insert((name[..numbered].into(), extensions.into()));
            series.insert((shard.stem.into(), shard.count, extensions.into()));
        }
    }
    for (stem, count, extensions) in series {
        for index in 0..count {
            let name = format!("{stem}-{index:05}-of-{count:05}");
            if !present.contains(&(name.clone(), extensions.clone())) {
                names.push(name + &extensions);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_of_missing_shards() {
        let mut names: Vec<String> = [
            "data/train-00001-of-00003-abc.parquet",
            "data/test-00000-of-00001.parquet",
            "x-00000-of-00002.py",
        ]
        .map(str::to_string)
        .to_vec();
        add_missing_shards(&mut names);
        assert_eq!(
            names[3..],
            [
                "data/train-00000-of-00003.parquet",
                "data/train-00002-of-00003.parquet"
            ]
        );
    }
}
