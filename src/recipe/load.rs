//! Reads a recipe and its `--set`s into a [`Plan`], or says everything that is wrong with them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value as Json;

use super::check;
use super::conflict;
use super::faults::{Fault, Faults};
use super::given::{Finding, Given, Place, START_FROM_A_TEMPLATE};
use super::plan::Plan;
use super::resolve;
use super::schema;
use super::tree::{self, Node, Value};

/// More than any recipe needs; a data file given by mistake is larger.
const MAX_BYTES: u64 = 1 << 20;

/// More faults than this are counted, not listed.
const MAX_FAULTS: usize = 100;

/// Reads the recipe at `path`, overridden by `sets` of the form `key.path=value`, the value in YAML.
///
/// Paths in a recipe start from the current directory.
///
/// # Errors
/// All faults at once: see [`Faults`].
pub fn load(path: &Path, sets: &[String]) -> Result<Plan, Faults> {
    let text = read(path)?;
    let entries = parse(path, &text)?;
    let mut given = Given::default();
    given.file(entries);
    for (index, set) in sets.iter().enumerate() {
        given.set(index, set);
    }
    given.check();
    conflict::check(&mut given);
    if given.findings.is_empty() {
        return resolve::plan(&given, path)
            .map_err(|error| whole(path, format!("does not resolve: {error}"), "").into());
    }
    Err(locate(given.findings, path, &text, sets))
}

/// Reads the value of one knob, such as a command-line option that shares its range.
///
/// # Errors
/// What is wrong with it, in words.
pub fn value(key: &str, text: &str) -> Result<Json, String> {
    let knob = schema::find(key).ok_or_else(|| format!("there is no knob `{key}`"))?;
    let node = tree::parse(text).map_err(|error| error.message)?;
    let node = node.unwrap_or(Node::NULL);
    check::value(&knob.kind, &node).map_err(|wrong| {
        let wrong = wrong.into_iter().map(|wrong| wrong.message);
        wrong.collect::<Vec<_>>().join("; ")
    })
}

/// A fault of the file as a whole.
fn whole(path: &Path, message: impl Into<String>, remedy: &str) -> Fault {
    Fault {
        file: Some(path.to_owned()),
        line: None,
        set: None,
        key: String::new(),
        message: message.into(),
        remedy: remedy.to_owned(),
    }
}

fn read(path: &Path) -> Result<String, Faults> {
    if path.is_dir() {
        let remedy = "name the recipe file in it";
        return Err(whole(path, "is a directory, expected a YAML file", remedy).into());
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                whole(path, "there is no such recipe", START_FROM_A_TEMPLATE)
            }
            _ => whole(path, format!("cannot be read: {error}"), ""),
        })?;
    if bytes.len() as u64 > MAX_BYTES {
        let remedy = "is this a data file? name it in `data.train` of a recipe";
        return Err(whole(path, "is larger than 1 MiB, expected a recipe", remedy).into());
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        Fault {
            line: Some(1 + valid.iter().filter(|byte| **byte == b'\n').count()),
            ..whole(path, "is not UTF-8 text", "save it as UTF-8")
        }
        .into()
    })
}

fn parse(path: &Path, text: &str) -> Result<Vec<(Node, Node)>, Faults> {
    let error = match tree::parse(text) {
        Ok(Some(Node {
            value: Value::Map(entries),
            ..
        })) => return Ok(entries),
        Ok(Some(root)) => {
            let message = format!(
                "found {}, expected sections such as `base:`",
                root.describe()
            );
            return Err(Fault {
                line: tree::line_of(text, root.id),
                ..whole(path, message, START_FROM_A_TEMPLATE)
            }
            .into());
        }
        Ok(None) => return Err(whole(path, "is empty", START_FROM_A_TEMPLATE).into()),
        Err(error) => error,
    };
    let line = error.line.and_then(|line| text.lines().nth(line - 1));
    let tab = line.is_some_and(|line| {
        let indent = line.len() - line.trim_start().len();
        line[..indent].contains('\t')
    });
    let fault = if tab {
        Fault {
            line: error.line,
            ..whole(path, "is indented with a tab", "YAML takes spaces only")
        }
    } else {
        Fault {
            line: error.line,
            ..whole(path, format!("is not a YAML recipe: {}", error.message), "")
        }
    };
    Err(fault.into())
}

/// Orders the findings by place and looks up their lines.
fn locate(mut findings: Vec<Finding>, path: &Path, text: &str, sets: &[String]) -> Faults {
    findings.sort_by_key(|finding| match finding.place {
        Place::File => (0, 0),
        Place::Node(id) => (1, id),
        Place::Set(index) => (2, index),
    });
    let omitted = findings.len().saturating_sub(MAX_FAULTS);
    findings.truncate(MAX_FAULTS);
    let fault = |finding: Finding| Fault {
        file: (!matches!(finding.place, Place::Set(_))).then(|| path.to_owned()),
        line: match finding.place {
            Place::Node(id) => tree::line_of(text, id),
            Place::File | Place::Set(_) => None,
        },
        set: match finding.place {
            Place::Set(index) => sets.get(index).cloned(),
            Place::File | Place::Node(_) => None,
        },
        key: finding.key,
        message: finding.message,
        remedy: finding.remedy,
    };
    Faults {
        list: findings.into_iter().map(fault).collect(),
        omitted,
    }
}
