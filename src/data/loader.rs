//! Puts samples in order, cuts the order into steps and micro-batches, and pads.
//!
//! What a step trains on is a function of its number, so a resumed run needs no cursor. Every
//! epoch holds each sample exactly once; its last step may be short.

use std::sync::{Arc, Mutex, PoisonError};

use super::{IGNORE_INDEX, Sample, shuffle};

/// The order of a run.
#[derive(Debug)]
pub struct Loader {
    samples: usize,
    micro_batch: usize,
    step_samples: usize,
    seed: u64,
    shuffle: bool,
    /// Epoch of the last step asked for, with its order: steps are asked for one after the other.
    order: Mutex<Option<(usize, Arc<[usize]>)>>,
}

impl Loader {
    /// A loader for samples `0..n_samples`, in micro-batches of `micro_batch`, `accum` of which
    /// make a step. With `shuffle`, epoch e is shuffled by `(seed, e)`.
    pub fn new(
        n_samples: usize,
        micro_batch: usize,
        accum: usize,
        seed: u64,
        shuffle: bool,
    ) -> Self {
        let micro_batch = micro_batch.max(1);
        Self {
            samples: n_samples,
            micro_batch,
            step_samples: micro_batch.saturating_mul(accum.max(1)),
            seed,
            shuffle,
            order: Mutex::new(None),
        }
    }

    /// Steps in which each sample is seen once.
    pub fn steps_per_epoch(&self) -> usize {
        self.samples.div_ceil(self.step_samples)
    }

    /// The sample indices of each micro-batch of a step, counted from 0 over all epochs. None of
    /// them is empty; there are none only where there are no samples.
    pub fn step(&self, global_step: usize) -> Vec<Vec<usize>> {
        let steps = self.steps_per_epoch();
        if steps == 0 {
            return Vec::new();
        }
        let order = self.order(global_step / steps);
        let start = (global_step % steps) * self.step_samples;
        let end = start.saturating_add(self.step_samples).min(self.samples);
        let chunks = order[start..end].chunks(self.micro_batch);
        chunks.map(<[usize]>::to_vec).collect()
    }

    fn order(&self, epoch: usize) -> Arc<[usize]> {
        let mut kept = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((e, order)) if *e == epoch => Arc::clone(order),
            _ => {
                let order: Arc<[usize]> = if self.shuffle {
                    shuffle::permutation(self.samples, self.seed, epoch as u64).into()
                } else {
                    (0..self.samples).collect()
                };
                *kept = Some((epoch, Arc::clone(&order)));
                order
            }
        }
    }
}

/// Samples of one forward pass, padded on the right to the longest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// B, rows.
    pub batch: usize,
    /// T, tokens a row.
    pub tokens: usize,
    /// `[B * T]`
    pub input_ids: Vec<i32>,
    /// `[B * T]`; label i belongs to token i, the loss shifts. Pads have [`IGNORE_INDEX`].
    pub labels: Vec<i32>,
    /// `[B]`, tokens without pads.
    pub lengths: Vec<usize>,
}

/// Puts samples into one batch.
pub fn collate(samples: &[&Sample], pad_id: u32) -> Batch {
    let lengths: Vec<usize> = samples.iter().map(|s| s.input_ids.len()).collect();
    let tokens = lengths.iter().copied().max().unwrap_or(0);
    let pad = pad_id as i32;
    let mut input_ids = Vec::with_capacity(samples.len() * tokens);
    let mut labels = Vec::with_capacity(samples.len() * tokens);
    for (row, sample) in samples.iter().enumerate() {
        input_ids.extend(sample.input_ids.iter().map(|id| *id as i32));
        input_ids.resize((row + 1) * tokens, pad);
        labels.extend_from_slice(&sample.labels);
        labels.resize((row + 1) * tokens, IGNORE_INDEX);
    }
    Batch {
        batch: samples.len(),
        tokens,
        input_ids,
        labels,
        lengths,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::SampleId;

    #[test]
    fn the_last_step_of_an_epoch_is_short_and_never_empty() {
        let loader = Loader::new(7, 2, 2, 0, false);
        assert_eq!(loader.steps_per_epoch(), 2);
        assert_eq!(loader.step(0), [[0, 1], [2, 3]]);
        assert_eq!(loader.step(1), [vec![4, 5], vec![6]]);
        assert_eq!(loader.step(2), loader.step(0));
        assert!(Loader::new(0, 2, 2, 0, true).step(5).is_empty());
        assert_eq!(Loader::new(3, usize::MAX, 2, 0, false).step(9), [[0, 1, 2]]);
    }

    #[test]
    fn short_rows_are_padded_on_the_right_without_labels() {
        let sample = |ids: &[u32]| Sample {
            input_ids: ids.to_vec(),
            labels: ids.iter().map(|id| *id as i32).collect(),
            source: SampleId {
                file: std::path::Path::new("x").into(),
                line: 1,
            },
            truncated: false,
        };
        let batch = collate(&[&sample(&[1]), &sample(&[2, 3])], 9);
        assert_eq!((batch.batch, batch.tokens), (2, 2));
        assert_eq!(batch.input_ids, [1, 9, 2, 3]);
        assert_eq!(batch.labels, [1, IGNORE_INDEX, 2, 3]);
        assert_eq!(batch.lengths, [1, 2]);
    }
}
