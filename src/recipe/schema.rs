//! What a knob is, and the JSON Schema of all of them.
//!
//! The knobs themselves are declared once, in [`KNOBS`]. Validation, the JSON Schema, the templates
//! of `lorafit init`, the reference page and the help of commands that share a knob all come
//! from there.

use serde_json::{Map, Value as Json, json};

pub use super::document::{commented_template, reference_markdown, template_names};
pub use super::knobs::KNOBS;
use super::{check, source};

/// A knob: a value that a recipe may set.
#[derive(Debug, Clone, Copy)]
pub struct Knob {
    /// Dotted key: section and name.
    pub key: &'static str,
    /// Type and range.
    pub kind: Kind,
    /// What holds when the recipe does not set it.
    pub default: Initial,
    /// What it counts, such as `tokens`; empty where it counts nothing.
    pub unit: &'static str,
    /// What it does.
    pub effect: &'static str,
    /// Other names that a recipe may use for it.
    pub aliases: &'static [&'static str],
    /// Names it has in other tools: not accepted, but understood well enough to point here.
    pub elsewhere: &'static [&'static str],
}

/// What holds when a recipe does not set a knob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initial {
    /// The recipe has to set it.
    Required,
    /// This value, in YAML; `null` where nothing is a value of its own.
    Yaml(&'static str),
    /// `runs/` and the name of the recipe file.
    RunsRecipeName,
}

/// Type and range of a knob.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Text that is not empty.
    Text,
    /// A model: directory, GGUF file or Hugging Face id.
    Model,
    /// A path of data, or a map with one.
    Source,
    /// The name of a chat template, or path of a file that exists.
    ChatTemplate,
    /// Path of a directory that exists.
    Directory,
    /// Path of a directory that may have to be made.
    NewDirectory,
    /// One of a few words, each with its meaning.
    Choice(&'static [(&'static str, &'static str)]),
    /// `true` or `false`.
    Boolean,
    /// A whole number from the first bound to the second.
    Integer(u64, u64),
    /// A finite number between two bounds.
    Real(Edge, Edge),
    /// A list; one value may stand for a list of one. The number is the least length.
    List(&'static Kind, usize),
    /// `all-linear`, module names, or a regular expression.
    Targets,
    /// A map from patterns of module paths to values.
    Patterns(&'static Kind),
}

/// A bound of a range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Edge {
    /// The bound belongs to the range.
    With(f64),
    /// The bound does not.
    Without(f64),
}

/// The sections and what they are about, in the order of a recipe.
pub const SECTIONS: &[(&str, &str)] = &[
    ("base", "The model that is trained from."),
    ("data", "What it is trained on."),
    ("adapter", "Which weights train."),
    ("train", "How they train."),
    (
        "sample",
        "Texts written before training, at evaluations and after.",
    ),
];

/// The knob with this dotted key or alias.
pub fn find(key: &str) -> Option<&'static Knob> {
    KNOBS
        .iter()
        .find(|knob| knob.key == key || knob.alias_keys().any(|alias| alias == key))
}

impl Knob {
    /// The section, empty for a knob at the top, and the name in it.
    pub fn split(&self) -> (&'static str, &'static str) {
        self.key.split_once('.').unwrap_or(("", self.key))
    }

    /// The dotted keys of its aliases.
    pub fn alias_keys(&self) -> impl Iterator<Item = String> {
        let (section, _) = self.split();
        self.aliases
            .iter()
            .map(move |alias| format!("{section}.{alias}"))
    }

    /// The effect, the meaning of each word it may be, and the unit.
    pub fn describe(&self) -> String {
        let mut text = self.effect.to_owned();
        let kind = match self.kind {
            Kind::List(item, _) => *item,
            kind => kind,
        };
        if let Kind::Choice(words) = kind {
            let words: Vec<_> = words
                .iter()
                .map(|(word, meaning)| format!("`{word}`: {meaning}"))
                .collect();
            text += &format!(" {}.", words.join("; "));
        }
        if !self.unit.is_empty() {
            text += &format!(" Unit: {}.", self.unit);
        }
        text
    }

    /// The default in YAML; `None` for a knob that has to be set.
    pub fn default_text(&self) -> Option<&'static str> {
        match self.default {
            Initial::Required => None,
            Initial::Yaml(text) => Some(text),
            Initial::RunsRecipeName => Some("runs/<name of the recipe file>"),
        }
    }

    pub(super) const fn new(
        key: &'static str,
        kind: Kind,
        default: &'static str,
        effect: &'static str,
    ) -> Self {
        Knob {
            key,
            kind,
            default: Initial::Yaml(default),
            unit: "",
            effect,
            aliases: &[],
            elsewhere: &[],
        }
    }

    pub(super) const fn initially(mut self, default: Initial) -> Self {
        self.default = default;
        self
    }

    pub(super) const fn counts(mut self, unit: &'static str) -> Self {
        self.unit = unit;
        self
    }

    pub(super) const fn alias(mut self, names: &'static [&'static str]) -> Self {
        self.aliases = names;
        self
    }

    pub(super) const fn elsewhere(mut self, names: &'static [&'static str]) -> Self {
        self.elsewhere = names;
        self
    }
}

impl Kind {
    /// The type and range in words: "a whole number from 1 to 65536".
    pub fn expected(&self) -> String {
        match self {
            Kind::Text => "text".into(),
            Kind::Model => "a directory, a `.gguf` file or a Hugging Face model id".into(),
            Kind::Source => "a file, a directory, a pattern or `hf://owner/name`".into(),
            Kind::ChatTemplate => "the name of a chat template or a file".into(),
            Kind::Directory | Kind::NewDirectory => "a directory".into(),
            Kind::Choice(words) => {
                let words: Vec<_> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
                match words.split_last() {
                    Some((last, rest)) if !rest.is_empty() => {
                        format!("{} or {last}", rest.join(", "))
                    }
                    _ => words.concat(),
                }
            }
            Kind::Boolean => "`true` or `false`".into(),
            Kind::Integer(min, max) => format!("a whole number from {min} to {max}"),
            Kind::Real(min, max) => range(*min, *max),
            Kind::List(item, _) => format!("{}, or a list of such", item.expected()),
            Kind::Targets => "`all-linear`, a list of module names or a regular expression".into(),
            Kind::Patterns(item) => {
                format!("a map from module patterns to {}", item.expected())
            }
        }
    }

    pub(super) fn json_schema(&self) -> Json {
        match self {
            Kind::Source => source::json_schema(),
            Kind::Text
            | Kind::Model
            | Kind::ChatTemplate
            | Kind::Directory
            | Kind::NewDirectory => {
                json!({"type": "string", "minLength": 1})
            }
            Kind::Choice(words) => {
                let words: Vec<_> = words.iter().map(|(word, _)| word_json(word)).collect();
                json!({ "enum": words })
            }
            Kind::Boolean => json!({"type": "boolean"}),
            Kind::Integer(min, max) => json!({"type": "integer", "minimum": min, "maximum": max}),
            Kind::Real(min, max) => {
                let mut schema = json!({"type": "number"});
                let (key, bound) = match min {
                    Edge::With(bound) => ("minimum", bound),
                    Edge::Without(bound) => ("exclusiveMinimum", bound),
                };
                schema[key] = json!(bound);
                let (key, bound) = match max {
                    Edge::With(bound) => ("maximum", bound),
                    Edge::Without(bound) => ("exclusiveMaximum", bound),
                };
                schema[key] = json!(bound);
                schema
            }
            Kind::List(item, least) => {
                let item = item.json_schema();
                json!({"anyOf": [{"type": "array", "items": item, "minItems": least}, item]})
            }
            Kind::Targets => json!({"anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
            ]}),
            Kind::Patterns(item) => {
                json!({"type": "object", "additionalProperties": item.json_schema()})
            }
        }
    }
}

/// A word as YAML reads it: `true` and `false` are booleans.
pub(super) fn word_json(word: &str) -> Json {
    word.parse::<bool>()
        .map_or_else(|_| json!(word), Json::from)
}

fn range(min: Edge, max: Edge) -> String {
    match (min, max) {
        (Edge::With(min), Edge::With(max)) => format!("a number from {min} to {max}"),
        (Edge::With(min), Edge::Without(max)) => format!("a number from {min}, below {max}"),
        (Edge::Without(min), Edge::With(max)) => format!("a number above {min}, at most {max}"),
        (Edge::Without(min), Edge::Without(max)) => format!("a number above {min}, below {max}"),
    }
}

/// The JSON Schema (draft 2020-12) of a recipe, for editors.
pub fn json_schema() -> Json {
    let mut top = Map::new();
    for (section, about) in SECTIONS {
        let mut properties = Map::new();
        let mut required = Vec::new();
        for knob in KNOBS.iter().filter(|knob| knob.split().0 == *section) {
            let (_, name) = knob.split();
            if knob.default == Initial::Required {
                required.push(name);
            }
            for name in std::iter::once(&name).chain(knob.aliases) {
                properties.insert((*name).to_owned(), property(knob));
            }
        }
        let mut schema = json!({
            "description": about,
            "type": "object",
            "additionalProperties": false,
            "properties": properties,
        });
        if !required.is_empty() {
            schema["required"] = json!(required);
        }
        top.insert((*section).to_owned(), schema);
    }
    for knob in KNOBS.iter().filter(|knob| knob.split().0.is_empty()) {
        top.insert(knob.key.to_owned(), property(knob));
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorafit recipe",
        "type": "object",
        "additionalProperties": false,
        "required": ["base", "data"],
        "properties": top,
    })
}

/// A knob's schema: its kind, or null where it has a default.
fn property(knob: &Knob) -> Json {
    let mut schema = knob.kind.json_schema();
    if knob.default != Initial::Required {
        if let Some(plain) = schema.get("type").cloned() {
            schema["type"] = json!([plain, "null"]);
        } else if let Some(Json::Array(options)) = schema.get_mut("anyOf") {
            options.push(json!({"type": "null"}));
        } else if let Some(Json::Array(words)) = schema.get_mut("enum") {
            words.push(Json::Null);
        }
    }
    if let Some(default) = check::default(knob) {
        schema["default"] = match (knob.kind, default) {
            (Kind::Choice(_), Json::String(word)) => word_json(&word),
            (_, default) => default,
        };
    }
    schema["description"] = json!(knob.describe());
    schema
}
