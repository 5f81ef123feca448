//! Gradients, from probabilities computed again: `dq` by tiles of queries, `dk` and `dv` by tiles of
//! keys, so that each is summed by one cube in one order. Both need `Σ o g` of each row, the mean of
//! `dp` under its probabilities.

use cubecl::prelude::*;

use super::memory::{Memory, put_columns, rows_of, unit_x, unit_y};
use super::results::{accumulate, no_results, product, write_rows};
use super::scores::{exp_of, hide, to_scores, visible};
use super::tile::{Tile, UNIT_ROWS};
use crate::kernels::cube::cube_sum;

/// Units that add up one row of one head.
pub(super) const LANES: usize = 16;

/// Log-sum-exp and `Σ o g` of each row and head.
///
/// # Shapes
/// out and grad `[N, H · Dv]`, lse `[H, N]` → stats `[2, H, N]`
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn stats_kernel<N: Size>(
    out: &[Vector<f32, N>],
    grad: &[Vector<f32, N>],
    lse: &[f32],
    stats: &mut [f32],
    tokens: usize,
    heads: usize,
    dim: usize,
    #[comptime] units: usize,
) {
    let mut sums = Shared::<[f32]>::new_slice(units);
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(LANES);
    // Rows and heads lie in this order in memory.
    let item = CUBE_POS * comptime!(units / LANES) + unit / comptime!(LANES);
    let mut sum = 0.0f32;
    if item < tokens * heads {
        let mut vector = lane;
        while vector < dim {
            sum += out[item * dim + vector].dot(grad[item * dim + vector]);
            vector += comptime!(LANES);
        }
    }
    sums[unit] = sum;
    sync_cube();
    if lane == 0 && item < tokens * heads {
        let mut total = 0.0f32;
        for other in 0..comptime!(LANES) {
            total += sums[unit + other];
        }
        let at = (item % heads) * tokens + item / heads;
        stats[at] = lse[at];
        stats[heads * tokens + at] = total;
    }
}

/// `-Σ p Σ o g` over the rows, with the sink's probability p: its value is 0. One cube a head.
///
/// # Shapes
/// stats `[2, H, N]`, sinks `[H]` → `[H]`
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn sinks_kernel(
    stats: &[f32],
    sinks: &[f32],
    d_sinks: &mut [f32],
    tokens: usize,
    heads: usize,
    #[comptime] units: u32,
) {
    let mut memory = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let head = CUBE_POS_X as usize;
    let sink = sinks[head];
    let mut sum = 0.0f32;
    let mut row = UNIT_POS as usize;
    while row < tokens {
        let at = head * tokens + row;
        sum += (sink - stats[at]).exp() * stats[heads * tokens + at];
        row += comptime!(units as usize);
    }
    let total = cube_sum(sum, &mut memory, units);
    if UNIT_POS == 0 {
        d_sinks[head] = -total;
    }
}

/// What the scores of a tile have to do with their gradients: log-sum-exp and `Σ o g` of the queries
/// that one unit holds, which are its rows or its columns.
#[derive(CubeType)]
struct Stats {
    lse: Array<f32>,
    mean: Array<f32>,
}

/// The stats of `count` queries from `first` on, `step` apart; of no use past the last row.
#[cube]
fn load_stats(
    stats: &[f32],
    first: usize,
    tokens: usize,
    head: usize,
    heads: usize,
    #[comptime] step: usize,
    #[comptime] count: usize,
) -> Stats {
    let mut lse = Array::<f32>::new(count);
    let mut mean = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        let row = min(first + i * step, tokens - 1);
        lse[i] = stats[head * tokens + row];
        mean[i] = stats[(heads + head) * tokens + row];
    }
    Stats { lse, mean }
}

/// Turns scores into probabilities, `p = exp(score - lse)`, and `dp` into the gradients of the
/// products, `p (dp - Σ o g)` times the slope of a soft cap.
#[cube]
fn to_gradients(
    scores: &mut Array<f32>,
    slopes: &Array<f32>,
    dp: &mut Array<f32>,
    stats: &Stats,
    #[comptime] by_column: bool,
    #[comptime] tile: Tile,
) {
    let cols = comptime!(tile.unit_cols());
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        #[unroll]
        for j in 0..cols {
            let query = if comptime!(by_column) { j } else { i };
            let at = i * cols + j;
            let p = exp_of(scores[at], stats.lse[query]);
            let mut ds = p * (dp[at] - stats.mean[query]);
            if comptime!(tile.soft_cap) {
                ds *= slopes[at];
            }
            scores[at] = p;
            dp[at] = ds;
        }
    }
}

/// # Shapes
/// q `[N, H · Dh]`, k `[S, K · Dh]`, v `[S, K · Dv]`, grad `[N, H · Dv]`, stats `[2, H, N]`, spans
/// `[N + S, 2]` → dq `[N, H · Dh]`
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn queries_kernel<E: Float, N: Size>(
    q: &[Vector<f32, N>],
    k: &[Vector<f32, N>],
    v: &[Vector<f32, N>],
    grad: &[Vector<f32, N>],
    stats: &[f32],
    spans: &[u32],
    dq: &mut [Vector<f32, N>],
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    scale: f32,
    cap: f32,
    #[comptime] tile: Tile,
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
    let grad_rows = rows_of(first, tokens, head, heads, value_dim);
    let seen = visible(spans, 0, first, tokens, tile);
    let own = first + unit_y(tile) * comptime!(UNIT_ROWS);
    let row_stats = load_stats(stats, own, tokens, head, heads, 1usize, UNIT_ROWS);

    let mut scores = Array::<f32>::new(len);
    let mut slopes = Array::<f32>::new(len);
    let mut dp = Array::<f32>::new(len);
    let mut result = no_results::<N>(tile, head_dim);
    let mut key = usize::cast_from(spans[first * 2]);
    while key < end {
        let k_rows = rows_of(key, end, kv_head, kv_heads, head_dim);
        let v_rows = rows_of(key, end, kv_head, kv_heads, value_dim);
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
        product(
            grad,
            &grad_rows,
            v,
            &v_rows,
            &mut memory,
            &mut dp,
            tile,
            value_dim,
        );
        to_scores(&mut scores, &mut slopes, scale, cap, tile);
        hide(&mut scores, &seen, key, tile);
        to_gradients(&mut scores, &slopes, &mut dp, &row_stats, false, tile);
        put_columns(&dp, &mut memory, tile);
        accumulate(k, &k_rows, &mut memory, &mut result, tile, head_dim);
        key += comptime!(tile.cols);
    }
    write_rows(&result, scale, dq, &q_rows, &mut memory, tile, head_dim);
}

/// One cube a tile of keys and key head: all queries that see them, of all heads of its group.
///
/// # Shapes
/// As for [`queries_kernel`] → dk `[S, K · Dh]`, dv `[S, K · Dv]`
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn keys_kernel<E: Float, N: Size>(
    q: &[Vector<f32, N>],
    k: &[Vector<f32, N>],
    v: &[Vector<f32, N>],
    grad: &[Vector<f32, N>],
    stats: &[f32],
    spans: &[u32],
    dk: &mut [Vector<f32, N>],
    dv: &mut [Vector<f32, N>],
    tokens: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    scale: f32,
    cap: f32,
    #[comptime] tile: Tile,
    #[define(E)] _element: ElemType,
) {
    let mut memory = Memory::<E, N>::new(tile);
    let (head_dim, value_dim) = (comptime!(tile.head_dim), comptime!(tile.value_dim));
    let len = comptime!(UNIT_ROWS * tile.unit_cols());
    let kv_head = CUBE_POS_Y as usize;
    let group = heads / kv_heads;
    let first = CUBE_POS_X as usize * comptime!(tile.rows);
    let last = min(first + comptime!(tile.rows), keys) - 1;
    let start = usize::cast_from(spans[(tokens + first) * 2]);
    let end = usize::cast_from(spans[(tokens + last) * 2 + 1]);
    let k_rows = rows_of(first, keys, kv_head, kv_heads, head_dim);
    let v_rows = rows_of(first, keys, kv_head, kv_heads, value_dim);
    let seen = visible(spans, tokens, first, keys, tile);

    let mut scores = Array::<f32>::new(len);
    let mut slopes = Array::<f32>::new(len);
    let mut dp = Array::<f32>::new(len);
    let mut k_result = no_results::<N>(tile, head_dim);
    let mut v_result = no_results::<N>(tile, value_dim);
    for member in 0..group {
        let head = kv_head * group + member;
        let mut query = start;
        while query < end {
            let q_rows = rows_of(query, end, head, heads, head_dim);
            let grad_rows = rows_of(query, end, head, heads, value_dim);
            product(
                k,
                &k_rows,
                q,
                &q_rows,
                &mut memory,
                &mut scores,
                tile,
                head_dim,
            );
            product(
                v,
                &v_rows,
                grad,
                &grad_rows,
                &mut memory,
                &mut dp,
                tile,
                value_dim,
            );
            to_scores(&mut scores, &mut slopes, scale, cap, tile);
            hide(&mut scores, &seen, query, tile);
            let own = query + unit_x(tile);
            let column_stats = load_stats(
                stats,
                own,
                tokens,
                head,
                heads,
                tile.units_x,
                tile.unit_cols(),
            );
            to_gradients(&mut scores, &slopes, &mut dp, &column_stats, true, tile);
            put_columns(&scores, &mut memory, tile);
            accumulate(
                grad,
                &grad_rows,
                &mut memory,
                &mut v_result,
                tile,
                value_dim,
            );
            put_columns(&dp, &mut memory, tile);
            accumulate(q, &q_rows, &mut memory, &mut k_result, tile, head_dim);
            query += comptime!(tile.cols);
        }
    }
    write_rows(&k_result, scale, dk, &k_rows, &mut memory, tile, head_dim);
    write_rows(&v_result, 1.0f32, dv, &v_rows, &mut memory, tile, value_dim);
}
