//! The gate of a feed-forward layer: `act(gate) · up` (arXiv 2002.05202).
//!
//! The fused kernel keeps gate and up, and computes the activation and its slope again in the
//! backward pass.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::activation::{self, Activation, with_curve};
use super::{KernelGradients, Kernels, flex, is_fused};

/// `act(gate) · up`, element by element.
///
/// # Shapes
/// gate, up `[N, F]` → `[N, F]`
pub fn gated(gate: Tensor<2>, up: Tensor<2>, by: Activation) -> Tensor<2> {
    if is_fused(&gate.device()) {
        Tensor::from_dispatch(Dispatch::fused_gated(
            gate.into_dispatch(),
            up.into_dispatch(),
            by,
        ))
    } else {
        reference(gate, up, by)
    }
}

/// [`gated`] from plain tensor operations.
pub fn reference(gate: Tensor<2>, up: Tensor<2>, by: Activation) -> Tensor<2> {
    activation::reference(gate, by) * up
}

/// Elements that one task takes.
const TASK: usize = 16 * 1024;

pub(super) fn forward(gate: FlexTensor, up: FlexTensor, by: Activation) -> FlexTensor {
    let (gate, up) = (flex::contiguous(gate), flex::contiguous(up));
    let [n, f] = gate.layout().shape().dims();
    let mut out = flex::unset(n * f);
    let tasks = out
        .par_chunks_mut(TASK)
        .zip(flex::elements(&gate).par_chunks(TASK))
        .zip(flex::elements(&up).par_chunks(TASK));
    with_curve!(by, curve => tasks.for_each(|((out, gate), up)| {
        flex::vectorised(
            #[inline(always)]
            || {
                for ((y, g), u) in out.iter_mut().zip(gate).zip(up) {
                    *y = curve(*g).0 * u;
                }
            },
        )
    }));
    flex::tensor(out, [n, f])
}

/// Gradients of gate and up.
pub(super) fn backward(
    gate: FlexTensor,
    up: FlexTensor,
    grad: FlexTensor,
    by: Activation,
) -> (FlexTensor, FlexTensor) {
    let [gate, up, grad] = [gate, up, grad].map(flex::contiguous);
    let [n, f] = gate.layout().shape().dims();
    let (mut d_gate, mut d_up) = (flex::unset(n * f), flex::unset(n * f));
    let tasks = d_gate
        .par_chunks_mut(TASK)
        .zip(d_up.par_chunks_mut(TASK))
        .zip(flex::elements(&gate).par_chunks(TASK))
        .zip(flex::elements(&up).par_chunks(TASK))
        .zip(flex::elements(&grad).par_chunks(TASK));
    with_curve!(by, curve => tasks.for_each(|((((d_gate, d_up), gate), up), grad)| {
        flex::vectorised(
            #[inline(always)]
            || {
                let outputs = d_gate.iter_mut().zip(&mut *d_up);
                for (((dg, du), (g, u)), dy) in outputs.zip(gate.iter().zip(up)).zip(grad) {
                    let (value, slope) = curve(*g);
                    *dg = dy * u * slope;
                    *du = dy * value;
                }
            },
        )
    }));
    (flex::tensor(d_gate, [n, f]), flex::tensor(d_up, [n, f]))
}

#[derive(Debug)]
struct GatedBackward;

impl<B: KernelGradients> Backward<B, 2> for GatedBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [gate_node, up_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (gate, up, by) = ops.state;
        let (d_gate, d_up) = B::gated_backward(gate, up, grad, by);
        if let Some(node) = gate_node {
            grads.register::<B>(node.id, d_gate);
        }
        if let Some(node) = up_node {
            grads.register::<B>(node.id, d_up);
        }
    }
}

pub(super) fn tracked<B: KernelGradients, C: CheckpointStrategy>(
    gate: FloatTensor<Autodiff<B, C>>,
    up: FloatTensor<Autodiff<B, C>>,
    by: Activation,
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [gate.node(), up.node()];
    let (gate, up) = (gate.into_primitive(), up.into_primitive());
    match GatedBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let y = B::fused_gated(gate.clone(), up.clone(), by);
            prep.finish((gate, up, by), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::fused_gated(gate, up, by)),
    }
}
