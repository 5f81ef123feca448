//! The forward and backward pass of one micro-batch, cut at the input of every block.
//!
//! Each block is differentiated by itself: its backward pass starts from the gradient that the one
//! above left, and leaves the gradient of its input to the one below. What lies between is either the
//! graph that the forward pass made ([`Retain::Graphs`]), or the block's input alone, from which the
//! graph is made again when its turn comes ([`Retain::Inputs`], arXiv 1604.06174). Both ways run the
//! same operations on the same values in the same order (dropout masks are a function of step,
//! micro-batch and layer), so loss and gradients are equal bit for bit. In memory they differ by the
//! graphs of all blocks but one; in time by a forward pass through the blocks.

use std::sync::Arc;

use burn::tensor::{Device, Gradients as Found, Tensor, TensorData};

use super::step::Gradients;
use crate::device::to_vec;
use crate::kernels;
use crate::model::config::ModelConfig;
use crate::model::{CausalLm, Tokens, names};
use crate::nn::{Dropout, Parameter, Rows, Visitor};
use crate::recipe::{GradientCheckpointing, TrainPlan};

/// What the backward pass finds of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retain {
    /// The graph of each block with all that its gradients need.
    Graphs,
    /// The input of each block.
    Inputs,
    /// The input of each block, in the host's memory.
    InputsOnHost,
}

/// Activations of one micro-batch that are not worth computing twice.
const SMALL: usize = 1 << 30;

impl Retain {
    /// What the plan asks for, for micro-batches of up to `tokens` tokens.
    pub fn choose(plan: &TrainPlan, config: &ModelConfig, tokens: usize, device: &Device) -> Self {
        Self::planned(plan, config, tokens, kernels::is_cpu(device))
    }

    /// [`Retain::choose`] before there is a device.
    pub fn planned(plan: &TrainPlan, config: &ModelConfig, tokens: usize, on_cpu: bool) -> Self {
        let again = match plan.gradient_checkpointing {
            GradientCheckpointing::None => false,
            GradientCheckpointing::Block => true,
            GradientCheckpointing::Auto => activation_bytes(config, tokens) > SMALL,
        };
        // The CPU's memory is the host's.
        match (again, plan.offload_activations && !on_cpu) {
            (false, _) => Self::Graphs,
            (true, false) => Self::Inputs,
            (true, true) => Self::InputsOnHost,
        }
    }
}

/// About what the graphs of all blocks hold for `tokens` tokens, in bytes: what the fused kernels need
/// on the way back, in f32. Plain operations and dropout hold more.
pub fn activation_bytes(config: &ModelConfig, tokens: usize) -> usize {
    let d = config.hidden_size;
    let heads = config.num_attention_heads + config.num_key_value_heads;
    // The residual stream and its norm, twice; queries, keys, values, and what attention made of them.
    let mixer = 4 * d + 2 * heads * config.head_dim;
    let floats = |sparse: bool| match config.moe.filter(|_| sparse) {
        Some(moe) => {
            // Gate, up and their product; the rows that go into an expert and come out of it.
            let each = 3 * moe.intermediate_size + 2 * d;
            mixer + moe.num_experts_per_tok * each + 3 * moe.shared_intermediate_size
        }
        None => mixer + 3 * config.intermediate_size,
    };
    let all: usize = config.layers.iter().map(|layer| floats(layer.sparse)).sum();
    all * tokens * size_of::<f32>()
}

/// One micro-batch.
#[derive(Debug, Clone)]
pub struct MicroBatch<'a> {
    /// Its tokens.
    pub tokens: Tokens<'a>,
    /// The target of each token; negative for none.
    pub targets: Arc<[i32]>,
    /// Its masks.
    pub dropout: Option<Dropout>,
    /// What its summed loss is multiplied by.
    pub share: f64,
}

/// A block between its forward and its backward pass.
enum Kept {
    /// Its input and its output, with the graph between them.
    Graph(Box<[Tensor<2>; 2]>),
    Input(Box<Tensor<2>>),
    /// The input's values and its shape.
    OnHost(Vec<f32>, [usize; 2]),
}

/// Which parts of the model have gradients.
struct Reach {
    /// Whether the embedding trains.
    embedding: bool,
    /// The lowest block that gradients have to reach; the number of blocks when none does.
    first: usize,
}

impl Reach {
    fn of(model: &mut CausalLm) -> Self {
        let mut embedding = false;
        model.visit_embedding(&mut |_, parameter| embedding |= parameter.is_trainable());
        let first = model.blocks_mut().iter_mut().position(|block| {
            let mut trains = embedding;
            block.visit("", &mut |_, parameter| trains |= parameter.is_trainable());
            trains
        });
        Self {
            embedding,
            first: first.unwrap_or(model.blocks().len()),
        }
    }

    /// Whether the input of a block, or of the final norm, has a gradient.
    fn below(&self, block: usize) -> bool {
        self.embedding || self.first < block
    }
}

/// The loss of a micro-batch, `[1]`; adds its gradients to `total`.
///
/// A tensor that is used in several places (an embedding that is the output head too) gains their
/// gradients from the last use to the first.
pub fn gradients(
    model: &mut CausalLm,
    batch: &MicroBatch,
    retain: Retain,
    total: &mut Gradients,
) -> Tensor<1> {
    let reach = Reach::of(model);
    let rows = model.rows(batch.tokens, 0);
    let (x, mut kept) = forward(model, batch, &rows, (&reach, retain)); // [N, D]

    let input = leaf(x, reach.below(model.blocks().len()));
    let hidden = model.normed(input.clone());
    let targets = Arc::clone(&batch.targets);
    let loss = (model.loss_sum(hidden, targets, batch.dropout)).mul_scalar(batch.share);
    let mut upstream = None;
    if loss.is_tracked() {
        let mut found = loss.backward();
        upstream = input.grad_remove(&mut found);
        add(total, &mut found, |visitor| model.visit_ends(visitor));
    }
    drop(input);

    while let Some(block) = kept.pop() {
        let Some(gradient) = upstream.take() else {
            break; // what trains below was not used: experts without tokens
        };
        let number = reach.first + kept.len();
        let [input, output] = match block {
            Kept::Graph(graph) => *graph,
            Kept::Input(x) => graph(model, number, *x, &rows, &reach, batch.dropout),
            Kept::OnHost(values, shape) => {
                let x = Tensor::from_data(TensorData::new(values, shape), model.device());
                graph(model, number, x, &rows, &reach, batch.dropout)
            }
        };
        let Some(mut found) = backward(output, gradient) else {
            break;
        };
        upstream = input.grad_remove(&mut found);
        let block = &mut model.blocks_mut()[number];
        add(total, &mut found, |visitor| {
            block.visit(&names::block(number), visitor);
        });
    }
    if let Some(gradient) = upstream.filter(|_| reach.embedding)
        && let Some(mut found) = backward(model.embed(batch.tokens), gradient)
    {
        add(total, &mut found, |visitor| model.visit_ends(visitor));
    }
    loss.inner()
}

/// The blocks' output `[N, D]` and, from the lowest that gradients reach, what is kept of each.
fn forward(
    model: &CausalLm,
    batch: &MicroBatch,
    rows: &Rows,
    (reach, retain): (&Reach, Retain),
) -> (Tensor<2>, Vec<Kept>) {
    // Not merely frozen: softmax, for one, rounds otherwise outside of the backend that tracks.
    let untracked = model.untracked();
    let dropout = batch.dropout;
    let mut x = untracked.embed(batch.tokens).inner(); // [N, D]
    let mut kept = Vec::new();
    for (number, block) in untracked.blocks().iter().enumerate() {
        let reached = number >= reach.first;
        if reached && retain == Retain::Graphs {
            let graph = graph(model, number, x, rows, reach, dropout);
            x = graph[1].clone().inner();
            kept.push(Kept::Graph(Box::new(graph)));
            continue;
        }
        match retain {
            _ if !reached => {}
            // Values, not `TensorData`, which GPUs fill when it is read: too late to free memory, and
            // after the block has reused it.
            Retain::InputsOnHost => kept.push(Kept::OnHost(values(&x), x.dims())),
            _ => kept.push(Kept::Input(Box::new(x.clone()))),
        }
        x = block.forward(x.autodiff(), rows, None, dropout).inner();
    }
    (x, kept)
}

fn values(x: &Tensor<2>) -> Vec<f32> {
    let n = x.shape().num_elements();
    to_vec(x.clone().reshape([n]))
}

/// A block's input, a leaf, and its output with the graph between them.
fn graph(
    model: &CausalLm,
    number: usize,
    x: Tensor<2>,
    rows: &Rows,
    reach: &Reach,
    dropout: Option<Dropout>,
) -> [Tensor<2>; 2] {
    let input = leaf(x, reach.below(number));
    let output = model.blocks()[number].forward(input.clone(), rows, None, dropout);
    [input, output]
}

fn leaf(x: Tensor<2>, tracked: bool) -> Tensor<2> {
    let x = x.autodiff();
    if tracked { x.require_grad() } else { x }
}

/// The backward pass from a gradient of `output`; `None` when nothing below it is tracked.
///
/// The gradient of `Σ output · gradient` for output is `1 · gradient`, which rounds nothing.
fn backward(output: Tensor<2>, gradient: Tensor<2>) -> Option<Found> {
    let tracked = output.is_tracked();
    tracked.then(|| (output * gradient).sum().backward())
}

/// Moves the gradients of the visited tensors from `found` into `total`.
fn add(total: &mut Gradients, found: &mut Found, visit: impl FnOnce(&mut Visitor)) {
    visit(&mut |name: &str, parameter: Parameter| {
        let Some(gradient) = parameter.take_gradient(found) else {
            return;
        };
        let sum = match total.remove(name) {
            Some(sum) => sum + gradient,
            None => gradient,
        };
        total.insert(name.to_string(), sum);
    });
}
