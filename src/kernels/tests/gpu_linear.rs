//! Products with frozen weights on a GPU, of every way in which weights are stored, against plain
//! operations on the CPU with the same weights in f32.

use burn::tensor::FloatDType;

use super::gpu::{compare_on, gpu_or_skip};
use super::*;
use crate::quant::Scheme;

/// How a weight is stored.
#[derive(Debug, Clone, Copy)]
enum Stored {
    Dense(FloatDType),
    Quantised(Scheme),
}

const ALL: [Stored; 6] = [
    Stored::Dense(FloatDType::F32),
    Stored::Dense(FloatDType::F16),
    Stored::Dense(FloatDType::BF16),
    Stored::Quantised(Scheme::Nf4),
    Stored::Quantised(Scheme::Nf4Double),
    Stored::Quantised(Scheme::Int8),
];

/// A random weight on the GPU, and the same numbers in f32 on the CPU.
fn weight(shape: [usize; 2], stored: Stored, gpu: &Device) -> (Weight, Tensor<2>) {
    let values = random::<2>(shape);
    match stored {
        Stored::Dense(dtype) => {
            // Some below f16's normal numbers.
            let values = (values * 1e-3).cast(dtype);
            let moved = values.clone().to_device(gpu);
            assert_eq!(moved.dtype(), dtype.into());
            // And back, as tables go that grow.
            let back = moved.clone().to_device(&Device::flex());
            assert_eq!(back.into_data(), values.clone().into_data());
            (moved.into(), in_f32(values))
        }
        Stored::Quantised(scheme) => {
            let values: Vec<f32> = values.into_data().try_into_vec().expect("f32");
            let matrix = QuantMatrix::quantise(&values, shape, scheme).expect("finite");
            let on = |device| {
                Weight::Quantised(Arc::new(QuantWeight::new(matrix.clone(), false, device)))
            };
            (on(gpu), on(&Device::flex()).in_f32(&Device::flex()))
        }
    }
}

#[test]
fn lora_linear_of_every_weight_on_a_gpu() {
    device();
    let Some(gpu) = gpu_or_skip() else { return };
    for (n, input, out, rank) in [(1, 3, 2, 1), (37, 65, 50, 5), (130, 200, 97, 8)] {
        for stored in ALL {
            let (weight, dense) = weight([out, input], stored, &gpu);
            let inputs = [
                random([n, input]),
                random([rank, input]),
                random([out, rank]),
            ];
            compare_on(
                &gpu,
                &format!("{stored:?} {n}x{input}x{out} rank {rank}"),
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
        }
    }
}

#[test]
fn linear_on_a_gpu_in_small_tiles_in_parts_and_in_large_tiles() {
    device();
    let Some(gpu) = gpu_or_skip() else { return };
    for (n, input, out) in [(3, 70, 5), (2, 1100, 7), (1030, 21, 1025)] {
        let (weight, dense) = weight([out, input], Stored::Quantised(Scheme::Nf4), &gpu);
        compare_on(
            &gpu,
            &format!("linear {n}x{input}x{out}"),
            &[random([n, input])],
            |x| linear(x[0].clone(), weight.clone()),
            |x| x[0].clone().matmul(dense.clone().transpose()),
        );
    }
}

#[test]
fn weights_on_a_gpu_are_those_on_the_cpu_in_f32() {
    device();
    let Some(gpu) = gpu_or_skip() else { return };
    for stored in ALL {
        for shape in [[1, 1], [7, 130], [65, 77]] {
            let (weight, dense) = weight(shape, stored, &gpu);
            let got = weight.in_f32(&gpu).to_device(&Device::flex());
            let off = (got - dense.clone()).abs() / (dense.abs() + 1e-9);
            // A product or two, which may be fused with a sum.
            let off = off.max().into_scalar::<f32>();
            assert!(off <= 3e-7, "{stored:?} {shape:?}: off by {off}");
        }
    }
}

#[test]
fn experts_take_their_own_rows_on_a_gpu() {
    device();
    let Some(gpu) = gpu_or_skip() else { return };
    let (experts, input, out, rank) = (4, 65, 50, 3);
    let offsets: Arc<[usize]> = Arc::from([0, 9, 9, 10, 43]);
    let weight = random::<3>([experts, out, input]).cast(FloatDType::BF16);
    let on_gpu = weight.clone().to_device(&gpu);
    let dense = in_f32(weight);
    let factors = |x: &[Tensor<2>]| {
        (
            x[1].clone().reshape([experts, rank, input]),
            x[2].clone().reshape([experts, out, rank]),
        )
    };
    compare_on(
        &gpu,
        "expert_lora_linear",
        &[
            random([43, input]),
            random([experts * rank, input]),
            random([experts * out, rank]),
        ],
        |x| {
            let rows = Arc::clone(&offsets);
            expert_lora_linear(x[0].clone(), on_gpu.clone(), factors(x), 0.7, rows)
        },
        |x| {
            let low = expert_linear::reference(x[0].clone(), factors(x).0, &offsets);
            let delta = expert_linear::reference(low, factors(x).1, &offsets);
            let base = expert_linear::reference(x[0].clone(), dense.clone(), &offsets);
            base + delta * 0.7
        },
    );
}

#[test]
fn no_rows_give_no_rows_on_a_gpu() {
    device();
    let Some(gpu) = gpu_or_skip() else { return };
    let (weight, _) = weight([5, 70], Stored::Quantised(Scheme::Int8), &gpu);
    let x: Tensor<2> = Tensor::empty([0, 70], &gpu);
    assert_eq!(linear(x, weight).dims(), [0, 5]);
}

#[test]
fn cross_entropy_on_a_gpu() {
    device();
    let Some(gpu) = gpu_or_skip() else { return };
    let shaped = LogitShape {
        scale: 0.7,
        soft_cap: Some(1.5),
    };
    for (n, d, v) in [(1, 2, 3), (9, 16, 50), (70, 24, 301)] {
        let label = |i: i32| match i % 4 {
            1 => -100,
            _ => (i * 37) % v as i32,
        };
        let targets: Arc<[i32]> = (0..n as i32).map(label).collect();
        let parts = [
            random([n, d]),
            random([v, d]),
            random([n, 3]),
            random([v, 3]),
            random([1, v]),
        ];
        for (count, shape) in [(2, PLAIN), (5, shaped)] {
            compare_on(
                &gpu,
                &format!("cross entropy {n}x{d}x{v} of {count} parts"),
                &parts[..count],
                |x| {
                    let targets = targets.clone();
                    linear_cross_entropy(x[0].clone(), head(x, shape), targets).reshape([1, 1])
                },
                |x| {
                    cross_entropy::reference(x[0].clone(), head(x, shape), &targets).reshape([1, 1])
                },
            );
        }
    }
}

#[test]
fn cross_entropy_on_a_gpu_without_labels_is_zero() {
    device();
    let Some(gpu) = gpu_or_skip() else { return };
    let targets: Arc<[i32]> = Arc::from([-100, -100]);
    let hidden = random([2, 4]).to_device(&gpu).autodiff().require_grad();
    let weight = random([5, 4]).to_device(&gpu);
    let parts = [hidden.clone(), weight];
    let loss = linear_cross_entropy(hidden.clone(), head(&parts, PLAIN), targets);
    let mut grads = loss.backward();
    assert_eq!(loss.into_scalar::<f32>(), 0.0);
    let grad = hidden.grad_remove(&mut grads).expect("a gradient");
    assert_eq!(grad.abs().max().into_scalar::<f32>(), 0.0);
}
