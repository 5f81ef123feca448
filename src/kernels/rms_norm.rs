//! Root-mean-square norm: `y = x / sqrt(mean(x²) + ε) · w` (arXiv 1910.07467).
//!
//! The fused kernel keeps only its input for the backward pass and writes one tensor each way.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KernelGradients, Kernels, flex, is_fused};

/// `x / sqrt(mean(x²) + ε) · weight`, the mean over the last dimension, in f32.
///
/// # Shapes
/// x `[N, D]`, weight `[D]` → `[N, D]`
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    if is_fused(&x.device()) {
        Tensor::from_dispatch(Dispatch::fused_rms_norm(
            x.into_dispatch(),
            weight.into_dispatch(),
            eps as f32,
        ))
    } else {
        reference(x, weight, eps)
    }
}

/// [`rms_norm`] from plain tensor operations.
pub fn reference(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    let scale = (x.clone().square().mean_dim(1) + eps).sqrt().recip(); // [N, 1]
    x * scale * weight.unsqueeze()
}

/// `1 / sqrt(mean(x²) + ε)` of one row.
#[inline(always)]
fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    let mut lanes = [0f32; 16];
    let (blocks, rest) = row.as_chunks::<16>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane = x.mul_add(*x, *lane);
        }
    }
    let squares = lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    1.0 / (squares / row.len() as f32 + eps).sqrt()
}

pub(super) fn forward(x: FlexTensor, weight: FlexTensor, eps: f32) -> FlexTensor {
    let (x, weight) = (flex::contiguous(x), flex::contiguous(weight));
    let [n, d] = x.layout().shape().dims();
    let (input, w) = (flex::elements(&x), flex::elements(&weight));
    let mut out = flex::unset(n * d);
    let task = flex::rows_per_task(n, d) * d;
    out.par_chunks_mut(task)
        .zip(input.par_chunks(task))
        .for_each(|(out, input)| {
            flex::vectorised(
                #[inline(always)]
                || {
                    for (y, x) in out.chunks_exact_mut(d).zip(input.chunks_exact(d)) {
                        let scale = inverse_rms(x, eps);
                        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                            *y = x * scale * w;
                        }
                    }
                },
            )
        });
    flex::tensor(out, [n, d])
}

pub(super) fn backward(
    x: FlexTensor,
    weight: FlexTensor,
    grad: FlexTensor,
    eps: f32,
    wants_weight: bool,
) -> (FlexTensor, Option<FlexTensor>) {
    let [n, d] = x.layout().shape().dims();
    let (x, weight, grad) = (
        flex::contiguous(x),
        flex::contiguous(weight),
        flex::contiguous(grad),
    );
    let (input, w, g) = (
        flex::elements(&x),
        flex::elements(&weight),
        flex::elements(&grad),
    );
    let mut dx = flex::unset(n * d);
    let task = flex::rows_per_task(n, d) * d;
    // Tasks return their share of the weight's gradient; collecting keeps the order of the sum fixed.
    let shares: Vec<Vec<f32>> = dx
        .par_chunks_mut(task)
        .zip(input.par_chunks(task))
        .zip(g.par_chunks(task))
        .map(|((dx, input), g)| {
            let mut dw = vec![0f32; if wants_weight { d } else { 0 }];
            flex::vectorised(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(d).zip(input.chunks_exact(d));
                    for ((dx, x), g) in rows.zip(g.chunks_exact(d)) {
                        backward_row(dx, &mut dw, (x, w, g), eps);
                    }
                },
            );
            dw
        })
        .collect();
    let dw = wants_weight.then(|| {
        let mut dw = vec![0f32; d];
        for share in shares {
            for (total, part) in dw.iter_mut().zip(share) {
                *total += part;
            }
        }
        flex::tensor(dw, [d])
    });
    (flex::tensor(dx, [n, d]), dw)
}

/// `dx = r (g w - x r² mean(g w x))`, `dw += g x r` unless it is empty, with `r` the inverse root
/// mean square.
#[inline(always)]
fn backward_row(dx: &mut [f32], dw: &mut [f32], (x, w, g): (&[f32], &[f32], &[f32]), eps: f32) {
    let r = inverse_rms(x, eps);
    let mut dot = 0f32;
    for ((dx, g), w) in dx.iter_mut().zip(g).zip(w) {
        *dx = g * w;
    }
    for ((dw, g), x) in dw.iter_mut().zip(g).zip(x) {
        *dw += g * x * r;
    }
    let mut lanes = [0f32; 16];
    let (gw, gw_rest) = dx.as_chunks::<16>();
    let (xs, xs_rest) = x.as_chunks::<16>();
    for (gw, x) in gw.iter().zip(xs) {
        for ((lane, a), b) in lanes.iter_mut().zip(gw).zip(x) {
            *lane = a.mul_add(*b, *lane);
        }
    }
    for (a, b) in gw_rest.iter().zip(xs_rest) {
        dot += a * b;
    }
    dot += lanes.iter().sum::<f32>();
    let shift = dot / x.len() as f32 * r * r;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = (*dx - x * shift) * r;
    }
}

#[derive(Debug)]
struct RmsNormBackward;

impl<B: KernelGradients> Backward<B, 2> for RmsNormBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, f32);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, weight_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (x, weight, eps) = ops.state;
        let (dx, dw) = B::rms_norm_backward(x, weight, grad, eps, weight_node.is_some());
        if let Some(node) = x_node {
            grads.register::<B>(node.id, dx);
        }
        if let (Some(node), Some(dw)) = (weight_node, dw) {
            grads.register::<B>(node.id, dw);
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    eps: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [x.node(), weight.node()];
    let (x, weight) = (x.into_primitive(), weight.into_primitive());
    match RmsNormBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let y = B::fused_rms_norm(x.clone(), weight.clone(), eps);
            prep.finish((x, weight, eps), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::fused_rms_norm(x, weight, eps)),
    }
}
