//! Activations of feed-forward layers, as transformers names them (`activations.py`).
//!
//! [`activate`] is fused with nothing; where a gate follows, [`gated`](fn@super::gated) computes both at
//! once. Its kernel keeps its input alone for the backward pass.

use std::f32::consts::FRAC_1_SQRT_2;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::{Tensor, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KernelGradients, Kernels, flex, is_fused};

/// An activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    match is_fused(&x.device()) {
        true => Tensor::from_dispatch(Dispatch::fused_activate(x.into_dispatch(), by)),
        false => reference(x, by),
    }
}

/// [`activate`] from plain tensor operations.
pub fn reference(x: Tensor<2>, by: Activation) -> Tensor<2> {
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

/// `√(2 / π)`
pub(super) const ROOT: f32 = 0.797_884_6;

/// Weight of the cube in gelu's approximation.
pub(super) const CUBE: f32 = 0.044_715;

/// Value and slope of [`Activation::Silu`].
#[inline(always)]
pub(super) fn silu(x: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + flex::exp(-x));
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// Value and slope of [`Activation::Gelu`]: `x Φ(x)` and `Φ(x) + x φ(x)`.
#[inline(always)]
pub(super) fn gelu(x: f32) -> (f32, f32) {
    let below = 0.5 + 0.5 * flex::erf(x * FRAC_1_SQRT_2);
    // φ(x) = exp(-x² / 2) / √(2 π)
    let density = flex::exp(-0.5 * x * x) * (0.5 * ROOT);
    (x * below, below + x * density)
}

/// Value and slope of [`Activation::GeluTanh`].
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> (f32, f32) {
    let t = flex::tanh(ROOT * (x + CUBE * x * x * x));
    let below = 0.5 + 0.5 * t;
    let slope = 0.5 * (1.0 - t * t) * ROOT * (1.0 + 3.0 * CUBE * x * x);
    (x * below, below + x * slope)
}

/// Value and slope of [`Activation::Relu`].
#[inline(always)]
pub(super) fn relu(x: f32) -> (f32, f32) {
    // Not `max`, which takes not-a-number for 0.
    if x <= 0.0 { (0.0, 0.0) } else { (x, 1.0) }
}

/// Value and slope of [`Activation::Relu2`].
#[inline(always)]
pub(super) fn relu2(x: f32) -> (f32, f32) {
    let (x, _) = relu(x);
    (x * x, 2.0 * x)
}

/// An expression for each activation, in which a name stands for the function of its values and slopes: the
/// choice is made once and not for each element.
macro_rules! with_curve {
    ($by:expr, $curve:ident => $body:expr) => {
        match $by {
            $crate::kernels::Activation::Silu => {
                let $curve = $crate::kernels::activation::silu;
                $body
            }
            $crate::kernels::Activation::Gelu => {
                let $curve = $crate::kernels::activation::gelu;
                $body
            }
            $crate::kernels::Activation::GeluTanh => {
                let $curve = $crate::kernels::activation::gelu_tanh;
                $body
            }
            $crate::kernels::Activation::Relu => {
                let $curve = $crate::kernels::activation::relu;
                $body
            }
            $crate::kernels::Activation::Relu2 => {
                let $curve = $crate::kernels::activation::relu2;
                $body
            }
        }
    };
}

pub(super) use with_curve;

/// Elements that one task takes.
const TASK: usize = 16 * 1024;

pub(super) fn forward(x: FlexTensor, by: Activation) -> FlexTensor {
    let x = flex::contiguous(x);
    let [n, f] = x.layout().shape().dims();
    let mut out = flex::unset(n * f);
    let tasks = out
        .par_chunks_mut(TASK)
        .zip(flex::elements(&x).par_chunks(TASK));
    with_curve!(by, curve => tasks.for_each(|(out, x)| {
        flex::vectorised(
            #[inline(always)]
            || {
                for (y, x) in out.iter_mut().zip(x) {
                    *y = curve(*x).0;
                }
            },
        )
    }));
    flex::tensor(out, [n, f])
}

/// Gradient of x.
pub(super) fn backward(x: FlexTensor, grad: FlexTensor, by: Activation) -> FlexTensor {
    let (x, grad) = (flex::contiguous(x), flex::contiguous(grad));
    let [n, f] = x.layout().shape().dims();
    let mut dx = flex::unset(n * f);
    let tasks = dx
        .par_chunks_mut(TASK)
        .zip(flex::elements(&x).par_chunks(TASK))
        .zip(flex::elements(&grad).par_chunks(TASK));
    with_curve!(by, curve => tasks.for_each(|((dx, x), grad)| {
        flex::vectorised(
            #[inline(always)]
            || {
                for ((dx, x), dy) in dx.iter_mut().zip(x).zip(grad) {
                    *dx = dy * curve(*x).1;
                }
            },
        )
    }));
    flex::tensor(dx, [n, f])
}

#[derive(Debug)]
struct ActivateBackward;

impl<B: KernelGradients> Backward<B, 1> for ActivateBackward {
    type State = (FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (x, by) = ops.state;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::activate_backward(x, grad, by));
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    by: Activation,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [x.node()];
    let x = x.into_primitive();
    match ActivateBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let y = B::fused_activate(x.clone(), by);
            prep.finish((x, by), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::fused_activate(x, by)),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::device::to_vec;
    use crate::kernels::gated;

    /// Values of torch 2.15 at -2, -0.5, 0, 0.5 and 2, in every way that there is.
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
            let x = Tensor::<2>::from_data(data, &Device::flex());
            let ways = [
                activate(x.clone(), by),
                reference(x.clone(), by),
                gated(x.clone(), x.ones_like(), by),
            ];
            for got in ways {
                for (got, want) in to_vec(got.reshape([5])).iter().zip(want) {
                    assert!((got - want).abs() < 1e-5, "{by:?}: {got} {want}");
                }
            }
        }
    }
}
