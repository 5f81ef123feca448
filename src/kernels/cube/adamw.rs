//! [`adamw`](fn@crate::kernels::adamw) on GPUs: one unit for each element, or for four of them.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{UNITS, contiguous, empty, unit_for_each, vector_size};
use crate::kernels::adamw::AdamwStep;

#[cube(launch_unchecked, create_dummy_kernel)]
fn step_kernel<N: Size>(
    weight: &[Vector<f32, N>],
    grad: &[Vector<f32, N>],
    first: &mut [Vector<f32, N>],
    second: &mut [Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    count: usize,
    keep1: f32,
    keep2: f32,
    share1: f32,
    share2: f32,
    before: f32,
    divisor: f32,
    eps: f32,
    rate: f32,
    after: f32,
) {
    let i = ABSOLUTE_POS;
    if i < count {
        let g = grad[i];
        let m = first[i] * Vector::<f32, N>::new(keep1) + g * Vector::<f32, N>::new(share1);
        let v = second[i] * Vector::<f32, N>::new(keep2) + g * g * Vector::<f32, N>::new(share2);
        let scale = v.sqrt() / Vector::<f32, N>::new(divisor) + Vector::<f32, N>::new(eps);
        let moved =
            weight[i] * Vector::<f32, N>::new(before) - m / scale * Vector::<f32, N>::new(rate);
        first[i] = m;
        second[i] = v;
        out[i] = moved * Vector::<f32, N>::new(after);
    }
}

pub(super) fn forward(
    inputs: [CubeTensor; 4],
    step: AdamwStep,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [weight, grad, first, second] = inputs.map(contiguous);
    let (first, second) = (own(first), own(second));
    let length = weight.meta.num_elements();
    // The model still holds the weight, which would have to be copied to be written in place.
    let out = empty(&weight, [length]);
    let client = out.client.clone();
    let size = vector_size(length);
    let count = length / size;
    // SAFETY: all of them hold `length` elements, and `count` vectors of `size` are as many.
    unsafe {
        step_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            size,
            weight.into_buffer_arg(),
            grad.into_buffer_arg(),
            first.clone().into_buffer_arg(),
            second.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count,
            step.keep[0],
            step.keep[1],
            step.share[0],
            step.share[1],
            step.before,
            step.divisor,
            step.eps,
            step.rate,
            step.after,
        );
    }
    (out, first, second)
}

/// A tensor that nobody else reads.
fn own(x: CubeTensor) -> CubeTensor {
    if x.can_mut() { x } else { x.copy() }
}

/// Of vectors of four.
#[cfg(feature = "lowering")]
pub(super) fn samples(to: &super::lowering::Target) -> Vec<super::lowering::Sample> {
    let count = 1024 * 16;
    let vector = || (to.buffer)(4 * count);
    let kernel = step_kernel::create_dummy_kernel(
        to.properties.clone(),
        to.target.clone(),
        unit_for_each(count),
        CubeDim::new_1d(UNITS),
        4,
        vector(),
        vector(),
        vector(),
        vector(),
        vector(),
        count,
        0.9,
        0.999,
        0.1,
        0.001,
        1.0,
        0.1,
        1e-8,
        1e-3,
        1.0,
    );
    vec![super::lowering::Sample::plain("adamw", kernel)]
}
