//! A block of any family on a [`Tape`](super::tape::Tape), as `model/block.rs` and `nn/` perform it.

use super::kernels::{self as footprint, AttentionBytes, F32};
use super::layers::{Facts, Tracer};
use super::tape::{Back, Op, Value};
use crate::model::config::{LatentConfig, LayerConfig, LinearConfig, Mixer, MoeConfig, QkNorm};
use crate::model::families::MlpNames;
use crate::model::names;
use crate::nn::{ExpertGate, NormKind};

/// The rows that pass through a model at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// N, tokens with padding.
    pub tokens: usize,
    /// Tokens of the longest sample.
    pub longest: usize,
}

/// Tokens of a chunk of linear attention (`kernels/delta_rule.rs`).
const CHUNK: usize = 64;

/// Records block `layer`; its input is counted outside and has a gradient if `reaches` says that there
/// is something to train below.
pub(super) fn block<'a>(
    facts: &'a Facts<'a>,
    rows: Rows,
    layer: usize,
    (trains, reaches): (bool, bool),
) -> (Tracer<'a>, Value) {
    let mut tracer = Tracer::new(facts, rows.tokens, trains);
    let (config, path) = (facts.config, names::block(layer));
    let (family, parts, d) = (config.family, config.layers[layer], config.hidden_size);
    let bytes = tracer.floats(d);
    let x = tracer.tape.outside(bytes, trains && reaches);
    let n = family.norms;
    let norm = |tracer: &mut Tracer<'a>, name: Option<&str>, x| match name {
        Some(name) => tracer.norm(&format!("{path}.{name}"), family.norm, x, d),
        None => x,
    };
    let normed = norm(&mut tracer, n.before_mixer, x);
    let mixed = tracer.mixer(&path, parts, normed, rows);
    let mixed = norm(&mut tracer, n.after_mixer, mixed);
    let x = tracer.residual(x, mixed);
    let input = match family.parallel {
        true => normed,
        false => norm(&mut tracer, n.before_mlp, x),
    };
    // The block holds it until here.
    tracer.tape.hold(normed);
    let y = match (parts.sparse, config.moe) {
        (true, Some(moe)) => tracer.experts(&format!("{path}.mlp"), input, moe),
        _ => tracer.mlp(&format!("{path}.mlp"), input, config.intermediate_size),
    };
    let y = norm(&mut tracer, n.after_mlp, y);
    let y = tracer.residual(x, y);
    (tracer, y)
}

impl Tracer<'_> {
    fn residual(&mut self, x: Value, y: Value) -> Value {
        let (config, d) = (self.facts.config, self.facts.config.hidden_size);
        let y = match config.residual_multiplier == 1.0 {
            true => y,
            false => self.unary(y, d, [false; 2]),
        };
        self.add(x, y, d)
    }

    fn mixer(&mut self, path: &str, parts: LayerConfig, x: Value, rows: Rows) -> Value {
        let config = self.facts.config;
        match (parts.mixer, config.linear, config.latent) {
            (Mixer::Linear, Some(linear), _) => {
                self.delta_net(&format!("{path}.linear_attn"), linear, x)
            }
            (_, _, Some(latent)) => {
                self.latent(&format!("{path}.self_attn"), (parts, latent), x, rows)
            }
            _ => self.attention(&format!("{path}.self_attn"), parts, x, rows),
        }
    }

    /// The kernel itself, over heads of these widths.
    fn attend(
        &mut self,
        qkv: [Value; 3],
        parts: LayerConfig,
        value_dim: usize,
        rows: Rows,
    ) -> Value {
        let heads = self.facts.config.num_attention_heads;
        let platform = self.facts.platform;
        let bytes = AttentionBytes {
            out: self.floats(heads * value_dim),
            lse: self.floats(heads),
            // Plain operations hold those of whole rows of the batch.
            scores: self.floats(heads) * rows.longest as u64,
            workspace: platform.scores(rows.longest, parts.window),
        };
        footprint::attention(&mut self.tape, platform, qkv, &bytes)
    }

    fn attention(&mut self, path: &str, parts: LayerConfig, x: Value, rows: Rows) -> Value {
        let config = self.facts.config;
        let (family, d) = (config.family, config.hidden_size);
        let width = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let queries = width * if family.gated_attention { 2 } else { 1 };
        let at = |name: &str| format!("{path}.{name}");
        let [q, k, v] = match family.fused_qkv {
            true => {
                let qkv = self.linear(&at("qkv_proj"), x, [queries + 2 * keys, d]);
                [queries, keys, keys].map(|width| self.columns(qkv, width))
            }
            false => [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
                .map(|(name, out)| self.linear(&at(name), x, [out, d])),
        };
        let (q, gate) = match family.gated_attention {
            true => (self.copy(&[q], width), Some(self.copy(&[q], width))),
            false => (q, None),
        };
        let [q_name, k_name] = family.qk_norms;
        let [q, k] = [(q, q_name, width), (k, k_name, keys)].map(|(x, name, width)| {
            let kind = match config.qk_norm {
                QkNorm::None => return x,
                QkNorm::Each | QkNorm::Whole => family.norm,
                QkNorm::Own => NormKind::Layer,
            };
            let y = self.norm(&at(name), kind, x, width);
            match config.qk_norm {
                QkNorm::Own => self.unary(y, width, [false; 2]),
                _ => y,
            }
        });
        let [q, k] = match parts.rope {
            Some(_) => [(q, width), (k, keys)].map(|(x, width)| {
                let bytes = self.floats(width);
                footprint::rope(&mut self.tape, x, bytes)
            }),
            None => [q, k],
        };
        let mixed = self.attend([q, k, v], parts, config.head_dim, rows);
        let mixed = match gate {
            Some(gate) => {
                let gate = self.unary(gate, width, [false, true]);
                self.mul(mixed, gate, width)
            }
            None => mixed,
        };
        self.linear(&at(family.o_proj), mixed, [d, width])
    }

    fn latent(
        &mut self,
        path: &str,
        (parts, latent): (LayerConfig, LatentConfig),
        x: Value,
        rows: Rows,
    ) -> Value {
        let config = self.facts.config;
        let (d, h) = (config.hidden_size, config.num_attention_heads);
        let (width, value) = (h * config.head_dim, latent.v_head_dim);
        let (rank, rope) = (latent.kv_lora_rank, latent.qk_rope_head_dim);
        let at = |name: &str| format!("{path}.{name}");
        let q = match latent.q_lora_rank {
            None => self.linear(&at("q_proj"), x, [width, d]),
            Some(rank) => {
                let q = self.linear(&at("q_a_proj"), x, [rank, d]);
                let q = self.norm(&at("q_a_layernorm"), NormKind::Rms, q, rank);
                self.linear(&at("q_b_proj"), q, [width, rank])
            }
        };
        let both = self.linear(&at("kv_a_proj_with_mqa"), x, [rank + rope, d]);
        let shared = self.columns(both, rope);
        let bytes = self.floats(rope);
        let shared = footprint::rope(&mut self.tape, shared, bytes);
        let low = self.columns(both, rank);
        let low = self.norm(&at("kv_a_layernorm"), NormKind::Rms, low, rank);
        let plain = latent.qk_nope_head_dim;
        let kv = self.linear(&at("kv_b_proj"), low, [h * (plain + value), rank]);
        let turned = self.copy(&[q], h * rope);
        let bytes = self.floats(h * rope);
        let turned = footprint::rope(&mut self.tape, turned, bytes);
        let q = self.copy(&[q, turned], width);
        let k = self.copy(&[kv, shared], width);
        let v = self.copy(&[kv], h * value);
        let mixed = self.attend([q, k, v], parts, value, rows);
        self.linear(&at("o_proj"), mixed, [d, h * value])
    }

    /// Linear attention: plain operations, of which the large tensors are counted.
    fn delta_net(&mut self, path: &str, linear: LinearConfig, x: Value) -> Value {
        let d = self.facts.config.hidden_size;
        let (hv, dk, dv) = (
            linear.num_value_heads,
            linear.key_head_dim,
            linear.value_head_dim,
        );
        let keys = linear.num_key_heads * dk;
        let values = hv * dv;
        let channels = 2 * keys + values;
        let at = |name: &str| format!("{path}.{name}");
        let (qkv, z) = match self.facts.config.family.fused_linear {
            true => {
                let both = self.linear(&at("in_proj_qkvz"), x, [channels + values, d]);
                self.linear(&at("in_proj_ba"), x, [2 * hv, d]);
                (self.copy(&[both], channels), self.copy(&[both], values))
            }
            false => {
                let qkv = self.linear(&at("in_proj_qkv"), x, [channels, d]);
                let z = self.linear(&at("in_proj_z"), x, [values, d]);
                (qkv, z)
            }
        };
        let moved = self.copy(&[qkv], channels);
        let mixed = self.unary(moved, channels, [true, false]);
        // q and k before and after they are scaled, k times what it is weighted by, values times β, what
        // is written and read, and tables of a chunk's tokens against each other.
        let tables = hv * (6 * CHUNK + 5 * dk + 6 * dv) + 4 * keys;
        let op = Op {
            saved: vec![mixed],
            kept: self.floats(tables),
            workspace: [
                self.floats(hv * CHUNK * 2),
                self.floats(hv * (2 * CHUNK + dk + dv)),
            ],
            ..Op::new()
        };
        let bytes = self.floats(values);
        let out = self.tape.push(op, &[mixed], bytes);
        let normed = self.norm(&at("norm"), NormKind::Rms, out, values);
        let gated = footprint::gated(&mut self.tape, [z, normed], bytes);
        self.linear(&at("out_proj"), gated, [d, values])
    }

    fn mlp(&mut self, path: &str, x: Value, width: usize) -> Value {
        let config = self.facts.config;
        let d = config.hidden_size;
        let at = |name: &str| format!("{path}.{name}");
        let (wide, down) = match config.family.mlp {
            MlpNames::Gated => {
                let gate = self.linear(&at("gate_proj"), x, [width, d]);
                let up = self.linear(&at("up_proj"), x, [width, d]);
                (self.gated(gate, up, width), "down_proj")
            }
            MlpNames::Fused => {
                let both = self.linear(&at("gate_up_proj"), x, [2 * width, d]);
                let [gate, up] = [width; 2].map(|width| self.columns(both, width));
                (self.gated(gate, up, width), "down_proj")
            }
            MlpNames::Plain { up, down } => {
                let up = self.linear(&at(up), x, [width, d]);
                (self.activate(up, width), down)
            }
        };
        self.linear(&at(down), wide, [d, width])
    }

    fn experts(&mut self, path: &str, x: Value, moe: MoeConfig) -> Value {
        let (config, k, width) = (
            self.facts.config,
            moe.num_experts_per_tok,
            moe.intermediate_size,
        );
        let (family, d, tokens) = (config.family, config.hidden_size, self.rows);
        let logits = self.linear(
            &format!("{path}.{}", family.router),
            x,
            [moe.num_experts, d],
        );
        let scores = self.unary(logits, moe.num_experts, [false, true]);
        let weights = self.copy(&[scores], k);
        // Rows sorted by expert: each token as often as it has experts.
        let bytes = self.floats(d) * k as u64;
        let rows = self.tape.push(Op::new(), &[x], bytes);
        self.rows = tokens * k;
        let wide = self.expert_linear(&format!("{path}.experts.gate_up_proj"), rows, 2 * width, d);
        let hidden = match moe.gate {
            ExpertGate::Halves(_) => {
                let [gate, up] = [width; 2].map(|width| self.columns(wide, width));
                self.gated(gate, up, width)
            }
            ExpertGate::Clamped(_) => self.activate(wide, width),
        };
        let y = self.expert_linear(&format!("{path}.experts.down_proj"), hidden, d, width);
        let y = self.copy(&[y], d);
        self.rows = tokens;
        let weighted = footprint::mul(&mut self.tape, [y, weights], bytes);
        let one = self.floats(d);
        let sum = Op {
            workspace: [0, bytes],
            ..Op::new()
        };
        let y = self.tape.push(sum, &[weighted], one);
        if moe.shared_intermediate_size == 0 {
            return y;
        }
        let shared = format!("{path}.{}", family.shared_expert);
        let other = self.mlp(&shared, x, moe.shared_intermediate_size);
        let other = match family.shared_gate {
            true => {
                let gate = self.linear(&format!("{path}.shared_expert_gate"), x, [1, d]);
                self.mul(other, gate, d)
            }
            false => other,
        };
        self.add(y, other, d)
    }

    /// The layers of all experts, whose rows lie together.
    fn expert_linear(&mut self, path: &str, x: Value, out: usize, input: usize) -> Value {
        let form = self.facts.form(path);
        let converted = self.facts.platform.converted([out, input], form);
        let experts = self.facts.config.moe.map_or(1, |moe| moe.num_experts);
        let rank = self.facts.outline.trained.get(&format!("{path}.lora_a"));
        let bytes = self.floats(out);
        match rank.map(|shape| shape[0] / experts) {
            Some(rank) => {
                let a = self.parameter(&format!("{path}.lora_a"));
                let b = self.parameter(&format!("{path}.lora_b"));
                // B's experts take turns in its columns, and are put one after the other.
                let turned = (out * rank * experts) as u64 * F32;
                let b = self.tape.push(Op::elementwise(Back::Fresh), &[b], turned);
                let low = self.floats(rank);
                footprint::lora_linear(&mut self.tape, [x, a, b], [bytes, low], converted)
            }
            None if self.trains && self.facts.gradient(path).is_some() => {
                let weight = self.parameter(path);
                footprint::matmul(&mut self.tape, [x, weight], bytes)
            }
            None => footprint::linear(&mut self.tape, x, bytes, converted),
        }
    }
}
