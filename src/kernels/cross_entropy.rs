//! Output head and cross entropy in one: `Σ (logsumexp(h Wᵀ) - (h Wᵀ)[target])` over labelled rows.
//!
//! The fused kernel works through chunks of labelled rows, so that logits `[N, V]` never exist, and
//! computes the gradients in the same sweep (as Liger-Kernel does, arXiv 2410.10989): the backward
//! pass only scales them. The reference holds the logits of all labelled rows.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch};
use burn::tensor::{Int, Shape, Tensor, TensorData, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::attention::{maximum, total};
use super::flex::{ALL_THREADS, Matrix, Store};
use super::{KernelGradients, Kernels, flex, is_cpu};

/// Which gradients the forward pass computes along with the loss.
#[derive(Debug, Clone, Copy)]
pub struct Wants {
    hidden: bool,
    weight: bool,
}

/// The summed loss `[1]` and its gradients, `[N, D]` and `[V, D]`.
pub struct LossAndGradients<B: Backend> {
    loss: FloatTensor<B>,
    hidden: Option<FloatTensor<B>>,
    weight: Option<FloatTensor<B>>,
}

/// What is done to a product of hidden states and head before it is a logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitShape {
    /// Logits are multiplied by this (Cohere, Granite).
    pub scale: f32,
    /// Then they become `cap · tanh(logit / cap)` (Gemma 2).
    pub soft_cap: Option<f32>,
}

/// Logits from products of hidden states and head.
///
/// # Shapes
/// `[N, V]` → `[N, V]`
pub fn shape_logits(products: Tensor<2>, shape: LogitShape) -> Tensor<2> {
    let logits = match shape.scale {
        1.0 => products,
        scale => products * scale,
    };
    match shape.soft_cap {
        Some(cap) => (logits / cap).tanh() * cap,
        None => logits,
    }
}

/// Sum of the cross entropies of the rows whose target is not negative.
///
/// Heads with a bias or a soft cap take the plain operations, which hold the logits of all labelled
/// rows.
///
/// # Shapes
/// hidden `[N, D]`, weight `[V, D]`, bias `[V]`, targets N token ids below V or negative → `[1]`
pub fn linear_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    targets: Arc<[i32]>,
    shape: LogitShape,
) -> Tensor<1> {
    if !is_cpu(&hidden.device()) || bias.is_some() || shape.soft_cap.is_some() {
        return reference(hidden, weight, bias, &targets, shape);
    }
    let hidden = match shape.scale {
        1.0 => hidden,
        scale => hidden * scale,
    };
    Tensor::from_dispatch(Dispatch::fused_cross_entropy(
        hidden.into_dispatch(),
        weight.into_dispatch(),
        targets,
    ))
}

/// [`linear_cross_entropy`] from plain tensor operations.
pub fn reference(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    targets: &[i32],
    shape: LogitShape,
) -> Tensor<1> {
    let device = hidden.device();
    let labelled = labelled_rows(targets);
    if labelled.is_empty() {
        return hidden.sum().mul_scalar(0.0);
    }
    let n = labelled.len();
    let ints =
        |values: Vec<i32>| Tensor::<1, Int>::from_data(TensorData::new(values, [n]), &device);
    let wanted: Vec<i32> = labelled.iter().map(|&row| targets[row]).collect();
    let rows = ints(labelled.iter().map(|&row| row as i32).collect());
    let products = hidden.select(0, rows).matmul(weight.transpose()); // [n, V]
    let products = match bias {
        Some(bias) => products + bias.unsqueeze(),
        None => products,
    };
    activation::log_softmax(shape_logits(products, shape), 1)
        .gather(1, ints(wanted).reshape([n, 1]))
        .neg()
        .sum()
}

fn labelled_rows(targets: &[i32]) -> Vec<usize> {
    (0..targets.len()).filter(|&i| targets[i] >= 0).collect()
}

/// Logits held at once: 32 MiB.
const CHUNK_LOGITS: usize = 8 << 20;

pub(super) fn forward(
    hidden: FlexTensor,
    weight: FlexTensor,
    targets: &[i32],
    wants: Wants,
) -> LossAndGradients<burn_flex::Flex> {
    let (hidden, weight) = (flex::contiguous(hidden), flex::contiguous(weight));
    let [n, d] = hidden.layout().shape().dims();
    let [v, _] = weight.layout().shape().dims();
    let (input, head) = (
        flex::elements(&hidden),
        Matrix::new(flex::elements(&weight), v, d),
    );
    let labelled = labelled_rows(targets);
    let mut d_hidden = wants.hidden.then(|| vec![0f32; n * d]);
    let mut d_weight = wants.weight.then(|| vec![0f32; v * d]);
    let chunk = (CHUNK_LOGITS / v).clamp(1, labelled.len().max(1));
    let mut logits = vec![0f32; chunk * v];
    let mut rows_in = vec![0f32; chunk * d];
    let mut loss = 0f64;
    for rows in labelled.chunks(chunk) {
        let m = rows.len();
        for (to, &row) in rows_in.chunks_exact_mut(d).zip(rows) {
            to.copy_from_slice(&input[row * d..(row + 1) * d]);
        }
        let h = Matrix::new(&rows_in, m, d);
        flex::matmul(&mut logits, v, Store::Set, 1.0, (h, head.t()), ALL_THREADS);
        let losses: Vec<f64> = logits
            .par_chunks_exact_mut(v)
            .zip(rows)
            .map(|(row, &at)| {
                flex::vectorised(
                    #[inline(always)]
                    || loss_row(row, targets[at] as usize),
                )
            })
            .collect();
        loss += losses.iter().sum::<f64>();
        // `logits` now holds softmax - onehot, the gradient of the summed loss.
        let grad = Matrix::new(&logits, m, v);
        if let Some(d_weight) = &mut d_weight {
            flex::matmul(d_weight, d, Store::Add, 1.0, (grad.t(), h), ALL_THREADS);
        }
        if let Some(d_hidden) = &mut d_hidden {
            flex::matmul(&mut rows_in, d, Store::Set, 1.0, (grad, head), ALL_THREADS);
            for (from, &row) in rows_in.chunks_exact(d).zip(rows) {
                d_hidden[row * d..(row + 1) * d].copy_from_slice(from);
            }
        }
    }
    LossAndGradients {
        loss: flex::tensor(vec![loss as f32], [1]),
        hidden: d_hidden.map(|values| flex::tensor(values, [n, d])),
        weight: d_weight.map(|values| flex::tensor(values, [v, d])),
    }
}

/// The loss of one row of logits, which become `softmax - onehot(target)`.
#[inline(always)]
fn loss_row(row: &mut [f32], target: usize) -> f64 {
    let max = maximum(row);
    let wanted = row[target];
    for x in row.iter_mut() {
        *x = flex::exp(*x - max);
    }
    let sum = total(row);
    let scale = 1.0 / sum;
    for x in row.iter_mut() {
        *x *= scale;
    }
    row[target] -= 1.0;
    f64::from(max) + f64::from(sum).ln() - f64::from(wanted)
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: KernelGradients> Backward<B, 2> for CrossEntropyBackward {
    type State = [Option<FloatTensor<B>>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = grads.consume::<B>(&ops.node); // [1]
        let upstream = B::float_reshape(upstream, Shape::new([1, 1]));
        for (node, grad) in ops.parents.into_iter().zip(ops.state) {
            if let (Some(node), Some(grad)) = (node, grad) {
                grads.register::<B>(node.id, B::float_mul(grad, upstream.clone()));
            }
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    hidden: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    targets: Arc<[i32]>,
) -> FloatTensor<Autodiff<B, C>> {
    let wants = Wants {
        hidden: hidden.is_tracked(),
        weight: weight.is_tracked(),
    };
    let parents = [hidden.node(), weight.node()];
    let (hidden, weight) = (hidden.into_primitive(), weight.into_primitive());
    let result = B::cross_entropy_forward(hidden, weight, &targets, wants);
    match CrossEntropyBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish([result.hidden, result.weight], result.loss),
        OpsKind::UnTracked(prep) => prep.finish(result.loss),
    }
}

pub(super) fn loss_only(hidden: FlexTensor, weight: FlexTensor, targets: &[i32]) -> FlexTensor {
    let wants = Wants {
        hidden: false,
        weight: false,
    };
    forward(hidden, weight, targets, wants).loss
}
