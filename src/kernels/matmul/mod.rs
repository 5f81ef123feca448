//! Products of f32 activations with a frozen bf16 matrix, on processors that multiply in bf16.
//!
//! The matrix stays in memory as it was loaded, row by row: both `x Wᵀ` and `g W` first copy it, 8 MiB at
//! a time, into the order in which tiles read it. A second layout for either direction would have to be
//! kept, or the first undone, for a few per cent at most.
//!
//! Matrix registers multiply faster than the memory of most machines delivers activations. So a task
//! takes some rows through all that is to be done with them, a chain of products, while they are in its
//! cache. There are more tasks than threads: on a desk's machine they seldom run alone.
//!
//! # Arithmetic
//! x (or g) is rounded to bf16, to nearest even, as it is copied. Pairs are then multiplied exactly and
//! added in f32 (`vdpbf16ps`, or `tdpbf16ps` where there are matrix registers), so only two things
//! differ from the product in f32: that rounding, and subnormal numbers, which count as 0 here. bf16 has
//! 8 significant bits, so that rounding changes a number by at most u = 2⁻⁸ of itself, and each result
//! is within
//!
//! > `u · Σ |x| |w|`
//!
//! of the exact product with the same matrix, beside f32's own rounding. Results do not depend on the
//! number of threads nor on what other rows there are: each sums the same terms in the same order.

mod amx;
mod compute;
mod copy;
pub(super) mod delta;
#[cfg(test)]
mod tests;
mod vector;

use std::arch::x86_64::__cpuid;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::LazyLock;

use half::bf16;
use rayon::prelude::*;

use self::amx::Amx;
use self::compute::Copied;
use self::vector::PairFma;
use super::flex::{Shared, Store, unset};

/// Words of a cache line; a word is a pair of neighbouring terms.
const WORDS: usize = 16;
/// Most rows of a task.
const ROWS: usize = 128;
/// Bytes of the matrices that are copied at once, and words of their terms.
const COPIED: usize = 8 << 20;
const DEPTH: usize = 2048;
/// Products smaller than this are not worth a second thread.
const SMALL: usize = 1 << 18;
/// The largest tile, in elements.
const LARGEST_TILE: usize = 32 * 32;

/// Which way a matrix `[out, in]` is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Side {
    /// `x [m, in] · Wᵀ → [m, out]`
    Transposed,
    /// `g [m, out] · W → [m, in]`
    Plain,
}

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Available {
    /// Matrix registers (AMX).
    Matrix,
    /// Vectors (AVX512-BF16).
    Vector,
}

/// What products with bf16 matrices are computed with, where that is faster than f32: matrix registers,
/// or vectors on AMD's cores (Zen 4 and later), which take twice as many terms a cycle in bf16 as in f32
/// (355 GFLOP/s against 205 on two). Intel's do not (150 against 290 on two of Emerald Rapids). By maker
/// and not by measurement, so that a run that is resumed rounds as it did.
pub(super) fn unit() -> Option<Available> {
    static UNIT: LazyLock<Option<Available>> = LazyLock::new(|| {
        let id = __cpuid(0);
        let maker = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes);
        if !has_vector_bf16() {
            None
        } else if amx::is_available() {
            Some(Available::Matrix)
        } else if maker.as_flattened() == b"AuthenticAMD" {
            Some(Available::Vector)
        } else {
            None
        }
    });
    *UNIT
}

fn has_vector_bf16() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; WORDS]);

/// What multiplies: the size of its tile of the result and how it is computed.
trait Unit {
    /// Rows, and vectors of 16 columns, of a tile.
    const HEIGHT: usize;
    const VECTORS: usize;
    /// Most words of terms that are summed before the next block of them: a panel of the matrix, a
    /// tile's columns, is then near enough.
    const DEEPEST: usize;
    /// Words that are taken at once; what is copied is filled up with zeros to as many.
    const STEP: usize;
    /// Lines of the copied activations from row to row of a tile, and from line to line of a row.
    const STRIDES: [usize; 2];

    /// Lines of a tile's rows of so many words.
    fn tile_lines(words: usize) -> usize;

    /// Readies the thread.
    ///
    /// # Safety
    /// The processor must have the unit, here and below.
    unsafe fn begin() {}

    /// Undoes [`Unit::begin`].
    ///
    /// # Safety
    /// As there.
    unsafe fn end() {}

    /// Sets a tile, or adds to it, from `words` of a block of activations and of a panel.
    ///
    /// # Safety
    /// The first must have HEIGHT rows, [`Unit::STRIDES`] apart; the second, VECTORS lines a word; the
    /// tile's rows, `stride` elements apart, must be valid and no other thread's.
    unsafe fn tile(
        lhs: *const Line,
        rhs: *const Line,
        words: usize,
        tile: (*mut f32, usize),
        sets: bool,
    );
}

/// How the terms of sums are cut into blocks.
#[derive(Debug, Clone, Copy)]
struct Blocks {
    /// Words in all, filled up to whole steps.
    words: usize,
    /// Words of each block but the last.
    each: usize,
}

impl Blocks {
    fn of<U: Unit>(terms: usize) -> Self {
        // As equal as can be: a short one at the end would cost as many loads of the sums.
        let words = terms.div_ceil(2).next_multiple_of(U::STEP);
        let count = words.div_ceil(U::DEEPEST).max(1);
        let each = words.div_ceil(count).next_multiple_of(U::STEP).max(U::STEP);
        Self { words, each }
    }

    fn count(self) -> usize {
        self.words.div_ceil(self.each)
    }

    /// The words of a block.
    fn range(self, block: usize) -> Range<usize> {
        block * self.each..((block + 1) * self.each).min(self.words)
    }
}

/// Terms of a product: activations and the matrix that they meet.
///
/// # Shapes
/// x, m rows of k elements `stride` apart; matrix `[n, k]`, or `[k, n]` where it is read plain
#[derive(Clone, Copy)]
pub(super) struct Term<'a> {
    pub(super) x: Rows<'a>,
    pub(super) matrix: &'a [bf16],
}

/// A matrix of rows that lie `stride` elements apart, as [`Shared`] memory: what one product of a chain
/// writes, the next may read.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    start: Shared,
    width: usize,
    stride: usize,
    count: usize,
    lifetime: PhantomData<&'a [f32]>,
}

impl<'a> Rows<'a> {
    /// To read.
    pub(super) fn new(from: &'a [f32], [count, width]: [usize; 2], stride: usize) -> Self {
        assert!(stride >= width && (count == 0 || (count - 1) * stride + width <= from.len()));
        let start = Shared::reading(from);
        Self {
            start,
            width,
            stride,
            count,
            lifetime: PhantomData,
        }
    }

    /// To write, and to read once written.
    pub(super) fn to_write(to: &'a mut [f32], [count, width]: [usize; 2], stride: usize) -> Self {
        let start = Shared::new(to);
        let rows = Self::new(to, [count, width], stride);
        Self { start, ..rows }
    }

    /// Columns of a row.
    ///
    /// # Safety
    /// No other thread may write them meanwhile.
    pub(super) unsafe fn row(self, row: usize, columns: Range<usize>) -> &'a [f32] {
        assert!(row < self.count && columns.end <= self.width);
        let from = row * self.stride + columns.start;
        // SAFETY: inside of the slice that these rows were made of.
        unsafe { std::slice::from_raw_parts(self.start.at(from), columns.len()) }
    }

    /// A row to write.
    ///
    /// # Safety
    /// These must be [`Rows::to_write`], and no other reference to the row may exist.
    pub(super) unsafe fn row_mut(self, row: usize) -> &'a mut [f32] {
        assert!(row < self.count);
        // SAFETY: inside of the slice that these rows were made of.
        unsafe { std::slice::from_raw_parts_mut(self.start.at(row * self.stride), self.width) }
    }
}

/// `dst = Σ x · matrixᵀ`, or `Σ x · matrix`; dst is set, or gains.
///
/// # Shapes
/// dst, m rows of n elements, to write
pub(super) struct Product<'a> {
    pub(super) dst: Rows<'a>,
    pub(super) store: Store,
    pub(super) terms: Vec<Term<'a>>,
    pub(super) side: Side,
}

/// Computes products, one after the other for each row; `after` is called with the number of a product
/// and the rows that are done with it, before the next begins with them.
///
/// # Panics
/// Without a [`unit`].
///
/// # Safety
/// No two products may write the same memory, and `after` must leave alone what is not its rows'.
pub(super) unsafe fn chain(products: &[Product], after: impl Fn(usize, Range<usize>) + Sync) {
    // SAFETY: by this function's contract, and the processor has the unit.
    unsafe {
        match unit() {
            Some(Available::Matrix) => chain_with::<Amx>(products, after),
            Some(Available::Vector) => chain_with::<PairFma>(products, after),
            None => panic!("this processor has no products in bf16"),
        }
    }
}

/// One product.
///
/// # Panics
/// Without a [`unit`].
pub(super) fn multiply(product: Product) {
    // SAFETY: there is but one, and nothing after it.
    unsafe { chain(&[product], |_, _| ()) };
}

/// [`chain`] by a unit that the processor has.
unsafe fn chain_with<U: Unit>(products: &[Product], after: impl Fn(usize, Range<usize>) + Sync) {
    let stages: Vec<Option<Stage>> = products.iter().map(Stage::new::<U>).collect();
    let rows = products.iter().map(|product| product.dst.count).max();
    let rows = rows.unwrap_or(0);
    let threads = rayon::current_num_threads();
    let height = rows
        .div_ceil(4 * threads)
        .next_multiple_of(U::HEIGHT)
        .clamp(U::HEIGHT, ROWS);
    let tasks = rows.div_ceil(height);
    let pays = products.len() > 1 && tasks >= 2 * threads;
    let is_whole = |stage: &&Stage| stage.groups.len() == 1 && stage.at_once >= stage.panels;
    let whole = stages.iter().map(|stage| stage.as_ref().filter(is_whole));
    if let Some(whole) = whole.collect::<Option<Vec<_>>>().filter(|_| pays) {
        let copies: Vec<Copied> = (whole.iter())
            .map(|stage| stage.copy::<U>(&stage.groups[0], 0..stage.panels))
            .collect();
        (0..tasks).into_par_iter().with_max_len(1).for_each(|task| {
            let some = task * height..((task + 1) * height).min(rows);
            for (i, copied) in copies.iter().enumerate() {
                // SAFETY: no two tasks have rows in common.
                unsafe { copied.compute::<U>(some.clone(), 0..copied.panels.len()) };
                after(i, some.clone());
            }
        });
        return;
    }
    for (i, (product, stage)) in products.iter().zip(&stages).enumerate() {
        match stage {
            // SAFETY: by this function's contract.
            Some(stage) => unsafe { alone::<U>(stage, height) },
            None => product.clear(),
        }
        after(i, 0..product.dst.count);
    }
}

/// All of one product.
unsafe fn alone<U: Unit>(stage: &Stage, height: usize) {
    let rows = stage.product.dst.count;
    let down = rows.div_ceil(height);
    let wanted = match stage.is_small {
        true => 1,
        false => 4 * rayon::current_num_threads(),
    };
    for group in &stage.groups {
        for first in (0..stage.panels).step_by(stage.at_once) {
            let panels = first..(first + stage.at_once).min(stage.panels);
            let copied = stage.copy::<U>(group, panels.clone());
            // Rows are rounded for each of the tasks that share them.
            let width = panels.len().div_ceil(wanted.div_ceil(down));
            let across = panels.len().div_ceil(width);
            let task = |task: usize| {
                let (row, panel) = (task / across * height, task % across * width);
                let panels = panel..(panel + width).min(panels.len());
                // SAFETY: no two tasks have rows and columns in common.
                unsafe { copied.compute::<U>(row..(row + height).min(rows), panels) };
            };
            match down * across {
                1 => task(0),
                tasks => (0..tasks).into_par_iter().with_max_len(1).for_each(task),
            }
        }
    }
}

impl Product<'_> {
    /// What is left to do without terms.
    fn clear(&self) {
        if self.store == Store::Set {
            for row in 0..self.dst.count {
                // SAFETY: dst is to be written, by this product alone.
                unsafe { self.dst.row_mut(row) }.fill(0.0);
            }
        }
    }
}

/// How a product that is not empty is cut.
struct Stage<'a> {
    product: &'a Product<'a>,
    /// Blocks of terms whose words are few enough to be copied at once.
    groups: Vec<Vec<Part<'a>>>,
    /// Panels in all, and as many as are copied at once.
    panels: usize,
    at_once: usize,
    is_small: bool,
}

impl<'a> Stage<'a> {
    fn new<U: Unit>(product: &'a Product<'a>) -> Option<Self> {
        let [m, n] = [product.dst.count, product.dst.width];
        let k: usize = product.terms.iter().map(|term| term.x.width).sum();
        if m == 0 || n == 0 || k == 0 {
            return None;
        }
        for term in &product.terms {
            assert!(term.x.count == m && term.matrix.len() == n * term.x.width);
        }
        let groups = parts::<U>(product);
        let panels = n.div_ceil(WORDS * U::VECTORS);
        let words = groups
            .iter()
            .map(|parts| parts.iter().map(Part::words).sum());
        let panel_bytes = U::VECTORS * words.max().unwrap_or(1) * size_of::<Line>();
        let at_once = (COPIED / panel_bytes).clamp(1, panels);
        Some(Self {
            product,
            groups,
            panels,
            at_once: panels.div_ceil(panels.div_ceil(at_once)),
            is_small: m * n * k < SMALL,
        })
    }

    /// Copies some panels of the matrices.
    fn copy<'b, U: Unit>(&self, parts: &'b [Part<'a>], panels: Range<usize>) -> Copied<'b> {
        let panel_lines = U::VECTORS * parts.iter().map(Part::words).sum::<usize>();
        let mut lines: Vec<Line> = unset(panels.len() * panel_lines);
        let each = lines.par_chunks_exact_mut(panel_lines).enumerate();
        let fewest = if self.is_small { panels.len() } else { 1 };
        each.with_min_len(fewest).for_each(|(i, mut lines)| {
            for part in parts {
                let mine;
                (mine, lines) = lines.split_at_mut(U::VECTORS * part.words());
                let shape = [self.product.dst.width, part.term.x.width];
                let matrix = (part.term.matrix, self.product.side, shape);
                // SAFETY: the processor has the unit, the matrix has the size that was asserted, and the
                // lines are the panel's.
                unsafe { copy::panel::<U>(matrix, part.terms(), panels.start + i, mine) };
            }
        });
        Copied {
            dst: self.product.dst,
            sets: self.product.store == Store::Set && parts[0].is_first,
            parts,
            lines,
            panel_lines,
            panels,
        }
    }
}

/// Some blocks of a term.
struct Part<'a> {
    term: &'a Term<'a>,
    cut: Blocks,
    blocks: Range<usize>,
    /// Whether it begins its product.
    is_first: bool,
}

impl Part<'_> {
    fn words(&self) -> usize {
        self.blocks.clone().map(|i| self.cut.range(i).len()).sum()
    }

    fn terms(&self) -> Range<usize> {
        let first = 2 * self.blocks.start * self.cut.each;
        first..(first + 2 * self.words()).min(self.term.x.width)
    }
}

fn parts<'a, U: Unit>(product: &'a Product<'a>) -> Vec<Vec<Part<'a>>> {
    let mut groups: Vec<Vec<Part>> = Vec::new();
    let mut words = DEPTH;
    for term in &product.terms {
        let cut = Blocks::of::<U>(term.x.width);
        for block in 0..cut.count() {
            let more = cut.range(block).len();
            let is_first = groups.is_empty();
            if words + more > DEPTH {
                groups.push(Vec::new());
                words = 0;
            }
            words += more;
            let group = groups.last_mut().expect("the first block began one");
            match group.last_mut() {
                Some(part) if std::ptr::eq(part.term, term) => part.blocks.end = block + 1,
                _ => group.push(Part {
                    term,
                    cut,
                    blocks: block..block + 1,
                    is_first,
                }),
            }
        }
    }
    groups
}
