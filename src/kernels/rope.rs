//! Rotary position embedding of whole heads or of their first columns, in both layouts of
//! Hugging Face's models (arXiv 2104.09864; `apply_rotary_pos_emb` in transformers'
//! `modeling_llama.py` and `modeling_glm4.py`).

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KernelGradients, Kernels, flex, is_fused};

/// Which columns of x rotate against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RopeLayout {
    /// Dh, width of a head in x. Its first columns rotate, two for each angle; the others stay.
    pub head_dim: usize,
    /// Whether pairs are neighbours, columns 2i and 2i + 1 of a head (Cohere, GLM-4, DeepSeek),
    /// instead of columns i of the two halves of what rotates.
    pub interleaved: bool,
}

/// Rotates the first R columns of each head of each row by its position's angles:
/// `y₁ = x₁ cos - x₂ sin`, `y₂ = x₂ cos + x₁ sin`, with x₁ and x₂ the columns that `layout` pairs;
/// each result stands where its x stood.
///
/// # Shapes
/// x `[N, heads · Dh]`, cos and sin `[N, R / 2]` → `[N, heads · Dh]`
///
/// # Panics
/// If x does not divide into heads, or R is more than Dh.
pub fn rope(x: Tensor<2>, cos: Tensor<2>, sin: Tensor<2>, layout: RopeLayout) -> Tensor<2> {
    let (width, rotated) = (x.dims()[1], 2 * cos.dims()[1]);
    assert!(
        width.is_multiple_of(layout.head_dim) && rotated <= layout.head_dim,
        "{rotated} columns of each head rotate in {width}, {layout:?}"
    );
    if is_fused(&x.device()) {
        Tensor::from_dispatch(Dispatch::fused_rope(
            x.into_dispatch(),
            cos.into_dispatch(),
            sin.into_dispatch(),
            layout,
        ))
    } else {
        reference(x, cos, sin, layout)
    }
}

/// [`rope`] from plain tensor operations.
pub fn reference(x: Tensor<2>, cos: Tensor<2>, sin: Tensor<2>, layout: RopeLayout) -> Tensor<2> {
    let ([n, width], rotated, d) = (x.dims(), 2 * cos.dims()[1], layout.head_dim);
    let x = x.reshape([n, width / d, d]); // [N, heads, Dh]
    let y = if rotated == d {
        rotate_whole(x, cos, sin, layout.interleaved)
    } else {
        let rest = x.clone().narrow(2, rotated, d - rotated); // [N, heads, Dh - R]
        let first = x.narrow(2, 0, rotated); // [N, heads, R]
        let first = rotate_whole(first, cos, sin, layout.interleaved);
        Tensor::cat(vec![first, rest], 2)
    };
    y.reshape([n, width])
}

/// [`reference()`] of heads of which every column rotates.
///
/// # Shapes
/// x `[N, heads, R]`, cos and sin `[N, R / 2]` → `[N, heads, R]`
fn rotate_whole(x: Tensor<3>, cos: Tensor<2>, sin: Tensor<2>, interleaved: bool) -> Tensor<3> {
    let ([n, heads, width], half) = (x.dims(), cos.dims()[1]);
    let (shape, angles, pair) = if interleaved {
        ([n, heads, half, 2], [n, 1, half, 1], 3)
    } else {
        ([n, heads, 2, half], [n, 1, 1, half], 2)
    };
    let x = x.reshape(shape);
    let (x1, x2) = (x.clone().narrow(pair, 0, 1), x.narrow(pair, 1, 1));
    let (cos, sin) = (cos.reshape(angles), sin.reshape(angles));
    let y1 = x1.clone() * cos.clone() - x2.clone() * sin.clone();
    let y2 = x2 * cos + x1 * sin;
    Tensor::cat(vec![y1, y2], pair).reshape([n, heads, width])
}

/// Rotates by the angles times `sign`: -1 rotates back.
pub(super) fn rotate(
    x: FlexTensor,
    cos: FlexTensor,
    sin: FlexTensor,
    layout: RopeLayout,
    sign: f32,
) -> FlexTensor {
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
                        for head in row.chunks_exact_mut(layout.head_dim) {
                            let rotated = &mut head[..2 * half];
                            if layout.interleaved {
                                rotate_pairs(rotated, cos, sin, sign);
                            } else {
                                rotate_halves(rotated, cos, sin, sign);
                            }
                        }
                    }
                },
            )
        });
    flex::tensor(out, [n, width])
}

#[inline(always)]
fn rotate_halves(columns: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    let (first, second) = columns.split_at_mut(half);
    for j in 0..half {
        let (a, b, s) = (first[j], second[j], sin[j] * sign);
        first[j] = a * cos[j] - b * s;
        second[j] = b * cos[j] + a * s;
    }
}

#[inline(always)]
fn rotate_pairs(columns: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let pairs = columns.as_chunks_mut::<2>().0;
    for ([first, second], (cos, sin)) in pairs.iter_mut().zip(cos.iter().zip(sin)) {
        let (a, b, s) = (*first, *second, sin * sign);
        *first = a * cos - b * s;
        *second = b * cos + a * s;
    }
}

#[derive(Debug)]
struct RopeBackward;

impl<B: KernelGradients> Backward<B, 1> for RopeBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, RopeLayout);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (cos, sin, layout) = ops.state;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::rope_backward(grad, cos, sin, layout));
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    cos: FloatTensor<Autodiff<B, C>>,
    sin: FloatTensor<Autodiff<B, C>>,
    layout: RopeLayout,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [x.node()];
    let (x, cos, sin) = (
        x.into_primitive(),
        cos.into_primitive(),
        sin.into_primitive(),
    );
    let y = B::fused_rope(x, cos.clone(), sin.clone(), layout);
    match RopeBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish((cos, sin, layout), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
