//! The self-attention layer.

use burn::tensor::{Tensor, activation};

use super::delta_net::DeltaCache;
use super::{Dropout, HeadNorm, LoraLinear, Parameter, Visitor};
use crate::kernels::attention::Heads;
use crate::kernels::rope::RopeLayout;
use crate::kernels::{self, Segments};

/// Causal self-attention with grouped key heads.
#[derive(Debug, Clone)]
pub struct Attention {
    /// What makes queries, keys and values.
    pub input: Projections,
    /// `[D, H · Dh]`
    pub o_proj: LoraLinear,
    /// Its name: `o_proj`, or `dense`.
    pub o_name: &'static str,
    /// Norms of queries and keys before they are rotated, with their names.
    pub norms: Option<[(&'static str, HeadNorm); 2]>,
    /// A logit for each head that takes probability and gives nothing, `[H]` (gpt-oss).
    pub sinks: Option<Tensor<1>>,
    /// How the columns divide, and what a query sees.
    pub heads: Heads,
    /// Which tables of [`Rows`] rotate queries and keys; none in layers without positions.
    pub rope: Option<usize>,
    /// How a head rotates.
    pub layout: RopeLayout,
    /// Whether `q_proj` makes, beside each head's query, a gate for its output (Qwen3-Next).
    pub gated: bool,
}

/// The layers that make queries, keys and values.
#[derive(Debug, Clone)]
pub enum Projections {
    /// `q_proj` `[H · Dh, D]`, `k_proj` and `v_proj` `[K · Dh, D]`.
    Split(Box<[LoraLinear; 3]>),
    /// `qkv_proj`: their rows one after the other.
    Fused(Box<LoraLinear>),
}

/// Where the rows stand: what attention needs beside the activations.
#[derive(Debug, Clone)]
pub struct Rows {
    /// For each rotary embedding of the model: cos and sin of each row's position, `[N, half]`.
    pub ropes: Vec<(Tensor<2>, Tensor<2>)>,
    /// Which rows see each other.
    pub segments: Segments,
}

/// What a layer keeps of the tokens so far, of one sample.
#[derive(Debug, Clone, Default)]
pub enum LayerCache {
    /// Nothing yet.
    #[default]
    Empty,
    /// Keys and values, `[S, K · Dh]` each.
    Keys(Tensor<2>, Tensor<2>),
    /// The state of linear attention.
    Delta(DeltaCache),
}

impl LayerCache {
    /// Appends keys and values of new tokens and returns all of them.
    pub(super) fn extend(&mut self, k: Tensor<2>, v: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let all = match std::mem::take(self) {
            Self::Keys(old_k, old_v) => (
                Tensor::cat(vec![old_k, k], 0),
                Tensor::cat(vec![old_v, v], 0),
            ),
            Self::Empty | Self::Delta(_) => (k, v),
        };
        *self = Self::Keys(all.0.clone(), all.1.clone());
        all
    }

    /// The state of linear attention, empty at first.
    pub(crate) fn delta(&mut self) -> &mut DeltaCache {
        if !matches!(self, Self::Delta(_)) {
            *self = Self::Delta(DeltaCache::default());
        }
        match self {
            Self::Delta(cache) => cache,
            Self::Empty | Self::Keys(..) => unreachable!("it was just made one"),
        }
    }
}

impl Projections {
    /// Queries (with their gates, where the layer has them), keys and values.
    fn forward(
        &self,
        x: Tensor<2>,
        heads: Heads,
        dropout: Option<Dropout>,
    ) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        match self {
            Self::Split(split) => {
                let [q, k, v] = &**split;
                (
                    q.forward(x.clone(), dropout),
                    k.forward(x.clone(), dropout),
                    v.forward(x, dropout),
                )
            }
            Self::Fused(qkv) => {
                let y = qkv.forward(x, dropout); // [N, (H + 2K)·Dh]
                let (queries, keys) = (
                    heads.heads * heads.head_dim,
                    heads.kv_heads * heads.head_dim,
                );
                let part = |start, width| y.clone().narrow(1, start, width);
                (
                    part(0, queries),
                    part(queries, keys),
                    part(queries + keys, keys),
                )
            }
        }
    }

    fn linears(&mut self) -> Vec<(&'static str, &mut LoraLinear)> {
        match self {
            Self::Split(split) => ["q_proj", "k_proj", "v_proj"]
                .into_iter()
                .zip(split.iter_mut())
                .collect(),
            Self::Fused(qkv) => vec![("qkv_proj", qkv)],
        }
    }
}

impl Attention {
    /// With a `cache`, `rows` must be one segment and follow the cached ones.
    ///
    /// # Shapes
    /// x `[N, D]` → `[N, D]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        rows: &Rows,
        cache: Option<&mut LayerCache>,
        dropout: Option<Dropout>,
    ) -> Tensor<2> {
        let heads = self.heads;
        let (q, k, v) = self.input.forward(x, heads, dropout);
        let (q, gate) = match self.gated {
            true => split_gates(q, heads),
            false => (q, None),
        };
        let (q, k) = match &self.norms {
            Some([(_, q_norm), (_, k_norm)]) => (
                q_norm.forward(q, heads.head_dim),
                k_norm.forward(k, heads.head_dim),
            ),
            None => (q, k),
        };
        let (q, k) = match self.rope.and_then(|rope| rows.ropes.get(rope)) {
            Some((cos, sin)) => (
                kernels::rope(q, cos.clone(), sin.clone(), self.layout), // [N, H·Dh]
                kernels::rope(k, cos.clone(), sin.clone(), self.layout), // [N, K·Dh]
            ),
            None => (q, k),
        };
        let (k, v) = match cache {
            Some(cache) => cache.extend(k, v), // [S, K·Dh]
            None => (k, v),
        };
        let mixed = kernels::attention(q, k, v, self.sinks.clone(), heads, &rows.segments);
        let mixed = match gate {
            Some(gate) => mixed * activation::sigmoid(gate), // [N, H·Dh]
            None => mixed,
        };
        self.o_proj.forward(mixed, dropout)
    }

    /// The linear layers with their names.
    pub fn linears(&mut self) -> Vec<(&'static str, &mut LoraLinear)> {
        let mut linears = self.input.linears();
        linears.push((self.o_name, &mut self.o_proj));
        linears
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        for (name, linear) in self.linears() {
            linear.visit(&format!("{path}.{name}"), visitor);
        }
        for (name, norm) in self.norms.iter_mut().flatten() {
            norm.visit(&format!("{path}.{name}"), visitor);
        }
        if let Some(sinks) = &mut self.sinks {
            visitor(&format!("{path}.sinks"), Parameter::Vector(sinks));
        }
    }
}

/// Takes apart a projection that holds for each head its query and then its gate.
///
/// # Shapes
/// `[N, H · 2Dh]` → `[N, H · Dh]` twice
fn split_gates(q: Tensor<2>, heads: Heads) -> (Tensor<2>, Option<Tensor<2>>) {
    let (n, h, d) = (q.dims()[0], heads.heads, heads.head_dim);
    let q = q.reshape([n, h, 2 * d]); // [N, H, 2Dh]
    let part = |start| q.clone().narrow(2, start, d).reshape([n, h * d]);
    (part(0), Some(part(d)))
}
