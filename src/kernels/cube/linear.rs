//! [`linear`](fn@crate::kernels::linear) and [`lora_linear`](fn@crate::kernels::lora_linear) on GPUs, group
//! by group: a product each, which reads the weight as it is stored.

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::packed::Packed;
use super::product::{Low, Product};
use super::tiles::Side;
use super::{contiguous, dims, empty, zeros};
use crate::kernels::Quantised;
use crate::kernels::linear::filled;
use crate::kernels::lora_linear::Saved;

/// The weight as products read it; the tensor is empty where it is quantised.
fn matrix((weight, quantised): (CubeTensor, Quantised)) -> Packed {
    match quantised {
        None => {
            let cols = dims(&weight)[1];
            Packed::dense(weight, cols)
        }
        Some(quantised) => quantised.on_device(&weight),
    }
}

/// `x Wᵀ` of each group.
pub(super) fn forward(
    x: CubeTensor,
    weight: (CubeTensor, Quantised),
    groups: &[usize],
) -> CubeTensor {
    let x = contiguous(x);
    let [n, input] = dims(&x);
    let weight = matrix(weight);
    let out = weight.rows / (groups.len() - 1);
    let y = empty(&x, [n, out]);
    for (group, rows) in filled(groups) {
        let product = Product {
            x_first: rows.start,
            w_first: group * out,
            ..Product::new(&x, &weight, Side::Transposed)
        };
        product.write(&y, rows.start, [rows.len(), out, input]);
    }
    y
}

/// `g W` of each group.
pub(super) fn backward(
    weight: (CubeTensor, Quantised),
    grad: CubeTensor,
    groups: &[usize],
) -> CubeTensor {
    let grad = contiguous(grad);
    let [n, out] = dims(&grad);
    let weight = matrix(weight);
    let dx = empty(&grad, [n, weight.cols]);
    for (group, rows) in filled(groups) {
        let product = Product {
            x_first: rows.start,
            w_first: group * out,
            ..Product::new(&grad, &weight, Side::Plain)
        };
        product.write(&dx, rows.start, [rows.len(), weight.cols, out]);
    }
    dx
}

/// Output and `x Aᵀ`.
pub(super) fn lora_forward(
    x: CubeTensor,
    weight: (CubeTensor, Quantised),
    factors: [CubeTensor; 2],
    scaling: f32,
    groups: &[usize],
) -> (CubeTensor, CubeTensor) {
    let x = contiguous(x);
    let [n, input] = dims(&x);
    let rank = dims(&factors[1])[1];
    let weight = matrix(weight);
    let out = weight.rows / (groups.len() - 1);
    let [a, b] = factors.map(|factor| {
        let cols = dims(&factor)[1];
        Packed::dense(factor, cols)
    });
    let (y, low) = (empty(&x, [n, out]), empty(&x, [n, rank]));
    for (group, rows) in filled(groups) {
        let product = Product {
            x_first: rows.start,
            w_first: group * rank,
            ..Product::new(&x, &a, Side::Transposed)
        };
        product.write(&low, rows.start, [rows.len(), rank, input]);
        let product = Product {
            x_first: rows.start,
            w_first: group * out,
            low: Some(Low {
                low: &low,
                up: &b,
                up_first: group * out,
                rank,
                scale: scaling,
            }),
            ..Product::new(&x, &weight, Side::Transposed)
        };
        product.write(&y, rows.start, [rows.len(), out, input]);
    }
    (y, low)
}

/// Gradients of x (when wanted), A and B.
pub(super) fn lora_backward(
    saved: Saved<CubeBackend>,
    grad: CubeTensor,
    wants_x: bool,
) -> (Option<CubeTensor>, CubeTensor, CubeTensor) {
    let [x, low, grad] = [saved.x, saved.low, grad].map(contiguous);
    let ([n, input], [_, rank], [_, out]) = (dims(&x), dims(&low), dims(&grad));
    let (groups, scale) = (&*saved.groups, saved.scaling);
    let all = filled(groups).count() == groups.len() - 1;
    // Of a group without rows nobody writes the gradients.
    let [da, db] = [&saved.lora_a, &saved.lora_b].map(|factor| match all {
        true => empty(factor, dims(factor)),
        false => zeros(factor, dims(factor)),
    });
    let a = Packed::dense(saved.lora_a, input);
    let b = Packed::dense(saved.lora_b, rank);
    let low_matrix = Packed::dense(low, rank);
    let x_matrix = Packed::dense(x, input);
    let g_low = empty(&grad, [n, rank]); // s · g B
    let dx = wants_x.then(|| {
        let weight = matrix(saved.weight);
        (weight, empty(&grad, [n, input]))
    });
    for (group, rows) in filled(groups) {
        let (first, count) = (rows.start, rows.len());
        let product = Product {
            x_first: first,
            w_first: group * out,
            scale,
            ..Product::new(&grad, &b, Side::Plain)
        };
        product.write(&g_low, first, [count, rank, out]);
        let transposed = |x, matrix, scale| Product {
            x_transposed: true,
            x_first: first,
            w_first: first,
            scale,
            ..Product::new(x, matrix, Side::Plain)
        };
        let product = transposed(&g_low, &x_matrix, 1.0);
        product.write(&da, group * rank, [rank, input, count]);
        let product = transposed(&grad, &low_matrix, scale);
        product.write(&db, group * out, [out, rank, count]);
        if let Some((weight, dx)) = &dx {
            let product = Product {
                x_first: first,
                w_first: group * out,
                low: Some(Low {
                    low: &g_low,
                    up: &a,
                    up_first: group * rank,
                    rank,
                    scale: 1.0,
                }),
                ..Product::new(&grad, weight, Side::Plain)
            };
            product.write(dx, first, [count, input, out]);
        }
    }
    (dx.map(|(_, dx)| dx), da, db)
}
