//! The products of [`product`](super::product) on tensor cores: factors in 16 bits, sums in f32.
//!
//! A plane holds every so many of the square fragments that a tile divides into. What a fragment
//! holds where is the device's secret, so tiles of scores go through shared memory to the units, and
//! what becomes of them in between is the same code as without tensor cores. Results stay in
//! fragments; to scale or write them, they go through shared memory, a block of columns at a time.
//!
//! No device with tensor cores has run this yet: it is only known to compile for them.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

use super::memory::{Column, Memory, Rows, column_at, stage_rows, unit_x, unit_y};
use super::tile::{Tile, UNIT_ROWS};

/// Fragments of results, those of one plane.
pub(super) type Fragments = Sequence<Matrix<f32>>;

/// The plane that this unit belongs to.
#[cube]
fn plane(#[comptime] tile: Tile) -> usize {
    UNIT_POS as usize / comptime!(tile.plane)
}

/// Zeros for all fragments of this plane in the rows of the tile and `columns` columns.
#[cube]
pub(super) fn no_fragments(#[comptime] tile: Tile, #[comptime] columns: usize) -> Fragments {
    let side = comptime!(tile.fragment);
    let mut fragments = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(tile.plane_fragments(columns)) {
        fragments.push(Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            side,
            side,
            side,
            MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    fragments
}

/// A fragment to multiply, whose rows or columns lie `stride` elements apart.
#[cube]
fn factor<E: Float, V: CubePrimitive>(
    values: &[V],
    stride: u32,
    #[comptime] ident: MatrixIdent,
    layout: MatrixLayout,
    #[comptime] side: usize,
) -> Matrix<E> {
    // SAFETY: loaded before it is used.
    let mut matrix = unsafe { Matrix::<E>::uninitialized(ident, side, side, side, layout) };
    cmma::load(&mut matrix, values, stride);
    matrix
}

/// As [`product`](super::product::product).
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
    let side = comptime!(tile.fragment);
    let (down, across) = comptime!((tile.rows / side, tile.cols / side));
    let step = comptime!(side / tile.vector);
    let stride = comptime!((a_part.stride * tile.vector) as u32);
    let len = comptime!(tile.stage_len());
    let fragments = no_fragments(tile, tile.cols);
    let mut start = comptime!(0usize).runtime();
    while start < dim {
        stage_rows(a, a_rows, start, memory, a_part, tile);
        stage_rows(b, b_rows, start, memory, b_part, tile);
        sync_cube();
        #[unroll]
        for slot in 0..comptime!(tile.plane_fragments(tile.cols)) {
            let id = plane(tile) + slot * comptime!(tile.planes());
            if id < comptime!(down * across) {
                let a_at = id % down * comptime!(side * a_part.stride);
                let b_at = id / down * comptime!(side * b_part.stride) + comptime!(b_part.at);
                for d in 0..comptime!(a_part.vectors / step) {
                    let rows = factor::<E, _>(
                        &memory.stage[a_at + d * step..len],
                        stride,
                        MatrixIdent::A,
                        MatrixLayout::RowMajor,
                        side,
                    );
                    let columns = factor::<E, _>(
                        &memory.stage[b_at + d * step..len],
                        stride,
                        MatrixIdent::B,
                        MatrixLayout::ColMajor,
                        side,
                    );
                    let sums = fragments.index(slot);
                    cmma::execute(&rows, &columns, sums, sums);
                }
            }
        }
        sync_cube();
        start += comptime!(a_part.vectors);
    }
    put_fragments(&fragments, 0, memory, tile, tile.cols);
    let cols = comptime!(tile.unit_cols());
    #[unroll]
    for j in 0..cols {
        let column = memory.exchange[column_at(
            unit_x(tile) + j * comptime!(tile.units_x),
            unit_y(tile),
            tile,
        )];
        #[unroll]
        for i in 0..comptime!(UNIT_ROWS) {
            result[i * cols + j] = column.extract(i);
        }
    }
    sync_cube();
}

/// As [`accumulate`](super::product::accumulate), with W in `memory.weights`.
#[cube]
pub(super) fn accumulate<E: Float, N: Size>(
    source: &[Vector<f32, N>],
    rows: &Rows,
    memory: &mut Memory<E, N>,
    fragments: &Fragments,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let part = comptime!(tile.whole_rows(dim));
    let side = comptime!(tile.fragment);
    let columns = comptime!(dim * tile.vector);
    let (down, across) = comptime!((tile.rows / side, columns / side));
    let stride = comptime!((part.stride * tile.vector) as u32);
    let weight_stride = comptime!((tile.column_stride() * UNIT_ROWS) as u32);
    let (len, weights_len) = comptime!((tile.stage_len(), tile.weights_len()));
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
        #[unroll]
        for slot in 0..comptime!(tile.plane_fragments(columns)) {
            let id = plane(tile) + slot * comptime!(tile.planes());
            if id < comptime!(down * across) {
                for k in 0..comptime!(part.count / side) {
                    let weight_at = column_at(done + k * side, 0, tile)
                        + id % down * comptime!(side / UNIT_ROWS);
                    let value_at = k * comptime!(side * part.stride)
                        + id / down * comptime!(side / tile.vector);
                    let weights = factor::<E, _>(
                        &memory.weights[weight_at..weights_len],
                        weight_stride,
                        MatrixIdent::A,
                        MatrixLayout::ColMajor,
                        side,
                    );
                    let values = factor::<E, _>(
                        &memory.stage[value_at..len],
                        stride,
                        MatrixIdent::B,
                        MatrixLayout::RowMajor,
                        side,
                    );
                    let sums = fragments.index(slot);
                    cmma::execute(&weights, &values, sums, sums);
                }
            }
        }
        sync_cube();
        done += comptime!(part.count);
    }
}

/// Writes block `block` of the columns of all fragments, of `columns` columns in all, to the shared
/// memory of one tile, and waits until it is there.
#[cube]
fn put_fragments<E: Float, N: Size>(
    fragments: &Fragments,
    block: usize,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
    #[comptime] columns: usize,
) {
    let side = comptime!(tile.fragment);
    let (down, across) = comptime!((tile.rows / side, columns / side));
    let in_block = comptime!(tile.cols / side);
    #[unroll]
    for slot in 0..comptime!(tile.plane_fragments(columns)) {
        let id = plane(tile) + slot * comptime!(tile.planes());
        if id < comptime!(down * across) && id / down / in_block == block {
            let at = column_at(id / down % in_block * side, 0, tile)
                + id % down * comptime!(side / UNIT_ROWS);
            cmma::store(
                &mut memory.exchange[at..comptime!(tile.exchange_len())],
                fragments.index(slot),
                comptime!((tile.column_stride() * UNIT_ROWS) as u32),
                MatrixLayout::ColMajor,
            );
        }
    }
    sync_cube();
}

/// Multiplies each row of the results by a factor.
#[cube]
pub(super) fn scale_rows<E: Float, N: Size>(
    fragments: &mut Fragments,
    factors: &Array<f32>,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let side = comptime!(tile.fragment);
    let columns = comptime!(dim * tile.vector);
    let (down, across) = comptime!((tile.rows / side, columns / side));
    let in_block = comptime!(tile.cols / side);
    let mut factor = Column::new(0.0f32);
    #[unroll]
    for i in 0..comptime!(UNIT_ROWS) {
        factor.insert(i, factors[i]);
    }
    for block in 0..comptime!(columns.div_ceil(tile.cols)) {
        put_fragments(&*fragments, block, memory, tile, columns);
        #[unroll]
        for j in 0..comptime!(tile.unit_cols()) {
            let x = unit_x(tile) + j * comptime!(tile.units_x);
            let at = column_at(x, unit_y(tile), tile);
            memory.exchange[at] *= factor;
        }
        sync_cube();
        #[unroll]
        for slot in 0..comptime!(tile.plane_fragments(columns)) {
            let id = plane(tile) + slot * comptime!(tile.planes());
            if id < comptime!(down * across) && id / down / in_block == block {
                let at = column_at(id / down % in_block * side, 0, tile)
                    + id % down * comptime!(side / UNIT_ROWS);
                cmma::load_with_layout(
                    fragments.index_mut(slot),
                    &memory.exchange[at..comptime!(tile.exchange_len())],
                    comptime!((tile.column_stride() * UNIT_ROWS) as u32),
                    MatrixLayout::ColMajor,
                );
            }
        }
        sync_cube();
    }
}

/// As [`write_rows`](super::product::write_rows).
#[cube]
pub(super) fn write_rows<E: Float, N: Size>(
    fragments: &Fragments,
    factor: f32,
    target: &mut [Vector<f32, N>],
    rows: &Rows,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let columns = comptime!(dim * tile.vector);
    let block_vectors = comptime!(tile.cols / tile.vector);
    for block in 0..comptime!(columns.div_ceil(tile.cols)) {
        put_fragments(fragments, block, memory, tile, columns);
        let mut i = UNIT_POS as usize;
        while i < comptime!(block_vectors * tile.units_y()) {
            let (x, y) = (i % block_vectors, i / block_vectors);
            let vector = block * block_vectors + x;
            if vector < dim {
                #[unroll]
                for r in 0..comptime!(UNIT_ROWS) {
                    let mut value = Vector::<f32, N>::new(0.0f32);
                    #[unroll]
                    for c in 0..comptime!(tile.vector) {
                        let column = memory.exchange[column_at(x * tile.vector + c, y, tile)];
                        value.insert(c, column.extract(r) * factor);
                    }
                    let row = rows.first + y * comptime!(UNIT_ROWS) + r;
                    if row < rows.end {
                        target[row * rows.width + rows.column + vector] = value;
                    }
                }
            }
            i += comptime!(tile.units());
        }
        sync_cube();
    }
}
