//! `adapter_config.json`, as PEFT 0.21 writes it for LoRA and VeRA.
//!
//! Files of older versions lack keys, which then have PEFT's defaults; keys that only newer
//! versions know are kept. What lorafit does not do (activated LoRA, BD-LoRA, …) is refused by
//! name, all of it in one error, because ignoring it would give another model than PEFT's.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::config_read::Reader;
use super::residual::TakenOut;
use super::target::Targeting;
use super::tokens::TrainedTokens;
use super::vera::{self, VeraConfig};
pub use crate::recipe::plan::TrainedBias;
use crate::recipe::plan::{AdapterPlan, InitMethod, TargetModules};

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
    /// Whether the rows of adapted weights have lengths of their own (DoRA, arXiv 2402.09353).
    pub use_dora: bool,
    /// Set where the adapter is VeRA's, whose deltas have no scaling.
    pub vera: Option<VeraConfig>,
    /// Which biases train.
    pub bias: TrainedBias,
    /// Whether `target_parameters` is an empty list in the file, not `null`.
    pub lists_no_parameters: bool,
    /// Tokens whose rows train.
    pub trained_tokens: Option<TrainedTokens>,
    /// Ends of the paths of modules that train whole and are saved whole.
    pub modules_to_save: Vec<String>,
    /// How the first weights were made: `true`, `false`, `"gaussian"`, `"orthogonal"`, `"eva"`,
    /// `"pissa"` or `"olora"`.
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
fn unsupported_keys() -> [(&'static str, Value); 12] {
    [
        ("alora_invocation_tokens", Value::Null),
        ("arrow_config", Value::Null),
        ("ensure_weight_tying", json!(false)),
        ("fan_in_fan_out", json!(false)),
        ("kasa_config", Value::Null),
        ("layer_replication", Value::Null),
        ("lora_bias", json!(false)),
        ("megatron_config", Value::Null),
        ("monteclora_config", Value::Null),
        ("use_bdlora", Value::Null),
        ("use_qalora", json!(false)),
        ("velora_config", Value::Null),
    ]
}

/// Initialisations that change neither the base nor what `B·A` means, and the two of them that do and
/// can be repeated: the file then belongs to a base without what they took out of it.
const KNOWN_INIT: [&str; 5] = ["gaussian", "orthogonal", "eva", "pissa", "olora"];

impl AdapterConfig {
    /// Whether the module trains whole: PEFT compares ends of paths, without regard for dots.
    pub fn saves(&self, module: &str) -> bool {
        self.modules_to_save.iter().any(|end| module.ends_with(end))
    }

    /// A fresh adapter for causal language modelling.
    pub fn new(base: &str, revision: Option<&str>, targeting: Targeting, dropout: f64) -> Self {
        Self {
            base_model_name_or_path: Some(base.to_owned()),
            revision: revision.map(str::to_owned),
            task_type: Some("CAUSAL_LM".to_owned()),
            targeting,
            lora_dropout: dropout,
            use_dora: false,
            vera: None,
            trained_tokens: None,
            lists_no_parameters: false,
            bias: TrainedBias::None,
            modules_to_save: Vec::new(),
            init_lora_weights: Value::Bool(true),
            unknown: Map::new(),
        }
    }

    /// What the adapter takes out of the base before it trains, if it does.
    pub fn taken_out(&self) -> Option<TakenOut> {
        match self.init_lora_weights.as_str() {
            Some("pissa") => Some(TakenOut::Principal),
            Some("olora") => Some(TakenOut::FirstColumns),
            _ => None,
        }
    }

    /// The configuration that is saved. Where the base lost something at first, it is that of the same
    /// adapter for the base as it was, in which every delta has become the difference of two: twice
    /// the rank, and an alpha that leaves the scaling.
    pub fn as_written(&self) -> Self {
        let mut plain = self.clone();
        if self.taken_out().is_none() {
            return plain;
        }
        plain.init_lora_weights = Value::Bool(true);
        let t = &mut plain.targeting;
        let factor = if t.use_rslora { 2f64.sqrt() } else { 2.0 };
        t.rank *= 2;
        t.alpha *= factor;
        t.rank_pattern.iter_mut().for_each(|(_, rank)| *rank *= 2);
        t.alpha_pattern
            .iter_mut()
            .for_each(|(_, alpha)| *alpha *= factor);
        plain
    }

    /// The same with what a plan says beyond its choice of modules.
    pub fn with_plan(self, plan: &AdapterPlan) -> Self {
        Self {
            use_dora: plan.use_dora,
            bias: plan.bias,
            init_lora_weights: match plan.init_lora_weights {
                InitMethod::Kaiming => Value::Bool(true),
                method => json!(method),
            },
            modules_to_save: plan.modules_to_save.clone().unwrap_or_default(),
            ..self
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
        let mut reader = Reader::new(&json);
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
            ("peft_type", json!("LORA")),
            ("peft_version", json!(PEFT_VERSION)),
            ("init_lora_weights", self.init_lora_weights.clone()),
            ("lora_dropout", json!(self.lora_dropout)),
            ("use_dora", json!(self.use_dora)),
            ("bias", json!(self.bias)),
            (
                "modules_to_save",
                match self.modules_to_save.as_slice() {
                    [] => Value::Null,
                    modules => json!(modules),
                },
            ),
            (
                "trainable_token_indices",
                (self.trained_tokens.as_ref()).map_or(Value::Null, TrainedTokens::to_json),
            ),
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
            (
                "target_parameters",
                match (t.target_parameters.as_slice(), self.lists_no_parameters) {
                    ([], false) => Value::Null,
                    (names, _) => json!(names),
                },
            ),
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
        if let Some(vera) = &self.vera {
            json.retain(|key, _| vera::SHARED_KEYS.contains(&key.as_str()));
            json.extend(vera.keys(self.lora_dropout));
            if self.bias == TrainedBias::LoraOnly {
                json["bias"] = json!("vera_only");
            }
        }
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
    match json.get("peft_type") {
        None | Some(Value::Null) => {}
        Some(Value::String(kind)) if ["LORA", "VERA"].contains(&kind.as_str()) => {}
        Some(other) => found.push(format!("peft_type: {other}")),
    }
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
            r#"{"peft_type": "LORA", "target_modules": ["q"], "lora_bias": true, "use_qalora": true,
                "layer_replication": [[0, 1]], "init_lora_weights": "pissa_niter_4",
                "target_parameters": []}"#,
        )
        .unwrap_err();
        for part in [
            "lora_bias: true",
            "use_qalora: true",
            "layer_replication: [[0,1]]",
            "pissa_niter_4",
        ] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains("target_parameters"), "{error}");
        assert!(
            parse(r#"{"peft_type": "IA3"}"#)
                .unwrap_err()
                .contains("peft_type: \"IA3\"")
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
