//! Families with one feed-forward layer a block and softmax attention; Gemma has a file of its own.

use super::keys::{LayerType, by_layer, layer_types, slide, slide_all, sliding, window};
use super::{BlockNorms, Defaults, Family, Fields, LLAMA_DEFAULTS, LLAMA_LIKE, MlpNames};
use crate::model::config::{ConfigError, ModelConfig, QkNorm, RopeScaling};
use crate::nn::NormKind;

/// Llama 2, 3 and 3.x, and what is built like them (arXiv 2302.13971).
pub(super) static LLAMA: Family = LLAMA_LIKE;

/// Mistral 7B and its kin: a sliding window in all layers (arXiv 2310.06825).
pub(super) static MISTRAL: Family = Family {
    model_type: "mistral",
    class_name: "MistralForCausalLM",
    defaults: Defaults {
        intermediate_size: 14_336,
        num_key_value_heads: Some(8),
        max_position_embeddings: 131_072,
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        slide_all(config, window(fields, Some(4096))?);
        Ok(())
    },
    ..LLAMA_LIKE
};

const QWEN_DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    bos_token_id: None,
    eos_token_ids: &[],
    ..LLAMA_DEFAULTS
};

/// Qwen 2 and 2.5: biases on q, k and v (arXiv 2407.10671).
pub(super) static QWEN2: Family = Family {
    model_type: "qwen2",
    class_name: "Qwen2ForCausalLM",
    defaults: QWEN_DEFAULTS,
    configure: |fields, config| {
        config.qkv_bias = true;
        qwen_windows(fields, config)
    },
    ..LLAMA_LIKE
};

/// Qwen 3: norms of queries and keys (arXiv 2505.09388).
pub(super) static QWEN3: Family = Family {
    model_type: "qwen3",
    class_name: "Qwen3ForCausalLM",
    defaults: Defaults {
        head_dim: Some(128),
        ..QWEN_DEFAULTS
    },
    configure: |fields, config| {
        config.qk_norm = QkNorm::Each;
        attention_bias(fields, config, false)?;
        qwen_windows(fields, config)
    },
    ..LLAMA_LIKE
};

/// Phi 1, 1.5 and 2: layer norm, attention and feed-forward layer side by side, biases everywhere.
pub(super) static PHI: Family = Family {
    model_type: "phi",
    class_name: "PhiForCausalLM",
    norm: NormKind::LayerBias,
    norms: BlockNorms {
        before_mixer: Some("input_layernorm"),
        after_mixer: None,
        before_mlp: None,
        after_mlp: None,
    },
    parallel: true,
    final_norm: "model.final_layernorm",
    o_proj: "dense",
    qk_norms: ["q_layernorm", "k_layernorm"],
    mlp: MlpNames::Plain {
        up: "fc1",
        down: "fc2",
    },
    head_bias: true,
    defaults: Defaults {
        vocab_size: 51_200,
        hidden_size: 2048,
        intermediate_size: 8192,
        num_hidden_layers: 24,
        eps_key: "layer_norm_eps",
        eps: 1e-5,
        act: "gelu_new",
        partial_rotary_factor: Some(0.5),
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        (config.qkv_bias, config.o_bias, config.mlp_bias) = (true, true, true);
        if fields.flag("qk_layernorm")?.unwrap_or(false) {
            config.qk_norm = QkNorm::Each;
        }
        Ok(())
    },
    ..LLAMA_LIKE
};

/// Phi 3, 3.5, 4 and 4-mini: fused projections and LongRoPE (arXiv 2404.14219).
pub(super) static PHI3: Family = Family {
    model_type: "phi3",
    class_name: "Phi3ForCausalLM",
    fused_qkv: true,
    mlp: MlpNames::Fused,
    defaults: Defaults {
        vocab_size: 32_064,
        hidden_size: 3072,
        intermediate_size: 8192,
        max_position_embeddings: 4096,
        eps: 1e-5,
        partial_rotary_factor: Some(1.0),
        original_positions: Some(4096),
        eos_token_ids: &[32_000],
        pad_token_id: Some(32_000),
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        if !matches!(
            config.ropes[0].scaling,
            RopeScaling::Default | RopeScaling::Long { .. }
        ) {
            return Err(fields.error("rope_scaling", "`longrope` or nothing", "another type"));
        }
        slide_all(config, window(fields, None)?);
        Ok(())
    },
    ..LLAMA_LIKE
};

/// SmolLM 3: every few layers have no positions.
pub(super) static SMOLLM3: Family = Family {
    model_type: "smollm3",
    class_name: "SmolLM3ForCausalLM",
    defaults: Defaults {
        vocab_size: 128_256,
        hidden_size: 2048,
        num_hidden_layers: 36,
        num_attention_heads: 16,
        num_key_value_heads: Some(4),
        max_position_embeddings: 32_768,
        rope_theta: 2_000_000.0,
        tie_word_embeddings: true,
        bos_token_id: Some(128_000),
        eos_token_ids: &[128_001],
        pad_token_id: Some(128_004),
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        biases(fields, config)?;
        let interval = fields.size("no_rope_layer_interval")?.unwrap_or(4).max(1);
        if let Some(turns) = by_layer(fields, "no_rope_layers", config)? {
            for (layer, turns) in config.layers.iter_mut().zip(turns) {
                layer.rope = Some(0).filter(|_| turns != 0);
            }
        } else {
            for (i, layer) in config.layers.iter_mut().enumerate() {
                layer.rope = Some(0).filter(|_| !(i + 1).is_multiple_of(interval));
            }
        }
        let slides = fields.flag("use_sliding_window")?.unwrap_or(false);
        let window = window(fields, None)?;
        let types = layer_types(fields, config, |i| match config.layers[i].rope {
            None if slides && window.is_some() => LayerType::Sliding,
            _ => LayerType::Full,
        })?;
        slide(config, &types, window);
        Ok(())
    },
    ..LLAMA_LIKE
};

const OLMO_NORMS: BlockNorms = BlockNorms {
    before_mixer: None,
    after_mixer: Some("post_attention_layernorm"),
    before_mlp: None,
    after_mlp: Some("post_feedforward_layernorm"),
};

const OLMO_DEFAULTS: Defaults = Defaults {
    vocab_size: 50_304,
    eps: 1e-5,
    bos_token_id: None,
    eos_token_ids: &[50_279],
    pad_token_id: Some(1),
    ..LLAMA_DEFAULTS
};

/// OLMo 2: norms after the layers, and over all queries and keys of a row (arXiv 2501.00656).
pub(super) static OLMO2: Family = Family {
    model_type: "olmo2",
    class_name: "Olmo2ForCausalLM",
    norms: OLMO_NORMS,
    defaults: OLMO_DEFAULTS,
    configure: |fields, config| {
        config.qk_norm = QkNorm::Whole;
        attention_bias(fields, config, false)
    },
    ..LLAMA_LIKE
};

/// OLMo 3: OLMo 2 with a sliding window in three of four layers, which rope scaling spares.
pub(super) static OLMO3: Family = Family {
    model_type: "olmo3",
    class_name: "Olmo3ForCausalLM",
    norms: OLMO_NORMS,
    defaults: Defaults {
        rope_theta: 500_000.0,
        ..OLMO_DEFAULTS
    },
    configure: |fields, config| {
        config.qk_norm = QkNorm::Whole;
        attention_bias(fields, config, false)?;
        let types = layer_types(fields, config, |i| match (i + 1) % 4 {
            0 => LayerType::Full,
            _ => LayerType::Sliding,
        })?;
        slide(config, &types, window(fields, Some(4096))?);
        // transformers 5 gives `rope_theta` of files of transformers 4 to the full layers alone.
        let bases = [("rope_theta", 500_000.0), ("", 500_000.0)];
        config.two_ropes(fields, &sliding(&types), bases)
    },
    ..LLAMA_LIKE
};

/// Granite 3: Llama with four multipliers.
pub(super) static GRANITE: Family = Family {
    model_type: "granite",
    class_name: "GraniteForCausalLM",
    configure: |fields, config| {
        biases(fields, config)?;
        let number = |key| Ok::<f64, ConfigError>(fields.number(key)?.unwrap_or(1.0));
        config.embedding_multiplier = number("embedding_multiplier")?;
        config.residual_multiplier = number("residual_multiplier")?;
        config.attention_scale = number("attention_multiplier")?;
        config.logit_scale = 1.0 / number("logits_scaling")?;
        Ok(())
    },
    ..LLAMA_LIKE
};

/// StarCoder 2: layer norm, a feed-forward layer without a gate, biases (arXiv 2402.19173).
pub(super) static STARCODER2: Family = Family {
    model_type: "starcoder2",
    class_name: "Starcoder2ForCausalLM",
    norm: NormKind::LayerBias,
    mlp: MlpNames::Plain {
        up: "c_fc",
        down: "c_proj",
    },
    defaults: Defaults {
        vocab_size: 49_152,
        hidden_size: 3072,
        intermediate_size: 12_288,
        num_hidden_layers: 30,
        num_attention_heads: 24,
        num_key_value_heads: Some(2),
        max_position_embeddings: 4096,
        eps_key: "norm_epsilon",
        eps: 1e-5,
        act: "gelu_pytorch_tanh",
        tie_word_embeddings: true,
        initializer_range: 0.018_042,
        bos_token_id: Some(50_256),
        eos_token_ids: &[50_256],
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        let bias = fields.flag("use_bias")?.unwrap_or(true);
        (config.qkv_bias, config.o_bias, config.mlp_bias) = (bias, bias, bias);
        slide_all(config, window(fields, None)?);
        Ok(())
    },
    ..LLAMA_LIKE
};

/// Command R: layer norm without a bias, one norm for attention and feed-forward layer side by side.
pub(super) static COHERE: Family = Family {
    model_type: "cohere",
    class_name: "CohereForCausalLM",
    norm: NormKind::Layer,
    norms: BlockNorms {
        before_mixer: Some("input_layernorm"),
        after_mixer: None,
        before_mlp: None,
        after_mlp: None,
    },
    parallel: true,
    interleaved: true,
    defaults: Defaults {
        vocab_size: 256_000,
        hidden_size: 8192,
        intermediate_size: 22_528,
        num_hidden_layers: 40,
        num_attention_heads: 64,
        max_position_embeddings: 8192,
        eps_key: "layer_norm_eps",
        eps: 1e-5,
        rope_theta: 500_000.0,
        tie_word_embeddings: true,
        bos_token_id: Some(5),
        eos_token_ids: &[255_001],
        pad_token_id: Some(0),
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        attention_bias(fields, config, false)?;
        config.logit_scale = fields.number("logit_scale")?.unwrap_or(0.0625);
        if fields.flag("use_qk_norm")?.unwrap_or(false) {
            config.qk_norm = QkNorm::Own;
        }
        Ok(())
    },
    ..LLAMA_LIKE
};

/// GLM 4 (0414): four norms a block, neighbours of half a head rotate.
pub(super) static GLM4: Family = Family {
    model_type: "glm4",
    class_name: "Glm4ForCausalLM",
    norms: BlockNorms {
        before_mixer: Some("input_layernorm"),
        after_mixer: Some("post_self_attn_layernorm"),
        before_mlp: Some("post_attention_layernorm"),
        after_mlp: Some("post_mlp_layernorm"),
    },
    interleaved: true,
    mlp: MlpNames::Fused,
    defaults: Defaults {
        vocab_size: 151_552,
        intermediate_size: 13_696,
        num_hidden_layers: 40,
        num_key_value_heads: Some(2),
        head_dim: Some(128),
        max_position_embeddings: 131_072,
        eps: 0.000_000_156_25,
        partial_rotary_factor: Some(0.5),
        bos_token_id: None,
        eos_token_ids: &[151_329, 151_336, 151_338],
        pad_token_id: Some(151_329),
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        config.qkv_bias = fields.flag("attention_bias")?.unwrap_or(true);
        Ok(())
    },
    ..LLAMA_LIKE
};

/// `attention_bias` for q, k, v and o.
pub(super) fn attention_bias(
    fields: &Fields,
    config: &mut ModelConfig,
    default: bool,
) -> Result<(), ConfigError> {
    let bias = fields.flag("attention_bias")?.unwrap_or(default);
    (config.qkv_bias, config.o_bias) = (bias, bias);
    Ok(())
}

/// `attention_bias` and `mlp_bias`.
pub(super) fn biases(fields: &Fields, config: &mut ModelConfig) -> Result<(), ConfigError> {
    attention_bias(fields, config, false)?;
    config.mlp_bias = fields.flag("mlp_bias")?.unwrap_or(false);
    Ok(())
}

/// Windows of Qwen: off unless `use_sliding_window`, then from layer `max_window_layers` on.
fn qwen_windows(fields: &Fields, config: &mut ModelConfig) -> Result<(), ConfigError> {
    let slides = fields.flag("use_sliding_window")?.unwrap_or(false);
    let window = window(fields, Some(4096))?.filter(|_| slides);
    let first = fields.size("max_window_layers")?.unwrap_or(28);
    let types = layer_types(fields, config, |i| match window {
        Some(_) if i >= first => LayerType::Sliding,
        _ => LayerType::Full,
    })?;
    slide(config, &types, window);
    Ok(())
}
