//! NF4: four bits a value, sixteen codes at the quantiles of a normal distribution, and the largest
//! absolute value of each block of 64 as its scale (QLoRA, arXiv 2305.14314).
//!
//! Blocks run over a matrix flattened row by row, across its rows, and the last may be short. Codes,
//! scales and dequantised values are those of bitsandbytes, bit for bit.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::cast_slice;
use memmap2::Mmap;
use rayon::prelude::*;

use super::absmax::{Absmax, DoubleQuantised, GROUP};
use super::held::Held;
use super::nf4_decode::decode_blocks;
use super::{NotFinite, Scheme};

/// Values that share a scale.
pub const BLOCK: usize = 64;
/// Bytes of their codes.
pub(super) const BLOCK_BYTES: usize = BLOCK / 2;
/// Blocks that one task quantises or dequantises.
const TASK: usize = 512;

/// The sixteen values that a code may stand for (arXiv 2305.14314, appendix E), ascending.
pub const CODEBOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Half way between neighbouring codes; a tie takes the lower code.
const MIDPOINTS: [f32; 15] = {
    let mut midpoints = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        midpoints[i] = (CODEBOOK[i] + CODEBOOK[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
};

/// Numbers in NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4 {
    /// Two codes a byte, the first in the high nibble.
    packed: Held<u8>,
    /// One a block.
    absmax: Absmax,
    len: usize,
}

impl Nf4 {
    /// Each value becomes the code nearest to it, measured in its block's largest absolute value. Where
    /// that is below 2⁻¹²⁸, whose reciprocal is no number, the block counts as zeros.
    ///
    /// # Errors
    /// A value is infinite or not a number: the scale of its block would be too.
    pub fn quantise(values: &[f32]) -> Result<Self, NotFinite> {
        let mut packed = vec![0u8; values.len().div_ceil(2)];
        let mut absmax = vec![0f32; values.len().div_ceil(BLOCK)];
        (values.par_chunks(TASK * BLOCK))
            .zip(packed.par_chunks_mut(TASK * BLOCK_BYTES))
            .zip(absmax.par_chunks_mut(TASK))
            .for_each(|((values, packed), absmax)| {
                pulp::Arch::new().dispatch(QuantiseBlocks {
                    values,
                    packed,
                    absmax,
                });
            });
        if absmax.par_iter().any(|scale| !scale.is_finite()) {
            return Err(NotFinite::first_of(values));
        }
        Ok(Self {
            packed: packed.into(),
            absmax: Absmax::Plain(absmax.into()),
            len: values.len(),
        })
    }

    /// With the scales quantised too, to 8 bits.
    pub fn with_quantised_absmax(self) -> Self {
        Self {
            absmax: self.absmax.quantised(),
            ..self
        }
    }

    /// Codes and scales as bytes, and which scheme they are.
    pub(super) fn parts(&self) -> (Scheme, Vec<&[u8]>) {
        match &self.absmax {
            Absmax::Plain(scales) => (Scheme::Nf4, vec![&*self.packed, cast_slice(scales)]),
            Absmax::Double(double) => {
                let offset = cast_slice(std::slice::from_ref(&double.offset));
                let scales = [&*double.codes, cast_slice(&double.scales), offset];
                (Scheme::Nf4Double, [&[&*self.packed][..], &scales].concat())
            }
        }
    }

    /// The same parts in a mapped file; `None` where they are not those of `len` values.
    pub(super) fn from_parts(
        scheme: Scheme,
        len: usize,
        map: &Arc<Mmap>,
        parts: &[Range<usize>],
    ) -> Option<Self> {
        let blocks = len.div_ceil(BLOCK);
        let floats = |range: &Range<usize>, count: usize| {
            Held::<f32>::mapped(map.clone(), range.clone()).filter(|held| held.len() == count)
        };
        let bytes = |range: &Range<usize>, count: usize| {
            Held::<u8>::mapped(map.clone(), range.clone()).filter(|held| held.len() == count)
        };
        let (packed, absmax) = match (scheme, parts) {
            (Scheme::Nf4, [packed, scales]) => (packed, Absmax::Plain(floats(scales, blocks)?)),
            (Scheme::Nf4Double, [packed, codes, scales, offset]) => {
                let double = DoubleQuantised {
                    codes: bytes(codes, blocks)?,
                    scales: floats(scales, blocks.div_ceil(GROUP))?,
                    offset: floats(offset, 1)?[0],
                };
                (packed, Absmax::Double(double))
            }
            _ => return None,
        };
        Some(Self {
            packed: bytes(packed, len.div_ceil(2))?,
            absmax,
            len,
        })
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The codes, two a byte, the first in the high nibble.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The scales.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Bytes that codes and scales take.
    pub fn bytes(&self) -> usize {
        self.packed.len() + self.absmax.bytes()
    }

    /// Bytes that `len` values take, with quantised scales or not.
    pub fn bytes_of(len: usize, double: bool) -> usize {
        let blocks = len.div_ceil(BLOCK);
        len.div_ceil(2) + Absmax::bytes_of(blocks, double)
    }

    /// The values from `start` on, as many as `out` takes, by all threads.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn dequantise(&self, start: usize, out: &mut [f32]) {
        let chunks = out.par_chunks_mut(TASK * BLOCK).enumerate();
        chunks.for_each(|(i, out)| self.dequantise_here(start + i * TASK * BLOCK, out));
    }

    /// [`Nf4::dequantise`] by this thread alone.
    pub fn dequantise_here(&self, start: usize, out: &mut [f32]) {
        assert!(
            start
                .checked_add(out.len())
                .is_some_and(|end| end <= self.len),
            "{} values from {start} on, of {}",
            out.len(),
            self.len
        );
        // Up to the next whole block, whole blocks, the rest.
        let head = (start.next_multiple_of(BLOCK) - start).min(out.len());
        let (head, rest) = out.split_at_mut(head);
        self.part_of_block(start, head);
        let first = (start + head.len()) / BLOCK;
        let (blocks, tail) = rest.as_chunks_mut::<BLOCK>();
        let codes = &self.packed[(first * BLOCK_BYTES).min(self.packed.len())..];
        let codes = &codes.as_chunks::<BLOCK_BYTES>().0[..blocks.len()];
        let scales = self.absmax.view();
        decode_blocks(codes, |i| scales.get(first + i), blocks);
        self.part_of_block((first + blocks.len()) * BLOCK, tail);
    }

    /// Values that lie in one block.
    fn part_of_block(&self, start: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        let scale = self.absmax.get(start / BLOCK);
        for (i, out) in (start..).zip(out) {
            let byte = self.packed[i / 2];
            let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
            *out = CODEBOOK[usize::from(code)] * scale;
        }
    }
}

/// Whole blocks, but for the last, of one task.
struct QuantiseBlocks<'a> {
    values: &'a [f32],
    packed: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl pulp::NullaryFnOnce for QuantiseBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let packed = self.packed.chunks_mut(BLOCK_BYTES);
        for ((values, packed), absmax) in (self.values.chunks(BLOCK)).zip(packed).zip(self.absmax) {
            // Past the end stand zeros, whose code fills the last byte.
            let mut block = [0f32; BLOCK];
            block[..values.len()].copy_from_slice(values);
            let (bytes, scale) = quantise_block(&block);
            packed.copy_from_slice(&bytes[..packed.len()]);
            *absmax = scale;
        }
    }
}

/// The packed codes of a block and its scale, which is not finite where a value is not.
#[inline(always)]
fn quantise_block(block: &[f32; BLOCK]) -> ([u8; BLOCK_BYTES], f32) {
    // Without their sign, floats compare as integers do, infinities and NaN above all others.
    let bits = (block.iter()).fold(0u32, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    let absmax = f32::from_bits(bits);
    let reciprocal = 1.0 / absmax;
    let (absmax, factor) = match reciprocal.is_finite() {
        true => (absmax, reciprocal),
        // Zero, or NaN where a value is.
        false => (absmax * 0.0, 0.0),
    };
    // A sum of comparisons instead of a search: no branches, and sixteen values at a time.
    let mut codes = [0u32; BLOCK];
    for (code, x) in codes.iter_mut().zip(block) {
        let x = x * factor;
        for midpoint in MIDPOINTS {
            *code += u32::from(x > midpoint);
        }
    }
    let mut packed = [0u8; BLOCK_BYTES];
    for (byte, pair) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
    (packed, absmax)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn normal(n: usize) -> Vec<f32> {
        let stream = Stream::new(7);
        (0..n as u64).map(|i| stream.normal(i) as f32).collect()
    }

    fn all(q: &Nf4) -> Vec<f32> {
        let mut out = vec![f32::NAN; q.len()];
        q.dequantise(0, &mut out);
        out
    }

    #[test]
    fn a_code_stands_for_the_nearest_value() {
        for (code, value) in CODEBOOK.iter().enumerate() {
            let q = Nf4::quantise(&[*value * 3.0, 3.0]).unwrap();
            assert_eq!(usize::from(q.packed[0] >> 4), code);
        }
        let values = normal(1000);
        let q = Nf4::quantise(&values).unwrap();
        for (i, (x, got)) in values.iter().zip(all(&q)).enumerate() {
            let scale = q.absmax.get(i / BLOCK);
            let nearest = CODEBOOK.map(|code| (code * scale - x).abs());
            let nearest = nearest.into_iter().fold(f32::MAX, f32::min);
            assert!(
                (got - x).abs() <= nearest * 1.000_01 + 1e-7,
                "{i}: {x} {got}"
            );
        }
    }

    #[test]
    fn every_length_and_every_range() {
        let values = normal(517);
        for n in (0..200).chain([517]) {
            let q = Nf4::quantise(&values[..n]).unwrap();
            assert_eq!(q.packed.len(), n.div_ceil(2));
            let whole = all(&q);
            let one_by_one: Vec<f32> = (0..n)
                .map(|i| {
                    let mut one = [f32::NAN];
                    q.dequantise(i, &mut one);
                    one[0]
                })
                .collect();
            assert_eq!(whole, one_by_one);
            for start in [0, 1, 63, 64, 65, 130] {
                for len in [0, 1, 62, 63, 64, 128, 129, 300] {
                    if start + len <= n {
                        let mut part = vec![f32::NAN; len];
                        q.dequantise(start, &mut part);
                        assert_eq!(part, whole[start..start + len], "{n} {start} {len}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_was_quantised_once_stays() {
        let values = normal(TASK * BLOCK + 301);
        let once = Nf4::quantise(&values).unwrap();
        assert_eq!(Nf4::quantise(&all(&once)).unwrap(), once);
    }

    #[test]
    fn zeros_and_the_smallest_numbers() {
        let mut values = vec![0f32; 192];
        values[70] = f32::from_bits(1);
        values[130] = 1e-37;
        let q = Nf4::quantise(&values).unwrap();
        let got = all(&q);
        assert_eq!(got[..128], [0.0; 128]);
        assert_eq!(got[130], 1e-37);
        assert!(
            all(&q.with_quantised_absmax())
                .iter()
                .all(|x| x.is_finite())
        );
        let largest = Nf4::quantise(&[f32::MAX, -f32::MAX]).unwrap();
        assert_eq!(all(&largest), [f32::MAX, -f32::MAX]);
        assert!(Nf4::quantise(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_is_not_finite_is_refused_by_its_place() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 63, 64, 300, 40_000] {
                let mut values = normal(40_001);
                values[at] = bad;
                let error = Nf4::quantise(&values).unwrap_err();
                assert_eq!(error.index, at);
                assert_eq!(error.value.to_bits(), bad.to_bits());
            }
        }
    }

    #[test]
    fn quantised_scales_are_close_and_small() {
        let values = normal(BLOCK * 700);
        let plain = Nf4::quantise(&values).unwrap();
        let double = plain.clone().with_quantised_absmax();
        assert_eq!(plain.bytes(), 700 * (32 + 4));
        assert_eq!(double.bytes(), 700 * 33 + 3 * 4 + 4);
        for block in 0..700 {
            let (want, got) = (plain.absmax.get(block), double.absmax.get(block));
            assert!((want - got).abs() < 0.02 * want, "{block}: {want} {got}");
        }
    }
}
