//! [`clamped_gate`](fn@crate::kernels::clamped_gate) on GPUs: one unit a pair.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{UNITS, contiguous, dims, empty, unit_for_each};
use crate::kernels::clamped_gate::ClampedGate;

/// `sigmoid(x)`
#[cube]
fn sigmoid(x: f32) -> f32 {
    // Limited, since not every shading language promises what comes of an infinity.
    1.0f32 / (1.0f32 + (-x).min(88.0f32).exp())
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn forward_kernel(pairs: &[f32], y: &mut [f32], count: usize, alpha: f32, limit: f32) {
    let i = ABSOLUTE_POS;
    if i < count {
        let gate = pairs[2 * i].min(limit);
        let up = pairs[2 * i + 1].min(limit).max(-limit) + 1.0f32;
        y[i] = up * gate * sigmoid(alpha * gate);
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn backward_kernel(
    pairs: &[f32],
    grad: &[f32],
    out: &mut [f32],
    count: usize,
    alpha: f32,
    limit: f32,
) {
    let i = ABSOLUTE_POS;
    if i < count {
        let raw_gate = pairs[2 * i];
        let raw_up = pairs[2 * i + 1];
        let gate = raw_gate.min(limit);
        let up = raw_up.min(limit).max(-limit) + 1.0f32;
        let s = sigmoid(alpha * gate);
        let by_gate = up * s * (1.0f32 + alpha * gate * (1.0f32 - s));
        let by_up = gate * s;
        let dy = grad[i];
        out[2 * i] = select(raw_gate > limit, 0.0f32, dy * by_gate);
        out[2 * i + 1] = select(raw_up.abs() > limit, 0.0f32, dy * by_up);
    }
}

pub(super) fn forward(pairs: CubeTensor, by: ClampedGate) -> CubeTensor {
    let [n, width] = dims(&pairs);
    let pairs = contiguous(pairs);
    let count = n * width / 2;
    let y = empty(&pairs, [n, width / 2]);
    let client = y.client.clone();
    // SAFETY: y holds `count` elements, `pairs` twice as many.
    unsafe {
        forward_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            pairs.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            count,
            by.alpha,
            by.limit,
        );
    }
    y
}

pub(super) fn backward(pairs: CubeTensor, grad: CubeTensor, by: ClampedGate) -> CubeTensor {
    let [n, width] = dims(&pairs);
    let (pairs, grad) = (contiguous(pairs), contiguous(grad));
    let count = n * width / 2;
    let out = empty(&pairs, [n, width]);
    let client = out.client.clone();
    // SAFETY: grad holds `count` elements, `pairs` and `out` twice as many.
    unsafe {
        backward_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            pairs.into_buffer_arg(),
            grad.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count,
            by.alpha,
            by.limit,
        );
    }
    out
}

#[cfg(feature = "lowering")]
pub(super) fn samples(to: &super::lowering::Target) -> Vec<super::lowering::Sample> {
    use super::lowering::Sample;
    let count = 1024 * 2048;
    let (single, double) = (|| (to.buffer)(count), || (to.buffer)(2 * count));
    let (properties, target) = (|| to.properties.clone(), || to.target.clone());
    let (grid, units) = (unit_for_each(count), CubeDim::new_1d(UNITS));
    let forward = forward_kernel::create_dummy_kernel(
        properties(),
        target(),
        grid.clone(),
        units,
        double(),
        single(),
        count,
        1.702,
        7.0,
    );
    let backward = backward_kernel::create_dummy_kernel(
        properties(),
        target(),
        grid,
        units,
        double(),
        single(),
        double(),
        count,
        1.702,
        7.0,
    );
    vec![
        Sample::plain("clamped_gate", forward),
        Sample::plain("clamped_gate_backward", backward),
    ]
}
