//! The fused CPU kernel: output and log-sum-exp, block by block of queries.

use std::ops::Range;

use burn_flex::FlexTensor;

use super::{BLOCK, Heads, capped, head_of, rows, share_out};
use crate::kernels::flex::{self, Matrix, Shared, Store};
use crate::kernels::segments::{QueryBlock, Segments};

/// Output, and the log-sum-exp of each query's scores and sink, `[H, N]`.
pub(in crate::kernels) fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    sinks: FlexTensor,
    heads: Heads,
    segments: &Segments,
) -> (FlexTensor, FlexTensor) {
    let n = segments.tokens();
    assert_eq!(rows(&q), n, "queries of {segments:?}");
    let past = segments.past(rows(&k));
    let [q, k, v, sinks] = [q, k, v, sinks].map(flex::contiguous);
    let out_width = heads.out_width();
    let (mut out, mut lse) = (vec![0f32; n * out_width], vec![0f32; heads.heads * n]);
    let pass = ForwardPass {
        heads,
        n,
        q: flex::elements(&q),
        k: flex::elements(&k),
        v: flex::elements(&v),
        sinks: flex::elements(&sinks),
        out: Shared::new(&mut out),
        lse: Shared::new(&mut lse),
    };
    let blocks = segments.blocks(BLOCK, past, heads.window);
    let blocks: Vec<QueryBlock> = blocks.flatten().collect();
    let costs = blocks.iter().map(QueryBlock::cost);
    share_out(costs, heads.heads, |scores, i, head| {
        pass.block(scores, blocks[i], head)
    });
    (
        flex::tensor(out, [n, out_width]),
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
    /// Of each query head, or none at all.
    sinks: &'a [f32],
    out: Shared,
    lse: Shared,
}

impl ForwardPass<'_> {
    /// One block of queries of one head.
    fn block(&self, scores: &mut Vec<f32>, block: QueryBlock, head: usize) {
        let (heads, out_width) = (self.heads, self.heads.out_width());
        let (d, value_dim, seen) = (heads.head_dim, heads.value_dim, block.keys());
        scores.clear();
        scores.resize(block.queries * seen, 0f32);
        let kv_head = head / (heads.heads / heads.kv_heads);
        let (kv_rows, q_rows) = ((block.key, seen), (block.query, block.queries));
        let keys = head_of(self.k, kv_rows, heads.k_width(), (kv_head, d));
        let values = head_of(self.v, kv_rows, heads.v_width(), (kv_head, value_dim));
        let queries = head_of(self.q, q_rows, heads.q_width(), (head, d));
        let one = gemm::Parallelism::None;
        flex::matmul(
            scores,
            seen,
            Store::Set,
            heads.scale,
            (queries, keys.t()),
            one,
        );
        // A sink at -∞ takes nothing.
        let sink = self.sinks.get(head).copied().unwrap_or(f32::NEG_INFINITY);
        let lse_at = head * self.n + block.query;
        for (i, row) in scores.chunks_exact_mut(seen).enumerate() {
            let value = flex::vectorised(
                #[inline(always)]
                || softmax_row(row, block.visible(i), heads.soft_cap, sink),
            );
            // SAFETY: each task owns the rows of its block and head.
            unsafe { *self.lse.at(lse_at + i) = value };
        }
        let probs = Matrix::new(scores, block.queries, seen);
        // SAFETY: as above; the rows of a block and head are written by this task alone.
        unsafe {
            let out = self.out.at(block.query * out_width + head * value_dim);
            flex::matmul_raw(out, out_width, Store::Set, 1.0, (probs, values), one)
        };
    }
}

/// Turns the `visible` scores into probabilities, the rest into 0; returns their log-sum-exp.
#[inline(always)]
fn softmax_row(row: &mut [f32], visible: Range<usize>, soft_cap: Option<f32>, sink: f32) -> f32 {
    let (row, later) = row.split_at_mut(visible.end);
    let (earlier, seen) = row.split_at_mut(visible.start);
    if let Some(cap) = soft_cap {
        for x in seen.iter_mut() {
            *x = capped(*x, cap).0;
        }
    }
    let max = maximum(seen).max(sink);
    for x in seen.iter_mut() {
        *x = flex::exp(*x - max);
    }
    let sum = total(seen) + flex::exp(sink - max);
    let scale = 1.0 / sum;
    for x in seen.iter_mut() {
        *x *= scale;
    }
    earlier.fill(0.0);
    later.fill(0.0);
    max + sum.ln()
}

/// The largest element, in lanes that become vector code; NaN if there is one.
#[inline(always)]
pub(in crate::kernels) fn maximum(values: &[f32]) -> f32 {
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
pub(in crate::kernels) fn total(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += x;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}
