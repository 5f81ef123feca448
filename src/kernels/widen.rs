//! What is stored in 16 bits, in f32, on devices whatever types they have themselves.

use burn::backend::Dispatch;
use burn::tensor::{DType, FloatDType, Int, Tensor};

use super::{Kernels, is_cpu};

/// A tensor in f32, for plain operations; without a gradient where it was not.
pub fn in_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    match x.dtype() {
        DType::F32 => x,
        _ if is_cpu(&x.device()) => x.cast(FloatDType::F32),
        // Not every GPU converts, or even knows, bf16.
        _ => Tensor::from_dispatch(Dispatch::fused_in_f32(x.into_dispatch())),
    }
}

/// Rows of a table in f32, with a gradient for a table that is in f32.
///
/// # Shapes
/// table `[V, D]`, ids `[N]` below V → `[N, D]`
pub fn rows_of(table: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    match table.dtype() {
        DType::F32 => table.select(0, ids),
        _ if is_cpu(&table.device()) => in_f32(table.select(0, ids)),
        _ => Tensor::from_dispatch(Dispatch::fused_rows_of(
            table.into_dispatch(),
            ids.into_dispatch(),
        )),
    }
}
