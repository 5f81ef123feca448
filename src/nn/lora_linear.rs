//! A linear layer that may carry a low-rank delta.

use burn::tensor::{Device, Tensor};

use super::parameter::untracked;
use super::{Dropout, Parameter, Visitor};
use crate::kernels::{self, Weight};

/// `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`
#[derive(Debug, Clone)]
pub struct LoraLinear {
    /// W, `[out, in]`; 16 bits wide or quantised where the base is kept so.
    pub weight: Weight,
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
    /// What trains in VeRA, where A and B are frozen, shared, and wider than this layer.
    pub lambdas: Option<Lambdas>,
    /// The first A and B where the base lost `s B A` at first (PiSSA, OLoRA); they do not train.
    pub start: Option<(Tensor<2>, Tensor<2>)>,
    /// Probability of dropping an element of the delta's input in training.
    pub dropout: f64,
    /// Tells this layer's dropout masks from those of other layers.
    pub module: u64,
}

/// VeRA's vectors (arXiv 2310.11454).
#[derive(Debug, Clone)]
pub struct Lambdas {
    /// λ_d, which scales the rows of A. `[R]`
    pub d: Tensor<1>,
    /// λ_b, which scales the rows of B. `[out]`
    pub b: Tensor<1>,
    /// The layer's width.
    pub in_features: usize,
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
    /// What B is multiplied with: `s x Aᵀ`, some elements of x dropped in training.
    ///
    /// # Shapes
    /// x `[N, in]` → `[N, R]`
    pub fn low(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let x = self.dropped(&x, dropout).unwrap_or(x);
        x.matmul(self.factors().0.transpose()) * self.scaling
    }

    /// A `[R, in]` and B `[out, R]`.
    pub fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (self.lora_a.clone(), self.lora_b.clone());
        let Some(lambdas) = &self.lambdas else {
            return (a, b);
        };
        let (d, o) = (lambdas.d.clone(), lambdas.b.clone());
        let a = a.narrow(1, 0, lambdas.in_features) * d.unsqueeze_dim(1);
        let b = b.narrow(0, 0, o.dims()[0]) * o.unsqueeze_dim(1);
        (a, b)
    }

    /// The input of the delta where training drops elements of it.
    fn dropped(&self, x: &Tensor<2>, dropout: Option<Dropout>) -> Option<Tensor<2>> {
        dropout
            .filter(|_| self.dropout > 0.0)
            .map(|dropout| dropout.apply(x.clone(), self.dropout, self.module))
    }

    /// The delta of the transposed weight.
    pub fn transposed(&self) -> Self {
        Self {
            lora_a: self.lora_b.clone().transpose(),
            lora_b: self.lora_a.clone().transpose(),
            ..self.clone()
        }
    }

    /// Visits the tensors of the delta of the module at `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        if let Some(lambdas) = &mut self.lambdas {
            let (d, b) = (&mut lambdas.d, &mut lambdas.b);
            visitor(&format!("{path}.lambda_d"), Parameter::Vector(d));
            visitor(&format!("{path}.lambda_b"), Parameter::Vector(b));
            return;
        }
        let (a, b) = (&mut self.lora_a, &mut self.lora_b);
        visitor(&format!("{path}.lora_a"), Parameter::Matrix(a));
        visitor(&format!("{path}.lora_b"), Parameter::Matrix(b));
        if let Some(magnitude) = &mut self.magnitude {
            let vector = Parameter::Vector(&mut magnitude.vector);
            visitor(&format!("{path}.magnitude"), vector);
        }
    }

    /// Length of each row of `W + s B A`, a constant of the backward pass; `B A` is not formed.
    ///
    /// # Shapes
    /// W `[out, in]`, squares `[out]` → `[out]`
    pub fn row_norms(&self, weight: &Weight, squares: &Tensor<1>) -> Tensor<1> {
        let [a, b] = [&self.lora_a, &self.lora_b].map(|x| untracked(x.clone()));
        let weight = match weight.clone() {
            Weight::Dense(weight) => untracked(weight).into(),
            quantised => quantised,
        };
        let out = b.dims()[0];
        let cross = kernels::linear(a.clone(), weight).transpose() * b.clone(); // [out, R]
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
pub fn row_squares(weight: &Weight, device: &Device) -> Tensor<1> {
    let weight = untracked(weight.in_f32(device));
    let out = weight.dims()[0];
    weight.square().sum_dim(1).reshape([out])
}

impl LoraLinear {
    /// Without a delta.
    pub fn new(weight: impl Into<Weight>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: weight.into(),
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
            None => kernels::linear(x, self.weight.clone()),
            Some(lora) => {
                let dropped = lora.dropped(&x, dropout);
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
        let (a, b) = lora.factors();
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
                let plain = kernels::linear(x - dropped.clone(), self.weight.clone());
                plain + self.lora(dropped, None, lora) * gain
            }
        }
    }

    /// Visits weight, bias and delta under `path`; a quantised weight is no tensor and passed over.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        if let Weight::Dense(weight) = &mut self.weight {
            visitor(&format!("{path}.weight"), Parameter::Matrix(weight));
        }
        if let Some(bias) = &mut self.bias {
            visitor(&format!("{path}.bias"), Parameter::Vector(bias));
        }
        if let Some(lora) = &mut self.lora {
            lora.visit(path, visitor);
        }
    }
}
