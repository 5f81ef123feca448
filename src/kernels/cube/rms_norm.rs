//! [`rms_norm`](fn@crate::kernels::rms_norm) on GPUs: one cube a row; the gradient of the weight sums
//! over runs of rows, and then over the runs.

use burn::backend::ops::FloatTensorOps;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{UNITS, contiguous, cube_sum, cubes, dims, empty};

/// Rows that one unit adds up for its column of the weight's gradient.
const RUN: usize = 64;

/// `1 / sqrt(mean(x²) + ε)` of the row that starts at `start`, for each unit of the cube.
#[cube]
fn inverse_rms(
    x: &[f32],
    start: usize,
    d: usize,
    eps: f32,
    memory: &mut Shared<[f32]>,
    #[comptime] units: u32,
) -> f32 {
    let mut squares = 0.0f32;
    let mut i = UNIT_POS_X as usize;
    while i < d {
        let value = x[start + i];
        squares += value * value;
        i += comptime!(units as usize);
    }
    let mean = cube_sum(squares, memory, units) / f32::cast_from(d);
    1.0f32 / (mean + eps).sqrt()
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn forward_kernel(
    x: &[f32],
    weight: &[f32],
    y: &mut [f32],
    n: usize,
    d: usize,
    eps: f32,
    #[comptime] units: u32,
) {
    let mut memory = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let row = CUBE_POS;
    if row < n {
        let start = row * d;
        let scale = inverse_rms(x, start, d, eps, &mut memory, units);
        let mut i = UNIT_POS_X as usize;
        while i < d {
            y[start + i] = x[start + i] * scale * weight[i];
            i += comptime!(units as usize);
        }
    }
}

pub(super) fn forward(x: CubeTensor, weight: CubeTensor, eps: f32) -> CubeTensor {
    let [n, d] = dims(&x);
    let (x, weight) = (contiguous(x), contiguous(weight));
    let y = empty(&x, [n, d]);
    let client = y.client.clone();
    // SAFETY: rows end at n and columns at d, the sizes of x, y and weight.
    unsafe {
        forward_kernel::launch_unchecked(
            &client,
            cubes(n),
            CubeDim::new_1d(UNITS),
            x.into_buffer_arg(),
            weight.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            n,
            d,
            eps,
            UNITS,
        );
    }
    y
}

/// `dx = r (g w - x r² mean(g w x))`, and r for each row.
#[cube(launch_unchecked, create_dummy_kernel)]
fn backward_kernel(
    x: &[f32],
    weight: &[f32],
    grad: &[f32],
    dx: &mut [f32],
    inverse: &mut [f32],
    n: usize,
    d: usize,
    eps: f32,
    #[comptime] units: u32,
) {
    let mut memory = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let row = CUBE_POS;
    if row < n {
        let start = row * d;
        let scale = inverse_rms(x, start, d, eps, &mut memory, units);
        let mut dot = 0.0f32;
        let mut i = UNIT_POS_X as usize;
        while i < d {
            dot += grad[start + i] * weight[i] * x[start + i];
            i += comptime!(units as usize);
        }
        let dot = cube_sum(dot, &mut memory, units);
        let shift = dot / f32::cast_from(d) * scale * scale;
        let mut i = UNIT_POS_X as usize;
        while i < d {
            let at = start + i;
            dx[at] = (grad[at] * weight[i] - x[at] * shift) * scale;
            i += comptime!(units as usize);
        }
        if UNIT_POS_X == 0 {
            inverse[row] = scale;
        }
    }
}

/// `Σ g x r` over each run of rows, for each column.
#[cube(launch_unchecked, create_dummy_kernel)]
fn weight_kernel(
    x: &[f32],
    grad: &[f32],
    inverse: &[f32],
    sums: &mut [f32],
    n: usize,
    d: usize,
    run: usize,
) {
    let (column, part) = (ABSOLUTE_POS_X as usize, CUBE_POS_Y as usize);
    if column < d {
        let end = min((part + 1) * run, n);
        let mut sum = 0.0f32;
        let mut row = part * run;
        while row < end {
            let at = row * d + column;
            sum += grad[at] * x[at] * inverse[row];
            row += 1;
        }
        sums[part * d + column] = sum;
    }
}

pub(super) fn backward(
    x: CubeTensor,
    weight: CubeTensor,
    grad: CubeTensor,
    eps: f32,
    wants_weight: bool,
) -> (CubeTensor, Option<CubeTensor>) {
    let [n, d] = dims(&x);
    let [x, weight, grad] = [x, weight, grad].map(contiguous);
    let (dx, inverse) = (empty(&x, [n, d]), empty(&x, [n]));
    let client = dx.client.clone();
    // SAFETY: as in `forward`; grad and dx are of x's size, and there is an inverse for each row.
    unsafe {
        backward_kernel::launch_unchecked(
            &client,
            cubes(n),
            CubeDim::new_1d(UNITS),
            x.clone().into_buffer_arg(),
            weight.into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            dx.clone().into_buffer_arg(),
            inverse.clone().into_buffer_arg(),
            n,
            d,
            eps,
            UNITS,
        );
    }
    let dw = wants_weight.then(|| weight_gradient(x, grad, inverse));
    (dx, dw)
}

fn weight_gradient(x: CubeTensor, grad: CubeTensor, inverse: CubeTensor) -> CubeTensor {
    let [n, d] = dims(&x);
    // No more runs than a cube count may have.
    let run = RUN.max(n.div_ceil(super::MOST_CUBES as usize));
    let parts = n.div_ceil(run);
    let sums = empty(&x, [parts, d]);
    let client = sums.client.clone();
    let columns = (d as u32).div_ceil(UNITS);
    // SAFETY: columns end at d and rows at n; there is a row of sums for each run.
    unsafe {
        weight_kernel::launch_unchecked(
            &client,
            CubeCount::Static(columns, parts as u32, 1),
            CubeDim::new_1d(UNITS),
            x.into_buffer_arg(),
            grad.into_buffer_arg(),
            inverse.into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            n,
            d,
            run,
        );
    }
    let sums = CubeBackend::float_sum_dim(sums, 0);
    CubeBackend::float_reshape(sums, [d].into())
}

/// For rows of 2048.
#[cfg(feature = "lowering")]
pub(super) fn samples(to: &super::lowering::Target) -> Vec<super::lowering::Sample> {
    use super::lowering::Sample;
    let (n, d) = (1024, 2048);
    let matrix = || (to.buffer)(n * d);
    let vector = || (to.buffer)(n.max(d));
    let (properties, target) = (|| to.properties.clone(), || to.target.clone());
    let rows = CubeDim::new_1d(UNITS);
    vec![
        Sample::plain(
            "rms_norm_forward",
            forward_kernel::create_dummy_kernel(
                properties(),
                target(),
                cubes(n),
                rows,
                matrix(),
                vector(),
                matrix(),
                n,
                d,
                1e-6,
                UNITS,
            ),
        ),
        Sample::plain(
            "rms_norm_backward",
            backward_kernel::create_dummy_kernel(
                properties(),
                target(),
                cubes(n),
                rows,
                matrix(),
                vector(),
                matrix(),
                matrix(),
                vector(),
                n,
                d,
                1e-6,
                UNITS,
            ),
        ),
        Sample::plain(
            "rms_norm_weight",
            weight_kernel::create_dummy_kernel(
                properties(),
                target(),
                cubes(n),
                rows,
                matrix(),
                matrix(),
                vector(),
                matrix(),
                n,
                d,
                RUN,
            ),
        ),
    ]
}
