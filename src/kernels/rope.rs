//! Rotary position embedding, Hugging Face's layout: the halves of a head rotate against each
//! other (arXiv 2104.09864; `apply_rotary_pos_emb` in transformers' `modeling_llama.py`).

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KernelGradients, Kernels, flex, is_cpu};

/// Rotates each head of each row by its position's angles:
/// `y₁ = x₁ cos - x₂ sin`, `y₂ = x₂ cos + x₁ sin`, with x₁ and x₂ the halves of a head.
///
/// # Shapes
/// x `[N, heads · Dh]`, cos and sin `[N, Dh / 2]` → `[N, heads · Dh]`
pub fn rope(x: Tensor<2>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<2> {
    if is_cpu(&x.device()) {
        Tensor::from_dispatch(Dispatch::fused_rope(
            x.into_dispatch(),
            cos.into_dispatch(),
            sin.into_dispatch(),
        ))
    } else {
        reference(x, cos, sin)
    }
}

/// [`rope`] from plain tensor operations.
pub fn reference(x: Tensor<2>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<2> {
    let [n, width] = x.dims();
    let half = cos.dims()[1];
    let heads = width / (2 * half);
    let x = x.reshape([n, heads, 2, half]); // [N, heads, 2, Dh/2]
    let (x1, x2) = (x.clone().narrow(2, 0, 1), x.narrow(2, 1, 1));
    let (cos, sin) = (cos.reshape([n, 1, 1, half]), sin.reshape([n, 1, 1, half]));
    let y1 = x1.clone() * cos.clone() - x2.clone() * sin.clone();
    let y2 = x2 * cos + x1 * sin;
    Tensor::cat(vec![y1, y2], 2).reshape([n, width])
}

/// Rotates by the angles times `sign`: -1 rotates back.
pub(super) fn rotate(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, sign: f32) -> FlexTensor {
    let (x, cos, sin) = (
        flex::contiguous(x),
        flex::contiguous(cos),
        flex::contiguous(sin),
    );
    let [n, width] = x.layout().shape().dims();
    let half = cos.layout().shape().dims::<2>()[1];
    let (cos, sin) = (flex::elements(&cos), flex::elements(&sin));
    let mut out = flex::elements(&x).to_vec();
    let rows = flex::rows_per_task(n, width);
    out.par_chunks_mut(rows * width)
        .enumerate()
        .for_each(|(task, out)| {
            flex::vectorised(
                #[inline(always)]
                || {
                    for (i, row) in out.chunks_exact_mut(width).enumerate() {
                        let at = (task * rows + i) * half;
                        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                        for head in row.chunks_exact_mut(2 * half) {
                            let (first, second) = head.split_at_mut(half);
                            for j in 0..half {
                                let (a, b, s) = (first[j], second[j], sin[j] * sign);
                                first[j] = a * cos[j] - b * s;
                                second[j] = b * cos[j] + a * s;
                            }
                        }
                    }
                },
            )
        });
    flex::tensor(out, [n, width])
}

#[derive(Debug)]
struct RopeBackward;

impl<B: KernelGradients> Backward<B, 1> for RopeBackward {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (cos, sin) = ops.state;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::rope_backward(grad, cos, sin));
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    cos: FloatTensor<Autodiff<B, C>>,
    sin: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [x.node()];
    let (x, cos, sin) = (
        x.into_primitive(),
        cos.into_primitive(),
        sin.into_primitive(),
    );
    let y = B::fused_rope(x, cos.clone(), sin.clone());
    match RopeBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish((cos, sin), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
