//! A linear layer for each expert, over rows that are sorted by expert: each expert's rows are one
//! product, and an expert without rows costs nothing.

use std::sync::Arc;

use burn::tensor::Tensor;

/// Rows `offsets[e] .. offsets[e + 1]` of x times `weight[e]ᵀ`.
///
/// # Shapes
/// x `[N, in]`, weight `[E, out, in]`, E + 1 offsets from 0 to N → `[N, out]`
pub fn expert_linear(x: Tensor<2>, weight: Tensor<3>, offsets: Arc<[usize]>) -> Tensor<2> {
    let [_, out, input] = weight.dims();
    let products: Vec<Tensor<2>> = offsets
        .windows(2)
        .enumerate()
        .filter(|(_, rows)| rows[1] > rows[0])
        .map(|(expert, rows)| {
            let weight = weight.clone().narrow(0, expert, 1).reshape([out, input]);
            let rows = x.clone().narrow(0, rows[0], rows[1] - rows[0]);
            rows.matmul(weight.transpose())
        })
        .collect();
    match products.is_empty() {
        true => Tensor::zeros([0, out], &x.device()),
        false => Tensor::cat(products, 0),
    }
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
