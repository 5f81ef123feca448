//! Which backend runs which implementation: the CPU's kernels, and their tracked versions.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Flex};
use burn::tensor::FloatDType;
use burn_flex::FlexTensor;

use super::{
    KernelGradients, Kernels, Quantised, Segments, attention, cross_entropy, linear, lora_linear,
    rms_norm, rope, swiglu,
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

    fn fused_swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        swiglu::forward(gate, up)
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

    fn swiglu_backward(
        gate: FlexTensor,
        up: FlexTensor,
        grad: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        swiglu::backward(gate, up, grad)
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

    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        swiglu::tracked::<B, C>(gate, up)
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
