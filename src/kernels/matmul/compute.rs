//! Rows of a product against matrices that were copied: rounded, tile by tile.

use std::cell::RefCell;
use std::ops::Range;

use super::{LARGEST_TILE, Line, Part, Rows, Unit, WORDS, copy};

/// Some columns of a product, whose matrices were copied.
pub(super) struct Copied<'a> {
    pub(super) dst: Rows<'a>,
    /// Whether dst is replaced.
    pub(super) sets: bool,
    pub(super) parts: &'a [Part<'a>],
    /// Panel by panel, and in these part by part.
    pub(super) lines: Vec<Line>,
    pub(super) panel_lines: usize,
    /// These, of all.
    pub(super) panels: Range<usize>,
}

thread_local! {
    /// What a thread rounds activations into.
    static ROUNDED: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

impl Copied<'_> {
    /// Some rows of some of these panels.
    ///
    /// # Safety
    /// The processor must have the unit, and no other thread may use the same elements of dst, nor write
    /// the activations.
    pub(super) unsafe fn compute<U: Unit>(&self, rows: Range<usize>, panels: Range<usize>) {
        ROUNDED.with_borrow_mut(|lhs| {
            // SAFETY: by this function's contract.
            unsafe {
                U::begin();
                let mut skipped = 0;
                for part in self.parts {
                    self.part::<U>(part, (rows.clone(), panels.clone()), lhs, skipped);
                    skipped += part.words() * U::VECTORS;
                }
                U::end();
            }
        });
    }

    /// [`Copied::compute`] for a part whose lines in a panel are `skipped` lines away.
    ///
    /// # Safety
    /// As there.
    unsafe fn part<U: Unit>(
        &self,
        part: &Part,
        (rows, panels): (Range<usize>, Range<usize>),
        lhs: &mut Vec<Line>,
        mut skipped: usize,
    ) {
        let mut sets = self.sets && skipped == 0;
        let tile_lines = U::tile_lines(part.cut.each);
        let block_lines = rows.len().div_ceil(U::HEIGHT) * tile_lines;
        if lhs.len() < block_lines {
            *lhs = vec![Line([0; WORDS]); block_lines];
        }
        let lhs = &mut lhs[..block_lines];
        for block in part.blocks.clone() {
            let words = part.cut.range(block);
            // SAFETY: by this function's contract.
            unsafe { round::<U>(part.term.x, &rows, &words, lhs, tile_lines) };
            let words = words.len();
            for panel in panels.clone() {
                let rhs = panel * self.panel_lines + skipped;
                let rhs = &self.lines[rhs..][..words * U::VECTORS];
                for (i, lhs) in lhs.chunks_exact(tile_lines).enumerate() {
                    let at = [rows.start + i * U::HEIGHT, self.panels.start + panel];
                    // SAFETY: by this function's contract.
                    unsafe { self.tile::<U>((lhs, rhs), words, at, sets) };
                }
            }
            skipped += words * U::VECTORS;
            sets = false;
        }
    }

    /// One tile, or what of it lies inside of dst.
    ///
    /// # Safety
    /// As [`Copied::compute`].
    #[inline]
    unsafe fn tile<U: Unit>(
        &self,
        (lhs, rhs): (&[Line], &[Line]),
        words: usize,
        [top, panel]: [usize; 2],
        sets: bool,
    ) {
        let columns = WORDS * U::VECTORS;
        let left = panel * columns;
        let width = columns.min(self.dst.width - left);
        let height = U::HEIGHT.min(self.dst.count - top); // tasks end with a tile, or with dst
        let stride = self.dst.stride;
        let (lhs, rhs) = (lhs.as_ptr(), rhs.as_ptr());
        // SAFETY: the tile's rows and columns lie inside of dst and are this thread's; `whole` holds one.
        unsafe {
            let dst = self.dst.start.at(top * stride + left);
            if [height, width] == [U::HEIGHT, columns] {
                return U::tile(lhs, rhs, words, (dst, stride), sets);
            }
            let mut whole = [0f32; LARGEST_TILE];
            U::tile(lhs, rhs, words, (whole.as_mut_ptr(), columns), true);
            for (i, row) in whole.chunks_exact(columns).take(height).enumerate() {
                let to = std::slice::from_raw_parts_mut(dst.add(i * stride), width);
                match sets {
                    true => to.copy_from_slice(&row[..width]),
                    false => (to.iter_mut().zip(row)).for_each(|(to, value)| *to += value),
                }
            }
        }
    }
}

/// Rounds words of rows into tiles; rows that fill up the last tile, and terms the last step, are 0.
///
/// # Safety
/// As [`Copied::compute`].
unsafe fn round<U: Unit>(
    from: Rows,
    rows: &Range<usize>,
    words: &Range<usize>,
    to: &mut [Line],
    tile_lines: usize,
) {
    let columns = 2 * words.start..(2 * words.end).min(from.width);
    for (tile, lines) in to.chunks_exact_mut(tile_lines).enumerate() {
        for i in 0..U::HEIGHT {
            let to = lines[i * U::STRIDES[0]..].iter_mut().step_by(U::STRIDES[1]);
            let row = rows.start + tile * U::HEIGHT + i;
            if row < rows.end {
                // SAFETY: by this function's contract; processors with a unit can round.
                unsafe { copy::rounded(from.row(row, columns.clone()), to) };
            } else {
                to.take(words.len().div_ceil(WORDS))
                    .for_each(|line| *line = Line([0; WORDS]));
            }
        }
    }
}
