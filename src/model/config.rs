//! The configuration of a causal language model, from Hugging Face `config.json`
//! (transformers 4 and 5 styles) or GGUF metadata.
//!
//! What the models of a family share stands in [`families`](super::families); the readers are `config_json.rs` and
//! `gguf.rs`; `config_check.rs` says what both must satisfy.

pub use crate::nn::rope::{RopeConfig, RopeScaling};

use std::path::{Path, PathBuf};

use super::families::Family;
use super::{config_check, config_json};
use crate::kernels::Activation;
use crate::nn::{ExpertGate, RouterRule};
use crate::quant::gguf::GgufFile;

/// What the model's shape and arithmetic depend on. Names are Hugging Face's.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The model family: what all its models share.
    pub family: &'static Family,
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
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Activation of the feed-forward layers.
    pub hidden_act: Activation,
    /// Whether q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has one.
    pub o_bias: bool,
    /// Whether the linear layers of the feed-forward layer have biases.
    pub mlp_bias: bool,
    /// Factor of the attention scores.
    pub attention_scale: f64,
    /// Attention scores become `cap · tanh(score / cap)`.
    pub attention_soft_cap: Option<f64>,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<RopeConfig>,
    /// What each block is made of.
    pub layers: Vec<LayerConfig>,
    /// Latent attention, in families that have it.
    pub latent: Option<LatentConfig>,
    /// Linear attention, of layers with [`Mixer::Linear`].
    pub linear: Option<LinearConfig>,
    /// Experts, of layers that are sparse.
    pub moe: Option<MoeConfig>,
    /// Embeddings are multiplied by this.
    pub embedding_multiplier: f64,
    /// What a layer adds to the residual stream is multiplied by this.
    pub residual_multiplier: f64,
    /// Logits are multiplied by this.
    pub logit_scale: f64,
    /// Logits become `cap · tanh(logit / cap)`.
    pub logit_soft_cap: Option<f64>,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of freshly drawn weights.
    pub initializer_range: f64,
    /// `bos_token_id`.
    pub bos_token_id: Option<u32>,
    /// `pad_token_id`; the row of this token does not train through look-ups.
    pub pad_token_id: Option<u32>,
    /// `eos_token_id`, one or several.
    pub eos_token_ids: Vec<u32>,
}

/// What one block is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// What mixes tokens.
    pub mixer: Mixer,
    /// A query sees itself and the `window - 1` tokens before it; all before it when `None`.
    pub window: Option<usize>,
    /// Which of [`ModelConfig::ropes`] rotates queries and keys; none in layers without positions.
    pub rope: Option<usize>,
    /// Whether the feed-forward layer is a mixture of experts.
    pub sparse: bool,
}

/// What mixes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixer {
    /// Softmax attention.
    Attention,
    /// Gated delta rule (linear attention).
    Linear,
}

/// Norms of queries and keys before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head, the family's kind, one weight for all heads.
    Each,
    /// Over all heads at once, the family's kind.
    Whole,
    /// A layer norm over each head with weights of its own.
    Own,
}

/// Sizes of latent attention (DeepSeek-V2, arXiv 2405.04434).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentConfig {
    /// Rank of the query projection; one full matrix when `None`.
    pub q_lora_rank: Option<usize>,
    /// Rank of the key and value projection.
    pub kv_lora_rank: usize,
    /// Width of a head that rotates.
    pub qk_rope_head_dim: usize,
    /// Width of a head that does not.
    pub qk_nope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Whether pairs of neighbours rotate, not halves.
    pub rope_interleave: bool,
}

/// Sizes of linear attention (gated delta rule, arXiv 2412.06464).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearConfig {
    /// Key heads.
    pub num_key_heads: usize,
    /// Value heads; a multiple of the key heads.
    pub num_value_heads: usize,
    /// Width of a key head.
    pub key_head_dim: usize,
    /// Width of a value head.
    pub value_head_dim: usize,
    /// Tokens that the convolution sees.
    pub conv_kernel_dim: usize,
}

/// Experts of the sparse layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeConfig {
    /// E
    pub num_experts: usize,
    /// Experts of a token.
    pub num_experts_per_tok: usize,
    /// F of an expert.
    pub intermediate_size: usize,
    /// F of the expert that sees every token; 0 for none.
    pub shared_intermediate_size: usize,
    /// How the router chooses.
    pub rule: RouterRule,
    /// What stands between the two layers of an expert.
    pub gate: ExpertGate,
    /// Weight of the load-balancing loss in transformers; for readers of the configuration.
    pub router_aux_loss_coef: f64,
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
    #[error("{}: {key} {found} is not supported; supported: {supported}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The key that names the family.
        key: &'static str,
        /// Its value.
        found: String,
        /// The values that would do.
        supported: String,
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
