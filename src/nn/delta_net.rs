//! Gated DeltaNet, the linear attention layer of Qwen3-Next and Qwen3.5 (arXiv 2412.06464).

use burn::tensor::{Int, Tensor, activation};

use super::{Dropout, LoraLinear, Norm, Parameter, Visitor};
use crate::kernels::delta_rule::delta_rule_from;
use crate::kernels::{
    Activation, DeltaHeads, DeltaInputs, Segments, causal_conv, delta_rule, gated,
};

/// Linear attention: a short convolution, the gated delta rule, and a gated norm. No positions.
///
/// The activation after the convolution and of the gate is SiLU.
#[derive(Debug, Clone)]
pub struct DeltaNet {
    /// What q, k, v, the gate z, b (of β) and a (of the decay) come from.
    pub projections: DeltaProjections,
    /// Taps of each of the W = 2 · Hk · Dk + Hv · Dv channels of q, k and v, the last one for the
    /// token itself. `[W, K]`; Hugging Face's files have `[W, 1, K]`.
    pub conv1d: Tensor<2>,
    /// Added to a. `[Hv]`
    pub dt_bias: Tensor<1>,
    /// Logarithm of each head's speed of decay. `[Hv]`
    pub a_log: Tensor<1>,
    /// Over each head's output, before the gate. `[Dv]`
    pub norm: Norm,
    /// `[D, Hv · Dv]`
    pub out_proj: LoraLinear,
    /// Numbers and widths of the heads.
    pub heads: DeltaHeads,
}

/// The input projections, which families lay out differently.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "one a layer, and a tensor's handle is what is large"
)]
pub enum DeltaProjections {
    /// Qwen3-Next: rows ordered by key head. A key head works with G = Hv / Hk value heads.
    Interleaved {
        /// Of each key head q `[Dk]`, k `[Dk]`, v `[G · Dv]`, z `[G · Dv]`;
        /// `[2 · Hk · Dk + 2 · Hv · Dv, D]`
        in_proj_qkvz: LoraLinear,
        /// Of each key head b `[G]`, a `[G]`; `[2 · Hv, D]`
        in_proj_ba: LoraLinear,
    },
    /// Qwen3.5.
    Separate {
        /// q, then k, then v of all heads, `[2 · Hk · Dk + Hv · Dv, D]`
        in_proj_qkv: LoraLinear,
        /// `[Hv · Dv, D]`
        in_proj_z: LoraLinear,
        /// `[Hv, D]`
        in_proj_b: LoraLinear,
        /// `[Hv, D]`
        in_proj_a: LoraLinear,
    },
}

/// What a layer remembers of the tokens so far, of one sample.
#[derive(Debug, Clone, Default)]
pub struct DeltaCache {
    /// What the last K - 1 tokens put into the convolution, `[K - 1, W]`.
    conv: Option<Tensor<2>>,
    /// `[1, Hv, Dk, Dv]`
    state: Option<Tensor<4>>,
}

/// The projected rows.
struct Projected {
    /// `[N, W]`
    qkv: Tensor<2>,
    /// `[N, Hv · Dv]`
    z: Tensor<2>,
    /// `[N, Hv]`
    b: Tensor<2>,
    /// `[N, Hv]`
    a: Tensor<2>,
}

impl DeltaProjections {
    fn forward(&self, x: Tensor<2>, heads: DeltaHeads, dropout: Option<Dropout>) -> Projected {
        match self {
            Self::Interleaved {
                in_proj_qkvz,
                in_proj_ba,
            } => {
                let qkvz = in_proj_qkvz.forward(x.clone(), dropout);
                by_key_head(qkvz, in_proj_ba.forward(x, dropout), heads)
            }
            Self::Separate {
                in_proj_qkv,
                in_proj_z,
                in_proj_b,
                in_proj_a,
            } => Projected {
                qkv: in_proj_qkv.forward(x.clone(), dropout),
                z: in_proj_z.forward(x.clone(), dropout),
                b: in_proj_b.forward(x.clone(), dropout),
                a: in_proj_a.forward(x, dropout),
            },
        }
    }
}

/// Takes apart what is interleaved by key head, as transformers' `fix_query_key_value_ordering`.
///
/// # Shapes
/// qkvz `[N, Hk · (2 · Dk + 2 · G · Dv)]`, ba `[N, Hk · 2 · G]`
fn by_key_head(qkvz: Tensor<2>, ba: Tensor<2>, heads: DeltaHeads) -> Projected {
    let (n, key_heads, dk) = (qkvz.dims()[0], heads.key_heads, heads.key_dim);
    let group = heads.value_heads / key_heads;
    let values = group * heads.value_dim;
    let qkvz: Tensor<3> = qkvz.reshape([n, key_heads, 2 * dk + 2 * values]);
    let ba: Tensor<3> = ba.reshape([n, key_heads, 2 * group]);
    let part = |x: &Tensor<3>, start, width| -> Tensor<2> {
        let x = x.clone().narrow(2, start, width);
        x.reshape([n, key_heads * width])
    };
    let q = part(&qkvz, 0, dk);
    let k = part(&qkvz, dk, dk);
    let v = part(&qkvz, 2 * dk, values);
    Projected {
        qkv: Tensor::cat(vec![q, k, v], 1),
        z: part(&qkvz, 2 * dk + values, values),
        b: part(&ba, 0, group),
        a: part(&ba, group, group),
    }
}

impl DeltaNet {
    /// With a `cache`, the rows must be one segment and follow the cached ones.
    ///
    /// # Shapes
    /// x `[N, D]` → `[N, D]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        segments: &Segments,
        mut cache: Option<&mut DeltaCache>,
        dropout: Option<Dropout>,
    ) -> Tensor<2> {
        let heads = self.heads;
        let Projected { qkv, z, b, a } = self.projections.forward(x, heads, dropout);
        let mixed = self.convolve(qkv, segments, cache.as_deref_mut()); // [N, W]
        let (key_width, value_width) = (heads.key_width(), heads.value_width());
        let inputs = DeltaInputs {
            q: mixed.clone().narrow(1, 0, key_width),
            k: mixed.clone().narrow(1, key_width, key_width),
            v: mixed.narrow(1, 2 * key_width, value_width),
            log_decay: self.log_decay(a),
            beta: activation::sigmoid(b),
        };
        let out = match cache {
            Some(cache) => {
                let (out, state) = delta_rule_from(cache.state.take(), inputs, heads, segments);
                cache.state = Some(state);
                out
            }
            None => delta_rule(inputs, heads, segments),
        }; // [N, Hv·Dv]
        let [n, width] = out.dims();
        let each_head = out.reshape([n * heads.value_heads, heads.value_dim]);
        let normed = self.norm.forward(each_head).reshape([n, width]);
        let gated = gated(z, normed, Activation::Silu);
        self.out_proj.forward(gated, dropout)
    }

    /// `[N, W]` → `[N, W]`
    fn convolve(
        &self,
        qkv: Tensor<2>,
        segments: &Segments,
        cache: Option<&mut DeltaCache>,
    ) -> Tensor<2> {
        let ([n, width], [_, taps]) = (qkv.dims(), self.conv1d.dims());
        let weight = self.conv1d.clone();
        let mixed = match cache {
            Some(cache) if taps > 1 => {
                assert_eq!(segments.count(), 1, "a cache for several segments");
                let past = taps - 1;
                let device = qkv.device();
                let conv =
                    (cache.conv.take()).unwrap_or_else(|| Tensor::zeros([past, width], &device));
                let rows = Tensor::cat(vec![conv, qkv], 0); // [K - 1 + N, W]
                // A copy: a view would keep all rows of a prompt in memory.
                let last = Tensor::<1, Int>::arange(n as i64..(n + past) as i64, &device);
                cache.conv = Some(rows.clone().select(0, last));
                causal_conv(rows, weight, &Segments::uniform(1, past + n)).narrow(0, past, n)
            }
            _ => causal_conv(qkv, weight, segments),
        };
        activation::silu(mixed)
    }

    /// `g = -exp(A_log) softplus(a + dt_bias)`
    ///
    /// # Shapes
    /// `[N, Hv]` → `[N, Hv]`
    fn log_decay(&self, a: Tensor<2>) -> Tensor<2> {
        let speed = self.a_log.clone().exp().unsqueeze::<2>();
        let step = activation::softplus(a + self.dt_bias.clone().unsqueeze(), 1.0);
        -(step * speed)
    }

    /// The linear layers with their names, in Hugging Face's order.
    pub fn linears(&mut self) -> Vec<(&'static str, &mut LoraLinear)> {
        let out_proj = ("out_proj", &mut self.out_proj);
        match &mut self.projections {
            DeltaProjections::Interleaved {
                in_proj_qkvz,
                in_proj_ba,
            } => vec![
                ("in_proj_qkvz", in_proj_qkvz),
                ("in_proj_ba", in_proj_ba),
                out_proj,
            ],
            DeltaProjections::Separate {
                in_proj_qkv,
                in_proj_z,
                in_proj_b,
                in_proj_a,
            } => vec![
                out_proj,
                ("in_proj_qkv", in_proj_qkv),
                ("in_proj_z", in_proj_z),
                ("in_proj_b", in_proj_b),
                ("in_proj_a", in_proj_a),
            ],
        }
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        visitor(
            &format!("{path}.dt_bias"),
            Parameter::Vector(&mut self.dt_bias),
        );
        visitor(&format!("{path}.A_log"), Parameter::Vector(&mut self.a_log));
        visitor(
            &format!("{path}.conv1d.weight"),
            Parameter::Matrix(&mut self.conv1d),
        );
        self.norm.visit(&format!("{path}.norm"), visitor);
        for (name, linear) in self.linears() {
            linear.visit(&format!("{path}.{name}"), visitor);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::nn::NormKind;
    use burn::tensor::{Device, Distribution};

    use super::*;

    const HIDDEN: usize = 10;
    const HEADS: DeltaHeads = DeltaHeads {
        key_heads: 2,
        value_heads: 6,
        key_dim: 4,
        value_dim: 5,
    };

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 0.5), &Device::flex())
    }

    fn linear(out: usize, input: usize) -> LoraLinear {
        LoraLinear::new(random([out, input]), None)
    }

    fn layer() -> DeltaNet {
        Device::flex().seed(3);
        let (keys, values) = (HEADS.key_width(), HEADS.value_width());
        DeltaNet {
            projections: DeltaProjections::Interleaved {
                in_proj_qkvz: linear(2 * keys + 2 * values, HIDDEN),
                in_proj_ba: linear(2 * HEADS.value_heads, HIDDEN),
            },
            conv1d: random([2 * keys + values, 4]),
            dt_bias: random([HEADS.value_heads]),
            a_log: random([HEADS.value_heads]),
            norm: Norm {
                bias: None,
                kind: NormKind::Rms,
                weight: random([HEADS.value_dim]),
                eps: 1e-6,
            },
            out_proj: linear(HIDDEN, values),
            heads: HEADS,
        }
    }

    /// Sums of a few dozen f32 terms in another order.
    fn assert_close(got: Tensor<2>, want: Tensor<2>) {
        let worst = (got - want).abs().max().into_scalar::<f32>();
        assert!(worst < 1e-5, "off by {worst}");
    }

    #[test]
    fn packed_segments_give_what_each_gives_alone() {
        let layer = layer();
        let segments = Segments::packed(2, [0, 3, 40, 41, 82].into());
        let x = random([82, HIDDEN]);
        let alone = segments.ranges().map(|rows| {
            let one = Segments::uniform(1, rows.len());
            layer.forward(
                x.clone().narrow(0, rows.start, rows.len()),
                &one,
                None,
                None,
            )
        });
        let alone = Tensor::cat(alone.collect(), 0);
        assert_close(layer.forward(x, &segments, None, None), alone);
    }

    #[test]
    fn a_cache_gives_what_the_full_pass_gives() {
        let mut layer = layer();
        for taps in [4, 1] {
            layer.conv1d = layer.conv1d.narrow(1, 0, taps);
            let x = random([80, HIDDEN]);
            let full = layer.forward(x.clone(), &Segments::uniform(1, 80), None, None);
            let (mut cache, mut past, mut outs) = (DeltaCache::default(), 0, Vec::new());
            for n in [1, 70, 1, 1, 5, 2] {
                let (new, segment) = (x.clone().narrow(0, past, n), Segments::uniform(1, n));
                outs.push(layer.forward(new, &segment, Some(&mut cache), None));
                past += n;
            }
            assert_close(Tensor::cat(outs, 0), full);
        }
    }

    #[test]
    fn tensors_have_the_names_of_hugging_face() {
        let mut names = Vec::new();
        layer().visit("linear_attn", &mut |name, parameter| {
            names.push(format!("{name} {:?}", parameter.shape()));
        });
        assert_eq!(
            names,
            [
                "linear_attn.dt_bias [6]",
                "linear_attn.A_log [6]",
                "linear_attn.conv1d.weight [46, 4]",
                "linear_attn.norm.weight [5]",
                "linear_attn.in_proj_qkvz.weight [76, 10]",
                "linear_attn.in_proj_ba.weight [12, 10]",
                "linear_attn.out_proj.weight [10, 30]",
            ]
        );
    }
}
