//! Puts samples in order, packs them into rows, and cuts the rows into micro-batches and steps.
//!
//! What a step trains on is a function of its number, so a resumed run needs no cursor. Every
//! epoch holds each sample exactly once (or as often as the weight of its source says); its last
//! step may be short.

use std::sync::{Arc, Mutex, PoisonError};

use super::pack::{self, Rows};
use super::shuffle::{self, GROUP_STREAM, PIECE_STREAM, WEIGHT_STREAM};
use crate::recipe::Plan;
use crate::recipe::plan::Packing;

/// Micro-batches whose samples are sorted by length together.
const GROUPED: usize = 64;

/// How samples become steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// Rows in a micro-batch.
    pub micro_batch: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// Determines every order.
    pub seed: u64,
    /// Whether each epoch has another order.
    pub shuffle: bool,
    /// Whether samples share rows.
    pub packing: Packing,
    /// Tokens in a packed row.
    pub max_seq_len: usize,
    /// Whether samples of like length share micro-batches.
    pub group_by_length: bool,
}

impl Layout {
    /// As a plan has it for training.
    pub fn training(plan: &Plan) -> Self {
        Self {
            micro_batch: plan.train.micro_batch_size.max(1),
            accumulation: plan.train.gradient_accumulation_steps.max(1),
            seed: plan.train.seed,
            shuffle: plan.data.shuffle,
            packing: plan.data.packing,
            max_seq_len: plan.data.max_seq_len,
            group_by_length: plan.data.group_by_length,
        }
    }

    /// As a plan has it for measuring: each sample once, those of like length together.
    pub fn evaluation(plan: &Plan) -> Self {
        Self {
            accumulation: 1,
            shuffle: false,
            ..Self::training(plan)
        }
    }

    /// One pass over samples in this order.
    pub fn pass(&self, order: &[u32], lengths: &[u32], stream: u64) -> Pass {
        let rows = match self.packing {
            Packing::Off => return self.single(order, lengths, stream),
            Packing::On => pack::best_fit(order, lengths, self.max_seq_len),
            Packing::Wrap => pack::wrap(order, lengths, self.max_seq_len),
        };
        let count = rows.len();
        let order: Vec<u32> = if self.shuffle {
            let order = shuffle::permutation(count, self.seed, PIECE_STREAM ^ stream);
            order.into_iter().map(|row| row as u32).collect()
        } else {
            (0..count as u32).collect()
        };
        let batches = order.chunks(self.micro_batch).map(<[u32]>::to_vec);
        Pass {
            batches: batches.collect(),
            rows,
        }
    }

    /// One sample a row; where it saves padding, samples of like length in one micro-batch.
    fn single(&self, order: &[u32], lengths: &[u32], stream: u64) -> Pass {
        let rows = pack::single(order, lengths);
        let all: Vec<u32> = (0..order.len() as u32).collect();
        if !self.group_by_length || self.micro_batch == 1 {
            let batches = all.chunks(self.micro_batch).map(<[u32]>::to_vec);
            let batches = batches.collect();
            return Pass { rows, batches };
        }
        // Windows of whole steps, so that a step holds no more samples than it should.
        let step = self.micro_batch.saturating_mul(self.accumulation);
        let window = step.saturating_mul(GROUPED.div_ceil(self.accumulation));
        let mut batches: Vec<Vec<u32>> = Vec::new();
        for (i, window) in all.chunks(window).enumerate() {
            let mut window = window.to_vec();
            window.sort_by_key(|row| std::cmp::Reverse(rows.tokens(*row as usize)));
            let sorted = window.chunks(self.micro_batch);
            let mut sorted: Vec<Vec<u32>> = sorted.map(<[u32]>::to_vec).collect();
            if self.shuffle {
                let stream = GROUP_STREAM ^ stream.rotate_left(32) ^ i as u64;
                let order = shuffle::permutation(sorted.len(), self.seed, stream);
                sorted = order
                    .iter()
                    .map(|at| std::mem::take(&mut sorted[*at]))
                    .collect();
            }
            batches.extend(sorted);
        }
        Pass { rows, batches }
    }
}

/// Rows, and which of them make each micro-batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pass {
    /// The rows.
    pub rows: Rows,
    /// Indices of rows.
    pub batches: Vec<Vec<u32>>,
}

impl Pass {
    /// Tokens and slots, pads included, of all micro-batches.
    pub fn slots(&self) -> (usize, usize) {
        let (mut tokens, mut slots) = (0, 0);
        for batch in &self.batches {
            let lengths = batch.iter().map(|row| self.rows.tokens(*row as usize));
            tokens += lengths.clone().sum::<usize>();
            slots += batch.len() * lengths.max().unwrap_or(0);
        }
        (tokens, slots)
    }

    /// Padding by all places of the micro-batches, in `[0, 1)`.
    pub fn padding(&self) -> f64 {
        let (tokens, slots) = self.slots();
        1.0 - tokens as f64 / slots.max(1) as f64
    }

    /// Tokens by all that rows of `capacity` tokens hold, in `[0, 1]`.
    pub fn fill(&self, capacity: usize) -> f64 {
        let held = self.rows.len().saturating_mul(capacity);
        self.slots().0 as f64 / held.max(1) as f64
    }
}

/// Samples of one source and how often an epoch sees each.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// Sample indices.
    pub samples: Vec<u32>,
    /// How often.
    pub weight: f64,
}

impl Share {
    /// The samples of an epoch. Where the weight is no whole number, what is beyond goes through
    /// the samples in one random order, epoch after epoch, so that none is left behind.
    fn of_epoch(&self, source: usize, seed: u64, epoch: usize, out: &mut Vec<u32>) {
        let count = self.samples.len();
        let whole = self.weight.floor() as usize;
        for _ in 0..whole {
            out.extend_from_slice(&self.samples);
        }
        let extra = (self.weight.fract() * count as f64).round() as usize;
        if extra == 0 {
            return;
        }
        let order = shuffle::permutation(count, seed, WEIGHT_STREAM ^ source as u64);
        let start = (epoch % count).wrapping_mul(extra) % count;
        let chosen = (start..start + extra).map(|at| self.samples[order[at % count]]);
        let first = out.len();
        out.extend(chosen);
        out[first..].sort_unstable();
    }
}

/// The order of a run.
#[derive(Debug)]
pub struct Loader {
    shares: Vec<Share>,
    /// Tokens of every sample.
    lengths: Vec<u32>,
    layout: Layout,
    epochs: Mutex<Epochs>,
}

/// What is known of the epochs so far.
#[derive(Debug, Default)]
struct Epochs {
    /// The first step of each epoch that was looked at, and of the one behind.
    starts: Vec<usize>,
    /// The last epoch asked for: steps are asked for one after the other.
    last: Option<(usize, Arc<Pass>)>,
}

impl Loader {
    /// A loader for the samples of some sources; `lengths` holds the tokens of every sample.
    pub fn new(shares: Vec<Share>, lengths: Vec<u32>, layout: Layout) -> Self {
        Self {
            shares,
            lengths,
            layout,
            epochs: Mutex::new(Epochs {
                starts: vec![0],
                last: None,
            }),
        }
    }

    /// A loader that sees each sample once.
    pub fn plain(lengths: Vec<u32>, layout: Layout) -> Self {
        let share = Share {
            samples: (0..lengths.len() as u32).collect(),
            weight: 1.0,
        };
        Self::new(vec![share], lengths, layout)
    }

    /// Steps of the first epoch; others may have some more or fewer when samples are packed and
    /// the weights of sources are no whole numbers.
    pub fn steps_per_epoch(&self) -> usize {
        self.steps_of(&self.epoch(0))
    }

    /// Steps of so many epochs.
    pub fn steps(&self, epochs: f64) -> usize {
        if !self.varies() {
            return (epochs * self.steps_per_epoch() as f64).ceil() as usize;
        }
        let whole: usize = (0..epochs as usize)
            .map(|e| self.steps_of(&self.epoch(e)))
            .sum();
        let rest = epochs.fract() * self.steps_of(&self.epoch(epochs as usize)) as f64;
        whole + rest.ceil() as usize
    }

    /// Steps of the whole run of a plan.
    pub fn total_steps(&self, plan: &Plan) -> usize {
        let by_epochs = || self.steps(plan.train.num_epochs);
        plan.train.max_steps.unwrap_or_else(by_epochs)
    }

    /// Whether epochs may differ in their number of rows.
    fn varies(&self) -> bool {
        let fractional = self.shares.iter().any(|share| share.weight.fract() != 0.0);
        match self.layout.packing {
            Packing::Off => false,
            Packing::On => fractional,
            Packing::Wrap => true,
        }
    }

    fn steps_of(&self, pass: &Pass) -> usize {
        pass.batches.len().div_ceil(self.layout.accumulation)
    }

    /// The rows of a step, counted from 0 over all epochs, and its micro-batches. None of them is
    /// empty; there are none only where there are no samples.
    pub fn step(&self, global_step: usize) -> (Arc<Pass>, std::ops::Range<usize>) {
        let Some((epoch, step)) = self.locate(global_step) else {
            return (Arc::default(), 0..0);
        };
        let pass = self.epoch(epoch);
        let start = step.saturating_mul(self.layout.accumulation);
        let end = start.saturating_add(self.layout.accumulation);
        let end = end.min(pass.batches.len());
        (pass, start..end)
    }

    /// The epoch of a step and its number in that epoch; `None` where epochs are empty.
    fn locate(&self, step: usize) -> Option<(usize, usize)> {
        if !self.varies() {
            let steps = self.steps_per_epoch();
            return (steps > 0).then(|| (step / steps, step % steps));
        }
        loop {
            let (known, end) = {
                let epochs = self.lock();
                let after = epochs.starts.partition_point(|start| *start <= step);
                if let Some(epoch) = after.checked_sub(1).filter(|_| after < epochs.starts.len()) {
                    return Some((epoch, step - epochs.starts[epoch]));
                }
                (epochs.starts.len() - 1, epochs.starts.last().copied()?)
            };
            let steps = self.steps_of(&self.epoch(known));
            if steps == 0 {
                return None;
            }
            let mut epochs = self.lock();
            if epochs.starts.len() == known + 1 {
                epochs.starts.push(end + steps);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Epochs> {
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rows and micro-batches of an epoch.
    pub fn epoch(&self, epoch: usize) -> Arc<Pass> {
        if let Some((kept, pass)) = &self.lock().last
            && *kept == epoch
        {
            return Arc::clone(pass);
        }
        let seed = self.layout.seed;
        let mut samples = Vec::with_capacity(self.lengths.len());
        for (source, share) in self.shares.iter().enumerate() {
            share.of_epoch(source, seed, epoch, &mut samples);
        }
        if self.layout.shuffle {
            let order = shuffle::permutation(samples.len(), seed, epoch as u64);
            samples = order.into_iter().map(|at| samples[at]).collect();
        }
        let pass = Arc::new(self.layout.pass(&samples, &self.lengths, epoch as u64));
        self.lock().last = Some((epoch, Arc::clone(&pass)));
        pass
    }
}
