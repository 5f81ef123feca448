//! A model's layers from a reader of tensors: the one place that says which tensors a
//! configuration calls for, in which order, and what becomes of them.

use super::block::{Block, FeedForward, TokenMixer};
use super::config::{LatentConfig, LayerConfig, LinearConfig, Mixer, MoeConfig, QkNorm};
use super::families::MlpNames;
use super::names;
use super::tensor_reader::TensorReader;
use super::weights::WeightsError;
use crate::kernels::DeltaHeads;
use crate::kernels::attention::Heads;
use crate::kernels::rope::RopeLayout;
use crate::nn::RouterRule;
use crate::nn::delta_net::DeltaProjections;
use crate::nn::{
    Attention, DeltaNet, ExpertGate, ExpertLinear, HeadNorm, LatentAttention, LatentQuery,
    LoraLinear, Mlp, MlpInput, Moe, Norm, NormKind, Projections, Router, SharedExpert,
};

type Read<T> = Result<T, WeightsError>;

/// Epsilon of the norms inside latent attention, whatever `rms_norm_eps` says
/// (`DeepseekV3RMSNorm`'s own default).
const LATENT_EPS: f64 = 1e-6;

/// Block `layer`.
pub(super) fn block(reader: &mut TensorReader, layer: usize) -> Read<Block> {
    let path = names::block(layer);
    let config = reader.config().clone();
    let (family, parts) = (config.family, config.layers[layer]);
    let n = family.norms;
    let norm = |reader: &mut TensorReader, name: Option<&str>| {
        name.map(|name| reader.norm(&format!("{path}.{name}"), config.hidden_size))
            .transpose()
    };
    Ok(Block {
        before_mixer: norm(reader, n.before_mixer)?,
        mixer: mixer(reader, &path, parts)?,
        after_mixer: norm(reader, n.after_mixer)?,
        before_mlp: norm(reader, n.before_mlp)?,
        mlp: match (parts.sparse, config.moe) {
            (true, Some(moe)) => FeedForward::Sparse(Box::new(experts(reader, &path, moe)?)),
            _ => {
                let width = config.intermediate_size;
                let mlp = mlp(reader, &format!("{path}.mlp"), width)?;
                FeedForward::Dense(Box::new(mlp))
            }
        },
        after_mlp: norm(reader, n.after_mlp)?,
        parallel: family.parallel,
        residual_multiplier: config.residual_multiplier,
        norms: n,
    })
}

fn mixer(reader: &mut TensorReader, path: &str, parts: LayerConfig) -> Read<TokenMixer> {
    let config = reader.config();
    Ok(match (parts.mixer, config.linear, config.latent) {
        (Mixer::Linear, Some(linear), _) => {
            let path = format!("{path}.linear_attn");
            TokenMixer::Linear(Box::new(delta_net(reader, &path, linear)?))
        }
        (_, _, Some(latent)) => {
            let path = format!("{path}.self_attn");
            TokenMixer::Latent(Box::new(latent_attention(reader, &path, parts, latent)?))
        }
        _ => {
            let path = format!("{path}.self_attn");
            TokenMixer::Attention(Box::new(attention(reader, &path, parts)?))
        }
    })
}

fn attention(reader: &mut TensorReader, path: &str, parts: LayerConfig) -> Read<Attention> {
    let config = reader.config().clone();
    let (family, hidden) = (config.family, config.hidden_size);
    let width = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    // A gate for each output comes out of the projection of queries.
    let queries = width * if family.gated_attention { 2 } else { 1 };
    let linear = |reader: &mut TensorReader, name: &str, out| {
        reader.linear(&format!("{path}.{name}"), [out, hidden], config.qkv_bias)
    };
    let input = match family.fused_qkv {
        true => {
            let qkv = linear(reader, "qkv_proj", queries + 2 * keys)?;
            Projections::Fused(Box::new(qkv))
        }
        false => Projections::Split(Box::new([
            linear(reader, "q_proj", queries)?,
            linear(reader, "k_proj", keys)?,
            linear(reader, "v_proj", keys)?,
        ])),
    };
    let o_path = format!("{path}.{}", family.o_proj);
    let o_proj = reader.linear(&o_path, [hidden, width], config.o_bias)?;
    let heads = [config.num_attention_heads, config.num_key_value_heads];
    let [q_name, k_name] = family.qk_norms;
    let mut norm = |name: &str, heads: usize| -> Read<Option<HeadNorm>> {
        let (path, dim) = (format!("{path}.{name}"), config.head_dim);
        Ok(match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Each => Some(HeadNorm::Each(reader.norm(&path, dim)?)),
            QkNorm::Whole => Some(HeadNorm::Whole(reader.norm(&path, heads * dim)?)),
            QkNorm::Own => Some(HeadNorm::Own {
                weight: reader.norm_matrix(&path, [heads, dim])?,
                eps: config.norm_eps,
            }),
        })
    };
    let norms = match (norm(q_name, heads[0])?, norm(k_name, heads[1])?) {
        (Some(q), Some(k)) => Some([(q_name, q), (k_name, k)]),
        _ => None,
    };
    let sinks = match family.sinks {
        true => Some(reader.vector(&format!("{path}.sinks"), heads[0], 0.0)?),
        false => None,
    };
    Ok(Attention {
        input,
        o_proj,
        o_name: family.o_proj,
        norms,
        sinks,
        heads: Heads {
            heads: heads[0],
            kv_heads: heads[1],
            head_dim: config.head_dim,
            value_dim: config.head_dim,
            scale: config.attention_scale as f32,
            window: parts.window,
            soft_cap: config.attention_soft_cap.map(|cap| cap as f32),
            in_bf16: reader.keeps_bf16(),
        },
        rope: parts.rope,
        layout: RopeLayout {
            head_dim: config.head_dim,
            interleaved: family.interleaved,
        },
        gated: family.gated_attention,
    })
}

fn latent_attention(
    reader: &mut TensorReader,
    path: &str,
    parts: LayerConfig,
    latent: LatentConfig,
) -> Read<LatentAttention> {
    let config = reader.config().clone();
    let (hidden, h, bias) = (
        config.hidden_size,
        config.num_attention_heads,
        config.qkv_bias,
    );
    let (width, value) = (h * config.head_dim, latent.v_head_dim);
    let at = |name: &str| format!("{path}.{name}");
    let norm = |reader: &mut TensorReader, name: &str, width| -> Read<Norm> {
        let norm = reader.norm(&at(name), width)?;
        Ok(Norm {
            eps: LATENT_EPS,
            ..norm
        })
    };
    let query = match latent.q_lora_rank {
        None => {
            let q = reader.linear(&at("q_proj"), [width, hidden], false)?;
            LatentQuery::Full(Box::new(q))
        }
        Some(rank) => LatentQuery::Narrow(Box::new((
            reader.linear(&at("q_a_proj"), [rank, hidden], bias)?,
            norm(reader, "q_a_layernorm", rank)?,
            reader.linear(&at("q_b_proj"), [width, rank], false)?,
        ))),
    };
    let (rank, rope) = (latent.kv_lora_rank, latent.qk_rope_head_dim);
    Ok(LatentAttention {
        query,
        kv_a_proj: reader.linear(&at("kv_a_proj_with_mqa"), [rank + rope, hidden], bias)?,
        kv_a_norm: norm(reader, "kv_a_layernorm", rank)?,
        kv_b_proj: {
            let out = h * (latent.qk_nope_head_dim + value);
            reader.linear(&at("kv_b_proj"), [out, rank], false)?
        },
        o_proj: reader.linear(&at("o_proj"), [hidden, h * value], config.o_bias)?,
        heads: Heads {
            heads: h,
            kv_heads: h,
            head_dim: config.head_dim,
            value_dim: value,
            scale: config.attention_scale as f32,
            window: parts.window,
            soft_cap: None,
            in_bf16: reader.keeps_bf16(),
        },
        rope_dim: rope,
        rope: parts.rope.unwrap_or(0),
        interleaved: latent.rope_interleave,
    })
}

fn delta_net(reader: &mut TensorReader, path: &str, linear: LinearConfig) -> Read<DeltaNet> {
    let config = reader.config().clone();
    let hidden = config.hidden_size;
    let keys = linear.num_key_heads * linear.key_head_dim;
    let values = linear.num_value_heads * linear.value_head_dim;
    let (channels, heads) = (2 * keys + values, linear.num_value_heads);
    let at = |name: &str| format!("{path}.{name}");
    let project =
        |reader: &mut TensorReader, name: &str, out| reader.linear(&at(name), [out, hidden], false);
    let projections = match config.family.fused_linear {
        true => DeltaProjections::Interleaved {
            in_proj_qkvz: project(reader, "in_proj_qkvz", channels + values)?,
            in_proj_ba: project(reader, "in_proj_ba", 2 * heads)?,
        },
        false => DeltaProjections::Separate {
            in_proj_qkv: project(reader, "in_proj_qkv", channels)?,
            in_proj_z: project(reader, "in_proj_z", values)?,
            in_proj_b: project(reader, "in_proj_b", heads)?,
            in_proj_a: project(reader, "in_proj_a", heads)?,
        },
    };
    let taps = [channels, linear.conv_kernel_dim];
    Ok(DeltaNet {
        projections,
        conv1d: reader.taps(&format!("{path}.conv1d.weight"), taps)?,
        dt_bias: reader.vector(&at("dt_bias"), heads, 1.0)?,
        a_log: reader.vector(&at("A_log"), heads, 0.0)?,
        norm: Norm {
            kind: NormKind::Rms,
            ..reader.norm(&at("norm"), linear.value_head_dim)?
        },
        out_proj: reader.linear(&at("out_proj"), [hidden, values], false)?,
        heads: DeltaHeads {
            key_heads: linear.num_key_heads,
            value_heads: heads,
            key_dim: linear.key_head_dim,
            value_dim: linear.value_head_dim,
        },
    })
}

/// A dense feed-forward layer of this width.
fn mlp(reader: &mut TensorReader, path: &str, width: usize) -> Read<Mlp> {
    let config = reader.config().clone();
    let (hidden, bias) = (config.hidden_size, config.mlp_bias);
    let linear = |reader: &mut TensorReader, name: &str, shape| -> Read<LoraLinear> {
        reader.linear(&format!("{path}.{name}"), shape, bias)
    };
    let wide = [width, hidden];
    let (input, down_name) = match config.family.mlp {
        MlpNames::Gated => {
            let gate = linear(reader, "gate_proj", wide)?;
            let up = linear(reader, "up_proj", wide)?;
            (MlpInput::Gated(Box::new([gate, up])), "down_proj")
        }
        MlpNames::Fused => {
            let both = linear(reader, "gate_up_proj", [2 * width, hidden])?;
            (MlpInput::Fused(Box::new(both)), "down_proj")
        }
        MlpNames::Plain { up, down } => {
            let wide = linear(reader, up, wide)?;
            (MlpInput::Plain(up, Box::new(wide)), down)
        }
    };
    Ok(Mlp {
        input,
        down: linear(reader, down_name, [hidden, width])?,
        down_name,
        activation: config.hidden_act,
    })
}

fn experts(reader: &mut TensorReader, path: &str, moe: MoeConfig) -> Read<Moe> {
    let config = reader.config().clone();
    let (family, hidden) = (config.family, config.hidden_size);
    let (experts, width) = (moe.num_experts, moe.intermediate_size);
    let biased = matches!(moe.gate, ExpertGate::Clamped(_));
    let path = format!("{path}.mlp");
    let router = format!("{path}.{}", family.router);
    let gate = reader.router(&router, [experts, hidden], biased)?;
    let correction = match moe.rule {
        RouterRule::Sigmoid { .. } => {
            let name = format!("{router}.e_score_correction_bias");
            Some(reader.vector(&name, experts, 0.0)?)
        }
        _ => None,
    };
    let layer = |reader: &mut TensorReader, name: &str, [out, input]: [usize; 2]| {
        let path = format!("{path}.experts.{name}");
        Ok::<_, WeightsError>(ExpertLinear {
            weight: reader.cube(&path, [experts, out, input])?,
            bias: match biased {
                true => Some(reader.bias_matrix(&format!("{path}_bias"), [experts, out])?),
                false => None,
            },
            lora: None,
        })
    };
    let gate_up = layer(reader, "gate_up_proj", [2 * width, hidden])?;
    let down = layer(reader, "down_proj", [hidden, width])?;
    let shared = match moe.shared_intermediate_size {
        0 => None,
        width => Some(SharedExpert {
            name: family.shared_expert,
            mlp: mlp(reader, &format!("{path}.{}", family.shared_expert), width)?,
            gate: match family.shared_gate {
                true => {
                    let path = format!("{path}.shared_expert_gate");
                    Some(reader.linear(&path, [1, hidden], false)?)
                }
                false => None,
            },
        }),
    };
    Ok(Moe {
        router: Router {
            gate,
            name: family.router,
            rule: moe.rule,
            top_k: moe.num_experts_per_tok,
            correction,
        },
        gate_up,
        down,
        gate: moe.gate,
        shared,
    })
}
