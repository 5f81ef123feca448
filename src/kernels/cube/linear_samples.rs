//! Samples of the kernels of linear layers and the loss, for [`lowering`](super::lowering).

use cubecl::prelude::*;

use super::cross_entropy;
use super::lowering::{Sample, Target};
use super::packed::{Kind, Packed};
use super::tensor_cores::{self, tensor_core_kernel};
use super::tiles::{self, Side, SizesLaunch, product_kernel};
use super::unpack::{LayoutLaunch, rows_kernel};

/// Sizes of the samples: rows, columns of the result, and what is summed over.
const SIZES: [usize; 3] = [1024, 2048, 2048];
const RANK: usize = 16;

/// Every way in which a weight is stored, on both ways through it.
pub(super) fn samples(to: &Target) -> Vec<Sample> {
    let kinds = [
        ("f32", Kind::F32),
        ("f16", Kind::F16),
        ("bf16", Kind::Bf16),
        ("nf4", Kind::Nf4),
        ("nf4_double", Kind::Nf4Double),
        ("int8", Kind::Int8),
    ];
    let sides = [("forward", Side::Transposed), ("backward", Side::Plain)];
    let mut samples = Vec::new();
    for (kind_name, kind) in kinds {
        for (side_name, side) in sides {
            let name = format!("linear_{side_name}_{kind_name}");
            for each in [4, 8] {
                let spec = tiles::Spec {
                    kind,
                    side,
                    x_transposed: false,
                    low: true,
                    onto: false,
                    each,
                };
                let name = format!("{name}_{}", spec.tile());
                samples.push(Sample::plain(&name, plain(to, spec)));
            }
            let spec = tensor_cores::Spec { kind, side };
            samples.push(Sample {
                on_tensor_cores: true,
                ..Sample::plain(&format!("{name}_tensor_cores"), on_tensor_cores(to, spec))
            });
        }
        samples.push(Sample::plain(&format!("rows_{kind_name}"), rows(to, kind)));
    }
    let spec = tiles::Spec {
        kind: Kind::F32,
        side: Side::Plain,
        x_transposed: true,
        low: false,
        onto: true,
        each: 4,
    };
    samples.push(Sample::plain("linear_factors", plain(to, spec)));
    for (name, has) in [("plain", false), ("shaped", true)] {
        let name = format!("cross_entropy_{name}");
        samples.push(Sample::plain(&name, cross_entropy::sample(to, has)));
    }
    samples
}

fn sizes() -> SizesLaunch {
    let [m, n, k] = SIZES;
    SizesLaunch::new(m, n, k, 0, 0, 0, RANK, 0, k)
}

fn layout(kind: Kind) -> LayoutLaunch {
    let [_, n, k] = SIZES;
    Packed::layout_of(kind, n, k)
}

fn plain(to: &Target, spec: tiles::Spec) -> impl CubeKernel + 'static {
    let [m, n, k] = SIZES;
    let tile = spec.tile() as u32;
    product_kernel::create_dummy_kernel(
        to.properties.clone(),
        to.target.clone(),
        CubeCount::Static(n as u32 / tile, m as u32 / tile, 1),
        CubeDim::new_1d(tiles::UNITS),
        (to.buffer)(m * k),
        (to.buffer)(n * k),
        (to.buffer)(m * RANK),
        (to.buffer)(n * RANK),
        (to.buffer)(m * n),
        sizes(),
        layout(spec.kind),
        layout(Kind::F32),
        1.0,
        2.0,
        spec,
    )
}

fn on_tensor_cores(to: &Target, spec: tensor_cores::Spec) -> impl CubeKernel + 'static {
    let [m, n, k] = SIZES;
    let tile = tensor_cores::TILE as u32;
    tensor_core_kernel::create_dummy_kernel(
        to.properties.clone(),
        to.target.clone(),
        CubeCount::Static(n as u32 / tile, m as u32 / tile, 1),
        CubeDim::new_1d(tensor_cores::UNITS),
        (to.buffer)(m * k),
        (to.buffer)(n * k),
        (to.buffer)(m * n),
        sizes(),
        layout(spec.kind),
        1.0,
        spec,
    )
}

fn rows(to: &Target, kind: Kind) -> impl CubeKernel + 'static {
    let [m, n, k] = SIZES;
    rows_kernel::create_dummy_kernel(
        to.properties.clone(),
        to.target.clone(),
        super::cubes(m * k / 4 / super::UNITS as usize),
        CubeDim::new_1d(super::UNITS),
        (to.buffer)(n * k),
        (to.buffer)(m),
        (to.buffer)(m * k),
        m,
        layout(kind),
        false,
        kind,
    )
}
