//! Products of f32 activations with a frozen bf16 matrix by AVX512-BF16, for processors that have it.
//!
//! The matrix stays in memory as it was loaded, row by row: both `x Wᵀ` and `g W` copy a block of it
//! that fits the cache into the order in which the tile reads it, which costs a fifth of a cycle an
//! element where the product takes one cycle for 32 of them and each row of x. A second layout for
//! either direction would have to be kept, or the first undone, for a few per cent at most.
//!
//! # Arithmetic
//! x (or g) is rounded to bf16, to nearest even, as it is copied. `_mm512_dpbf16_ps` multiplies pairs
//! exactly and adds them in f32, so only two things differ from the product in f32: that rounding,
//! and subnormal numbers, which count as 0 here. bf16 has 8 significant bits, so that rounding changes a
//! number by at most u = 2⁻⁸ of itself, and each result is within
//!
//! > `u · Σ |x| |w|`
//!
//! of the exact product with the same matrix, beside f32's own rounding. Results do not depend on the
//! number of threads nor on what other rows there are: each sums the same terms in the same order.

use std::arch::x86_64::{
    __cpuid, __m512, __m512bh, __m512i, _mm256_maskz_loadu_epi16, _mm512_add_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_or_si512,
    _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::cell::RefCell;
use std::mem::transmute;
use std::ops::Range;
use std::sync::LazyLock;

use half::bf16;
use rayon::prelude::*;

use super::flex::{Shared, Store};

/// Rows and vectors of 16 columns of a tile: with their operands they fill the 32 registers.
const TILE_ROWS: usize = 8;
const TILE_VECTORS: usize = 3;
const TILE_COLUMNS: usize = 16 * TILE_VECTORS;
/// Terms that are summed before the next block of them: a panel of the matrix then fits the L1 cache.
const TERMS: usize = 256;
/// Terms for which the matrix is copied at once: the sums then stay in the L2 cache for several blocks.
const DEPTH: usize = 8 * TERMS;
/// Lines in a row of the copied activations: odd, so that neighbouring rows do not share cache sets.
const ROW_LINES: usize = TERMS / 32 + 1;
/// Rows and panels of columns that are computed at once: their sums take half of a small L2 cache, and
/// the copy of the matrix 3 MiB of the L3 cache.
const ROWS: usize = 192;
const PANELS: usize = 16;
/// Fewest rows for which it pays that a task has its own copy of the matrix.
const FEW_ROWS: usize = 64;
/// Products smaller than this are not worth a second thread.
const SMALL: usize = 1 << 18;

/// Which way the matrix `[out, in]` is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Side {
    /// `x [m, in] · Wᵀ → [m, out]`
    Transposed,
    /// `g [m, out] · W → [m, in]`
    Plain,
}

/// A cache line: 16 pairs of neighbouring terms, or 32 terms.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// What a thread copies into.
struct Scratch {
    /// Activations: [`ROWS`] rows of [`ROW_LINES`].
    lhs: Vec<Line>,
    /// The matrix: panel by panel, pair of terms by pair, [`TILE_VECTORS`] lines each.
    rhs: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        lhs: vec![Line([0; 16]); ROWS * ROW_LINES],
        rhs: vec![Line([0; 16]); PANELS * DEPTH / 2 * TILE_VECTORS],
    });
}

/// One product, its slices checked.
#[derive(Clone, Copy)]
struct Product<'a> {
    /// `[m, k]`
    lhs: &'a [f32],
    /// `[out, in]`
    matrix: &'a [bf16],
    side: Side,
    /// Columns of the result.
    n: usize,
    /// Terms of each sum.
    k: usize,
    dst: Shared,
    /// From row to row of lhs and of dst.
    strides: [usize; 2],
    /// Whether dst is replaced or gains.
    store: Store,
}

/// Whether the processor has these products.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// Whether they are faster than products in f32 here. AMD's cores (Zen 4 and later) take twice as many
/// terms a cycle in bf16 as in f32 (355 GFLOP/s against 205 on two); Intel's do not (150 against 290 on
/// two of Emerald Rapids), as they have AMX for that. By maker and not by measurement, so that a run
/// that is resumed rounds as it did.
pub(super) fn pays() -> bool {
    static PAYS: LazyLock<bool> = LazyLock::new(|| {
        let id = __cpuid(0);
        let maker = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes);
        is_available() && maker.as_flattened() == b"AuthenticAMD"
    });
    *PAYS
}

/// `dst = lhs · matrixᵀ`, or `lhs · matrix`.
///
/// # Shapes
/// matrix `[out, in]`; m rows of lhs and dst, whose widths follow from `side`.
pub(super) fn multiply(
    dst: &mut [f32],
    lhs: &[f32],
    matrix: &[bf16],
    ([out, input], m): ([usize; 2], usize),
    side: Side,
) {
    assert!(is_available());
    let (n, k) = match side {
        Side::Transposed => (out, input),
        Side::Plain => (input, out),
    };
    if k == 0 {
        return dst.fill(0.0);
    }
    let strides = [k, n];
    let shape = ([out, input], m);
    multiply_part((dst, lhs), strides, Store::Set, matrix, shape, side);
}

/// [`multiply`] with some rows of a larger matrix, whose factor and result are columns of larger ones:
/// `strides` apart from row to row. dst is set, or gains.
pub(super) fn multiply_part(
    (dst, lhs): (&mut [f32], &[f32]),
    strides: [usize; 2],
    store: Store,
    matrix: &[bf16],
    ([out, input], m): ([usize; 2], usize),
    side: Side,
) {
    assert!(is_available());
    let (n, k) = match side {
        Side::Transposed => (out, input),
        Side::Plain => (input, out),
    };
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let span = |stride: usize, width: usize| (m - 1) * stride + width;
    assert!(strides[0] >= k && strides[1] >= n && matrix.len() == n * k);
    assert!(span(strides[0], k) <= lhs.len() && span(strides[1], n) <= dst.len());
    let product = Product {
        lhs,
        matrix,
        side,
        n,
        k,
        dst: Shared::new(dst),
        strides,
        store,
    };
    // A task copies its columns of the matrix and its rows of the activations: the nearer to a square,
    // the less.
    let panels = n.div_ceil(TILE_COLUMNS);
    let wanted = match m * n * k < SMALL {
        true => 1,
        false => 2 * rayon::current_num_threads(),
    };
    let across = (wanted as f64 * n as f64 / m as f64).sqrt().ceil() as usize;
    let width = panels.div_ceil(across.clamp(1, panels)).min(PANELS);
    let across = panels.div_ceil(width);
    let down = wanted.div_ceil(across).min(m.div_ceil(FEW_ROWS));
    let height = m.div_ceil(down).next_multiple_of(TILE_ROWS);
    let tasks = across * m.div_ceil(height);
    let task = |task: usize| {
        let (row, panel) = (task / across * height, task % across * width);
        let rows = row..(row + height).min(m);
        let panels = panel..(panel + width).min(panels);
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the features were found above, the slices have the sizes that `Product`
            // states, and no two tasks have rows and columns in common.
            unsafe { block(product, rows, panels, scratch) }
        });
    };
    match tasks {
        1 => task(0),
        _ => (0..tasks).into_par_iter().with_max_len(1).for_each(task),
    }
}

/// Some rows and panels of a product.
///
/// # Safety
/// As [`multiply`] says.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn block(product: Product, rows: Range<usize>, panels: Range<usize>, scratch: &mut Scratch) {
    let k = product.k;
    for first in (0..k).step_by(DEPTH) {
        let depth = first..(first + DEPTH).min(k);
        let pairs = depth.len().div_ceil(2);
        let copies = scratch.rhs.chunks_exact_mut(pairs * TILE_VECTORS);
        for (panel, lines) in panels.clone().zip(copies) {
            // SAFETY: the features are this function's own.
            unsafe { copy_panel(product, panel * TILE_COLUMNS, depth.clone(), lines) };
        }
        for row in rows.clone().step_by(ROWS) {
            let some = row..(row + ROWS).min(rows.end);
            for first in depth.clone().step_by(TERMS) {
                let terms = first..(first + TERMS).min(depth.end);
                // SAFETY: as above; the rows and columns are this task's.
                unsafe {
                    copy_rows(product, some.clone(), terms.clone(), &mut scratch.lhs);
                    tiles(
                        product,
                        some.clone(),
                        panels.clone(),
                        [&depth, &terms],
                        scratch,
                    );
                }
            }
        }
    }
}

/// Adds some terms, whose activations and matrix were copied, to some rows and panels.
///
/// # Safety
/// As [`multiply`] says.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tiles(
    product: Product,
    rows: Range<usize>,
    panels: Range<usize>,
    [depth, terms]: [&Range<usize>; 2],
    scratch: &Scratch,
) {
    let (n, stride) = (product.n, product.strides[1]);
    let sets = terms.start == 0 && product.store == Store::Set;
    let panel_lines = depth.len().div_ceil(2) * TILE_VECTORS;
    let skipped = (terms.start - depth.start) / 2 * TILE_VECTORS;
    let lines = terms.len().div_ceil(2) * TILE_VECTORS;
    for (i, panel) in panels.enumerate() {
        let rhs = &scratch.rhs[i * panel_lines + skipped..][..lines];
        let column = panel * TILE_COLUMNS;
        let width = TILE_COLUMNS.min(n - column);
        for (top, lhs) in
            (rows.clone().step_by(TILE_ROWS)).zip(scratch.lhs.chunks_exact(TILE_ROWS * ROW_LINES))
        {
            let height = TILE_ROWS.min(rows.end - top);
            // SAFETY: the tile's rows and columns lie inside `dst` and are this task's.
            unsafe {
                let dst = product.dst.at(top * stride + column);
                tile(lhs, rhs, dst, stride, [height, width], sets);
            }
        }
    }
}

/// One tile of the result: sets or gains `rows` × `columns` elements, at most a whole tile.
///
/// # Safety
/// They must be valid, `stride` apart from row to row, and no other thread's.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile(
    lhs: &[Line],
    rhs: &[Line],
    dst: *mut f32,
    stride: usize,
    [rows, columns]: [usize; 2],
    is_first: bool,
) {
    let pairs = rhs.len() / TILE_VECTORS;
    let mut sums = [[_mm512_setzero_ps(); TILE_VECTORS]; TILE_ROWS];
    let (mut a, mut b) = (lhs.as_ptr().cast::<i32>(), rhs.as_ptr());
    for _ in 0..pairs {
        // SAFETY: `pairs` steps of both pointers stay inside their slices.
        unsafe {
            let b_vectors: [__m512bh; TILE_VECTORS] =
                std::array::from_fn(|j| transmute(_mm512_loadu_si512(b.add(j).cast())));
            for (i, sums) in sums.iter_mut().enumerate() {
                let a: __m512bh = transmute(_mm512_set1_epi32(*a.add(i * ROW_LINES * 16)));
                for (sum, b) in sums.iter_mut().zip(b_vectors) {
                    *sum = _mm512_dpbf16_ps(*sum, a, b);
                }
            }
            (a, b) = (a.add(1), b.add(TILE_VECTORS));
        }
    }
    if [rows, columns] == [TILE_ROWS, TILE_COLUMNS] {
        // SAFETY: by this function's contract.
        unsafe { store(sums, dst, stride, is_first) };
        return;
    }
    let mut whole = [0f32; TILE_ROWS * TILE_COLUMNS];
    // SAFETY: `whole` holds a tile.
    unsafe { store(sums, whole.as_mut_ptr(), TILE_COLUMNS, true) };
    for (i, row) in whole.chunks_exact(TILE_COLUMNS).take(rows).enumerate() {
        for (j, value) in row[..columns].iter().enumerate() {
            // SAFETY: by this function's contract.
            unsafe {
                let at = dst.add(i * stride + j);
                *at = if is_first { *value } else { *at + value };
            }
        }
    }
}

/// # Safety
/// `dst` must be valid for a tile whose rows lie `stride` apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(
    sums: [[__m512; TILE_VECTORS]; TILE_ROWS],
    dst: *mut f32,
    stride: usize,
    is_first: bool,
) {
    for (i, row) in sums.into_iter().enumerate() {
        for (j, sum) in row.into_iter().enumerate() {
            // SAFETY: by this function's contract.
            unsafe {
                let at = dst.add(i * stride + 16 * j);
                let value = match is_first {
                    true => sum,
                    false => _mm512_add_ps(sum, _mm512_loadu_ps(at)),
                };
                _mm512_storeu_ps(at, value);
            }
        }
    }
}

/// Rounds rows of the activations to bf16; rows that fill up the last tile are 0.
///
/// # Safety
/// The rows and terms must lie inside `product.lhs`, and `lines` must hold [`ROWS`] rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn copy_rows(product: Product, rows: Range<usize>, terms: Range<usize>, lines: &mut [Line]) {
    let count = terms.len();
    let height = rows.len();
    let lines = lines.chunks_exact_mut(ROW_LINES);
    for (i, lines) in (0..height.next_multiple_of(TILE_ROWS)).zip(lines) {
        let lines = &mut lines[..count.div_ceil(32)];
        if i >= height {
            lines.fill(Line([0; 16]));
            continue;
        }
        let start = (rows.start + i) * product.strides[0] + terms.start;
        let from = product.lhs[start..start + count].as_ptr();
        for (c, line) in lines.iter_mut().enumerate() {
            let left = count - 32 * c;
            // SAFETY: the masks leave out what lies past the row's terms.
            unsafe {
                let from = from.add(32 * c);
                let low = _mm512_maskz_loadu_ps(low_bits(left) as u16, from);
                let high = match left > 16 {
                    true => _mm512_maskz_loadu_ps(low_bits(left - 16) as u16, from.add(16)),
                    false => _mm512_setzero_ps(),
                };
                let both: __m512i = transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(std::ptr::from_mut(line).cast(), both);
            }
        }
    }
}

/// Copies 48 columns of the right-hand side, pairs of terms side by side; columns past the last are 0.
///
/// # Safety
/// The terms must lie inside the matrix; `lines` must hold the panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn copy_panel(product: Product, column: usize, terms: Range<usize>, lines: &mut [Line]) {
    for vector in 0..TILE_VECTORS {
        let column = column + 16 * vector;
        let columns = column.min(product.n)..(column + 16).min(product.n);
        // SAFETY: as this function's own.
        unsafe {
            match product.side {
                Side::Transposed => {
                    copy_rows_across(product, columns, terms.clone(), vector, lines)
                }
                Side::Plain => copy_row_pairs(product, columns, terms.clone(), vector, lines),
            }
        }
    }
}

/// `x Wᵀ`: the matrix has a row for each column of the panel, and a row's pairs are neighbours.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn copy_rows_across(
    product: Product,
    columns: Range<usize>,
    terms: Range<usize>,
    vector: usize,
    lines: &mut [Line],
) {
    let pairs = lines.len() / TILE_VECTORS;
    for first in (0..pairs).step_by(16) {
        let left = terms.len() - 2 * first;
        let mut rows = [_mm512_setzero_si512(); 16];
        for (row, column) in rows.iter_mut().zip(columns.clone()) {
            let start = column * product.k + terms.start + 2 * first;
            let from = product.matrix[start..].as_ptr();
            // SAFETY: the mask leaves out what lies past the row's terms.
            *row = unsafe { _mm512_maskz_loadu_epi16(low_bits(left), from.cast()) };
        }
        let across = transposed(rows);
        let to = lines.chunks_exact_mut(TILE_VECTORS).skip(first);
        for (lines, pair) in to.zip(across) {
            // SAFETY: a line holds a vector.
            unsafe {
                _mm512_storeu_si512(std::ptr::from_mut(&mut lines[vector]).cast(), pair);
            }
        }
    }
}

/// `g W`: the terms are rows of the matrix, and a pair's elements lie one above the other.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn copy_row_pairs(
    product: Product,
    columns: Range<usize>,
    terms: Range<usize>,
    vector: usize,
    lines: &mut [Line],
) {
    let mask = low_bits(columns.len()) as u16;
    let row = |term: usize| {
        let start = term * product.n + columns.start;
        let from = product.matrix[start..start + columns.len()].as_ptr();
        // SAFETY: the mask leaves out what lies past the columns.
        let half = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_cvtepu16_epi32(half)
    };
    let pairs = terms.clone().step_by(2);
    for (term, lines) in pairs.zip(lines.chunks_exact_mut(TILE_VECTORS)) {
        let upper = match term + 1 < terms.end {
            true => _mm512_slli_epi32::<16>(row(term + 1)),
            false => _mm512_setzero_si512(),
        };
        let pair = _mm512_or_si512(row(term), upper);
        // SAFETY: a line holds a vector.
        unsafe { _mm512_storeu_si512(std::ptr::from_mut(&mut lines[vector]).cast(), pair) };
    }
}

/// A mask of the first `count` elements, all 32 where there are more.
fn low_bits(count: usize) -> u32 {
    match count {
        0..32 => (1 << count) - 1,
        _ => u32::MAX,
    }
}

/// A 16 × 16 matrix of words, transposed.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut quads = [_mm512_setzero_si512(); 16];
    for i in (0..16).step_by(4) {
        let low = |j: usize| _mm512_unpacklo_epi32(rows[i + j], rows[i + j + 1]);
        let high = |j: usize| _mm512_unpackhi_epi32(rows[i + j], rows[i + j + 1]);
        // Quarter q of `quads[i + c]` holds column 4q + c of rows i to i + 3.
        quads[i] = _mm512_unpacklo_epi64(low(0), low(2));
        quads[i + 1] = _mm512_unpackhi_epi64(low(0), low(2));
        quads[i + 2] = _mm512_unpacklo_epi64(high(0), high(2));
        quads[i + 3] = _mm512_unpackhi_epi64(high(0), high(2));
    }
    let mut columns = [_mm512_setzero_si512(); 16];
    for c in 0..4 {
        // Quarters 0 and 2, then 1 and 3, of two vectors.
        let even = |i: usize| _mm512_shuffle_i32x4::<0x88>(quads[i + c], quads[i + 4 + c]);
        let odd = |i: usize| _mm512_shuffle_i32x4::<0xdd>(quads[i + c], quads[i + 4 + c]);
        columns[c] = _mm512_shuffle_i32x4::<0x88>(even(0), even(8));
        columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even(0), even(8));
        columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd(0), odd(8));
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd(0), odd(8));
    }
    columns
}
