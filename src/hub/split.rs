//! Which files of a dataset make up one split of one config, as `datasets` has it for repositories
//! that hold only data.
//!
//! # References
//! <https://huggingface.co/docs/hub/datasets-data-files-configuration>

use std::collections::{BTreeMap, BTreeSet};

use super::dataset::DatasetId;
use super::error::HubError;
use super::pattern::Pattern;

/// Formats of rows, the favourite first.
const FORMATS: &[&str] = &["parquet", "jsonl", "json", "csv", "tsv", "txt"];
/// What may stand behind the format's extension.
const COMPRESSED: &[&str] = &[".gz", ".zst"];
/// Files that look like data by their extension alone.
const NOT_DATA: &[&str] = &[
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "license.txt",
    "licence.txt",
    "readme.txt",
    "requirements.txt",
];
/// The split where none is named.
const TRAIN: &str = "train";
/// Words in names that tell the split.
const KEYWORDS: &[(&str, &[&str])] = &[
    (TRAIN, &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// The files of each split.
pub(super) type Splits = Vec<(String, Vec<String>)>;

/// A part of a dataset with splits of its own.
#[derive(Debug)]
pub(super) struct Config {
    /// Its name.
    pub(super) name: String,
    /// Whether it is taken where none is named.
    pub(super) is_default: bool,
    /// Its files.
    pub(super) data: Data,
}

/// How a config's files are told.
#[derive(Debug)]
pub(super) enum Data {
    /// By patterns for each split.
    Patterns(Vec<(String, Vec<String>)>),
    /// By the names of the files below a folder, which is empty for the repository itself.
    ByName(String),
    /// One by one.
    Files(Splits),
}

/// The files of the config and split that `id` names; none where the config has no data.
///
/// # Errors
/// When there is no such config or split, or none is named and there are several configs.
pub(super) fn choose(
    id: &DatasetId,
    configs: &[Config],
    files: &[String],
) -> Result<Vec<String>, HubError> {
    let config = choose_config(id, configs)?;
    let splits = config
        .splits(files)
        .map_err(|what| HubError::Card { id: id.id(), what })?;
    if splits.iter().all(|(_, files)| files.is_empty()) {
        return Ok(Vec::new());
    }
    let wanted = id.split.as_deref().unwrap_or(TRAIN);
    let known = splits.iter().map(|(split, _)| split.clone()).collect();
    let found = splits.into_iter().find(|(split, _)| split == wanted);
    found
        .map(|(_, files)| files)
        .ok_or_else(|| HubError::NoSuchSplit {
            id: id.id(),
            config: config.name.clone(),
            split: wanted.to_string(),
            known,
        })
}

fn choose_config<'a>(id: &DatasetId, configs: &'a [Config]) -> Result<&'a Config, HubError> {
    let known = || configs.iter().map(|config| config.name.clone()).collect();
    match (&id.config, configs) {
        (None, [only]) => Ok(only),
        (None, several) => several
            .iter()
            .find(|config| config.is_default)
            .ok_or_else(|| HubError::ConfigWanted {
                id: id.id(),
                known: known(),
            }),
        (Some(wanted), several) => several
            .iter()
            .find(|config| config.name == *wanted)
            .ok_or_else(|| HubError::NoSuchConfig {
                id: id.id(),
                config: wanted.clone(),
                known: known(),
            }),
    }
}

impl Config {
    /// The files of each split, or what is wrong with the card.
    fn splits(&self, files: &[String]) -> Result<Splits, String> {
        match &self.data {
            Data::Files(splits) => Ok(splits.clone()),
            Data::ByName(folder) => Ok(by_name(folder, files)),
            Data::Patterns(splits) => splits
                .iter()
                .map(|(split, patterns)| Ok((split.clone(), matching(patterns, files)?)))
                .collect(),
        }
    }
}

/// The configs of a dataset whose card names none: everything, or one of its folders.
pub(super) fn folders(files: &[String]) -> Vec<Config> {
    let folders: BTreeSet<&str> = files
        .iter()
        .filter_map(|file| file.split_once('/'))
        .map(|(folder, _)| folder)
        .filter(|folder| *folder != "default")
        .collect();
    let by_name = |name: &str, folder: &str| Config {
        name: name.to_string(),
        is_default: folder.is_empty(),
        data: Data::ByName(folder.to_string()),
    };
    let folders = folders.into_iter().map(|folder| by_name(folder, folder));
    std::iter::once(by_name("default", ""))
        .chain(folders)
        .collect()
}

/// The configs of a branch that the hub itself converts to Parquet:
/// `CONFIG/SPLIT/0000.parquet`, or `CONFIG/partial-SPLIT/` where the dataset is large.
pub(super) fn converted(files: &[String]) -> Vec<Config> {
    let mut configs: BTreeMap<&str, BTreeMap<&str, Vec<String>>> = BTreeMap::new();
    for file in files.iter().filter(|file| file.ends_with(".parquet")) {
        let parts: Vec<&str> = file.split('/').collect();
        if let [config, split, _] = parts[..] {
            let split = split.strip_prefix("partial-").unwrap_or(split);
            let splits = configs.entry(config).or_default();
            splits.entry(split).or_default().push(file.clone());
        }
    }
    let config = |(name, splits): (&str, BTreeMap<&str, Vec<String>>)| Config {
        name: name.to_string(),
        is_default: name == "default",
        data: Data::Files(
            splits
                .into_iter()
                .map(|(split, files)| (split.to_string(), files))
                .collect(),
        ),
    };
    configs.into_iter().map(config).collect()
}

/// The files that match, in the order of the patterns, each once.
pub(super) fn matching(patterns: &[String], files: &[String]) -> Result<Vec<String>, String> {
    let mut found: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    for pattern in patterns {
        let pattern = Pattern::new(pattern)?;
        let fresh = files.iter().filter(|file| pattern.matches(file));
        found.extend(fresh.filter(|file| seen.insert(file.as_str())).cloned());
    }
    Ok(found)
}

/// Whether a file holds rows that lorafit reads. Hidden files and folders do not.
pub(super) fn is_data(file: &str) -> bool {
    let hidden = |part: &str| part.starts_with('.') || part.starts_with("__");
    format(file).is_some() && !file.split('/').any(hidden)
}

/// The formats, for messages.
pub(super) fn formats() -> String {
    FORMATS.join(", ")
}

/// The place of the file's format in [`FORMATS`].
fn format(file: &str) -> Option<usize> {
    let name = base_name(file).to_lowercase();
    let plain = COMPRESSED
        .iter()
        .find_map(|suffix| name.strip_suffix(suffix))
        .unwrap_or(&name);
    let (_, extension) = plain.rsplit_once('.')?;
    FORMATS
        .iter()
        .position(|format| *format == extension)
        .filter(|_| !NOT_DATA.contains(&plain))
}

fn base_name(file: &str) -> &str {
    file.rsplit('/').next().unwrap_or(file)
}

/// Splits by the names of files and folders; a dataset without such names is all `train`. Of
/// several formats the commonest counts: the others are notes beside the data, or copies of it.
fn by_name(folder: &str, files: &[String]) -> Splits {
    let folder = folder.trim_start_matches("./").trim_matches('/');
    let below = |file: &String| match folder {
        "" | "." => Some(file.clone()),
        _ => file
            .strip_prefix(folder)?
            .strip_prefix('/')
            .map(str::to_string),
    };
    let files: Vec<String> = files.iter().filter_map(below).collect();
    let mut splits = [sharded, by_folder, by_file]
        .iter()
        .map(|rule| rule(&files))
        .find(|splits| !splits.is_empty())
        .unwrap_or_else(|| vec![(TRAIN.to_string(), files)]);
    keep_commonest_format(&mut splits);
    if !matches!(folder, "" | ".") {
        for file in splits.iter_mut().flat_map(|(_, files)| files) {
            *file = format!("{folder}/{file}");
        }
    }
    splits
}

/// `data/SPLIT-00000-of-00001.parquet`, with splits of any name.
fn sharded(files: &[String]) -> Splits {
    let mut found: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for file in files {
        let name = file
            .strip_prefix("data/")
            .filter(|name| !name.contains('/'));
        if let Some(shard) = name.and_then(Shard::parse) {
            found.entry(shard.stem).or_default().push(file.clone());
        }
    }
    let rank = |split: &str| KEYWORDS.iter().position(|(name, _)| *name == split);
    let mut splits: Splits = found
        .into_iter()
        .map(|(split, files)| (split.to_string(), files))
        .collect();
    splits.sort_by_key(|(split, _)| rank(split).unwrap_or(usize::MAX));
    splits
}

/// A name that tells how many files there are: `STEM-00000-of-00001.REST`.
pub(super) struct Shard<'a> {
    /// What stands before the numbers.
    pub(super) stem: &'a str,
    /// How many files there are.
    pub(super) count: u32,
    /// What stands behind the numbers.
    pub(super) rest: &'a str,
}

impl<'a> Shard<'a> {
    /// Takes a name apart; `None` when it has no such numbers.
    pub(super) fn parse(name: &'a str) -> Option<Self> {
        const DIGITS: usize = 5;
        let (before, after) = name.rsplit_once("-of-")?;
        let number = |text: &str| {
            let plain = text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u32>().ok().filter(|_| plain)
        };
        let (stem, index) = before.rsplit_once('-')?;
        let (count, rest) = (after.get(..DIGITS)?, after.get(DIGITS..)?);
        number(index)?;
        Some(Self {
            stem,
            count: number(count)?,
            rest,
        })
        .filter(|shard| !shard.stem.is_empty() && rest.contains('.'))
    }
}

/// Files in folders named for a split.
fn by_folder(files: &[String]) -> Splits {
    by_keyword(files, |file, word| {
        let mut folders = file.split('/').rev().skip(1);
        folders.any(|folder| has_word(folder, word, true))
    })
}

/// Files named for a split.
fn by_file(files: &[String]) -> Splits {
    by_keyword(files, |file, word| has_word(base_name(file), word, false))
}

fn by_keyword(files: &[String], tells: impl Fn(&str, &str) -> bool) -> Splits {
    let splits = KEYWORDS.iter().map(|(split, words)| {
        let told = |file: &&String| words.iter().any(|word| tells(file, word));
        let files: Vec<String> = files.iter().filter(told).cloned().collect();
        (split.to_string(), files)
    });
    splits.filter(|(_, files)| !files.is_empty()).collect()
}

/// Whether the word stands in the name by itself; `whole` lets the name end with it.
fn has_word(name: &str, word: &str, whole: bool) -> bool {
    let apart = |c: char| "-._ ".contains(c) || c.is_ascii_digit();
    name.match_indices(word).any(|(at, _)| {
        let before = name[..at].chars().next_back();
        let after = name[at + word.len()..].chars().next();
        before.is_none_or(apart) && after.map_or(whole, apart)
    })
}

fn keep_commonest_format(splits: &mut Splits) {
    let mut counts = vec![0; FORMATS.len()];
    for file in splits.iter().flat_map(|(_, files)| files) {
        if let Some(count) = format(file).and_then(|format| counts.get_mut(format)) {
            *count += 1;
        }
    }
    let most = counts.iter().max();
    let commonest = counts.iter().position(|count| Some(count) == most);
    for (_, files) in splits.iter_mut() {
        files.retain(|file| format(file) == commonest);
    }
    splits.retain(|(_, files)| !files.is_empty());
}
