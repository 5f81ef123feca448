//! ggml's K formats: 256 values a block, with scales of 16 or 32 of them in a few bits each.
//!
//! Layouts and arithmetic follow `ggml-quants.c`, as in [`blocks`](super::blocks).

use super::blocks::half;

/// `d·scale·q - dmin·min`: 16 bytes of scales (low nibbles) and minima (high), 64 of bit pairs, d, dmin;
/// 32 bytes hold 128 values, a bit pair of all of them after the other.
#[inline(always)]
pub(super) fn q2_k(block: &[u8; 84], y: &mut [f32; 256]) {
    let (d, dmin) = (half(block, 80), half(block, 82));
    for (i, y) in y.chunks_exact_mut(16).enumerate() {
        let (part, pair, side) = (i / 8, i / 2 % 4, i % 2);
        let (scale, min) = (
            d * f32::from(block[i] & 15),
            dmin * f32::from(block[i] >> 4),
        );
        let q = &block[16 + 32 * part + 16 * side..][..16];
        for (y, &q) in y.iter_mut().zip(q) {
            *y = scale * f32::from(q >> (2 * pair) & 3) - min;
        }
    }
}

/// `d·(scale - 32)·(q - 4)`: 32 bytes of third bits, bit g of byte j that of value j of the g-th 32; 64 of
/// bit pairs as in [`q2_k`]; 12 of scales; d.
#[inline(always)]
pub(super) fn q3_k(block: &[u8; 110], y: &mut [f32; 256]) {
    let d = half(block, 108);
    let packed = &block[96..108];
    for (i, y) in y.chunks_exact_mut(16).enumerate() {
        let (part, pair, side) = (i / 8, i / 2 % 4, i % 2);
        let low = packed[i % 8] >> (4 * (i / 8)) & 15;
        let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        let q = &block[32 + 32 * part + 16 * side..][..16];
        let third = &block[16 * side..][..16];
        for ((y, &q), &third) in y.iter_mut().zip(q).zip(third) {
            let q = q >> (2 * pair) & 3 | (third >> (i / 2) & 1) << 2;
            *y = scale * (f32::from(q) - 4.0);
        }
    }
}

/// Scale and minimum `j` of 8, six bits each, packed in 12 bytes (ggml's `get_scale_min_k4`).
#[inline(always)]
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = match j < 4 {
        true => (packed[j] & 63, packed[j + 4] & 63),
        false => (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        ),
    };
    (f32::from(scale), f32::from(min))
}

/// `d·scale·q - dmin·min`: d, dmin, 12 bytes of scales and minima, 128 of nibbles; 32 bytes hold 64
/// values, the low nibbles first.
#[inline(always)]
pub(super) fn q4_k(block: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    for (group, (y, q)) in y
        .chunks_exact_mut(64)
        .zip(block[16..].chunks_exact(32))
        .enumerate()
    {
        let (scale, min) = scale_min(&block[4..16], 2 * group);
        let (d_low, m_low) = (d * scale, dmin * min);
        let (scale, min) = scale_min(&block[4..16], 2 * group + 1);
        let (d_high, m_high) = (d * scale, dmin * min);
        for (j, &q) in q.iter().enumerate() {
            y[j] = d_low * f32::from(q & 15) - m_low;
            y[j + 32] = d_high * f32::from(q >> 4) - m_high;
        }
    }
}

/// As [`q4_k`], with 32 bytes of fifth bits before the nibbles: bit g of byte j is that of value j of
/// the g-th 32.
#[inline(always)]
pub(super) fn q5_k(block: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let high = &block[16..48];
    for (group, (y, q)) in y
        .chunks_exact_mut(64)
        .zip(block[48..].chunks_exact(32))
        .enumerate()
    {
        let (scale, min) = scale_min(&block[4..16], 2 * group);
        let (d_low, m_low) = (d * scale, dmin * min);
        let (scale, min) = scale_min(&block[4..16], 2 * group + 1);
        let (d_high, m_high) = (d * scale, dmin * min);
        for (j, &q) in q.iter().enumerate() {
            let low = q & 15 | (high[j] >> (2 * group) & 1) << 4;
            let top = q >> 4 | (high[j] >> (2 * group + 1) & 1) << 4;
            y[j] = d_low * f32::from(low) - m_low;
            y[j + 32] = d_high * f32::from(top) - m_high;
        }
    }
}

/// `d·scale·(q - 32)`: 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, d.
/// Each 128 values use 64 nibble bytes, 32 pair bytes and 8 scales.
#[inline(always)]
pub(super) fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let d = half(block, 208);
    for (part, y) in y.chunks_exact_mut(128).enumerate() {
        let low = &block[64 * part..][..64];
        let high = &block[128 + 32 * part..][..32];
        let scales = &block[192 + 8 * part..][..8];
        for j in 0..32 {
            let quarters = [
                low[j] & 15 | (high[j] & 3) << 4,
                low[j + 32] & 15 | (high[j] >> 2 & 3) << 4,
                low[j] >> 4 | (high[j] >> 4 & 3) << 4,
                low[j + 32] >> 4 | (high[j] >> 6) << 4,
            ];
            for (quarter, q) in quarters.into_iter().enumerate() {
                let scale = f32::from(scales[j / 16 + 2 * quarter] as i8);
                y[j + 32 * quarter] = d * scale * (f32::from(q) - 32.0);
            }
        }
    }
}
