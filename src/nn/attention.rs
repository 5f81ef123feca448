//! The self-attention layer.

use burn::tensor::Tensor;

use super::{Dropout, LoraLinear, Visitor};
use crate::kernels::{self, Segments, attention::Heads};

/// Causal self-attention with rotary positions and grouped key heads.
#[derive(Debug, Clone)]
pub struct Attention {
    /// `[H · Dh, D]`
    pub q_proj: LoraLinear,
    /// `[K · Dh, D]`
    pub k_proj: LoraLinear,
    /// `[K · Dh, D]`
    pub v_proj: LoraLinear,
    /// `[D, H · Dh]`
    pub o_proj: LoraLinear,
    /// H
    pub heads: usize,
    /// K
    pub kv_heads: usize,
    /// Dh
    pub head_dim: usize,
}

/// Where the rows stand: what attention needs beside the activations, the same in all layers.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Of each row's position, `[N, Dh / 2]`.
    pub cos: Tensor<2>,
    /// Of each row's position, `[N, Dh / 2]`.
    pub sin: Tensor<2>,
    /// Which rows see each other.
    pub segments: Segments,
}

/// Keys and values of the tokens so far, of one sample: `[S, K · Dh]` each.
#[derive(Debug, Clone, Default)]
pub struct LayerCache(Option<(Tensor<2>, Tensor<2>)>);

impl LayerCache {
    /// Appends keys and values of new tokens and returns all of them.
    fn extend(&mut self, k: Tensor<2>, v: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let all = match self.0.take() {
            Some((old_k, old_v)) => (
                Tensor::cat(vec![old_k, k], 0),
                Tensor::cat(vec![old_v, v], 0),
            ),
            None => (k, v),
        };
        self.0 = Some(all.clone());
        all
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
        let q = self.q_proj.forward(x.clone(), dropout); // [N, H·Dh]
        let k = self.k_proj.forward(x.clone(), dropout); // [N, K·Dh]
        let v = self.v_proj.forward(x, dropout); // [N, K·Dh]
        let q = kernels::rope(q, rows.cos.clone(), rows.sin.clone());
        let k = kernels::rope(k, rows.cos.clone(), rows.sin.clone());
        let (k, v) = match cache {
            Some(cache) => cache.extend(k, v), // [S, K·Dh]
            None => (k, v),
        };
        let heads = Heads {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f64).powf(-0.5) as f32,
        };
        let mixed = kernels::attention(q, k, v, heads, &rows.segments); // [N, H·Dh]
        self.o_proj.forward(mixed, dropout)
    }

    /// The linear layers with their names.
    pub fn linears(&mut self) -> [(&'static str, &mut LoraLinear); 4] {
        [
            ("q_proj", &mut self.q_proj),
            ("k_proj", &mut self.k_proj),
            ("v_proj", &mut self.v_proj),
            ("o_proj", &mut self.o_proj),
        ]
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        for (name, linear) in self.linears() {
            linear.visit(&format!("{path}.{name}"), visitor);
        }
    }
}
