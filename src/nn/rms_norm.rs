//! Root-mean-square norm layer.

use burn::tensor::Tensor;

use super::{Parameter, Visitor};
use crate::kernels;

/// `x / sqrt(mean(x²) + ε) · w`
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// w, `[D]`
    pub weight: Tensor<1>,
    /// ε
    pub eps: f64,
}

impl RmsNorm {
    /// # Shapes
    /// `[N, D]` → `[N, D]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        kernels::rms_norm(x, self.weight.clone(), self.eps)
    }

    /// Visits the weight under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        visitor(
            &format!("{path}.weight"),
            Parameter::Vector(&mut self.weight),
        );
    }
}
