//! The gated feed-forward layer.

use burn::tensor::Tensor;

use super::{Dropout, LoraLinear, Visitor};
use crate::kernels;

/// `down(silu(gate(x)) · up(x))`
#[derive(Debug, Clone)]
pub struct Mlp {
    /// `[F, D]`
    pub gate_proj: LoraLinear,
    /// `[F, D]`
    pub up_proj: LoraLinear,
    /// `[D, F]`
    pub down_proj: LoraLinear,
}

impl Mlp {
    /// # Shapes
    /// `[N, D]` → `[N, D]`
    pub fn forward(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let gate = self.gate_proj.forward(x.clone(), dropout); // [N, F]
        let up = self.up_proj.forward(x, dropout); // [N, F]
        self.down_proj.forward(kernels::swiglu(gate, up), dropout)
    }

    /// The linear layers with their names.
    pub fn linears(&mut self) -> [(&'static str, &mut LoraLinear); 3] {
        [
            ("gate_proj", &mut self.gate_proj),
            ("up_proj", &mut self.up_proj),
            ("down_proj", &mut self.down_proj),
        ]
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        for (name, linear) in self.linears() {
            linear.visit(&format!("{path}.{name}"), visitor);
        }
    }
}
