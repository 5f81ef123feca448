//! A frozen linear layer with a low-rank delta: `y = x Wᵀ + s (x Aᵀ) Bᵀ` (arXiv 2106.09685).
//!
//! Matrices keep Hugging Face's and PEFT's layout, `[out, in]`; the transposes above are strides,
//! not copies. `B A` is never formed. W gets no gradient. A and B keep f32's accuracy whatever W is; x, and
//! on the way back g, is rounded for A and B as it is for W where matrix registers multiply all three.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use super::flex::{ALL_THREADS, Matrix, Store};
use super::frozen::{Delta, Frozen};
use super::linear::{filled, linear};
use super::{KernelGradients, Kernels, Quantised, Weight, flex, is_fused};

/// What the backward pass needs; `x` is shared with whoever else holds it.
#[derive(Debug, Clone)]
pub struct Saved<B: Backend> {
    pub(super) x: FloatTensor<B>,
    pub(super) weight: (FloatTensor<B>, Quantised),
    pub(super) lora_a: FloatTensor<B>,
    pub(super) lora_b: FloatTensor<B>,
    /// `x Aᵀ` `[N, R]`
    pub(super) low: FloatTensor<B>,
    pub(super) scaling: f32,
    pub(super) groups: Arc<[usize]>,
}

/// `x Wᵀ + scaling · (x Aᵀ) Bᵀ` with gradients for x, A and B.
///
/// # Shapes
/// x `[N, in]`, weight `[out, in]`, lora_a `[R, in]`, lora_b `[out, R]` → `[N, out]`
///
/// # Dtypes
/// f32, but for the weight, which may be bf16, f16 or quantised.
pub fn lora_linear(
    x: Tensor<2>,
    weight: impl Into<Weight>,
    lora_a: Tensor<2>,
    lora_b: Tensor<2>,
    scaling: f64,
) -> Tensor<2> {
    let weight = weight.into();
    if is_fused(&x.device()) {
        let rows = Arc::from([0, x.dims()[0]]);
        fused(x, weight, (lora_a, lora_b), scaling, rows)
    } else {
        reference(x.clone(), x, weight, (lora_a, lora_b), scaling)
    }
}

/// [`lora_linear`] of each group of rows with its own part of the rows of weight, A and B.
pub(super) fn fused(
    x: Tensor<2>,
    weight: Weight,
    (lora_a, lora_b): (Tensor<2>, Tensor<2>),
    scaling: f64,
    groups: Arc<[usize]>,
) -> Tensor<2> {
    let (weight, quantised) = weight.into_parts(&x.device());
    Tensor::from_dispatch(Dispatch::fused_lora_linear(
        x.into_dispatch(),
        weight.into_dispatch(),
        quantised,
        lora_a.into_dispatch(),
        lora_b.into_dispatch(),
        scaling as f32,
        groups,
    ))
}

/// [`lora_linear`] with plain tensor operations for the delta, whose input may differ from the base's,
/// as it does under dropout.
pub fn reference(
    x: Tensor<2>,
    adapter_x: Tensor<2>,
    weight: impl Into<Weight>,
    (lora_a, lora_b): (Tensor<2>, Tensor<2>),
    scaling: f64,
) -> Tensor<2> {
    let low = adapter_x.matmul(lora_a.transpose()); // [N, R]
    linear(x, weight) + low.matmul(lora_b.transpose()).mul_scalar(scaling)
}

/// The factors of a delta for each of E groups: A `[E · R, in]`, B `[E · out, R]`.
struct Factors<'a> {
    a: &'a [f32],
    b: &'a [f32],
    /// R, in, out
    sizes: [usize; 3],
}

impl<'a> Factors<'a> {
    fn new(a: &'a FlexTensor, b: &'a FlexTensor, groups: &[usize]) -> Self {
        let input = a.layout().shape().dims::<2>()[1];
        let [rows, rank] = b.layout().shape().dims();
        Self {
            a: flex::elements(a),
            b: flex::elements(b),
            sizes: [rank, input, rows / (groups.len() - 1)],
        }
    }

    /// A `[R, in]` and B `[out, R]` of a group.
    fn of(&self, group: usize, scaling: f32) -> Delta<'a> {
        let [rank, input, out] = self.sizes;
        let (a, b) = (
            &self.a[group * rank * input..],
            &self.b[group * out * rank..],
        );
        Delta {
            a: Matrix::new(a, rank, input),
            b: Matrix::new(b, out, rank),
            scaling,
        }
    }
}

pub(super) fn forward(
    x: FlexTensor,
    (weight, quantised): (FlexTensor, Quantised),
    [lora_a, lora_b]: [FlexTensor; 2],
    scaling: f32,
    groups: &[usize],
) -> (FlexTensor, FlexTensor) {
    let [x, weight, a, b] = [x, weight, lora_a, lora_b].map(flex::contiguous);
    let n = x.layout().shape().dims::<2>()[0];
    let factors = Factors::new(&a, &b, groups);
    let [rank, input, out] = factors.sizes;
    let (mut low, mut y) = (flex::unset(n * rank), flex::unset(n * out));
    let x = flex::elements(&x);
    let weight = (weight, quantised);
    let weight = Frozen::of(&weight, input);
    for (group, rows) in filled(groups) {
        let x = &x[rows.start * input..rows.end * input];
        let low = &mut low[rows.start * rank..rows.end * rank];
        let y = &mut y[rows.start * out..rows.end * out];
        let part = weight.part(group * out, out);
        part.forward_adapted((y, low), x, factors.of(group, scaling));
    }
    (flex::tensor(y, [n, out]), flex::tensor(low, [n, rank]))
}

pub(super) fn backward(
    saved: Saved<burn_flex::Flex>,
    grad: FlexTensor,
    wants_x: bool,
) -> (Option<FlexTensor>, FlexTensor, FlexTensor) {
    let (weight, quantised) = saved.weight;
    let [x, weight, a, b] = [saved.x, weight, saved.lora_a, saved.lora_b].map(flex::contiguous);
    let weight = (weight, quantised);
    let [low, grad] = [saved.low, grad].map(flex::contiguous);
    let groups = &*saved.groups;
    let factors = Factors::new(&a, &b, groups);
    let [rank, input, out] = factors.sizes;
    let n = x.layout().shape().dims::<2>()[0];
    let (scaling, all) = (saved.scaling, ALL_THREADS);
    let [x, low, grad] = [&x, &low, &grad].map(flex::elements);
    let (mut da, mut db) = (vec![0f32; factors.a.len()], vec![0f32; factors.b.len()]);
    let mut dx = wants_x.then(|| flex::unset(n * input));
    let weight = Frozen::of(&weight, input);
    for (group, rows) in filled(groups) {
        let delta = factors.of(group, scaling);
        let g = &grad[rows.start * out..rows.end * out];
        let mut g_low = flex::unset(rows.len() * rank); // s · g B
        let dx = (dx.as_mut()).map(|dx| &mut dx[rows.start * input..rows.end * input]);
        let part = weight.part(group * out, out);
        part.backward_adapted((dx, &mut g_low), g, delta);
        let x = Matrix::new(&x[rows.start * input..], rows.len(), input);
        let low = Matrix::new(&low[rows.start * rank..], rows.len(), rank);
        let (g, g_low) = (
            Matrix::new(g, rows.len(), out),
            Matrix::new(&g_low, rows.len(), rank),
        );
        let da = &mut da[group * rank * input..];
        flex::matmul(da, input, Store::Set, 1.0, (g_low.t(), x), all);
        let db = &mut db[group * out * rank..];
        flex::matmul(db, rank, Store::Set, scaling, (g.t(), low), all);
    }
    let rows = a.layout().shape().dims::<2>()[0];
    (
        dx.map(|dx| flex::tensor(dx, [n, input])),
        flex::tensor(da, [rows, input]),
        flex::tensor(db, [b.layout().shape().dims::<2>()[0], rank]),
    )
}

#[derive(Debug)]
struct LoraLinearBackward;

impl<B: KernelGradients> Backward<B, 3> for LoraLinearBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, a_node, b_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (dx, da, db) = B::lora_linear_backward(ops.state, grad, x_node.is_some());
        if let (Some(node), Some(dx)) = (x_node, dx) {
            grads.register::<B>(node.id, dx);
        }
        if let Some(node) = a_node {
            grads.register::<B>(node.id, da);
        }
        if let Some(node) = b_node {
            grads.register::<B>(node.id, db);
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    (weight, quantised): (FloatTensor<Autodiff<B, C>>, Quantised),
    [lora_a, lora_b]: [FloatTensor<Autodiff<B, C>>; 2],
    scaling: f32,
    groups: Arc<[usize]>,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [x.node(), lora_a.node(), lora_b.node()];
    let (x, weight) = (x.into_primitive(), weight.into_primitive());
    let (lora_a, lora_b) = (lora_a.into_primitive(), lora_b.into_primitive());
    match LoraLinearBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let (y, low) = B::lora_linear_forward(
                x.clone(),
                weight.clone(),
                quantised.clone(),
                lora_a.clone(),
                lora_b.clone(),
                scaling,
                &groups,
            );
            let saved = Saved {
                x,
                weight: (weight, quantised),
                lora_a,
                lora_b,
                low,
                scaling,
                groups,
            };
            prep.finish(saved, y)
        }
        OpsKind::UnTracked(prep) => {
            let y = B::fused_lora_linear(x, weight, quantised, lora_a, lora_b, scaling, groups);
            prep.finish(y)
        }
    }
}
