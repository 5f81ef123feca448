//! The configuration of a causal language model, from Hugging Face `config.json`
//! (transformers 4 and 5 styles) or GGUF metadata.
//!
//! The readers are `config_json.rs` and `gguf.rs`; `config_check.rs` says what both must satisfy,
//! `config_write.rs` is the way back to `config.json`.

pub use crate::nn::rope::{RopeConfig, RopeScaling};

use std::path::{Path, PathBuf};

use super::{config_check, config_json};
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
        config_check::check(&config, path)?;
        Ok(config)
    }

    /// Reads the metadata and tensor list of a GGUF file.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn from_gguf(file: &GgufFile) -> Result<Self, ConfigError> {
        let config = super::gguf::config(file)?;
        config_check::check(&config, file.path())?;
        Ok(config)
    }
}
