//! Reads the values of `adapter_config.json`.

use serde_json::{Map, Value, json};

use super::config::AdapterConfig;
use super::target::Targeting;
use super::tokens::TrainedTokens;
use super::vera::VeraConfig;
use crate::recipe::plan::{TargetModules, TrainedBias};

/// Takes values out of the JSON object and collects what is wrong with them.
pub(super) struct Reader<'a> {
    json: &'a Map<String, Value>,
    /// What is wrong, so far.
    pub(super) faults: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(json: &'a Map<String, Value>) -> Self {
        Self {
            json,
            faults: Vec::new(),
        }
    }

    /// All of it; with `faults` where something is missing or wrong.
    pub(super) fn config(&mut self) -> Option<AdapterConfig> {
        if self.json.get("peft_type").is_none_or(Value::is_null) {
            self.faults
                .push("peft_type is missing; expected \"LORA\" or \"VERA\"".to_owned());
        }
        let vera = self.vera();
        let targets = self.modules("target_modules");
        let parameters = self
            .json
            .get("target_parameters")
            .is_some_and(Value::is_array);
        if targets.is_none()
            && !parameters
            && self.faults.iter().all(|f| !f.starts_with("target_modules"))
        {
            self.faults
                .push("target_modules is missing; expected names or a pattern".to_owned());
        }
        let rank = self
            .get("r", "a whole number from 1", positive)
            .unwrap_or(if vera.is_some() { 256 } else { 8 });
        let dropout = ["lora_dropout", "vera_dropout"][usize::from(vera.is_some())];
        let targeting = Targeting {
            target_modules: targets.unwrap_or(TargetModules::Names(Vec::new())),
            exclude_modules: self.modules("exclude_modules"),
            layers_to_transform: self.layers(),
            layers_pattern: self.strings("layers_pattern").unwrap_or_default(),
            rank,
            // VeRA has no scaling.
            alpha: match vera.is_some() {
                true => rank as f64,
                false => self
                    .get("lora_alpha", "a number", Value::as_f64)
                    .unwrap_or(8.0),
            },
            rank_pattern: self.patterns("rank_pattern", "a whole number from 1", positive),
            alpha_pattern: self.patterns("alpha_pattern", "a number", Value::as_f64),
            use_rslora: self
                .get("use_rslora", "true or false", Value::as_bool)
                .unwrap_or(false),
            target_parameters: self.strings("target_parameters").unwrap_or_default(),
        };
        let config = AdapterConfig {
            base_model_name_or_path: self.string("base_model_name_or_path"),
            revision: self.string("revision"),
            task_type: self.string("task_type"),
            targeting,
            lora_dropout: self.get(dropout, "a number", Value::as_f64).unwrap_or(0.0),
            use_dora: self
                .get("use_dora", "true or false", Value::as_bool)
                .unwrap_or(false),
            vera,
            trained_tokens: self.get(
                "trainable_token_indices",
                "token ids, each once, or a map from modules to such",
                TrainedTokens::read,
            ),
            lists_no_parameters: self.json.get("target_parameters") == Some(&json!([])),
            bias: self
                .get("bias", "none, all or lora_only", |value| match value {
                    Value::String(only) if only == "vera_only" => Some(TrainedBias::LoraOnly),
                    value => serde_json::from_value(value.clone()).ok(),
                })
                .unwrap_or_default(),
            modules_to_save: self.strings("modules_to_save").unwrap_or_default(),
            init_lora_weights: match self.json.get("init_lora_weights") {
                None | Some(Value::Null) => Value::Bool(true),
                Some(value) => value.clone(),
            },
            unknown: Map::new(),
        };
        let known = config.to_json();
        let unknown = (self.json.iter())
            // PEFT drops its run-time settings too.
            .filter(|(key, _)| known.get(key.as_str()).is_none() && *key != "runtime_config")
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        Some(AdapterConfig { unknown, ..config })
    }

    /// VeRA's own keys, if the adapter is one.
    fn vera(&mut self) -> Option<VeraConfig> {
        self.json.get("peft_type").filter(|kind| **kind == "VERA")?;
        let d = VeraConfig::new(0);
        Some(VeraConfig {
            projection_prng_key: self
                .get("projection_prng_key", "a whole number", Value::as_u64)
                .unwrap_or(d.projection_prng_key),
            save_projection: self
                .get("save_projection", "true or false", Value::as_bool)
                .unwrap_or(d.save_projection),
            d_initial: self
                .get("d_initial", "a number", Value::as_f64)
                .unwrap_or(d.d_initial),
        })
    }

    /// The value under `key`; `None` where it is missing, `null` or wrong.
    fn get<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.json.get(key).filter(|value| !value.is_null())?;
        let read = read(value);
        if read.is_none() {
            self.faults
                .push(format!("{key}: expected {expected}, found {value}"));
        }
        read
    }

    fn string(&mut self, key: &str) -> Option<String> {
        self.get(key, "text", Value::as_str).map(str::to_owned)
    }

    fn strings(&mut self, key: &str) -> Option<Vec<String>> {
        self.get(key, "text or a list of texts", |value| match value {
            Value::String(one) if one.is_empty() => Some(Vec::new()),
            Value::String(one) => Some(vec![one.clone()]),
            value => list(value, |item| item.as_str().map(str::to_owned)),
        })
    }

    fn modules(&mut self, key: &str) -> Option<TargetModules> {
        let is_text = self.json.get(key).is_some_and(Value::is_string);
        let mut names = self.strings(key)?;
        match names.pop() {
            Some(pattern) if is_text => Some(TargetModules::Pattern(pattern)),
            Some(last) => {
                names.push(last);
                Some(TargetModules::Names(names))
            }
            None => None,
        }
    }

    fn layers(&mut self) -> Option<Vec<usize>> {
        let expected = "a layer index or a list of them";
        self.get("layers_to_transform", expected, |value| {
            match index(value) {
                Some(one) => Some(vec![one]),
                None => list(value, index),
            }
        })
    }

    fn patterns<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Vec<(String, T)> {
        let map = self.get(key, "patterns with values", Value::as_object);
        let mut patterns = Vec::new();
        for (pattern, value) in map.into_iter().flatten() {
            match read(value) {
                Some(read) => patterns.push((pattern.clone(), read)),
                None => {
                    let fault = format!("{key}.{pattern}: expected {expected}, found {value}");
                    self.faults.push(fault);
                }
            }
        }
        patterns
    }
}

fn index(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}

fn positive(value: &Value) -> Option<usize> {
    index(value).filter(|n| *n > 0)
}

fn list<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(read).collect()
}
