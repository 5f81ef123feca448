//! Which of [`Kernels`] GPUs run how.

use std::sync::Arc;

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::rms_norm;
use crate::kernels::{
    KernelGradients, Kernels, Quantised, Segments, attention, cross_entropy, lora_linear, rope,
};

impl Kernels for CubeBackend {
    fn fused_rms_norm(x: CubeTensor, weight: CubeTensor, eps: f32) -> CubeTensor {
        rms_norm::forward(x, weight, eps)
    }

    fn fused_rope(_: CubeTensor, _: CubeTensor, _: CubeTensor, _: rope::RopeLayout) -> CubeTensor {
        unrouted()
    }

    fn fused_swiglu(_: CubeTensor, _: CubeTensor) -> CubeTensor {
        unrouted()
    }

    fn fused_attention(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        sinks: CubeTensor,
        heads: attention::Heads,
        segments: Segments,
    ) -> CubeTensor {
        super::attention::forward(q, k, v, sinks, heads, &segments).0
    }

    fn fused_linear(_: CubeTensor, _: CubeTensor, _: Quantised, _: Arc<[usize]>) -> CubeTensor {
        unrouted()
    }

    fn fused_lora_linear(
        _: CubeTensor,
        _: CubeTensor,
        _: Quantised,
        _: CubeTensor,
        _: CubeTensor,
        _: f32,
        _: Arc<[usize]>,
    ) -> CubeTensor {
        unrouted()
    }

    fn fused_cross_entropy(
        _: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        _: Arc<[i32]>,
        _: cross_entropy::LogitShape,
    ) -> CubeTensor {
        unrouted()
    }
}

impl KernelGradients for CubeBackend {
    fn rms_norm_backward(
        x: CubeTensor,
        weight: CubeTensor,
        grad: CubeTensor,
        eps: f32,
        wants_weight: bool,
    ) -> (CubeTensor, Option<CubeTensor>) {
        rms_norm::backward(x, weight, grad, eps, wants_weight)
    }

    fn rope_backward(
        _: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        _: rope::RopeLayout,
    ) -> CubeTensor {
        unrouted()
    }

    fn swiglu_backward(_: CubeTensor, _: CubeTensor, _: CubeTensor) -> (CubeTensor, CubeTensor) {
        unrouted()
    }

    fn attention_forward(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        sinks: CubeTensor,
        heads: attention::Heads,
        segments: &Segments,
    ) -> (CubeTensor, CubeTensor) {
        super::attention::forward(q, k, v, sinks, heads, segments)
    }

    fn attention_backward(
        saved: attention::Saved<Self>,
        grad: CubeTensor,
        wants_sinks: bool,
    ) -> ([CubeTensor; 3], Option<CubeTensor>) {
        super::attention::backward(saved, grad, wants_sinks)
    }

    fn linear_backward(_: CubeTensor, _: Quantised, _: CubeTensor, _: &[usize]) -> CubeTensor {
        unrouted()
    }

    fn lora_linear_forward(
        _: CubeTensor,
        _: CubeTensor,
        _: Quantised,
        _: CubeTensor,
        _: CubeTensor,
        _: f32,
        _: &[usize],
    ) -> (CubeTensor, CubeTensor) {
        unrouted()
    }

    fn lora_linear_backward(
        _: lora_linear::Saved<Self>,
        _: CubeTensor,
        _: bool,
    ) -> (Option<CubeTensor>, CubeTensor, CubeTensor) {
        unrouted()
    }

    fn cross_entropy_forward(
        _: cross_entropy::Parts<Self>,
        _: &[i32],
        _: cross_entropy::LogitShape,
        _: [bool; 5],
    ) -> cross_entropy::LossAndGradients<Self> {
        unrouted()
    }
}

/// Stands where the public function sends GPUs to plain operations.
fn unrouted() -> ! {
    unreachable!("this kernel has no GPU version, and its function knows")
}
