//! Adding a low-rank delta to the weight it belongs to.

use rayon::prelude::*;

use super::peft::{LoraPair, transposed};

/// Elements of the delta that one thread holds at a time (256 KiB, so that it stays in cache).
const CHUNK: usize = 1 << 16;

/// How large a delta is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DeltaSize {
    /// Largest absolute element; NaN where the delta holds one.
    pub max_abs: f32,
    /// Sum of squares, whose root is the Frobenius norm.
    pub sum_of_squares: f64,
}

impl DeltaSize {
    /// The size of one element.
    pub fn of(element: f32) -> Self {
        Self {
            max_abs: element.abs(),
            sum_of_squares: f64::from(element).powi(2),
        }
    }

    /// The size of two deltas together.
    pub fn and(self, other: Self) -> Self {
        // `f32::max` would drop a NaN.
        let max_abs = if self.max_abs.is_nan() || self.max_abs > other.max_abs {
            self.max_abs
        } else {
            other.max_abs
        };
        Self {
            max_abs,
            sum_of_squares: self.sum_of_squares + other.sum_of_squares,
        }
    }

    /// Whether every element is a number.
    pub fn is_finite(self) -> bool {
        self.max_abs.is_finite() && self.sum_of_squares.is_finite()
    }
}

/// `W += scaling · B·A`, in f32 and in parallel over rows; returns the size of what was added. With
/// DoRA's magnitudes, each row of the sum is then given its length.
///
/// The delta is computed in chunks of rows and never held whole.
///
/// # Shapes
/// `W [out, in]`, `A [R, in]`, `B [out, R]`, row-major.
///
/// # Panics
/// When the shapes do not belong together, which [`fit`](super::peft::fit) rules out.
pub fn merge_into(w: &mut [f32], pair: &LoraPair, scaling: f64) -> DeltaSize {
    let ([rank, inputs], [out, b_rank]) = (pair.a_shape, pair.b_shape);
    assert_eq!(rank, b_rank, "factors of one rank");
    assert_eq!(w.len(), out * inputs, "weight of the delta's shape");
    assert_eq!(pair.a.len(), rank * inputs, "A of its shape");
    assert_eq!(pair.b.len(), out * rank, "B of its shape");
    if w.is_empty() || rank == 0 {
        return DeltaSize::default();
    }
    let rows = (CHUNK / inputs).clamp(1, out);
    (w.par_chunks_mut(rows * inputs)
        .zip(pair.b.par_chunks(rows * rank))
        .enumerate())
    .map(|(i, (w, b))| {
        let lengths = pair.magnitude.as_ref().map(|m| &m[i * rows..]);
        merge_rows(w, &pair.a, b, (rank, inputs), scaling as f32, lengths)
    })
    .reduce(DeltaSize::default, DeltaSize::and)
}

/// [`merge_into`] for an embedding, in which it is the columns to which DoRA gives their lengths.
pub fn merge_into_embedding(w: &mut [f32], pair: &LoraPair, scaling: f64) -> DeltaSize {
    if pair.magnitude.is_none() {
        return merge_into(w, pair, scaling);
    }
    let (tokens, width) = (pair.b_shape[0], pair.a_shape[1]);
    let mut turned = transposed(w, [tokens, width]);
    let size = merge_into(&mut turned, &pair.transposed(), scaling);
    w.copy_from_slice(&transposed(&turned, [width, tokens]));
    size
}

/// Puts `new` in place of a tensor's values; returns the size of the difference.
///
/// # Panics
/// When the lengths differ, which [`fit_model`](super::peft::fit_model) rules out.
pub fn replace(values: &mut [f32], new: Vec<f32>) -> DeltaSize {
    assert_eq!(values.len(), new.len(), "values of the tensor's shape");
    let differences = values.iter().zip(&new).map(|(old, new)| new - old);
    let size = differences
        .map(DeltaSize::of)
        .fold(DeltaSize::default(), DeltaSize::and);
    values.copy_from_slice(&new);
    size
}

/// One chunk of rows.
fn merge_rows(
    w: &mut [f32],
    a: &[f32],
    b: &[f32],
    (rank, inputs): (usize, usize),
    scaling: f32,
    lengths: Option<&[f32]>,
) -> DeltaSize {
    let mut delta = vec![0.0; w.len()];
    multiply(&mut delta, b, a, rank, inputs, scaling);
    if let Some(lengths) = lengths {
        let rows = w.chunks_exact(inputs).zip(delta.chunks_exact_mut(inputs));
        for ((w, delta), length) in rows.zip(lengths) {
            let squares = w.iter().zip(&*delta).map(|(w, d)| f64::from(w + d).powi(2));
            let gain = length / squares.sum::<f64>().sqrt() as f32;
            for (w, delta) in w.iter().zip(delta) {
                *delta = gain * (w + *delta) - w;
            }
        }
    }
    let mut size = DeltaSize::default();
    for (w, d) in w.iter_mut().zip(delta) {
        *w += d;
        size = size.and(DeltaSize::of(d));
    }
    size
}

/// `C = scaling · B·A` on one thread.
///
/// # Shapes
/// `C [rows, inputs]`, `B [rows, rank]`, `A [rank, inputs]`, row-major.
fn multiply(c: &mut [f32], b: &[f32], a: &[f32], rank: usize, inputs: usize, scaling: f32) {
    let rows = c.len() / inputs;
    assert!(c.len() == rows * inputs && b.len() == rows * rank && a.len() == rank * inputs);
    let (row, k) = (inputs as isize, rank as isize);
    // SAFETY: the strides stay within the three slices, whose lengths are checked above, and `c`
    // is borrowed exclusively.
    unsafe {
        gemm::gemm(
            rows,
            inputs,
            rank,
            c.as_mut_ptr(),
            1,
            row,
            false,
            b.as_ptr(),
            1,
            k,
            a.as_ptr(),
            1,
            row,
            0.0,
            scaling,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(a: &[f32], a_shape: [usize; 2], b: &[f32], b_shape: [usize; 2]) -> LoraPair {
        LoraPair {
            a: a.to_vec(),
            a_shape,
            b: b.to_vec(),
            b_shape,
            magnitude: None,
        }
    }

    #[test]
    fn a_small_delta_is_added() {
        let pair = pair(
            &[1.0, 2.0, 3.0, 0.0, 1.0, 0.0],
            [2, 3],
            &[1.0, 0.0, 2.0, -1.0],
            [2, 2],
        );
        let mut w = vec![10.0; 6];
        let size = merge_into(&mut w, &pair, 0.5);
        assert_eq!(w, [10.5, 11.0, 11.5, 11.0, 11.5, 13.0]);
        assert_eq!(size.max_abs, 3.0);
        assert_eq!(size.sum_of_squares, 0.25 + 1.0 + 2.25 + 1.0 + 2.25 + 9.0);
    }

    #[test]
    fn chunks_do_not_show() {
        let (out, inputs, rank) = (70, 3000, 5);
        let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let a: Vec<f32> = (0..rank * inputs).map(value).collect();
        let b: Vec<f32> = (0..out * rank).map(|i| value(i + 7)).collect();
        let mut w: Vec<f32> = (0..out * inputs).map(|i| value(i + 3)).collect();
        let mut slow: Vec<f64> = w.iter().map(|x| f64::from(*x)).collect();
        for (i, w) in slow.iter_mut().enumerate() {
            let (row, column) = (i / inputs, i % inputs);
            let products =
                (0..rank).map(|r| f64::from(b[row * rank + r]) * f64::from(a[r * inputs + column]));
            *w += 0.3 * products.sum::<f64>();
        }
        merge_into(&mut w, &pair(&a, [rank, inputs], &b, [out, rank]), 0.3);
        let worst = w
            .iter()
            .zip(&slow)
            .map(|(x, y)| (f64::from(*x) - y).abs())
            .fold(0.0, f64::max);
        assert!(worst < 1e-6, "{worst}");
    }

    #[test]
    fn a_broken_factor_shows() {
        let pair = pair(&[f32::NAN, 1.0], [1, 2], &[1.0], [1, 1]);
        assert!(!merge_into(&mut [0.0, 0.0], &pair, 1.0).is_finite());
    }
}
