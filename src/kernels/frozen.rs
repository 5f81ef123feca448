//! A frozen matrix as it is stored, and the two products that training needs of it: `x Wᵀ` forward
//! and `g W` backward, both f32 in and out.
//!
//! # Dtypes
//! f32 is multiplied in f32. bf16 is multiplied in bf16 with f32 sums where the processor can
//! (`matmul` states the error). Otherwise, and for f16, blocks of rows that fit the cache are
//! converted to f32, exactly, and multiplied in f32: the numbers of f32 storage, in half its memory.
//! Quantised matrices take the same way; where they may be multiplied in bf16 and the processor can,
//! their blocks are rounded to bf16 first.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use half::{bf16, f16};
use rayon::prelude::*;

use super::flex::{self, ALL_THREADS, Matrix, Store};
#[cfg(target_arch = "x86_64")]
use super::matmul::{self, Product, Rows, Side, Term, delta};
use super::{QuantWeight, Quantised};

/// A matrix `[rows, cols]`, row by row.
#[derive(Clone, Copy)]
pub(super) struct Frozen<'a> {
    elements: Elements<'a>,
    rows: usize,
    cols: usize,
}

#[derive(Clone, Copy)]
enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    /// The rows from this one on.
    Quantised(&'a QuantWeight, usize),
}

/// What is added to a matrix: `s B A`.
#[derive(Clone, Copy)]
pub(super) struct Delta<'a> {
    /// A, `[R, cols]`
    pub(super) a: Matrix<'a>,
    /// B, `[rows, R]`
    pub(super) b: Matrix<'a>,
    /// s
    pub(super) scaling: f32,
}

/// Elements converted at once: 1 MiB of f32.
const BLOCK: usize = 1 << 18;
/// Elements that one task converts.
const EACH: usize = 1 << 14;
/// Fewest rows converted at once, however wide: each block reads x, or reads and writes the gradient
/// of x, once more. At 8192 columns, 32 rows took a quarter longer than 128.
const FEWEST_ROWS: usize = 128;

/// Whether products with a bf16 matrix are computed in bf16 here.
pub fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matmul::unit().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

impl<'a> Frozen<'a> {
    /// A contiguous tensor as a matrix of `cols` columns, whatever its shape.
    pub(super) fn new(tensor: &'a FlexTensor, cols: usize) -> Self {
        let elements = match tensor.dtype() {
            DType::BF16 => Elements::Bf16(flex::stored(tensor)),
            DType::F16 => Elements::F16(flex::stored(tensor)),
            _ => Elements::F32(flex::stored(tensor)),
        };
        Self {
            elements,
            rows: tensor.layout().num_elements() / cols.max(1),
            cols,
        }
    }

    /// A quantised matrix.
    pub(super) fn quantised(weight: &'a QuantWeight) -> Self {
        let [rows, cols] = weight.shape();
        Self {
            elements: Elements::Quantised(weight, 0),
            rows,
            cols,
        }
    }

    /// As fused operations take it.
    pub(super) fn of((tensor, quantised): &'a (FlexTensor, Quantised), cols: usize) -> Self {
        match quantised {
            Some(weight) => Self::quantised(weight),
            None => Self::new(tensor, cols),
        }
    }

    /// R
    pub(super) fn rows(self) -> usize {
        self.rows
    }

    /// Some of the rows.
    pub(super) fn part(self, first: usize, rows: usize) -> Self {
        let range = first * self.cols..(first + rows) * self.cols;
        let elements = match self.elements {
            Elements::F32(x) => Elements::F32(&x[range]),
            Elements::F16(x) => Elements::F16(&x[range]),
            Elements::Bf16(x) => Elements::Bf16(&x[range]),
            Elements::Quantised(weight, row) => Elements::Quantised(weight, row + first),
        };
        Self {
            elements,
            rows,
            ..self
        }
    }

    /// `dst = x Wᵀ`
    ///
    /// # Shapes
    /// x `[m, cols]` → `[m, rows]`
    pub(super) fn forward(self, dst: &mut [f32], x: &[f32]) {
        if self.rows == 0 || self.cols == 0 {
            return dst.fill(0.0);
        }
        let m = dst.len() / self.rows;
        #[cfg(target_arch = "x86_64")]
        if self.is_bf16() {
            return self.forward_in_bf16(dst, x);
        }
        let x = Matrix::new(x, m, self.cols);
        self.blocks(|first, w| {
            let dst = &mut dst[first..];
            flex::matmul(dst, self.rows, Store::Set, 1.0, (x, w.t()), ALL_THREADS);
        });
    }

    /// `dst = g W`
    ///
    /// # Shapes
    /// g `[m, rows]` → `[m, cols]`
    pub(super) fn backward(self, dst: &mut [f32], g: &[f32]) {
        if self.rows == 0 || self.cols == 0 {
            return dst.fill(0.0);
        }
        let m = g.len() / self.rows;
        #[cfg(target_arch = "x86_64")]
        if self.is_bf16() {
            return self.backward_in_bf16(dst, g);
        }
        if m == 0 {
            return;
        }
        self.blocks(|first, w| {
            let store = if first == 0 { Store::Set } else { Store::Add };
            let g = Matrix::strided(&g[first..], m, w.rows(), self.rows);
            flex::matmul(dst, self.cols, store, 1.0, (g, w), ALL_THREADS);
        });
    }

    /// `dst = x Wᵀ + s low Bᵀ`, where `low = x Aᵀ` is an output too.
    ///
    /// # Shapes
    /// x `[m, cols]` → `[m, rows]`, `[m, R]`
    pub(super) fn forward_adapted(
        self,
        (dst, low): (&mut [f32], &mut [f32]),
        x: &[f32],
        Delta { a, b, scaling }: Delta,
    ) {
        let m = x.len() / self.cols.max(1);
        let rank = a.rows();
        #[cfg(target_arch = "x86_64")]
        if let Some(matrix) = self.in_bf16_beside([a, b]) {
            let adapted = delta::Adapted {
                narrow: a,
                wide: b,
                scales: [1.0, scaling],
                side: Side::Transposed,
            };
            return adapted.multiply(low, x, Some((dst, matrix)));
        }
        self.forward(dst, x);
        let x = Matrix::new(x, m, self.cols);
        flex::matmul(low, rank, Store::Set, 1.0, (x, a.t()), ALL_THREADS);
        let low = Matrix::new(low, m, rank);
        flex::matmul(
            dst,
            self.rows,
            Store::Add,
            scaling,
            (low, b.t()),
            ALL_THREADS,
        );
    }

    /// `dst = g W + low A`, where that is wanted and `low = s g B` is an output too.
    ///
    /// # Shapes
    /// g `[m, rows]` → `[m, cols]`, `[m, R]`
    pub(super) fn backward_adapted(
        self,
        (dst, low): (Option<&mut [f32]>, &mut [f32]),
        g: &[f32],
        Delta { a, b, scaling }: Delta,
    ) {
        let m = g.len() / self.rows.max(1);
        let rank = a.rows();
        #[cfg(target_arch = "x86_64")]
        if let Some(matrix) = self.in_bf16_beside([a, b]) {
            let adapted = delta::Adapted {
                narrow: b,
                wide: a,
                scales: [scaling, 1.0],
                side: Side::Plain,
            };
            return adapted.multiply(low, g, dst.map(|dst| (dst, matrix)));
        }
        let g_matrix = Matrix::new(g, m, self.rows);
        flex::matmul(low, rank, Store::Set, scaling, (g_matrix, b), ALL_THREADS);
        if let Some(dst) = dst {
            self.backward(dst, g);
            let low = Matrix::new(low, m, rank);
            flex::matmul(dst, self.cols, Store::Add, 1.0, (low, a), ALL_THREADS);
        }
    }

    /// Whether this matrix is multiplied in bf16 here.
    #[cfg(target_arch = "x86_64")]
    fn is_bf16(self) -> bool {
        has_bf16_products()
            && match self.elements {
                Elements::Bf16(_) => true,
                Elements::Quantised(weight, _) => weight.in_bf16,
                Elements::F32(_) | Elements::F16(_) => false,
            }
    }

    /// The matrix where it is kept in bf16 and multiplied together with these factors of a delta. What is
    /// quantised becomes bf16 block by block, and the delta is added to their sum.
    #[cfg(target_arch = "x86_64")]
    fn in_bf16_beside(self, factors: [Matrix; 2]) -> Option<&'a [bf16]> {
        let pays = delta::pays() && !factors.iter().any(|factor| factor.is_empty());
        match self.elements {
            Elements::Bf16(matrix) if pays => Some(matrix),
            _ => None,
        }
    }

    /// [`Frozen::forward`] in bf16.
    #[cfg(target_arch = "x86_64")]
    fn forward_in_bf16(self, dst: &mut [f32], x: &[f32]) {
        let m = dst.len() / self.rows;
        let x = Rows::new(x, [m, self.cols], self.cols);
        self.blocks_in_bf16(|first, matrix, rows| {
            let dst = dst.get_mut(first..).unwrap_or_default();
            matmul::multiply(Product {
                dst: Rows::to_write(dst, [m, rows], self.rows),
                store: Store::Set,
                terms: vec![Term { x, matrix }],
                side: Side::Transposed,
            });
        });
    }

    /// [`Frozen::backward`] in bf16.
    #[cfg(target_arch = "x86_64")]
    fn backward_in_bf16(self, dst: &mut [f32], g: &[f32]) {
        let m = g.len() / self.rows;
        self.blocks_in_bf16(|first, matrix, rows| {
            let x = Rows::new(g.get(first..).unwrap_or_default(), [m, rows], self.rows);
            matmul::multiply(Product {
                dst: Rows::to_write(dst, [m, self.cols], self.cols),
                store: if first == 0 { Store::Set } else { Store::Add },
                terms: vec![Term { x, matrix }],
                side: Side::Plain,
            });
        });
    }

    /// Calls `each` with the first row of each block of rows and its values in f32.
    fn blocks(self, mut each: impl FnMut(usize, Matrix)) {
        if let Elements::F32(w) = self.elements {
            return each(0, Matrix::new(w, self.rows, self.cols));
        }
        let height = (BLOCK / self.cols).max(FEWEST_ROWS).min(self.rows);
        let mut values = vec![0f32; height * self.cols];
        for first in (0..self.rows).step_by(height) {
            let rows = height.min(self.rows - first);
            let values = &mut values[..rows * self.cols];
            self.part(first, rows).convert(values);
            each(first, Matrix::new(values, rows, self.cols));
        }
    }

    /// [`Frozen::blocks`], rounded to bf16, with their numbers of rows.
    #[cfg(target_arch = "x86_64")]
    fn blocks_in_bf16(self, mut each: impl FnMut(usize, &[bf16], usize)) {
        if let Elements::Bf16(w) = self.elements {
            return each(0, w, self.rows);
        }
        // More rows than in f32, as x is rounded anew for each block of them.
        let height = (BLOCK / self.cols).max(4 * FEWEST_ROWS).min(self.rows);
        let at_once = (EACH / self.cols).max(1);
        let mut rounded = vec![bf16::ZERO; height * self.cols];
        for first in (0..self.rows).step_by(height) {
            let rows = height.min(self.rows - first);
            let block = &mut rounded[..rows * self.cols];
            let parts = block.par_chunks_mut(at_once * self.cols).enumerate();
            let buffer = || vec![0f32; at_once * self.cols];
            parts.for_each_init(buffer, |values, (i, to)| {
                let values = &mut values[..to.len()];
                let part = self.part(first + i * at_once, to.len() / self.cols);
                part.convert(values);
                flex::vectorised(
                    #[inline(always)]
                    || {
                        for (to, from) in to.iter_mut().zip(&*values) {
                            *to = flex::to_bf16(*from);
                        }
                    },
                );
            });
            each(first, block, rows);
        }
    }

    /// All elements in f32.
    fn convert(self, to: &mut [f32]) {
        match self.elements {
            Elements::F32(from) => to.copy_from_slice(from),
            Elements::F16(from) => in_parallel(to, from, |from, to| {
                half::slice::HalfFloatSliceExt::convert_to_f32_slice(from, to);
            }),
            Elements::Bf16(from) => in_parallel(to, from, |from, to| {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = f32::from_bits(u32::from(from.to_bits()) << 16);
                }
            }),
            Elements::Quantised(weight, row) => weight.on_host().dequantise_rows(row, to),
        }
    }
}

fn in_parallel<T: Sync>(to: &mut [f32], from: &[T], convert: impl Fn(&[T], &mut [f32]) + Sync) {
    (to.par_chunks_mut(EACH))
        .zip(from.par_chunks(EACH))
        .for_each(|(to, from)| convert(from, to));
}
