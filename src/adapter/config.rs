//! `adapter_config.json`, as PEFT 0.21 writes it for LoRA.
//!
//! Files of older versions lack keys, which then have PEFT's defaults; keys that only newer
//! versions know are kept. What lorafit does not do (DoRA, biases, saved modules, …) is refused by
//! name, all of it in one error, because ignoring it would give another model than PEFT's.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::target::Targeting;
use crate::recipe::plan::TargetModules;

/// The file's name in an adapter directory.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// The version of PEFT whose layout is written.
const PEFT_VERSION: &str = "0.21.2";

/// Why an adapter's configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AdapterConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}; expected a PEFT adapter directory", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("{}: not a JSON object: {cause}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        cause: String,
    },
    /// Values of the wrong kind.
    #[error("{}: {}", path.display(), faults.join("; "))]
    Values {
        /// The file.
        path: PathBuf,
        /// Key, expected and found, one each.
        faults: Vec<String>,
    },
    /// Features that are not implemented.
    #[error(
        "{}: uses what lorafit does not support yet: {}; merge the adapter with PEFT \
         (`merge_and_unload`) and use the merged model, or train it without",
        path.display(), features.join(", ")
    )]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Each key with its value.
        features: Vec<String>,
    },
}

/// What `adapter_config.json` says of a LoRA adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The base model: a Hugging Face id or a path.
    pub base_model_name_or_path: Option<String>,
    /// Branch, tag or commit of the base model.
    pub revision: Option<String>,
    /// `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Which modules, ranks and scalings.
    pub targeting: Targeting,
    /// Dropout in training.
    pub lora_dropout: f64,
    /// How the first weights were drawn: `true`, `false`, `"gaussian"`, `"orthogonal"` or `"eva"`.
    pub init_lora_weights: Value,
    /// Keys that PEFT 0.21 does not know.
    pub unknown: Map<String, Value>,
}

/// Keys that say nothing about the weights in the file: PEFT's defaults are written.
fn inert_keys() -> [(&'static str, Value); 8] {
    [
        ("auto_mapping", Value::Null),
        ("corda_config", Value::Null),
        ("eva_config", Value::Null),
        ("inference_mode", json!(true)),
        ("loftq_config", json!({})),
        ("lora_ga_config", Value::Null),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(16)),
    ]
}

/// Keys of features that are not implemented, with the value that leaves them off.
fn unsupported_keys() -> [(&'static str, Value); 18] {
    [
        ("alora_invocation_tokens", Value::Null),
        ("arrow_config", Value::Null),
        ("bias", json!("none")),
        ("ensure_weight_tying", json!(false)),
        ("fan_in_fan_out", json!(false)),
        ("kasa_config", Value::Null),
        ("layer_replication", Value::Null),
        ("lora_bias", json!(false)),
        ("megatron_config", Value::Null),
        ("modules_to_save", Value::Null),
        ("monteclora_config", Value::Null),
        ("target_parameters", Value::Null),
        ("trainable_token_indices", Value::Null),
        ("use_bdlora", Value::Null),
        ("use_dora", json!(false)),
        ("use_qalora", json!(false)),
        ("velora_config", Value::Null),
        ("peft_type", json!("LORA")),
    ]
}

/// Initialisations that change neither the base nor what `B·A` means.
const KNOWN_INIT: [&str; 3] = ["gaussian", "orthogonal", "eva"];

impl AdapterConfig {
    /// A fresh adapter for causal language modelling.
    pub fn new(base: &str, revision: Option<&str>, targeting: Targeting, dropout: f64) -> Self {
        Self {
            base_model_name_or_path: Some(base.to_owned()),
            revision: revision.map(str::to_owned),
            task_type: Some("CAUSAL_LM".to_owned()),
            targeting,
            lora_dropout: dropout,
            init_lora_weights: Value::Bool(true),
            unknown: Map::new(),
        }
    }

    /// Reads `dir/adapter_config.json`.
    ///
    /// # Errors
    /// [`AdapterConfigError`]: every wrong value or every unsupported feature at once.
    pub fn load(dir: &Path) -> Result<Self, AdapterConfigError> {
        let path = dir.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(|source| AdapterConfigError::Read {
            path: path.clone(),
            source,
        })?;
        Self::parse(&text, &path)
    }

    /// Reads the file's text; `path` is for messages.
    ///
    /// # Errors
    /// As [`AdapterConfig::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, AdapterConfigError> {
        let json: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| AdapterConfigError::Json {
                path: path.to_owned(),
                cause: error.to_string(),
            })?;
        let features = unsupported(&json);
        if !features.is_empty() {
            return Err(AdapterConfigError::Unsupported {
                path: path.to_owned(),
                features,
            });
        }
        let mut reader = Reader {
            json: &json,
            faults: Vec::new(),
        };
        let config = reader.config();
        match config {
            Some(config) if reader.faults.is_empty() => Ok(config),
            _ => Err(AdapterConfigError::Values {
                path: path.to_owned(),
                faults: reader.faults,
            }),
        }
    }

    /// The JSON object with all of PEFT's keys, sorted as PEFT sorts them.
    ///
    /// The patterns keep their order (PEFT sorts them too, which changes the meaning where two
    /// patterns match one module).
    pub fn to_json(&self) -> Value {
        let t = &self.targeting;
        let mut json: Map<String, Value> = (inert_keys().into_iter().chain(unsupported_keys()))
            .map(|(key, value)| (key.to_owned(), value))
            .collect();
        let own = [
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            ("revision", json!(self.revision)),
            ("task_type", json!(self.task_type)),
            ("peft_version", json!(PEFT_VERSION)),
            ("init_lora_weights", self.init_lora_weights.clone()),
            ("lora_dropout", json!(self.lora_dropout)),
            ("r", json!(t.rank)),
            ("lora_alpha", number(t.alpha)),
            (
                "rank_pattern",
                t.rank_pattern
                    .iter()
                    .map(|(p, r)| (p.clone(), json!(r)))
                    .collect(),
            ),
            (
                "alpha_pattern",
                t.alpha_pattern
                    .iter()
                    .map(|(p, a)| (p.clone(), number(*a)))
                    .collect(),
            ),
            ("use_rslora", json!(t.use_rslora)),
            ("target_modules", modules(&t.target_modules)),
            (
                "exclude_modules",
                t.exclude_modules.as_ref().map_or(Value::Null, modules),
            ),
            ("layers_to_transform", json!(t.layers_to_transform)),
            (
                "layers_pattern",
                match t.layers_pattern.as_slice() {
                    [] => Value::Null,
                    [one] => json!(one),
                    many => json!(many),
                },
            ),
        ];
        json.extend(own.map(|(key, value)| (key.to_owned(), value)));
        json.extend(self.unknown.clone());
        json.sort_keys();
        Value::Object(json)
    }

    /// The text of the file.
    pub fn to_text(&self) -> String {
        format!("{:#}", self.to_json())
    }
}

/// A whole number without a fraction, as PEFT's `lora_alpha: int` has it.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 {
        json!(x as i64)
    } else {
        json!(x)
    }
}

fn modules(modules: &TargetModules) -> Value {
    match modules {
        TargetModules::Pattern(pattern) => json!(pattern),
        TargetModules::Names(names) => json!(names),
    }
}

/// Every key whose value turns on a feature that is not implemented.
fn unsupported(json: &Map<String, Value>) -> Vec<String> {
    let is_off = |value: &Value, off: &Value| {
        value == off
            || value.is_null()
            || *value == json!(false)
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(Map::is_empty)
    };
    let mut found: Vec<String> = (unsupported_keys().iter())
        .filter_map(|(key, off)| {
            json.get(*key)
                .filter(|v| !is_off(v, off))
                .map(|v| (*key, v))
        })
        .map(|(key, value)| format!("{key}: {value}"))
        .collect();
    match json.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(s)) if KNOWN_INIT.contains(&s.as_str()) => {}
        Some(value) => found.push(format!(
            "init_lora_weights: {value} (it changes the base model; save the adapter with PEFT's \
             path_initial_model_for_weight_conversion to have a plain LoRA)"
        )),
    }
    found
}

/// Takes values out of the JSON object and collects what is wrong with them.
struct Reader<'a> {
    json: &'a Map<String, Value>,
    faults: Vec<String>,
}

impl<'a> Reader<'a> {
    fn config(&mut self) -> Option<AdapterConfig> {
        if self.json.get("peft_type").is_none_or(Value::is_null) {
            self.faults
                .push("peft_type is missing; expected \"LORA\"".to_owned());
        }
        let targets = self.modules("target_modules");
        if targets.is_none() && self.faults.iter().all(|f| !f.starts_with("target_modules")) {
            self.faults
                .push("target_modules is missing; expected names or a pattern".to_owned());
        }
        let targeting = Targeting {
            target_modules: targets.unwrap_or(TargetModules::Names(Vec::new())),
            exclude_modules: self.modules("exclude_modules"),
            layers_to_transform: self.layers(),
            layers_pattern: self.strings("layers_pattern").unwrap_or_default(),
            rank: self
                .get("r", "a whole number from 1", positive)
                .unwrap_or(8),
            alpha: self
                .get("lora_alpha", "a number", Value::as_f64)
                .unwrap_or(8.0),
            rank_pattern: self.patterns("rank_pattern", "a whole number from 1", positive),
            alpha_pattern: self.patterns("alpha_pattern", "a number", Value::as_f64),
            use_rslora: self
                .get("use_rslora", "true or false", Value::as_bool)
                .unwrap_or(false),
        };
        let config = AdapterConfig {
            base_model_name_or_path: self.string("base_model_name_or_path"),
            revision: self.string("revision"),
            task_type: self.string("task_type"),
            targeting,
            lora_dropout: self
                .get("lora_dropout", "a number", Value::as_f64)
                .unwrap_or(0.0),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AdapterConfig, String> {
        AdapterConfig::parse(text, Path::new("a.json")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_old_file_has_defaults() {
        let old = r#"{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"],
                      "lora_alpha": 32, "enable_lora": null, "merge_weights": false}"#;
        let config = parse(old).unwrap();
        assert_eq!((config.targeting.rank, config.targeting.alpha), (4, 32.0));
        assert_eq!(config.init_lora_weights, json!(true));
        assert_eq!(config.to_json()["merge_weights"], json!(false));
        let again = parse(&config.to_text()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn all_unsupported_features_come_in_one_error() {
        let error = parse(
            r#"{"peft_type": "LORA", "target_modules": ["q"], "use_dora": true, "bias": "all",
                "modules_to_save": ["lm_head"], "init_lora_weights": "pissa_niter_4",
                "target_parameters": []}"#,
        )
        .unwrap_err();
        for part in [
            "use_dora: true",
            "bias: \"all\"",
            "[\"lm_head\"]",
            "pissa_niter_4",
        ] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains("target_parameters"), "{error}");
        assert!(
            parse(r#"{"peft_type": "VERA"}"#)
                .unwrap_err()
                .contains("peft_type: \"VERA\"")
        );
    }

    #[test]
    fn all_wrong_values_come_in_one_error() {
        let error = parse(r#"{"r": 0, "lora_alpha": "x", "rank_pattern": {"q": -1}}"#).unwrap_err();
        for part in [
            "peft_type is missing",
            "target_modules is missing",
            "r: ",
            "lora_alpha",
            "rank_pattern.q",
        ] {
            assert!(error.contains(part), "{part} not in {error}");
        }
    }

    #[test]
    fn patterns_keep_their_order() {
        let text =
            r#"{"peft_type": "LORA", "target_modules": ".*", "rank_pattern": {"z": 1, "a": 2}}"#;
        let config = parse(text).unwrap();
        assert_eq!(
            config.targeting.rank_pattern,
            [("z".to_owned(), 1), ("a".to_owned(), 2)]
        );
        let written = config.to_text();
        assert!(written.find("\"z\"") < written.find("\"a\""), "{written}");
    }
}
