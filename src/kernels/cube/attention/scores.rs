//! What becomes of a tile of scores between the products: mask, soft cap, softmax.

use cubecl::prelude::*;

use super::memory::{Column, Memory, column_at, unit_x, unit_y};
use super::tile::{Tile, UNIT_ROWS};

/// Stands for a score that the mask hides; finite, because WGSL promises nothing about infinities.
pub(super) const HIDDEN: f32 = -1e30;

/// Ranges of columns that each row of this unit sees.
#[derive(CubeType)]
pub(super) struct Visible {
    pub starts: Array<usize>,
    pub ends: Array<usize>,
}

/// What the rows of this unit see, by the spans from `at` on; nothing, where there is no such row.
#[cube]
pub(super) fn visible(
    spans: &[u32],
    at: usize,
    first: usize,
    end: usize,
    #[comptime] tile: Tile,
) -> Visible {
    let y = unit_y(tile);
    let mut starts = Array::<usize>::new(comptime!(UNIT_ROWS));
    let mut ends = Array::<usize>::new(comptime!(UNIT_ROWS));
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        let row = first + y * comptime!(UNIT_ROWS) + i;
        starts[i] = comptime!(0usize).runtime();
        ends[i] = comptime!(0usize).runtime();
        if row < end {
            starts[i] = usize::cast_from(spans[(at + row) * 2]);
            ends[i] = usize::cast_from(spans[(at + row) * 2 + 1]);
        }
    }
    Visible { starts, ends }
}

/// `tanh x`; the built-in function overflows for large x on some devices.
#[cube]
pub(super) fn tangent(x: f32) -> f32 {
    let e = (min(x.abs(), 15.0f32) * 2.0f32).exp();
    let size = 1.0f32 - 2.0f32 / (e + 1.0f32);
    select(x < 0.0f32, -size, size)
}

/// Turns products into scores: factor and soft cap. `slopes` takes their derivative by the product
/// times the factor, when there is a cap.
#[cube]
pub(super) fn to_scores(
    products: &mut Array<f32>,
    slopes: &mut Array<f32>,
    scale: f32,
    cap: f32,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS * tile.unit_cols()) {
        let score = products[i] * scale;
        if comptime!(tile.soft_cap) {
            let t = tangent(score / cap);
            products[i] = t * cap;
            slopes[i] = 1.0f32 - t * t;
        } else {
            products[i] = score;
        }
    }
}

/// Hides the scores that the rows do not see, in the block of columns from `first` on.
#[cube]
pub(super) fn hide(
    scores: &mut Array<f32>,
    visible: &Visible,
    first: usize,
    #[comptime] tile: Tile,
) {
    let x = unit_x(tile);
    let cols = comptime!(tile.unit_cols());
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        #[unroll]
        for j in 0..cols {
            let column = first + x + j * comptime!(tile.units_x);
            let is_visible = column >= visible.starts[i] && column < visible.ends[i];
            scores[i * cols + j] = select(is_visible, scores[i * cols + j], HIDDEN);
        }
    }
}

/// `exp(score - shift)` with a shift for each row, 0 where the score is hidden.
#[cube]
pub(super) fn exp_of(score: f32, shift: f32) -> f32 {
    select(score > HIDDEN * 0.5f32, (score - shift).exp(), 0.0f32)
}

/// Writes a value for each row of this unit where the units beside it read them.
#[cube]
pub(super) fn share_column<E: Float, N: Size>(
    value: Column,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
) {
    memory.exchange[column_at(unit_x(tile), unit_y(tile), tile)] = value;
    sync_cube();
}

/// What unit `x` beside this one has shared.
#[cube]
pub(super) fn shared_column<E: Float, N: Size>(
    memory: &Memory<E, N>,
    x: usize,
    #[comptime] tile: Tile,
) -> Column {
    memory.exchange[column_at(x, unit_y(tile), tile)]
}
