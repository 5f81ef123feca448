//! A linear layer for each expert, over rows that are sorted by expert: each expert's rows are one
//! product, and an expert without rows costs nothing.
//!
//! Rows `offsets[e] .. offsets[e + 1]` are those of expert e: E + 1 offsets from 0 to N.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{in_f32, is_fused, linear, lora_linear};

/// Each expert's rows of x times its `weight[e]ᵀ`, with a gradient for x, and for the weight where that
/// trains.
///
/// # Shapes
/// x `[N, in]`, weight `[E, out, in]` → `[N, out]`
///
/// # Dtypes
/// x f32; weight f32, or bf16 or f16 where it is frozen.
pub fn expert_linear(x: Tensor<2>, weight: Tensor<3>, offsets: Arc<[usize]>) -> Tensor<2> {
    match is_fused(&x.device()) && !weight.is_autodiff() {
        true => linear::fused(x, rows_together(weight).into(), offsets),
        false => reference(x, weight, &offsets),
    }
}

/// [`expert_linear`] with a delta for each expert: `x W[e]ᵀ + scaling · (x A[e]ᵀ) B[e]ᵀ`, with
/// gradients for x, A and B.
///
/// # Shapes
/// x `[N, in]`, weight `[E, out, in]`, lora_a `[E, R, in]`, lora_b `[E, out, R]` → `[N, out]`
pub fn expert_lora_linear(
    x: Tensor<2>,
    weight: Tensor<3>,
    (lora_a, lora_b): (Tensor<3>, Tensor<3>),
    scaling: f64,
    offsets: Arc<[usize]>,
) -> Tensor<2> {
    if !is_fused(&x.device()) {
        return lora_reference(x.clone(), x, weight, (lora_a, lora_b), scaling, offsets);
    }
    let factors = (rows_together(lora_a), rows_together(lora_b));
    lora_linear::fused(x, rows_together(weight).into(), factors, scaling, offsets)
}

/// [`expert_lora_linear`] with plain tensor operations for the deltas, whose input may differ from the
/// base's, as it does under dropout.
pub fn lora_reference(
    x: Tensor<2>,
    adapter_x: Tensor<2>,
    weight: Tensor<3>,
    (lora_a, lora_b): (Tensor<3>, Tensor<3>),
    scaling: f64,
    offsets: Arc<[usize]>,
) -> Tensor<2> {
    let low = reference(adapter_x, lora_a, &offsets); // [N, R]
    let delta = reference(low, lora_b, &offsets) * scaling;
    expert_linear(x, weight, offsets) + delta
}

/// [`expert_linear`] from plain tensor operations.
pub fn reference(x: Tensor<2>, weight: Tensor<3>, offsets: &[usize]) -> Tensor<2> {
    let [_, out, input] = weight.dims();
    let products: Vec<Tensor<2>> = offsets
        .windows(2)
        .enumerate()
        .filter(|(_, rows)| rows[1] > rows[0])
        .map(|(expert, rows)| {
            let weight = weight.clone().narrow(0, expert, 1).reshape([out, input]);
            let rows = x.clone().narrow(0, rows[0], rows[1] - rows[0]);
            rows.matmul(in_f32(weight).transpose())
        })
        .collect();
    match products.is_empty() {
        true => Tensor::zeros([0, out], &x.device()),
        false => Tensor::cat(products, 0),
    }
}

/// `[E, rows, cols]` → `[E · rows, cols]`
fn rows_together(x: Tensor<3>) -> Tensor<2> {
    let [experts, rows, cols] = x.dims();
    x.reshape([experts * rows, cols])
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, random};
    use super::*;

    #[test]
    fn each_expert_sees_its_own_rows() {
        let (x, weight): (Tensor<2>, Tensor<3>) = (random([6, 5]), random([4, 3, 5]));
        let got = expert_linear(x.clone(), weight.clone(), Arc::from([0, 2, 2, 5, 6]));
        for (row, expert) in [(0, 0), (1, 0), (2, 2), (3, 2), (4, 2), (5, 3)] {
            let weight = weight.clone().narrow(0, expert, 1).reshape([3, 5]);
            let want = x.clone().narrow(0, row, 1).matmul(weight.transpose());
            assert_close("a row", got.clone().narrow(0, row, 1), want);
        }
    }
}
