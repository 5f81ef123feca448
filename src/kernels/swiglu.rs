//! The gate of a feed-forward layer: `silu(gate) · up` (arXiv 2002.05202).
//!
//! The fused kernel keeps gate and up and computes the sigmoid again in the backward pass.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch};
use burn::tensor::{Tensor, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KernelGradients, Kernels, flex, is_cpu};

/// `gate · sigmoid(gate) · up`, element by element.
///
/// # Shapes
/// gate, up `[N, F]` → `[N, F]`
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    if is_cpu(&gate.device()) {
        Tensor::from_dispatch(Dispatch::fused_swiglu(
            gate.into_dispatch(),
            up.into_dispatch(),
        ))
    } else {
        reference(gate, up)
    }
}

/// [`swiglu`] from plain tensor operations.
pub fn reference(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    activation::silu(gate) * up
}

/// Elements that one task takes.
const TASK: usize = 16 * 1024;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + flex::exp(-x))
}

pub(super) fn forward(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
    let (gate, up) = (flex::contiguous(gate), flex::contiguous(up));
    let [n, f] = gate.layout().shape().dims();
    let mut out = vec![0f32; n * f];
    out.par_chunks_mut(TASK)
        .zip(flex::elements(&gate).par_chunks(TASK))
        .zip(flex::elements(&up).par_chunks(TASK))
        .for_each(|((out, gate), up)| {
            flex::vectorised(
                #[inline(always)]
                || {
                    for ((y, g), u) in out.iter_mut().zip(gate).zip(up) {
                        *y = g * sigmoid(*g) * u;
                    }
                },
            )
        });
    flex::tensor(out, [n, f])
}

pub(super) fn backward(
    gate: FlexTensor,
    up: FlexTensor,
    grad: FlexTensor,
) -> (FlexTensor, FlexTensor) {
    let (gate, up, grad) = (
        flex::contiguous(gate),
        flex::contiguous(up),
        flex::contiguous(grad),
    );
    let [n, f] = gate.layout().shape().dims();
    let (mut d_gate, mut d_up) = (vec![0f32; n * f], vec![0f32; n * f]);
    d_gate
        .par_chunks_mut(TASK)
        .zip(d_up.par_chunks_mut(TASK))
        .zip(flex::elements(&gate).par_chunks(TASK))
        .zip(flex::elements(&up).par_chunks(TASK))
        .zip(flex::elements(&grad).par_chunks(TASK))
        .for_each(|((((d_gate, d_up), gate), up), grad)| {
            flex::vectorised(
                #[inline(always)]
                || {
                    let outputs = d_gate.iter_mut().zip(&mut *d_up);
                    for (((dg, du), (g, u)), dy) in outputs.zip(gate.iter().zip(up)).zip(grad) {
                        let s = sigmoid(*g);
                        *dg = dy * u * s * (1.0 + g * (1.0 - s));
                        *du = dy * g * s;
                    }
                },
            )
        });
    (flex::tensor(d_gate, [n, f]), flex::tensor(d_up, [n, f]))
}

#[derive(Debug)]
struct SwigluBackward;

impl<B: KernelGradients> Backward<B, 2> for SwigluBackward {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [gate_node, up_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (gate, up) = ops.state;
        let (d_gate, d_up) = B::swiglu_backward(gate, up, grad);
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
) -> FloatTensor<Autodiff<B, C>> {
    let parents = [gate.node(), up.node()];
    let (gate, up) = (gate.into_primitive(), up.into_primitive());
    match SwigluBackward
        .prepare::<C>(parents)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => {
            let y = B::fused_swiglu(gate.clone(), up.clone());
            prep.finish((gate, up), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::fused_swiglu(gate, up)),
    }
}
