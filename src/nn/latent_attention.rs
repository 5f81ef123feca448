//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values come out of one
//! narrow projection, and one rotated key is shared by all heads.

use burn::tensor::Tensor;

use super::{Dropout, LayerCache, LoraLinear, Norm, Rows, Visitor};
use crate::kernels;
use crate::kernels::attention::Heads;
use crate::kernels::rope::RopeLayout;

/// Latent attention as in `DeepseekV3Attention`.
#[derive(Debug, Clone)]
pub struct LatentAttention {
    /// What makes queries.
    pub query: LatentQuery,
    /// `kv_a_proj_with_mqa` `[C + Dr, D]`: the latent and the shared rotated key.
    pub kv_a_proj: LoraLinear,
    /// `kv_a_layernorm` over the latent, `[C]`.
    pub kv_a_norm: Norm,
    /// `kv_b_proj` `[H · (Dn + Dv), C]`: for each head the plain part of its key, and its value.
    pub kv_b_proj: LoraLinear,
    /// `[D, H · Dv]`
    pub o_proj: LoraLinear,
    /// How the columns divide; every head has its own key.
    pub heads: Heads,
    /// Dr, the part of a head that rotates.
    pub rope_dim: usize,
    /// Which tables of [`Rows`] rotate.
    pub rope: usize,
    /// Whether pairs of neighbours rotate, not halves.
    pub interleaved: bool,
}

/// The layers that make queries.
#[derive(Debug, Clone)]
pub enum LatentQuery {
    /// `q_proj` `[H · Dh, D]`.
    Full(Box<LoraLinear>),
    /// `q_a_proj` `[Q, D]`, `q_a_layernorm`, `q_b_proj` `[H · Dh, Q]`.
    Narrow(Box<(LoraLinear, Norm, LoraLinear)>),
}

impl LatentAttention {
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
        let (h, rope) = (self.heads.heads, self.rope_dim);
        let (n, plain) = (x.dims()[0], self.heads.head_dim - rope);
        let q = match &self.query {
            LatentQuery::Full(q_proj) => q_proj.forward(x.clone(), dropout),
            LatentQuery::Narrow(narrow) => {
                let (q_a, norm, q_b) = &**narrow;
                q_b.forward(norm.forward(q_a.forward(x.clone(), dropout)), dropout)
            }
        }; // [N, H·Dh]
        let latent = self.kv_a_proj.forward(x, dropout); // [N, C + Dr]
        let width = latent.dims()[1] - rope;
        let shared = self.rotate(latent.clone().narrow(1, width, rope), rows); // [N, Dr]
        let latent = self.kv_a_norm.forward(latent.narrow(1, 0, width));
        let kv = self.kv_b_proj.forward(latent, dropout); // [N, H·(Dn + Dv)]
        let value = self.heads.value_dim;
        let kv = kv.reshape([n, h, plain + value]);
        let q = q.reshape([n, h, plain + rope]);
        let turned = q.clone().narrow(2, plain, rope).reshape([n, h * rope]);
        let turned = self.rotate(turned, rows).reshape([n, h, rope]);
        let q = Tensor::cat(vec![q.narrow(2, 0, plain), turned], 2); // [N, H, Dh]
        let shared = shared.reshape([n, 1, rope]).expand([n, h, rope]);
        let k = Tensor::cat(vec![kv.clone().narrow(2, 0, plain), shared], 2); // [N, H, Dh]
        let (q, k) = (
            q.reshape([n, h * (plain + rope)]),
            k.reshape([n, h * (plain + rope)]),
        );
        let v = kv.narrow(2, plain, value).reshape([n, h * value]);
        let (k, v) = match cache {
            Some(cache) => cache.extend(k, v),
            None => (k, v),
        };
        let mixed = kernels::attention(q, k, v, None, self.heads, &rows.segments); // [N, H·Dv]
        self.o_proj.forward(mixed, dropout)
    }

    fn rotate(&self, x: Tensor<2>, rows: &Rows) -> Tensor<2> {
        let layout = RopeLayout {
            head_dim: self.rope_dim,
            interleaved: self.interleaved,
        };
        let (cos, sin) = rows.ropes[self.rope].clone();
        kernels::rope(x, cos, sin, layout)
    }

    /// The linear layers with their names.
    pub fn linears(&mut self) -> Vec<(&'static str, &mut LoraLinear)> {
        let mut linears: Vec<(&'static str, &mut LoraLinear)> = match &mut self.query {
            LatentQuery::Full(q_proj) => vec![("q_proj", q_proj)],
            LatentQuery::Narrow(narrow) => {
                let (q_a, _, q_b) = &mut **narrow;
                vec![("q_a_proj", q_a), ("q_b_proj", q_b)]
            }
        };
        linears.push(("kv_a_proj_with_mqa", &mut self.kv_a_proj));
        linears.push(("kv_b_proj", &mut self.kv_b_proj));
        linears.push(("o_proj", &mut self.o_proj));
        linears
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        for (name, linear) in self.linears() {
            linear.visit(&format!("{path}.{name}"), visitor);
        }
        if let LatentQuery::Narrow(narrow) = &mut self.query {
            narrow.1.visit(&format!("{path}.q_a_layernorm"), visitor);
        }
        let norm = &mut self.kv_a_norm;
        norm.visit(&format!("{path}.kv_a_layernorm"), visitor);
    }
}
