//! Which of [`Kernels`] GPUs run how.

use std::sync::Arc;

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::{activation, adamw, clamped_gate, dropout, rms_norm, rope};
use crate::kernels::{
    Activation, AdamwStep, ClampedGate, DropMask, KernelGradients, Kernels, Quantised, RopeLayout,
    Segments, attention, cross_entropy, lora_linear,
};

impl Kernels for CubeBackend {
    fn fused_rms_norm(x: CubeTensor, weight: CubeTensor, eps: f32) -> CubeTensor {
        rms_norm::forward(x, weight, eps)
    }

    fn fused_rope(
        x: CubeTensor,
        cos: CubeTensor,
        sin: CubeTensor,
        layout: RopeLayout,
    ) -> CubeTensor {
        rope::rotate(x, cos, sin, layout, 1.0)
    }

    fn fused_activate(x: CubeTensor, by: Activation) -> CubeTensor {
        activation::activate(x, by)
    }

    fn fused_gated(gate: CubeTensor, up: CubeTensor, by: Activation) -> CubeTensor {
        activation::gate(gate, up, by)
    }

    fn fused_clamped_gate(pairs: CubeTensor, by: ClampedGate) -> CubeTensor {
        clamped_gate::forward(pairs, by)
    }

    fn fused_dropout(x: CubeTensor, mask: DropMask) -> CubeTensor {
        dropout::forward(x, mask)
    }

    fn fused_adamw(
        weight: CubeTensor,
        grad: CubeTensor,
        first: CubeTensor,
        second: CubeTensor,
        step: AdamwStep,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        adamw::forward([weight, grad, first, second], step)
    }

    fn fused_attention(
        _: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        _: attention::Heads,
        _: Segments,
    ) -> CubeTensor {
        unrouted()
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
        grad: CubeTensor,
        cos: CubeTensor,
        sin: CubeTensor,
        layout: RopeLayout,
    ) -> CubeTensor {
        rope::rotate(grad, cos, sin, layout, -1.0)
    }

    fn clamped_gate_backward(pairs: CubeTensor, grad: CubeTensor, by: ClampedGate) -> CubeTensor {
        clamped_gate::backward(pairs, grad, by)
    }

    fn activate_backward(x: CubeTensor, grad: CubeTensor, by: Activation) -> CubeTensor {
        activation::activate_backward(x, grad, by)
    }

    fn gated_backward(
        gate: CubeTensor,
        up: CubeTensor,
        grad: CubeTensor,
        by: Activation,
    ) -> (CubeTensor, CubeTensor) {
        activation::gate_backward(gate, up, grad, by)
    }

    fn attention_forward(
        _: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        _: attention::Heads,
        _: &Segments,
    ) -> (CubeTensor, CubeTensor) {
        unrouted()
    }

    fn attention_backward(
        _: attention::Saved<Self>,
        _: CubeTensor,
        _: bool,
    ) -> ([CubeTensor; 3], Option<CubeTensor>) {
        unrouted()
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
