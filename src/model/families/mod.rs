//! The model families: what sets each apart from the others, as data.
//!
//! There is one [`Block`](super::block::Block); a family declares where its norms stand, how its
//! layers are called and which options its `config.json` has. To add one:
//!
//! 1. Write a [`Family`] as a `static` in the file of its kind (`dense.rs`,
//!    `sparse.rs`, `linear.rs`), starting from `LLAMA_LIKE` and naming what differs, and add it to
//!    [`FAMILIES`]. Its `configure` reads the keys of `config.json` that other families lack; the
//!    helpers in `keys.rs` cover windows, layer kinds and experts.
//! 2. Where its files call tensors otherwise than transformers calls its modules, list the pairs in
//!    [`Family::renames`]; for GGUF files, add its row to the table in `model/gguf_arch.rs`.
//! 3. Add it to `tests/golden/spec.json`, run `make_reference.py --set public --only models`, and
//!    the golden test finds the new case. The README's table follows from the cases that pass.
//!
//! Qwen2 shows how little that is: biases on q, k and v, and a sliding window that is usually off.

mod dense;
mod gemma;
mod keys;
mod linear;
mod sparse;

use std::fmt;

use super::config::{ConfigError, ModelConfig};
pub(super) use super::config_json::Fields;
use crate::nn::NormKind;

/// What all models of a family share.
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class under `architectures`.
    pub class_name: &'static str,
    /// How its norms compute.
    pub norm: NormKind,
    /// Where they stand in a block.
    pub norms: BlockNorms,
    /// Whether attention and feed-forward layer work side by side on the same input.
    pub parallel: bool,
    /// The norm before the output head.
    pub final_norm: &'static str,
    /// Whether queries, keys and values come out of one `qkv_proj`.
    pub fused_qkv: bool,
    /// The output projection of attention.
    pub o_proj: &'static str,
    /// Norms of queries and keys, in models that have them.
    pub qk_norms: [&'static str; 2],
    /// Whether neighbours rotate against each other, not halves of a head.
    pub interleaved: bool,
    /// The feed-forward layer.
    pub mlp: MlpNames,
    /// Whether the output head has a bias.
    pub head_bias: bool,
    /// Whether attention has a logit for each head that takes probability and gives nothing.
    pub sinks: bool,
    /// Whether a gate multiplies the output of each head.
    pub gated_attention: bool,
    /// Whether linear attention has its inputs in two projections, interleaved by key head
    /// (Qwen3-Next), not in four.
    pub fused_linear: bool,
    /// The router of a mixture of experts.
    pub router: &'static str,
    /// The expert that sees every token.
    pub shared_expert: &'static str,
    /// Whether its output is gated.
    pub shared_gate: bool,
    /// How files store the experts.
    pub expert_files: ExpertFiles,
    /// Below a block: how files call what transformers calls otherwise, `(module, file)`.
    pub renames: &'static [(&'static str, &'static str)],
    /// What `config.json` means where it is silent.
    pub defaults: Defaults,
    /// Reads the keys that the family has beyond those that all have.
    pub(super) configure: fn(&Fields, &mut ModelConfig) -> Result<(), ConfigError>,
}

/// The norms of a block by what they stand before or after; `None` where there is none.
#[derive(Debug, Clone, Copy)]
pub struct BlockNorms {
    /// Before attention.
    pub before_mixer: Option<&'static str>,
    /// Before attention's output joins the residual stream.
    pub after_mixer: Option<&'static str>,
    /// Before the feed-forward layer.
    pub before_mlp: Option<&'static str>,
    /// Before its output joins the residual stream.
    pub after_mlp: Option<&'static str>,
}

/// The layers of the feed-forward layer.
#[derive(Debug, Clone, Copy)]
pub enum MlpNames {
    /// `gate_proj`, `up_proj`, `down_proj`.
    Gated,
    /// `gate_up_proj`, `down_proj`.
    Fused,
    /// Two layers without a gate.
    Plain {
        /// The one that widens.
        up: &'static str,
        /// The one that narrows.
        down: &'static str,
    },
}

/// How files store the experts of a mixture.
#[derive(Debug, Clone, Copy)]
pub enum ExpertFiles {
    /// A matrix `[out, in]` for each expert and layer: `experts.E.NAME.weight`.
    Each {
        /// The gate.
        gate: &'static str,
        /// Beside the gate.
        up: &'static str,
        /// The one that narrows.
        down: &'static str,
    },
    /// All experts in one tensor, `[E, in, out]` (gpt-oss).
    Transposed,
}

/// What `config.json` means where it is silent.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// `vocab_size`
    pub vocab_size: usize,
    /// `hidden_size`
    pub hidden_size: usize,
    /// `intermediate_size`
    pub intermediate_size: usize,
    /// `num_hidden_layers`
    pub num_hidden_layers: usize,
    /// `num_attention_heads`
    pub num_attention_heads: usize,
    /// `num_key_value_heads`; as many as query heads when `None`.
    pub num_key_value_heads: Option<usize>,
    /// `head_dim`; `hidden_size / num_attention_heads` when `None`.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`
    pub max_position_embeddings: usize,
    /// The key of the norms' epsilon.
    pub eps_key: &'static str,
    /// Its value.
    pub eps: f64,
    /// The key of the activation.
    pub act_key: &'static str,
    /// Its value.
    pub act: &'static str,
    /// `rope_theta`
    pub rope_theta: f64,
    /// `partial_rotary_factor`; the key is refused when `None`.
    pub partial_rotary_factor: Option<f64>,
    /// `original_max_position_embeddings`, in families where it stands outside of the rope
    /// parameters and overrides them (Phi 3).
    pub original_positions: Option<usize>,
    /// `tie_word_embeddings`
    pub tie_word_embeddings: bool,
    /// `initializer_range`
    pub initializer_range: f64,
    /// `bos_token_id`
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`
    pub eos_token_ids: &'static [u32],
    /// `pad_token_id`
    pub pad_token_id: Option<u32>,
}

/// Norms before attention and before the feed-forward layer.
pub(super) const PRE_NORM: BlockNorms = BlockNorms {
    before_mixer: Some("input_layernorm"),
    after_mixer: None,
    before_mlp: Some("post_attention_layernorm"),
    after_mlp: None,
};

/// What most families have; each is written as this and what differs.
pub(super) const LLAMA_LIKE: Family = Family {
    model_type: "llama",
    class_name: "LlamaForCausalLM",
    norm: NormKind::Rms,
    norms: PRE_NORM,
    parallel: false,
    final_norm: "model.norm",
    fused_qkv: false,
    o_proj: "o_proj",
    qk_norms: ["q_norm", "k_norm"],
    interleaved: false,
    mlp: MlpNames::Gated,
    head_bias: false,
    sinks: false,
    gated_attention: false,
    fused_linear: false,
    router: "gate",
    shared_expert: "shared_expert",
    shared_gate: false,
    expert_files: ExpertFiles::Each {
        gate: "gate_proj",
        up: "up_proj",
        down: "down_proj",
    },
    renames: &[],
    defaults: LLAMA_DEFAULTS,
    configure: dense::biases,
};

/// The defaults of `LlamaConfig`.
pub(super) const LLAMA_DEFAULTS: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    eps_key: "rms_norm_eps",
    eps: 1e-6,
    act_key: "hidden_act",
    act: "silu",
    rope_theta: 10_000.0,
    partial_rotary_factor: None,
    original_positions: None,
    tie_word_embeddings: false,
    initializer_range: 0.02,
    bos_token_id: Some(1),
    eos_token_ids: &[2],
    pad_token_id: None,
};

/// Every supported family.
pub static FAMILIES: &[&Family] = &[
    &dense::LLAMA,
    &dense::MISTRAL,
    &sparse::MIXTRAL,
    &dense::QWEN2,
    &sparse::QWEN2_MOE,
    &dense::QWEN3,
    &sparse::QWEN3_MOE,
    &linear::QWEN3_NEXT,
    &linear::QWEN3_5,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &dense::PHI,
    &dense::PHI3,
    &dense::SMOLLM3,
    &dense::OLMO2,
    &dense::OLMO3,
    &dense::GRANITE,
    &dense::STARCODER2,
    &dense::COHERE,
    &dense::GLM4,
    &sparse::DEEPSEEK_V3,
    &sparse::GPT_OSS,
];

/// The family that `model_type` names.
pub fn by_model_type(name: &str) -> Option<&'static Family> {
    FAMILIES
        .iter()
        .find(|family| family.model_type == name)
        .copied()
}

/// The names of all families, for messages.
pub fn supported() -> String {
    let names = FAMILIES.iter().map(|family| family.model_type);
    names.collect::<Vec<_>>().join(", ")
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.model_type)
    }
}
