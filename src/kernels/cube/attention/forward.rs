//! Output and log-sum-exp: one cube a tile of queries and head, which takes block after block of
//! keys and rescales what it has when a larger score comes (the online softmax of arXiv 1805.02867).

use cubecl::prelude::*;

use super::memory::{Column, Memory, put_columns, rows_of, unit_x, unit_y};
use super::results::{Results, accumulate, no_results, product, scale_rows, write_rows};
use super::scores::{HIDDEN, exp_of, hide, share_column, shared_column, to_scores, visible};
use super::tile::{Tile, UNIT_ROWS};

/// How far scores may be above what their exponentials count from: these stay below e⁸.
const LAG: f32 = 8.0;

/// # Shapes
/// q `[N, H · Dh]`, k `[S, K · Dh]`, v `[S, K · Dv]`, sinks `[H]`, spans `[N + S, 2]`
/// → out `[N, H · Dv]`, lse `[H, N]`
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn forward_kernel<E: Float, N: Size>(
    q: &[Vector<f32, N>],
    k: &[Vector<f32, N>],
    v: &[Vector<f32, N>],
    sinks: &[f32],
    spans: &[u32],
    out: &mut [Vector<f32, N>],
    lse: &mut [f32],
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    scale: f32,
    cap: f32,
    #[comptime] tile: Tile,
    #[comptime] has_sinks: bool,
    #[define(E)] _element: ElemType,
) {
    let mut memory = Memory::<E, N>::new(tile);
    let (head_dim, value_dim) = (comptime!(tile.head_dim), comptime!(tile.value_dim));
    let len = comptime!(UNIT_ROWS * tile.unit_cols());
    let head = CUBE_POS_Y as usize;
    let kv_head = head / (heads / kv_heads);
    // The last rows see most: they come first.
    let after = (tokens - 1) / comptime!(tile.rows) - CUBE_POS_X as usize;
    let first = after * comptime!(tile.rows);
    let last = min(first + comptime!(tile.rows), tokens) - 1;
    let end = usize::cast_from(spans[last * 2 + 1]);
    let q_rows = rows_of(first, tokens, head, heads, head_dim);
    let seen = visible(spans, 0, first, tokens, tile);

    let mut sink = HIDDEN.runtime();
    if comptime!(has_sinks) {
        sink = max(sinks[head], HIDDEN);
    }
    let mut tops = Array::<f32>::new(comptime!(UNIT_ROWS));
    let mut sums = Array::<f32>::new(comptime!(UNIT_ROWS));
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        tops[i] = sink;
        sums[i] = 0.0f32;
    }
    let mut scores = Array::<f32>::new(len);
    let mut slopes = Array::<f32>::new(len);
    let mut result = no_results::<N>(tile, value_dim);
    let mut key = usize::cast_from(spans[first * 2]);
    while key < end {
        let k_rows = rows_of(key, end, kv_head, kv_heads, head_dim);
        product(
            q,
            &q_rows,
            k,
            &k_rows,
            &mut memory,
            &mut scores,
            tile,
            head_dim,
        );
        to_scores(&mut scores, &mut slopes, scale, cap, tile);
        hide(&mut scores, &seen, key, tile);
        raise(
            &mut scores,
            &mut tops,
            &mut sums,
            &mut result,
            &mut memory,
            tile,
        );
        put_columns(&scores, &mut memory, tile);
        let v_rows = rows_of(key, end, kv_head, kv_heads, value_dim);
        accumulate(v, &v_rows, &mut memory, &mut result, tile, value_dim);
        key += comptime!(tile.cols);
    }
    add_up(&mut sums, &mut memory, tile);
    let mut factors = Array::<f32>::new(comptime!(UNIT_ROWS));
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        if comptime!(has_sinks) {
            sums[i] += (sink - tops[i]).exp();
        }
        let row = first + unit_y(tile) * comptime!(UNIT_ROWS) + i;
        if row < tokens && unit_x(tile) == 0 {
            lse[head * tokens + row] = tops[i] + sums[i].ln();
        }
        // A row past the last sees nothing, and is not written.
        factors[i] = 1.0f32 / max(sums[i], 1e-30f32);
    }
    scale_rows(&mut result, &factors, &mut memory, tile, value_dim);
    let out_rows = rows_of(first, tokens, head, heads, value_dim);
    write_rows(
        &result,
        1.0f32,
        out,
        &out_rows,
        &mut memory,
        tile,
        value_dim,
    );
}

/// Turns scores into `exp(score - top)`, where `top` is the largest so far of each row or, on tensor
/// cores, one not far below, and brings sums (of this unit's columns) and results so far to it.
#[cube]
fn raise<E: Float, N: Size>(
    scores: &mut Array<f32>,
    tops: &mut Array<f32>,
    sums: &mut Array<f32>,
    result: &mut Results<N>,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
) {
    let cols = comptime!(tile.unit_cols());
    let mut top = Column::new(0.0f32);
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        let mut largest = tops[i];
        #[unroll]
        for j in 0..cols {
            largest = max(largest, scores[i * cols + j]);
        }
        top.insert(i, largest);
    }
    share_column(top, memory, tile);
    for x in 0..comptime!(tile.units_x) {
        let other = shared_column(&*memory, x, tile);
        #[unroll]
        for i in 0..comptime!(UNIT_ROWS) {
            top.insert(i, max(top.extract(i), other.extract(i)));
        }
    }
    // Nobody may write there before all have read.
    sync_cube();
    if comptime!(tile.fragment > 0) {
        // To scale what stands in fragments is dear: done only if some row has grown by much.
        if has_grown(&*tops, &top, memory, tile) {
            grow(tops, sums, &top, result, memory, tile);
        }
    } else {
        grow(tops, sums, &top, result, memory, tile);
    }
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        let mut sum = sums[i];
        #[unroll]
        for j in 0..cols {
            let weight = exp_of(scores[i * cols + j], tops[i]);
            scores[i * cols + j] = weight;
            sum += weight;
        }
        sums[i] = sum;
    }
}

/// Brings sums and results to new tops.
#[cube]
fn grow<E: Float, N: Size>(
    tops: &mut Array<f32>,
    sums: &mut Array<f32>,
    new: &Column,
    result: &mut Results<N>,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
) {
    let mut factors = Array::<f32>::new(comptime!(UNIT_ROWS));
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        let top = new.extract(i);
        factors[i] = (tops[i] - top).exp();
        sums[i] *= factors[i];
        tops[i] = top;
    }
    scale_rows(result, &factors, memory, tile, tile.value_dim);
}

/// Whether a row of the tile has scores so far above its top that it must follow; the same for all
/// units.
#[cube]
fn has_grown<E: Float, N: Size>(
    tops: &Array<f32>,
    new: &Column,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
) -> bool {
    let mut growth = 0.0f32;
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        growth = max(growth, new.extract(i) - tops[i]);
    }
    if unit_x(tile) == 0 {
        memory.exchange[unit_y(tile)] = Column::new(growth);
    }
    sync_cube();
    for y in 0..comptime!(tile.units_y()) {
        growth = max(growth, memory.exchange[y].extract(0usize));
    }
    sync_cube();
    growth > LAG
}

/// Each row's sum over the units that have columns of it, for each of them.
#[cube]
fn add_up<E: Float, N: Size>(
    sums: &mut Array<f32>,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
) {
    let mut own = Column::new(0.0f32);
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        own.insert(i, sums[i]);
        sums[i] = 0.0f32;
    }
    share_column(own, memory, tile);
    for x in 0..comptime!(tile.units_x) {
        let other = shared_column(&*memory, x, tile);
        #[unroll]
        for i in 0..comptime!(UNIT_ROWS) {
            sums[i] += other.extract(i);
        }
    }
}
