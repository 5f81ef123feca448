//! Fused steps of AdamW against the reference.

use burn::tensor::Tensor;

#[cfg(feature = "gpu")]
use super::gpu::gpu_or_skip;
use super::{device, random};
use crate::device::to_vec;
use crate::kernels::adamw::{self, AdamwStep, adamw};

const STEP: AdamwStep = AdamwStep {
    keep: [0.9, 0.999],
    share: [0.1, 0.001],
    before: 0.998,
    divisor: 0.07,
    eps: 1e-8,
    rate: 0.003,
    after: 0.996,
};

/// A weight, its gradient and its moments. `[N]` each
fn inputs(n: usize) -> [Tensor<1>; 4] {
    let [weight, grad, first, second] = [1.0, 0.1, 0.02, 0.1].map(|s| random([n]) * s);
    [weight, grad, first, second.square()]
}

/// Weight and moments after two steps with the same gradient.
fn two_steps(
    step: impl Fn(Tensor<1>, Tensor<1>, [Tensor<1>; 2], AdamwStep) -> (Tensor<1>, [Tensor<1>; 2]),
    inputs: [Tensor<1>; 4],
) -> [Vec<f32>; 3] {
    let [weight, grad, first, second] = inputs;
    let (weight, moments) = step(weight, grad.clone(), [first, second], STEP);
    let (weight, [first, second]) = step(weight, grad, moments, STEP);
    [weight, first, second].map(to_vec)
}

#[test]
fn a_step_of_adamw_equals_its_reference_to_the_bit() {
    device();
    for n in [1, 1000, 40_003] {
        let inputs = inputs(n);
        let want = two_steps(adamw::reference, inputs.clone());
        assert_eq!(two_steps(adamw, inputs), want, "{n} elements");
    }
}

#[test]
fn a_step_leaves_tensors_alone_that_others_hold() {
    device();
    let inputs = inputs(10);
    let before = inputs.clone().map(to_vec);
    let [weight, grad, first, second] = inputs.clone();
    adamw(weight, grad, [first, second], STEP);
    assert_eq!(inputs.map(to_vec), before);
}

#[cfg(feature = "gpu")]
#[test]
fn a_step_of_adamw_on_a_gpu() {
    let Some(gpu) = gpu_or_skip() else { return };
    for n in [1, 1001, 40_004] {
        let inputs = inputs(n);
        let want = two_steps(adamw::reference, inputs.clone());
        let moved = inputs.clone().map(|x| x.to_device(&gpu));
        let held = moved.clone().map(|x| x + 0.0);
        let got = two_steps(adamw, moved.clone());
        let names = ["weight", "first moment", "second moment"];
        for (name, (got, want)) in names.into_iter().zip(got.iter().zip(&want)) {
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                // A handful of roundings, of a weight of about 1.
                let off = (got - want).abs();
                assert!(
                    off <= 1e-6 * want.abs().max(0.1),
                    "{name} {i}: {got}, not {want}"
                );
            }
        }
        // Tensors that others hold stay as they are.
        for (now, then) in moved.into_iter().zip(held) {
            assert_eq!(to_vec(now), to_vec(then));
        }
    }
}
