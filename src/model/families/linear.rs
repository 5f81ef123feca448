//! Families that mix linear attention (gated delta rule, arXiv 2412.06464) with softmax attention.

use super::dense::attention_bias;
use super::keys::{LayerType, layer_types, sparse_steps};
use super::sparse::qwen_experts;
use super::{Defaults, Family, Fields, LLAMA_DEFAULTS, LLAMA_LIKE};
use crate::model::config::{ConfigError, LinearConfig, Mixer, ModelConfig, QkNorm};
use crate::nn::NormKind;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 2048,
    intermediate_size: 5632,
    num_hidden_layers: 48,
    num_attention_heads: 16,
    num_key_value_heads: Some(2),
    head_dim: Some(256),
    max_position_embeddings: 32_768,
    partial_rotary_factor: Some(0.25),
    bos_token_id: None,
    eos_token_ids: &[],
    ..LLAMA_DEFAULTS
};

/// Qwen3-Next: linear attention in three of four layers, gated attention in the fourth, experts.
pub(super) static QWEN3_NEXT: Family = Family {
    model_type: "qwen3_next",
    class_name: "Qwen3NextForCausalLM",
    norm: NormKind::RmsPlusOne,
    gated_attention: true,
    fused_linear: true,
    shared_gate: true,
    defaults: DEFAULTS,
    configure: |fields, config| {
        common(fields, config)?;
        sparse_steps(fields, config)?;
        qwen_experts(fields, config, [512, 10, 512, 512], true)
    },
    ..LLAMA_LIKE
};

/// Qwen 3.5, text: the same without experts, and with linear attention's inputs apart.
pub(super) static QWEN3_5: Family = Family {
    model_type: "qwen3_5_text",
    class_name: "Qwen3_5ForCausalLM",
    norm: NormKind::RmsPlusOne,
    gated_attention: true,
    defaults: Defaults {
        vocab_size: 248_320,
        hidden_size: 4096,
        intermediate_size: 12_288,
        num_hidden_layers: 32,
        num_key_value_heads: Some(4),
        ..DEFAULTS
    },
    configure: common,
    ..LLAMA_LIKE
};

fn common(fields: &Fields, config: &mut ModelConfig) -> Result<(), ConfigError> {
    config.qk_norm = QkNorm::Each;
    attention_bias(fields, config, false)?;
    let interval = fields.size("full_attention_interval")?.unwrap_or(4).max(1);
    let types = layer_types(fields, config, |i| match (i + 1) % interval {
        0 => LayerType::Full,
        _ => LayerType::Linear,
    })?;
    for (layer, kind) in config.layers.iter_mut().zip(types) {
        if kind == LayerType::Linear {
            layer.mixer = Mixer::Linear;
        }
    }
    let size = |key, default| Ok::<usize, ConfigError>(fields.size(key)?.unwrap_or(default));
    config.linear = Some(LinearConfig {
        num_key_heads: size("linear_num_key_heads", 16)?,
        num_value_heads: size("linear_num_value_heads", 32)?,
        key_head_dim: size("linear_key_head_dim", 128)?,
        value_head_dim: size("linear_value_head_dim", 128)?,
        conv_kernel_dim: size("linear_conv_kernel_dim", 4)?,
    });
    Ok(())
}
