//! gpt-oss's gate (`GptOssExperts` in transformers' `modeling_gpt_oss.py`): gate and up take turns in a
//! row, both are limited, and up is shifted by one.
//!
//! The fused kernel keeps that row and computes all of it again in the backward pass.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::{Tensor, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KernelGradients, Kernels, flex, is_fused};

/// The constants of [`clamped_gate`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClampedGate {
    /// α, the steepness of the sigmoid.
    pub alpha: f32,
    /// The gate is at most this, and the magnitude of up.
    pub limit: f32,
}

/// `(up + 1) · gate · sigmoid(α gate)`, gate at most `limit` and up within ± `limit` first.
///
/// # Shapes
/// pairs of a gate and an up `[N, 2F]` → `[N, F]`
pub fn clamped_gate(pairs: Tensor<2>, by: ClampedGate) -> Tensor<2> {
    match is_fused(&pairs.device()) {
        true => Tensor::from_dispatch(Dispatch::fused_clamped_gate(pairs.into_dispatch(), by)),
        false => reference(pairs, by),
    }
}

/// [`clamped_gate`] from plain tensor operations.
pub fn reference(pairs: Tensor<2>, by: ClampedGate) -> Tensor<2> {
    let [n, width] = pairs.dims();
    let pairs = pairs.reshape([n, width / 2, 2]);
    let part = |i| pairs.clone().narrow(2, i, 1).reshape([n, width / 2]);
    let gate = part(0).clamp_max(by.limit);
    let up = part(1).clamp(-by.limit, by.limit);
    (up + 1.0) * gate.clone() * activation::sigmoid(gate * by.alpha)
}

/// Outputs that one task takes.
const TASK: usize = 16 * 1024;

impl ClampedGate {
    /// gate, up + 1 and the sigmoid.
    #[inline(always)]
    fn parts(self, [gate, up]: [f32; 2]) -> [f32; 3] {
        let gate = gate.min(self.limit);
        let up = up.clamp(-self.limit, self.limit) + 1.0;
        [gate, up, 1.0 / (1.0 + flex::exp(-self.alpha * gate))]
    }

    /// Derivatives by gate and up.
    #[inline(always)]
    fn slopes(self, pair: [f32; 2]) -> [f32; 2] {
        let [gate, up, s] = self.parts(pair);
        let by_gate = up * s * (1.0 + self.alpha * gate * (1.0 - s));
        let by_up = gate * s;
        [
            if pair[0] > self.limit { 0.0 } else { by_gate },
            if pair[1].abs() > self.limit {
                0.0
            } else {
                by_up
            },
        ]
    }
}

pub(super) fn forward(pairs: FlexTensor, by: ClampedGate) -> FlexTensor {
    let pairs = flex::contiguous(pairs);
    let [n, width] = pairs.layout().shape().dims();
    let mut out = flex::unset(n * width / 2);
    out.par_chunks_mut(TASK)
        .zip(flex::elements(&pairs).par_chunks(2 * TASK))
        .for_each(|(out, pairs)| {
            flex::vectorised(
                #[inline(always)]
                || {
                    for (y, pair) in out.iter_mut().zip(pairs.as_chunks::<2>().0) {
                        let [gate, up, s] = by.parts(*pair);
                        *y = up * gate * s;
                    }
                },
            )
        });
    flex::tensor(out, [n, width / 2])
}

/// Gradient of the pairs.
pub(super) fn backward(pairs: FlexTensor, grad: FlexTensor, by: ClampedGate) -> FlexTensor {
    let (pairs, grad) = (flex::contiguous(pairs), flex::contiguous(grad));
    let [n, width] = pairs.layout().shape().dims();
    let mut out = flex::unset(n * width);
    out.par_chunks_mut(2 * TASK)
        .zip(flex::elements(&pairs).par_chunks(2 * TASK))
        .zip(flex::elements(&grad).par_chunks(TASK))
        .for_each(|((out, pairs), grad)| {
            flex::vectorised(
                #[inline(always)]
                || {
                    let pairs = pairs.as_chunks::<2>().0.iter();
                    let out = out.as_chunks_mut::<2>().0.iter_mut();
                    for ((d, pair), dy) in out.zip(pairs).zip(grad) {
                        *d = by.slopes(*pair).map(|slope| slope * dy);
                    }
                },
            )
        });
    flex::tensor(out, [n, width])
}

#[derive(Debug)]
struct ClampedGateBackward;

impl<B: KernelGradients> Backward<B, 1> for ClampedGateBackward {
    type State = (FloatTensor<B>, ClampedGate);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (pairs, by) = ops.state;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::clamped_gate_backward(pairs, grad, by));
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    pairs: FloatTensor<Autodiff<B, C>>,
    by: ClampedGate,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [pairs.node()];
    let pairs = pairs.into_primitive();
    match ClampedGateBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let y = B::fused_clamped_gate(pairs.clone(), by);
            prep.finish((pairs, by), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::fused_clamped_gate(pairs, by)),
    }
}
