//! Training rows read, tokenised and shuffled while training, in bounded memory.
//!
//! Rows are drawn in blocks of `data.shuffle_buffer` from all sources, each at a pace that brings
//! it to its end with the others; a block is tokenised, shuffled, packed and cut into micro-batches
//! as a dataset of its own. Where a run stands is then the beginning of its block in each source
//! and the micro-batches taken of it: a resumed run reads that block again and goes on with the
//! same batches.

use std::collections::VecDeque;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::batch::Batch;
use super::faults::{BadRows, DataError, RowFault, RowFaults};
use super::feed::{self, StepRows};
use super::ingest::SourceCounts;
use super::loader::{Layout, Pass};
use super::mask::trained;
use super::pipeline::{Outcome, Pipeline, Source, SourceReader};
use super::reader::Record;
use super::shuffle::{self, SplitMix64};
use super::{DataReport, Sample, SampleId};
use crate::random::finalize;
use crate::recipe::plan::{DataFormat, DataPlan, OnBadRow};

/// Where a streamed run stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes over the data that are done.
    pub epoch: u64,
    /// Blocks of this pass that are done.
    pub block: u64,
    /// Rows of each source that those had.
    pub rows: Vec<u64>,
    /// Micro-batches taken of the present block.
    pub taken: usize,
}

/// A source that is being read.
struct Tap<'a> {
    source: &'a Source,
    reader: SourceReader<'a>,
    /// Rows that were read and not drawn yet, with format and file.
    waiting: VecDeque<(Record, DataFormat, usize)>,
    drawn: u64,
    /// Bytes of its files: how large it is beside the others.
    size: f64,
    is_empty: bool,
}

impl<'a> Tap<'a> {
    fn new(source: &'a Source, skip: u64) -> Result<Self, DataError> {
        let mut reader = SourceReader::new(source);
        let drawn = reader.skip(skip)?;
        let sizes = source.files.iter();
        let sizes = sizes.map(|file| std::fs::metadata(file).map_or(0, |m| m.len()));
        Ok(Self {
            source,
            reader,
            waiting: VecDeque::new(),
            drawn,
            size: sizes.sum::<u64>().max(1) as f64,
            is_empty: false,
        })
    }

    /// Draws up to `count` rows.
    fn draw(&mut self, count: usize, into: &mut Vec<Drawn>) -> Result<(), DataError> {
        for _ in 0..count {
            if self.waiting.is_empty() {
                let Some(chunk) = self.reader.next_chunk()? else {
                    self.is_empty = true;
                    return Ok(());
                };
                let (format, file) = (chunk.format, chunk.file);
                let records = chunk.records.into_iter();
                self.waiting
                    .extend(records.map(|record| (record, format, file)));
            }
            let Some((record, format, file)) = self.waiting.pop_front() else {
                return Ok(());
            };
            into.push(Drawn {
                record,
                format,
                file,
                number: self.drawn,
            });
            self.drawn += 1;
        }
        Ok(())
    }
}

/// A row that belongs to the next block.
struct Drawn {
    record: Record,
    format: DataFormat,
    /// Index of the file in its source.
    file: usize,
    /// Index of the row in its source.
    number: u64,
}

/// Samples of one block, in micro-batches.
struct Block {
    samples: Vec<Sample>,
    pass: Pass,
}

/// Steps made of rows as they are read.
pub struct Stream<'a> {
    pipeline: Pipeline<'a>,
    sources: &'a [Source],
    layout: Layout,
    buffer: usize,
    on_bad_row: OnBadRow,
    vocab_size: usize,
    taps: Vec<Tap<'a>>,
    block: Option<Block>,
    /// Where the run stands.
    cursor: Cursor,
    /// Whether this pass gave any sample.
    gave: bool,
    /// Rows left out since somebody asked.
    skipped: RowFaults,
}

impl<'a> Stream<'a> {
    /// A stream that goes on at `cursor`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn new(
        plan: &DataPlan,
        pipeline: Pipeline<'a>,
        sources: &'a [Source],
        layout: Layout,
        vocab_size: usize,
        cursor: Cursor,
    ) -> Result<Self, DataError> {
        let mut stream = Self {
            pipeline,
            sources,
            layout,
            buffer: plan.shuffle_buffer.max(1),
            on_bad_row: plan.on_bad_row,
            vocab_size,
            taps: Vec::new(),
            block: None,
            cursor,
            gave: false,
            skipped: RowFaults::default(),
        };
        stream.cursor.rows.resize(sources.len(), 0);
        stream.gave = stream.cursor.block > 0 || stream.cursor.epoch > 0;
        stream.open()?;
        Ok(stream)
    }

    /// Where the run stands.
    pub fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// The rows left out since the last time.
    pub fn take_skipped(&mut self) -> RowFaults {
        std::mem::take(&mut self.skipped)
    }

    /// The micro-batches of the next step.
    ///
    /// # Errors
    /// A file cannot be read, or rows cannot be trained on.
    pub fn step(&mut self, pad_id: u32) -> Result<StepRows, DataError> {
        let mut step = StepRows::default();
        while step.batches.len() < self.layout.accumulation {
            self.fill()?;
            let Some(block) = &self.block else {
                continue;
            };
            let (batch, rows) = block.batch(self.cursor.taken, pad_id);
            step.batches.push(batch);
            step.rows.extend(rows);
            self.cursor.taken += 1;
        }
        Ok(step)
    }

    /// Sees that there is a block with a micro-batch to take.
    fn fill(&mut self) -> Result<(), DataError> {
        while self
            .block
            .as_ref()
            .is_none_or(|block| self.cursor.taken >= block.pass.batches.len())
        {
            if self.block.take().is_some() {
                self.cursor.block += 1;
                self.cursor.taken = 0;
                self.cursor.rows = self.taps.iter().map(|tap| tap.drawn).collect();
            }
            let block = self.next_block()?;
            if block.is_none() {
                self.next_epoch()?;
            }
            self.block = block;
        }
        Ok(())
    }

    fn open(&mut self) -> Result<(), DataError> {
        let taps = self.sources.iter().zip(&self.cursor.rows);
        self.taps = taps
            .map(|(source, rows)| Tap::new(source, *rows))
            .collect::<Result<_, _>>()?;
        Ok(())
    }

    fn next_epoch(&mut self) -> Result<(), DataError> {
        if !self.gave {
            return Err(DataError::EmptyStream);
        }
        self.gave = false;
        self.cursor = Cursor {
            epoch: self.cursor.epoch + 1,
            rows: vec![0; self.sources.len()],
            ..Cursor::default()
        };
        self.open()
    }

    /// The next block; `None` at the end of the data.
    fn next_block(&mut self) -> Result<Option<Block>, DataError> {
        let drawn = self.draw()?;
        if drawn.iter().all(Vec::is_empty) {
            return Ok(None);
        }
        let samples = self.samples(drawn)?;
        self.gave |= !samples.is_empty();
        let stream = (self.cursor.epoch << 32) ^ self.cursor.block;
        let mut order: Vec<u32> = (0..samples.len() as u32).collect();
        if self.layout.shuffle {
            let shuffled = shuffle::permutation(order.len(), self.layout.seed, stream);
            order = shuffled.into_iter().map(|at| at as u32).collect();
        }
        let lengths: Vec<u32> = samples.iter().map(|s| s.input_ids.len() as u32).collect();
        let pass = self.layout.pass(&order, &lengths, stream);
        Ok(Some(Block { samples, pass }))
    }

    /// Rows of each source for one block.
    ///
    /// A source draws until it has had its share of all rows, by size; what those that have ended
    /// do not take, the others do. So it depends on nothing but the cursor and the data.
    fn draw(&mut self) -> Result<Vec<Vec<Drawn>>, DataError> {
        let mut drawn: Vec<Vec<Drawn>> = self.taps.iter().map(|_| Vec::new()).collect();
        // A resumed run does not know either which have ended.
        self.taps.iter_mut().for_each(|tap| tap.is_empty = false);
        let mut wanted = self.buffer;
        loop {
            let open = || self.taps.iter().filter(|tap| !tap.is_empty);
            let size: f64 = open().map(|tap| tap.size).sum();
            let total = open().map(|tap| tap.drawn).sum::<u64>() + wanted as u64;
            if wanted == 0 || open().next().is_none() {
                return Ok(drawn);
            }
            let taps = self.taps.iter_mut().zip(&mut drawn);
            for (tap, into) in taps.filter(|(tap, _)| !tap.is_empty) {
                let goal = (total as f64 * tap.size / size).ceil() as u64;
                let missing = goal.saturating_sub(tap.drawn) as usize;
                let before = into.len();
                tap.draw(missing.min(wanted), into)?;
                wanted -= into.len() - before;
            }
        }
    }

    /// Tokenises the rows of a block, each as often as its source's weight says.
    fn samples(&mut self, drawn: Vec<Vec<Drawn>>) -> Result<Vec<Sample>, DataError> {
        let mut bad = BadRows::new(self.on_bad_row);
        let mut samples = Vec::new();
        for (number, (rows, tap)) in drawn.into_iter().zip(&self.taps).enumerate() {
            let outcomes: Vec<_> = rows
                .par_iter()
                .with_min_len(16)
                .map(|row| {
                    let file = &tap.source.files[row.file];
                    self.pipeline.row(&row.record, tap.source, row.format, file)
                })
                .collect();
            for (row, outcome) in rows.iter().zip(outcomes) {
                match outcome {
                    Ok(Outcome::Samples(list)) => {
                        if list.len() > 1 {
                            return Err(DataError::Preference);
                        }
                        for _ in 0..self.copies(number, tap.source.plan.weight, row.number) {
                            samples.extend(list.iter().cloned());
                        }
                    }
                    Ok(Outcome::Dropped | Outcome::Unlabelled) => {}
                    Err(reason) => bad.push(RowFault {
                        file: Arc::clone(&tap.source.files[row.file]),
                        place: row.record.place,
                        reason,
                    }),
                }
            }
        }
        self.skipped.append(bad.settle()?);
        self.within_vocabulary(&samples)?;
        Ok(samples)
    }

    /// How often this pass sees a row: whole weights exactly, the rest by chance.
    fn copies(&self, source: usize, weight: f64, row: u64) -> usize {
        let key = finalize(self.layout.seed ^ finalize(self.cursor.epoch))
            ^ finalize(source as u64).rotate_left(17)
            ^ row;
        let chance = (SplitMix64::new(key).next() >> 11) as f64 / (1u64 << 53) as f64;
        weight.floor() as usize + usize::from(chance < weight.fract())
    }

    fn within_vocabulary(&self, samples: &[Sample]) -> Result<(), DataError> {
        for sample in samples {
            let id = sample.input_ids.iter().copied().max().unwrap_or(0);
            if id as usize >= self.vocab_size {
                return Err(DataError::OutsideVocabulary {
                    row: sample.source.to_string(),
                    id,
                    vocab_size: self.vocab_size,
                });
            }
        }
        Ok(())
    }
}

impl Block {
    /// A micro-batch, and where its samples are from.
    fn batch(&self, number: usize, pad_id: u32) -> (Batch, Vec<SampleId>) {
        let rows = self.pass.batches[number].iter();
        let pieces = rows.flat_map(|row| self.pass.rows.row(*row as usize));
        let samples: Vec<Sample> = pieces
            .map(|piece| self.samples[piece.sample as usize].clone())
            .collect();
        let batch = feed::batch(&self.pass, number, &samples, pad_id);
        (
            batch,
            samples.into_iter().map(|sample| sample.source).collect(),
        )
    }
}

/// What the first block of a stream holds: all that is known of it before training.
///
/// # Errors
/// A file cannot be read, or rows cannot be trained on.
pub fn first_block(
    plan: &DataPlan,
    pipeline: Pipeline<'_>,
    sources: &[Source],
) -> Result<DataReport, DataError> {
    let layout = Layout {
        micro_batch: 1,
        accumulation: 1,
        seed: 0,
        shuffle: false,
        packing: plan.packing,
        max_seq_len: plan.max_seq_len,
        group_by_length: false,
    };
    let no_limit = usize::MAX;
    let mut stream = Stream::new(plan, pipeline, sources, layout, no_limit, Cursor::default())?;
    let drawn = stream.draw()?;
    let formats: Vec<DataFormat> = drawn
        .iter()
        .zip(sources)
        .map(|(rows, source)| rows.first().map_or(source.format, |row| row.format))
        .collect();
    let counts = drawn.iter().map(Vec::len).collect::<Vec<_>>();
    let samples = stream.samples(drawn)?;
    if samples.is_empty() {
        return Err(DataError::EmptyStream);
    }
    let skipped = stream.take_skipped();
    let sources = sources.iter().zip(&formats).zip(&counts);
    let sources = sources.map(|((source, format), rows)| SourceCounts {
        format: *format,
        rows: *rows,
        ..SourceCounts::new(source)
    });
    Ok(DataReport {
        rows: counts.iter().sum(),
        train_samples: samples.len(),
        validation_samples: 0,
        truncated: samples.iter().filter(|sample| sample.truncated).count(),
        dropped: 0,
        unlabelled: 0,
        bad_rows: skipped.count,
        bad_rows_shown: skipped.shown.iter().map(ToString::to_string).collect(),
        tokens: samples.iter().map(|s| s.input_ids.len()).sum(),
        trained_tokens: samples.iter().map(|s| trained(&s.labels)).sum(),
        longest: samples.iter().map(|s| s.input_ids.len()).max().unwrap_or(0),
        format: formats.first().copied().unwrap_or(plan.format),
        sources: sources.collect(),
        cached: false,
        not_kept: None,
        streaming: true,
    })
}
