//! What a run trains on, step by step: samples in a store, or rows as they are read.

use super::batch::{Batch, Segment, collate_rows};
use super::faults::{DataError, RowFaults};
use super::loader::{Layout, Loader, Pass};
use super::pipeline::Pipeline;
use super::stream::{Cursor, Stream};
use super::tokenize::ChatTokenizer;
use super::{Dataset, Sample, SampleId, Split};
use crate::recipe::Plan;

/// The micro-batches of one step.
#[derive(Debug, Default)]
pub struct StepRows {
    /// At most `gradient_accumulation_steps` of them, none of them empty.
    pub batches: Vec<Batch>,
    /// Where the samples in them are from.
    pub rows: Vec<SampleId>,
}

/// Gives a run its steps.
pub struct Feed<'a> {
    kind: Kind<'a>,
    pad_id: u32,
}

enum Kind<'a> {
    Stored { split: &'a Split, loader: Loader },
    Streamed(Box<Stream<'a>>),
}

impl<'a> Feed<'a> {
    /// The steps of a plan, from `cursor` on where they are streamed.
    ///
    /// # Errors
    /// A streamed file cannot be read.
    pub fn new(
        plan: &Plan,
        dataset: &'a Dataset,
        tokenizer: &'a ChatTokenizer,
        vocab_size: usize,
        cursor: Option<Cursor>,
    ) -> Result<Self, DataError> {
        let layout = Layout::training(plan);
        let kind = match &dataset.stream {
            None => Kind::Stored {
                split: &dataset.train,
                loader: loader(plan, &dataset.train),
            },
            Some(sources) => {
                let pipeline = Pipeline::new(&plan.data, tokenizer);
                let cursor = cursor.unwrap_or_default();
                let stream =
                    Stream::new(&plan.data, pipeline, sources, layout, vocab_size, cursor)?;
                Kind::Streamed(Box::new(stream))
            }
        };
        Ok(Self {
            kind,
            pad_id: pad_id(tokenizer, vocab_size),
        })
    }

    /// The rows of a step, counted from 0; a stream gives whichever is next.
    ///
    /// # Errors
    /// A streamed file cannot be read, or its rows cannot be trained on.
    pub fn step(&mut self, step: usize) -> Result<StepRows, DataError> {
        match &mut self.kind {
            Kind::Streamed(stream) => stream.step(self.pad_id),
            Kind::Stored { split, loader } => {
                let (pass, numbers) = loader.step(step);
                let mut rows = StepRows::default();
                for number in numbers {
                    let samples = samples(split, &pass, number);
                    rows.batches
                        .push(batch(&pass, number, &samples, self.pad_id));
                    rows.rows
                        .extend(samples.into_iter().map(|sample| sample.source));
                }
                Ok(rows)
            }
        }
    }

    /// Steps in one pass over the data; `None` where the data are streamed.
    pub fn steps_per_epoch(&self) -> Option<usize> {
        match &self.kind {
            Kind::Stored { loader, .. } => Some(loader.steps_per_epoch()),
            Kind::Streamed(_) => None,
        }
    }

    /// Steps of the whole run of a plan; a stream has no other end than `max_steps`.
    pub fn total_steps(&self, plan: &Plan) -> usize {
        match &self.kind {
            Kind::Stored { loader, .. } => loader.total_steps(plan),
            Kind::Streamed(_) => plan.train.max_steps.unwrap_or(0),
        }
    }

    /// Passes over the data after this many steps.
    pub fn epoch(&self, steps: usize) -> f64 {
        match &self.kind {
            Kind::Stored { loader, .. } => steps as f64 / loader.steps_per_epoch().max(1) as f64,
            Kind::Streamed(stream) => stream.cursor().epoch as f64,
        }
    }

    /// Where a stream stands; `None` where the step says it all.
    pub fn cursor(&self) -> Option<Cursor> {
        match &self.kind {
            Kind::Stored { .. } => None,
            Kind::Streamed(stream) => Some(stream.cursor().clone()),
        }
    }

    /// Rows that the stream left out since the last time.
    pub fn take_skipped(&mut self) -> RowFaults {
        match &mut self.kind {
            Kind::Stored { .. } => RowFaults::default(),
            Kind::Streamed(stream) => stream.take_skipped(),
        }
    }
}

/// The order of the training samples.
pub fn loader(plan: &Plan, train: &Split) -> Loader {
    Loader::new(train.shares(), train.lengths(), Layout::training(plan))
}

/// Every sample of a split once, for measuring.
pub fn once<'a>(
    plan: &Plan,
    split: &'a Split,
    tokenizer: &ChatTokenizer,
    vocab_size: usize,
) -> impl Iterator<Item = Batch> + 'a {
    let pass = Loader::plain(split.lengths(), Layout::evaluation(plan)).epoch(0);
    let pad_id = pad_id(tokenizer, vocab_size);
    (0..pass.batches.len()).map(move |number| {
        let samples = samples(split, &pass, number);
        batch(&pass, number, &samples, pad_id)
    })
}

/// Pads carry no label and are seen by no real token: any id of the vocabulary will do.
fn pad_id(tokenizer: &ChatTokenizer, vocab_size: usize) -> u32 {
    let pad = tokenizer.pad_id();
    if (pad as usize) < vocab_size { pad } else { 0 }
}

/// The samples of a micro-batch, one for each piece.
fn samples(split: &Split, pass: &Pass, number: usize) -> Vec<Sample> {
    let rows = pass.batches[number].iter();
    let pieces = rows.flat_map(|row| pass.rows.row(*row as usize));
    pieces
        .map(|piece| split.get(piece.sample as usize))
        .collect()
}

/// One micro-batch of a pass, of the samples that belong to its pieces.
pub(super) fn batch(pass: &Pass, number: usize, samples: &[Sample], pad_id: u32) -> Batch {
    let mut samples = samples.iter();
    let rows: Vec<Vec<Segment<'_>>> = pass.batches[number]
        .iter()
        .map(|row| {
            let pieces = pass.rows.row(*row as usize).iter().zip(&mut samples);
            pieces
                .map(|(piece, sample)| Segment {
                    input_ids: &sample.input_ids[piece.from as usize..piece.to as usize],
                    labels: &sample.labels[piece.from as usize..piece.to as usize],
                })
                .collect()
        })
        .collect();
    collate_rows(&rows, pad_id)
}
