//! Products with quantised weights, against those with the same weights dequantised to f32.

use super::*;
use crate::quant::Scheme;

const SCHEMES: [Scheme; 3] = [Scheme::Nf4, Scheme::Nf4Double, Scheme::Int8];

/// A random weight, quantised, and its values as a dense one.
fn quantised([out, input]: [usize; 2], scheme: Scheme) -> (Weight, Tensor<2>) {
    let values: Vec<f32> = random::<2>([out, input])
        .into_data()
        .try_into_vec()
        .expect("f32");
    let matrix = QuantMatrix::quantise(&values, [out, input], scheme).expect("finite");
    let weight = QuantWeight::new(matrix, false, &Device::flex());
    let weight = Weight::Quantised(Arc::new(weight));
    let dense = weight.in_f32(&Device::flex());
    (weight, dense)
}

#[test]
fn quantised_linear_equals_dense() {
    device();
    for (n, input, out) in [
        (1, 1, 1),
        (3, 17, 5),
        (37, 64, 50),
        (130, 48, 96),
        (5, 129, 301),
        // Several blocks of rows, the last of them short.
        (7, 2000, 533),
    ] {
        for scheme in SCHEMES {
            let (weight, dense) = quantised([out, input], scheme);
            assert_eq!(weight.dims(), [out, input]);
            // Of a size near one, as sums of up to 2000 terms are compared.
            let x = random([n, input]) * (1.0 / (input as f64).sqrt());
            compare(
                &format!("{scheme:?} {n}x{input}x{out}"),
                &[x],
                |x| linear(x[0].clone(), weight.clone()),
                |x| x[0].clone().matmul(dense.clone().transpose()),
            );
        }
    }
}

#[test]
fn quantised_lora_linear_equals_dense() {
    device();
    for (n, input, out, rank) in [
        (1, 3, 2, 1),
        (37, 64, 50, 8),
        (130, 47, 96, 5),
        (9, 65, 700, 16),
    ] {
        for scheme in SCHEMES {
            let (weight, dense) = quantised([out, input], scheme);
            let inputs = [
                random([n, input]),
                random([rank, input]),
                random([out, rank]),
            ];
            compare(
                &format!("lora {scheme:?} {n}x{input}x{out} rank {rank}"),
                &inputs,
                |x| {
                    let [x, a, b] = [0, 1, 2].map(|i| x[i].clone());
                    lora_linear(x, weight.clone(), a, b, 0.7)
                },
                |x| {
                    let [x, a, b] = [0, 1, 2].map(|i| x[i].clone());
                    let low = x.clone().matmul(a.transpose());
                    x.matmul(dense.clone().transpose()) + low.matmul(b.transpose()) * 0.7
                },
            );
            // What devices without the kernel do.
            compare(
                &format!("reference {scheme:?} {n}x{input}x{out}"),
                &inputs[..1],
                |x| linear::reference(x[0].clone(), weight.clone()),
                |x| x[0].clone().matmul(dense.clone().transpose()),
            );
        }
    }
}

/// The same weight, which may be multiplied in bf16.
fn in_bf16(weight: Weight) -> Weight {
    let Weight::Quantised(weight) = weight else {
        panic!("quantised")
    };
    Weight::Quantised(Arc::new(QuantWeight {
        in_bf16: true,
        ..QuantWeight::clone(&weight)
    }))
}

#[test]
fn products_in_bf16_are_within_their_bound() {
    device();
    for (n, input, out) in [
        (1, 1, 1),
        (3, 17, 5),
        (9, 257, 49),
        (193, 65, 301),
        // Several blocks of rows, the last of them short.
        (7, 2050, 533),
    ] {
        for scheme in SCHEMES {
            let (weight, dense) = quantised([out, input], scheme);
            let weight = in_bf16(weight);
            let name = format!("{scheme:?} in bf16 {n}x{input}x{out}");
            let (x, g) = (random([n, input]), random([n, out]));
            let (y, dx) = frozen::with_gradient(&x, &g, |x| linear(x, weight.clone()));
            // Both factors are rounded, each by up to 2⁻⁸ of itself, and the sums are f32's.
            let slack = match has_bf16_products() {
                true => 2f64.powi(-7) + 2f64.powi(-16) + 2f64.powi(-20),
                false => 2f64.powi(-20),
            };
            frozen::assert_product(&name, y, x, dense.clone(), slack);
            let dense = dense.transpose();
            frozen::assert_product(&format!("{name}, gradient"), dx, g, dense, slack);
        }
    }
}

#[test]
fn rounding_blocks_gives_what_a_bf16_weight_gives() {
    device();
    let (weight, dense) = quantised([300, 1500], Scheme::Nf4);
    let dense = dense.cast(burn::tensor::FloatDType::BF16);
    let (x, g) = (random([20, 1500]), random([20, 300]));
    let got = frozen::with_gradient(&x, &g, |x| linear(x, in_bf16(weight.clone())));
    let want = frozen::with_gradient(&x, &g, |x| linear(x, dense.clone()));
    if has_bf16_products() {
        // The same factors, summed block by block: f32's rounding alone.
        assert_close("output", got.0, want.0);
        assert_close("gradient", got.1, want.1);
    }
}

#[test]
fn no_rows_give_no_rows() {
    device();
    let (weight, _) = quantised([5, 70], Scheme::Nf4);
    for weight in [weight.clone(), in_bf16(weight)] {
        let x: Tensor<2> = Tensor::empty([0, 70], &Device::flex());
        assert_eq!(linear(x, weight).dims(), [0, 5]);
    }
}
