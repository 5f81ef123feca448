//! From given knobs to a [`Plan`], and from a [`Plan`] back to a recipe with every default written out.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::check;
use super::conflict;
use super::given::Given;
use super::plan::Plan;
use super::schema::{Initial, KNOBS, Kind, Knob, SECTIONS, word_json};

/// Fills in the defaults.
///
/// # Errors
/// Only where a value passes the checks and still does not fit its field.
pub(super) fn plan(given: &Given, recipe: &Path) -> Result<Plan, serde_json::Error> {
    let mut top = empty();
    for knob in KNOBS {
        let value = given
            .entries
            .get(knob.key)
            .and_then(|entry| entry.value.clone())
            .or_else(|| check::default(knob))
            .unwrap_or_else(|| initial(knob, recipe));
        put(&mut top, knob, value);
    }
    serde_json::from_value(Json::Object(top))
}

/// A default that depends on the recipe.
fn initial(knob: &Knob, recipe: &Path) -> Json {
    match knob.default {
        Initial::RunsRecipeName => {
            let stem = recipe.file_stem().unwrap_or("recipe".as_ref());
            Json::from(format!("runs/{}", stem.to_string_lossy()))
        }
        Initial::Required | Initial::Yaml(_) => Json::Null,
    }
}

/// The resolved recipe: every knob written out, defaults too. It loads to the same [`Plan`].
///
/// Knobs that others put out of force, such as `num_epochs` beside `max_steps`, are null.
pub fn to_yaml(plan: &Plan) -> String {
    // Every path came from YAML, which is UTF-8, so neither conversion can fail.
    let values = serde_json::to_value(plan).unwrap_or_default();
    let value = |key: &str| get(&values, key);
    let out_of_force = conflict::out_of_force(value);
    let mut top = empty();
    for knob in KNOBS {
        let value = match (knob.kind, value(knob.key)) {
            _ if out_of_force.contains(knob.key) => Json::Null,
            (Kind::Patterns(_), Json::Array(pairs)) => map_of_pairs(&pairs),
            (Kind::Choice(_), Json::String(word)) => word_json(&word),
            (_, value) => value,
        };
        put(&mut top, knob, value);
    }
    let yaml = serde_yaml::to_string(&Json::Object(top)).unwrap_or_default();
    format!(
        "# Every knob as it was resolved; null where it is not given or another replaces it.\n{yaml}"
    )
}

/// The sections, in order and without knobs.
fn empty() -> Map<String, Json> {
    SECTIONS
        .iter()
        .map(|(section, _)| ((*section).to_owned(), json!({})))
        .collect()
}

fn put(top: &mut Map<String, Json>, knob: &Knob, value: Json) {
    let (section, name) = knob.split();
    match top.get_mut(section) {
        Some(Json::Object(knobs)) => knobs.insert(name.to_owned(), value),
        _ => top.insert(name.to_owned(), value),
    };
}

fn get(values: &Json, key: &str) -> Json {
    let pointer = format!("/{}", key.replace('.', "/"));
    values.pointer(&pointer).cloned().unwrap_or_default()
}

fn map_of_pairs(pairs: &[Json]) -> Json {
    let pair = |pair: &Json| Some((pair.get(0)?.as_str()?.to_owned(), pair.get(1)?.clone()));
    Json::Object(pairs.iter().filter_map(pair).collect())
}
