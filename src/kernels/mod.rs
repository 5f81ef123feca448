//! The tensor operations that matter, one file each: a plain burn *reference* that defines the
//! arithmetic on every device, a fused CPU kernel, and its backward.
//!
//! A public function such as [`rms_norm()`] takes the fused kernel where the device has one (the CPU,
//! and GPUs for what stands in `cube`) and the reference everywhere else. Both are tested against each
//! other, forward and gradients.
//! [`delta_rule()`] and [`causal_conv()`] have no fused kernel: they are plain operations everywhere.
//! All of them store and compute in f32, but for frozen weights, which may be kept in 16 bits or
//! quantised: kernels read those as they are (see `frozen` for the CPU's), plain operations convert them
//! at each use.

pub mod activation;
pub mod adamw;
pub mod attention;
mod backends;
pub mod causal_conv;
mod chunks;
pub mod clamped_gate;
pub mod cross_entropy;
#[cfg(feature = "gpu")]
mod cube;
pub mod delta_rule;
pub mod dropout;
pub mod expert_linear;
mod flex;
mod frozen;
pub mod gated;
pub mod linear;
pub mod lora_linear;
#[cfg(target_arch = "x86_64")]
mod matmul;
pub mod rms_norm;
pub mod rope;
pub mod segments;
pub mod weight;
mod widen;

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, DispatchDevice, backend_extension};
use burn::tensor::Device;

pub use activation::{Activation, activate};
pub use adamw::{AdamwStep, adamw};
pub use attention::attention;
pub use causal_conv::causal_conv;
pub use clamped_gate::{ClampedGate, clamped_gate};
pub use cross_entropy::{Head, LogitShape, linear_cross_entropy, shape_logits};
#[cfg(feature = "lowering")]
pub use cube::lowering;
pub use delta_rule::{DeltaHeads, DeltaInputs, delta_rule};
pub use dropout::{DropMask, dropout};
pub use expert_linear::{expert_linear, expert_lora_linear};
pub use frozen::has_bf16_products;
pub use gated::gated;
pub use linear::linear;
pub use lora_linear::lora_linear;
pub use rms_norm::rms_norm;
pub use rope::{RopeLayout, rope};
pub use segments::Segments;
pub use weight::{QuantWeight, Quantised, Weight};
pub use widen::{in_f32, rows_of};

/// Fused operations, routed to the backend of their tensors. Shapes stand in each kernel's file.
#[backend_extension(Cube: cfg(feature = "gpu"), Flex, Autodiff)]
pub trait Kernels: Backend {
    /// See [`rms_norm()`].
    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self>;

    /// See [`rope()`].
    fn fused_rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: rope::RopeLayout,
    ) -> FloatTensor<Self>;

    /// See [`activate()`].
    fn fused_activate(x: FloatTensor<Self>, by: activation::Activation) -> FloatTensor<Self>;

    /// See [`gated()`].
    fn fused_gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        by: activation::Activation,
    ) -> FloatTensor<Self>;

    /// See [`clamped_gate()`].
    fn fused_clamped_gate(
        pairs: FloatTensor<Self>,
        by: clamped_gate::ClampedGate,
    ) -> FloatTensor<Self>;

    /// See [`dropout()`]; its own backward pass, too.
    fn fused_dropout(x: FloatTensor<Self>, mask: dropout::DropMask) -> FloatTensor<Self>;

    /// See [`adamw()`]: the weight and both moments. Untracked.
    fn fused_adamw(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: adamw::AdamwStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// See [`attention()`]; `[0]` stands for no sinks.
    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        heads: attention::Heads,
        segments: Segments,
    ) -> FloatTensor<Self>;

    /// See [`in_f32`].
    fn fused_in_f32(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// See [`rows_of`].
    fn fused_rows_of(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;

    /// See [`linear()`]; rows `groups[e] .. groups[e + 1]` of x belong to the e-th of E equal parts of
    /// the weight's rows, which is empty where it is quantised.
    fn fused_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        quantised: Quantised,
        groups: Arc<[usize]>,
    ) -> FloatTensor<Self>;

    /// See [`lora_linear()`] and [`expert_lora_linear()`]; groups as in `fused_linear`, of the rows of
    /// A and B too.
    fn fused_lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        quantised: Quantised,
        lora_a: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
        scaling: f32,
        groups: Arc<[usize]>,
    ) -> FloatTensor<Self>;

    /// See [`linear_cross_entropy`]; low and up are empty without a delta, as is a missing bias.
    fn fused_cross_entropy(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        low: FloatTensor<Self>,
        up: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        targets: Arc<[i32]>,
        shape: LogitShape,
    ) -> FloatTensor<Self>;
}

/// What the backward passes of [`Kernels`] need from a plain (not autodiff) backend.
pub trait KernelGradients: Kernels {
    /// Gradients of x `[N, D]` and weight `[D]` (when wanted).
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f32,
        wants_weight: bool,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>);

    /// Rotation by the negative angle.
    fn rope_backward(
        grad: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        layout: rope::RopeLayout,
    ) -> FloatTensor<Self>;

    /// Gradient of x.
    fn activate_backward(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        by: Activation,
    ) -> FloatTensor<Self>;

    /// Gradient of the pairs.
    fn clamped_gate_backward(
        pairs: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        by: ClampedGate,
    ) -> FloatTensor<Self>;

    /// Gradients of gate and up.
    fn gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        by: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Output and the log-sum-exp of each score row, `[H, N]`.
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        heads: attention::Heads,
        segments: &Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients of q, k, v and (when wanted) the sinks.
    fn attention_backward(
        saved: attention::Saved<Self>,
        grad: FloatTensor<Self>,
        wants_sinks: bool,
    ) -> ([FloatTensor<Self>; 3], Option<FloatTensor<Self>>);

    /// Gradient of x.
    fn linear_backward(
        weight: FloatTensor<Self>,
        quantised: Quantised,
        grad: FloatTensor<Self>,
        groups: &[usize],
    ) -> FloatTensor<Self>;

    /// Output `[N, out]` and `x Aᵀ` `[N, R]`.
    fn lora_linear_forward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        quantised: Quantised,
        lora_a: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
        scaling: f32,
        groups: &[usize],
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients of x (when wanted), A and B.
    fn lora_linear_backward(
        saved: lora_linear::Saved<Self>,
        grad: FloatTensor<Self>,
        wants_x: bool,
    ) -> (
        Option<FloatTensor<Self>>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );

    /// Summed loss `[1]` and the gradients of its parts (each when wanted).
    fn cross_entropy_forward(
        parts: cross_entropy::Parts<Self>,
        targets: &[i32],
        shape: LogitShape,
        wants: [bool; 5],
    ) -> cross_entropy::LossAndGradients<Self>;
}

/// Whether tensors on `device` take the fused CPU kernels.
pub fn is_cpu(device: &Device) -> bool {
    matches!(
        device.clone().inner().as_dispatch(),
        DispatchDevice::Flex(_)
    )
}

/// Whether `device` runs the kernels that both the CPU and GPUs have.
pub fn is_fused(device: &Device) -> bool {
    is_cpu(device) || cfg!(feature = "gpu")
}

#[cfg(test)]
mod delta_rule_tests;
#[cfg(test)]
mod tests;
