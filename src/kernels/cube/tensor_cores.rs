//! The products of [`product`](super::product) on tensor cores: both factors rounded to bf16 on their way
//! into shared memory, sums in f32.
//!
//! Where a device multiplies 16 × 16 matrices of bf16, weights that `train.precision` allows to be
//! multiplied in bf16 take this way. Each factor is off by up to 2⁻⁹ of itself, and a product by
//! `2⁻⁸ Σ |x| |w|` at most, as on CPUs that multiply in bf16. Low-rank parts are not rounded: they are
//! added in f32, by the other kernel.

use cubecl::client::Client;
use cubecl::cmma;
use cubecl::prelude::*;
use half::bf16;

use super::packed::Kind;
use super::tiles::{Side, Sizes};
use super::unpack::{Layout, quad, table};

/// Units of a cube: eight planes of 32, two down and four across.
pub(super) const UNITS: u32 = 256;
/// Edge of a cube's tile.
pub(super) const TILE: usize = 128;
/// Edge of what one instruction multiplies.
const FRAGMENT: usize = 16;
/// Inner dimension of a slice.
const DEPTH: usize = 32;
/// A plane's fragments, down and across.
const DOWN: usize = 4;
const ACROSS: usize = 2;
/// Vectors of four by which a row in shared memory is longer than it must be, against bank conflicts.
const PAD: usize = 2;

type Four = Const<4>;
type Halves = Vector<bf16, Four>;

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Spec {
    pub(super) kind: Kind,
    pub(super) side: Side,
}

impl Spec {
    /// Vectors of a row of the matrix's slice in shared memory: along the inner dimension if the matrix
    /// is transposed, across the tile if not.
    const fn row(self) -> usize {
        match self.side {
            Side::Transposed => DEPTH / 4 + PAD,
            Side::Plain => TILE / 4 + PAD,
        }
    }

    /// Rows of that slice.
    const fn rows(self) -> usize {
        match self.side {
            Side::Transposed => TILE,
            Side::Plain => DEPTH,
        }
    }
}

/// Whether a device can.
pub(super) fn available(client: &Client) -> bool {
    let properties = client.properties();
    let (elements, sums) = (bf16::elem_type_native(), f32::elem_type_native());
    let edge = FRAGMENT as u32;
    let cmma = properties.features.matmul.cmma.iter();
    let mut fitting = cmma.filter(|of| {
        let types = (of.a_type, of.b_type, of.cd_type) == (elements, elements, sums);
        types && [of.m, of.n, of.k] == [edge; 3]
    });
    let hardware = &properties.hardware;
    let planes = [hardware.plane_size_min, hardware.plane_size_max];
    fitting.next().is_some() && planes == [32; 2]
}

/// `y = scale · x W`, W transposed or not; x's columns are a multiple of four.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn tensor_core_kernel(
    x: &[Vector<f32, Four>],
    w: &[u32],
    y: &mut [f32],
    sizes: &Sizes,
    layout: &Layout,
    scale: f32,
    #[comptime] spec: Spec,
) {
    let x_row = comptime!(DEPTH / 4 + PAD);
    let mut xs = Shared::<[Halves]>::new_aligned_slice(comptime!(TILE * x_row), 32usize);
    let places = comptime!(spec.rows() * spec.row());
    let mut ws = Shared::<[Halves]>::new_aligned_slice(places, 32usize);
    let table = table(w, spec.kind);
    sync_cube();
    let plane = UNIT_POS_X as usize / 32;
    // The plane's first row and column in the tile.
    let (top, left) = (
        plane / 4 * comptime!(DOWN * FRAGMENT),
        plane % 4 * comptime!(ACROSS * FRAGMENT),
    );
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(DOWN * ACROSS) {
        sums.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            FRAGMENT,
            FRAGMENT,
            FRAGMENT,
            cmma::MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    let slices = sizes.k.div_ceil(comptime!(DEPTH));
    for slice in 0..slices {
        let first = slice * comptime!(DEPTH);
        load_rows(x, sizes, first, scale, &mut xs);
        load_matrix(w, &table, layout, sizes, first, &mut ws, spec);
        sync_cube();
        multiply(&xs, &ws, &sums, top, left, spec);
        sync_cube();
    }
    store(y, &sums, sizes, top, left);
}

/// The slice of x from `first` on, zeros where there is none: `[TILE, DEPTH]`.
#[cube]
fn load_rows(
    x: &[Vector<f32, Four>],
    sizes: &Sizes,
    first: usize,
    scale: f32,
    xs: &mut Shared<[Halves]>,
) {
    let across = comptime!(DEPTH / 4);
    let unit = UNIT_POS_X as usize;
    let corner = CUBE_POS_Y as usize * comptime!(TILE);
    let inner = unit % across;
    #[unroll]
    for i in 0..comptime!(TILE * DEPTH / 4 / UNITS as usize) {
        let row = unit / across + comptime!(i * UNITS as usize / (DEPTH / 4));
        let mut numbers = Vector::<f32, Four>::new(0.0f32);
        if corner + row < sizes.m && first + inner * 4 < sizes.k {
            let start = (sizes.x_first + corner + row) * (sizes.k / 4);
            numbers = x[start + first / 4 + inner] * Vector::new(scale);
        }
        xs[row * comptime!(DEPTH / 4 + PAD) + inner] = Vector::cast_from(numbers);
    }
}

/// The slice of the matrix from `first` on, zeros where there is none: `[TILE, DEPTH]` if it is
/// transposed, else `[DEPTH, TILE]`.
#[cube]
fn load_matrix(
    w: &[u32],
    table: &Shared<[f32]>,
    layout: &Layout,
    sizes: &Sizes,
    first: usize,
    ws: &mut Shared<[Halves]>,
    #[comptime] spec: Spec,
) {
    let across = comptime!(spec.row() - PAD);
    let unit = UNIT_POS_X as usize;
    let corner = CUBE_POS_X as usize * comptime!(TILE);
    #[unroll]
    for i in 0..comptime!(TILE * DEPTH / 4 / UNITS as usize) {
        let at = unit + comptime!(i * UNITS as usize);
        let (row, col) = (at / across, at % across * 4);
        // Where the matrix begins, and what it has of rows and columns.
        let (top, left, rows, cols) = match comptime!(spec.side) {
            Side::Transposed => (corner, first, sizes.n, sizes.k),
            Side::Plain => (first, corner, sizes.k, sizes.n),
        };
        let mut numbers = Array::<f32>::new(4usize);
        #[unroll]
        for j in 0..4usize {
            numbers[j] = 0.0f32;
        }
        if top + row < rows && left + col < cols {
            let from = sizes.w_first + top + row;
            quad(w, table, from, left + col, layout, &mut numbers, spec.kind);
        }
        let mut vector = Vector::<f32, Four>::new(0.0f32);
        #[unroll]
        for j in 0..4usize {
            vector.insert(j, numbers[j]);
        }
        ws[row * comptime!(spec.row()) + col / 4] = Vector::cast_from(vector);
    }
}

/// A slice into the sums of a plane.
#[cube]
fn multiply(
    xs: &Shared<[Halves]>,
    ws: &Shared<[Halves]>,
    sums: &Sequence<cmma::Matrix<f32>>,
    top: usize,
    left: usize,
    #[comptime] spec: Spec,
) {
    let (x_row, w_row) = comptime!((DEPTH / 4 + PAD, spec.row()));
    #[unroll]
    for step in 0..comptime!(DEPTH / FRAGMENT) {
        let inner = comptime!(step * FRAGMENT);
        let mut columns = Sequence::<cmma::Matrix<Halves>>::new();
        #[unroll]
        for j in 0..ACROSS {
            let left = left + comptime!(j * FRAGMENT);
            match comptime!(spec.side) {
                Side::Transposed => {
                    let start = left * w_row + comptime!(inner / 4);
                    columns.push(cmma::Matrix::<Halves>::from_slice(
                        cmma::MatrixIdent::B,
                        FRAGMENT,
                        FRAGMENT,
                        FRAGMENT,
                        cmma::MatrixLayout::ColMajor,
                        &ws[start..comptime!(spec.rows() * spec.row())],
                        comptime!(4 * w_row as u32),
                    ));
                }
                Side::Plain => {
                    let start = comptime!(inner * w_row) + left / 4;
                    columns.push(cmma::Matrix::<Halves>::from_slice(
                        cmma::MatrixIdent::B,
                        FRAGMENT,
                        FRAGMENT,
                        FRAGMENT,
                        cmma::MatrixLayout::RowMajor,
                        &ws[start..comptime!(spec.rows() * spec.row())],
                        comptime!(4 * w_row as u32),
                    ));
                }
            }
        }
        #[unroll]
        for i in 0..DOWN {
            let start = (top + comptime!(i * FRAGMENT)) * x_row + comptime!(inner / 4);
            let rows = cmma::Matrix::<Halves>::from_slice(
                cmma::MatrixIdent::A,
                FRAGMENT,
                FRAGMENT,
                FRAGMENT,
                cmma::MatrixLayout::RowMajor,
                &xs[start..comptime!(TILE * x_row)],
                comptime!(4 * x_row as u32),
            );
            #[unroll]
            for j in 0..ACROSS {
                let sum = sums.index(comptime!(i * ACROSS + j));
                cmma::execute(&rows, columns.index(j), sum, sum);
            }
        }
    }
}

/// The sums of a plane to their places, by way of shared memory, as which unit has which is not said.
#[cube]
fn store(
    y: &mut [f32],
    sums: &Sequence<cmma::Matrix<f32>>,
    sizes: &Sizes,
    top: usize,
    left: usize,
) {
    let each = comptime!(FRAGMENT * FRAGMENT);
    let mut staged =
        Shared::<[f32]>::new_aligned_slice(comptime!(UNITS as usize / 32 * each), 32usize);
    let (plane, unit) = (UNIT_POS_X as usize / 32, UNIT_POS_X as usize % 32);
    let start = plane * each;
    #[unroll]
    for fragment in 0..comptime!(DOWN * ACROSS) {
        cmma::store(
            &mut staged[start..start + each],
            sums.index(fragment),
            comptime!(FRAGMENT as u32),
            cmma::MatrixLayout::RowMajor,
        );
        sync_cube();
        let row =
            CUBE_POS_Y as usize * comptime!(TILE) + top + comptime!(fragment / ACROSS * FRAGMENT);
        let col =
            CUBE_POS_X as usize * comptime!(TILE) + left + comptime!(fragment % ACROSS * FRAGMENT);
        #[unroll]
        for i in 0..comptime!(each / 32) {
            let at = unit + comptime!(i * 32);
            let (row, col) = (
                row + at / comptime!(FRAGMENT),
                col + at % comptime!(FRAGMENT),
            );
            if row < sizes.m && col < sizes.n {
                y[(sizes.y_first + row) * sizes.n + col] = staged[start + at];
            }
        }
        // Nobody may overwrite it before all have read it.
        sync_cube();
    }
}
