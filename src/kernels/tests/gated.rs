//! Every activation, alone and as the gate of a feed-forward layer.

use burn::tensor::{Device, Tensor};

#[cfg(feature = "gpu")]
use super::gpu::{compare_on, gpu_or_skip};
use super::{compare, device, random};
use crate::device::to_vec;
use crate::kernels::{Activation, ClampedGate, activate, activation, clamped_gate, gated};

const ALL: [Activation; 5] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Relu2,
];

/// Limits that some of the random values exceed, on either side.
const CLAMPED: ClampedGate = ClampedGate {
    alpha: 1.702,
    limit: 0.7,
};

#[test]
fn the_clamped_gate_equals_its_reference() {
    device();
    for (n, f) in [(1, 1), (7, 33), (150, 129)] {
        compare(
            &format!("clamped gate {n}x{f}"),
            &[random([n, 2 * f])],
            |x| clamped_gate(x[0].clone(), CLAMPED),
            |x| clamped_gate::reference(x[0].clone(), CLAMPED),
        );
    }
}

#[test]
fn gates_equal_their_references() {
    device();
    for by in ALL {
        for (n, f) in [(1, 1), (7, 33), (150, 129)] {
            compare(
                &format!("{by:?} {n}x{f}"),
                &[random([n, f]) * 4.0, random([n, f])],
                |x| gated(x[0].clone(), x[1].clone(), by),
                |x| gated::reference(x[0].clone(), x[1].clone(), by),
            );
            compare(
                &format!("{by:?} alone, {n}x{f}"),
                &[random([n, f]) * 4.0],
                |x| activate(x[0].clone(), by),
                |x| activation::reference(x[0].clone(), by),
            );
        }
    }
}

/// A gate far from 0 is closed or open, and steep nowhere.
#[test]
fn gates_saturate() {
    device();
    let gate = [-1e4f32, -200.0, -20.0, 20.0, 200.0, 1e4];
    for by in ALL {
        let tensor = |values: [f32; 6]| Tensor::<1>::from_floats(values, &Device::flex());
        let x = tensor(gate).reshape([1, 6]).autodiff().require_grad();
        let y = gated(x.clone(), x.ones_like(), by);
        let mut grads = y.clone().sum().backward();
        let slopes = to_vec(x.grad_remove(&mut grads).expect("a gradient").reshape([6]));
        let values = to_vec(y.inner().reshape([6]));
        for ((x, y), slope) in gate.into_iter().zip(values).zip(slopes) {
            let (want, want_slope) = match by {
                _ if x < 0.0 => (0.0, 0.0),
                Activation::Relu2 => (x * x, 2.0 * x),
                _ => (x, 1.0),
            };
            assert!((y - want).abs() <= 1e-6 * want + 1e-7, "{by:?} of {x}: {y}");
            let off = (slope - want_slope).abs();
            assert!(off <= 1e-6 * want_slope + 1e-7, "{by:?}' of {x}: {slope}");
        }
    }
}

/// Sizes that divide into vectors of four and one that does not.
#[cfg(feature = "gpu")]
#[test]
fn gates_on_a_gpu() {
    let Some(gpu) = gpu_or_skip() else { return };
    for by in ALL {
        for (n, f) in [(1, 1), (7, 33), (150, 132)] {
            compare_on(
                &gpu,
                &format!("{by:?} {n}x{f}"),
                &[random([n, f]) * 4.0, random([n, f])],
                |x| gated(x[0].clone(), x[1].clone(), by),
                |x| gated::reference(x[0].clone(), x[1].clone(), by),
            );
        }
    }
    compare_on(
        &gpu,
        "clamped gate",
        &[random([37, 66])],
        |x| clamped_gate(x[0].clone(), CLAMPED),
        |x| clamped_gate::reference(x[0].clone(), CLAMPED),
    );
    // The other kernels share the arithmetic.
    compare_on(
        &gpu,
        "relu2 alone",
        &[random([40, 13])],
        |x| activate(x[0].clone(), Activation::Relu2),
        |x| activation::reference(x[0].clone(), Activation::Relu2),
    );
}
