//! The configs that a dataset's card names: the YAML at the top of its `README.md`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::split::{Config, Data};
use crate::recipe::yaml_to_json;

/// More than the longest cards have; the text below the YAML is not read.
const MAX_BYTES: u64 = 4 << 20;

/// The configs of the card in this file, none where it names none.
///
/// # Errors
/// What is wrong with the card, in words.
pub(super) fn read(path: &Path) -> Result<Vec<Config>, String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes))
        .map_err(|error| format!("cannot be read: {error}"))?;
    configs(&String::from_utf8_lossy(&bytes))
}

/// The configs that a card's text names.
fn configs(card: &str) -> Result<Vec<Config>, String> {
    let Some(yaml) = front_matter(card)? else {
        return Ok(Vec::new());
    };
    let front = yaml_to_json(yaml).map_err(|error| format!("does not begin with YAML: {error}"))?;
    match front.get("configs") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(configs)) => configs.iter().map(config).collect(),
        Some(_) => Err("has `configs` that are not a list".into()),
    }
}

/// The YAML between the first line `---` and the next.
fn front_matter(card: &str) -> Result<Option<&str>, String> {
    let card = card.trim_start_matches('\u{feff}');
    let mut lines = card.split_inclusive('\n');
    let Some(first) = lines.next().filter(|line| line.trim_end() == "---") else {
        return Ok(None);
    };
    let mut end = first.len();
    for line in lines {
        if line.trim_end() == "---" {
            return Ok(Some(&card[first.len()..end]));
        }
        end += line.len();
    }
    match card.len() as u64 >= MAX_BYTES {
        true => Err(format!(
            "begins with more than {} MiB of YAML",
            MAX_BYTES >> 20
        )),
        false => Ok(None),
    }
}

fn config(value: &Value) -> Result<Config, String> {
    let Some(map) = value.as_object() else {
        return Err("has a config that is not a map".into());
    };
    let name = map.get("config_name").and_then(text);
    let name = name.unwrap_or_else(|| "default".into());
    let folder = map.get("data_dir").and_then(text).unwrap_or_default();
    let data = match map.get("data_files") {
        None | Some(Value::Null) => Data::ByName(folder),
        Some(files) => {
            let mut splits = splits(files)
                .ok_or_else(|| format!("has a config `{name}` whose `data_files` name no files"))?;
            for pattern in splits.iter_mut().flat_map(|(_, patterns)| patterns) {
                *pattern = below(&folder, pattern);
            }
            Data::Patterns(splits)
        }
    };
    Ok(Config {
        is_default: name == "default" || map.get("default") == Some(&Value::Bool(true)),
        name,
        data,
    })
}

/// A pattern that is relative to a config's `data_dir`.
fn below(folder: &str, pattern: &str) -> String {
    let folder = folder.trim_start_matches("./").trim_matches('/');
    match folder {
        "" | "." => pattern.to_string(),
        _ => format!("{folder}/{}", pattern.trim_start_matches("./")),
    }
}

/// `data_files` as patterns of each split: text, a list of texts, a list of `{split, path}`, or a
/// map from splits.
fn splits(files: &Value) -> Option<Vec<(String, Vec<String>)>> {
    let train = |patterns| vec![("train".to_string(), patterns)];
    match files {
        Value::Array(items) if items.iter().any(Value::is_object) => {
            let entry = |map: &Map<String, Value>| {
                let split = map.get("split").and_then(text);
                let patterns = patterns(map.get("path")?)?;
                Some((split.unwrap_or_else(|| "train".into()), patterns))
            };
            items.iter().map(|item| entry(item.as_object()?)).collect()
        }
        Value::Object(map) => map
            .iter()
            .map(|(split, files)| Some((split.clone(), patterns(files)?)))
            .collect(),
        other => patterns(other).map(train),
    }
}

fn patterns(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(one) => Some(vec![one.clone()]),
        Value::Array(several) if !several.is_empty() => several
            .iter()
            .map(|pattern| pattern.as_str().map(str::to_string))
            .collect(),
        _ => None,
    }
}

/// A name; YAML makes numbers of some.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_take_every_form_of_data_files() {
        let card = "---\nlicense: mit\nconfigs:\n\
            - config_name: a\n  data_files: x.csv\n\
            - config_name: b\n  default: true\n  data_files: [x.csv, y.csv]\n  data_dir: ./deep/\n\
            - config_name: 2024\n  data_files:\n  - split: test\n    path: t/*\n  - split: train\n    path: [u, v]\n\
            - config_name: d\n  data_files: {train: x, dev: [y]}\n\
            - config_name: e\n  data_dir: sub\n\
            ---\n# Title\n---\nmore\n";
        let configs = configs(card).unwrap();
        let names: Vec<&str> = configs.iter().map(|config| &config.name[..]).collect();
        assert_eq!(names, ["a", "b", "2024", "d", "e"]);
        let defaults: Vec<bool> = configs.iter().map(|config| config.is_default).collect();
        assert_eq!(defaults, [false, true, false, false, false]);
        let patterns = |index: usize| match &configs[index].data {
            Data::Patterns(splits) => splits
                .iter()
                .map(|(split, patterns)| format!("{split}={}", patterns.join(",")))
                .collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        assert_eq!(patterns(0), ["train=x.csv"]);
        assert_eq!(patterns(1), ["train=deep/x.csv,deep/y.csv"]);
        assert_eq!(patterns(2), ["test=t/*", "train=u,v"]);
        assert_eq!(patterns(3), ["train=x", "dev=y"]);
        assert!(matches!(&configs[4].data, Data::ByName(folder) if folder == "sub"));
    }

    #[test]
    fn cards_without_configs_have_none() {
        for card in [
            "",
            "# Title\n---\nconfigs: 1\n---\n",
            "---\nconfigs: [1]\n",
            "---\n---\n",
            "---\nlicense: mit\n---\n",
            "---\nconfigs:\n---",
        ] {
            assert!(configs(card).unwrap().is_empty(), "{card}");
        }
        for card in [
            "---\na: [\n---\n",
            "---\nconfigs: x\n---\n",
            "---\nconfigs: [x]\n---\n",
            "---\r\nconfigs: [{data_files: []}]\r\n---\r\n",
            "---\nconfigs: [{data_files: [{split: a}]}]\n---\n",
        ] {
            assert!(configs(card).is_err(), "{card}");
        }
    }
}
