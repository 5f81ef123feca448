//! Access to the CPU backend's storage: slices in, tensors out, matrix products in between.

use burn::tensor::{Element, TensorData};
use burn_flex::FlexTensor;

/// A contiguous f32 tensor; copies only what is a strided view.
pub(super) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// The elements of an f32 tensor from [`contiguous`].
pub(super) fn elements(tensor: &FlexTensor) -> &[f32] {
    stored(tensor)
}

/// The elements of a tensor from [`contiguous`], in its own type.
pub(super) fn stored<T: Element + bytemuck::Pod>(tensor: &FlexTensor) -> &[T] {
    let layout = tensor.layout();
    let start = layout.start_offset();
    &tensor.storage::<T>()[start..start + layout.num_elements()]
}

/// The elements of an f32 tensor from [`contiguous`], to write; copied first where another tensor
/// shares them.
pub(super) fn elements_mut(tensor: &mut FlexTensor) -> &mut [f32] {
    let (start, length) = {
        let layout = tensor.layout();
        (layout.start_offset(), layout.num_elements())
    };
    &mut tensor.storage_mut::<f32>()[start..start + length]
}

/// A new tensor that owns `values`.
pub(super) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// Elements that are all going to be set: of any value, as clearing large blocks takes as long as filling
/// them. No caller reads one that it did not write. Any bits must be a T.
#[expect(clippy::uninit_vec, reason = "see above: written before they are read")]
pub(super) fn unset<T: Copy>(count: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    // SAFETY: there is room for as many; their content is not looked at before it is written.
    unsafe { values.set_len(count) };
    values
}

/// A matrix view: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix.
    pub(super) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A matrix whose rows lie `row_stride` elements apart.
    pub(super) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len());
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Its number of rows.
    pub(super) fn rows(self) -> usize {
        self.rows
    }

    /// Its number of columns.
    pub(super) fn cols(self) -> usize {
        self.cols
    }

    /// Its elements, of a matrix that is row-major.
    pub(super) fn data(self) -> &'a [f32] {
        debug_assert!(self.row_stride == self.cols && self.col_stride == 1);
        &self.data[..self.rows * self.cols]
    }

    /// Whether it has no elements.
    pub(super) fn is_empty(self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// The transposed view.
    pub(super) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// How a product lands in its destination.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Store {
    /// `dst = factor · lhs rhs`
    Set,
    /// `dst += factor · lhs rhs`
    Add,
}

/// `dst [m, n]` takes or gains `factor · lhs [m, k] rhs [k, n]`; rows of `dst` lie `dst_stride` apart.
pub(super) fn matmul(
    dst: &mut [f32],
    dst_stride: usize,
    store: Store,
    factor: f32,
    (lhs, rhs): (Matrix, Matrix),
    threads: gemm::Parallelism,
) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!(k, rhs.rows);
    assert!(m == 0 || n == 0 || (m - 1) * dst_stride + n <= dst.len());
    // SAFETY: both matrices were checked against their slices when made, `dst` just above.
    unsafe {
        matmul_raw(
            dst.as_mut_ptr(),
            dst_stride,
            store,
            factor,
            (lhs, rhs),
            threads,
        )
    }
}

/// [`matmul`] into memory that other threads write elsewhere.
///
/// # Safety
/// `dst` must be valid for `m` rows of `n` elements, `dst_stride` apart, and nothing else may
/// touch those elements meanwhile.
pub(super) unsafe fn matmul_raw(
    dst: *mut f32,
    dst_stride: usize,
    store: Store,
    factor: f32,
    (lhs, rhs): (Matrix, Matrix),
    threads: gemm::Parallelism,
) {
    if lhs.rows == 0 || rhs.cols == 0 {
        return;
    }
    // SAFETY: by this function's contract and the checks of `Matrix`.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            dst,
            1,
            dst_stride as isize,
            store == Store::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            threads,
        )
    }
}

/// All threads of the machine, for products too large for one.
pub(super) const ALL_THREADS: gemm::Parallelism = gemm::Parallelism::Rayon(0);

/// A pointer that threads share, each writing elements of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: whoever derefs it promises disjoint elements (see `Shared::at`).
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn new(values: &mut [f32]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// Of what nothing is written to.
    pub(super) fn reading(values: &[f32]) -> Self {
        Self(values.as_ptr().cast_mut())
    }

    /// # Safety
    /// `offset` must lie inside the slice, and no two threads may use the same elements.
    pub(super) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: by contract.
        unsafe { self.0.add(offset) }
    }
}

/// Runs a loop compiled for the best vector instructions that the processor has.
///
/// The closure must be marked `#[inline(always)]`, as must all it calls: what is not inlined is
/// compiled for the oldest processors. `FnMut`, because calling a closure by value goes through a
/// shim that is never inlined.
pub(super) fn vectorised<R>(body: impl FnMut() -> R) -> R {
    struct Body<F>(F);
    impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Body<F> {
        type Output = R;

        #[inline(always)]
        fn call(mut self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Body(body))
}

/// Rows that one task takes: enough work to pay for the task, few enough to fill the threads.
pub(super) fn rows_per_task(rows: usize, width: usize) -> usize {
    let by_work = (16 * 1024 / width.max(1)).max(1);
    let by_threads = rows.div_ceil(rayon::current_num_threads() * 4).max(1);
    by_work.min(by_threads.max(8))
}

/// The nearest bf16, ties to even; branch-free so that loops over it become vector code, and for finite
/// numbers only.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> half::bf16 {
    let bits = x.to_bits();
    let half = 0x7fff + (bits >> 16 & 1);
    half::bf16::from_bits((bits.wrapping_add(half) >> 16) as u16)
}

/// `eˣ` to about 2 ulp, branch-free so that loops over it become vector code; 0 below -87.3.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Cephes' expf: eˣ = 2ⁿ eʳ with |r| ≤ ln 2 / 2 and a polynomial for eʳ.
    let clamped = x.clamp(-87.3, 88.0);
    let n = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 0.166_666_65);
    p = p.mul_add(r, 0.5);
    let e = (p * r).mul_add(r, r) + 1.0;
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.3 { 0.0 } else { e * power }
}

/// `tanh x` to about 2 ulp, branch-free so that loops over it become vector code.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    // Cephes' tanhf: a polynomial where 1 - 2 / (e²ˣ + 1) would cancel, and that elsewhere.
    let z = x * x;
    let mut p = -5.704_988_7e-3_f32;
    p = p.mul_add(z, 2.063_909e-2);
    p = p.mul_add(z, -5.373_971_6e-2);
    p = p.mul_add(z, 0.133_314_42);
    p = p.mul_add(z, -0.333_332_8);
    let small = (p * z).mul_add(x, x);
    let large = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { small } else { large }
}

/// `erf x` to about 4 ulp, branch-free so that loops over it become vector code.
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    // Eigen's rational approximation up to 4 (`generic_fast_erf_float` in MathFunctionsImpl.h, 3.4); from
    // there on the error function is 1 in f32.
    let z = x * x;
    let mut p = -2.726_142_4e-10_f32;
    p = p.mul_add(z, 2.770_681_5e-8);
    p = p.mul_add(z, -2.101_024e-6);
    p = p.mul_add(z, -5.692_506_2e-5);
    p = p.mul_add(z, -7.349_906_4e-4);
    p = p.mul_add(z, -2.954_6e-3);
    p = p.mul_add(z, -1.609_603_3e-2);
    let mut q = -1.456_607_15e-5_f32;
    q = q.mul_add(z, -2.133_740_5e-4);
    q = q.mul_add(z, -1.682_827e-3);
    q = q.mul_add(z, -7.373_329_3e-3);
    q = q.mul_add(z, -1.426_473_9e-2);
    if x.abs() >= 4.0 {
        1f32.copysign(x)
    } else {
        x * p / q
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `2 / √π Σ (-1)ⁿ x²ⁿ⁺¹ / (n! (2n + 1))`
    fn erf_series(x: f64) -> f64 {
        let mut power = x;
        let mut sum = 0.0;
        for n in 0..200 {
            sum += power / f64::from(2 * n + 1);
            power *= -x * x / f64::from(n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn erf_is_close_to_its_series() {
        for i in -4500..=4500 {
            let x = i as f32 / 1000.0 + 3e-5;
            let (got, want) = (erf(x) as f64, erf_series(x as f64));
            assert!(
                (got - want).abs() <= 5e-7 * want.abs(),
                "erf({x}): {got} {want}"
            );
        }
        assert_eq!(
            [f32::NEG_INFINITY, 0.0, f32::INFINITY].map(erf),
            [-1.0, 0.0, 1.0]
        );
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_close_to_libm() {
        for i in -12_000..=12_000 {
            let x = (i as f32 / 1000.0).powi(3) + 1e-5;
            let (got, want) = (tanh(x) as f64, (x as f64).tanh());
            let off = (got - want).abs();
            assert!(off <= 2.5e-7 * want.abs(), "tanh({x}): {got} {want}");
        }
        assert_eq!(
            [f32::NEG_INFINITY, 0.0, f32::INFINITY].map(tanh),
            [-1.0, 0.0, 1.0]
        );
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn exp_is_close_to_libm() {
        for i in -8800..=880 {
            let x = i as f32 / 100.0 + 0.003;
            let (got, want) = (exp(x) as f64, (x as f64).exp());
            if x > -87.3 {
                assert!((got - want).abs() <= 3e-7 * want, "exp({x}): {got} {want}");
            }
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
