//! Causal grouped-query attention: `softmax(scale · q kᵀ + causal mask) v`.
//!
//! The fused kernel works through blocks of queries and only the keys they may see, so that no
//! `[T, T]` matrix is ever held; the backward pass computes the probabilities again from the
//! log-sum-exp of each row (FlashAttention-2, arXiv 2307.08691).

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch};
use burn::tensor::{Tensor, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::flex::{Matrix, Shared, Store};
use super::{KernelGradients, Kernels, flex, is_cpu};

/// How the columns of q, k and v divide into heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// B, samples that lie one after the other in the rows.
    pub batch: usize,
    /// H, query heads.
    pub heads: usize,
    /// K, key and value heads; divides H. Query head h reads key head `h / (H / K)`.
    pub kv_heads: usize,
    /// Dh, width of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
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
}

/// Causal attention in which query t of a sample sees its keys `0 ..= t + S - T`.
///
/// With a KV cache S exceeds T and the queries are the last T positions. Padding on the right of
/// a sample needs no mask: no earlier position sees it.
///
/// # Shapes
/// q `[B · T, H · Dh]`, k and v `[B · S, K · Dh]` → `[B · T, H · Dh]`
pub fn attention(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, heads: Heads) -> Tensor<2> {
    if is_cpu(&q.device()) {
        Tensor::from_dispatch(Dispatch::fused_attention(
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            heads,
        ))
    } else {
        reference(q, k, v, heads)
    }
}

/// [`attention`] from plain tensor operations; holds `[B, H, T, S]` scores.
pub fn reference(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, heads: Heads) -> Tensor<2> {
    let Heads {
        batch: b,
        heads: h,
        kv_heads,
        head_dim: d,
        scale,
    } = heads;
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
    let scores = scores.reshape([b * kv_heads, group, t, s]);
    let device = scores.device();
    let query = Tensor::<1, burn::tensor::Int>::arange(0..t as i64, &device).reshape([t, 1]);
    let key = Tensor::<1, burn::tensor::Int>::arange(0..s as i64, &device).reshape([1, s]);
    let hidden = key
        .expand([t, s])
        .greater(query.add_scalar((s - t) as i64).expand([t, s]));
    let hidden = hidden
        .reshape([1, 1, t, s])
        .expand([b * kv_heads, group, t, s]);
    // Finite instead of -inf: some devices turn inf - inf into NaN in the backward pass.
    let scores = scores.mask_fill(hidden, -1e30);
    let out = activation::softmax(scores, 3)
        .reshape([b * kv_heads, group * t, s])
        .matmul(v); // [B·K, G·T, Dh]
    out.reshape([b, kv_heads, group, t, d])
        .permute([0, 3, 1, 2, 4])
        .reshape([b * t, h * d])
}

/// Queries in one block: the scores of a block against 4,096 keys are 1 MiB.
const BLOCK: usize = 64;

/// Sizes of one call, with the row widths of q and of k and v.
#[derive(Clone, Copy)]
struct Sizes {
    t: usize,
    s: usize,
    q_width: usize,
    kv_width: usize,
}

impl Sizes {
    fn new(q: &FlexTensor, k: &FlexTensor, heads: Heads) -> Self {
        let rows = |x: &FlexTensor| x.layout().shape().dims::<2>()[0] / heads.batch.max(1);
        Self {
            t: rows(q),
            s: rows(k),
            q_width: heads.heads * heads.head_dim,
            kv_width: heads.kv_heads * heads.head_dim,
        }
    }

    /// Keys that query `i` sees.
    fn visible(&self, i: usize) -> usize {
        i + 1 + self.s - self.t
    }
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

pub(super) fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    heads: Heads,
) -> (FlexTensor, FlexTensor) {
    let (q, k, v) = (
        flex::contiguous(q),
        flex::contiguous(k),
        flex::contiguous(v),
    );
    let sizes = Sizes::new(&q, &k, heads);
    let Sizes { t, s, q_width, .. } = sizes;
    let mut out = vec![0f32; heads.batch * t * q_width];
    let mut lse = vec![0f32; heads.batch * heads.heads * t];
    let (out_ptr, lse_ptr) = (Shared::new(&mut out), Shared::new(&mut lse));
    let (q, k, v) = (flex::elements(&q), flex::elements(&k), flex::elements(&v));
    let blocks = t.div_ceil(BLOCK);
    let group = heads.heads / heads.kv_heads;
    (0..heads.batch * heads.heads * blocks)
        .into_par_iter()
        .for_each_init(Vec::new, |scores, task| {
            let (block, head) = (task % blocks, task / blocks % heads.heads);
            let sample = task / blocks / heads.heads;
            let first = block * BLOCK;
            let rows = BLOCK.min(t - first);
            let seen = sizes.visible(first + rows - 1);
            scores.clear();
            scores.resize(rows * seen, 0f32);
            let kv_head = (head / group, heads.head_dim);
            let keys = head_of(k, (sample * s, seen), sizes.kv_width, kv_head);
            let values = head_of(v, (sample * s, seen), sizes.kv_width, kv_head);
            let place = (sample * t + first) * q_width + head * heads.head_dim;
            let queries = Matrix::strided(&q[place..], rows, heads.head_dim, q_width);
            let one = gemm::Parallelism::None;
            flex::matmul(
                scores,
                seen,
                Store::Set,
                heads.scale,
                (queries, keys.t()),
                one,
            );
            let lse_at = (sample * heads.heads + head) * t + first;
            for (i, row) in scores.chunks_exact_mut(seen).enumerate() {
                let visible = sizes.visible(first + i);
                let value = flex::vectorised(
                    #[inline(always)]
                    || softmax_row(row, visible),
                );
                // SAFETY: each task owns the rows of its block and head.
                unsafe { *lse_ptr.at(lse_at + i) = value };
            }
            // SAFETY: as above; the rows of a block and head are written by this task alone.
            unsafe {
                flex::matmul_raw(
                    out_ptr.at(place),
                    q_width,
                    Store::Set,
                    1.0,
                    (Matrix::new(scores, rows, seen), values),
                    one,
                )
            };
        });
    (
        flex::tensor(out, [heads.batch * t, q_width]),
        flex::tensor(lse, [heads.batch, heads.heads, t]),
    )
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

/// Gradients of q, k and v: one task a sample and key head, so that no two tasks add to one row.
pub(super) fn backward(
    saved: Saved<burn_flex::Flex>,
    grad: FlexTensor,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let heads = saved.heads;
    let sizes = Sizes::new(&saved.q, &saved.k, heads);
    let [q, k, v, out, lse, grad] =
        [saved.q, saved.k, saved.v, saved.out, saved.lse, grad].map(flex::contiguous);
    let (q_len, kv_len) = (
        heads.batch * sizes.t * sizes.q_width,
        heads.batch * sizes.s * sizes.kv_width,
    );
    let (mut dq, mut dk, mut dv) = (vec![0f32; q_len], vec![0f32; kv_len], vec![0f32; kv_len]);
    let pass = BackwardPass {
        heads,
        sizes,
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
    (0..heads.batch * heads.kv_heads)
        .into_par_iter()
        .for_each_init(Default::default, |scratch, task| {
            let (sample, kv_head) = (task / heads.kv_heads, task % heads.kv_heads);
            let group = heads.heads / heads.kv_heads;
            for head in kv_head * group..(kv_head + 1) * group {
                for first in (0..sizes.t).step_by(BLOCK) {
                    pass.block(scratch, sample, (head, kv_head), first);
                }
            }
        });
    let shape = |width: usize, rows: usize| [heads.batch * rows, width];
    (
        flex::tensor(dq, shape(sizes.q_width, sizes.t)),
        flex::tensor(dk, shape(sizes.kv_width, sizes.s)),
        flex::tensor(dv, shape(sizes.kv_width, sizes.s)),
    )
}

/// Everything one backward pass reads and writes.
struct BackwardPass<'a> {
    heads: Heads,
    sizes: Sizes,
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
        sample: usize,
        (head, kv_head): (usize, usize),
        first: usize,
    ) {
        let Sizes {
            t,
            s,
            q_width,
            kv_width,
        } = self.sizes;
        let d = self.heads.head_dim;
        let rows = BLOCK.min(t - first);
        let seen = self.sizes.visible(first + rows - 1);
        let place = (sample * t + first) * q_width + head * d;
        let queries = Matrix::strided(&self.q[place..], rows, d, q_width);
        let grads = Matrix::strided(&self.grad[place..], rows, d, q_width);
        let keys = head_of(self.k, (sample * s, seen), kv_width, (kv_head, d));
        let values = head_of(self.v, (sample * s, seen), kv_width, (kv_head, d));
        let one = gemm::Parallelism::None;
        for buffer in [&mut *probs, &mut *d_scores] {
            buffer.clear();
            buffer.resize(rows * seen, 0f32);
        }
        flex::matmul(
            probs,
            seen,
            Store::Set,
            self.heads.scale,
            (queries, keys.t()),
            one,
        );
        flex::matmul(d_scores, seen, Store::Set, 1.0, (grads, values.t()), one);
        let lse_at = (sample * self.heads.heads + head) * t + first;
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
                    let visible = self.sizes.visible(first + i);
                    scores_backward((p, ds), visible, self.lse[lse_at + i], delta);
                }
            },
        );
        let (p, ds) = (
            Matrix::new(probs, rows, seen),
            Matrix::new(d_scores, rows, seen),
        );
        let kv_place = sample * s * kv_width + kv_head * d;
        let scale = self.heads.scale;
        // SAFETY: dq's rows belong to this block and head; dk's and dv's columns of a sample and
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
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [q.node(), k.node(), v.node()];
    let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
    match AttentionBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let (out, lse) = B::attention_forward(q.clone(), k.clone(), v.clone(), heads);
            let saved = Saved {
                q,
                k,
                v,
                out: out.clone(),
                lse,
                heads,
            };
            prep.finish(saved, out)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::fused_attention(q, k, v, heads)),
    }
}
