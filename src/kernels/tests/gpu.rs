//! Every GPU kernel against the reference on the CPU: forward and all gradients, over odd shapes, on
//! whatever WebGPU finds (Mesa's lavapipe, say). Without a device each test says that it was skipped;
//! with `LORAFIT_REQUIRE_GPU_TESTS=1` that is a failure.

use std::io::Write;

use super::*;
use crate::device::webgpu;

/// Of products of up to some hundred terms: wgpu and the CPU sum in another order.
const ON_GPU: f32 = 1e-4;

/// The GPU, or a line that says why the test is skipped.
pub(super) fn gpu_or_skip() -> Option<Device> {
    match webgpu() {
        Ok(found) => Some(found.device),
        Err(reason) => {
            let required = std::env::var_os("LORAFIT_REQUIRE_GPU_TESTS").is_some_and(|v| v == "1");
            assert!(!required, "LORAFIT_REQUIRE_GPU_TESTS is set, but {reason}");
            // Not `eprintln!`, which the test runner swallows when a test passes.
            let _ = writeln!(std::io::stderr(), "skipped: {reason}");
            None
        }
    }
}

/// Compares output and gradients of a kernel on the GPU with those of a reference on the CPU, under a
/// random upstream.
pub(super) fn compare_on(
    gpu: &Device,
    name: &str,
    inputs: &[Tensor<2>],
    fused: impl Fn(&[Tensor<2>]) -> Tensor<2>,
    reference: impl Fn(&[Tensor<2>]) -> Tensor<2>,
) {
    let cpu = Device::flex();
    let (want, upstream, want_grads) = gradients(inputs, &reference, None);
    let moved: Vec<Tensor<2>> = inputs.iter().map(|x| x.clone().to_device(gpu)).collect();
    let untracked = fused(&moved).to_device(&cpu);
    let upstream = upstream.to_device(gpu);
    let (got, _, got_grads) = gradients(&moved, &fused, Some(upstream));
    close(&format!("{name} untracked"), untracked, want.clone());
    close(name, got.to_device(&cpu), want);
    for (i, (got, want)) in got_grads.into_iter().zip(want_grads).enumerate() {
        close(&format!("{name}, gradient {i}"), got.to_device(&cpu), want);
    }
}

fn gradients(
    inputs: &[Tensor<2>],
    f: impl Fn(&[Tensor<2>]) -> Tensor<2>,
    upstream: Option<Tensor<2>>,
) -> (Tensor<2>, Tensor<2>, Vec<Tensor<2>>) {
    let leaves: Vec<Tensor<2>> = inputs
        .iter()
        .map(|x| x.clone().autodiff().require_grad())
        .collect();
    let out = f(&leaves);
    let upstream = upstream.unwrap_or_else(|| random(out.dims()));
    let mut grads = (out.clone() * upstream.clone()).sum().backward();
    let grads = leaves
        .iter()
        .map(|leaf| leaf.grad_remove(&mut grads).expect("a gradient"));
    let grads = grads.collect();
    (out.inner(), upstream, grads)
}

fn close(name: &str, got: Tensor<2>, want: Tensor<2>) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let scale = want.clone().abs().max().into_scalar::<f32>().max(1.0);
    let worst = (got - want).abs().max().into_scalar::<f32>();
    // Not `>`, which NaN would pass.
    assert!(
        worst <= ON_GPU * scale,
        "{name}: off by {worst} (scale {scale})"
    );
}

#[test]
fn rms_norm_on_a_gpu() {
    let Some(gpu) = gpu_or_skip() else { return };
    for (n, d) in [(1, 1), (3, 17), (40, 64), (257, 33), (5, 1027)] {
        compare_on(
            &gpu,
            &format!("rms_norm {n}x{d}"),
            &[random([n, d]), random([1, d])],
            |x| rms_norm(x[0].clone(), x[1].clone().reshape([d]), 1e-5),
            |x| rms_norm::reference(x[0].clone(), x[1].clone().reshape([d]), 1e-5),
        );
    }
}
