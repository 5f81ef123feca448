//! Knobs that contradict each other, or miss each other.
//!
//! A `--set` wins over the file: `--set train.max_steps=10` silently replaces the file's
//! `num_epochs`. Two that stand on the same side are a fault.

use std::collections::BTreeSet;

use serde_json::{Value as Json, json};

use super::given::{Given, Place, START_FROM_A_TEMPLATE};
use super::schema::{Initial, KNOBS};

/// Pairs of which a recipe gives one: the first replaces the second.
const REPLACES: &[(&str, &str)] = &[
    ("train.max_steps", "train.num_epochs"),
    ("train.warmup_steps", "train.warmup_ratio"),
    ("data.validation", "data.validation_fraction"),
];

/// Knobs that a PEFT configuration brings along.
const FROM_PEFT: &[&str] = &[
    "adapter.rank",
    "adapter.alpha",
    "adapter.dropout",
    "adapter.target_modules",
    "adapter.layers_to_transform",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "adapter.exclude_modules",
    "adapter.target_parameters",
    "adapter.use_rslora",
    "adapter.use_dora",
    "adapter.init_lora_weights",
    "adapter.bias",
    "adapter.modules_to_save",
    "adapter.new_tokens",
    "adapter.trainable_token_indices",
];

/// Knobs of LoRA that VeRA has not.
const LORA_ALONE: &[&str] = &[
    "adapter.alpha",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "adapter.exclude_modules",
    "adapter.target_parameters",
    "adapter.use_rslora",
    "adapter.use_dora",
    "adapter.init_lora_weights",
    "train.loraplus_lr_ratio",
    "train.loraplus_lr_embedding",
];

/// Knobs of LoRA+.
const LORAPLUS: &[&str] = &["train.loraplus_lr_ratio", "train.loraplus_lr_embedding"];

/// Knobs of `values` (dotted key → value, null where not given) that other knobs put out of force.
pub(super) fn out_of_force(value: impl Fn(&str) -> Json) -> BTreeSet<&'static str> {
    let mut out = BTreeSet::new();
    for (first, second) in REPLACES {
        if is_something(&value(first)) {
            out.insert(*second);
        }
    }
    let full = value("adapter.method") == json!("full");
    if full || is_something(&value("adapter.init_from")) {
        out.extend(FROM_PEFT);
    }
    if full {
        out.insert("adapter.init_from");
    }
    if value("adapter.method") == json!("vera") {
        out.extend(LORA_ALONE);
    }
    if value("train.optimizer") == json!("lora_fa") {
        out.extend(LORAPLUS);
    }
    out
}

/// Whether a value asks for anything: `[]` and `{}` do not.
fn is_something(value: &Json) -> bool {
    match value {
        Json::Null => false,
        Json::Array(items) => !items.is_empty(),
        _ => true,
    }
}

/// Reports contradictions and missing knobs; removes from the file's knobs what a `--set` replaces.
pub(super) fn check(given: &mut Given) {
    missing(given);
    for (first, second) in REPLACES {
        replace(given, first, second);
    }
    let full = text(given, "adapter.method") == Some("full");
    if full {
        let because = "`adapter.method: full` trains all weights and has no adapter";
        for key in FROM_PEFT.iter().chain(&["adapter.init_from"]) {
            exclude(given, "adapter.method", key, because);
        }
    }
    if full && matches!(text(given, "train.precision"), Some("bf16" | "f16")) {
        let message =
            "with `adapter.method: full` all weights train, for which 16 bits are too coarse";
        report(
            given,
            "train.precision",
            message,
            "leave it out, or set it to f32",
        );
    }
    quantization(given, full);
    if text(given, "adapter.method") == Some("vera") {
        let because = "VeRA has two vectors for each layer and no scaling";
        for key in LORA_ALONE {
            exclude(given, "adapter.method", key, because);
        }
    }
    lora_fa(given);
    let because = "the configuration of `adapter.init_from` decides it";
    for key in FROM_PEFT {
        exclude(given, "adapter.init_from", key, because);
    }
    if text(given, "base.init") == Some("random") && !full {
        let message = "random weights cannot be adapted, all of them have to train";
        report(given, "base.init", message, "set `adapter.method: full`");
    }
    streaming(given);
    offload(given);
    early_stopping(given);
    layers_and_expression(given);
    warmup(given);
}

/// What changes the base cannot have it in fewer bits.
fn quantization(given: &mut Given, full: bool) {
    if matches!(text(given, "base.quantization"), None | Some("none")) {
        return;
    }
    let message = if full {
        "with `adapter.method: full` all weights train, which quantised ones cannot"
    } else if matches!(
        text(given, "adapter.init_lora_weights"),
        Some(init) if init.starts_with("pissa") || init == "olora"
    ) {
        "PiSSA and OLoRA take a part out of the base first, which is then kept in 32 bits"
    } else {
        return;
    };
    let remedy = "leave it out, or set it to none";
    report(given, "base.quantization", message, remedy);
}

fn missing(given: &mut Given) {
    for knob in KNOBS {
        let known = given.entries.contains_key(knob.key) || given.meant.contains(&knob.key);
        if knob.default == Initial::Required && !known {
            let (section, name) = knob.split();
            let message = format!("is missing, expected {}", knob.kind.expected());
            let remedy = match given.section(section) {
                Place::File if given.entries.is_empty() => START_FROM_A_TEMPLATE.into(),
                _ => format!("add `{name}: …` under `{section}:`"),
            };
            given.find(given.section(section), knob.key, message, remedy);
        }
    }
}

/// A pair of which the first replaces the second.
fn replace(given: &mut Given, first: &'static str, second: &'static str) {
    if !asks(given, first) || !asks(given, second) {
        return;
    }
    if is_set(given, second) && !is_set(given, first) {
        given.entries.remove(first);
    } else {
        let because = format!("`{first}` is given too and replaces it");
        exclude(given, first, second, &because);
    }
}

/// `loser` has no effect because of `winner`: dropped where a `--set` overrules the file, else a fault.
fn exclude(given: &mut Given, winner: &str, loser: &'static str, because: &str) {
    if !asks(given, winner) || !asks(given, loser) {
        return;
    }
    if is_set(given, winner) && !is_set(given, loser) {
        given.entries.remove(loser);
    } else {
        let message = format!("has no effect: {because}");
        report(given, loser, &message, "remove one of them");
    }
}

/// LoRA-FA has one projection for each linear layer's B, and no use for other ways to train it.
fn lora_fa(given: &mut Given) {
    let key = "train.optimizer";
    if text(given, key) != Some("lora_fa") {
        return;
    }
    if let Some(method @ ("full" | "vera")) = text(given, "adapter.method") {
        let message = format!("lora_fa trains the B of LoRA, which `{method}` has not");
        report(given, key, &message, "set train.optimizer: adamw");
    }
    for other in LORAPLUS {
        exclude(given, key, other, "LoRA-FA freezes A");
    }
    if value(given, "adapter.use_dora") == Some(&json!(true)) {
        let message = "lora_fa cannot be combined with adapter.use_dora (nor can it in PEFT)";
        report(given, key, message, "set train.optimizer: adamw");
    }
}

/// What needs a first pass over the data cannot be had without one.
fn streaming(given: &mut Given) {
    let key = "data.streaming";
    if value(given, key) != Some(&json!(true)) {
        return;
    }
    if !asks(given, "train.max_steps") {
        let message = "needs `train.max_steps`: how many rows there are is not known beforehand";
        report(given, key, message, "set train.max_steps");
    }
    let because = "`data.streaming` does not know which rows there will be";
    exclude(given, key, "data.validation_fraction", because);
}

/// Inputs of blocks that are not kept cannot be kept elsewhere.
fn offload(given: &mut Given) {
    let key = "train.offload_activations";
    let all = text(given, "train.gradient_checkpointing") == Some("none");
    if all && value(given, key) == Some(&json!(true)) {
        let message =
            "has no effect: `train.gradient_checkpointing: none` keeps no inputs of blocks";
        report(
            given,
            key,
            message,
            "set train.gradient_checkpointing: block",
        );
    }
}

fn early_stopping(given: &mut Given) {
    let key = "train.early_stopping_patience";
    if !asks(given, key) {
        return;
    }
    if !asks(given, "data.validation") && !asks(given, "data.validation_fraction") {
        let remedy = "give data.validation or data.validation_fraction";
        report(given, key, "needs validation rows to watch", remedy);
    }
    if !asks(given, "train.eval_steps") {
        let remedy = "set train.eval_steps above 0";
        report(given, key, "needs evaluations during the run", remedy);
    }
}

/// PEFT refuses to load an adapter that was configured this way, so it is not made.
fn layers_and_expression(given: &mut Given) {
    let expression = text(given, "adapter.target_modules").is_some_and(|text| text != "all-linear");
    if expression && asks(given, "adapter.layers_to_transform") {
        let message = "cannot be combined with a regular expression in adapter.target_modules";
        let remedy = "put the layer numbers into the expression";
        report(given, "adapter.layers_to_transform", message, remedy);
    }
}

fn warmup(given: &mut Given) {
    let number = |key| value(given, key).and_then(Json::as_u64);
    if let (Some(warmup), Some(all)) = (number("train.warmup_steps"), number("train.max_steps"))
        && warmup > all
    {
        let message = format!("found {warmup}, more than all {all} steps of train.max_steps");
        report(given, "train.warmup_steps", &message, "warm up for fewer");
    }
}

fn value<'a>(given: &'a Given, key: &str) -> Option<&'a Json> {
    given.entries.get(key)?.value.as_ref()
}

fn text<'a>(given: &'a Given, key: &str) -> Option<&'a str> {
    value(given, key)?.as_str()
}

/// Whether a knob is given and asks for anything. A value at fault counts: it was meant.
fn asks(given: &Given, key: &str) -> bool {
    let off = ["data.validation_fraction", "train.eval_steps"];
    given.entries.get(key).is_some_and(|entry| {
        entry.value.as_ref().is_none_or(|value| {
            is_something(value) && !(off.contains(&key) && value.as_f64() == Some(0.0))
        })
    })
}

fn is_set(given: &Given, key: &str) -> bool {
    given
        .entries
        .get(key)
        .is_some_and(|entry| matches!(entry.place, Place::Set(_)))
}

fn report(given: &mut Given, key: &str, message: &str, remedy: &str) {
    let place = given
        .entries
        .get(key)
        .map_or(Place::File, |entry| entry.place);
    given.find(place, key, message, remedy);
}
