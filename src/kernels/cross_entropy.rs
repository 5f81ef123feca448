//! Output head and cross entropy in one: `Σ (logsumexp(z) - z[target])` over labelled rows, where z are
//! the logits: `h Wᵀ`, to which a low-rank delta and a bias may be added, scaled and soft-capped.
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
use burn::tensor::{Device, Int, Shape, Tensor, TensorData, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::attention::{maximum, total};
use super::flex::{ALL_THREADS, Matrix, Store};
use super::frozen::Frozen;
use super::{KernelGradients, Kernels, flex, in_f32, is_fused};

/// What the loss is computed from: hidden `[N, D]`, weight `[V, D]`, low `[N, R]`, up `[V, R]`, bias
/// `[V]`; R is 0 without a delta, the bias is empty where there is none.
pub(super) const PARTS: usize = 5;
/// The bias, which is a vector; the other parts are matrices.
const BIAS: usize = 4;

/// The tensors that the loss is computed from.
pub type Parts<B> = [FloatTensor<B>; PARTS];

/// The summed loss `[1]` and the gradients of the parts, each where it is wanted.
pub struct LossAndGradients<B: Backend> {
    pub(super) loss: FloatTensor<B>,
    pub(super) gradients: [Option<FloatTensor<B>>; PARTS],
}

/// The output head as the loss sees it.
#[derive(Debug, Clone)]
pub struct Head {
    /// W, `[V, D]`; f32, or bf16 or f16 where it is frozen.
    pub weight: Tensor<2>,
    /// A delta's input `s x Aᵀ` for each row, `[N, R]`, and its B, `[V, R]`.
    pub delta: Option<(Tensor<2>, Tensor<2>)>,
    /// `[V]`
    pub bias: Option<Tensor<1>>,
    /// What becomes of the products.
    pub shape: LogitShape,
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
/// # Shapes
/// hidden `[N, D]`, targets N token ids below V or negative → `[1]`
pub fn linear_cross_entropy(hidden: Tensor<2>, head: Head, targets: Arc<[i32]>) -> Tensor<1> {
    let device = hidden.device();
    if !is_fused(&device) {
        return reference(hidden, head, &targets);
    }
    let (low, up) = (head.delta).unwrap_or_else(|| {
        (
            Tensor::empty([0, 0], &device),
            Tensor::empty([0, 0], &device),
        )
    });
    let bias = head.bias.unwrap_or_else(|| Tensor::empty([0], &device));
    Tensor::from_dispatch(Dispatch::fused_cross_entropy(
        hidden.into_dispatch(),
        head.weight.into_dispatch(),
        low.into_dispatch(),
        up.into_dispatch(),
        bias.into_dispatch(),
        targets,
        head.shape,
    ))
}

/// [`linear_cross_entropy`] from plain tensor operations.
pub fn reference(hidden: Tensor<2>, head: Head, targets: &[i32]) -> Tensor<1> {
    // The rows of a delta's input are chosen along with those of the base's.
    let ranks = head.delta.as_ref().map(|(_, up)| up.dims()[1]);
    let d = hidden.dims()[1];
    let (rows, up) = match head.delta {
        Some((low, up)) => (Tensor::cat(vec![hidden, low], 1), Some(up)), // [N, D + R]
        None => (hidden, None),
    };
    of_labelled(rows, targets, |rows| {
        let base = rows
            .clone()
            .narrow(1, 0, d)
            .matmul(in_f32(head.weight).transpose());
        let products = match (up, ranks) {
            (Some(up), Some(rank)) => base + rows.narrow(1, d, rank).matmul(up.transpose()),
            _ => base,
        };
        let products = match head.bias {
            Some(bias) => products + bias.unsqueeze(),
            None => products,
        };
        shape_logits(products, head.shape)
    })
}

/// The same of any logits, which are computed for labelled rows only and held whole.
///
/// # Shapes
/// rows `[N, D]` → `[1]`; `logits` makes `[n, V]` of `[n, D]`
pub fn of_labelled(
    rows: Tensor<2>,
    targets: &[i32],
    logits: impl FnOnce(Tensor<2>) -> Tensor<2>,
) -> Tensor<1> {
    let labelled = labelled_rows(targets);
    if labelled.is_empty() {
        return rows.sum().mul_scalar(0.0);
    }
    let n = labelled.len();
    let device = rows.device();
    let wanted = labelled.iter().map(|&row| targets[row]).collect();
    let chosen = ints(labelled.iter().map(|&row| row as i32).collect(), &device);
    activation::log_softmax(logits(rows.select(0, chosen)), 1)
        .gather(1, ints(wanted, &device).reshape([n, 1]))
        .neg()
        .sum()
}

fn ints(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

pub(super) fn labelled_rows(targets: &[i32]) -> Vec<usize> {
    (0..targets.len()).filter(|&i| targets[i] >= 0).collect()
}

/// Logits held at once: 96 MiB. With fewer, reading and copying the head for each few rows would take
/// longer than multiplying by it.
const CHUNK_LOGITS: usize = 24 << 20;

pub(super) fn forward(
    parts: Parts<burn_flex::Flex>,
    targets: &[i32],
    shape: LogitShape,
    wants: [bool; PARTS],
) -> LossAndGradients<burn_flex::Flex> {
    let parts = parts.map(flex::contiguous);
    let [hidden, low, up, bias] = [0, 2, 3, BIAS].map(|i| flex::elements(&parts[i]));
    let [n, d] = parts[0].layout().shape().dims();
    let v = parts[1].layout().shape().dims::<2>()[0];
    let rank = parts[3].layout().shape().dims::<2>()[1];
    let (head, up) = (Frozen::new(&parts[1], d), Matrix::new(up, v, rank));
    let lengths = [n * d, v * d, n * rank, v * rank, bias.len()];
    let mut gradients: [Option<Vec<f32>>; PARTS] =
        std::array::from_fn(|i| wants[i].then(|| vec![0f32; lengths[i]]));
    let [d_hidden, d_weight, d_low, d_up, d_bias] = &mut gradients;
    let labelled = labelled_rows(targets);
    let chunk = (CHUNK_LOGITS / v).clamp(1, labelled.len().max(1));
    let mut logits = vec![0f32; chunk * v];
    let (mut h, mut l) = (vec![0f32; chunk * d], vec![0f32; chunk * rank]);
    let mut loss = 0f64;
    for rows in labelled.chunks(chunk) {
        let m = rows.len();
        gather(hidden, rows, d, &mut h);
        gather(low, rows, rank, &mut l);
        let (h_rows, l_rows) = (Matrix::new(&h, m, d), Matrix::new(&l, m, rank));
        head.forward(&mut logits[..m * v], &h[..m * d]);
        multiply(&mut logits, v, Store::Add, (l_rows, up.t()));
        let losses: Vec<f64> = logits
            .par_chunks_exact_mut(v)
            .zip(rows)
            .map(|(row, &at)| {
                flex::vectorised(
                    #[inline(always)]
                    || loss_row(row, targets[at] as usize, bias, shape),
                )
            })
            .collect();
        loss += losses.iter().sum::<f64>();
        // `logits` now holds the gradient of the products.
        let grad = Matrix::new(&logits, m, v);
        if let Some(d_weight) = d_weight {
            multiply(d_weight, d, Store::Add, (grad.t(), h_rows));
        }
        if let Some(d_up) = d_up {
            multiply(d_up, rank, Store::Add, (grad.t(), l_rows));
        }
        if let Some(d_bias) = d_bias {
            for row in logits[..m * v].chunks_exact(v) {
                d_bias.iter_mut().zip(row).for_each(|(d, x)| *d += x);
            }
        }
        if let Some(d_hidden) = d_hidden {
            head.backward(&mut h[..m * d], &logits[..m * v]);
            scatter(&h, rows, d, d_hidden);
        }
        if let Some(d_low) = d_low {
            multiply(&mut l, rank, Store::Set, (grad, up));
            scatter(&l, rows, rank, d_low);
        }
    }
    let tensor = |(values, part): (Option<Vec<f32>>, &FlexTensor)| {
        let shape = part.layout().shape().clone();
        values.map(|values| FlexTensor::from_data(TensorData::new(values, shape)))
    };
    let mut gradients = gradients.into_iter().zip(&parts).map(tensor);
    LossAndGradients {
        loss: flex::tensor(vec![loss as f32], [1]),
        gradients: std::array::from_fn(|_| gradients.next().flatten()),
    }
}

/// A product by all threads; nothing where the inner dimension is empty.
fn multiply(dst: &mut [f32], width: usize, store: Store, factors: (Matrix, Matrix)) {
    if !factors.0.is_empty() && !factors.1.is_empty() {
        flex::matmul(dst, width, store, 1.0, factors, ALL_THREADS);
    }
}

/// Copies rows of `width` elements together.
fn gather(from: &[f32], rows: &[usize], width: usize, to: &mut [f32]) {
    for (i, &row) in rows.iter().enumerate() {
        to[i * width..][..width].copy_from_slice(&from[row * width..][..width]);
    }
}

/// The reverse of [`gather`].
fn scatter(from: &[f32], rows: &[usize], width: usize, to: &mut [f32]) {
    for (i, &row) in rows.iter().enumerate() {
        to[row * width..][..width].copy_from_slice(&from[i * width..][..width]);
    }
}

/// The loss of one row of products, which become its gradient.
#[inline(always)]
fn loss_row(row: &mut [f32], target: usize, bias: &[f32], shape: LogitShape) -> f64 {
    for (x, bias) in row.iter_mut().zip(bias) {
        *x += bias;
    }
    if shape.scale != 1.0 {
        for x in row.iter_mut() {
            *x *= shape.scale;
        }
    }
    let mut capped = Vec::new();
    if let Some(cap) = shape.soft_cap {
        for x in row.iter_mut() {
            *x = cap * flex::tanh(*x / cap);
        }
        capped.extend_from_slice(row);
    }
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
    if let Some(cap) = shape.soft_cap {
        for (x, y) in row.iter_mut().zip(&capped) {
            let t = y / cap;
            *x *= 1.0 - t * t;
        }
    }
    if shape.scale != 1.0 {
        for x in row.iter_mut() {
            *x *= shape.scale;
        }
    }
    f64::from(max) + f64::from(sum).ln() - f64::from(wanted)
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: KernelGradients> Backward<B, PARTS> for CrossEntropyBackward {
    type State = [Option<FloatTensor<B>>; PARTS];

    fn backward(self, ops: Ops<Self::State, PARTS>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = grads.consume::<B>(&ops.node); // [1]
        for (i, (node, grad)) in ops.parents.into_iter().zip(ops.state).enumerate() {
            if let (Some(node), Some(grad)) = (node, grad) {
                let upstream = match i {
                    BIAS => upstream.clone(),
                    _ => B::float_reshape(upstream.clone(), Shape::new([1, 1])),
                };
                grads.register::<B>(node.id, B::float_mul(grad, upstream));
            }
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    parts: Parts<Autodiff<B, C>>,
    targets: Arc<[i32]>,
    shape: LogitShape,
) -> FloatTensor<Autodiff<B, C>> {
    let wants = parts.each_ref().map(|part| part.is_tracked());
    let parents = parts.each_ref().map(|part| part.node());
    let parts = parts.map(|part| part.into_primitive());
    let result = B::cross_entropy_forward(parts, &targets, shape, wants);
    match CrossEntropyBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish(result.gradients, result.loss),
        OpsKind::UnTracked(prep) => prep.finish(result.loss),
    }
}

pub(super) fn loss_only(
    parts: Parts<burn_flex::Flex>,
    targets: &[i32],
    shape: LogitShape,
) -> FlexTensor {
    forward(parts, targets, shape, [false; PARTS]).loss
}
