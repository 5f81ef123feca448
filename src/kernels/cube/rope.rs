//! [`rope`](fn@crate::kernels::rope) on GPUs: one unit for each pair of columns that turns (or four of
//! them), and for each column that stays.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{UNITS, contiguous, dims, empty, unit_for_each, vector_size};
use crate::kernels::rope::RopeLayout;

/// Sizes and places count vectors of N columns; with `interleaved` N must be 1.
#[cube(launch_unchecked, create_dummy_kernel)]
fn rotate_kernel<N: Size>(
    x: &[Vector<f32, N>],
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    y: &mut [Vector<f32, N>],
    count: usize,
    heads: usize,
    head_dim: usize,
    half: usize,
    sign: f32,
    #[comptime] interleaved: bool,
) {
    let unit = ABSOLUTE_POS;
    if unit < count {
        let places = head_dim - half;
        // Of all heads of all rows.
        let head = unit / places;
        let place = unit % places;
        let start = head * head_dim;
        if place < half {
            let angle = head / heads * half + place;
            let c = cos[angle];
            let s = sin[angle] * Vector::<f32, N>::new(sign);
            let mut first = start + place;
            let mut second = start + half + place;
            if comptime!(interleaved) {
                first = start + 2 * place;
                second = first + 1;
            }
            let x1 = x[first];
            let x2 = x[second];
            y[first] = x1 * c - x2 * s;
            y[second] = x2 * c + x1 * s;
        } else {
            let at = start + half + place;
            y[at] = x[at];
        }
    }
}

/// Rotates by the angles times `sign`: -1 rotates back.
pub(super) fn rotate(
    x: CubeTensor,
    cos: CubeTensor,
    sin: CubeTensor,
    layout: RopeLayout,
    sign: f32,
) -> CubeTensor {
    let ([n, width], [_, half]) = (dims(&x), dims(&cos));
    let [x, cos, sin] = [x, cos, sin].map(contiguous);
    let y = empty(&x, [n, width]);
    let client = y.client.clone();
    let size = match layout.interleaved {
        true => 1,
        // Both must divide.
        false => vector_size(half).min(vector_size(layout.head_dim)),
    };
    let (head_dim, half) = (layout.head_dim / size, half / size);
    let heads = width / layout.head_dim;
    let count = n * heads * (head_dim - half);
    // SAFETY: a unit's head is one of n · heads, each `head_dim` wide; with 2 half ≤ head_dim its
    // columns lie within it, and its angle in the head's row of n.
    unsafe {
        rotate_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            size,
            x.into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            count,
            heads,
            head_dim,
            half,
            sign,
            layout.interleaved,
        );
    }
    y
}

/// Of 32 heads of 128 columns, in vectors of four where they are halves.
#[cfg(feature = "lowering")]
pub(super) fn samples(to: &super::lowering::Target) -> Vec<super::lowering::Sample> {
    let (n, heads, head_dim, half) = (1024, 32, 128, 64);
    let sample = |name: &str, size: usize, interleaved: bool| {
        let count = n * heads * half / size;
        let kernel = rotate_kernel::create_dummy_kernel(
            to.properties.clone(),
            to.target.clone(),
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            size,
            (to.buffer)(n * heads * head_dim),
            (to.buffer)(n * half),
            (to.buffer)(n * half),
            (to.buffer)(n * heads * head_dim),
            count,
            heads,
            head_dim / size,
            half / size,
            1.0,
            interleaved,
        );
        super::lowering::Sample::plain(name, kernel)
    };
    vec![
        sample("rope_halves", 4, false),
        sample("rope_pairs", 1, true),
    ]
}
