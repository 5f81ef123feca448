//! Rotary embedding: whole and partial heads, halves and neighbouring pairs.

use burn::tensor::{Device, Int, Tensor};

#[cfg(feature = "gpu")]
use super::gpu::{compare_on, gpu_or_skip};
use super::{assert_close, compare, device, random};
use crate::kernels::rope::{self, RopeLayout, rope};

/// Cosine and sine of random angles. `[N, R / 2]` each
fn turns(n: usize, half: usize) -> (Tensor<2>, Tensor<2>) {
    let angles: Tensor<2> = random([n, half]);
    (angles.clone().cos(), angles.sin())
}

#[test]
fn rope_equals_its_reference() {
    device();
    // (rows, heads, width of a head, angles)
    for (n, heads, head_dim, half) in [
        (1, 1, 2, 1),
        (1, 2, 7, 2),
        (5, 3, 12, 6),
        (130, 2, 64, 32),
        (63, 3, 80, 16),
        (65, 1, 256, 32),
        (65, 2, 96, 48),
    ] {
        for interleaved in [false, true] {
            let layout = RopeLayout {
                head_dim,
                interleaved,
            };
            let (cos, sin) = turns(n, half);
            compare(
                &format!("rope {n}x{heads}, {half} angles, {layout:?}"),
                &[random([n, heads * head_dim])],
                |x| rope(x[0].clone(), cos.clone(), sin.clone(), layout),
                |x| rope::reference(x[0].clone(), cos.clone(), sin.clone(), layout),
            );
        }
    }
}

/// Both the fused kernel and the reference: neighbouring pairs turn as halves do once each head's
/// even columns stand before its odd ones, and what does not rotate stays as it is.
#[test]
fn layouts_differ_by_the_order_of_columns_alone() {
    device();
    let (n, heads, head_dim, half) = (9, 3, 14, 5);
    let layout = |interleaved| RopeLayout {
        head_dim,
        interleaved,
    };
    let in_head = (0..2 * half)
        .step_by(2)
        .chain((1..2 * half).step_by(2))
        .chain(2 * half..head_dim);
    let order: Vec<i32> = (0..heads)
        .flat_map(|head| in_head.clone().map(move |i| (head * head_dim + i) as i32))
        .collect();
    let order = Tensor::<1, Int>::from_data(order.as_slice(), &Device::flex());
    let x: Tensor<2> = random([n, heads * head_dim]);
    let (cos, sin) = turns(n, half);
    for rotate in [rope, rope::reference] {
        let pairs = rotate(x.clone(), cos.clone(), sin.clone(), layout(true));
        let ordered = x.clone().select(1, order.clone());
        let halves = rotate(ordered, cos.clone(), sin.clone(), layout(false));
        assert_close("layouts", pairs.clone().select(1, order.clone()), halves);
        let rest = |x: Tensor<2>| {
            x.reshape([n, heads, head_dim])
                .narrow(2, 2 * half, head_dim - 2 * half)
                .into_data()
        };
        assert_eq!(rest(pairs), rest(x.clone()), "columns that stay");
    }
}

#[test]
fn a_quarter_turn_moves_each_column_onto_its_partner() {
    let device = Device::flex();
    let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0, 4.0, 5.0]], &device);
    let (cos, sin) = (
        Tensor::zeros([1, 2], &device),
        Tensor::ones([1, 2], &device),
    );
    for (interleaved, want) in [
        (false, [[-3.0, -4.0, 1.0, 2.0, 5.0]]),
        (true, [[-2.0, 1.0, -4.0, 3.0, 5.0]]),
    ] {
        let layout = RopeLayout {
            head_dim: 5,
            interleaved,
        };
        for rotate in [rope, rope::reference] {
            let got = rotate(x.clone(), cos.clone(), sin.clone(), layout);
            assert_close("quarter turn", got, Tensor::from_floats(want, &device));
        }
    }
}

/// Whole and partial heads, with columns in fours and not.
#[cfg(feature = "gpu")]
#[test]
fn rope_on_a_gpu() {
    let Some(gpu) = gpu_or_skip() else { return };
    for (n, heads, head_dim, half) in [(1, 2, 7, 2), (63, 3, 80, 16), (65, 2, 96, 48)] {
        for interleaved in [false, true] {
            let layout = RopeLayout {
                head_dim,
                interleaved,
            };
            let (cos, sin) = turns(n, half);
            let on_gpu = [cos.clone(), sin.clone()].map(|x| x.to_device(&gpu));
            compare_on(
                &gpu,
                &format!("rope {n}x{heads}, {half} angles, {layout:?}"),
                &[random([n, heads * head_dim])],
                |x| {
                    let [cos, sin] = on_gpu.clone();
                    rope(x[0].clone(), cos, sin, layout)
                },
                |x| rope::reference(x[0].clone(), cos.clone(), sin.clone(), layout),
            );
        }
    }
}
