//! The linear layers of all experts of a mixture, which may carry low-rank deltas.

use std::sync::Arc;

use burn::tensor::{Int, Tensor};

use super::{Dropout, Parameter, Visitor};
use crate::kernels;

/// One linear layer for each expert.
#[derive(Debug, Clone)]
pub struct ExpertLinear {
    /// W, `[E, out, in]`; 16 bits wide where the base is kept so.
    pub weight: Tensor<3>,
    /// b, `[E, out]`
    pub bias: Option<Tensor<2>>,
    /// The deltas, if this layer carries them.
    pub lora: Option<ExpertDelta>,
}

/// Low-rank deltas of all experts, `s B_e A_e`, in the layout of PEFT's `target_parameters`.
#[derive(Debug, Clone)]
pub struct ExpertDelta {
    /// A, `[E · R, in]`: expert by expert.
    pub lora_a: Tensor<2>,
    /// B, `[out, R · E]`: the experts take turns.
    pub lora_b: Tensor<2>,
    /// s
    pub scaling: f64,
    /// Probability of dropping an element of the deltas' input in training.
    pub dropout: f64,
    /// Tells this layer's dropout masks from those of other layers.
    pub module: u64,
}

impl ExpertLinear {
    /// E
    pub fn experts(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Rows sorted by expert; those of expert e are `offsets[e] .. offsets[e + 1]`, and `experts`
    /// `[N]` says the same row by row.
    ///
    /// # Shapes
    /// x `[N, in]` → `[N, out]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        offsets: &Arc<[usize]>,
        experts: &Tensor<1, Int>,
        dropout: Option<Dropout>,
    ) -> Tensor<2> {
        let (weight, offsets) = (self.weight.clone(), Arc::clone(offsets));
        let y = match (&self.lora, dropout) {
            (None, _) => kernels::expert_linear(x, weight, offsets),
            (Some(lora), Some(dropout)) if lora.dropout > 0.0 => {
                let dropped = dropout.apply(x.clone(), lora.dropout, lora.module);
                let factors = lora.factors(self.experts());
                let scaling = lora.scaling;
                kernels::expert_linear::lora_reference(
                    x, dropped, weight, factors, scaling, offsets,
                )
            }
            (Some(lora), _) => {
                let factors = lora.factors(self.experts());
                kernels::expert_lora_linear(x, weight, factors, lora.scaling, offsets)
            }
        };
        match &self.bias {
            Some(bias) => y + bias.clone().select(0, experts.clone()),
            None => y,
        }
    }

    /// Visits weight, bias and deltas; a parameter of a module in transformers, it has no `.weight`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        visitor(path, Parameter::Cube(&mut self.weight));
        if let Some(bias) = &mut self.bias {
            visitor(&format!("{path}_bias"), Parameter::Matrix(bias));
        }
        if let Some(lora) = &mut self.lora {
            let (a, b) = (&mut lora.lora_a, &mut lora.lora_b);
            visitor(&format!("{path}.lora_a"), Parameter::Matrix(a));
            visitor(&format!("{path}.lora_b"), Parameter::Matrix(b));
        }
    }
}

impl ExpertDelta {
    /// A `[E, R, in]` and B `[E, out, R]`.
    fn factors(&self, experts: usize) -> (Tensor<3>, Tensor<3>) {
        let ([rows, input], [out, _]) = (self.lora_a.dims(), self.lora_b.dims());
        let rank = rows / experts;
        let a = self.lora_a.clone().reshape([experts, rank, input]);
        let b = self.lora_b.clone().reshape([out, rank, experts]);
        (a, b.permute([2, 0, 1]))
    }
}
