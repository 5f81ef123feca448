//! One entry of `data.train`: a path, or a map of a path and what else is to be known of it.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::check::{self, Checked, Mismatch, mismatch, text, where_paths_start, wrong};
use super::knob_words::FORMAT;
use super::schema::{Edge, Kind};
use super::suggest;
use super::tree::{Node, Value};

/// Where a dataset of the hub begins.
pub const HUB: &str = "hf://";

/// What a source may say besides its path.
const KEYS: &[(&str, Kind)] = &[
    ("format", FORMAT),
    (
        "weight",
        Kind::Real(Edge::Without(0.0), Edge::With(10_000.0)),
    ),
    ("fields", Kind::Patterns(&Kind::Text)),
    ("config", Kind::Text),
    ("split", Kind::Text),
    ("revision", Kind::Text),
    (
        "sample_by",
        Kind::Choice(&[
            ("line", "a row is a line"),
            ("paragraph", "a row ends with a blank line"),
            ("document", "a row is a file"),
        ]),
    ),
];

/// Keys that mean something for datasets of the hub alone.
const OF_THE_HUB: [&str; 3] = ["config", "split", "revision"];

/// Names that other tools have for the keys of a source.
const ELSEWHERE: &[(&str, &str)] = &[
    ("file", "path"),
    ("data_files", "path"),
    ("type", "format"),
    ("ds_type", "format"),
    ("name", "config"),
    ("subset", "config"),
    ("columns", "fields"),
    ("field_map", "fields"),
    ("ratio", "weight"),
    ("probability", "weight"),
];

/// Checks one source.
pub(super) fn check(kind: &Kind, node: &Node) -> Checked {
    let Value::Map(entries) = &node.value else {
        let path = path(kind, node)?;
        return Ok(json!({ "path": path }));
    };
    let mut source = Map::new();
    let mut mismatches = Vec::new();
    for (key, node) in entries {
        match entry(kind, &source, key, node) {
            Ok(None) => {}
            Ok(Some((name, value))) => {
                source.insert(name, value);
            }
            Err(wrong) => mismatches.extend(wrong.into_iter().map(|wrong| Mismatch {
                suffix: format!(".{}{}", key.key_text(), wrong.suffix),
                ..wrong
            })),
        }
    }
    if !entries.iter().any(|(key, _)| key.key_text() == "path") {
        let remedy = "add `path: …`".to_owned();
        mismatches.extend(mismatch(node, "has no `path`".to_owned(), remedy));
    }
    let is_local = source
        .get("path")
        .and_then(Json::as_str)
        .is_some_and(|path| !path.starts_with(HUB));
    for key in OF_THE_HUB {
        if is_local && source.contains_key(key) {
            let message = format!("`{key}` means nothing for a local file");
            let remedy = format!("remove it, or name a dataset of the hub as `{HUB}owner/name`");
            mismatches.extend(mismatch(node, message, remedy));
        }
    }
    if mismatches.is_empty() {
        Ok(Json::Object(source))
    } else {
        Err(mismatches)
    }
}

/// One key of a source; `None` for a null, which is as if it were not there.
fn entry(
    kind: &Kind,
    source: &Map<String, Json>,
    key: &Node,
    node: &Node,
) -> Result<Option<(String, Json)>, Vec<Mismatch>> {
    let name = key.key_text();
    if source.contains_key(&name) {
        let wrong = mismatch(key, "is given twice".to_owned(), "keep one".to_owned());
        return Err(wrong);
    }
    if name == "path" {
        return Ok(Some((name, Json::from(path(kind, node)?))));
    }
    let Some((_, of_key)) = KEYS.iter().find(|(known, _)| *known == name) else {
        return Err(mismatch(key, "unknown key".to_owned(), meant(&name)));
    };
    if matches!(node.value, Value::Null) {
        return Ok(None);
    }
    let mut value = check::value(of_key, node)?;
    if let (Kind::Patterns(_), Json::Array(pairs)) = (of_key, &value) {
        let pair = |pair: &Json| Some((pair.get(0)?.as_str()?.to_owned(), pair.get(1)?.clone()));
        value = Json::Object(pairs.iter().filter_map(pair).collect());
    }
    Ok(Some((name, value)))
}

fn meant(name: &str) -> String {
    let known = || KEYS.iter().map(|(known, _)| *known).chain(["path"]);
    let elsewhere = ELSEWHERE.iter().find(|(other, _)| *other == name);
    match elsewhere
        .map(|(_, key)| *key)
        .or_else(|| suggest::nearest(name, known()))
    {
        Some(key) => format!("did you mean {key}?"),
        None => {
            let names: Vec<_> = known().collect();
            format!("a source has {}", names.join(", "))
        }
    }
}

/// A path must lead to something; a dataset of the hub is looked up later.
fn path(kind: &Kind, node: &Node) -> Result<String, Vec<Mismatch>> {
    let name = text(kind, node)?;
    if let Some(id) = name.strip_prefix(HUB) {
        let parts: Vec<_> = id.split('/').collect();
        if parts.len() < 2 || parts.iter().any(|part| part.is_empty()) {
            return wrong(kind, node, "write it as `hf://owner/name`");
        }
        return Ok(name);
    }
    if Path::new(&name).exists() {
        return Ok(name);
    }
    if is_pattern(&name) {
        let matches = |mut found: glob::Paths| found.next().is_some();
        return match glob::glob(&name).map(matches) {
            Ok(true) => Ok(name),
            Ok(false) => {
                let message = format!("no file matches `{name}`");
                Err(mismatch(node, message, where_paths_start()))
            }
            Err(error) => {
                let message = format!("`{name}` is not a pattern of files: {}", error.msg);
                Err(mismatch(node, message, String::new()))
            }
        };
    }
    let message = format!("`{name}` does not exist, expected {}", kind.expected());
    Err(mismatch(node, message, where_paths_start()))
}

/// Whether a path that does not exist as it is may stand for several.
pub fn is_pattern(path: &str) -> bool {
    path.contains(['*', '?', '['])
}

/// The JSON Schema of a source.
pub(super) fn json_schema() -> Json {
    let mut properties = Map::new();
    properties.insert("path".into(), json!({"type": "string", "minLength": 1}));
    for (name, kind) in KEYS {
        properties.insert((*name).to_owned(), kind.json_schema());
    }
    json!({"anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "object",
            "additionalProperties": false,
            "required": ["path"],
            "properties": properties,
        },
    ]})
}
