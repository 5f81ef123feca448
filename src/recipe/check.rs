//! One YAML value against the type and range of its knob.

use std::path::Path;

use serde_json::{Value as Json, json};

use super::schema::{Edge, Initial, Kind, Knob};
use super::tree::{self, Node, Value};
use super::{named_templates, source, suggest};

/// Why a value does not fit its knob.
#[derive(Debug)]
pub(super) struct Mismatch {
    /// The node at fault: the value itself or an item of it.
    pub(super) id: usize,
    /// What to add to the knob's key to name that node: `[2]`.
    pub(super) suffix: String,
    pub(super) message: String,
    /// Empty when the knob's default is the best advice.
    pub(super) remedy: String,
}

/// What one value comes to: what [`Plan`](super::Plan) deserialises from, or all that is wrong.
pub(super) type Checked = Result<Json, Vec<Mismatch>>;

/// The value that a knob has when the recipe does not set it, where that is known beforehand.
pub(super) fn default(knob: &Knob) -> Option<Json> {
    let Initial::Yaml(text) = knob.default else {
        return None;
    };
    match tree::parse(text) {
        Ok(Some(node)) => value(&knob.kind, &node).ok(),
        _ => Some(Json::Null),
    }
}

/// Checks one value.
pub(super) fn value(kind: &Kind, node: &Node) -> Checked {
    match kind {
        Kind::Text | Kind::NewDirectory => text(kind, node).map(Json::from),
        Kind::Model => model(kind, node),
        Kind::Source => source::check(kind, node),
        Kind::ChatTemplate => chat_template(kind, node),
        Kind::Directory => path(kind, node, Path::is_dir),
        Kind::Choice(words) => choice(kind, words, node),
        Kind::Boolean => match node.value {
            Value::Boolean(value) => Ok(json!(value)),
            _ => wrong(kind, node, ""),
        },
        Kind::Integer(min, max) => integer(kind, *min, *max, node),
        Kind::Real(min, max) => real(kind, *min, *max, node),
        Kind::List(item, least) => list(kind, item, *least, node),
        Kind::Targets => targets(kind, node),
        Kind::Patterns(item) => patterns(kind, item, node),
    }
}

pub(super) fn wrong<T>(kind: &Kind, node: &Node, remedy: &str) -> Result<T, Vec<Mismatch>> {
    let message = format!("found {}, expected {}", node.describe(), kind.expected());
    Err(mismatch(node, message, remedy.into()))
}

pub(super) fn mismatch(node: &Node, message: String, remedy: String) -> Vec<Mismatch> {
    vec![Mismatch {
        id: node.id,
        suffix: String::new(),
        message,
        remedy,
    }]
}

pub(super) fn text(kind: &Kind, node: &Node) -> Result<String, Vec<Mismatch>> {
    match &node.value {
        Value::Text(text) if text.trim().is_empty() => {
            Err(mismatch(node, "is empty text".into(), String::new()))
        }
        Value::Text(text) => Ok(text.clone()),
        Value::Integer(_) | Value::Real(_) | Value::Boolean(_) => {
            wrong(kind, node, "put it in quotes if it is meant as text")
        }
        Value::Map(_) => wrong(kind, node, "put text that holds `: ` in quotes"),
        _ => wrong(kind, node, ""),
    }
}

/// A model must exist only where it can be nothing but a path; ids are looked up later.
fn model(kind: &Kind, node: &Node) -> Checked {
    let model = text(kind, node)?;
    let is_path = Path::new(&model).is_absolute()
        || ["./", "../", "~"]
            .iter()
            .any(|start| model.starts_with(start))
        || model.ends_with(".gguf");
    if is_path && !Path::new(&model).exists() {
        let message = format!("`{model}` does not exist, expected {}", kind.expected());
        return Err(mismatch(node, message, where_paths_start()));
    }
    Ok(Json::from(model))
}

fn path(kind: &Kind, node: &Node, fits: fn(&Path) -> bool) -> Checked {
    let name = text(kind, node)?;
    let path = Path::new(&name);
    if fits(path) {
        return Ok(Json::from(name));
    }
    let expected = kind.expected();
    let message = if path.is_dir() {
        format!("`{name}` is a directory, expected {expected}")
    } else if path.exists() {
        format!("`{name}` is not a directory, expected {expected}")
    } else {
        format!("`{name}` does not exist, expected {expected}")
    };
    Err(mismatch(node, message, where_paths_start()))
}

/// A name wins over a file of that name, which can be written with `./` before it.
fn chat_template(kind: &Kind, node: &Node) -> Checked {
    let name = text(kind, node)?;
    let file = Path::new(&name);
    if named_templates::names().any(|known| known == name) || file.is_file() {
        return Ok(Json::from(name));
    }
    if file.exists() {
        return path(kind, node, Path::is_file);
    }
    let known: Vec<_> = named_templates::names().collect();
    let remedy = match suggest::nearest(&name, known.iter().copied()) {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => format!("the names are {}", known.join(", ")),
    };
    let message = format!("`{name}` does not exist, expected {}", kind.expected());
    Err(mismatch(node, message, remedy))
}

pub(super) fn where_paths_start() -> String {
    match std::env::current_dir() {
        Ok(here) => format!(
            "paths start from the current directory, {}, and `~` stands for nothing",
            here.display()
        ),
        Err(_) => "paths start from the current directory".into(),
    }
}

fn choice(kind: &Kind, words: &[(&str, &str)], node: &Node) -> Checked {
    let text = match &node.value {
        Value::Text(text) => text.clone(),
        // `true` is a word of some knobs.
        Value::Boolean(value) => value.to_string(),
        _ => return wrong(kind, node, ""),
    };
    if words.iter().any(|(word, _)| *word == text) {
        return Ok(json!(text));
    }
    let nearest = suggest::nearest(&text, words.iter().map(|(word, _)| *word));
    let remedy = nearest.map_or(String::new(), |word| format!("did you mean `{word}`?"));
    wrong(kind, node, &remedy)
}

fn integer(kind: &Kind, min: u64, max: u64, node: &Node) -> Checked {
    // Floats are whole beyond doubt up to 2^53.
    let whole = |number: f64| {
        (number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0).then_some(number as i128)
    };
    let number = match &node.value {
        Value::Integer(number) => Some(*number),
        Value::Real(number) => whole(*number),
        Value::Text(text) => {
            let text = text.trim();
            text.parse()
                .ok()
                .or_else(|| text.parse().ok().and_then(whole))
        }
        _ => None,
    };
    match number.and_then(|number| u64::try_from(number).ok()) {
        Some(number) if (min..=max).contains(&number) => Ok(json!(number)),
        _ => wrong(kind, node, ""),
    }
}

fn real(kind: &Kind, min: Edge, max: Edge, node: &Node) -> Checked {
    let number = match &node.value {
        Value::Integer(number) => Some(*number as f64),
        Value::Real(number) => Some(*number),
        Value::Text(text) => text.trim().parse().ok(),
        _ => None,
    };
    let above = |number: f64| match min {
        Edge::With(bound) => number >= bound,
        Edge::Without(bound) => number > bound,
    };
    let below = |number: f64| match max {
        Edge::With(bound) => number <= bound,
        Edge::Without(bound) => number < bound,
    };
    match number {
        Some(number) if number.is_finite() && above(number) && below(number) => Ok(json!(number)),
        _ => wrong(kind, node, ""),
    }
}

fn list(kind: &Kind, item: &Kind, least: usize, node: &Node) -> Checked {
    let Value::List(items) = &node.value else {
        // One value stands for a list of one.
        return value(item, node).map(|value| json!([value]));
    };
    if items.len() < least {
        let remedy = match least {
            1 => "give at least one item".into(),
            _ => format!("give at least {least} items"),
        };
        return wrong(kind, node, &remedy);
    }
    let mut values = Vec::with_capacity(items.len());
    let mut mismatches = Vec::new();
    for (index, node) in items.iter().enumerate() {
        match value(item, node) {
            Ok(value) => values.push(value),
            Err(wrong) => {
                mismatches.extend(wrong.into_iter().map(|wrong| Mismatch {
                    suffix: format!("[{index}]{}", wrong.suffix),
                    ..wrong
                }));
            }
        }
    }
    if mismatches.is_empty() {
        Ok(Json::Array(values))
    } else {
        Err(mismatches)
    }
}

/// `all-linear`, names, or a regular expression. One plain name is taken as a list of one: as an
/// expression it would have to match a whole module path, which it never does.
fn targets(kind: &Kind, node: &Node) -> Checked {
    if matches!(node.value, Value::List(_)) {
        return list(kind, &Kind::Text, 1, node);
    }
    let pattern = text(kind, node)?;
    if pattern == "all-linear" {
        return Ok(Json::from(pattern));
    }
    if suggest::nearest(&pattern, ["all-linear"]).is_some() {
        return wrong(kind, node, "did you mean `all-linear`?");
    }
    if pattern.chars().all(|c| c.is_alphanumeric() || c == '_') {
        return Ok(json!([pattern]));
    }
    compiles(&pattern, node)?;
    Ok(Json::from(pattern))
}

/// A map as a list of pairs: the order decides which pattern matches first.
fn patterns(kind: &Kind, item: &Kind, node: &Node) -> Checked {
    let Value::Map(entries) = &node.value else {
        return wrong(kind, node, "write it as `{q_proj: …}`");
    };
    let mut pairs: Vec<(String, Json)> = Vec::new();
    let mut mismatches = Vec::new();
    for (key, node) in entries {
        let checked = text(&Kind::Text, key).and_then(|pattern| {
            compiles(&pattern, key)?;
            if pairs.iter().any(|(earlier, _)| *earlier == pattern) {
                return Err(mismatch(key, "is given twice".into(), "keep one".into()));
            }
            Ok((pattern, value(item, node)?))
        });
        match checked {
            Ok(pair) => pairs.push(pair),
            Err(wrong) => mismatches.extend(wrong.into_iter().map(|wrong| Mismatch {
                suffix: format!(".{}", key.key_text()),
                ..wrong
            })),
        }
    }
    if mismatches.is_empty() {
        Ok(json!(pairs))
    } else {
        Err(mismatches)
    }
}

fn compiles(pattern: &str, node: &Node) -> Result<(), Vec<Mismatch>> {
    let Err(error) = regex::Regex::new(pattern) else {
        return Ok(());
    };
    // The last line of regex's report says what is wrong; the lines before draw where.
    let report = error.to_string();
    let reason = report.lines().last().unwrap_or_default().trim();
    let reason = reason.strip_prefix("error: ").unwrap_or(reason);
    let message = format!("`{pattern}` is not a regular expression: {reason}");
    Err(mismatch(
        node,
        message,
        "expected the syntax of the Rust crate `regex`, which has no look-around".into(),
    ))
}
