//! The kernels for heads of 64, 128 and 256 with all options, with tensor cores and without.

use cubecl::prelude::*;

use super::{BF16, F32, backward, forward, fragment, tile::Tile};
use crate::kernels::attention::Heads;
use crate::kernels::cube::UNITS;
use crate::kernels::cube::lowering::{Sample, Target};

/// For 4096 rows.
pub(in crate::kernels::cube) fn samples(to: &Target) -> Vec<Sample> {
    let mut samples = vec![stats(to), sinks(to)];
    for head_dim in [64, 128, 256] {
        for in_bf16 in [false, true] {
            let heads = Heads {
                heads: 16,
                kv_heads: 4,
                head_dim,
                value_dim: head_dim,
                scale: 0.1,
                window: None,
                soft_cap: Some(30.0),
                in_bf16,
            };
            let side = fragment(&to.properties, &heads);
            if in_bf16 == (side > 0) {
                samples.extend(of(to, &heads, side));
            }
        }
    }
    samples
}

const N: usize = 4096;

/// The kernels that work on tiles.
fn of(to: &Target, heads: &Heads, side: usize) -> [Sample; 3] {
    let tile = |parts| Tile::new(&to.properties.hardware, heads, (N, parts), side);
    let (wide, narrow) = (tile(heads.heads), tile(heads.kv_heads));
    let element = if side > 0 { BF16 } else { F32 };
    let (properties, target) = (|| to.properties.clone(), || to.target.clone());
    let rows = |heads: usize| (to.buffer)(N * heads * wide.head_dim * 4);
    let (h, k) = (heads.heads, heads.kv_heads);
    let spans = || (to.buffer)(4 * N);
    let sample = |name: &str, kernel: Box<dyn CubeKernel>| Sample {
        name: format!(
            "attention_{name}_{}{}",
            heads.head_dim,
            if side > 0 { "_bf16" } else { "" }
        ),
        kernel,
        on_tensor_cores: side > 0,
    };
    let forward = forward::forward_kernel::create_dummy_kernel(
        properties(),
        target(),
        wide.cube_count(N, h),
        wide.cube_dim(),
        wide.vector,
        rows(h),
        rows(k),
        rows(k),
        (to.buffer)(h),
        spans(),
        rows(h),
        (to.buffer)(h * N),
        N,
        h,
        k,
        heads.scale,
        1.0,
        wide,
        true,
        element,
    );
    let queries = backward::queries_kernel::create_dummy_kernel(
        properties(),
        target(),
        wide.cube_count(N, h),
        wide.cube_dim(),
        wide.vector,
        rows(h),
        rows(k),
        rows(k),
        rows(h),
        (to.buffer)(2 * h * N),
        spans(),
        rows(h),
        N,
        h,
        k,
        heads.scale,
        1.0,
        wide,
        element,
    );
    let keys = backward::keys_kernel::create_dummy_kernel(
        properties(),
        target(),
        narrow.cube_count(N, k),
        narrow.cube_dim(),
        narrow.vector,
        rows(h),
        rows(k),
        rows(k),
        rows(h),
        (to.buffer)(2 * h * N),
        spans(),
        rows(k),
        rows(k),
        N,
        N,
        h,
        k,
        heads.scale,
        1.0,
        narrow,
        element,
    );
    [
        sample("forward", Box::new(forward)),
        sample("queries", Box::new(queries)),
        sample("keys", Box::new(keys)),
    ]
}

fn stats(to: &Target) -> Sample {
    let (h, dim) = (16, 32);
    let units = UNITS as usize;
    let rows = || (to.buffer)(N * h * dim * 4);
    let kernel = backward::stats_kernel::create_dummy_kernel(
        to.properties.clone(),
        to.target.clone(),
        crate::kernels::cube::cubes((N * h).div_ceil(units / backward::LANES)),
        CubeDim::new_1d(UNITS),
        4,
        rows(),
        rows(),
        (to.buffer)(h * N),
        (to.buffer)(2 * h * N),
        N,
        h,
        dim,
        units,
    );
    Sample::plain("attention_stats", kernel)
}

fn sinks(to: &Target) -> Sample {
    let h = 16;
    let kernel = backward::sinks_kernel::create_dummy_kernel(
        to.properties.clone(),
        to.target.clone(),
        CubeCount::Static(h as u32, 1, 1),
        CubeDim::new_1d(UNITS),
        (to.buffer)(2 * h * N),
        (to.buffer)(h),
        (to.buffer)(h),
        N,
        h,
        UNITS,
    );
    Sample::plain("attention_sinks", kernel)
}
