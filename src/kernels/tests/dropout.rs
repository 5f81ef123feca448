//! Fused dropout against the mask that the host draws: the same elements, forward and backward.

use burn::tensor::Tensor;

#[cfg(feature = "gpu")]
use super::gpu::gpu_or_skip;
use super::{device, random};
use crate::device::to_vec;
use crate::kernels::dropout::{self, DropMask, dropout};
use crate::random::Stream;

/// More elements than one task takes, and than four cubes; odd counts, and none that drop.
const CASES: [(usize, usize, f64); 4] = [(1, 1, 0.5), (3, 37, 0.0), (9, 57, 0.05), (150, 129, 0.3)];

fn mask(p: f64) -> DropMask {
    DropMask::new(Stream::new(5).split(9), p)
}

/// Output and gradient of x under the upstream `grad`, row by row.
fn both_ways(
    f: impl Fn(Tensor<2>, DropMask) -> Tensor<2>,
    x: Tensor<2>,
    grad: Tensor<2>,
    p: f64,
) -> [Vec<f32>; 3] {
    let n = x.shape().num_elements();
    let plain = f(x.clone(), mask(p));
    let leaf = x.autodiff().require_grad();
    let y = f(leaf.clone(), mask(p));
    let mut grads = (y.clone() * grad).sum().backward();
    let dx = leaf.grad_remove(&mut grads).expect("a gradient");
    [plain, y.inner(), dx].map(|x| to_vec(x.reshape([n])))
}

#[test]
fn fused_dropout_equals_its_reference_to_the_bit() {
    device();
    for (n, d, p) in CASES {
        let (x, grad): (Tensor<2>, Tensor<2>) = (random([n, d]), random([n, d]));
        let want = both_ways(dropout::reference, x.clone(), grad.clone(), p);
        assert_eq!(both_ways(dropout, x, grad, p), want, "{n}x{d}, p {p}");
    }
}

#[test]
fn dropout_keeps_the_mean() {
    let x = Tensor::ones([200, 500], &device());
    let y = to_vec(dropout(x, mask(0.25)).reshape([100_000]));
    let dropped = y.iter().filter(|y| **y == 0.0).count();
    // Ten standard deviations of a binomial distribution: √(100,000 · 0.25 · 0.75) is 137.
    assert!(dropped.abs_diff(25_000) < 1370, "{dropped}");
    assert!(y.iter().all(|&y| y == 0.0 || (y - 4.0 / 3.0).abs() < 1e-6));
}

#[cfg(feature = "gpu")]
#[test]
fn a_gpu_drops_what_the_cpu_drops() {
    let Some(gpu) = gpu_or_skip() else { return };
    for (n, d, p) in CASES {
        let (x, grad): (Tensor<2>, Tensor<2>) = (random([n, d]), random([n, d]));
        let want = both_ways(dropout::reference, x.clone(), grad.clone(), p);
        let got = both_ways(dropout, x.to_device(&gpu), grad.to_device(&gpu), p);
        assert_eq!(got, want, "{n}x{d}, p {p}");
    }
}
