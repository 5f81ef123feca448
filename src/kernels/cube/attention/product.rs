//! The two products that attention is made of: `A Bᵀ`, whose result each unit holds in registers,
//! and `W V`, added to registers, where W is a tile of such results that the units have exchanged.
//!
//! All units of a cube call these together; when one returns, the shared memory is free again.

use cubecl::prelude::*;

use super::memory::{Memory, Rows, column_at, stage_rows, unit_x, unit_y};
use super::tile::{Tile, UNIT_ROWS};

/// `a bᵀ` over `dim` vectors: rows of `a` against the rows of `b`, as the columns of the tile.
#[cube]
pub(super) fn product<E: Float, N: Size>(
    a: &[Vector<f32, N>],
    a_rows: &Rows,
    b: &[Vector<f32, N>],
    b_rows: &Rows,
    memory: &mut Memory<E, N>,
    result: &mut Array<f32>,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let (a_part, b_part) = comptime!(tile.parts(dim));
    let (x, y) = (unit_x(tile), unit_y(tile));
    let cols = comptime!(tile.unit_cols());
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS * cols) {
        result[i] = 0.0f32;
    }
    let mut start = comptime!(0usize).runtime();
    while start < dim {
        stage_rows(a, a_rows, start, memory, a_part, tile);
        stage_rows(b, b_rows, start, memory, b_part, tile);
        sync_cube();
        for d in 0..comptime!(a_part.vectors) {
            let mut columns = Array::<Vector<f32, N>>::new(cols);
            #[unroll]
            for j in 0..cols {
                let row = x + j * comptime!(tile.units_x);
                let at = row * comptime!(b_part.stride) + comptime!(b_part.at) + d;
                columns[j] = Vector::<f32, N>::cast_from(memory.stage[at]);
            }
            #[unroll]
            for i in 0..comptime!(UNIT_ROWS) {
                let at = (y * comptime!(UNIT_ROWS) + i) * comptime!(a_part.stride) + d;
                let row = Vector::<f32, N>::cast_from(memory.stage[at]);
                #[unroll]
                for j in 0..cols {
                    result[i * cols + j] += row.dot(columns[j]);
                }
            }
        }
        sync_cube();
        start += comptime!(a_part.vectors);
    }
}

/// Adds `W rows` to what this unit holds of the result, the rows of the tile and `dim` vectors, where
/// the units have put W with [`put_columns`](super::memory::put_columns) just before.
#[cube]
pub(super) fn accumulate<E: Float, N: Size>(
    source: &[Vector<f32, N>],
    rows: &Rows,
    memory: &mut Memory<E, N>,
    result: &mut Array<Vector<f32, N>>,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let part = comptime!(tile.whole_rows(dim));
    let (x, y) = (unit_x(tile), unit_y(tile));
    let vectors = comptime!(tile.unit_vectors(dim));
    let mut done = comptime!(0usize).runtime();
    while done < comptime!(tile.cols) {
        let some = Rows {
            first: rows.first + done,
            end: rows.end,
            width: rows.width,
            column: rows.column,
        };
        stage_rows(source, &some, 0, memory, part, tile);
        sync_cube();
        for k in 0..comptime!(part.count) {
            let weight = memory.exchange[column_at(done + k, y, tile)];
            #[unroll]
            for c in 0..vectors {
                let at = k * comptime!(part.stride) + x + c * comptime!(tile.units_x);
                let value = Vector::<f32, N>::cast_from(memory.stage[at]);
                #[unroll]
                for i in 0..comptime!(UNIT_ROWS) {
                    result[i * vectors + c] += Vector::new(weight.extract(i)) * value;
                }
            }
        }
        sync_cube();
        done += comptime!(part.count);
    }
}

/// Nothing yet of `dim` vectors of each row.
#[cube]
pub(super) fn zeros<N: Size>(
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) -> Array<Vector<f32, N>> {
    let len = comptime!(UNIT_ROWS * tile.unit_vectors(dim));
    let mut result = Array::<Vector<f32, N>>::new(len);
    #[unroll]
    for i in 0..len {
        result[i] = Vector::new(0.0f32);
    }
    result
}

/// Multiplies the rows of results that this unit holds by a factor each.
#[cube]
pub(super) fn scale_rows<N: Size>(
    result: &mut Array<Vector<f32, N>>,
    factors: &Array<f32>,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let vectors = comptime!(tile.unit_vectors(dim));
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        #[unroll]
        for c in 0..vectors {
            result[i * vectors + c] *= Vector::new(factors[i]);
        }
    }
}

/// Writes the rows of results that this unit holds, times a factor.
#[cube]
pub(super) fn write_rows<N: Size>(
    result: &Array<Vector<f32, N>>,
    factor: f32,
    target: &mut [Vector<f32, N>],
    rows: &Rows,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let (x, y) = (unit_x(tile), unit_y(tile));
    let vectors = comptime!(tile.unit_vectors(dim));
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        let row = rows.first + y * comptime!(UNIT_ROWS) + i;
        #[unroll]
        for c in 0..vectors {
            let vector = x + c * comptime!(tile.units_x);
            if row < rows.end && vector < dim {
                let value = result[i * vectors + c] * Vector::new(factor);
                target[row * rows.width + rows.column + vector] = value;
            }
        }
    }
}
