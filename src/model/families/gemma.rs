//! Gemma: norms by `1 + w`, embeddings scaled by the root of their width.

use super::keys::{LayerType, layer_types, slide, sliding, window};
use super::{BlockNorms, Defaults, Family, Fields, LLAMA_DEFAULTS, LLAMA_LIKE};
use crate::kernels::Activation;
use crate::model::config::{ConfigError, ModelConfig, QkNorm};
use crate::nn::NormKind;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 3072,
    intermediate_size: 24_576,
    num_hidden_layers: 28,
    num_attention_heads: 16,
    num_key_value_heads: Some(16),
    head_dim: Some(256),
    max_position_embeddings: 8192,
    act: "gelu_pytorch_tanh",
    tie_word_embeddings: true,
    bos_token_id: Some(2),
    eos_token_ids: &[1],
    pad_token_id: Some(0),
    ..LLAMA_DEFAULTS
};

const NORMS: BlockNorms = BlockNorms {
    before_mixer: Some("input_layernorm"),
    after_mixer: Some("post_attention_layernorm"),
    before_mlp: Some("pre_feedforward_layernorm"),
    after_mlp: Some("post_feedforward_layernorm"),
};

/// Gemma 1 (arXiv 2403.08295).
pub(super) static GEMMA: Family = Family {
    model_type: "gemma",
    class_name: "GemmaForCausalLM",
    norm: NormKind::RmsPlusOne,
    defaults: DEFAULTS,
    configure: |fields, config| {
        // The first releases say "gelu" and mean its approximation; transformers corrects them.
        if config.hidden_act == Activation::Gelu {
            config.hidden_act = Activation::GeluTanh;
        }
        common(fields, config)
    },
    ..LLAMA_LIKE
};

/// Gemma 2: four norms a block, soft caps, every other layer slides (arXiv 2408.00118).
pub(super) static GEMMA2: Family = Family {
    model_type: "gemma2",
    class_name: "Gemma2ForCausalLM",
    norm: NormKind::RmsPlusOne,
    norms: NORMS,
    defaults: Defaults {
        hidden_size: 2304,
        intermediate_size: 9216,
        num_hidden_layers: 26,
        num_attention_heads: 8,
        num_key_value_heads: Some(4),
        act_key: "hidden_activation",
        ..DEFAULTS
    },
    configure: |fields, config| {
        common(fields, config)?;
        scores(fields, config, [Some(50.0), Some(30.0)])?;
        let types = layer_types(fields, config, |i| match i % 2 {
            0 => LayerType::Sliding,
            _ => LayerType::Full,
        })?;
        slide(config, &types, window(fields, Some(4096))?);
        Ok(())
    },
    ..LLAMA_LIKE
};

/// Gemma 3, text: five of six layers slide with a rope base of their own, norms of queries and keys
/// (arXiv 2503.19786).
pub(super) static GEMMA3: Family = Family {
    model_type: "gemma3_text",
    class_name: "Gemma3ForCausalLM",
    norm: NormKind::RmsPlusOne,
    norms: NORMS,
    defaults: Defaults {
        vocab_size: 262_208,
        hidden_size: 2304,
        intermediate_size: 9216,
        num_hidden_layers: 26,
        num_attention_heads: 8,
        num_key_value_heads: Some(4),
        max_position_embeddings: 131_072,
        act_key: "hidden_activation",
        rope_theta: 1_000_000.0,
        ..DEFAULTS
    },
    configure: |fields, config| {
        if fields.flag("use_bidirectional_attention")?.unwrap_or(false) {
            let key = "use_bidirectional_attention";
            return Err(fields.error(key, "false, for a model that writes text", "true"));
        }
        common(fields, config)?;
        scores(fields, config, [None, None])?;
        // transformers reads the key and does not apply it.
        config.attention_soft_cap = None;
        config.qk_norm = QkNorm::Each;
        let pattern = fields.size("sliding_window_pattern")?.unwrap_or(6);
        let types = layer_types(fields, config, |i| match (i + 1) % pattern.max(1) {
            0 => LayerType::Full,
            _ => LayerType::Sliding,
        })?;
        slide(config, &types, window(fields, Some(4096))?);
        let bases = [
            ("rope_theta", 1_000_000.0),
            ("rope_local_base_freq", 10_000.0),
        ];
        config.two_ropes(fields, &sliding(&types), bases)
    },
    ..LLAMA_LIKE
};

/// What all three have.
fn common(fields: &Fields, config: &mut ModelConfig) -> Result<(), ConfigError> {
    super::dense::attention_bias(fields, config, false)?;
    // transformers multiplies by the root in the embeddings' type.
    config.embedding_multiplier = f64::from((config.hidden_size as f64).sqrt() as f32);
    Ok(())
}

/// `query_pre_attn_scalar`, and the soft caps of scores and of logits with their defaults.
fn scores(
    fields: &Fields,
    config: &mut ModelConfig,
    [of_scores, of_logits]: [Option<f64>; 2],
) -> Result<(), ConfigError> {
    let scalar = fields.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    config.attention_scale = scalar.powf(-0.5);
    let cap = |key: &str, default| match fields.has(key) {
        true => fields.number(key),
        false => Ok(default),
    };
    config.attention_soft_cap = cap("attn_logit_softcapping", of_scores)?;
    config.logit_soft_cap = cap("final_logit_softcapping", of_logits)?;
    Ok(())
}
