//! Tiles of 8 × 48 elements in vector registers: with their operands they fill all 32.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::mem::transmute;

use super::{Line, Unit, WORDS};

const HEIGHT: usize = 8;
const VECTORS: usize = 3;
/// A panel of so many words takes 24 KiB: it stays in the L1 cache beside the rows that pass.
const DEEPEST: usize = 128;
/// Odd, so that neighbouring rows do not share cache sets.
const ROW_LINES: usize = DEEPEST / WORDS + 1;

/// Pairs of terms (AVX512-BF16).
pub(super) struct PairFma;

impl Unit for PairFma {
    const HEIGHT: usize = HEIGHT;
    const VECTORS: usize = VECTORS;
    const DEEPEST: usize = DEEPEST;
    const STEP: usize = 1;
    const STRIDES: [usize; 2] = [ROW_LINES, 1];

    fn tile_lines(_: usize) -> usize {
        HEIGHT * ROW_LINES
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn tile(
        lhs: *const Line,
        rhs: *const Line,
        words: usize,
        (tile, stride): (*mut f32, usize),
        sets: bool,
    ) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; HEIGHT];
        let (mut lhs, mut rhs) = (lhs.cast::<i32>(), rhs);
        for _ in 0..words {
            // SAFETY: as many steps of both pointers stay inside what the caller has there.
            unsafe {
                let vectors: [__m512bh; VECTORS] =
                    std::array::from_fn(|j| transmute(_mm512_loadu_si512(rhs.add(j).cast())));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let pair = _mm512_set1_epi32(*lhs.add(i * ROW_LINES * WORDS));
                    let pair = transmute::<__m512i, __m512bh>(pair);
                    for (sum, vector) in sums.iter_mut().zip(vectors) {
                        *sum = _mm512_dpbf16_ps(*sum, pair, vector);
                    }
                }
                (lhs, rhs) = (lhs.add(1), rhs.add(VECTORS));
            }
        }
        // SAFETY: by this function's contract.
        unsafe { store(sums, tile, stride, sets) };
    }
}

/// # Safety
/// `dst` must be valid for a tile whose rows lie `stride` apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(sums: [[__m512; VECTORS]; HEIGHT], dst: *mut f32, stride: usize, sets: bool) {
    for (i, row) in sums.into_iter().enumerate() {
        for (j, sum) in row.into_iter().enumerate() {
            // SAFETY: by this function's contract.
            unsafe {
                let at = dst.add(i * stride + 16 * j);
                let value = match sets {
                    true => sum,
                    false => _mm512_add_ps(sum, _mm512_loadu_ps(at)),
                };
                _mm512_storeu_ps(at, value);
            }
        }
    }
}
