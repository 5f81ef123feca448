//! A frozen linear layer with a low-rank delta: `y = x Wᵀ + s (x Aᵀ) Bᵀ` (arXiv 2106.09685).
//!
//! Matrices keep Hugging Face's and PEFT's layout, `[out, in]`; the transposes above are strides,
//! not copies. `B A` is never formed. W gets no gradient.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use super::flex::{ALL_THREADS, Matrix, Store};
use super::{KernelGradients, Kernels, flex, is_cpu};

/// What the backward pass needs; `x` is shared with whoever else holds it.
#[derive(Debug, Clone)]
pub struct Saved<B: Backend> {
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    lora_a: FloatTensor<B>,
    lora_b: FloatTensor<B>,
    /// `x Aᵀ` `[N, R]`
    low: FloatTensor<B>,
    scaling: f32,
}

/// `x Wᵀ + scaling · (x Aᵀ) Bᵀ` with gradients for x, A and B.
///
/// # Shapes
/// x `[N, in]`, weight `[out, in]`, lora_a `[R, in]`, lora_b `[out, R]` → `[N, out]`
pub fn lora_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    lora_a: Tensor<2>,
    lora_b: Tensor<2>,
    scaling: f64,
) -> Tensor<2> {
    if is_cpu(&x.device()) {
        Tensor::from_dispatch(Dispatch::fused_lora_linear(
            x.into_dispatch(),
            weight.into_dispatch(),
            lora_a.into_dispatch(),
            lora_b.into_dispatch(),
            scaling as f32,
        ))
    } else {
        reference(x.clone(), x, weight, (lora_a, lora_b), scaling)
    }
}

/// [`lora_linear`] from plain tensor operations; the adapter's input may differ from the base's,
/// as it does under dropout.
pub fn reference(
    x: Tensor<2>,
    adapter_x: Tensor<2>,
    weight: Tensor<2>,
    (lora_a, lora_b): (Tensor<2>, Tensor<2>),
    scaling: f64,
) -> Tensor<2> {
    let low = adapter_x.matmul(lora_a.transpose()); // [N, R]
    x.matmul(weight.transpose()) + low.matmul(lora_b.transpose()).mul_scalar(scaling)
}

fn matrix(tensor: &FlexTensor) -> Matrix<'_> {
    let [rows, cols] = tensor.layout().shape().dims();
    Matrix::new(flex::elements(tensor), rows, cols)
}

pub(super) fn forward(
    x: FlexTensor,
    weight: FlexTensor,
    lora_a: FlexTensor,
    lora_b: FlexTensor,
    scaling: f32,
) -> (FlexTensor, FlexTensor) {
    let [x, weight, a, b] = [x, weight, lora_a, lora_b].map(flex::contiguous);
    let n = x.layout().shape().dims::<2>()[0];
    let [out, rank] = b.layout().shape().dims();
    let mut low = vec![0f32; n * rank];
    let mut y = vec![0f32; n * out];
    let all = ALL_THREADS;
    flex::matmul(
        &mut low,
        rank,
        Store::Set,
        1.0,
        (matrix(&x), matrix(&a).t()),
        all,
    );
    flex::matmul(
        &mut y,
        out,
        Store::Set,
        1.0,
        (matrix(&x), matrix(&weight).t()),
        all,
    );
    let low_matrix = Matrix::new(&low, n, rank);
    flex::matmul(
        &mut y,
        out,
        Store::Add,
        scaling,
        (low_matrix, matrix(&b).t()),
        all,
    );
    (flex::tensor(y, [n, out]), flex::tensor(low, [n, rank]))
}

pub(super) fn backward(
    saved: Saved<burn_flex::Flex>,
    grad: FlexTensor,
    wants_x: bool,
) -> (Option<FlexTensor>, FlexTensor, FlexTensor) {
    let [x, weight, a, b] =
        [saved.x, saved.weight, saved.lora_a, saved.lora_b].map(flex::contiguous);
    let (low, grad) = (flex::contiguous(saved.low), flex::contiguous(grad));
    let [n, input] = x.layout().shape().dims();
    let [out, rank] = b.layout().shape().dims();
    let (scaling, all) = (saved.scaling, ALL_THREADS);
    let g = matrix(&grad);
    let mut g_low = vec![0f32; n * rank]; // s · g B
    flex::matmul(&mut g_low, rank, Store::Set, scaling, (g, matrix(&b)), all);
    let g_low = Matrix::new(&g_low, n, rank);
    let mut da = vec![0f32; rank * input];
    flex::matmul(
        &mut da,
        input,
        Store::Set,
        1.0,
        (g_low.t(), matrix(&x)),
        all,
    );
    let mut db = vec![0f32; out * rank];
    flex::matmul(
        &mut db,
        rank,
        Store::Set,
        scaling,
        (g.t(), matrix(&low)),
        all,
    );
    let dx = wants_x.then(|| {
        let mut dx = vec![0f32; n * input];
        flex::matmul(&mut dx, input, Store::Set, 1.0, (g, matrix(&weight)), all);
        flex::matmul(&mut dx, input, Store::Add, 1.0, (g_low, matrix(&a)), all);
        flex::tensor(dx, [n, input])
    });
    (
        dx,
        flex::tensor(da, [rank, input]),
        flex::tensor(db, [out, rank]),
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
    weight: FloatTensor<Autodiff<B, C>>,
    lora_a: FloatTensor<Autodiff<B, C>>,
    lora_b: FloatTensor<Autodiff<B, C>>,
    scaling: f32,
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
                lora_a.clone(),
                lora_b.clone(),
                scaling,
            );
            let saved = Saved {
                x,
                weight,
                lora_a,
                lora_b,
                low,
                scaling,
            };
            prep.finish(saved, y)
        }
        OpsKind::UnTracked(prep) => {
            prep.finish(B::fused_lora_linear(x, weight, lora_a, lora_b, scaling))
        }
    }
}
