//! A linear layer that may carry a low-rank delta.

use burn::tensor::Tensor;

use super::parameter::untracked;
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
    /// What makes it a weight-decomposed delta (DoRA).
    pub magnitude: Option<Magnitude>,
    /// Probability of dropping an element of the delta's input in training.
    pub dropout: f64,
    /// Tells this layer's dropout masks from those of other layers.
    pub module: u64,
}

/// The length that DoRA gives each row of the weight (arXiv 2402.09353).
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// m, `[out]`
    pub vector: Tensor<1>,
    /// Squared length of each row of W, `[out]`.
    pub squares: Tensor<1>,
}

impl LoraDelta {
    /// Length of each row of `W + s B A`, a constant of the backward pass; `B A` is not formed.
    ///
    /// # Shapes
    /// W `[out, in]`, squares `[out]` → `[out]`
    pub fn row_norms(&self, weight: &Tensor<2>, squares: &Tensor<1>) -> Tensor<1> {
        let [weight, a, b] = [weight, &self.lora_a, &self.lora_b].map(|x| untracked(x.clone()));
        let out = b.dims()[0];
        let cross = weight.matmul(a.clone().transpose()) * b.clone(); // [out, R]
        let gram = a.clone().matmul(a.transpose()); // [R, R]
        let own = b.clone().matmul(gram) * b; // [out, R]
        let added = cross * (2.0 * self.scaling) + own * self.scaling.powi(2);
        let squares = untracked(squares.clone()) + added.sum_dim(1).reshape([out]);
        // Rounding may leave a length of 0 just below it.
        squares.clamp_min(0.0).sqrt()
    }
}

/// Squared length of each row.
///
/// # Shapes
/// `[out, in]` → `[out]`
pub fn row_squares(weight: &Tensor<2>) -> Tensor<1> {
    let weight = untracked(weight.clone());
    let out = weight.dims()[0];
    weight.square().sum_dim(1).reshape([out])
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
        let y = match &self.lora {
            None => x.matmul(self.weight.clone().transpose()),
            Some(lora) => {
                let dropped = dropout
                    .filter(|_| lora.dropout > 0.0)
                    .map(|dropout| dropout.apply(x.clone(), lora.dropout, lora.module));
                match &lora.magnitude {
                    None => self.lora(x, dropped, lora),
                    Some(magnitude) => self.dora(x, dropped, lora, magnitude),
                }
            }
        };
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    fn lora(&self, x: Tensor<2>, dropped: Option<Tensor<2>>, lora: &LoraDelta) -> Tensor<2> {
        let weight = self.weight.clone();
        let (a, b) = (lora.lora_a.clone(), lora.lora_b.clone());
        match dropped {
            Some(dropped) => {
                kernels::lora_linear::reference(x, dropped, weight, (a, b), lora.scaling)
            }
            None => kernels::lora_linear(x, weight, a, b, lora.scaling),
        }
    }

    /// `g (x Wᵀ + s (x Aᵀ) Bᵀ)` with `g = m / ‖W + s B A‖` row by row; under dropout, as PEFT has it,
    /// `x Wᵀ + (g - 1) x' Wᵀ + g s (x' Aᵀ) Bᵀ`.
    fn dora(
        &self,
        x: Tensor<2>,
        dropped: Option<Tensor<2>>,
        lora: &LoraDelta,
        magnitude: &Magnitude,
    ) -> Tensor<2> {
        let norms = lora.row_norms(&self.weight, &magnitude.squares);
        let gain: Tensor<2> = (magnitude.vector.clone() / norms).unsqueeze(); // [1, out]
        match dropped {
            None => self.lora(x, None, lora) * gain,
            Some(dropped) => {
                let weight = self.weight.clone().transpose();
                let plain = (x - dropped.clone()).matmul(weight);
                plain + self.lora(dropped, None, lora) * gain
            }
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
            if let Some(magnitude) = &mut lora.magnitude {
                let vector = Parameter::Vector(&mut magnitude.vector);
                visitor(&format!("{path}.magnitude"), vector);
            }
        }
    }
}
