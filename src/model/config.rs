//! The configuration of a causal language model, from Hugging Face `config.json`
//! (transformers 4 and 5 styles) or GGUF metadata.
//!
//! The readers are [`super::config_json`] and [`super::gguf`]; what both must satisfy, and the
//! way back to `config.json`, are here.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::config_json;
use crate::quant::gguf::GgufFile;

/// What the model's shape and arithmetic depend on. Names are Hugging Face's.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The model family.
    pub architecture: Architecture,
    /// V, rows of the embedding.
    pub vocab_size: usize,
    /// D, width of the residual stream.
    pub hidden_size: usize,
    /// F, width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// H, query heads.
    pub num_attention_heads: usize,
    /// K, key and value heads; divides H.
    pub num_key_value_heads: usize,
    /// Dh, width of a head; even.
    pub head_dim: usize,
    /// Longest sequence the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Whether q, k, v and o projections have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down projections have biases.
    pub mlp_bias: bool,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of freshly drawn weights.
    pub initializer_range: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// `bos_token_id`.
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`, one or several.
    pub eos_token_ids: Vec<u32>,
}

/// The supported model families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
}

/// Rotary position embedding (arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Rope scaling, as in transformers' `modeling_rope_utils.py`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Frequencies divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// NTK-aware scaling that depends on the length of the batch.
    Dynamic {
        /// Stretch.
        factor: f64,
        /// Length up to which nothing changes.
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1's scaling by wavelength.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Below this many turns over the original context a frequency is low.
        low_freq_factor: f64,
        /// Above this many turns a frequency is left alone.
        high_freq_factor: f64,
        /// Original context length.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Stretch.
        factor: f64,
        /// Original context length.
        original_max_position_embeddings: usize,
        /// Scale of cos and sin; derived from `factor` and the mscales when `None`.
        attention_factor: Option<f64>,
        /// Ramp start in turns.
        beta_fast: f64,
        /// Ramp end in turns.
        beta_slow: f64,
        /// DeepSeek's mscale.
        mscale: Option<f64>,
        /// DeepSeek's mscale_all_dim.
        mscale_all_dim: Option<f64>,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Frequencies divided one by one (GGUF's `rope_freqs.weight`). `[head_dim / 2]`
    Factors(Vec<f32>),
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot read the model's configuration: {source}; a base model is a directory with config.json, safetensors and a tokenizer, or a .gguf file", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// The model family is not supported.
    #[error("{}: {key} {found} is not supported; supported: {}", path.display(), Architecture::SUPPORTED.join(", "))]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The key that names the family.
        key: &'static str,
        /// Its value.
        found: String,
    },
    /// A value is missing, of the wrong type, or out of range.
    #[error("{}: `{key}`: expected {expected}, found {found}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Dotted key.
        key: String,
        /// What would do.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The configuration asks for something that lorafit does not have.
    #[error("{}: {what} is not supported; {remedy}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature.
        what: String,
        /// What to do instead.
        remedy: &'static str,
    },
}

impl Architecture {
    /// Names of the supported families, as `model_type` and `architectures` write them.
    pub const SUPPORTED: &'static [&'static str] = &["llama (LlamaForCausalLM)"];

    /// The family that `model_type` (or GGUF's `general.architecture`) names.
    pub fn from_model_type(name: &str) -> Option<Self> {
        match name {
            "llama" => Some(Self::Llama),
            _ => None,
        }
    }

    /// The name under `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
        }
    }

    /// The class name under `architectures`.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
        }
    }
}

/// Largest width, vocabulary or head count accepted, so that no product downstream overflows.
const MAX_SIZE: usize = 1 << 24;
/// Most blocks accepted.
const MAX_LAYERS: usize = 4096;
/// Longest context accepted.
const MAX_POSITIONS: usize = 1 << 30;

impl ModelConfig {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// When the file is missing, malformed, contradictory or of an unsupported family.
    pub fn from_dir(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("config.json");
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::from_json(&text, &path),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// Reads the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn from_json(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config = config_json::parse(text, path)?;
        config.validate(path)?;
        Ok(config)
    }

    /// Reads the metadata and tensor list of a GGUF file.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn from_gguf(file: &GgufFile) -> Result<Self, ConfigError> {
        let config = super::gguf::config(file)?;
        config.validate(file.path())?;
        Ok(config)
    }

    /// Checks what the rest of lorafit relies on: sizes in range, heads that divide, finite numbers.
    fn validate(&self, path: &Path) -> Result<(), ConfigError> {
        let fail = |key: &str, expected: String, found: String| {
            Err(ConfigError::Value {
                path: path.to_path_buf(),
                key: key.to_string(),
                expected,
                found,
            })
        };
        for (key, value, max) in [
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_SIZE),
            ("num_key_value_heads", self.num_key_value_heads, MAX_SIZE),
            ("head_dim", self.head_dim, MAX_SIZE),
            (
                "num_attention_heads × head_dim",
                self.num_attention_heads.saturating_mul(self.head_dim),
                MAX_SIZE,
            ),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                MAX_POSITIONS,
            ),
        ] {
            if value == 0 || value > max {
                return fail(key, format!("1 to {max}"), value.to_string());
            }
        }
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            let expected = format!(
                "a divisor of num_attention_heads {}",
                self.num_attention_heads
            );
            return fail(
                "num_key_value_heads",
                expected,
                self.num_key_value_heads.to_string(),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(
                "head_dim",
                "an even number".into(),
                self.head_dim.to_string(),
            );
        }
        for (key, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("initializer_range", self.initializer_range),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return fail(key, "0 to 1".into(), value.to_string());
            }
        }
        self.validate_rope(&fail)
    }

    /// The part of [`ModelConfig::validate`] about rotary embedding.
    fn validate_rope(
        &self,
        fail: &impl Fn(&str, String, String) -> Result<(), ConfigError>,
    ) -> Result<(), ConfigError> {
        let positive = |key: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => fail(key, "a positive number".into(), value.to_string()),
        };
        let original = |length: usize| match (1..=MAX_POSITIONS).contains(&length) {
            true => Ok(()),
            false => fail(
                "original_max_position_embeddings",
                format!("1 to {MAX_POSITIONS}"),
                length.to_string(),
            ),
        };
        positive("rope_theta", self.rope.theta)?;
        match &self.rope.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings,
            } => positive("factor", *factor).and(original(*original_max_position_embeddings)),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                original(*original_max_position_embeddings)?;
                if high_freq_factor <= low_freq_factor {
                    let expected = format!("more than low_freq_factor {low_freq_factor}");
                    return fail("high_freq_factor", expected, high_freq_factor.to_string());
                }
                Ok(())
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                ..
            } => {
                positive("factor", *factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                positive("attention_factor", attention_factor.unwrap_or(1.0))?;
                original(*original_max_position_embeddings)
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != self.head_dim / 2 {
                    let expected = format!("head_dim / 2 = {} numbers", self.head_dim / 2);
                    return fail("rope_freqs.weight", expected, factors.len().to_string());
                }
                factors
                    .iter()
                    .try_for_each(|&factor| positive("rope_freqs.weight", factor as f64))
            }
        }
    }

    /// The configuration as `config.json`, with keys that transformers 4 and 5 both read.
    /// `dtype` is the weights' (`float32`, `float16`, `bfloat16`).
    ///
    /// # Errors
    /// When `path`, the GGUF file this configuration came from, has frequency factors that no
    /// `rope_scaling` expresses.
    pub fn to_hf_json(&self, dtype: &str, path: &Path) -> Result<Value, ConfigError> {
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        Ok(json!({
            "architectures": [self.architecture.class_name()],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "model_type": self.architecture.model_type(),
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": self.rope.scaling_json(path)?,
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        }))
    }
}

impl RopeConfig {
    /// The value of transformers' `rope_scaling`.
    fn scaling_json(&self, path: &Path) -> Result<Value, ConfigError> {
        Ok(match &self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Dynamic { factor, .. } => {
                json!({"rope_type": "dynamic", "factor": factor})
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                mscale,
                mscale_all_dim,
                truncate,
            } => {
                let mut yarn = json!({
                    "rope_type": "yarn",
                    "factor": factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                    "beta_fast": beta_fast,
                    "beta_slow": beta_slow,
                });
                for (key, value) in [
                    ("attention_factor", attention_factor),
                    ("mscale", mscale),
                    ("mscale_all_dim", mscale_all_dim),
                ] {
                    if let Some(value) = value {
                        yarn[key] = json!(value);
                    }
                }
                if !truncate {
                    yarn["truncate"] = json!(false);
                }
                yarn
            }
            RopeScaling::Factors(factors) => {
                match super::gguf::llama3_scaling(self.theta, factors) {
                    Some(scaling) => {
                        let theta = self.theta;
                        return RopeConfig { theta, scaling }.scaling_json(path);
                    }
                    None => {
                        return Err(ConfigError::Unsupported {
                        path: path.to_path_buf(),
                        what: "writing a config.json for the frequency factors in rope_freqs.weight".into(),
                        remedy: "they are not Llama 3's; start from the model's safetensors instead of its GGUF",
                    });
                    }
                }
            }
        })
    }
}
