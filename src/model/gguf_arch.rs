//! The architectures of GGUF files that are read: for each the family it is, its metadata as keys of
//! `config.json`, and what llama.cpp's converter leaves unsaid or changes.
//!
//! To add one: a row in [`ARCHITECTURES`], its model in `scripts/gguf_reference.py`, and names that
//! the table in `names.rs` lacks.

use super::config::ConfigError;
use super::families::Family;
use super::gguf_fields::Fields;

/// What is read as one family.
pub(super) struct Architecture {
    /// `general.architecture`, and what its keys start with.
    pub(super) name: &'static str,
    /// `model_type` of the family.
    pub(super) model_type: &'static str,
    /// Whether there are experts.
    sparse: bool,
    /// Its keys beyond those in [`COMMON`].
    pub(super) keys: &'static [Key],
    /// What is so in every file.
    pub(super) fixed: &'static [(&'static str, bool)],
    /// Keys that are true if there is this tensor.
    pub(super) biases: &'static [(&'static str, &'static str)],
    /// Whether the converter interleaves the halves of each head of q and k.
    permutes: bool,
    /// Whether part of a head may be all that rotates.
    pub(super) partial_rotary: bool,
    /// Of so many layers the last is full, the others slide.
    pub(super) pattern: Option<usize>,
    /// Whether there is a window where the file has none.
    pub(super) always_slides: bool,
    /// In families with `query_pre_attn_scalar`: so many layers has the model in which it is
    /// `hidden_size / num_attention_heads`; it is the head's width in the others.
    pub(super) wide_scores: Option<usize>,
}

/// GGUF key after the architecture's name, key of `config.json`.
pub(super) type Key = (&'static str, &'static str, Kind);

/// What is expected under a key.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// A whole number.
    Size,
    /// Any number.
    Number,
    /// A whole number; the family's default where there is none.
    SizeIfAny,
    /// Any number; the family's default where there is none.
    NumberIfAny,
    /// A window, 0 for none; the family's default where there is none.
    Window,
}

/// The keys that all architectures have. Heads, rope and vocabulary take more than a key.
pub(super) const COMMON: &[Key] = &[
    ("context_length", "max_position_embeddings", Kind::Size),
    ("embedding_length", "hidden_size", Kind::Size),
    ("feed_forward_length", "intermediate_size", Kind::Size),
    ("block_count", "num_hidden_layers", Kind::Size),
    ("attention.head_count", "num_attention_heads", Kind::Size),
    (
        "attention.layer_norm_rms_epsilon",
        "rms_norm_eps",
        Kind::Number,
    ),
];

const WINDOW: Key = ("attention.sliding_window", "sliding_window", Kind::Window);
const LOGIT_CAP: Key = (
    "final_logit_softcapping",
    "final_logit_softcapping",
    Kind::NumberIfAny,
);
const EXPERTS_OF_A_TOKEN: Key = ("expert_used_count", "num_experts_per_tok", Kind::Size);

/// What most have; each is written as this and what differs.
const PLAIN: Architecture = Architecture {
    name: "",
    model_type: "",
    sparse: false,
    keys: &[],
    fixed: &[],
    biases: &[],
    permutes: false,
    partial_rotary: false,
    pattern: None,
    always_slides: false,
    wide_scores: None,
};

/// Every supported architecture. Mistral's models are `llama` files without a window, as llama.cpp
/// computes them.
static ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        model_type: "llama",
        biases: &[
            ("attention_bias", "blk.0.attn_q.bias"),
            ("mlp_bias", "blk.0.ffn_gate.bias"),
        ],
        permutes: true,
        ..PLAIN
    },
    Architecture {
        name: "llama",
        model_type: "mixtral",
        sparse: true,
        keys: &[
            ("expert_count", "num_local_experts", Kind::Size),
            EXPERTS_OF_A_TOKEN,
        ],
        permutes: true,
        ..PLAIN
    },
    Architecture {
        name: "qwen2",
        model_type: "qwen2",
        ..PLAIN
    },
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        ..PLAIN
    },
    Architecture {
        name: "qwen3moe",
        model_type: "qwen3_moe",
        sparse: true,
        keys: &[
            ("expert_count", "num_experts", Kind::Size),
            EXPERTS_OF_A_TOKEN,
            (
                "expert_feed_forward_length",
                "moe_intermediate_size",
                Kind::Size,
            ),
        ],
        // llama.cpp always does.
        fixed: &[("norm_topk_prob", true)],
        ..PLAIN
    },
    Architecture {
        name: "gemma",
        model_type: "gemma",
        ..PLAIN
    },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        keys: &[
            WINDOW,
            (
                "attn_logit_softcapping",
                "attn_logit_softcapping",
                Kind::NumberIfAny,
            ),
            LOGIT_CAP,
        ],
        pattern: Some(2),
        always_slides: true,
        wide_scores: Some(46),
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        keys: &[
            WINDOW,
            LOGIT_CAP,
            (
                "rope.freq_base_swa",
                "rope_local_base_freq",
                Kind::NumberIfAny,
            ),
        ],
        pattern: Some(6),
        wide_scores: Some(62),
        ..PLAIN
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        keys: &[
            WINDOW,
            (
                "rope.scaling.original_context_length",
                "original_max_position_embeddings",
                Kind::SizeIfAny,
            ),
        ],
        partial_rotary: true,
        ..PLAIN
    },
];

/// The architecture of a file.
///
/// # Errors
/// When it is not supported, or the file is one of several.
pub(super) fn of(fields: &Fields) -> Result<&'static Architecture, ConfigError> {
    let metadata = &fields.file.metadata;
    let name = metadata.str("general.architecture").unwrap_or("?");
    let known: Vec<&Architecture> = (ARCHITECTURES.iter())
        .filter(|architecture| architecture.name == name)
        .collect();
    if known.is_empty() {
        return Err(unsupported(fields, name));
    }
    if fields.size("split.count")?.is_some_and(|count| count > 1) {
        return Err(ConfigError::Unsupported {
            path: fields.file.path().to_path_buf(),
            what: "a GGUF model split over several files".into(),
            remedy: "join them with llama-gguf-split --merge",
        });
    }
    let key = format!("{name}.expert_count");
    let experts = fields.size(&key)?.unwrap_or(0);
    (known.into_iter())
        .find(|architecture| architecture.sparse == (experts > 0))
        .ok_or_else(|| {
            let expected = if experts > 0 { "0" } else { "1 or more" };
            fields.error(&key, expected, &experts.to_string())
        })
}

/// Whether a family's files have the rows of q and k in llama.cpp's order.
pub(super) fn permutes(family: &Family) -> bool {
    (ARCHITECTURES.iter())
        .any(|architecture| architecture.model_type == family.model_type && architecture.permutes)
}

/// The refusal of an architecture, with the names of those that would do.
fn unsupported(fields: &Fields, name: &str) -> ConfigError {
    let mut names: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
    names.dedup();
    ConfigError::Architecture {
        path: fields.file.path().to_path_buf(),
        key: "general.architecture",
        found: format!("`{name}` in a GGUF file"),
        supported: format!(
            "{}; other families from their safetensors",
            names.join(", ")
        ),
    }
}
