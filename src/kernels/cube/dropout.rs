//! [`dropout`](fn@crate::kernels::dropout) on GPUs: one unit an element. Numbers of 64 bits are kept as
//! two halves, since WebGPU has none.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{UNITS, contiguous, dims, empty, unit_for_each};
use crate::kernels::dropout::DropMask;
use crate::random::{FACTORS, GOLDEN_GAMMA};

/// `x · factor` modulo 2⁶⁴, in lower and upper halves.
#[cube]
fn times(low: u32, high: u32, #[comptime] factor: u64) -> (u32, u32) {
    let factor_low = comptime!(factor as u32).runtime();
    let factor_high = comptime!((factor >> 32) as u32).runtime();
    (
        low * factor_low,
        low.mul_hi(factor_low) + low * factor_high + high * factor_low,
    )
}

/// `x ^ (x >> shift)`, in lower and upper halves.
#[cube]
fn folded(low: u32, high: u32, #[comptime] shift: u32) -> (u32, u32) {
    let shifted = (low >> shift) | (high << comptime!(32 - shift));
    (low ^ shifted, high ^ (high >> shift))
}

/// Keys and limits are given in lower and upper halves.
#[cube(launch_unchecked, create_dummy_kernel)]
fn dropout_kernel(
    x: &[f32],
    y: &mut [f32],
    count: usize,
    key_low: u32,
    key_high: u32,
    limit_low: u32,
    limit_high: u32,
    scale: f32,
) {
    let i = ABSOLUTE_POS;
    if i < count {
        // `Stream::bits`: the key plus (i + 1) times SplitMix64's increment, finalized.
        let (low, high) = times(i as u32, 0u32, GOLDEN_GAMMA);
        let sum = low + key_low;
        let carry = select(sum < low, 1u32, 0u32);
        let (low, high) = folded(sum, high + key_high + carry, 30u32);
        let (low, high) = times(low, high, FACTORS[0]);
        let (low, high) = folded(low, high, 27u32);
        let (low, high) = times(low, high, FACTORS[1]);
        let (low, high) = folded(low, high, 31u32);
        // The upper 53 bits.
        let low = (low >> 11u32) | (high << 21u32);
        let high = high >> 11u32;
        let dropped = high < limit_high || (high == limit_high && low < limit_low);
        y[i] = x[i] * select(dropped, 0.0f32, scale);
    }
}

pub(super) fn forward(x: CubeTensor, mask: DropMask) -> CubeTensor {
    let [n, d] = dims(&x);
    let x = contiguous(x);
    let y = empty(&x, [n, d]);
    let client = y.client.clone();
    let count = n * d;
    let key = mask.stream().start();
    let limit = mask.limit();
    // SAFETY: x and y both hold `count` elements.
    unsafe {
        dropout_kernel::launch_unchecked(
            &client,
            unit_for_each(count),
            CubeDim::new_1d(UNITS),
            x.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            count,
            key as u32,
            (key >> 32) as u32,
            limit as u32,
            (limit >> 32) as u32,
            mask.scale(),
        );
    }
    y
}

#[cfg(feature = "lowering")]
pub(super) fn samples(to: &super::lowering::Target) -> Vec<super::lowering::Sample> {
    let count = 1024 * 2048;
    let kernel = dropout_kernel::create_dummy_kernel(
        to.properties.clone(),
        to.target.clone(),
        unit_for_each(count),
        CubeDim::new_1d(UNITS),
        (to.buffer)(count),
        (to.buffer)(count),
        count,
        1,
        2,
        3,
        4,
        1.05,
    );
    vec![super::lowering::Sample::plain("dropout", kernel)]
}
