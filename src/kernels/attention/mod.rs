//! Causal grouped-query attention over segments: in each, `softmax(scale · q kᵀ + causal mask) v`,
//! with what model families add to it: sliding windows, soft-capped scores, attention sinks, and
//! value heads of another width than the key heads.
//!
//! The fused kernels, the CPU's here and the GPUs' in `cube::attention`, work through blocks of
//! queries and only the keys of their segment and window that they may see, so that no `[T, T]`
//! matrix is ever held and packed samples cost no more than
//! apart; the backward pass computes the probabilities again from the log-sum-exp of each row
//! (FlashAttention-2, arXiv 2307.08691).

mod backward;
mod forward;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::flex::{self, Matrix};
use super::segments::{Segments, balanced};
use super::{KernelGradients, Kernels, is_fused};

pub(super) use backward::backward;
pub(super) use forward::{forward, maximum, total};

/// How the columns of q, k and v divide into heads, and what becomes of their scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// H, query heads.
    pub heads: usize,
    /// K, key and value heads; divides H. Query head h reads key head `h / (H / K)`.
    pub kv_heads: usize,
    /// Dh, width of a head of q and of k.
    pub head_dim: usize,
    /// Dv, width of a head of v and of the output.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// A query sees itself and the `window - 1` keys before it; all of them without.
    pub window: Option<usize>,
    /// Scores become `cap · tanh(scores / cap)`, after the factor and before the mask (Gemma 2,
    /// arXiv 2408.00118).
    pub soft_cap: Option<f32>,
    /// Whether queries, keys, values, probabilities and gradients may be rounded to bf16 to be
    /// multiplied, as GPUs do whose tensor cores take it; sums stay in f32.
    pub in_bf16: bool,
}

impl Heads {
    /// Columns of q: H · Dh.
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of k: K · Dh.
    fn k_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Columns of v: K · Dv.
    fn v_width(&self) -> usize {
        self.kv_heads * self.value_dim
    }

    /// Columns of the output: H · Dv.
    pub(super) fn out_width(&self) -> usize {
        self.heads * self.value_dim
    }
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct Saved<B: Backend> {
    pub(super) q: FloatTensor<B>,
    pub(super) k: FloatTensor<B>,
    pub(super) v: FloatTensor<B>,
    pub(super) sinks: FloatTensor<B>,
    pub(super) out: FloatTensor<B>,
    pub(super) lse: FloatTensor<B>,
    pub(super) heads: Heads,
    pub(super) segments: Segments,
}

/// Causal attention in which a query sees itself and the earlier keys of its own segment, as far
/// as its window reaches.
///
/// `sinks` are one more logit for each query head, which takes its share of the probability and
/// gives nothing (gpt_oss; arXiv 2309.17453); neither factor nor soft cap touches them.
///
/// With a KV cache there are more keys than queries: a segment of T queries has S keys, and query t
/// of it stands at position `t + S - T` and sees no key after it; rows are not packed then.
///
/// # Shapes
/// q `[N, H · Dh]`, k `[N, K · Dh]` and v `[N, K · Dv]` (`[B · S, …]` with a cache), sinks `[H]`
/// → `[N, H · Dv]`, where N = B · T rows divide into `segments`
///
/// # Panics
/// If the widths do not fit `heads`, or the window holds no key.
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    sinks: Option<Tensor<1>>,
    heads: Heads,
    segments: &Segments,
) -> Tensor<2> {
    let widths = [&q, &k, &v].map(|x| x.dims()[1]);
    let expected = [heads.q_width(), heads.k_width(), heads.v_width()];
    assert_eq!(widths, expected, "columns of q, k and v for {heads:?}");
    let sink_count = sinks.as_ref().map_or(heads.heads, |sinks| sinks.dims()[0]);
    assert_eq!(sink_count, heads.heads, "sinks for {heads:?}");
    assert_ne!(heads.window, Some(0), "a window without keys");
    if is_fused(&q.device()) {
        let sinks = sinks.unwrap_or_else(|| Tensor::empty([0], &q.device()));
        Tensor::from_dispatch(Dispatch::fused_attention(
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            sinks.into_dispatch(),
            heads,
            segments.clone(),
        ))
    } else {
        reference(q, k, v, sinks, heads, segments)
    }
}

/// [`attention`] from plain tensor operations; holds `[B, H, T, S]` scores.
pub fn reference(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    sinks: Option<Tensor<1>>,
    heads: Heads,
    segments: &Segments,
) -> Tensor<2> {
    let (h, kv_heads, value_dim) = (heads.heads, heads.kv_heads, heads.value_dim);
    let b = segments.batch();
    let (t, s) = (q.dims()[0] / b, k.dims()[0] / b);
    let group = h / kv_heads;
    // [B·T, H·Dh] → [B, K, G, T, Dh] → [B·K, G·T, Dh]: the queries of a group share their keys.
    let q = q
        .reshape([b, t, kv_heads, group, heads.head_dim])
        .permute([0, 2, 3, 1, 4])
        .reshape([b * kv_heads, group * t, heads.head_dim]);
    let split = |x: Tensor<2>, dim: usize| -> Tensor<3> {
        x.reshape([b, s, kv_heads, dim])
            .permute([0, 2, 1, 3])
            .reshape([b * kv_heads, s, dim])
    };
    let (k, v) = (split(k, heads.head_dim), split(v, value_dim));
    let mut scores = q.matmul(k.swap_dims(1, 2)).mul_scalar(heads.scale); // [B·K, G·T, S]
    if let Some(cap) = heads.soft_cap {
        scores = scores.div_scalar(cap).tanh().mul_scalar(cap);
    }
    let scores = scores.reshape([b, h, t, s]);
    let hidden = hidden_keys(segments, (t, s), heads.window, &scores.device());
    // Finite instead of -inf: some devices turn inf - inf into NaN in the backward pass.
    let scores = scores.mask_fill(hidden.expand([b, h, t, s]), -1e30);
    let out = probabilities(scores, sinks)
        .reshape([b * kv_heads, group * t, s])
        .matmul(v); // [B·K, G·T, Dv]
    out.reshape([b, kv_heads, group, t, value_dim])
        .permute([0, 3, 1, 2, 4])
        .reshape([b * t, h * value_dim])
}

/// Softmax over the keys and the sink, whose share is dropped.
///
/// # Shapes
/// scores `[B, H, T, S]`, sinks `[H]` → `[B, H, T, S]`
fn probabilities(scores: Tensor<4>, sinks: Option<Tensor<1>>) -> Tensor<4> {
    let Some(sinks) = sinks else {
        return activation::softmax(scores, 3);
    };
    let [b, h, t, s] = scores.dims();
    let sinks = sinks.reshape([1, h, 1, 1]).expand([b, h, t, 1]);
    activation::softmax(Tensor::cat(vec![scores, sinks], 3), 3).narrow(3, 0, s)
}

/// Which keys each query must not see: later ones, those before its window and, in packed rows,
/// those of other segments.
///
/// # Shapes
/// `[1, 1, T, S]`, or `[B, 1, T, T]` where rows are packed
fn hidden_keys(
    segments: &Segments,
    (t, s): (usize, usize),
    window: Option<usize>,
    device: &Device,
) -> Tensor<4, Bool> {
    let position = Tensor::<1, Int>::arange((s - t) as i64..s as i64, device)
        .reshape([t, 1])
        .expand([t, s]);
    let key = Tensor::<1, Int>::arange(0..s as i64, device)
        .reshape([1, s])
        .expand([t, s]);
    let mut hidden = key.clone().greater(position.clone());
    if let Some(window) = window.filter(|window| *window < s) {
        hidden = hidden.bool_or(key.lower_equal(position.sub_scalar(window as i64)));
    }
    if !segments.is_packed() {
        return hidden.reshape([1, 1, t, s]);
    }
    let b = segments.batch();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(segments.ids(), [b * t]), device);
    let query = ids.clone().reshape([b, 1, t, 1]).expand([b, 1, t, t]);
    let key = ids.reshape([b, 1, 1, t]).expand([b, 1, t, t]);
    let hidden = hidden.reshape([1, 1, t, t]).expand([b, 1, t, t]);
    query.not_equal(key).bool_or(hidden)
}

/// Queries in one block: the scores of a block against 4,096 keys are 1 MiB.
const BLOCK: usize = 64;

/// Parts that the work is cut into, by thread: enough to even out what each part takes.
const PARTS_BY_THREAD: usize = 8;

/// Calls `run` for each of `costs` with each of `heads` on all threads, in parts of about equal
/// cost; each part has a scratch memory and takes one head.
fn share_out<S: Default>(
    costs: impl IntoIterator<Item = usize>,
    heads: usize,
    run: impl Fn(&mut S, usize, usize) + Sync,
) {
    let parts = PARTS_BY_THREAD * rayon::current_num_threads();
    let runs = balanced(costs, parts.div_ceil(heads.max(1)));
    (0..runs.len() * heads)
        .into_par_iter()
        .with_max_len(1)
        .for_each(|part| {
            let mut scratch = S::default();
            for task in runs[part / heads].clone() {
                run(&mut scratch, task, part % heads);
            }
        });
}

/// Columns of head `head` of the rows from `row` on.
fn head_of<'a>(
    data: &'a [f32],
    (row, rows): (usize, usize),
    width: usize,
    (head, head_dim): (usize, usize),
) -> Matrix<'a> {
    Matrix::strided(
        &data[row * width + head * head_dim..],
        rows,
        head_dim,
        width,
    )
}

fn rows(x: &FlexTensor) -> usize {
    x.layout().shape().dims::<2>()[0]
}

/// `cap · tanh(score / cap)`, and the tangent.
#[inline(always)]
fn capped(score: f32, cap: f32) -> (f32, f32) {
    let tangent = flex::tanh(score / cap);
    (cap * tangent, tangent)
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: KernelGradients> Backward<B, 4> for AttentionBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let wants_sinks = ops.parents[3].is_some();
        let ([dq, dk, dv], d_sinks) = B::attention_backward(ops.state, grad, wants_sinks);
        let gradients = [Some(dq), Some(dk), Some(dv), d_sinks];
        for (node, grad) in ops.parents.into_iter().zip(gradients) {
            if let (Some(node), Some(grad)) = (node, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    q: FloatTensor<Autodiff<B, C>>,
    k: FloatTensor<Autodiff<B, C>>,
    v: FloatTensor<Autodiff<B, C>>,
    sinks: FloatTensor<Autodiff<B, C>>,
    heads: Heads,
    segments: Segments,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [q.node(), k.node(), v.node(), sinks.node()];
    let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
    let sinks = sinks.into_primitive();
    match AttentionBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let inputs = (q.clone(), k.clone(), v.clone(), sinks.clone());
            let (out, lse) =
                B::attention_forward(inputs.0, inputs.1, inputs.2, inputs.3, heads, &segments);
            let saved = Saved {
                q,
                k,
                v,
                sinks,
                out: out.clone(),
                lse,
                heads,
                segments,
            };
            prep.finish(saved, out)
        }
        OpsKind::UnTracked(prep) => {
            prep.finish(B::fused_attention(q, k, v, sinks, heads, segments))
        }
    }
}
