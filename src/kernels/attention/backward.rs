//! The fused CPU kernel's gradients, from probabilities computed again.

use std::ops::Range;

use burn_flex::{Flex, FlexTensor};
use rayon::prelude::*;

use super::{BLOCK, Heads, Saved, capped, head_of, rows, share_out};
use crate::kernels::flex::{self, Matrix, Shared, Store};
use crate::kernels::segments::QueryBlock;

/// Gradients of q, k, v and, when wanted, of the sinks: one task a segment and key head, so that no
/// two tasks add to one row.
pub(in crate::kernels) fn backward(
    saved: Saved<Flex>,
    grad: FlexTensor,
    wants_sinks: bool,
) -> ([FlexTensor; 3], Option<FlexTensor>) {
    let (heads, segments) = (saved.heads, saved.segments);
    let (n, keys) = (segments.tokens(), rows(&saved.k));
    let past = segments.past(keys);
    let [q, k, v, out, lse, grad, sinks] = [
        saved.q,
        saved.k,
        saved.v,
        saved.out,
        saved.lse,
        grad,
        saved.sinks,
    ]
    .map(flex::contiguous);
    let (q_width, k_width, v_width) = (heads.q_width(), heads.k_width(), heads.v_width());
    let mut dq = vec![0f32; n * q_width];
    let (mut dk, mut dv) = (vec![0f32; keys * k_width], vec![0f32; keys * v_width]);
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
    let blocks = segments.blocks(BLOCK, past, heads.window);
    let blocks: Vec<Vec<QueryBlock>> = blocks.collect();
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
    let d_sinks = wants_sinks.then(|| pass.sinks(flex::elements(&sinks)));
    let qkv = [
        flex::tensor(dq, [n, q_width]),
        flex::tensor(dk, [keys, k_width]),
        flex::tensor(dv, [keys, v_width]),
    ];
    (qkv, d_sinks)
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
        let (heads, scale) = (self.heads, self.heads.scale);
        let (q_width, k_width, v_width) = (heads.q_width(), heads.k_width(), heads.v_width());
        let (d, value_dim) = (heads.head_dim, heads.value_dim);
        let (count, seen) = (block.queries, block.keys());
        let (q_rows, kv_rows) = ((block.query, count), (block.key, seen));
        let queries = head_of(self.q, q_rows, q_width, (head, d));
        let grads = head_of(self.grad, q_rows, heads.out_width(), (head, value_dim));
        let keys = head_of(self.k, kv_rows, k_width, (kv_head, d));
        let values = head_of(self.v, kv_rows, v_width, (kv_head, value_dim));
        let one = gemm::Parallelism::None;
        for buffer in [&mut *probs, &mut *d_scores] {
            buffer.clear();
            buffer.resize(count * seen, 0f32);
        }
        flex::matmul(probs, seen, Store::Set, scale, (queries, keys.t()), one);
        flex::matmul(d_scores, seen, Store::Set, 1.0, (grads, values.t()), one);
        flex::vectorised(
            #[inline(always)]
            || {
                let rows = probs
                    .chunks_exact_mut(seen)
                    .zip(d_scores.chunks_exact_mut(seen));
                for (i, row) in rows.enumerate() {
                    let at = (
                        self.lse_of(head, block.query + i),
                        self.delta(head, block.query + i),
                    );
                    scores_backward(row, block.visible(i), at, heads.soft_cap);
                }
            },
        );
        let (p, ds) = (
            Matrix::new(probs, count, seen),
            Matrix::new(d_scores, count, seen),
        );
        // SAFETY: dq's rows belong to this block and head; dk's and dv's columns of a segment and
        // key head belong to the one task that runs all its blocks in turn.
        unsafe {
            let (dq, dk, dv) = (
                self.dq.at(block.query * q_width + head * d),
                self.dk.at(block.key * k_width + kv_head * d),
                self.dv.at(block.key * v_width + kv_head * value_dim),
            );
            flex::matmul_raw(dq, q_width, Store::Set, scale, (ds, keys), one);
            flex::matmul_raw(dk, k_width, Store::Add, scale, (ds.t(), queries), one);
            flex::matmul_raw(dv, v_width, Store::Add, 1.0, (p.t(), grads), one);
        }
    }

    #[inline(always)]
    fn lse_of(&self, head: usize, row: usize) -> f32 {
        self.lse[head * self.n + row]
    }

    /// `Σ o g` over the columns of a head in a row: the mean of `dp` under the probabilities.
    #[inline(always)]
    fn delta(&self, head: usize, row: usize) -> f32 {
        let at = row * self.heads.out_width() + head * self.heads.value_dim;
        let columns = at..at + self.heads.value_dim;
        let (out, grad) = (&self.out[columns.clone()], &self.grad[columns]);
        out.iter().zip(grad).map(|(o, g)| o * g).sum()
    }

    /// `ds = -Σ p Σ o g` over the rows, with the sink's probability p: its value is 0. Apart from
    /// the blocks, so that the order of the sum does not depend on the threads.
    fn sinks(&self, sinks: &[f32]) -> FlexTensor {
        let gradient = |(head, sink): (usize, &f32)| {
            let row = |row| (sink - self.lse_of(head, row)).exp() * self.delta(head, row);
            -(0..self.n).map(row).map(f64::from).sum::<f64>() as f32
        };
        let gradients: Vec<f32> = sinks.par_iter().enumerate().map(gradient).collect();
        flex::tensor(gradients, [sinks.len()])
    }
}

/// `p = exp(score - lse)`, `ds = p (dp - Σ o g)`, both 0 where the mask hides the key; a soft cap
/// multiplies ds by its slope, `1 - tanh²`.
#[inline(always)]
fn scores_backward(
    (p, ds): (&mut [f32], &mut [f32]),
    visible: Range<usize>,
    (lse, delta): (f32, f32),
    soft_cap: Option<f32>,
) {
    for row in [&mut *p, &mut *ds] {
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
    }
    let seen = p[visible.clone()].iter_mut().zip(&mut ds[visible]);
    match soft_cap {
        None => {
            for (p, ds) in seen {
                *p = flex::exp(*p - lse);
                *ds = *p * (*ds - delta);
            }
        }
        Some(cap) => {
            for (p, ds) in seen {
                let (score, tangent) = capped(*p, cap);
                *p = flex::exp(score - lse);
                *ds = *p * (*ds - delta) * (1.0 - tangent * tangent);
            }
        }
    }
}
