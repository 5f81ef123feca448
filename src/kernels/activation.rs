//! Activations of feed-forward layers, as transformers names them (`activations.py`).
//!
//! The gate of most models, silu, has a fused kernel ([`swiglu()`]); the others are plain operations.

use burn::tensor::{Tensor, activation};

use super::swiglu;

/// An activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// `x · Φ(x)`, Φ the distribution function of the normal distribution.
    Gelu,
    /// The same, approximated with a hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// `max(x, 0)²`
    Relu2,
}

impl Activation {
    /// The activation that a `config.json` names.
    pub fn from_hf(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" | "gelu_python" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast"
            | "gelu_accurate" => Self::GeluTanh,
            "relu" => Self::Relu,
            "relu2" => Self::Relu2,
            _ => return None,
        })
    }
}

/// The activation of each element.
///
/// # Shapes
/// `[N, F]` → `[N, F]`
pub fn activate(x: Tensor<2>, by: Activation) -> Tensor<2> {
    match by {
        Activation::Silu => activation::silu(x),
        Activation::Gelu => activation::gelu(x),
        Activation::GeluTanh => {
            // √(2/π) (x + 0.044715 x³)
            let root = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
            let cube = x.clone() * x.clone() * x.clone();
            let inner = (x.clone() + cube * 0.044_715) * root;
            x * (inner.tanh() + 1.0) * 0.5
        }
        Activation::Relu => activation::relu(x),
        Activation::Relu2 => activation::relu(x).square(),
    }
}

/// `act(gate) · up`, element by element.
///
/// # Shapes
/// gate, up `[N, F]` → `[N, F]`
pub fn gated(gate: Tensor<2>, up: Tensor<2>, by: Activation) -> Tensor<2> {
    match by {
        Activation::Silu => swiglu(gate, up),
        _ => activate(gate, by) * up,
    }
}

/// gpt-oss's gate: `(up + 1) · gate · sigmoid(α gate)`, the gate at most `limit`, up within ± `limit`.
///
/// # Shapes
/// gate, up `[N, F]` → `[N, F]`
pub fn clamped_swiglu(gate: Tensor<2>, up: Tensor<2>, alpha: f32, limit: f32) -> Tensor<2> {
    let gate = gate.clamp_max(limit);
    let up = up.clamp(-limit, limit);
    (up + 1.0) * gate.clone() * activation::sigmoid(gate * alpha)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::device::to_vec;

    /// Values of torch 2.15 at -2, -0.5, 0, 0.5 and 2.
    #[test]
    fn activations_equal_torchs() {
        let x = [-2.0f32, -0.5, 0.0, 0.5, 2.0];
        let cases = [
            (
                Activation::Silu,
                [-0.238_406, -0.188_770, 0.0, 0.311_230, 1.761_594],
            ),
            (
                Activation::Gelu,
                [-0.045_500, -0.154_269, 0.0, 0.345_731, 1.9545],
            ),
            (
                Activation::GeluTanh,
                [-0.045_402, -0.154_286, 0.0, 0.345_714, 1.954_598],
            ),
            (Activation::Relu, [0.0, 0.0, 0.0, 0.5, 2.0]),
            (Activation::Relu2, [0.0, 0.0, 0.0, 0.25, 4.0]),
        ];
        for (by, want) in cases {
            let data = TensorData::new(x.to_vec(), [1, 5]);
            let got = activate(Tensor::from_data(data, &Device::flex()), by);
            for (got, want) in to_vec(got.reshape([5])).iter().zip(want) {
                assert!((got - want).abs() < 1e-5, "{by:?}: {got} {want}");
            }
        }
    }
}
