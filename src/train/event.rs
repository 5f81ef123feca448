//! What a run reports: to the terminal, to `--json`, and to `metrics.jsonl`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Something that happened in a run. Serialised as one JSON object with the key `event`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Training begins or goes on.
    Start {
        /// The step that comes first, counted from 0.
        step: usize,
        /// Steps of the whole run.
        total_steps: usize,
        /// Steps in one pass over the data; 0 where they are streamed.
        steps_per_epoch: usize,
        /// Numbers that train.
        trainable_parameters: usize,
        /// Numbers in the model, adapters included.
        parameters: usize,
        /// Where it runs.
        device: String,
    },
    /// An optimizer step is done.
    Step {
        /// Steps done.
        step: usize,
        /// Passes over the data, with fraction.
        epoch: f64,
        /// Mean loss of the trained tokens, in nats.
        loss: f64,
        /// Learning rate of this step.
        learning_rate: f64,
        /// Norm of the gradients before clipping.
        grad_norm: f64,
        /// What the loss was multiplied by for the backward pass, where it was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        loss_scale: Option<f64>,
        /// Tokens in the step, without padding.
        tokens: usize,
        /// Tokens that trained.
        trained_tokens: usize,
        /// Share of the slots that held padding, in `[0, 1)`.
        #[serde(default)]
        padding: f64,
        /// Tokens per second of the step.
        tokens_per_second: f64,
        /// Memory in use: the heap's on a CPU, the device pool's on a GPU. In bytes.
        memory_bytes: Option<u64>,
        /// The most that was in use so far; of a GPU's pool what it has reserved. In bytes.
        #[serde(default)]
        memory_peak_bytes: Option<u64>,
        /// Seconds of the step.
        seconds: f64,
    },
    /// Gradients overflowed, so that no weight moved in this step, and the loss is scaled less from now on.
    Overflow {
        /// Steps done, with this one.
        step: usize,
        /// The new scale.
        loss_scale: f64,
        /// Steps skipped so far.
        skipped: usize,
    },
    /// The validation split was measured.
    Eval {
        /// Steps done.
        step: usize,
        /// Mean token loss, in nats.
        loss: f64,
        /// Whether it is the lowest so far.
        best: bool,
    },
    /// A text was generated.
    Sample {
        /// Steps done.
        step: usize,
        /// The prompt.
        prompt: String,
        /// The answer.
        text: String,
    },
    /// A stream left out rows that cannot be read.
    Skipped {
        /// Steps done.
        step: usize,
        /// How many.
        rows: usize,
        /// The first of them, and why.
        shown: Vec<String>,
    },
    /// A run state was saved.
    Saved {
        /// Steps done.
        step: usize,
        /// Its directory.
        path: PathBuf,
    },
    /// Evaluations stopped improving.
    EarlyStop {
        /// Steps done.
        step: usize,
        /// The step of the lowest validation loss.
        best_step: usize,
    },
    /// The run was asked to stop and saved its state.
    Interrupted {
        /// Steps done.
        step: usize,
    },
    /// The run is complete.
    Done {
        /// Steps done.
        step: usize,
        /// Loss of the last step.
        loss: Option<f64>,
        /// Lowest validation loss.
        best_eval_loss: Option<f64>,
        /// What was written.
        output: PathBuf,
        /// Memory that the run was planned to need at its peak, in bytes.
        #[serde(default)]
        memory_planned_bytes: Option<u64>,
        /// The most that was in use, as in a step.
        #[serde(default)]
        memory_peak_bytes: Option<u64>,
    },
}

impl Event {
    /// Steps done when it happened.
    pub fn step(&self) -> usize {
        match self {
            Self::Start { step, .. }
            | Self::Step { step, .. }
            | Self::Overflow { step, .. }
            | Self::Eval { step, .. }
            | Self::Sample { step, .. }
            | Self::Skipped { step, .. }
            | Self::Saved { step, .. }
            | Self::EarlyStop { step, .. }
            | Self::Interrupted { step }
            | Self::Done { step, .. } => *step,
        }
    }
}
