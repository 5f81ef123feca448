//! How a cube divides its work: the sizes that the kernels are compiled for.

use cubecl::ir::HardwareProperties;
use cubecl::prelude::*;

use super::memory::Part;
use crate::kernels::attention::Heads;

/// Successive rows of a tile that one unit holds, in registers.
pub(super) const UNIT_ROWS: usize = 4;

/// Floats of a row that are in shared memory at a time for products over the columns.
const CHUNK: usize = 32;

/// The same where tensor cores multiply them, in 16 bits.
const WIDE_CHUNK: usize = 64;

/// Shared memory that tiles of 64 rows may take, as most devices have twice that; those of 32 rows
/// keep within the 16 KiB that WebGPU promises.
const LARGE_TILE_BYTES: usize = 24 * 1024;

/// Shared memory of tiles with 64 columns for tensor cores.
const WIDE_TILE_BYTES: usize = 48 * 1024;

/// Shared memory that any tile for tensor cores with 32 columns fits in.
pub(super) const FRAGMENT_TILE_BYTES: usize = 32 * 1024;

/// Head dimensions of which shared memory has room for as many whole rows as a fragment has.
pub(super) const WIDEST_IN_FRAGMENTS: usize = 256;

/// Cubes that keep a large device busy: with fewer, the tiles are smaller.
const MANY_CUBES: usize = 128;

/// A tile of the score matrix, and the grid of units that works on it. Each unit has
/// [`UNIT_ROWS`] rows of it and each `units_x`-th column, and likewise of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    /// Rows: queries, or keys in the pass that makes their gradients.
    pub rows: usize,
    /// Columns: of these a cube takes one block after the other.
    pub cols: usize,
    /// Units side by side.
    pub units_x: usize,
    /// Floats that are read at once; divides the dimensions of heads.
    pub vector: usize,
    /// Dh, in vectors.
    pub head_dim: usize,
    /// Dv, in vectors.
    pub value_dim: usize,
    /// Whether scores are capped.
    pub soft_cap: bool,
    /// Rows and columns of the fragments that tensor cores multiply; 0 without them.
    pub fragment: usize,
    /// Units of a plane.
    pub plane: usize,
}

impl Tile {
    /// The tile for `rows` rows in each of `parts` heads on a device, with `fragment` rows in what its
    /// tensor cores multiply, or 0.
    pub(super) fn new(
        hardware: &HardwareProperties,
        heads: &Heads,
        (rows, parts): (usize, usize),
        fragment: usize,
    ) -> Self {
        let vector = match heads.head_dim.is_multiple_of(4) && heads.value_dim.is_multiple_of(4) {
            true => 4,
            false => 1,
        };
        let (head_dim, value_dim) = (heads.head_dim / vector, heads.value_dim / vector);
        let widest = head_dim.max(value_dim);
        let units_x = match widest * vector {
            // Their results would take too many registers.
            193.. => 32,
            _ if fragment > 0 => 16,
            _ if wasted(widest, 16) > 0.25 && wasted(widest, 8) < wasted(widest, 16) => 8,
            _ => 16,
        };
        let is_large = units_x < 32
            && rows.div_ceil(64) * parts >= MANY_CUBES
            && hardware.max_shared_memory_size >= LARGE_TILE_BYTES
            && hardware.max_units_per_cube >= 256;
        let is_wide = fragment > 0 && hardware.max_shared_memory_size >= WIDE_TILE_BYTES;
        Self {
            rows: if is_large { 64 } else { 32 },
            cols: if is_wide { 64 } else { 32 },
            units_x,
            vector,
            head_dim,
            value_dim,
            soft_cap: heads.soft_cap.is_some(),
            fragment,
            plane: hardware.plane_size_max as usize,
        }
    }

    /// Units one above the other.
    pub(super) fn units_y(&self) -> usize {
        self.rows / UNIT_ROWS
    }

    /// Units in all.
    pub(super) fn units(&self) -> usize {
        self.units_x * self.units_y()
    }

    /// Columns of the tile that one unit holds.
    pub(super) fn unit_cols(&self) -> usize {
        self.cols / self.units_x
    }

    /// Vectors of a row of results, `dim` wide, that one unit holds.
    pub(super) fn unit_vectors(&self, dim: usize) -> usize {
        dim.div_ceil(self.units_x)
    }

    /// Where rows of both factors of a product over `dim` vectors are staged: as many vectors at a time
    /// as there is room for, in equal parts.
    pub(super) fn parts(&self, dim: usize) -> (Part, Part) {
        let vectors = dim.div_ceil(dim.div_ceil(self.chunk()));
        let vectors = vectors.next_multiple_of(self.fragment.max(self.vector) / self.vector);
        let stride = self.chunk_stride(vectors);
        let part = |at, count| Part {
            at,
            count,
            vectors,
            stride,
            dim,
        };
        (part(0, self.rows), part(self.rows * stride, self.cols))
    }

    /// Where whole rows, `dim` vectors wide, are staged to be added up, as many as there is room for.
    pub(super) fn whole_rows(&self, dim: usize) -> Part {
        let (vectors, stride) = match self.fragment {
            0 => {
                let width = self.unit_vectors(dim) * self.units_x;
                (width, width)
            }
            _ => (dim, dim + 2),
        };
        let fit = (self.stage_len() / stride).clamp(1, self.cols);
        Part {
            at: 0,
            count: 1 << fit.ilog2(),
            vectors,
            stride,
            dim,
        }
    }

    /// Vectors of a row that are staged at a time at most.
    fn chunk(&self) -> usize {
        match self.fragment {
            0 => CHUNK / self.vector,
            _ => WIDE_CHUNK / self.vector,
        }
    }

    /// From one staged row to the next: odd, so that they start in different banks, or what tensor
    /// cores read from, in multiples of 16 bytes.
    fn chunk_stride(&self, vectors: usize) -> usize {
        match self.fragment {
            0 => (vectors + 1) | 1,
            _ => vectors + 2,
        }
    }

    /// Vectors of shared memory for staged rows.
    pub(super) fn stage_len(&self) -> usize {
        (self.rows + self.cols) * self.chunk_stride(self.chunk())
    }

    /// Vectors of [`UNIT_ROWS`] from one column of a tile to the next in shared memory.
    pub(super) fn column_stride(&self) -> usize {
        match self.fragment {
            0 => self.units_y() + 1,
            _ => self.units_y() + 2,
        }
    }

    /// Vectors of shared memory for a tile of weights in 16 bits; one that is not used without tensor
    /// cores.
    pub(super) fn weights_len(&self) -> usize {
        match self.fragment {
            0 => 1,
            _ => self.exchange_len(),
        }
    }

    /// Planes of a cube.
    pub(super) fn planes(&self) -> usize {
        (self.units() / self.plane).max(1)
    }

    /// Fragments that one plane holds of the rows of the tile and `columns` columns.
    pub(super) fn plane_fragments(&self, columns: usize) -> usize {
        match self.fragment {
            0 => 0,
            side => (self.rows / side * (columns / side)).div_ceil(self.planes()),
        }
    }

    /// Vectors of shared memory for the columns of a tile.
    pub(super) fn exchange_len(&self) -> usize {
        self.cols * self.column_stride()
    }

    /// As many units as a launch takes.
    pub(super) fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.units() as u32)
    }

    /// One cube for each tile of `rows` rows, for each of `parts` heads.
    pub(super) fn cube_count(&self, rows: usize, parts: usize) -> CubeCount {
        CubeCount::Static(rows.div_ceil(self.rows) as u32, parts as u32, 1)
    }
}

/// The part of `units` that has nothing to do where they share `dim` vectors.
fn wasted(dim: usize, units: usize) -> f32 {
    1.0 - dim as f32 / dim.next_multiple_of(units) as f32
}
