//! Families with a mixture of experts.

use super::dense::attention_bias;
use super::keys::{LayerType, layer_types, slide, slide_all, sparse_steps, window};
use super::{Defaults, ExpertFiles, Family, Fields, LLAMA_DEFAULTS, LLAMA_LIKE};
use crate::kernels::ClampedGate;
use crate::model::config::{
    ConfigError, LatentConfig, ModelConfig, MoeConfig, QkNorm, RopeScaling,
};
use crate::nn::rope::yarn_scale;
use crate::nn::{ExpertGate, RouterRule};

/// Mixtral (arXiv 2401.04088).
pub(super) static MIXTRAL: Family = Family {
    model_type: "mixtral",
    class_name: "MixtralForCausalLM",
    renames: &[("mlp.", "block_sparse_moe.")],
    expert_files: ExpertFiles::Each {
        gate: "w1",
        up: "w3",
        down: "w2",
    },
    defaults: Defaults {
        intermediate_size: 14_336,
        num_key_value_heads: Some(8),
        max_position_embeddings: 131_072,
        eps: 1e-5,
        rope_theta: 1_000_000.0,
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        slide_all(config, window(fields, None)?);
        for layer in &mut config.layers {
            layer.sparse = true;
        }
        config.moe = Some(MoeConfig {
            num_experts: experts(fields, 8)?,
            num_experts_per_tok: fields.size("num_experts_per_tok")?.unwrap_or(2),
            intermediate_size: config.intermediate_size,
            shared_intermediate_size: 0,
            rule: RouterRule::Softmax { normalise: true },
            gate: ExpertGate::Halves(config.hidden_act),
            router_aux_loss_coef: aux_loss(fields)?,
        });
        Ok(())
    },
    ..LLAMA_LIKE
};

const QWEN_MOE_DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 2048,
    intermediate_size: 5632,
    num_hidden_layers: 24,
    num_attention_heads: 16,
    num_key_value_heads: Some(16),
    max_position_embeddings: 32_768,
    bos_token_id: None,
    eos_token_ids: &[],
    ..LLAMA_DEFAULTS
};

/// Qwen 1.5 and 2 with experts, one of which sees every token (arXiv 2407.10671).
pub(super) static QWEN2_MOE: Family = Family {
    model_type: "qwen2_moe",
    class_name: "Qwen2MoeForCausalLM",
    shared_gate: true,
    defaults: QWEN_MOE_DEFAULTS,
    configure: |fields, config| {
        config.qkv_bias = fields.flag("qkv_bias")?.unwrap_or(true);
        let slides = fields.flag("use_sliding_window")?.unwrap_or(false);
        let last = fields.size("max_window_layers")?.unwrap_or(28);
        let types = layer_types(fields, config, |i| match slides && i % 2 == 0 && i < last {
            true => LayerType::Sliding,
            false => LayerType::Full,
        })?;
        slide(
            config,
            &types,
            window(fields, Some(4096))?.filter(|_| slides),
        );
        sparse_steps(fields, config)?;
        qwen_experts(fields, config, [60, 4, 1408, 5632], false)
    },
    ..LLAMA_LIKE
};

/// Qwen 3 with experts (arXiv 2505.09388).
pub(super) static QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    class_name: "Qwen3MoeForCausalLM",
    defaults: Defaults {
        intermediate_size: 6144,
        num_attention_heads: 32,
        num_key_value_heads: Some(4),
        ..QWEN_MOE_DEFAULTS
    },
    configure: |fields, config| {
        config.qk_norm = QkNorm::Each;
        attention_bias(fields, config, false)?;
        let slides = fields.flag("use_sliding_window")?.unwrap_or(false);
        slide_all(config, window(fields, Some(4096))?.filter(|_| slides));
        sparse_steps(fields, config)?;
        qwen_experts(fields, config, [128, 8, 768, 0], false)
    },
    ..LLAMA_LIKE
};

/// DeepSeek V3 and R1, Kimi K2: latent attention, experts in groups (arXiv 2412.19437).
pub(super) static DEEPSEEK_V3: Family = Family {
    model_type: "deepseek_v3",
    class_name: "DeepseekV3ForCausalLM",
    shared_expert: "shared_experts",
    defaults: Defaults {
        vocab_size: 129_280,
        hidden_size: 7168,
        intermediate_size: 18_432,
        num_hidden_layers: 61,
        num_attention_heads: 128,
        num_key_value_heads: Some(128),
        max_position_embeddings: 4096,
        bos_token_id: Some(0),
        eos_token_ids: &[1],
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        attention_bias(fields, config, false)?;
        latent(fields, config)?;
        let dense = fields.size("first_k_dense_replace")?.unwrap_or(3);
        for (i, layer) in config.layers.iter_mut().enumerate() {
            layer.sparse = i >= dense;
        }
        let size = |key, default| Ok::<usize, ConfigError>(fields.size(key)?.unwrap_or(default));
        let width = size("moe_intermediate_size", 2048)?;
        config.moe = Some(MoeConfig {
            num_experts: match fields.size("num_local_experts")? {
                Some(experts) => experts,
                None => size("n_routed_experts", 256)?,
            },
            num_experts_per_tok: size("num_experts_per_tok", 8)?,
            intermediate_size: width,
            shared_intermediate_size: width * size("n_shared_experts", 1)?,
            rule: RouterRule::Sigmoid {
                groups: size("n_group", 8)?,
                kept: size("topk_group", 4)?,
                normalise: fields.flag("norm_topk_prob")?.unwrap_or(true),
                scale: fields.number("routed_scaling_factor")?.unwrap_or(2.5) as f32,
            },
            gate: ExpertGate::Halves(config.hidden_act),
            router_aux_loss_coef: 0.0,
        });
        Ok(())
    },
    ..LLAMA_LIKE
};

/// gpt-oss: sinks, every other layer slides, clamped gates (arXiv 2508.10925).
pub(super) static GPT_OSS: Family = Family {
    model_type: "gpt_oss",
    class_name: "GptOssForCausalLM",
    sinks: true,
    router: "router",
    expert_files: ExpertFiles::Transposed,
    defaults: Defaults {
        vocab_size: 201_088,
        hidden_size: 2880,
        intermediate_size: 2880,
        num_hidden_layers: 36,
        num_attention_heads: 64,
        num_key_value_heads: Some(8),
        head_dim: Some(64),
        max_position_embeddings: 131_072,
        eps: 1e-5,
        rope_theta: 150_000.0,
        bos_token_id: None,
        eos_token_ids: &[],
        ..LLAMA_DEFAULTS
    },
    configure: |fields, config| {
        attention_bias(fields, config, true)?;
        if !fields.has("rope_parameters") && !fields.has("rope_scaling") {
            config.ropes[0].scaling = RopeScaling::Yarn {
                factor: 32.0,
                original_max_position_embeddings: 4096,
                attention_factor: None,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: None,
                mscale_all_dim: None,
                truncate: false,
            };
        }
        let types = layer_types(fields, config, |i| match i % 2 {
            0 => LayerType::Sliding,
            _ => LayerType::Full,
        })?;
        slide(config, &types, window(fields, Some(128))?);
        for layer in &mut config.layers {
            layer.sparse = true;
        }
        config.moe = Some(MoeConfig {
            num_experts: experts(fields, 128)?,
            num_experts_per_tok: fields.size("num_experts_per_tok")?.unwrap_or(4),
            intermediate_size: config.intermediate_size,
            shared_intermediate_size: 0,
            rule: RouterRule::TopSoftmax,
            gate: ExpertGate::Clamped(ClampedGate {
                alpha: fields.number("swiglu_alpha")?.unwrap_or(1.702) as f32,
                limit: fields.number("swiglu_limit")?.unwrap_or(7.0) as f32,
            }),
            router_aux_loss_coef: aux_loss(fields)?,
        });
        Ok(())
    },
    ..LLAMA_LIKE
};

/// `num_local_experts`, which `num_experts` overrides in transformers where both are there.
fn experts(fields: &Fields, default: usize) -> Result<usize, ConfigError> {
    Ok(match fields.size("num_experts")? {
        Some(experts) => experts,
        None => fields.size("num_local_experts")?.unwrap_or(default),
    })
}

fn aux_loss(fields: &Fields) -> Result<f64, ConfigError> {
    Ok(fields.number("router_aux_loss_coef")?.unwrap_or(0.001))
}

/// Experts of Qwen; the defaults are experts, experts of a token, width, and width of the expert
/// that sees every token.
pub(super) fn qwen_experts(
    fields: &Fields,
    config: &mut ModelConfig,
    [experts, chosen, width, shared]: [usize; 4],
    normalise: bool,
) -> Result<(), ConfigError> {
    let size = |key, default| Ok::<usize, ConfigError>(fields.size(key)?.unwrap_or(default));
    config.moe = Some(MoeConfig {
        // Qwen3-MoE's attribute map: what transformers 5 saves overrides the old key.
        num_experts: match fields.size("num_local_experts")? {
            Some(experts) => experts,
            None => size("num_experts", experts)?,
        },
        num_experts_per_tok: size("num_experts_per_tok", chosen)?,
        intermediate_size: size("moe_intermediate_size", width)?,
        shared_intermediate_size: match shared {
            0 => 0,
            _ => size("shared_expert_intermediate_size", shared)?,
        },
        rule: RouterRule::Softmax {
            normalise: fields.flag("norm_topk_prob")?.unwrap_or(normalise),
        },
        gate: ExpertGate::Halves(config.hidden_act),
        router_aux_loss_coef: aux_loss(fields)?,
    });
    Ok(())
}

/// Sizes of latent attention; YaRN's `mscale_all_dim` makes the scores larger.
fn latent(fields: &Fields, config: &mut ModelConfig) -> Result<(), ConfigError> {
    let size = |key, default| Ok::<usize, ConfigError>(fields.size(key)?.unwrap_or(default));
    let latent = LatentConfig {
        q_lora_rank: match fields.has("q_lora_rank") {
            true => fields.size("q_lora_rank")?,
            false => Some(1536),
        },
        kv_lora_rank: size("kv_lora_rank", 512)?,
        qk_rope_head_dim: size("qk_rope_head_dim", 64)?,
        qk_nope_head_dim: size("qk_nope_head_dim", 128)?,
        v_head_dim: size("v_head_dim", 128)?,
        rope_interleave: fields.flag("rope_interleave")?.unwrap_or(true),
    };
    // The whole head; the rotary embedding has the width of the part that rotates.
    config.head_dim = latent.qk_rope_head_dim + latent.qk_nope_head_dim;
    config.num_key_value_heads = config.num_attention_heads;
    config.attention_scale = (config.head_dim as f64).powf(-0.5);
    config.ropes[0].dim = latent.qk_rope_head_dim;
    if let RopeScaling::Yarn {
        factor,
        mscale_all_dim: Some(mscale),
        ..
    } = config.ropes[0].scaling
    {
        config.attention_scale *= yarn_scale(factor, mscale).powi(2);
    }
    config.latent = Some(latent);
    Ok(())
}
