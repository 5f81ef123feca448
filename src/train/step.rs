//! Gradients of one optimizer step: several micro-batches, one loss.
//!
//! The loss of a step is the sum of token losses over all its micro-batches divided by the number
//! of trained tokens in all of them, so that splitting a step differently changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::Tensor;

use crate::data::IGNORE_INDEX;
use crate::data::batch::Batch;
use crate::device::{scalar, to_vec};
use crate::model::{CausalLm, Tokens};
use crate::nn::Dropout;
use crate::train::recompute::{self, MicroBatch, Retain};

/// Gradients by tensor name, flat, without tracking.
pub type Gradients = BTreeMap<String, Tensor<1>>;

/// What one step's forward and backward passes gave.
#[derive(Debug)]
pub struct StepGradients {
    /// Summed token losses divided by `label_tokens`.
    pub loss: f64,
    /// Tokens that were predicted and trained.
    pub label_tokens: usize,
    /// d loss / d weight.
    pub gradients: Gradients,
}

/// Seeds of a step's dropout masks.
#[derive(Debug, Clone, Copy)]
pub struct DropoutSeed {
    /// The run's seed.
    pub seed: u64,
    /// The step, counted from 0.
    pub step: usize,
}

/// The target of each row: the next token's label, [`IGNORE_INDEX`] in a segment's last row.
pub fn targets(batch: &Batch) -> Arc<[i32]> {
    let mut targets = Vec::with_capacity(batch.labels.len());
    for ends in batch.segment_starts.windows(2) {
        if let [_, next @ ..] = &batch.labels[ends[0]..ends[1]] {
            targets.extend_from_slice(next);
            targets.push(IGNORE_INDEX);
        }
    }
    targets.into()
}

fn label_tokens(targets: &[i32]) -> usize {
    targets.iter().filter(|&&target| target >= 0).count()
}

fn tokens(batch: &Batch) -> Tokens<'_> {
    Tokens {
        ids: &batch.input_ids,
        batch: batch.batch,
        positions: Some(&batch.position_ids),
        segments: Some(&batch.segment_starts),
    }
}

/// Loss and gradients of one step, which do not depend on what is kept; `None` when `interrupted` says so between two micro-batches.
pub fn gradients(
    model: &mut CausalLm,
    batches: &[Batch],
    dropout: Option<DropoutSeed>,
    retain: Retain,
    interrupted: &dyn Fn() -> bool,
) -> Option<StepGradients> {
    scaled_gradients(model, batches, dropout, (retain, 1.0), interrupted)
}

/// [`gradients`] times a scale; the loss is as it is.
pub fn scaled_gradients(
    model: &mut CausalLm,
    batches: &[Batch],
    dropout: Option<DropoutSeed>,
    (retain, scale): (Retain, f64),
    interrupted: &dyn Fn() -> bool,
) -> Option<StepGradients> {
    let targets: Vec<Arc<[i32]>> = batches.iter().map(targets).collect();
    let label_tokens: usize = targets.iter().map(|t| label_tokens(t)).sum();
    let share = scale / label_tokens.max(1) as f64;
    let mut losses = Vec::with_capacity(batches.len());
    let mut total = Gradients::new();
    for (i, (batch, targets)) in batches.iter().zip(targets).enumerate() {
        if interrupted() {
            return None;
        }
        let batch = MicroBatch {
            tokens: tokens(batch),
            targets,
            dropout: dropout.map(|key| Dropout::new(key.seed, key.step, i)),
            share,
        };
        losses.push(recompute::gradients(model, &batch, retain, &mut total));
    }
    Some(StepGradients {
        loss: losses.into_iter().map(scalar).sum::<f64>() / scale,
        label_tokens,
        gradients: total,
    })
}

/// Divides gradients by their scale; returns whether all were finite.
pub fn unscale(gradients: &mut Gradients, scale: f64) -> bool {
    if gradients.is_empty() {
        return true;
    }
    // Nothing times 0 is anything but 0, except infinities and NaN.
    let zeros = gradients.values().map(|g| (g.clone() * 0.0).sum());
    let zeros = to_vec(Tensor::cat(zeros.collect(), 0));
    for gradient in gradients.values_mut() {
        *gradient = gradient.clone() / scale;
    }
    zeros.into_iter().all(|zero| zero == 0.0)
}

/// The norm of all gradients together; above `max_norm` they are scaled down to it in place
/// (torch's `clip_grad_norm_`; 0 turns clipping off).
pub fn clip(gradients: &mut Gradients, max_norm: f64) -> f64 {
    if gradients.is_empty() {
        return 0.0;
    }
    // One read for all tensors: each costs a round trip to the device.
    let squares = gradients.values().map(|g| g.clone().square().sum());
    let squares = to_vec(Tensor::cat(squares.collect(), 0));
    let norm = squares.into_iter().map(f64::from).sum::<f64>().sqrt();
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        for gradient in gradients.values_mut() {
            *gradient = gradient.clone() * factor;
        }
    }
    norm
}

/// Mean token loss over batches without training, and the number of tokens it is over.
///
/// `None` when `interrupted` says so between two batches.
pub fn evaluate(
    model: &CausalLm,
    batches: impl Iterator<Item = Batch>,
    interrupted: &dyn Fn() -> bool,
) -> Option<(f64, usize)> {
    let model = model.frozen();
    let (mut sum, mut count) = (0.0, 0);
    for batch in batches {
        if interrupted() {
            return None;
        }
        let targets = targets(&batch);
        count += label_tokens(&targets);
        let hidden = model.hidden(tokens(&batch), None, None);
        sum += scalar(model.loss_sum(hidden, targets, None));
    }
    Some((sum / count.max(1) as f64, count))
}
