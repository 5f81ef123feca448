//! Causal grouped-query attention over segments: in each, `softmax(scale · q kᵀ + causal mask) v`.
//!
//! The fused kernel works through blocks of queries and only the keys of their segment that they
//! may see, so that no `[T, T]` matrix is ever held and packed samples cost no more than apart; the
//! backward pass computes the probabilities again from the log-sum-exp of each row
//! (FlashAttention-2, arXiv 2307.08691).

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::flex::{Matrix, Shared, Store};
use super::segments::{QueryBlock, Segments, balanced};
use super::{KernelGradients, Kernels, flex, is_cpu};

/// How the columns of q, k and v divide into heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// H, query heads.
    pub heads: usize,
    /// K, key and value heads; divides H. Query head h reads key head `h / (H / K)`.
    pub kv_heads: usize,
    /// Dh, width of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

impl Heads {
    /// Columns of q: H · Dh.
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of k and of v: K · Dh.
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub struct Saved<B: Backend> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    heads: Heads,
    segments: Segments,
}

/// Causal attention in which a query sees itself and the earlier keys of its own segment.
///
/// With a KV cache there are more keys than queries: a segment of T queries has S keys, and query t
/// of it sees its keys `0 ..= t + S - T`; rows are not packed then.
///
/// # Shapes
/// q `[N, H · Dh]`, k and v `[N, K · Dh]` (`[B · S, K · Dh]` with a cache) → `[N, H · Dh]`,
/// where N = B · T rows divide into `segments`
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    heads: Heads,
    segments: &Segments,
) -> Tensor<2> {
    if is_cpu(&q.device()) {
        Tensor::from_dispatch(Dispatch::fused_attention(
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            heads,
            segments.clone(),
        ))
    } else {
        reference(q, k, v, heads, segments)
    }
}

/// [`attention`] from plain tensor operations; holds `[B, H, T, S]` scores.
pub fn reference(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    heads: Heads,
    segments: &Segments,
) -> Tensor<2> {
    let Heads {
        heads: h,
        kv_heads,
        head_dim: d,
        scale,
    } = heads;
    let b = segments.batch();
    let (t, s) = (q.dims()[0] / b, k.dims()[0] / b);
    let group = h / kv_heads;
    // [B·T, H·Dh] → [B, K, G, T, Dh] → [B·K, G·T, Dh]: the queries of a group share their keys.
    let q = q
        .reshape([b, t, kv_heads, group, d])
        .permute([0, 2, 3, 1, 4])
        .reshape([b * kv_heads, group * t, d]);
    let split = |x: Tensor<2>| -> Tensor<3> {
        x.reshape([b, s, kv_heads, d])
            .permute([0, 2, 1, 3])
            .reshape([b * kv_heads, s, d])
    };
    let (k, v) = (split(k), split(v));
    let scores = q.matmul(k.swap_dims(1, 2)).mul_scalar(scale); // [B·K, G·T, S]
    let scores = scores.reshape([b, h, t, s]);
    let hidden = hidden_keys(segments, (t, s), &scores.device()).expand([b, h, t, s]);
    // Finite instead of -inf: some devices turn inf - inf into NaN in the backward pass.
    let scores = scores.mask_fill(hidden, -1e30);
    let out = activation::softmax(scores, 3)
        .reshape([b * kv_heads, group * t, s])
        .matmul(v); // [B·K, G·T, Dh]
    out.reshape([b, kv_heads, group, t, d])
        .permute([0, 3, 1, 2, 4])
        .reshape([b * t, h * d])
}

/// Which keys each query must not see: later ones and, in packed rows, those of other segments.
///
/// # Shapes
/// `[1, 1, T, S]`, or `[B, 1, T, T]` where rows are packed
fn hidden_keys(segments: &Segments, (t, s): (usize, usize), device: &Device) -> Tensor<4, Bool> {
    let query = Tensor::<1, Int>::arange(0..t as i64, device).reshape([t, 1]);
    let key = Tensor::<1, Int>::arange(0..s as i64, device).reshape([1, s]);
    let later = key
        .expand([t, s])
        .greater(query.add_scalar((s - t) as i64).expand([t, s]));
    if !segments.is_packed() {
        return later.reshape([1, 1, t, s]);
    }
    let b = segments.batch();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(segments.ids(), [b * t]), device);
    let query = ids.clone().reshape([b, 1, t, 1]).expand([b, 1, t, t]);
    let key = ids.reshape([b, 1, 1, t]).expand([b, 1, t, t]);
    let later = later.reshape([1, 1, t, t]).expand([b, 1, t, t]);
    query.not_equal(key).bool_or(later)
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

/// Output, and the log-sum-exp of each query's scores, `[H, N]`.
pub(super) fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    heads: Heads,
    segments: &Segments,
) -> (FlexTensor, FlexTensor) {
    let n = segments.tokens();
    assert_eq!(rows(&q), n, "queries of {segments:?}");
    let past = segments.past(rows(&k));
    let [q, k, v] = [q, k, v].map(flex::contiguous);
    let (mut out, mut lse) = (vec![0f32; n * heads.q_width()], vec![0f32; heads.heads * n]);
    let pass = ForwardPass {
        heads,
        n,
        q: flex::elements(&q),
        k: flex::elements(&k),
        v: flex::elements(&v),
        out: Shared::new(&mut out),
        lse: Shared::new(&mut lse),
    };
    let blocks: Vec<QueryBlock> = segments.blocks(BLOCK, past).flatten().collect();
    let costs = blocks.iter().map(QueryBlock::cost);
    share_out(costs, heads.heads, |scores, i, head| {
        pass.block(scores, blocks[i], head)
    });
    (
        flex::tensor(out, [n, heads.q_width()]),
        flex::tensor(lse, [heads.heads, n]),
    )
}

/// Everything one forward pass reads and writes.
struct ForwardPass<'a> {
    heads: Heads,
    n: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: Shared,
    lse: Shared,
}

impl ForwardPass<'_> {
    /// One block of queries of one head.
    fn block(&self, scores: &mut Vec<f32>, block: QueryBlock, head: usize) {
        let (heads, width) = (self.heads, self.heads.q_width());
        let (d, seen) = (heads.head_dim, block.keys());
        scores.clear();
        scores.resize(block.queries * seen, 0f32);
        let kv_head = (head / (heads.heads / heads.kv_heads), d);
        let keys = head_of(self.k, (block.key, seen), heads.kv_width(), kv_head);
        let values = head_of(self.v, (block.key, seen), heads.kv_width(), kv_head);
        let queries = head_of(self.q, (block.query, block.queries), width, (head, d));
        let one = gemm::Parallelism::None;
        flex::matmul(
            scores,
            seen,
            Store::Set,
            heads.scale,
            (queries, keys.t()),
            one,
        );
        let lse_at = head * self.n + block.query;
        for (i, row) in scores.chunks_exact_mut(seen).enumerate() {
            let value = flex::vectorised(
                #[inline(always)]
                || softmax_row(row, block.visible(i)),
            );
            // SAFETY: each task owns the rows of its block and head.
            unsafe { *self.lse.at(lse_at + i) = value };
        }
        let probs = Matrix::new(scores, block.queries, seen);
        // SAFETY: as above; the rows of a block and head are written by this task alone.
        unsafe {
            let out = self.out.at(block.query * width + head * d);
            flex::matmul_raw(out, width, Store::Set, 1.0, (probs, values), one)
        };
    }
}

/// Turns the first `visible` scores into probabilities, the rest into 0; returns their log-sum-exp.
#[inline(always)]
fn softmax_row(row: &mut [f32], visible: usize) -> f32 {
    let (seen, hidden) = row.split_at_mut(visible);
    let max = maximum(seen);
    for x in seen.iter_mut() {
        *x = flex::exp(*x - max);
    }
    let sum = total(seen);
    let scale = 1.0 / sum;
    for x in seen.iter_mut() {
        *x *= scale;
    }
    hidden.fill(0.0);
    max + sum.ln()
}

/// The largest element, in lanes that become vector code; NaN if there is one.
#[inline(always)]
pub(super) fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane = if *lane > *x { *lane } else { *x };
        }
    }
    let largest = |a: f32, b: &f32| if a > *b { a } else { *b };
    rest.iter()
        .fold(lanes.iter().fold(f32::NEG_INFINITY, largest), largest)
}

/// The sum, in lanes that become vector code.
#[inline(always)]
pub(super) fn total(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += x;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// Gradients of q, k and v: one task a segment and key head, so that no two tasks add to one row.
pub(super) fn backward(
    saved: Saved<burn_flex::Flex>,
    grad: FlexTensor,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (heads, segments) = (saved.heads, saved.segments);
    let (n, keys) = (segments.tokens(), rows(&saved.k));
    let past = segments.past(keys);
    let [q, k, v, out, lse, grad] =
        [saved.q, saved.k, saved.v, saved.out, saved.lse, grad].map(flex::contiguous);
    let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
    let mut dq = vec![0f32; n * q_width];
    let (mut dk, mut dv) = (vec![0f32; keys * kv_width], vec![0f32; keys * kv_width]);
    let pass = BackwardPass {
        heads,
        n,
        q: flex::elements(&q),
        k: flex::elements(&k),
        v: flex::elements(&v),
        out: flex::elements(&out),
        lse: flex::elements(&lse),
        grad: flex::elements(&grad),
        dq: Shared::new(&mut dq),
        dk: Shared::new(&mut dk),
        dv: Shared::new(&mut dv),
    };
    let blocks: Vec<Vec<QueryBlock>> = segments.blocks(BLOCK, past).collect();
    let costs = blocks
        .iter()
        .map(|blocks| blocks.iter().map(QueryBlock::cost).sum());
    let group = heads.heads / heads.kv_heads;
    share_out(costs, heads.kv_heads, |scratch, i, kv_head| {
        for head in kv_head * group..(kv_head + 1) * group {
            for block in &blocks[i] {
                pass.block(scratch, *block, (head, kv_head));
            }
        }
    });
    (
        flex::tensor(dq, [n, q_width]),
        flex::tensor(dk, [keys, kv_width]),
        flex::tensor(dv, [keys, kv_width]),
    )
}

/// Everything one backward pass reads and writes.
struct BackwardPass<'a> {
    heads: Heads,
    n: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    grad: &'a [f32],
    dq: Shared,
    dk: Shared,
    dv: Shared,
}

impl BackwardPass<'_> {
    /// One block of queries of one head: writes its dq, adds to dk and dv of its key head.
    fn block(
        &self,
        (probs, d_scores): &mut (Vec<f32>, Vec<f32>),
        block: QueryBlock,
        (head, kv_head): (usize, usize),
    ) {
        let (q_width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        let (scale, d) = (self.heads.scale, self.heads.head_dim);
        let (count, seen) = (block.queries, block.keys());
        let queries = head_of(self.q, (block.query, count), q_width, (head, d));
        let grads = head_of(self.grad, (block.query, count), q_width, (head, d));
        let keys = head_of(self.k, (block.key, seen), kv_width, (kv_head, d));
        let values = head_of(self.v, (block.key, seen), kv_width, (kv_head, d));
        let one = gemm::Parallelism::None;
        for buffer in [&mut *probs, &mut *d_scores] {
            buffer.clear();
            buffer.resize(count * seen, 0f32);
        }
        flex::matmul(probs, seen, Store::Set, scale, (queries, keys.t()), one);
        flex::matmul(d_scores, seen, Store::Set, 1.0, (grads, values.t()), one);
        let place = block.query * q_width + head * d;
        let lse_at = head * self.n + block.query;
        flex::vectorised(
            #[inline(always)]
            || {
                let rows = probs
                    .chunks_exact_mut(seen)
                    .zip(d_scores.chunks_exact_mut(seen));
                for (i, (p, ds)) in rows.enumerate() {
                    let at = place + i * q_width;
                    let (o, g) = (&self.out[at..at + d], &self.grad[at..at + d]);
                    let delta: f32 = o.iter().zip(g).map(|(o, g)| o * g).sum();
                    scores_backward((p, ds), block.visible(i), self.lse[lse_at + i], delta);
                }
            },
        );
        let (p, ds) = (
            Matrix::new(probs, count, seen),
            Matrix::new(d_scores, count, seen),
        );
        let kv_place = block.key * kv_width + kv_head * d;
        // SAFETY: dq's rows belong to this block and head; dk's and dv's columns of a segment and
        // key head belong to the one task that runs all its blocks in turn.
        unsafe {
            let (dq, dk, dv) = (
                self.dq.at(place),
                self.dk.at(kv_place),
                self.dv.at(kv_place),
            );
            flex::matmul_raw(dq, q_width, Store::Set, scale, (ds, keys), one);
            flex::matmul_raw(dk, kv_width, Store::Add, scale, (ds.t(), queries), one);
            flex::matmul_raw(dv, kv_width, Store::Add, 1.0, (p.t(), grads), one);
        }
    }
}

/// `p = exp(score - lse)`, `ds = p (dp - Σ o g)`, both 0 where the mask hides the key.
#[inline(always)]
fn scores_backward((p, ds): (&mut [f32], &mut [f32]), visible: usize, lse: f32, delta: f32) {
    for (p, ds) in p[..visible].iter_mut().zip(&mut ds[..visible]) {
        *p = flex::exp(*p - lse);
        *ds = *p * (*ds - delta);
    }
    p[visible..].fill(0.0);
    ds[visible..].fill(0.0);
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: KernelGradients> Backward<B, 3> for AttentionBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (dq, dk, dv) = B::attention_backward(ops.state, grad);
        for (node, grad) in ops.parents.into_iter().zip([dq, dk, dv]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    q: FloatTensor<Autodiff<B, C>>,
    k: FloatTensor<Autodiff<B, C>>,
    v: FloatTensor<Autodiff<B, C>>,
    heads: Heads,
    segments: Segments,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [q.node(), k.node(), v.node()];
    let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
    match AttentionBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let (out, lse) =
                B::attention_forward(q.clone(), k.clone(), v.clone(), heads, &segments);
            let saved = Saved {
                q,
                k,
                v,
                out: out.clone(),
                lse,
                heads,
                segments,
            };
            prep.finish(saved, out)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::fused_attention(q, k, v, heads, segments)),
    }
}
