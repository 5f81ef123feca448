//! Every fused kernel against its reference: forward and all gradients, over odd shapes.

use std::sync::Arc;

use burn::tensor::{Device, Distribution, Tensor};

use super::*;
use crate::quant::QuantMatrix;

mod adamw;
pub(in crate::kernels) mod attention;
mod dropout;
mod frozen;
mod gated;
#[cfg(feature = "gpu")]
mod gpu;
#[cfg(feature = "gpu")]
mod gpu_attention;
#[cfg(feature = "gpu")]
mod gpu_linear;
mod quantised;
mod rope;

/// f32 on products of up to 200 terms; the references round in another order.
const TOLERANCE: f32 = 2e-5;

pub(in crate::kernels) fn device() -> Device {
    let device = Device::flex();
    device.seed(7);
    device
}

pub(in crate::kernels) fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

pub(in crate::kernels) fn assert_close<const D: usize>(
    name: &str,
    got: Tensor<D>,
    want: Tensor<D>,
) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let scale = want.clone().abs().max().into_scalar::<f32>().max(1.0);
    let worst = (got - want).abs().max().into_scalar::<f32>();
    assert!(
        worst <= TOLERANCE * scale,
        "{name}: off by {worst} (scale {scale})"
    );
}

/// Compares output and gradients of two functions of the same inputs, under a random upstream.
pub(in crate::kernels) fn compare(
    name: &str,
    inputs: &[Tensor<2>],
    fused: impl Fn(&[Tensor<2>]) -> Tensor<2>,
    reference: impl Fn(&[Tensor<2>]) -> Tensor<2>,
) {
    let plain = fused(inputs);
    let upstream: Tensor<2> = random(plain.dims());
    let run = |f: &dyn Fn(&[Tensor<2>]) -> Tensor<2>| {
        let leaves: Vec<Tensor<2>> = inputs
            .iter()
            .map(|x| x.clone().autodiff().require_grad())
            .collect();
        let out = f(&leaves);
        let mut grads = (out.clone() * upstream.clone()).sum().backward();
        let grads: Vec<Tensor<2>> = leaves
            .iter()
            .map(|leaf| leaf.grad_remove(&mut grads).expect("a gradient"))
            .collect();
        (out.inner(), grads)
    };
    let (got, got_grads) = run(&fused);
    let (want, want_grads) = run(&reference);
    assert_close(&format!("{name} untracked"), plain, want.clone());
    assert_close(name, got, want);
    for (i, (got, want)) in got_grads.into_iter().zip(want_grads).enumerate() {
        assert_close(&format!("{name}, gradient {i}"), got, want);
    }
}

#[test]
fn rms_norm_equals_its_reference() {
    device();
    for (n, d) in [(1, 1), (3, 17), (40, 64), (257, 33)] {
        compare(
            &format!("rms_norm {n}x{d}"),
            &[random([n, d]), random([1, d])],
            |x| rms_norm(x[0].clone(), x[1].clone().reshape([d]), 1e-5),
            |x| rms_norm::reference(x[0].clone(), x[1].clone().reshape([d]), 1e-5),
        );
    }
}

#[test]
fn lora_linear_equals_its_reference() {
    device();
    for (n, input, out, rank) in [(1, 3, 2, 1), (37, 64, 50, 8), (130, 48, 96, 5)] {
        let weight: Tensor<2> = random([out, input]);
        compare(
            &format!("lora_linear {n}x{input}x{out} rank {rank}"),
            &[
                random([n, input]),
                random([rank, input]),
                random([out, rank]),
            ],
            |x| {
                lora_linear(
                    x[0].clone(),
                    weight.clone(),
                    x[1].clone(),
                    x[2].clone(),
                    0.7,
                )
            },
            |x| {
                let adapter = (x[1].clone(), x[2].clone());
                lora_linear::reference(x[0].clone(), x[0].clone(), weight.clone(), adapter, 0.7)
            },
        );
    }
}

const PLAIN: LogitShape = LogitShape {
    scale: 1.0,
    soft_cap: None,
};

/// A head of weight, delta and bias, as many as there are.
fn head(x: &[Tensor<2>], shape: LogitShape) -> Head {
    Head {
        weight: x[1].clone(),
        delta: x.get(3).map(|up| (x[2].clone(), up.clone())),
        bias: x.get(4).map(|bias| bias.clone().squeeze_dim(0)),
        shape,
    }
}

#[test]
fn cross_entropy_equals_its_reference() {
    device();
    let shaped = LogitShape {
        scale: 0.7,
        soft_cap: Some(1.5),
    };
    for (n, d, v) in [(1, 2, 3), (9, 16, 50), (70, 24, 301)] {
        let targets: Arc<[i32]> = (0..n as i32)
            .map(|i| {
                if i % 4 == 1 {
                    -100
                } else {
                    (i * 37) % v as i32
                }
            })
            .collect();
        let parts = [
            random([n, d]),
            random([v, d]),
            random([n, 3]),
            random([v, 3]),
            random([1, v]),
        ];
        for (count, shape) in [(2, PLAIN), (4, PLAIN), (5, PLAIN), (2, shaped), (5, shaped)] {
            compare(
                &format!("cross entropy {n}x{d}x{v} of {count} parts, {shape:?}"),
                &parts[..count],
                |x| {
                    linear_cross_entropy(x[0].clone(), head(x, shape), targets.clone())
                        .reshape([1, 1])
                },
                |x| {
                    cross_entropy::reference(x[0].clone(), head(x, shape), &targets).reshape([1, 1])
                },
            );
        }
    }
}

#[test]
fn cross_entropy_without_labels_is_zero() {
    let targets: Arc<[i32]> = Arc::from([-100, -100]);
    let hidden = random([2, 4]).autodiff().require_grad();
    let loss = linear_cross_entropy(
        hidden.clone(),
        head(&[hidden.clone(), random([5, 4])], PLAIN),
        targets,
    );
    let mut grads = loss.backward();
    assert_eq!(loss.into_scalar::<f32>(), 0.0);
    let grad = hidden.grad_remove(&mut grads).expect("a gradient");
    assert_eq!(grad.abs().max().into_scalar::<f32>(), 0.0);
}
