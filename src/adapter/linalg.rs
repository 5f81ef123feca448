//! Decompositions of small and of tall matrices, in f64: QR and the singular values.
//!
//! Matrices are row-major slices. Adapters need few singular vectors of large matrices, and all of
//! small ones; both are here without a library for the general case.

use rayon::prelude::*;

use crate::random::Stream;

/// A row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// `rows · cols` elements.
    pub data: Vec<f64>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// `U diag(s) Vᵀ`, the singular values falling.
#[derive(Debug, Clone)]
pub struct Svd {
    /// `[rows, r]`
    pub u: Matrix,
    /// `[r]`
    pub s: Vec<f64>,
    /// `[cols, r]`
    pub v: Matrix,
}

impl Matrix {
    /// From f32 values.
    pub fn from_f32(values: &[f32], [rows, cols]: [usize; 2]) -> Self {
        assert_eq!(values.len(), rows * cols, "a matrix of its shape");
        Self {
            data: values.iter().map(|&x| f64::from(x)).collect(),
            rows,
            cols,
        }
    }

    /// As f32 values.
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&x| x as f32).collect()
    }

    /// Element by element.
    pub fn from_fn(rows: usize, cols: usize, f: impl Fn(usize, usize) -> f64) -> Self {
        let data = (0..rows * cols).map(|i| f(i / cols, i % cols)).collect();
        Self { data, rows, cols }
    }

    /// Rows and columns exchanged.
    pub fn transposed(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self.data[j * self.cols + i])
    }

    /// The first `n` columns.
    pub fn first_columns(&self, n: usize) -> Self {
        Self::from_fn(self.rows, n, |i, j| self.data[i * self.cols + j])
    }

    /// The product, by all threads.
    pub fn times(&self, other: &Self) -> Self {
        assert_eq!(self.cols, other.rows, "factors that fit");
        let mut data = vec![0.0; self.rows * other.cols];
        let (width, inner) = (other.cols as isize, self.cols as isize);
        if !data.is_empty() && self.cols > 0 {
            // SAFETY: the strides stay within the three vectors, which have as many elements as
            // rows times columns, and `data` is borrowed exclusively.
            unsafe {
                gemm::gemm(
                    self.rows,
                    other.cols,
                    self.cols,
                    data.as_mut_ptr(),
                    1,
                    width,
                    false,
                    self.data.as_ptr(),
                    1,
                    inner,
                    other.data.as_ptr(),
                    1,
                    width,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::Rayon(0),
                );
            }
        }
        Self {
            data,
            rows: self.rows,
            cols: other.cols,
        }
    }

    /// Column `j` times `factors[j]`.
    pub fn scale_columns(mut self, factors: &[f64]) -> Self {
        for row in self.data.chunks_exact_mut(self.cols.max(1)) {
            row.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
        }
        self
    }
}

/// Reduced QR by Householder reflections with LAPACK's signs: Q `[rows, k]` with orthonormal columns
/// and R `[k, cols]`, upper trapezoidal, k the lesser of rows and columns.
pub fn qr(matrix: &Matrix) -> (Matrix, Matrix) {
    let (m, n) = (matrix.rows, matrix.cols);
    let k = m.min(n);
    // Column by column, so that reflections run along memory.
    let mut columns = matrix.transposed();
    let mut reflectors: Vec<(Vec<f64>, f64)> = Vec::with_capacity(k);
    for j in 0..k {
        let mut v = columns.data[j * m + j..(j + 1) * m].to_vec();
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let beta = if v[0] >= 0.0 { -norm } else { norm };
        v[0] -= beta;
        let square = v.iter().map(|x| x * x).sum::<f64>();
        let tau = if square > 0.0 { 2.0 / square } else { 0.0 };
        let rest = columns.data[j * m..].par_chunks_mut(m);
        rest.for_each(|column| reflect(&mut column[j..], &v, tau));
        reflectors.push((v, tau));
    }
    let r = Matrix::from_fn(k, n, |i, j| match i <= j {
        true => columns.data[j * m + i],
        false => 0.0,
    });
    let mut q = Matrix::from_fn(k, m, |i, j| f64::from(i == j));
    for (j, (v, tau)) in reflectors.iter().enumerate().rev() {
        let rows = q.data.par_chunks_mut(m);
        rows.for_each(|column| reflect(&mut column[j..], v, *tau));
    }
    (q.transposed(), r)
}

/// `x -= tau (v · x) v`
fn reflect(x: &mut [f64], v: &[f64], tau: f64) {
    let dot: f64 = x.iter().zip(v).map(|(x, v)| x * v).sum();
    x.iter_mut().zip(v).for_each(|(x, v)| *x -= tau * dot * v);
}

/// All singular values, by one-sided Jacobi rotations (Demmel and Veselić 1992,
/// <https://doi.org/10.1137/0613074>), which finds small ones to full relative accuracy.
pub fn svd(matrix: &Matrix) -> Svd {
    if matrix.rows < matrix.cols {
        let Svd { u, s, v } = svd(&matrix.transposed());
        return Svd { u: v, s, v: u };
    }
    // QR first: the rotations then work on a square matrix.
    let (q, r) = qr(matrix);
    let n = matrix.cols;
    // Rows of `a` are columns of R.
    let (mut a, mut v) = (
        r.transposed(),
        Matrix::from_fn(n, n, |i, j| f64::from(i == j)),
    );
    for _ in 0..SWEEPS {
        let mut turned = false;
        for i in 0..n {
            for j in i + 1..n {
                turned |= rotate(&mut a, &mut v, i, j);
            }
        }
        if !turned {
            break;
        }
    }
    let norm = |i: usize| {
        a.data[i * n..(i + 1) * n]
            .iter()
            .map(|x| x * x)
            .sum::<f64>()
    };
    let mut order: Vec<(f64, usize)> = (0..n).map(|i| (norm(i).sqrt(), i)).collect();
    order.sort_by(|x, y| y.0.total_cmp(&x.0));
    let s: Vec<f64> = order.iter().map(|(s, _)| *s).collect();
    let u = Matrix::from_fn(n, n, |i, j| match order[j] {
        (s, at) if s > 0.0 => a.data[at * n + i] / s,
        _ => 0.0,
    });
    Svd {
        u: q.times(&u),
        s,
        v: Matrix::from_fn(n, n, |i, j| v.data[order[j].1 * n + i]),
    }
}

/// Most matrices need about eight.
const SWEEPS: usize = 40;

/// Makes rows i and j of `a` orthogonal, and turns those of `v` along; false where they were.
fn rotate(a: &mut Matrix, v: &mut Matrix, i: usize, j: usize) -> bool {
    let n = a.cols;
    let (head, tail) = a.data.split_at_mut(j * n);
    let (x, y) = (&mut head[i * n..(i + 1) * n], &mut tail[..n]);
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y.iter()) {
        xx += x * x;
        yy += y * y;
        xy += x * y;
    }
    if xy.abs() <= f64::EPSILON * (xx * yy).sqrt() {
        return false;
    }
    let zeta = (yy - xx) / (2.0 * xy);
    let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
    let c = 1.0 / (1.0 + t * t).sqrt();
    let turn = |x: &mut [f64], y: &mut [f64]| {
        for (x, y) in x.iter_mut().zip(y) {
            (*x, *y) = (c * (*x - t * *y), c * (t * *x + *y));
        }
    };
    turn(x, y);
    let (head, tail) = v.data.split_at_mut(j * n);
    turn(&mut head[i * n..(i + 1) * n], &mut tail[..n]);
    true
}

/// The largest singular values with their vectors.
///
/// Narrow matrices are decomposed whole. Of wide ones, a random subspace is turned towards the largest
/// by multiplying with the matrix and its transpose (Halko, Martinsson and Tropp, arXiv 0909.4061)
/// until the wanted values stand still to 1e-7, or for 60 rounds.
pub fn top_svd(matrix: &Matrix, rank: usize) -> Svd {
    let width = matrix.rows.min(matrix.cols);
    let rank = rank.min(width);
    let subspace = (2 * rank + 16).min(width);
    let found = match width <= NARROW || 2 * subspace > width {
        true => svd(matrix),
        false => subspace_svd(matrix, rank, subspace),
    };
    Svd {
        u: found.u.first_columns(rank),
        s: found.s[..rank].to_vec(),
        v: found.v.first_columns(rank),
    }
}

/// Up to this width a whole decomposition takes seconds.
const NARROW: usize = 512;
const ROUNDS: usize = 60;

fn subspace_svd(matrix: &Matrix, rank: usize, subspace: usize) -> Svd {
    let transposed = matrix.transposed();
    let stream = Stream::new(0x5D);
    let start = Matrix::from_fn(matrix.cols, subspace, |i, j| {
        stream.normal((i * subspace + j) as u64)
    });
    let (mut q, _) = qr(&matrix.times(&start));
    let mut before = vec![0.0; rank];
    for _ in 0..ROUNDS {
        let (p, _) = qr(&transposed.times(&q));
        let r;
        (q, r) = qr(&matrix.times(&p));
        let s = svd(&r).s;
        let moved = |(s, before): (&f64, &f64)| (s - before).abs() > 1e-7 * s;
        if !s.iter().zip(&before).any(moved) {
            break;
        }
        before = s[..rank].to_vec();
    }
    // Qᵀ M is small on one side.
    let Svd { u, s, v } = svd(&q.transposed().times(matrix));
    Svd {
        u: q.times(&u),
        s,
        v,
    }
}

/// `(G + shift · I)⁻¹` of a symmetric, positive semidefinite G, by its eigenvalues.
pub fn shifted_inverse(gram: &Matrix, shift: f64) -> Matrix {
    let Svd { u, s, .. } = svd(gram);
    let inverse: Vec<f64> = s.iter().map(|s| 1.0 / (s + shift)).collect();
    u.clone().scale_columns(&inverse).times(&u.transposed())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let stream = Stream::new(seed);
        Matrix::from_fn(rows, cols, |i, j| stream.normal((i * cols + j) as u64))
    }

    fn distance(a: &Matrix, b: &Matrix) -> f64 {
        let differences = a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs());
        differences.fold(0.0, f64::max)
    }

    fn product(svd: &Svd) -> Matrix {
        svd.u
            .clone()
            .scale_columns(&svd.s)
            .times(&svd.v.transposed())
    }

    fn is_orthonormal(q: &Matrix) -> bool {
        let one = Matrix::from_fn(q.cols, q.cols, |i, j| f64::from(i == j));
        distance(&q.transposed().times(q), &one) < 1e-12
    }

    #[test]
    fn qr_gives_the_matrix_back() {
        for (m, n) in [(7, 4), (4, 7), (5, 5), (1, 3), (3, 1)] {
            let a = random(m, n, 1);
            let (q, r) = qr(&a);
            assert!(distance(&q.times(&r), &a) < 1e-12, "{m} x {n}");
            assert!(is_orthonormal(&q), "{m} x {n}");
        }
    }

    #[test]
    fn svd_gives_the_matrix_back() {
        for (m, n) in [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1)] {
            let a = random(m, n, 2);
            let found = svd(&a);
            assert!(distance(&product(&found), &a) < 1e-12, "{m} x {n}");
            assert!(is_orthonormal(&found.u) && is_orthonormal(&found.v));
            assert!(found.s.is_sorted_by(|x, y| x >= y));
        }
        // Rank one, and nothing at all.
        let a = random(5, 1, 3).times(&random(1, 4, 4));
        let found = svd(&a);
        assert!(found.s[1] < 1e-14 && distance(&product(&found), &a) < 1e-13);
        let zero = Matrix::from_fn(3, 2, |_, _| 0.0);
        assert_eq!(product(&svd(&zero)), zero);
    }

    #[test]
    fn a_subspace_finds_the_largest_values() {
        // Values that fall as those of trained weights do.
        let (u, _) = qr(&random(120, 80, 5));
        let (v, _) = qr(&random(90, 80, 6));
        let s: Vec<f64> = (0..80).map(|i| 1.0 / (1.0 + i as f64)).collect();
        let a = u.clone().scale_columns(&s).times(&v.transposed());
        let found = subspace_svd(&a, 4, 12);
        for (got, want) in found.s.iter().zip(&s[..4]) {
            assert!((got - want).abs() < 1e-7, "{got} {want}");
        }
        let wanted = Svd {
            u: u.first_columns(4),
            s: s[..4].to_vec(),
            v: v.first_columns(4),
        };
        let found = Svd {
            u: found.u.first_columns(4),
            s: found.s[..4].to_vec(),
            v: found.v.first_columns(4),
        };
        assert!(distance(&product(&found), &product(&wanted)) < 1e-5);
    }

    #[test]
    fn a_shifted_inverse_inverts() {
        let a = random(3, 8, 7);
        let gram = a.times(&a.transposed());
        let shifted = Matrix::from_fn(3, 3, |i, j| gram.data[i * 3 + j] + f64::from(i == j) * 0.5);
        let one = Matrix::from_fn(3, 3, |i, j| f64::from(i == j));
        assert!(distance(&shifted.times(&shifted_inverse(&gram, 0.5)), &one) < 1e-12);
    }
}
