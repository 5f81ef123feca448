//! A frozen linear layer, `y = x Wᵀ`: W gets no gradient, and may be kept in 16 bits or quantised.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use super::frozen::Frozen;
use super::{KernelGradients, Kernels, Quantised, Weight, flex, is_fused};

/// `x Wᵀ` with a gradient for x, and for W where that trains.
///
/// # Shapes
/// x `[N, in]`, weight `[out, in]` → `[N, out]`
///
/// # Dtypes
/// x f32; weight f32, or bf16, f16 or quantised where it is frozen.
pub fn linear(x: Tensor<2>, weight: impl Into<Weight>) -> Tensor<2> {
    let weight = weight.into();
    match is_fused(&x.device()) && !weight.is_autodiff() {
        true => {
            let rows = Arc::from([0, x.dims()[0]]);
            fused(x, weight, rows)
        }
        false => reference(x, weight),
    }
}

/// [`linear`] from plain tensor operations.
pub fn reference(x: Tensor<2>, weight: impl Into<Weight>) -> Tensor<2> {
    let weight = weight.into().in_f32(&x.device());
    x.matmul(weight.transpose())
}

/// Rows `groups[e] .. groups[e + 1]` of x times the e-th of as many equal parts of the weight's rows.
pub(super) fn fused(x: Tensor<2>, weight: Weight, groups: Arc<[usize]>) -> Tensor<2> {
    let (weight, quantised) = weight.into_parts(&x.device());
    Tensor::from_dispatch(Dispatch::fused_linear(
        x.into_dispatch(),
        weight.into_dispatch(),
        quantised,
        groups,
    ))
}

/// The groups that have rows, with those rows.
pub(super) fn filled(groups: &[usize]) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let ranges = groups.windows(2).map(|ends| ends[0]..ends[1]);
    ranges.enumerate().filter(|(_, rows)| !rows.is_empty())
}

/// Multiplies each group's rows of a matrix of `from` columns into those of one of `to`.
pub(super) fn each_group<'a>(
    weight: Frozen<'a>,
    groups: &[usize],
    (x, from): (&[f32], usize),
    (dst, to): (&mut [f32], usize),
    product: impl Fn(Frozen<'a>, &mut [f32], &[f32]),
) {
    let height = weight.rows() / (groups.len() - 1);
    for (group, rows) in filled(groups) {
        let dst = &mut dst[rows.start * to..rows.end * to];
        let x = &x[rows.start * from..rows.end * from];
        product(weight.part(group * height, height), dst, x);
    }
}

pub(super) fn forward(
    x: FlexTensor,
    (weight, quantised): (FlexTensor, Quantised),
    groups: &[usize],
) -> FlexTensor {
    let [x, weight] = [x, weight].map(flex::contiguous);
    let [n, input] = x.layout().shape().dims();
    let weight = (weight, quantised);
    let weight = Frozen::of(&weight, input);
    let out = weight.rows() / (groups.len() - 1);
    let mut y = flex::unset(n * out);
    let x = (flex::elements(&x), input);
    each_group(weight, groups, x, (&mut y, out), Frozen::forward);
    flex::tensor(y, [n, out])
}

/// The gradient of x.
pub(super) fn backward(
    (weight, quantised): (FlexTensor, Quantised),
    grad: FlexTensor,
    groups: &[usize],
) -> FlexTensor {
    let [weight, grad] = [weight, grad].map(flex::contiguous);
    let input = match &quantised {
        Some(weight) => weight.shape()[1],
        None => weight.layout().shape().dims::<2>()[1],
    };
    let weight = (weight, quantised);
    let [n, out] = grad.layout().shape().dims();
    let mut dx = flex::unset(n * input);
    let g = (flex::elements(&grad), out);
    let weight = Frozen::of(&weight, input);
    each_group(weight, groups, g, (&mut dx, input), Frozen::backward);
    flex::tensor(dx, [n, input])
}

#[derive(Debug)]
struct LinearBackward;

impl<B: KernelGradients> Backward<B, 1> for LinearBackward {
    type State = (FloatTensor<B>, Quantised, Arc<[usize]>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (weight, quantised, groups) = ops.state;
        if let [Some(node)] = ops.parents {
            let dx = B::linear_backward(weight, quantised, grad, &groups);
            grads.register::<B>(node.id, dx);
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    (weight, quantised): (FloatTensor<Autodiff<B, C>>, Quantised),
    groups: Arc<[usize]>,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [x.node()];
    let (x, weight) = (x.into_primitive(), weight.into_primitive());
    let y = B::fused_linear(x, weight.clone(), quantised.clone(), Arc::clone(&groups));
    match LinearBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish((weight, quantised, groups), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
