//! What a recipe and its `--set`s give: each known key with its value and where it stands.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::check;
use super::schema::{self, KNOBS, Knob, SECTIONS};
use super::suggest;
use super::tree::{self, Node, Value};

/// Where something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The recipe as a whole.
    File,
    /// The recipe, at the node with this number.
    Node(usize),
    /// The `--set` with this index.
    Set(usize),
}

/// A fault whose line has not been looked up yet.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) place: Place,
    pub(super) key: String,
    pub(super) message: String,
    pub(super) remedy: String,
}

/// A knob that is given.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) place: Place,
    /// What [`Plan`](super::Plan) deserialises from; `None` when the value is at fault.
    pub(super) value: Option<Json>,
}

/// All knobs that are given, and what is wrong so far.
#[derive(Debug, Default)]
pub(super) struct Given {
    pub(super) entries: BTreeMap<&'static str, Entry>,
    pub(super) findings: Vec<Finding>,
    /// Knobs that a mistyped key probably meant: not missed a second time.
    pub(super) meant: Vec<&'static str>,
    raw: BTreeMap<&'static str, (Place, Node)>,
    sections: BTreeMap<&'static str, Place>,
}

impl Given {
    pub(super) fn find(
        &mut self,
        place: Place,
        key: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.findings.push(Finding {
            place,
            key: key.into(),
            message: message.into(),
            remedy: remedy.into(),
        });
    }

    /// The section's place, where it is given.
    pub(super) fn section(&self, name: &str) -> Place {
        self.sections.get(name).copied().unwrap_or(Place::File)
    }

    /// Takes up the entries of the recipe file.
    pub(super) fn file(&mut self, entries: Vec<(Node, Node)>) {
        for (key, node) in entries {
            let place = Place::Node(key.id);
            let name = key.key_text();
            let section = SECTIONS.iter().map(|(section, _)| *section);
            if let Some(section) = section.clone().find(|section| *section == name) {
                self.section_entries(section, place, node);
            } else if schema::find(&name).is_some_and(|knob| knob.split().0.is_empty()) {
                self.knob("", &name, place, node);
            } else if let (Value::Map(_), Some(section)) =
                (&node.value, suggest::nearest(&name, section))
            {
                let remedy = format!("did you mean {section}?");
                self.find(place, name, "unknown section", remedy);
                self.section_entries(section, place, node);
            } else {
                self.unknown("", &name, place);
            }
        }
    }

    fn section_entries(&mut self, section: &'static str, place: Place, node: Node) {
        if self.sections.insert(section, place).is_some() {
            self.find(place, section, "is given twice", "keep one");
        }
        match node.value {
            Value::Null => {}
            Value::Map(entries) => {
                for (key, node) in entries {
                    let place = Place::Node(key.id);
                    self.knob(section, &key.key_text(), place, node);
                }
            }
            _ => {
                let message = format!("found {}, expected a map of knobs", node.describe());
                let remedy = format!("indent the knobs under `{section}:`, one a line");
                self.find(place, section, message, remedy);
            }
        }
    }

    /// Takes up one key of the file.
    fn knob(&mut self, section: &str, name: &str, place: Place, node: Node) {
        let Some(knob) = schema::find(&dotted(section, name)) else {
            return self.unknown(section, name, place);
        };
        if self.raw.contains_key(knob.key) {
            let message = match knob.split().1 == name {
                true => "is given twice".into(),
                false => format!("is given twice, `{name}` is another name for it"),
            };
            return self.find(place, knob.key, message, "keep one");
        }
        self.raw.insert(knob.key, (place, node));
    }

    /// Takes up one `--set key=value`; it replaces what the file and earlier ones say.
    pub(super) fn set(&mut self, index: usize, argument: &str) {
        let place = Place::Set(index);
        let Some((key, text)) = argument.split_once('=') else {
            let remedy = "write --set key=value, for example --set train.max_steps=100";
            return self.find(place, argument, "has no `=`", remedy);
        };
        let key = key.trim();
        let Some(knob) = schema::find(key) else {
            if SECTIONS.iter().any(|(section, _)| *section == key) {
                let remedy = format!("set one knob of it, such as {}", example(key));
                return self.find(place, key, "is a section, expected a knob", remedy);
            }
            let (section, name) = key.split_once('.').unwrap_or(("", key));
            return self.unknown(section, name, place);
        };
        match tree::parse(text) {
            Ok(node) => {
                self.raw
                    .insert(knob.key, (place, node.unwrap_or(Node::NULL)));
            }
            Err(error) => {
                let message = format!("the value is not YAML: {}", error.message);
                self.find(place, knob.key, message, "put it in quotes");
            }
        }
    }

    fn unknown(&mut self, section: &str, name: &str, place: Place) {
        let key = dotted(section, name);
        let remedy = if let Some(knob) = schema::find(name).filter(|_| section.is_empty()) {
            let (section, name) = knob.split();
            self.meant.push(knob.key);
            format!("write `{name}:` indented under `{section}:`")
        } else if let Some(meant) = suggest::key(section, name) {
            self.meant.push(meant);
            format!("did you mean {meant}?")
        } else {
            names_in(section)
        };
        self.find(place, key, "unknown key", remedy);
    }

    /// Checks every value that was taken up. Null is as if the key were not there.
    pub(super) fn check(&mut self) {
        for knob in KNOBS {
            let Some((place, node)) = self.raw.remove(knob.key) else {
                continue;
            };
            if matches!(node.value, Value::Null) {
                continue;
            }
            let value = match check::value(&knob.kind, &node) {
                Ok(value) => Some(value),
                Err(mismatches) => {
                    for wrong in mismatches {
                        let place = match place {
                            // The key's line, unless an item further down is meant.
                            Place::Node(_) if !wrong.suffix.is_empty() => Place::Node(wrong.id),
                            _ => place,
                        };
                        let key = format!("{}{}", knob.key, wrong.suffix);
                        let remedy = advice(knob, wrong.remedy);
                        self.find(place, key, wrong.message, remedy);
                    }
                    None
                }
            };
            self.entries.insert(knob.key, Entry { place, value });
        }
    }
}

/// Remedy of a recipe that is no recipe.
pub(super) const START_FROM_A_TEMPLATE: &str = "`lorafit init` writes a recipe to start from";

fn advice(knob: &Knob, remedy: String) -> String {
    match knob.default_text() {
        Some(default) if remedy.is_empty() && default != "null" => {
            format!("the default is {default}")
        }
        _ => remedy,
    }
}

fn dotted(section: &str, name: &str) -> String {
    match section {
        "" => name.to_owned(),
        _ => format!("{section}.{name}"),
    }
}

fn example(section: &str) -> String {
    KNOBS
        .iter()
        .find(|knob| knob.split().0 == section)
        .map_or(String::new(), |knob| knob.key.to_owned())
}

/// What may stand in a section.
fn names_in(section: &str) -> String {
    let knobs: Vec<_> = KNOBS
        .iter()
        .map(Knob::split)
        .filter(|(of, _)| *of == section)
        .map(|(_, name)| name)
        .collect();
    let sections = SECTIONS.iter().map(|(name, _)| *name);
    if section.is_empty() {
        let names: Vec<_> = sections.chain(knobs).collect();
        format!("a recipe has {}", names.join(", "))
    } else if knobs.is_empty() {
        let names: Vec<_> = sections.collect();
        format!("the sections are {}", names.join(", "))
    } else {
        format!("{section} has {}", knobs.join(", "))
    }
}
