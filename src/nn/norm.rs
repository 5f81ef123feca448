//! Normalisation layers: root mean square, the same with weights around zero, and layer norm.

use burn::tensor::Tensor;

use super::{Parameter, Visitor};
use crate::kernels;

/// How a norm computes. All of them work in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + ε) · w` (arXiv 1910.07467).
    Rms,
    /// The same with `1 + w`: weights are stored around zero (Gemma, Qwen3-Next).
    RmsPlusOne,
    /// `(x - mean(x)) / sqrt(var(x) + ε) · w`, without a bias (Cohere).
    Layer,
    /// The same with `+ b` (Phi, StarCoder2; arXiv 1607.06450).
    LayerBias,
}

/// A norm over the last dimension.
#[derive(Debug, Clone)]
pub struct Norm {
    /// w, `[D]`
    pub weight: Tensor<1>,
    /// b, `[D]`, of [`NormKind::LayerBias`] alone.
    pub bias: Option<Tensor<1>>,
    /// ε
    pub eps: f64,
    /// The arithmetic.
    pub kind: NormKind,
}

impl Norm {
    /// # Shapes
    /// `[N, D]` → `[N, D]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let weight = self.weight.clone();
        let y = match self.kind {
            NormKind::Rms => kernels::rms_norm(x, weight, self.eps),
            NormKind::RmsPlusOne => kernels::rms_norm(x, weight + 1.0, self.eps),
            // The variance is the mean square of what is left without the mean.
            NormKind::Layer | NormKind::LayerBias => {
                let mean = x.clone().mean_dim(1); // [N, 1]
                kernels::rms_norm(x - mean, weight, self.eps)
            }
        };
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// Visits weight and bias under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        let weight = Parameter::Vector(&mut self.weight);
        visitor(&format!("{path}.weight"), weight);
        if let Some(bias) = &mut self.bias {
            visitor(&format!("{path}.bias"), Parameter::Vector(bias));
        }
    }
}

/// A norm of queries or keys.
#[derive(Debug, Clone)]
pub enum HeadNorm {
    /// Over each head, with one weight for all heads (Qwen3, Gemma 3).
    Each(Norm),
    /// Over all heads of a row at once (OLMo 2).
    Whole(Norm),
    /// A layer norm over each head, with weights of its own, `[heads, Dh]` (Cohere).
    Own {
        /// w, `[heads, Dh]`
        weight: Tensor<2>,
        /// ε
        eps: f64,
    },
}

impl HeadNorm {
    /// # Shapes
    /// `[N, heads · Dh]` → `[N, heads · Dh]`
    pub fn forward(&self, x: Tensor<2>, head_dim: usize) -> Tensor<2> {
        let [n, width] = x.dims();
        let heads = width / head_dim;
        match self {
            Self::Whole(norm) => norm.forward(x),
            Self::Each(norm) => norm
                .forward(x.reshape([n * heads, head_dim]))
                .reshape([n, width]),
            Self::Own { weight, eps } => {
                let norm = Norm {
                    weight: Tensor::ones([head_dim], &x.device().inner()),
                    bias: None,
                    eps: *eps,
                    kind: NormKind::Layer,
                };
                let y = norm.forward(x.reshape([n * heads, head_dim]));
                y.reshape([n, width]) * weight.clone().reshape([1, width])
            }
        }
    }

    /// Visits the weights under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        match self {
            Self::Each(norm) | Self::Whole(norm) => norm.visit(path, visitor),
            Self::Own { weight, .. } => {
                visitor(&format!("{path}.weight"), Parameter::Matrix(weight));
            }
        }
    }
}
