//! Which of [`Kernels`] GPUs run how.

use std::sync::Arc;

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::{
    activation, adamw, clamped_gate, cross_entropy as loss, dropout, linear, rms_norm, rope, unpack,
};
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
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        sinks: CubeTensor,
        heads: attention::Heads,
        segments: Segments,
    ) -> CubeTensor {
        super::attention::forward(q, k, v, sinks, heads, &segments).0
    }

    fn fused_in_f32(x: CubeTensor) -> CubeTensor {
        unpack::in_f32(x)
    }

    fn fused_rows_of(table: CubeTensor, ids: CubeTensor) -> CubeTensor {
        unpack::rows_of(table, ids)
    }

    fn fused_linear(
        x: CubeTensor,
        weight: CubeTensor,
        quantised: Quantised,
        groups: Arc<[usize]>,
    ) -> CubeTensor {
        linear::forward(x, (weight, quantised), &groups)
    }

    fn fused_lora_linear(
        x: CubeTensor,
        weight: CubeTensor,
        quantised: Quantised,
        lora_a: CubeTensor,
        lora_b: CubeTensor,
        scaling: f32,
        groups: Arc<[usize]>,
    ) -> CubeTensor {
        linear::lora_forward(x, (weight, quantised), [lora_a, lora_b], scaling, &groups).0
    }

    fn fused_cross_entropy(
        hidden: CubeTensor,
        weight: CubeTensor,
        low: CubeTensor,
        up: CubeTensor,
        bias: CubeTensor,
        targets: Arc<[i32]>,
        shape: cross_entropy::LogitShape,
    ) -> CubeTensor {
        let parts = [hidden, weight, low, up, bias];
        loss::forward(parts, &targets, shape, Default::default()).loss
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

    fn linear_backward(
        weight: CubeTensor,
        quantised: Quantised,
        grad: CubeTensor,
        groups: &[usize],
    ) -> CubeTensor {
        linear::backward((weight, quantised), grad, groups)
    }

    fn lora_linear_forward(
        x: CubeTensor,
        weight: CubeTensor,
        quantised: Quantised,
        lora_a: CubeTensor,
        lora_b: CubeTensor,
        scaling: f32,
        groups: &[usize],
    ) -> (CubeTensor, CubeTensor) {
        linear::lora_forward(x, (weight, quantised), [lora_a, lora_b], scaling, groups)
    }

    fn lora_linear_backward(
        saved: lora_linear::Saved<Self>,
        grad: CubeTensor,
        wants_x: bool,
    ) -> (Option<CubeTensor>, CubeTensor, CubeTensor) {
        linear::lora_backward(saved, grad, wants_x)
    }

    fn cross_entropy_forward(
        parts: cross_entropy::Parts<Self>,
        targets: &[i32],
        shape: cross_entropy::LogitShape,
        wants: [bool; 5],
    ) -> cross_entropy::LossAndGradients<Self> {
        loss::forward(parts, targets, shape, wants)
    }
}
