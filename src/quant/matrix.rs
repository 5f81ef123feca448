//! A frozen matrix in fewer bits, dequantised some rows at a time.

use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::NotFinite;
use super::int8::Int8;
use super::nf4::Nf4;
use super::stored::BlockMatrix;

/// How lorafit quantises a matrix itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scheme {
    /// NF4 with a scale in f32 for each 64 values: 4.5 bits a value.
    Nf4,
    /// NF4 with scales in 8 bits: 4.13 bits a value.
    Nf4Double,
    /// int8 with a scale in f32 for each row: 8 bits a value.
    Int8,
}

impl Scheme {
    /// Bytes that a matrix takes, without making it.
    pub fn bytes(self, [rows, cols]: [usize; 2]) -> usize {
        let n = rows * cols;
        match self {
            Self::Nf4 => Nf4::bytes_of(n, false),
            Self::Nf4Double => Nf4::bytes_of(n, true),
            Self::Int8 => n + rows * size_of::<f32>(),
        }
    }
}

/// A matrix `[rows, cols]`.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantMatrix {
    values: Values,
    rows: usize,
    cols: usize,
}

/// The values of a matrix, as they are kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// In NF4, row by row.
    Nf4(Nf4),
    /// In int8.
    Int8(Int8),
    /// In a GGUF file's blocks.
    Blocks(BlockMatrix),
}

impl From<BlockMatrix> for QuantMatrix {
    /// A matrix of a GGUF file as it lies there.
    fn from(blocks: BlockMatrix) -> Self {
        let [rows, cols] = blocks.shape();
        Self {
            values: Values::Blocks(blocks),
            rows,
            cols,
        }
    }
}

impl QuantMatrix {
    /// Quantises row-major values.
    ///
    /// # Errors
    /// A value is infinite or not a number.
    pub fn quantise(
        values: &[f32],
        [rows, cols]: [usize; 2],
        scheme: Scheme,
    ) -> Result<Self, NotFinite> {
        assert_eq!(values.len(), rows * cols, "values of [{rows}, {cols}]");
        let values = match scheme {
            Scheme::Nf4 => Values::Nf4(Nf4::quantise(values)?),
            Scheme::Nf4Double => Values::Nf4(Nf4::quantise(values)?.with_quantised_absmax()),
            Scheme::Int8 => Values::Int8(Int8::quantise(values, cols)?),
        };
        Ok(Self { values, rows, cols })
    }

    /// What lorafit quantised, as bytes: its scheme, its codes, its scales.
    pub(super) fn parts(&self) -> Option<(Scheme, Vec<&[u8]>)> {
        match &self.values {
            Values::Nf4(values) => Some(values.parts()),
            Values::Int8(values) => Some((Scheme::Int8, values.parts())),
            Values::Blocks(_) => None,
        }
    }

    /// A matrix of the same parts in a mapped file; `None` where they are not those of its shape.
    pub(super) fn from_parts(
        scheme: Scheme,
        [rows, cols]: [usize; 2],
        map: &Arc<Mmap>,
        parts: &[Range<usize>],
    ) -> Option<Self> {
        let len = rows.checked_mul(cols)?;
        let values = match scheme {
            Scheme::Int8 => Values::Int8(Int8::from_parts([rows, cols], map, parts)?),
            scheme => Values::Nf4(Nf4::from_parts(scheme, len, map, parts)?),
        };
        Some(Self { values, rows, cols })
    }

    /// `[rows, cols]`
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// As they are kept.
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// Bytes that it takes; none of memory where they lie in a mapped file.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::Nf4(values) => values.bytes(),
            Values::Int8(values) => values.bytes(),
            Values::Blocks(values) => values.blocks().len(),
        }
    }

    /// The rows from `row` on, as many as `out` takes, by all threads.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn dequantise_rows(&self, row: usize, out: &mut [f32]) {
        match &self.values {
            Values::Nf4(values) => values.dequantise(row * self.cols, out),
            Values::Int8(values) => values.dequantise(row, out),
            Values::Blocks(values) => values.dequantise(row, out),
        }
    }

    /// All of it.
    pub fn dequantised(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.rows * self.cols];
        self.dequantise_rows(0, &mut out);
        out
    }

    /// The root of the mean square of what quantising changed, over that of `original`.
    pub fn relative_error(&self, original: &[f32]) -> f64 {
        assert_eq!(original.len(), self.rows * self.cols);
        let height = ((1 << 15) / self.cols.max(1)).max(1);
        let chunks = original.par_chunks((height * self.cols).max(1)).enumerate();
        // Summed in order, so that the figure does not depend on the threads.
        let sums: Vec<[f64; 2]> = chunks
            .map(|(i, original)| {
                let mut got = vec![0f32; original.len()];
                self.dequantise_rows(i * height, &mut got);
                let square = |x: f32| f64::from(x) * f64::from(x);
                let pairs = original.iter().zip(&got);
                pairs.fold([0.0; 2], |[error, size], (x, y)| {
                    [error + square(x - y), size + square(*x)]
                })
            })
            .collect();
        let [error, size] = sums
            .iter()
            .fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
        match size == 0.0 {
            true => 0.0,
            false => (error / size).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn rows_are_those_of_the_whole_and_errors_are_those_of_the_papers() {
        let (rows, cols) = (301, 129);
        let stream = Stream::new(5);
        let values: Vec<f32> = (0..(rows * cols) as u64)
            .map(|i| stream.normal(i) as f32)
            .collect();
        let mut errors = Vec::new();
        for scheme in [Scheme::Nf4, Scheme::Nf4Double, Scheme::Int8] {
            let q = QuantMatrix::quantise(&values, [rows, cols], scheme).unwrap();
            assert_eq!(q.bytes(), scheme.bytes([rows, cols]));
            let whole = q.dequantised();
            for (row, count) in [(0, 1), (1, 3), (300, 1), (17, 284), (301, 0)] {
                let mut part = vec![f32::NAN; count * cols];
                q.dequantise_rows(row, &mut part);
                assert_eq!(
                    part,
                    whole[row * cols..][..count * cols],
                    "{scheme:?} {row}"
                );
            }
            let square = |f: &dyn Fn(usize) -> f32| -> f64 {
                (0..values.len()).map(|i| f64::from(f(i)).powi(2)).sum()
            };
            let error = square(&|i| values[i] - whole[i]) / square(&|i| values[i]);
            assert!((q.relative_error(&values) - error.sqrt()).abs() < 1e-9);
            errors.push(q.relative_error(&values));
        }
        // Of normal values: NF4 about 0.093, a little more with quantised scales, int8 about 0.007.
        assert!(
            errors[0] < errors[1] && errors[1] < 0.098 && errors[0] > 0.08,
            "{errors:?}"
        );
        assert!(errors[2] < 0.008 && errors[2] > 0.005, "{errors:?}");
    }

    #[test]
    fn an_empty_matrix() {
        for shape in [[0, 5], [5, 0], [0, 0]] {
            for scheme in [Scheme::Nf4, Scheme::Nf4Double, Scheme::Int8] {
                let q = QuantMatrix::quantise(&[], shape, scheme).unwrap();
                assert!(q.dequantised().is_empty());
                assert_eq!(q.relative_error(&[]), 0.0);
            }
        }
    }
}
