//! Which backend runs which implementation: the CPU's kernels, and their tracked versions.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Flex};
use burn::tensor::FloatDType;
use burn_flex::FlexTensor;

use super::{
    Activation, AdamwStep, ClampedGate, DropMask, KernelGradients, Kernels, Quantised, Segments,
    activation, adamw, attention, clamped_gate, cross_entropy, dropout, gated, linear, lora_linear,
    rms_norm, rope,
};

impl Kernels for Flex {
    fn fused_rms_norm(x: FlexTensor, weight: FlexTensor, eps: f32) -> FlexTensor {
        rms_norm::forward(x, weight, eps)
    }

    fn fused_rope(
        x: FlexTensor,
        cos: FlexTensor,
        sin: FlexTensor,
        layout: rope::RopeLayout,
    ) -> FlexTensor {
        rope::rotate(x, cos, sin, layout, 1.0)
    }

    fn fused_activate(x: FlexTensor, by: Activation) -> FlexTensor {
        activation::forward(x, by)
    }

    fn fused_gated(gate: FlexTensor, up: FlexTensor, by: Activation) -> FlexTensor {
        gated::forward(gate, up, by)
    }

    fn fused_clamped_gate(pairs: FlexTensor, by: ClampedGate) -> FlexTensor {
        clamped_gate::forward(pairs, by)
    }

    fn fused_dropout(x: FlexTensor, mask: DropMask) -> FlexTensor {
        dropout::forward(x, mask)
    }

    fn fused_adamw(
        weight: FlexTensor,
        grad: FlexTensor,
        first: FlexTensor,
        second: FlexTensor,
        step: AdamwStep,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        adamw::forward([weight, grad, first, second], step)
    }

    fn fused_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        sinks: FlexTensor,
        heads: attention::Heads,
        segments: Segments,
    ) -> FlexTensor {
        attention::forward(q, k, v, sinks, heads, &segments).0
    }

    fn fused_in_f32(x: FlexTensor) -> FlexTensor {
        Flex::float_cast(x, FloatDType::F32)
    }

    fn fused_rows_of(table: FlexTensor, ids: FlexTensor) -> FlexTensor {
        Self::fused_in_f32(Flex::float_select(table, 0, ids))
    }

    fn fused_linear(
        x: FlexTensor,
        weight: FlexTensor,
        quantised: Quantised,
        groups: Arc<[usize]>,
    ) -> FlexTensor {
        linear::forward(x, (weight, quantised), &groups)
    }

    fn fused_lora_linear(
        x: FlexTensor,
        weight: FlexTensor,
        quantised: Quantised,
        lora_a: FlexTensor,
        lora_b: FlexTensor,
        scaling: f32,
        groups: Arc<[usize]>,
    ) -> FlexTensor {
        lora_linear::forward(x, (weight, quantised), [lora_a, lora_b], scaling, &groups).0
    }

    fn fused_cross_entropy(
        hidden: FlexTensor,
        weight: FlexTensor,
        low: FlexTensor,
        up: FlexTensor,
        bias: FlexTensor,
        targets: Arc<[i32]>,
        shape: cross_entropy::LogitShape,
    ) -> FlexTensor {
        cross_entropy::loss_only([hidden, weight, low, up, bias], &targets, shape)
    }
}

impl KernelGradients for Flex {
    fn rms_norm_backward(
        x: FlexTensor,
        weight: FlexTensor,
        grad: FlexTensor,
        eps: f32,
        wants_weight: bool,
    ) -> (FlexTensor, Option<FlexTensor>) {
        rms_norm::backward(x, weight, grad, eps, wants_weight)
    }

    fn rope_backward(
        grad: FlexTensor,
        cos: FlexTensor,
        sin: FlexTensor,
        layout: rope::RopeLayout,
    ) -> FlexTensor {
        rope::rotate(grad, cos, sin, layout, -1.0)
    }

    fn clamped_gate_backward(pairs: FlexTensor, grad: FlexTensor, by: ClampedGate) -> FlexTensor {
        clamped_gate::backward(pairs, grad, by)
    }

    fn activate_backward(x: FlexTensor, grad: FlexTensor, by: Activation) -> FlexTensor {
        activation::backward(x, grad, by)
    }

    fn gated_backward(
        gate: FlexTensor,
        up: FlexTensor,
        grad: FlexTensor,
        by: Activation,
    ) -> (FlexTensor, FlexTensor) {
        gated::backward(gate, up, grad, by)
    }

    fn attention_forward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        sinks: FlexTensor,
        heads: attention::Heads,
        segments: &Segments,
    ) -> (FlexTensor, FlexTensor) {
        attention::forward(q, k, v, sinks, heads, segments)
    }

    fn attention_backward(
        saved: attention::Saved<Self>,
        grad: FlexTensor,
        wants_sinks: bool,
    ) -> ([FlexTensor; 3], Option<FlexTensor>) {
        attention::backward(saved, grad, wants_sinks)
    }

    fn linear_backward(
        weight: FlexTensor,
        quantised: Quantised,
        grad: FlexTensor,
        groups: &[usize],
    ) -> FlexTensor {
        linear::backward((weight, quantised), grad, groups)
    }

    fn lora_linear_forward(
        x: FlexTensor,
        weight: FlexTensor,
        quantised: Quantised,
        lora_a: FlexTensor,
        lora_b: FlexTensor,
        scaling: f32,
        groups: &[usize],
    ) -> (FlexTensor, FlexTensor) {
        lora_linear::forward(x, (weight, quantised), [lora_a, lora_b], scaling, groups)
    }

    fn lora_linear_backward(
        saved: lora_linear::Saved<Self>,
        grad: FlexTensor,
        wants_x: bool,
    ) -> (Option<FlexTensor>, FlexTensor, FlexTensor) {
        lora_linear::backward(saved, grad, wants_x)
    }

    fn cross_entropy_forward(
        parts: cross_entropy::Parts<Self>,
        targets: &[i32],
        shape: cross_entropy::LogitShape,
        wants: [bool; 5],
    ) -> cross_entropy::LossAndGradients<Self> {
        cross_entropy::forward(parts, targets, shape, wants)
    }
}

impl<B: KernelGradients, C: CheckpointStrategy> Kernels for Autodiff<B, C> {
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        rms_norm::tracked::<B, C>(x, weight, eps)
    }

    fn fused_rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: rope::RopeLayout,
    ) -> FloatTensor<Self> {
        rope::tracked::<B, C>(x, cos, sin, layout)
    }

    fn fused_activate(x: FloatTensor<Self>, by: Activation) -> FloatTensor<Self> {
        activation::tracked::<B, C>(x, by)
    }

    fn fused_gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        by: Activation,
    ) -> FloatTensor<Self> {
        gated::tracked::<B, C>(gate, up, by)
    }

    fn fused_clamped_gate(pairs: FloatTensor<Self>, by: ClampedGate) -> FloatTensor<Self> {
        clamped_gate::tracked::<B, C>(pairs, by)
    }

    fn fused_dropout(x: FloatTensor<Self>, mask: DropMask) -> FloatTensor<Self> {
        dropout::tracked::<B, C>(x, mask)
    }

    fn fused_adamw(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [weight, grad, first, second] =
            [weight, grad, first, second].map(|x| x.into_primitive());
        let (weight, first, second) = B::fused_adamw(weight, grad, first, second, step);
        let untracked = FloatTensor::<Self>::new;
        (untracked(weight), untracked(first), untracked(second))
    }

    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        heads: attention::Heads,
        segments: Segments,
    ) -> FloatTensor<Self> {
        attention::tracked::<B, C>(q, k, v, sinks, heads, segments)
    }

    fn fused_in_f32(x: FloatTensor<Self>) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::fused_in_f32(x.into_primitive()))
    }

    fn fused_rows_of(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::fused_rows_of(table.into_primitive(), ids))
    }

    fn fused_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        quantised: Quantised,
        groups: Arc<[usize]>,
    ) -> FloatTensor<Self> {
        linear::tracked::<B, C>(x, (weight, quantised), groups)
    }

    fn fused_lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        quantised: Quantised,
        lora_a: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
        scaling: f32,
        groups: Arc<[usize]>,
    ) -> FloatTensor<Self> {
        lora_linear::tracked::<B, C>(x, (weight, quantised), [lora_a, lora_b], scaling, groups)
    }

    fn fused_cross_entropy(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        low: FloatTensor<Self>,
        up: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        targets: Arc<[i32]>,
        shape: cross_entropy::LogitShape,
    ) -> FloatTensor<Self> {
        cross_entropy::tracked::<B, C>([hidden, weight, low, up, bias], targets, shape)
    }
}
