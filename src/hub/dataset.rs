//! Finds the files of one split of a dataset on the hub.
//!
//! The card's configs say which files those are, or their names do. Where a repository holds a
//! loading script or formats that lorafit does not read, the copy is taken that the hub itself
//! converts to Parquet; scripts are never run.

use std::path::PathBuf;

use super::download::download;
use super::shelf::{Cached, Listing, Online, Shelf};
use super::split;
use super::{
    HubError, HubOptions, MAIN, Progress, Repo, RepoKind, card, check_revision, client, is_commit,
    is_id_part, stays_inside,
};

/// The branch of the hub's own Parquet files.
const CONVERTED: &str = "refs/convert/parquet";
/// What paths of datasets on the hub begin with.
const SCHEME: &str = "hf://";

/// A dataset of the hub: `hf://owner/name` with config, split and revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetId {
    /// The first half of the id.
    pub owner: String,
    /// The second.
    pub name: String,
    /// The files to read, as a pattern: `data/*.parquet`. Config and split do not matter then.
    pub path: Option<String>,
    /// A part of the dataset; `None` means the default one.
    pub config: Option<String>,
    /// `None` means `train`.
    pub split: Option<String>,
    /// Branch, tag or commit; `None` means `main`.
    pub revision: Option<String>,
}

impl DatasetId {
    /// Reads `hf://owner/name`, `hf://datasets/owner/name` or `hf://owner/name/path/in/it/*.parquet`.
    ///
    /// # Errors
    /// When the path or the revision has another form, or files are named and also a config or a
    /// split.
    pub fn parse(
        path: &str,
        config: Option<&str>,
        split: Option<&str>,
        revision: Option<&str>,
    ) -> Result<Self, HubError> {
        let bad = |what: &str| HubError::BadDataset {
            path: path.to_string(),
            what: what.to_string(),
        };
        let rest = path
            .strip_prefix(SCHEME)
            .ok_or_else(|| bad("does not begin with hf://"))?;
        let rest = rest.strip_prefix("datasets/").unwrap_or(rest);
        let mut parts = rest.trim_end_matches('/').splitn(3, '/');
        let (owner, name) = (parts.next(), parts.next());
        let (Some(owner), Some(name)) = (owner, name) else {
            return Err(bad("has no owner and name"));
        };
        if !is_id_part(owner) || !is_id_part(name) {
            return Err(bad("has no plain owner and name"));
        }
        let files = parts.next();
        if let Some(files) = files {
            if !stays_inside(files) {
                return Err(bad("names files outside of the dataset"));
            }
            if config.is_some() || split.is_some() {
                return Err(bad("names files, so config and split must be left out"));
            }
            // Read here once, so that a pattern with a fault is reported before any download.
            split::matching(&[files.to_string()], &[]).map_err(|what| bad(&what))?;
        }
        check_revision(revision.unwrap_or(MAIN))?;
        Ok(Self {
            owner: owner.to_string(),
            name: name.to_string(),
            path: files.map(str::to_string),
            config: config.map(str::to_string),
            split: split.map(str::to_string),
            revision: revision.map(str::to_string),
        })
    }

    /// `owner/name`.
    pub fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    fn repo(&self) -> Repo {
        Repo {
            kind: RepoKind::Dataset,
            owner: self.owner.clone(),
            name: self.name.clone(),
            revision: self.revision.clone().unwrap_or_else(|| MAIN.into()),
        }
    }
}

/// Downloads the files of one split into the cache and returns their paths in order. What is
/// there already is not downloaded again.
///
/// # Errors
/// When there is no such dataset, config or split, it has no files that lorafit reads, or they
/// cannot be downloaded.
pub fn locate_dataset(
    id: &DatasetId,
    options: &HubOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<PathBuf>, HubError> {
    let repo = id.repo();
    // The fields are public, and parts of a path in the cache.
    check_revision(&repo.revision)?;
    if !is_id_part(&repo.owner) || !is_id_part(&repo.name) {
        return Err(HubError::BadDataset {
            path: format!("{SCHEME}{}", id.id()),
            what: "has no plain owner and name".into(),
        });
    }
    let client = client(options).map_err(|error| repo.explain(error, "the hub"))?;
    let cache = client.cache_dir().to_path_buf();
    let cached = |trusts_snapshots| {
        let shelf = Cached {
            cache: &cache,
            trusts_snapshots,
        };
        locate_on(id, &shelf)
    };
    if options.offline {
        return cached(true);
    }
    if is_commit(&repo.revision)
        && let Ok(found) = cached(false)
    {
        return Ok(found);
    }
    let wanted = id.clone();
    let result = download(&repo, client, options.patience, progress, move |remote| {
        let shelf = Online::new(remote);
        let found = locate_on(&wanted, &shelf)?;
        shelf.keep_references()?;
        Ok(found)
    });
    match result {
        // The hub is away, but what it gave before is whole.
        Err(HubError::Unreachable { .. }) => cached(false).or(result),
        result => result,
    }
}

/// The files of the split, all on this machine.
fn locate_on(id: &DatasetId, shelf: &dyn Shelf) -> Result<Vec<PathBuf>, HubError> {
    let repo = id.repo();
    let listing = shelf.listing(&repo)?;
    let (repo, commit, files) = match choose(id, &listing, shelf)? {
        Choice::Own(files) => (repo, listing.commit, files),
        Choice::Converted(commit, files) => (repo.at(CONVERTED), commit, files),
    };
    files
        .iter()
        .map(|file| shelf.file(&repo, &commit, file))
        .collect()
}

/// The files that were chosen, and where.
enum Choice {
    /// In the repository itself.
    Own(Vec<String>),
    /// In the branch that the hub converts, at this commit.
    Converted(String, Vec<String>),
}

fn choose(id: &DatasetId, listing: &Listing, shelf: &dyn Shelf) -> Result<Choice, HubError> {
    if let Some(pattern) = &id.path {
        return named(id, pattern, listing).map(Choice::Own);
    }
    let repo = id.repo();
    let files = &listing.files;
    if repo.revision == CONVERTED {
        return split::choose(id, &split::converted(files), files).map(Choice::Own);
    }
    let mut configs = Vec::new();
    if listing.has_card {
        let path = shelf.card(&repo, &listing.commit)?;
        configs = card::read(&path).map_err(|what| HubError::Card { id: id.id(), what })?;
    }
    // A script may make other rows of the files beside it, and a few files beside many that are
    // not read are hardly the data: there, the hub's copy is better.
    let is_plain = listing.script.is_none() && listing.unread.len() <= files.len();
    if configs.is_empty() {
        if !is_plain {
            match converted(id, shelf) {
                Ok(Some(choice)) => return Ok(choice),
                // Offline it may be missing because there is none: then the files count, below.
                Ok(None) | Err(HubError::Offline { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        configs = split::folders(files);
    }
    let own = match files.is_empty() {
        true => Vec::new(),
        false => split::choose(id, &configs, files)?,
    };
    if !own.is_empty() {
        return Ok(Choice::Own(own));
    }
    match converted(id, shelf)? {
        Some(choice) => Ok(choice),
        None => Err(no_data(id, listing)),
    }
}

/// The files that a path behind the id names.
fn named(id: &DatasetId, pattern: &str, listing: &Listing) -> Result<Vec<String>, HubError> {
    let patterns = [pattern.to_string()];
    let no_data = |what: String| HubError::NoData { id: id.id(), what };
    let found = split::matching(&patterns, &listing.files).map_err(no_data)?;
    match found.is_empty() {
        false => Ok(found),
        true => Err(no_data(format!(
            "`{pattern}` names none of its files in {}",
            split::formats()
        ))),
    }
}

/// The split in the hub's own Parquet files; `None` where there are none. They are of `main` alone.
fn converted(id: &DatasetId, shelf: &dyn Shelf) -> Result<Option<Choice>, HubError> {
    let repo = id.repo();
    if repo.revision != MAIN {
        return Ok(None);
    }
    let listing = match shelf.listing(&repo.at(CONVERTED)) {
        Ok(listing) => listing,
        Err(HubError::NoSuchRevision { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let configs = split::converted(&listing.files);
    if configs.is_empty() {
        return Ok(None);
    }
    let files = split::choose(id, &configs, &listing.files)?;
    Ok(Some(Choice::Converted(listing.commit, files)))
}

fn no_data(id: &DatasetId, listing: &Listing) -> HubError {
    let held = match (&listing.script, listing.unread.first()) {
        (Some(script), _) => {
            format!("its script {script} would make it, but scripts are never run")
        }
        (None, Some(file)) => format!("it has other formats ({file})"),
        (None, None) if listing.files.is_empty() => "it has no files of rows".into(),
        (None, None) => "its card names no file that is there".into(),
    };
    HubError::NoData {
        id: id.id(),
        what: format!(
            "{held}; expected {}, or a copy that the hub has converted to Parquet (main only): \
             convert it on a machine you trust, and give the path of the files",
            split::formats()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart() {
        let parse = |path| DatasetId::parse(path, None, None, None);
        let id = parse("hf://a/b-c.d").unwrap();
        assert_eq!((id.id().as_str(), &id.path), ("a/b-c.d", &None));
        assert_eq!(parse("hf://datasets/a/b-c.d/").unwrap(), id);
        let id = parse("hf://a/b/data/*.parquet").unwrap();
        assert_eq!(id.path.as_deref(), Some("data/*.parquet"));
        for path in [
            "a/b",
            "hf://",
            "hf://a",
            "hf://a/",
            "hf:///a/b",
            "hf://../b",
            "hf://a/..",
            "hf://a/b/../c",
            "hf://a/b//c",
            "hf://a/b@main",
            "hf://a/b\\c",
            "hf://a/b/c\\d",
            "hf://a/b/[z-a]",
            "hf://datasets/a",
        ] {
            let error = parse(path).unwrap_err();
            assert!(matches!(error, HubError::BadDataset { .. }), "{path}");
        }
        assert!(DatasetId::parse("hf://a/b/c.csv", None, Some("train"), None).is_err());
        assert!(DatasetId::parse("hf://a/b", None, None, Some("../main")).is_err());
        assert!(DatasetId::parse("hf://a/b", Some("x"), Some("y"), Some("refs/pr/1")).is_ok());
    }
}
