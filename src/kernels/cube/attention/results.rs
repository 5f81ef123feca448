//! Results of a tile as they grow: in registers of the units, or in fragments of tensor cores.

use cubecl::prelude::*;

use super::fragments::{self, Fragments, no_fragments};
use super::memory::{Memory, Rows};
use super::product as plain;
use super::tile::Tile;

/// The rows of a tile, `dim` vectors wide.
#[derive(CubeType)]
pub(super) struct Results<N: Size> {
    /// What this unit holds, without tensor cores.
    vectors: Array<Vector<f32, N>>,
    /// What this plane holds, with them.
    fragments: Fragments,
}

/// Zeros.
#[cube]
pub(super) fn no_results<N: Size>(#[comptime] tile: Tile, #[comptime] dim: usize) -> Results<N> {
    Results::<N> {
        vectors: plain::zeros::<N>(tile, comptime!(if tile.fragment > 0 { 1 } else { dim })),
        fragments: no_fragments(tile, comptime!(dim * tile.vector)),
    }
}

/// `a bᵀ` over `dim` vectors, on whatever the tile is for.
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
    if comptime!(tile.fragment > 0) {
        fragments::product(a, a_rows, b, b_rows, memory, result, tile, dim);
    } else {
        plain::product(a, a_rows, b, b_rows, memory, result, tile, dim);
    }
}

/// Adds `W rows` to the results, where the units have put W just before.
#[cube]
pub(super) fn accumulate<E: Float, N: Size>(
    source: &[Vector<f32, N>],
    rows: &Rows,
    memory: &mut Memory<E, N>,
    results: &mut Results<N>,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    if comptime!(tile.fragment > 0) {
        fragments::accumulate(source, rows, memory, &results.fragments, tile, dim);
    } else {
        plain::accumulate(source, rows, memory, &mut results.vectors, tile, dim);
    }
}

/// Multiplies each row of the results by a factor.
#[cube]
pub(super) fn scale_rows<E: Float, N: Size>(
    results: &mut Results<N>,
    factors: &Array<f32>,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    if comptime!(tile.fragment > 0) {
        fragments::scale_rows(&mut results.fragments, factors, memory, tile, dim);
    } else {
        plain::scale_rows(&mut results.vectors, factors, tile, dim);
    }
}

/// Writes the results, times a factor.
#[cube]
pub(super) fn write_rows<E: Float, N: Size>(
    results: &Results<N>,
    factor: f32,
    target: &mut [Vector<f32, N>],
    rows: &Rows,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    if comptime!(tile.fragment > 0) {
        fragments::write_rows(&results.fragments, factor, target, rows, memory, tile, dim);
    } else {
        plain::write_rows(&results.vectors, factor, target, rows, tile, dim);
    }
}
