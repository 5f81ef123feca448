//! One step of AdamW over one tensor (arXiv 1711.05101): the weight and both moments move in one pass.
//!
//! The fused kernels write the moments where they stand, unless someone else holds them. Which step a
//! tensor takes is the optimizer's business, not decided here.

use burn::backend::Dispatch;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Kernels, flex, is_fused};

/// The constants of a step, `m` and `v` the moments, `g` the gradient, `w` the weight:
///
/// - `m ← keep₁ m + share₁ g`
/// - `v ← keep₂ v + share₂ g²`
/// - `w ← (before w - rate m / (√v / divisor + ε)) after`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    /// β₁ and β₂: what stays of each moment.
    pub keep: [f32; 2],
    /// 1 - β₁ and 1 - β₂: what each moment takes of the gradient and of its square.
    pub share: [f32; 2],
    /// Weight decay ahead of the step: 1 for none.
    pub before: f32,
    /// Of the second moment's root: `√(1 - β₂ᵗ)`, or 1 where ε is added before the bias is corrected.
    pub divisor: f32,
    /// ε
    pub eps: f32,
    /// Learning rate over the first moment's bias.
    pub rate: f32,
    /// Weight decay after the step: 1 for none.
    pub after: f32,
}

impl AdamwStep {
    /// One number with its moments, in the reference's operations one by one, so that both agree bit for
    /// bit.
    #[inline(always)]
    pub(crate) fn apply(&self, weight: &mut f32, gradient: f32, first: &mut f32, second: &mut f32) {
        *first = *first * self.keep[0] + gradient * self.share[0];
        *second = *second * self.keep[1] + gradient * gradient * self.share[1];
        let scale = second.sqrt() / self.divisor + self.eps;
        *weight = (*weight * self.before - *first / scale * self.rate) * self.after;
    }
}

/// The weight and both moments after a step. Does not track gradients.
///
/// # Shapes
/// weight, grad and both moments `[N]`
pub fn adamw(
    weight: Tensor<1>,
    grad: Tensor<1>,
    moments: [Tensor<1>; 2],
    step: AdamwStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    if !is_fused(&weight.device()) {
        return reference(weight, grad, moments, step);
    }
    let [first, second] = moments;
    let (weight, first, second) = Dispatch::fused_adamw(
        weight.into_dispatch(),
        grad.into_dispatch(),
        first.into_dispatch(),
        second.into_dispatch(),
        step,
    );
    let moments = [first, second].map(Tensor::from_dispatch);
    (Tensor::from_dispatch(weight), moments)
}

/// [`adamw`] from plain tensor operations.
pub fn reference(
    weight: Tensor<1>,
    grad: Tensor<1>,
    moments: [Tensor<1>; 2],
    step: AdamwStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    let [first, second] = moments;
    let first = first * step.keep[0] + grad.clone() * step.share[0];
    let second = second * step.keep[1] + grad.square() * step.share[1];
    let scale = second.clone().sqrt() / step.divisor + step.eps;
    let weight = (weight * step.before - first.clone() / scale * step.rate) * step.after;
    (weight, [first, second])
}

/// Elements that one task takes.
const TASK: usize = 16 * 1024;

pub(super) fn forward(
    inputs: [FlexTensor; 4],
    step: AdamwStep,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let [mut weight, grad, mut first, mut second] = inputs.map(flex::contiguous);
    flex::elements_mut(&mut weight)
        .par_chunks_mut(TASK)
        .zip(flex::elements_mut(&mut first).par_chunks_mut(TASK))
        .zip(flex::elements_mut(&mut second).par_chunks_mut(TASK))
        .zip(flex::elements(&grad).par_chunks(TASK))
        .for_each(|(((weight, first), second), grad)| {
            flex::vectorised(
                #[inline(always)]
                || {
                    let moments = first.iter_mut().zip(&mut *second);
                    for ((w, g), (m, v)) in weight.iter_mut().zip(grad).zip(moments) {
                        step.apply(w, *g, m, v);
                    }
                },
            )
        });
    (weight, first, second)
}
