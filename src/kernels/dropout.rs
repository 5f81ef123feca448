//! Dropout from counter-based random numbers.
//!
//! The fused kernels draw each element's number where they need it, and again in the backward pass, so
//! that no mask is stored. All of them drop the same elements.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::{Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KernelGradients, Kernels, flex, is_fused};
use crate::random::Stream;

/// Which elements are dropped: the i-th in row-major order where [`Stream::uniform`] of i is below p.
#[derive(Debug, Clone, Copy)]
pub struct DropMask {
    stream: Stream,
    p: f64,
}

impl DropMask {
    /// Drops with probability `p`, below 1.
    pub fn new(stream: Stream, p: f64) -> Self {
        Self { stream, p }
    }

    /// What the kept elements are multiplied by: `1 / (1 - p)`.
    pub(super) fn scale(self) -> f32 {
        (1.0 / (1.0 - self.p)) as f32
    }

    /// Elements are dropped whose upper 53 random bits are less than this: `uniform < p` in integers.
    pub(super) fn limit(self) -> u64 {
        (self.p * (1u64 << 53) as f64).ceil() as u64
    }

    /// Of the random numbers.
    pub(super) fn stream(self) -> Stream {
        self.stream
    }
}

/// Zeroes the elements that the mask drops and multiplies the others by `1 / (1 - p)`
/// (arXiv 1207.0580).
///
/// # Shapes
/// x `[N, D]` → `[N, D]`
pub fn dropout(x: Tensor<2>, mask: DropMask) -> Tensor<2> {
    if is_fused(&x.device()) {
        Tensor::from_dispatch(Dispatch::fused_dropout(x.into_dispatch(), mask))
    } else {
        reference(x, mask)
    }
}

/// [`dropout`] from plain tensor operations, with a mask that the host draws.
pub fn reference(x: Tensor<2>, mask: DropMask) -> Tensor<2> {
    let [n, d] = x.dims();
    let factors: Vec<f32> = (0..(n * d) as u64)
        .map(|i| match mask.stream.uniform(i) < mask.p {
            true => 0.0,
            false => mask.scale(),
        })
        .collect();
    let factors = TensorData::new(factors, [n, d]);
    let factors = Tensor::from_data(factors, &x.device().inner());
    x * factors
}

/// Elements that one task takes.
const TASK: usize = 16 * 1024;

pub(super) fn forward(x: FlexTensor, mask: DropMask) -> FlexTensor {
    let x = flex::contiguous(x);
    let [n, d] = x.layout().shape().dims();
    let (stream, limit, scale) = (mask.stream, mask.limit(), mask.scale());
    let mut out = flex::unset(n * d);
    out.par_chunks_mut(TASK)
        .zip(flex::elements(&x).par_chunks(TASK))
        .enumerate()
        .for_each(|(task, (out, x))| {
            flex::vectorised(
                #[inline(always)]
                || {
                    let start = (task * TASK) as u64;
                    for (i, (y, x)) in (start..).zip(out.iter_mut().zip(x)) {
                        let dropped = stream.bits(i) >> 11 < limit;
                        *y = x * if dropped { 0.0 } else { scale };
                    }
                },
            )
        });
    flex::tensor(out, [n, d])
}

#[derive(Debug)]
struct DropoutBackward;

impl<B: KernelGradients> Backward<B, 1> for DropoutBackward {
    type State = DropMask;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::fused_dropout(grad, ops.state));
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    mask: DropMask,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [x.node()];
    let y = B::fused_dropout(x.into_primitive(), mask);
    match DropoutBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish(mask, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
