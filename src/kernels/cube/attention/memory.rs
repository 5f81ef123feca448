//! Where the units of a cube stand, and the shared memory that they exchange tiles through.

use cubecl::prelude::*;

use super::tile::{Tile, UNIT_ROWS};

/// A vector of what one unit holds of a column of a tile.
pub(super) type Column = Vector<f32, Const<4>>;

/// Shared memory of a cube. E is what is multiplied.
#[derive(CubeType)]
pub(super) struct Memory<E: Float, N: Size> {
    /// Rows of the matrices.
    pub stage: Shared<[Vector<E, N>]>,
    /// What units hold of a tile, column by column.
    pub exchange: Shared<[Column]>,
    /// The same in what tensor cores multiply.
    pub weights: Shared<[Vector<E, Const<4>>]>,
}

#[cube]
impl<E: Float, N: Size> Memory<E, N> {
    pub fn new(#[comptime] tile: Tile) -> Memory<E, N> {
        Memory::<E, N> {
            stage: Shared::<[Vector<E, N>]>::new_slice(comptime!(tile.stage_len())),
            exchange: Shared::<[Column]>::new_slice(comptime!(tile.exchange_len())),
            weights: Shared::<[Vector<E, Const<4>>]>::new_slice(comptime!(tile.weights_len())),
        }
    }
}

/// Rows of a matrix in memory, of one head.
#[derive(CubeType)]
pub(super) struct Rows {
    /// The first row.
    pub first: usize,
    /// Rows end here; what would lie beyond counts as 0.
    pub end: usize,
    /// Vectors from one row to the next.
    pub width: usize,
    /// The head's first vector in a row.
    pub column: usize,
}

/// The rows of head `head` of a matrix with `heads` heads of `dim` vectors.
#[cube]
pub(super) fn rows_of(
    first: usize,
    end: usize,
    head: usize,
    heads: usize,
    #[comptime] dim: usize,
) -> Rows {
    Rows {
        first,
        end,
        width: heads * dim,
        column: head * dim,
    }
}

/// Row of units that this unit belongs to.
#[cube]
pub(super) fn unit_y(#[comptime] tile: Tile) -> usize {
    UNIT_POS as usize / comptime!(tile.units_x)
}

/// Its place in that row.
#[cube]
pub(super) fn unit_x(#[comptime] tile: Tile) -> usize {
    UNIT_POS as usize % comptime!(tile.units_x)
}

/// Which part of some rows goes to which part of the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Part {
    /// First vector in the stage.
    pub at: usize,
    /// Rows.
    pub count: usize,
    /// Vectors of each.
    pub vectors: usize,
    /// Vectors from one to the next in the stage.
    pub stride: usize,
    /// Vectors of a whole row.
    pub dim: usize,
}

/// Copies a part of rows, from vector `start` on of each; zeros stand for rows past the end and for
/// vectors past the dimension.
#[cube]
pub(super) fn stage_rows<E: Float, N: Size>(
    source: &[Vector<f32, N>],
    rows: &Rows,
    start: usize,
    memory: &mut Memory<E, N>,
    #[comptime] part: Part,
    #[comptime] tile: Tile,
) {
    let mut i = UNIT_POS as usize;
    while i < comptime!(part.count * part.vectors) {
        let row = i / comptime!(part.vectors);
        let vector = i % comptime!(part.vectors);
        let mut value = Vector::<f32, N>::new(0.0f32);
        if rows.first + row < rows.end && start + vector < comptime!(part.dim) {
            value = source[(rows.first + row) * rows.width + rows.column + start + vector];
        }
        let at = row * comptime!(part.stride) + vector + comptime!(part.at);
        memory.stage[at] = Vector::<E, N>::cast_from(value);
        i += comptime!(tile.units());
    }
}

/// Writes what this unit holds of a tile to where others, or tensor cores, read it.
#[cube]
pub(super) fn put_columns<E: Float, N: Size>(
    values: &Array<f32>,
    memory: &mut Memory<E, N>,
    #[comptime] tile: Tile,
) {
    let (x, y) = (unit_x(tile), unit_y(tile));
    let cols = comptime!(tile.unit_cols());
    #[unroll]
    for j in 0..cols {
        let mut column = Column::new(0.0f32);
        #[unroll]
        for i in 0..comptime!(UNIT_ROWS) {
            column.insert(i, values[i * cols + j]);
        }
        let at = column_at(x + j * comptime!(tile.units_x), y, tile);
        if comptime!(tile.fragment > 0) {
            memory.weights[at] = Vector::<E, Const<4>>::cast_from(column);
        } else {
            memory.exchange[at] = column;
        }
    }
}

/// Where the rows of unit row `y` stand of column `x` of a tile.
#[cube]
pub(super) fn column_at(x: usize, y: usize, #[comptime] tile: Tile) -> usize {
    x * comptime!(tile.column_stride()) + y
}
