//! Matrix products: rows in f32 times a matrix as it is stored, each from some row on, in tiles of f32 or
//! on tensor cores, with a low-rank part.
//!
//! Where there are few tiles, several cubes share one, each with a part of the inner dimension, and their
//! sums are added up in order: which order sums run in depends on sizes alone.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::packed::Packed;
use super::tensor_cores;
use super::tiles::{EDGE, Side, SizesLaunch, Spec, UNITS, add_parts_kernel, product_kernel};
use super::{cubes, empty};

/// The low-rank part of a product: `low [.., R]`, from the same row on as x, times rows of `up`.
pub(super) struct Low<'a> {
    pub(super) low: &'a CubeTensor,
    pub(super) up: &'a Packed,
    /// Its first row.
    pub(super) up_first: usize,
    pub(super) rank: usize,
    pub(super) scale: f32,
}

/// A product into some rows of a result.
pub(super) struct Product<'a> {
    /// Contiguous, `[.., k]`, or `[.., m]` if transposed.
    pub(super) x: &'a CubeTensor,
    pub(super) x_transposed: bool,
    pub(super) x_first: usize,
    pub(super) matrix: &'a Packed,
    pub(super) side: Side,
    /// Its first row.
    pub(super) w_first: usize,
    pub(super) scale: f32,
    pub(super) low: Option<Low<'a>>,
    /// Whether it is added to what is there.
    pub(super) onto: bool,
}

impl<'a> Product<'a> {
    /// Of all rows, and of the matrix from its first row on.
    pub(super) fn new(x: &'a CubeTensor, matrix: &'a Packed, side: Side) -> Self {
        Self {
            x,
            x_transposed: false,
            x_first: 0,
            matrix,
            side,
            w_first: 0,
            scale: 1.0,
            low: None,
            onto: false,
        }
    }

    /// Writes the product, `[m, n]` with an inner dimension of k, into the rows of y from a first one on.
    ///
    /// Rows and columns as said must be those of the tensors.
    pub(super) fn write(self, y: &CubeTensor, y_first: usize, [m, n, k]: [usize; 3]) {
        if m == 0 || n == 0 {
            return;
        }
        let fits = !self.x_transposed && !self.onto && k.is_multiple_of(4);
        if self.matrix.in_bf16 && fits && tensor_cores::available(&y.client) {
            return self.write_on_tensor_cores(y, y_first, [m, n, k]);
        }
        let part = match self.low {
            Some(_) => k,
            None => part([m, n, k]),
        };
        if part < k {
            return self.write_in_parts(part, y, y_first, [m, n, k]);
        }
        self.launch(part, y, y_first, [m, n, k]);
    }

    /// [`Product::write`] where several cubes share a tile.
    fn write_in_parts(self, part: usize, y: &CubeTensor, y_first: usize, [m, n, k]: [usize; 3]) {
        let parts = k.div_ceil(part);
        let sums = empty(y, [parts, m, n]);
        let onto = self.onto;
        let product = Self {
            onto: false,
            ..self
        };
        product.launch(part, &sums, 0, [m, n, k]);
        // SAFETY: numbers end at m n, of each part and of y's rows.
        unsafe {
            add_parts_kernel::launch_unchecked(
                &y.client,
                cubes((m * n).div_ceil(UNITS as usize)),
                CubeDim::new_1d(UNITS),
                sums.into_buffer_arg(),
                y.clone().into_buffer_arg(),
                parts,
                m * n,
                y_first * n,
                onto,
            );
        }
    }

    fn launch(self, part: usize, y: &CubeTensor, y_first: usize, [m, n, k]: [usize; 3]) {
        let spec = Spec {
            kind: self.matrix.kind,
            side: self.side,
            x_transposed: self.x_transposed,
            low: self.low.is_some(),
            onto: self.onto,
            each: edge(m, n),
        };
        let tile = spec.tile();
        let count = [n, m].map(|size| size.div_ceil(tile) as u32);
        let x = || self.x.clone().into_buffer_arg();
        // Without a low-rank part the kernel reads neither.
        let (low, up, up_layout) = match &self.low {
            Some(low) => {
                let rows = low.low.clone().into_buffer_arg();
                (rows, low.up.argument(), low.up.layout())
            }
            None => (x(), self.matrix.argument(), self.matrix.layout()),
        };
        let (rank, up_first) = self.low.as_ref().map_or((0, 0), |l| (l.rank, l.up_first));
        let (w_first, x_first) = (self.w_first, self.x_first);
        let sizes = SizesLaunch::new(m, n, k, x_first, w_first, y_first, rank, up_first, part);
        let parts = k.div_ceil(part.max(1)).max(1) as u32;
        // SAFETY: the kernel reads and writes below m, n, k and rank, past the first rows, and the
        // caller says that those are in the tensors; quads stay in their buffer.
        unsafe {
            product_kernel::launch_unchecked(
                &y.client,
                CubeCount::Static(count[0], count[1], parts),
                CubeDim::new_1d(UNITS),
                x(),
                self.matrix.argument(),
                low,
                up,
                y.clone().into_buffer_arg(),
                sizes,
                self.matrix.layout(),
                up_layout,
                self.scale,
                self.low.as_ref().map_or(0.0, |low| low.scale),
                spec,
            );
        }
    }

    /// [`Product::write`] in bf16, but for the low-rank part.
    fn write_on_tensor_cores(self, y: &CubeTensor, y_first: usize, [m, n, k]: [usize; 3]) {
        let spec = tensor_cores::Spec {
            kind: self.matrix.kind,
            side: self.side,
        };
        let count = [n, m].map(|size| size.div_ceil(tensor_cores::TILE) as u32);
        let sizes = SizesLaunch::new(m, n, k, self.x_first, self.w_first, y_first, 0, 0, k);
        // SAFETY: as in `write`; rows of x are whole vectors.
        unsafe {
            tensor_cores::tensor_core_kernel::launch_unchecked(
                &y.client,
                CubeCount::Static(count[0], count[1], 1),
                CubeDim::new_1d(tensor_cores::UNITS),
                self.x.clone().into_buffer_arg(),
                self.matrix.argument(),
                y.clone().into_buffer_arg(),
                sizes,
                self.matrix.layout(),
                self.scale,
                spec,
            );
        }
        if let Some(low) = self.low {
            let product = Product {
                x_first: self.x_first,
                w_first: low.up_first,
                scale: low.scale,
                onto: true,
                ..Product::new(low.low, low.up, self.side)
            };
            product.write(y, y_first, [m, n, low.rank]);
        }
    }
}

/// What a cube takes of the inner dimension: all, unless there are too few tiles to keep a device busy.
fn part([m, n, k]: [usize; 3]) -> usize {
    /// Cubes that are enough.
    const ENOUGH: usize = 256;
    /// Below this, adding up costs more.
    const LEAST: usize = 256;
    let tiles = m.div_ceil(4 * EDGE) * n.div_ceil(4 * EDGE);
    let parts = (ENOUGH / tiles).min(k / LEAST).max(1);
    match parts {
        1 => k,
        // Whole slices.
        _ => k.div_ceil(parts).next_multiple_of(EDGE),
    }
}

/// Edge of a unit's square: the larger one reads shared memory half as often, but wants enough tiles for
/// every processor of the device.
fn edge(m: usize, n: usize) -> usize {
    const LARGE: usize = 8 * EDGE;
    const ENOUGH: usize = 64;
    let tiles = m.div_ceil(LARGE) * n.div_ceil(LARGE);
    match m >= LARGE && n >= LARGE && tiles >= ENOUGH {
        true => 8,
        false => 4,
    }
}
