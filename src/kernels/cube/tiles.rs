//! The tiles of matrix products: rows in f32 times a matrix as it is stored, and a low-rank part in the
//! same pass.
//!
//! Each cube computes a tile of the result. A slice of both factors at a time goes into shared memory,
//! the matrix widened to f32 on its way, and each unit keeps a square of sums in registers.

use cubecl::prelude::*;

use super::packed::Kind;
use super::unpack::{Layout, quad, table};

/// Units of a cube, in a square of 16 × 16.
pub(super) const UNITS: u32 = 256;
/// Units along an edge of the tile.
pub(super) const EDGE: usize = 16;
/// Places by which a row of a slice in shared memory is longer than the tile, against bank conflicts.
const PAD: usize = 4;

/// How the matrix is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    /// `x Wᵀ`
    Transposed,
    /// `x W`
    Plain,
}

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Spec {
    pub(super) kind: Kind,
    pub(super) side: Side,
    /// Whether x is stored as `[k, m]`.
    pub(super) x_transposed: bool,
    /// Whether there is a low-rank part.
    pub(super) low: bool,
    /// Whether the result is added to what is there.
    pub(super) onto: bool,
    /// Edge of a unit's square of sums: 4 or 8.
    pub(super) each: usize,
}

impl Spec {
    /// Edge of a cube's tile.
    pub(super) const fn tile(self) -> usize {
        EDGE * self.each
    }

    /// Inner dimension of a slice: as much as gives each unit four numbers of each factor to load.
    pub(super) const fn depth(self) -> usize {
        4 * UNITS as usize / self.tile()
    }

    /// Of the low-rank part, whose factors are in f32.
    const fn of_low(self) -> Self {
        Self {
            kind: Kind::F32,
            x_transposed: false,
            ..self
        }
    }
}

/// Sizes of a product, and the first rows that it takes of its factors.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Sizes {
    /// Rows of the result.
    pub(super) m: usize,
    /// Columns of the result.
    pub(super) n: usize,
    /// Inner dimension.
    pub(super) k: usize,
    /// First row of x.
    pub(super) x_first: usize,
    /// First row of the matrix.
    pub(super) w_first: usize,
    /// First row of the result.
    pub(super) y_first: usize,
    /// Inner dimension of the low-rank part.
    rank: usize,
    /// First row of its second factor.
    up_first: usize,
    /// What a cube takes of the inner dimension: all, or whole slices.
    part: usize,
}

/// One slice of the inner dimension after the other, into the sums of a unit.
#[cube]
#[expect(clippy::too_many_arguments, reason = "kernels have no other way")]
fn accumulate(
    x: &[f32],
    w: &[u32],
    table: &Shared<[f32]>,
    layout: &Layout,
    m: usize,
    n: usize,
    k: usize,
    begin: usize,
    part: usize,
    x_first: usize,
    w_first: usize,
    scale: f32,
    xs: &mut Shared<[f32]>,
    ws: &mut Shared<[f32]>,
    sums: &mut Array<f32>,
    #[comptime] spec: Spec,
) {
    let depth = comptime!(spec.depth());
    let each = comptime!(spec.each);
    let stride = comptime!(spec.tile() + PAD);
    let unit = UNIT_POS_X as usize;
    let (across, down) = (unit % comptime!(EDGE) * 4, unit / comptime!(EDGE) * 4);
    let slices = min(part, k - begin).div_ceil(depth);
    for slice in 0..slices {
        let first = begin + slice * depth;
        load_rows(x, m, k, x_first, first, scale, xs, spec);
        load_matrix(w, table, layout, n, k, w_first, first, ws, spec);
        sync_cube();
        for inner in 0..depth {
            let mut a = Array::<f32>::new(each);
            let mut b = Array::<f32>::new(each);
            #[unroll]
            for i in 0..each {
                // Four by four, 64 apart, so that the units of a plane read adjacent places.
                let place = comptime!(i % 4 + i / 4 * 64);
                a[i] = xs[inner * stride + down + place];
                b[i] = ws[inner * stride + across + place];
            }
            #[unroll]
            for i in 0..each {
                #[unroll]
                for j in 0..each {
                    sums[comptime!(i * each + j)] += a[i] * b[j];
                }
            }
        }
        sync_cube();
    }
}

/// The slice of x from `first` on, times `scale`, zeros where there is none: `[depth, tile]`.
#[cube]
#[expect(clippy::too_many_arguments, reason = "kernels have no other way")]
fn load_rows(
    x: &[f32],
    m: usize,
    k: usize,
    x_first: usize,
    first: usize,
    scale: f32,
    xs: &mut Shared<[f32]>,
    #[comptime] spec: Spec,
) {
    let (tile, depth) = comptime!((spec.tile(), spec.depth()));
    let stride = comptime!(spec.tile() + PAD);
    let unit = UNIT_POS_X as usize;
    let corner = CUBE_POS_Y as usize * tile;
    #[unroll]
    for i in 0..4usize {
        let mut number = 0.0f32;
        if comptime!(spec.x_transposed) {
            // Neighbouring units take neighbouring rows of the result.
            let (row, inner) = (unit % tile, unit / tile + comptime!(i * depth / 4));
            if corner + row < m && first + inner < k {
                number = x[(x_first + first + inner) * m + corner + row] * scale;
            }
            xs[inner * stride + row] = number;
        } else {
            let (inner, row) = (unit % depth, unit / depth + comptime!(i * tile / 4));
            if corner + row < m && first + inner < k {
                number = x[(x_first + corner + row) * k + first + inner] * scale;
            }
            xs[inner * stride + row] = number;
        }
    }
}

/// The slice of the matrix from `first` on in f32, zeros where there is none: `[depth, tile]`.
#[cube]
#[expect(clippy::too_many_arguments, reason = "kernels have no other way")]
fn load_matrix(
    w: &[u32],
    table: &Shared<[f32]>,
    layout: &Layout,
    n: usize,
    k: usize,
    w_first: usize,
    first: usize,
    ws: &mut Shared<[f32]>,
    #[comptime] spec: Spec,
) {
    let (tile, depth) = comptime!((spec.tile(), spec.depth()));
    let stride = comptime!(spec.tile() + PAD);
    let unit = UNIT_POS_X as usize;
    let corner = CUBE_POS_X as usize * tile;
    let mut numbers = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        numbers[i] = 0.0f32;
    }
    match comptime!(spec.side) {
        Side::Transposed => {
            // A row of the matrix is a column of the result.
            let (column, inner) = (unit / comptime!(depth / 4), unit % comptime!(depth / 4) * 4);
            if corner + column < n && first + inner < k {
                let row = w_first + corner + column;
                quad(
                    w,
                    table,
                    row,
                    first + inner,
                    layout,
                    &mut numbers,
                    spec.kind,
                );
            }
            #[unroll]
            for i in 0..4usize {
                let mut number = numbers[i];
                if first + inner + i >= k {
                    // Zero times what is not defined need not be zero.
                    number = 0.0f32;
                }
                ws[(inner + i) * stride + column] = number;
            }
        }
        Side::Plain => {
            let (inner, column) = (unit / comptime!(tile / 4), unit % comptime!(tile / 4) * 4);
            if corner + column < n && first + inner < k {
                let row = w_first + first + inner;
                quad(
                    w,
                    table,
                    row,
                    corner + column,
                    layout,
                    &mut numbers,
                    spec.kind,
                );
            }
            #[unroll]
            for i in 0..4usize {
                ws[inner * stride + column + i] = numbers[i];
            }
        }
    }
}

/// `y = scale · x W + low_scale · low U`, x, W and U transposed or not, W and U both or neither.
#[cube(launch_unchecked, create_dummy_kernel)]
#[expect(clippy::too_many_arguments, reason = "kernels have no other way")]
pub(crate) fn product_kernel(
    x: &[f32],
    w: &[u32],
    low: &[f32],
    up: &[u32],
    y: &mut [f32],
    sizes: &Sizes,
    layout: &Layout,
    up_layout: &Layout,
    scale: f32,
    low_scale: f32,
    #[comptime] spec: Spec,
) {
    let each = comptime!(spec.each);
    let places = comptime!(spec.depth() * (spec.tile() + PAD));
    let mut xs = Shared::<[f32]>::new_slice(places);
    let mut ws = Shared::<[f32]>::new_slice(places);
    let table = table(w, spec.kind);
    sync_cube();
    let mut sums = Array::<f32>::new(comptime!(each * each));
    #[unroll]
    for i in 0..comptime!(each * each) {
        sums[i] = 0.0f32;
    }
    accumulate(
        x,
        w,
        &table,
        layout,
        sizes.m,
        sizes.n,
        sizes.k,
        CUBE_POS_Z as usize * sizes.part,
        sizes.part,
        sizes.x_first,
        sizes.w_first,
        scale,
        &mut xs,
        &mut ws,
        &mut sums,
        spec,
    );
    if comptime!(spec.low) {
        accumulate(
            low,
            up,
            &table,
            up_layout,
            sizes.m,
            sizes.n,
            sizes.rank,
            0usize,
            sizes.rank,
            sizes.x_first,
            sizes.up_first,
            low_scale,
            &mut xs,
            &mut ws,
            &mut sums,
            comptime!(spec.of_low()),
        );
    }
    store(y, &sums, sizes, spec);
}

/// The sums of all parts of the inner dimension, `[parts, count]`, to a result from `first` on.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn add_parts_kernel(
    sums: &[f32],
    y: &mut [f32],
    parts: usize,
    count: usize,
    first: usize,
    #[comptime] onto: bool,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let mut sum = 0.0f32;
        for part in 0..parts {
            sum += sums[part * count + at];
        }
        if comptime!(onto) {
            y[first + at] += sum;
        } else {
            y[first + at] = sum;
        }
    }
}

/// A unit's sums to their places.
#[cube]
fn store(y: &mut [f32], sums: &Array<f32>, sizes: &Sizes, #[comptime] spec: Spec) {
    let (tile, each) = comptime!((spec.tile(), spec.each));
    let unit = UNIT_POS_X as usize;
    let column = CUBE_POS_X as usize * tile + unit % comptime!(EDGE) * 4;
    let row = CUBE_POS_Y as usize * tile + unit / comptime!(EDGE) * 4;
    #[unroll]
    for i in 0..each {
        let row = row + comptime!(i % 4 + i / 4 * 64);
        if row < sizes.m {
            let first = CUBE_POS_Z as usize * sizes.m + sizes.y_first;
            let start = (first + row) * sizes.n;
            #[unroll]
            for j in 0..each {
                let column = column + comptime!(j % 4 + j / 4 * 64);
                if column < sizes.n {
                    let sum = sums[comptime!(i * each + j)];
                    if comptime!(spec.onto) {
                        y[start + column] += sum;
                    } else {
                        y[start + column] = sum;
                    }
                }
            }
        }
    }
}
