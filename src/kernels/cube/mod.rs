//! The GPU's kernels, written once in CubeCL for CUDA, Vulkan, Metal and WebGPU: one file a kernel,
//! with what launches it.
//!
//! Each takes contiguous f32 buffers, sums in f32, and writes each result from one place in one order,
//! so that a run repeats bit for bit on a device. Kernels are launched unchecked: what keeps an index
//! inside its buffer stands in the kernel.

#![allow(
    clippy::needless_range_loop,
    reason = "kernels count, for want of iterators"
)]

mod activation;
mod adamw;
mod attention;
mod backend;
mod clamped_gate;
mod cross_entropy;
mod dropout;
mod linear;
#[cfg(feature = "lowering")]
mod linear_samples;
#[cfg(feature = "lowering")]
pub mod lowering;
mod packed;
mod product;
mod rms_norm;
mod rope;
mod tensor_cores;
mod tiles;
mod unpack;

use burn::backend::{DType, TensorMetadata};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::{empty_device_contiguous_dtype, zeros_client};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

pub use packed::Packed;

/// Units that work on one row together.
const UNITS: u32 = 128;

/// The most cubes along one axis, by WebGPU's limits; CUDA has the same for all axes but the first.
const MOST_CUBES: u32 = 65_535;

/// One cube for each of `count` items; `CUBE_POS` counts them, and may run past the last.
fn cubes(count: usize) -> CubeCount {
    let count = count as u32;
    let wide = count.clamp(1, MOST_CUBES);
    CubeCount::Static(wide, count.div_ceil(wide).max(1), 1)
}

/// Cubes of [`UNITS`] with a unit for each of `count` items; `ABSOLUTE_POS` counts them, and may run past
/// the last.
fn unit_for_each(count: usize) -> CubeCount {
    cubes(count.div_ceil(UNITS as usize))
}

/// How many of `elements` a unit takes at once, 16 bytes at most: as many as divide them.
fn vector_size(elements: usize) -> usize {
    if elements.is_multiple_of(4) { 4 } else { 1 }
}

/// A tensor without gaps, for kernels that index its buffer.
fn contiguous(x: CubeTensor) -> CubeTensor {
    into_contiguous(x)
}

/// Memory for a result beside `like`, in f32, not filled.
fn empty<const D: usize>(like: &CubeTensor, shape: [usize; D]) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, shape.into(), DType::F32)
}

/// Likewise, zeros.
fn zeros<const D: usize>(like: &CubeTensor, shape: [usize; D]) -> CubeTensor {
    zeros_client(
        like.client.clone(),
        like.device.clone(),
        shape.into(),
        DType::F32,
    )
}

/// Rows and columns.
fn dims(x: &CubeTensor) -> [usize; 2] {
    x.shape().dims()
}

/// The sum over the units of a cube, for each of them; `memory` has a place for each.
#[cube]
fn cube_sum(value: f32, memory: &mut Shared<[f32]>, #[comptime] units: u32) -> f32 {
    let unit = UNIT_POS_X as usize;
    memory[unit] = value;
    sync_cube();
    let mut half = comptime!((units / 2) as usize).runtime();
    while half > 0 {
        if unit < half {
            let other = memory[unit + half];
            memory[unit] += other;
        }
        sync_cube();
        half /= 2;
    }
    let sum = memory[0];
    // Nobody may overwrite it before all have read it.
    sync_cube();
    sum
}
