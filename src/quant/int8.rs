//! int8: eight bits a value, and the largest absolute value of each row as its scale.
//!
//! This is how LLM.int8 stores a weight (arXiv 2208.07339, section 2; bitsandbytes' `Int8Params`,
//! transformers' `load_in_8bit`), and what its users call int8. The scale of a row factors out of a
//! product with it. Activations, which LLM.int8 rounds too, are left as they are here.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::cast_slice;
use memmap2::Mmap;
use rayon::prelude::*;

use super::NotFinite;
use super::held::Held;

/// The largest code.
const MOST: f32 = 127.0;
/// Values that one task takes.
const TASK: usize = 1 << 15;

/// A matrix in int8.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8 {
    codes: Held<i8>,
    /// The largest absolute value of each row.
    absmax: Held<f32>,
    cols: usize,
}

impl Int8 {
    /// Each value becomes `round(127 x / absmax)`, halves to even. A row whose largest absolute value is
    /// below 127 · 2⁻¹²⁸, so that the quotient is no number, counts as zeros.
    ///
    /// # Errors
    /// A value is infinite or not a number: the scale of its row would be too.
    pub fn quantise(values: &[f32], cols: usize) -> Result<Self, NotFinite> {
        let rows = values.len() / cols.max(1);
        assert_eq!(rows * cols, values.len(), "whole rows");
        let mut codes = vec![0i8; values.len()];
        let mut absmax = vec![0f32; rows];
        let at_once = (TASK / cols.max(1)).max(1);
        let width = (at_once * cols).max(1);
        (values.par_chunks(width))
            .zip(codes.par_chunks_mut(width))
            .zip(absmax.par_chunks_mut(at_once))
            .for_each(|((values, codes), absmax)| {
                pulp::Arch::new().dispatch(QuantiseRows {
                    values,
                    codes,
                    absmax,
                    cols,
                });
            });
        if absmax.par_iter().any(|scale| !scale.is_finite()) {
            return Err(NotFinite::first_of(values));
        }
        Ok(Self {
            codes: codes.into(),
            absmax: absmax.into(),
            cols,
        })
    }

    /// Codes and scales as bytes.
    pub(super) fn parts(&self) -> Vec<&[u8]> {
        vec![cast_slice(&self.codes), cast_slice(&self.absmax)]
    }

    /// The same parts in a mapped file; `None` where they are not those of `[rows, cols]`.
    pub(super) fn from_parts(
        [rows, cols]: [usize; 2],
        map: &Arc<Mmap>,
        parts: &[Range<usize>],
    ) -> Option<Self> {
        let [codes, absmax] = parts else {
            return None;
        };
        let codes = Held::<i8>::mapped(map.clone(), codes.clone())?;
        let absmax = Held::<f32>::mapped(map.clone(), absmax.clone())?;
        let fits = codes.len() == rows.checked_mul(cols)? && absmax.len() == rows;
        fits.then_some(Self {
            codes,
            absmax,
            cols,
        })
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// The codes, row by row.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// The largest absolute value of each row; code 127 stands for it.
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// Bytes that codes and scales take.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.absmax.len()
    }

    /// The rows from `row` on, as many as `out` takes, by all threads.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn dequantise(&self, row: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        let (cols, first) = (self.cols, row * self.cols);
        assert!(
            out.len().is_multiple_of(cols) && first + out.len() <= self.codes.len(),
            "{} values from row {row} on, of {}",
            out.len(),
            self.codes.len()
        );
        let at_once = (TASK / cols).max(1);
        (out.par_chunks_mut(at_once * cols))
            .zip(self.codes[first..].par_chunks(at_once * cols))
            .zip(self.absmax[row..].par_chunks(at_once))
            .for_each(|((out, codes), absmax)| {
                pulp::Arch::new().dispatch(DequantiseRows {
                    codes,
                    absmax,
                    out,
                    cols,
                });
            });
    }
}

/// The rows of one task.
struct QuantiseRows<'a> {
    values: &'a [f32],
    codes: &'a mut [i8],
    absmax: &'a mut [f32],
    cols: usize,
}

impl pulp::NullaryFnOnce for QuantiseRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rows = self.values.chunks_exact(self.cols);
        let codes = self.codes.chunks_exact_mut(self.cols);
        for ((row, codes), absmax) in rows.zip(codes).zip(self.absmax) {
            // As integers, so that NaN is the largest.
            let bits = (row.iter()).fold(0u32, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
            let largest = f32::from_bits(bits);
            let quotient = MOST / largest;
            let factor = match quotient.is_finite() {
                true => {
                    *absmax = largest;
                    quotient
                }
                false => {
                    // Zero, or NaN where a value is.
                    *absmax = largest * 0.0;
                    0.0
                }
            };
            for (code, x) in codes.iter_mut().zip(row) {
                // Bounded by 127, so that the conversion need not saturate.
                *code = (x * factor).round_ties_even() as i32 as i8;
            }
        }
    }
}

/// The rows of one task.
struct DequantiseRows<'a> {
    codes: &'a [i8],
    absmax: &'a [f32],
    out: &'a mut [f32],
    cols: usize,
}

impl pulp::NullaryFnOnce for DequantiseRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let codes = self.codes.chunks_exact(self.cols);
        let out = self.out.chunks_exact_mut(self.cols);
        for ((codes, out), absmax) in codes.zip(out).zip(self.absmax) {
            for (out, code) in out.iter_mut().zip(codes) {
                // First by 1 / 127, so that ±127 gives ±absmax itself.
                *out = f32::from(*code) * (1.0 / MOST) * absmax;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn all(q: &Int8) -> Vec<f32> {
        let mut out = vec![f32::NAN; q.len()];
        q.dequantise(0, &mut out);
        out
    }

    fn normal(n: usize) -> Vec<f32> {
        let stream = Stream::new(11);
        (0..n as u64).map(|i| stream.normal(i) as f32).collect()
    }

    #[test]
    fn values_are_rounded_to_their_rows_steps() {
        let q = Int8::quantise(&[1.27, -0.024, 0.0, -2.54, 0.03, 0.05], 3).unwrap();
        assert_eq!(q.codes(), [127, -2, 0, -127, 2, 2]);
        assert_eq!(q.bytes(), 6 + 8);
        let mut second = [0.0; 3];
        q.dequantise(1, &mut second);
        assert_eq!(second.map(|x| (x * 100.0).round()), [-254.0, 4.0, 4.0]);
    }

    #[test]
    fn every_value_is_within_half_a_step() {
        for (rows, cols) in [(1, 1), (3, 65), (70, 1000), (5, 40_000), (0, 7), (4, 0)] {
            let values = normal(rows * cols);
            let q = Int8::quantise(&values, cols).unwrap();
            assert_eq!(q.absmax().len(), if cols == 0 { 0 } else { rows });
            for (i, (x, got)) in values.iter().zip(all(&q)).enumerate() {
                let step = q.absmax()[i / cols] / MOST;
                assert!((x - got).abs() <= 0.5001 * step, "{i}: {x} {got} {step}");
            }
            assert_eq!(Int8::quantise(&all(&q), cols).unwrap().codes(), q.codes());
        }
    }

    #[test]
    fn zeros_the_smallest_and_the_largest() {
        let values = [0.0, 0.0, 1e-40, -1e-40, f32::MAX, -1.0];
        let got = all(&Int8::quantise(&values, 2).unwrap());
        assert_eq!(got[..4], [0.0; 4]);
        assert_eq!(got[4], f32::MAX);
    }

    #[test]
    fn what_is_not_finite_is_refused_by_its_place() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 64, 39_999] {
                let mut values = normal(40_000);
                values[at] = bad;
                assert_eq!(Int8::quantise(&values, 400).unwrap_err().index, at);
            }
        }
    }
}
