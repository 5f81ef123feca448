//! Activations and gates on GPUs ([`activate`](crate::kernels::activate),
//! [`gated`](fn@crate::kernels::gated)): one unit for each element, or for four of them.

use std::f32::consts::FRAC_1_SQRT_2;

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{UNITS, contiguous, dims, empty, unit_for_each, vector_size};
use crate::kernels::activation::{Activation, CUBE, ROOT};

/// An activation's value and slope.
#[cube]
fn curve<N: Size>(
    x: Vector<f32, N>,
    #[comptime] by: Activation,
) -> (Vector<f32, N>, Vector<f32, N>) {
    let zero = Vector::<f32, N>::new(0.0f32);
    let half = Vector::<f32, N>::new(0.5f32);
    let one = Vector::<f32, N>::new(1.0f32);
    match comptime!(by) {
        Activation::Silu => {
            // Limited, since not every shading language promises what comes of an infinity.
            let e = (-x).min(Vector::<f32, N>::new(88.0f32)).exp();
            let s = one / (one + e);
            (x * s, s * (one + x * (one - s)))
        }
        Activation::Gelu => {
            let below = half + half * (x * Vector::<f32, N>::new(FRAC_1_SQRT_2)).erf();
            let density = (-(half * x * x)).exp() * half * Vector::<f32, N>::new(ROOT);
            (x * below, below + x * density)
        }
        Activation::GeluTanh => {
            let root = Vector::<f32, N>::new(ROOT);
            let inner = root * (x + Vector::<f32, N>::new(CUBE) * x * x * x);
            // Beyond 15 it is 1 in f32; some drivers make not-a-number of large arguments.
            let limit = Vector::<f32, N>::new(15.0f32);
            let t = inner.min(limit).max(-limit).tanh();
            let below = half + half * t;
            let speed = root * (one + Vector::<f32, N>::new(3.0f32 * CUBE) * x * x);
            (x * below, below + x * half * (one - t * t) * speed)
        }
        Activation::Relu => {
            let off = x.less_equal(&zero);
            (select_many(off, zero, x), select_many(off, zero, one))
        }
        Activation::Relu2 => {
            let y = select_many(x.less_equal(&zero), zero, x);
            (y * y, y + y)
        }
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn activate_kernel<N: Size>(
    x: &[Vector<f32, N>],
    y: &mut [Vector<f32, N>],
    count: usize,
    #[comptime] by: Activation,
) {
    let i = ABSOLUTE_POS;
    if i < count {
        let (value, _slope) = curve::<N>(x[i], by);
        y[i] = value;
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn activate_backward_kernel<N: Size>(
    x: &[Vector<f32, N>],
    grad: &[Vector<f32, N>],
    dx: &mut [Vector<f32, N>],
    count: usize,
    #[comptime] by: Activation,
) {
    let i = ABSOLUTE_POS;
    if i < count {
        let (_value, slope) = curve::<N>(x[i], by);
        dx[i] = grad[i] * slope;
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn gate_kernel<N: Size>(
    gate: &[Vector<f32, N>],
    up: &[Vector<f32, N>],
    y: &mut [Vector<f32, N>],
    count: usize,
    #[comptime] by: Activation,
) {
    let i = ABSOLUTE_POS;
    if i < count {
        let (value, _slope) = curve::<N>(gate[i], by);
        y[i] = value * up[i];
    }
}

/// Gradients of gate and up: `g · up · act'(gate)` and `g · act(gate)`.
#[cube(launch_unchecked, create_dummy_kernel)]
fn gate_backward_kernel<N: Size>(
    gate: &[Vector<f32, N>],
    up: &[Vector<f32, N>],
    grad: &[Vector<f32, N>],
    d_gate: &mut [Vector<f32, N>],
    d_up: &mut [Vector<f32, N>],
    count: usize,
    #[comptime] by: Activation,
) {
    let i = ABSOLUTE_POS;
    if i < count {
        let (value, slope) = curve::<N>(gate[i], by);
        d_gate[i] = grad[i] * up[i] * slope;
        d_up[i] = grad[i] * value;
    }
}

pub(super) fn activate(x: CubeTensor, by: Activation) -> CubeTensor {
    let [n, f] = dims(&x);
    let x = contiguous(x);
    let y = empty(&x, [n, f]);
    let client = y.client.clone();
    let size = vector_size(n * f);
    let count = n * f / size;
    // SAFETY: both hold n · f elements, and `count` vectors of `size` are as many.
    unsafe {
        activate_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            size,
            x.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            count,
            by,
        );
    }
    y
}

pub(super) fn activate_backward(x: CubeTensor, grad: CubeTensor, by: Activation) -> CubeTensor {
    let [n, f] = dims(&x);
    let (x, grad) = (contiguous(x), contiguous(grad));
    let dx = empty(&x, [n, f]);
    let client = dx.client.clone();
    let size = vector_size(n * f);
    let count = n * f / size;
    // SAFETY: as in `activate`.
    unsafe {
        activate_backward_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            size,
            x.into_buffer_arg(),
            grad.into_buffer_arg(),
            dx.clone().into_buffer_arg(),
            count,
            by,
        );
    }
    dx
}

pub(super) fn gate(gate: CubeTensor, up: CubeTensor, by: Activation) -> CubeTensor {
    let [n, f] = dims(&gate);
    let (gate, up) = (contiguous(gate), contiguous(up));
    let y = empty(&gate, [n, f]);
    let client = y.client.clone();
    let size = vector_size(n * f);
    let count = n * f / size;
    // SAFETY: all three hold n · f elements, and `count` vectors of `size` are as many.
    unsafe {
        gate_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            size,
            gate.into_buffer_arg(),
            up.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            count,
            by,
        );
    }
    y
}

pub(super) fn gate_backward(
    gate: CubeTensor,
    up: CubeTensor,
    grad: CubeTensor,
    by: Activation,
) -> (CubeTensor, CubeTensor) {
    let [n, f] = dims(&gate);
    let [gate, up, grad] = [gate, up, grad].map(contiguous);
    let (d_gate, d_up) = (empty(&gate, [n, f]), empty(&gate, [n, f]));
    let client = d_gate.client.clone();
    let size = vector_size(n * f);
    let count = n * f / size;
    // SAFETY: as in `gate`.
    unsafe {
        gate_backward_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            size,
            gate.into_buffer_arg(),
            up.into_buffer_arg(),
            grad.into_buffer_arg(),
            d_gate.clone().into_buffer_arg(),
            d_up.clone().into_buffer_arg(),
            count,
            by,
        );
    }
    (d_gate, d_up)
}

/// Of vectors of four.
#[cfg(feature = "lowering")]
pub(super) fn samples(to: &super::lowering::Target) -> Vec<super::lowering::Sample> {
    use super::lowering::Sample;
    let count = 1024 * 2048;
    let matrix = || (to.buffer)(4 * count);
    let (properties, target) = (|| to.properties.clone(), || to.target.clone());
    let (grid, units) = (unit_for_each(count), CubeDim::new_1d(UNITS));
    let mut samples = Vec::new();
    for by in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        let kernel = gate_kernel::create_dummy_kernel(
            properties(),
            target(),
            grid.clone(),
            units,
            4,
            matrix(),
            matrix(),
            matrix(),
            count,
            by,
        );
        samples.push(Sample::plain(&format!("gate_{by:?}"), kernel));
        let kernel = gate_backward_kernel::create_dummy_kernel(
            properties(),
            target(),
            grid.clone(),
            units,
            4,
            matrix(),
            matrix(),
            matrix(),
            matrix(),
            matrix(),
            count,
            by,
        );
        samples.push(Sample::plain(&format!("gate_backward_{by:?}"), kernel));
    }
    samples.extend(alone_samples(to));
    samples
}

#[cfg(feature = "lowering")]
fn alone_samples(to: &super::lowering::Target) -> [super::lowering::Sample; 2] {
    use super::lowering::Sample;
    let count = 1024 * 2048;
    let matrix = || (to.buffer)(4 * count);
    let (properties, target) = (|| to.properties.clone(), || to.target.clone());
    let (grid, units) = (unit_for_each(count), CubeDim::new_1d(UNITS));
    let by = Activation::Relu2;
    let kernel = activate_kernel::create_dummy_kernel(
        properties(),
        target(),
        grid.clone(),
        units,
        4,
        matrix(),
        matrix(),
        count,
        by,
    );
    let forward = Sample::plain("activate_Relu2", kernel);
    let kernel = activate_backward_kernel::create_dummy_kernel(
        properties(),
        target(),
        grid,
        units,
        4,
        matrix(),
        matrix(),
        matrix(),
        count,
        by,
    );
    [forward, Sample::plain("activate_backward_Relu2", kernel)]
}
