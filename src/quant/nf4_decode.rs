//! From NF4's packed codes to numbers, whole blocks at a time.

use super::nf4::{BLOCK, BLOCK_BYTES, CODEBOOK};

/// What the two codes of each byte stand for.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODEBOOK[byte >> 4], CODEBOOK[byte & 15]];
        byte += 1;
    }
    pairs
};

/// `out[i]` takes block `i` of `packed`, scaled by `scale(i)`.
#[inline]
pub(super) fn decode_blocks(
    packed: &[[u8; BLOCK_BYTES]],
    scale: impl Fn(usize) -> f32,
    out: &mut [[f32; BLOCK]],
) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has these instructions.
        return unsafe { avx512::decode_blocks(packed, scale, out) };
    }
    decode_by_table(packed, scale, out);
}

/// For every processor: a table of pairs, 2 KiB, which stays in the first cache.
fn decode_by_table(
    packed: &[[u8; BLOCK_BYTES]],
    scale: impl Fn(usize) -> f32,
    out: &mut [[f32; BLOCK]],
) {
    for (i, (bytes, out)) in packed.iter().zip(out).enumerate() {
        let scale = scale(i);
        for (byte, out) in bytes.iter().zip(out.as_chunks_mut::<2>().0) {
            let pair = PAIRS[usize::from(*byte)];
            *out = [pair[0] * scale, pair[1] * scale];
        }
    }
}

/// The sixteen codes in one register: `vpermps` looks sixteen values up at once.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{BLOCK, BLOCK_BYTES, CODEBOOK};

    #[target_feature(enable = "avx512f")]
    pub(super) fn decode_blocks(
        packed: &[[u8; BLOCK_BYTES]],
        scale: impl Fn(usize) -> f32,
        out: &mut [[f32; BLOCK]],
    ) {
        // SAFETY: the code book has sixteen elements.
        let codebook = unsafe { _mm512_loadu_ps(CODEBOOK.as_ptr()) };
        for (i, (bytes, out)) in packed.iter().zip(out).enumerate() {
            let scale = _mm512_set1_ps(scale(i));
            let (eights, _) = bytes.as_chunks::<8>();
            for (bytes, out) in eights.iter().zip(out.as_chunks_mut::<16>().0) {
                // A byte becomes two numbers: its high nibble, and itself. Only the lowest four bits
                // of each count below.
                let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(*bytes));
                let wide = _mm512_cvtepu8_epi64(bytes);
                let high = _mm512_srli_epi64::<4>(wide);
                let low = _mm512_slli_epi64::<32>(wide);
                let codes = _mm512_or_si512(high, low);
                let values = _mm512_mul_ps(_mm512_permutexvar_ps(codes, codebook), scale);
                // SAFETY: `out` has sixteen elements.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_give_the_same_bits() {
        let packed: Vec<[u8; BLOCK_BYTES]> = (0..40u32)
            .map(|block| std::array::from_fn(|i| (block * 37 + i as u32 * 11) as u8))
            .collect();
        let scale = |i: usize| 0.1 + i as f32 * 0.37;
        let [mut table, mut best] = [(); 2].map(|()| vec![[f32::NAN; BLOCK]; 40]);
        decode_by_table(&packed, scale, &mut table);
        decode_blocks(&packed, scale, &mut best);
        assert_eq!(table, best);
        assert_eq!(table[1][0], CODEBOOK[2] * 0.47);
        assert_eq!(table[1][1], CODEBOOK[5] * 0.47);
    }
}
