//! Factors copied into the order in which tiles read them.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm256_maskz_loadu_epi16, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
    _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_or_si512, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::mem::transmute;
use std::ops::Range;

use half::bf16;

use super::{Line, Side, Unit, WORDS};

/// Terms of a line.
const TERMS: usize = 2 * WORDS;

/// Copies terms, rounded; what is left of their last line becomes 0.
///
/// # Safety
/// The processor must be able to.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn rounded<'a>(terms: &[f32], lines: impl Iterator<Item = &'a mut Line>) {
    for (terms, line) in terms.chunks(TERMS).zip(lines) {
        let (low, high) = terms.split_at(terms.len().min(WORDS));
        let [low, high] = [low, high].map(|half| {
            let mask = low_bits(half.len()) as u16;
            // SAFETY: the mask leaves out what lies past the terms.
            unsafe { _mm512_maskz_loadu_ps(mask, half.as_ptr()) }
        });
        let both = _mm512_cvtne2ps_pbh(high, low);
        // SAFETY: the same bits.
        store(unsafe { transmute::<__m512bh, __m512i>(both) }, line);
    }
}

/// Copies some terms of a panel of a matrix, words of its columns side by side; columns past the last,
/// and terms that fill up the last step, are 0.
///
/// # Safety
/// The processor must be able to; the matrix must be of n columns of the product and k terms, and
/// `lines` must hold the panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn panel<U: Unit>(
    (matrix, side, [n, k]): (&[bf16], Side, [usize; 2]),
    terms: Range<usize>,
    panel: usize,
    lines: &mut [Line],
) {
    for vector in 0..U::VECTORS {
        let column = WORDS * (panel * U::VECTORS + vector);
        let columns = column.min(n)..(column + WORDS).min(n);
        let to = (lines.chunks_exact_mut(U::VECTORS)).map(|lines| &mut lines[vector]);
        // SAFETY: as this function's own.
        unsafe {
            match side {
                Side::Transposed => rows_across((matrix, k), columns, terms.clone(), to),
                Side::Plain => words_across((matrix, n), columns, terms.clone(), to),
            }
        }
    }
}

/// `x Wᵀ`: the matrix has a row for each column of the panel, and a row's terms are neighbours.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn rows_across<'a>(
    (matrix, k): (&[bf16], usize),
    columns: Range<usize>,
    terms: Range<usize>,
    mut lines: impl Iterator<Item = &'a mut Line>,
) {
    let mut first = terms.start;
    loop {
        let left = terms.end.saturating_sub(first);
        let mut rows = [_mm512_setzero_si512(); WORDS];
        if left > 0 {
            for (row, column) in rows.iter_mut().zip(columns.clone()) {
                let from = matrix[column * k + first..].as_ptr();
                // SAFETY: the mask leaves out what lies past the row's terms.
                *row = unsafe { _mm512_maskz_loadu_epi16(low_bits(left), from.cast()) };
            }
        }
        for words in transposed(rows) {
            match lines.next() {
                Some(line) => store(words, line),
                None => return,
            }
        }
        first += TERMS;
    }
}

/// `g W`: the terms are rows of the matrix, and a word's terms lie one above the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn words_across<'a>(
    (matrix, n): (&[bf16], usize),
    columns: Range<usize>,
    terms: Range<usize>,
    lines: impl Iterator<Item = &'a mut Line>,
) {
    let mask = low_bits(columns.len()) as u16;
    let row = |term: usize| match term < terms.end {
        true => {
            let from = matrix[term * n..][columns.clone()].as_ptr();
            // SAFETY: the mask leaves out what lies past the columns.
            _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
        }
        false => _mm512_setzero_si512(),
    };
    for (term, line) in (terms.start..).step_by(2).zip(lines) {
        let upper = _mm512_slli_epi32::<16>(row(term + 1));
        store(_mm512_or_si512(row(term), upper), line);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(words: __m512i, line: &mut Line) {
    // SAFETY: a line holds a vector.
    unsafe { _mm512_storeu_si512(std::ptr::from_mut(line).cast(), words) };
}

/// A mask of the first `count` elements, all 32 where there are more.
#[inline]
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
