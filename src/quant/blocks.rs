//! ggml's block formats, dequantised exactly as ggml does.
//!
//! A row is cut into blocks of equal length that share scales. Layouts and arithmetic follow
//! `ggml-quants.c` (`dequantize_row_*`): each product and sum is rounded to f32, in its order.

use half::{bf16, f16};
use rayon::prelude::*;

use super::k_blocks;

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockKind {
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit, scale.
    Q8_0,
    /// 4-bit, scale.
    Q4_0,
    /// 4-bit, scale and minimum.
    Q4_1,
    /// 5-bit, scale.
    Q5_0,
    /// 5-bit, scale and minimum.
    Q5_1,
    /// 2-bit, 4-bit scales and minima of 16 values under a scale of 256.
    Q2K,
    /// 3-bit, 6-bit scales of 16 values under a scale of 256.
    Q3K,
    /// 4-bit, 6-bit scales and minima of 32 values under a scale of 256.
    Q4K,
    /// 5-bit, scales and minima as in `Q4K`.
    Q5K,
    /// 6-bit, 8-bit scales of 16 values under a scale of 256.
    Q6K,
}

/// ggml's type ids that lorafit does not read, so that an error can name them.
const UNSUPPORTED: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// Values dequantised by one task; a multiple of every block length.
const CHUNK: usize = 1 << 15;

impl BlockKind {
    /// Every kind.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// ggml's name and id, values in a block, bytes of a block.
    const fn facts(self) -> (&'static str, u32, usize, usize) {
        match self {
            Self::F32 => ("F32", 0, 1, 4),
            Self::F16 => ("F16", 1, 1, 2),
            Self::Bf16 => ("BF16", 30, 1, 2),
            Self::Q8_0 => ("Q8_0", 8, 32, 34),
            Self::Q4_0 => ("Q4_0", 2, 32, 18),
            Self::Q4_1 => ("Q4_1", 3, 32, 20),
            Self::Q5_0 => ("Q5_0", 6, 32, 22),
            Self::Q5_1 => ("Q5_1", 7, 32, 24),
            Self::Q2K => ("Q2_K", 10, 256, 84),
            Self::Q3K => ("Q3_K", 11, 256, 110),
            Self::Q4K => ("Q4_K", 12, 256, 144),
            Self::Q5K => ("Q5_K", 13, 256, 176),
            Self::Q6K => ("Q6_K", 14, 256, 210),
        }
    }

    /// ggml's name.
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// Values in a block.
    pub const fn block_len(self) -> usize {
        self.facts().2
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.facts().3
    }

    /// The kind that ggml numbers `id`.
    ///
    /// # Errors
    /// Names the type where lorafit does not read it.
    pub fn from_id(id: u32) -> Result<Self, String> {
        if let Some(kind) = Self::ALL.into_iter().find(|kind| kind.facts().1 == id) {
            return Ok(kind);
        }
        let found = match UNSUPPORTED.iter().find(|(known, _)| *known == id) {
            Some((_, name)) => name.to_string(),
            None => format!("ggml type {id}"),
        };
        let supported = Self::ALL.map(Self::name).join(", ");
        Err(format!("{found} is not supported; supported: {supported}"))
    }

    /// Bytes of a tensor whose innermost dimension stands last in `shape`.
    ///
    /// # Errors
    /// When a row is not whole blocks, or the sizes overflow.
    pub fn bytes_of(self, shape: &[usize]) -> Result<usize, String> {
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(self.block_len()) {
            return Err(format!(
                "rows of {row} values are not whole {} blocks of {}",
                self.name(),
                self.block_len()
            ));
        }
        if shape.contains(&0) {
            return Err("a dimension of 0".into());
        }
        shape
            .iter()
            .try_fold(1usize, |count, &size| count.checked_mul(size))
            // The dequantised tensor must be addressable too.
            .filter(|count| {
                count
                    .checked_mul(4)
                    .is_some_and(|bytes| bytes <= isize::MAX as usize)
            })
            .and_then(|count| (count / self.block_len()).checked_mul(self.block_bytes()))
            .ok_or_else(|| format!("the sizes {shape:?} overflow"))
    }
}

/// Dequantises whole blocks, in parallel.
///
/// # Panics
/// When `bytes` are not the blocks of `out.len()` values.
pub fn dequantise(kind: BlockKind, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(out.len() % kind.block_len(), 0, "whole blocks");
    let byte_len = out.len() / kind.block_len() * kind.block_bytes();
    assert_eq!(bytes.len(), byte_len, "bytes of {} values", out.len());
    let chunk_bytes = CHUNK / kind.block_len() * kind.block_bytes();
    (out.par_chunks_mut(CHUNK))
        .zip(bytes.par_chunks(chunk_bytes))
        .for_each(|(out, bytes)| dequantise_here(kind, bytes, out));
}

/// [`dequantise`] by this thread alone.
///
/// # Panics
/// When `bytes` are not the blocks of `out.len()` values.
pub fn dequantise_here(kind: BlockKind, bytes: &[u8], out: &mut [f32]) {
    let byte_len = out.len() / kind.block_len() * kind.block_bytes();
    assert_eq!(bytes.len(), byte_len, "bytes of {} values", out.len());
    pulp::Arch::new().dispatch(Blocks { kind, bytes, out });
}

/// Whole blocks of one kind.
struct Blocks<'a> {
    kind: BlockKind,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl pulp::NullaryFnOnce for Blocks<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { kind, bytes, out } = self;
        match kind {
            BlockKind::F32 => each::<4, 1>(bytes, out, |b, y| y[0] = f32::from_le_bytes(*b)),
            BlockKind::F16 => each::<2, 1>(bytes, out, |b, y| y[0] = half(b, 0)),
            BlockKind::Bf16 => {
                each::<2, 1>(bytes, out, |b, y| y[0] = bf16::from_le_bytes(*b).to_f32());
            }
            BlockKind::Q8_0 => each(bytes, out, q8_0),
            BlockKind::Q4_0 => each(bytes, out, q4_0),
            BlockKind::Q4_1 => each(bytes, out, q4_1),
            BlockKind::Q5_0 => each(bytes, out, q5_0),
            BlockKind::Q5_1 => each(bytes, out, q5_1),
            BlockKind::Q2K => each(bytes, out, k_blocks::q2_k),
            BlockKind::Q3K => each(bytes, out, k_blocks::q3_k),
            BlockKind::Q4K => each(bytes, out, k_blocks::q4_k),
            BlockKind::Q5K => each(bytes, out, k_blocks::q5_k),
            BlockKind::Q6K => each(bytes, out, k_blocks::q6_k),
        }
    }
}

/// Runs `block` on each block of `B` bytes and `L` values.
#[inline(always)]
fn each<const B: usize, const L: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; B], &mut [f32; L]),
) {
    let (blocks, _) = bytes.as_chunks::<B>();
    let (outs, _) = out.as_chunks_mut::<L>();
    for (bytes, out) in blocks.iter().zip(outs) {
        block(bytes, out);
    }
}

/// The half-precision number at byte `at`.
#[inline(always)]
pub(super) fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d·q`: d, then 32 signed bytes.
#[inline(always)]
fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for (y, &q) in y.iter_mut().zip(&block[2..]) {
        *y = f32::from(q as i8) * d;
    }
}

/// `d·(q - 8)`: d, then 16 bytes; value j is the low nibble of byte j, value j + 16 the high one.
#[inline(always)]
fn q4_0(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for (j, &q) in block[2..].iter().enumerate() {
        y[j] = (f32::from(q & 15) - 8.0) * d;
        y[j + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

/// `d·q + m`: d, m, then nibbles as in [`q4_0`].
#[inline(always)]
fn q4_1(block: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (j, &q) in block[4..].iter().enumerate() {
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of 32 values, bit j that of value j, and the five-bit values j and j + 16.
#[inline(always)]
fn five_bits(high: u32, j: usize, q: u8) -> (f32, f32) {
    let low = (high >> j & 1) as u8;
    let top = (high >> (j + 16) & 1) as u8;
    (f32::from(q & 15 | low << 4), f32::from(q >> 4 | top << 4))
}

/// `d·(q - 16)`: d, 32 fifth bits, then nibbles as in [`q4_0`].
#[inline(always)]
fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let d = half(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (j, &q) in block[6..].iter().enumerate() {
        let (low, top) = five_bits(high, j, q);
        y[j] = (low - 16.0) * d;
        y[j + 16] = (top - 16.0) * d;
    }
}

/// `d·q + m`: d, m, 32 fifth bits, then nibbles as in [`q4_0`].
#[inline(always)]
fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (j, &q) in block[8..].iter().enumerate() {
        let (low, top) = five_bits(high, j, q);
        y[j] = low * d + m;
        y[j + 16] = top * d + m;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q4_0_reads_low_nibbles_first() {
        let mut block = [0x00, 0x3c].to_vec(); // 1.0
        block.extend([0x9a; 16]);
        let mut out = [0.0; 32];
        dequantise(BlockKind::Q4_0, &block, &mut out);
        assert_eq!(out[..16], [2.0; 16]);
        assert_eq!(out[16..], [1.0; 16]);
    }

    #[test]
    fn ids_and_sizes() {
        for kind in BlockKind::ALL {
            assert_eq!(BlockKind::from_id(kind.facts().1), Ok(kind));
            assert_eq!(CHUNK % kind.block_len(), 0);
        }
        assert!(BlockKind::from_id(16).unwrap_err().starts_with("IQ2_XXS"));
        assert_eq!(BlockKind::Q8_0.bytes_of(&[3, 64]), Ok(3 * 2 * 34));
        assert!(BlockKind::Q8_0.bytes_of(&[64, 3]).is_err());
        assert!(BlockKind::F32.bytes_of(&[usize::MAX, 2]).is_err());
    }
}
