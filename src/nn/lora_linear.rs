//! A linear layer that may carry a low-rank delta.

use burn::tensor::Tensor;

use super::{Dropout, Parameter, Visitor};
use crate::kernels;

/// `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`
#[derive(Debug, Clone)]
pub struct LoraLinear {
    /// W, `[out, in]`
    pub weight: Tensor<2>,
    /// b, `[out]`
    pub bias: Option<Tensor<1>>,
    /// The delta, if this layer carries one.
    pub lora: Option<LoraDelta>,
}

/// The low-rank delta `s B A` of a linear layer.
#[derive(Debug, Clone)]
pub struct LoraDelta {
    /// A, `[R, in]`
    pub lora_a: Tensor<2>,
    /// B, `[out, R]`
    pub lora_b: Tensor<2>,
    /// s
    pub scaling: f64,
    /// Probability of dropping an element of the delta's input in training.
    pub dropout: f64,
    /// Tells this layer's dropout masks from those of other layers.
    pub module: u64,
}

impl LoraLinear {
    /// Without a delta.
    pub fn new(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight,
            bias,
            lora: None,
        }
    }

    /// `dropout` is `None` outside training.
    ///
    /// # Shapes
    /// `[N, in]` → `[N, out]`
    pub fn forward(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let y = match (&self.lora, dropout) {
            (None, _) => x.matmul(self.weight.clone().transpose()),
            (Some(lora), Some(dropout)) if lora.dropout > 0.0 => {
                let dropped = dropout.apply(x.clone(), lora.dropout, lora.module);
                kernels::lora_linear::reference(
                    x,
                    dropped,
                    self.weight.clone(),
                    (lora.lora_a.clone(), lora.lora_b.clone()),
                    lora.scaling,
                )
            }
            (Some(lora), _) => kernels::lora_linear(
                x,
                self.weight.clone(),
                lora.lora_a.clone(),
                lora.lora_b.clone(),
                lora.scaling,
            ),
        };
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// Visits weight, bias and delta under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        visitor(
            &format!("{path}.weight"),
            Parameter::Matrix(&mut self.weight),
        );
        if let Some(bias) = &mut self.bias {
            visitor(&format!("{path}.bias"), Parameter::Vector(bias));
        }
        if let Some(lora) = &mut self.lora {
            visitor(
                &format!("{path}.lora_a"),
                Parameter::Matrix(&mut lora.lora_a),
            );
            visitor(
                &format!("{path}.lora_b"),
                Parameter::Matrix(&mut lora.lora_b),
            );
        }
    }
}
