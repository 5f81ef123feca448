//! Dataset rows become token ids with labels, then batches.
//!
//! [`source`] reads rows, [`conversation`] gives them one form, [`template`] renders them with the
//! model's chat template (`generation` finds what the assistant wrote, [`python`] writes values as
//! templates expect), [`tokenize`] turns text into ids (its files are read in `tokenizer_files`, or
//! made from GGUF in `vocabulary`), [`mask`] decides which ids train, [`loader`] shuffles
//! ([`shuffle`]) and pads. [`faults`] says what is wrong with a dataset. This module imports no burn.

pub mod conversation;
pub mod faults;
mod generation;
pub mod loader;
pub mod mask;
pub mod python;
pub mod shuffle;
pub mod source;
pub mod template;
pub mod tokenize;
mod tokenizer_files;
mod vocabulary;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

pub use faults::DataError;

use self::conversation::{detect, row};
use self::faults::{BadRows, RowError, RowFault};
use self::mask::MaskOptions;
use self::source::{Reader, Record};
use self::tokenize::ChatTokenizer;
use crate::recipe::plan::{DataFormat, DataPlan};

/// The label of a token that does not train.
pub const IGNORE_INDEX: i32 = -100;

/// Where a sample is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleId {
    /// The file.
    pub file: Arc<Path>,
    /// Line of the row's beginning, from 1.
    pub line: usize,
}

impl std::fmt::Display for SampleId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// One row, ready to train on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// `[T]`
    pub input_ids: Vec<u32>,
    /// `[T]`; the id where it trains, [`IGNORE_INDEX`] where not. Not shifted.
    pub labels: Vec<i32>,
    /// Where it is from.
    pub source: SampleId,
    /// Whether it was longer than `max_seq_len`.
    pub truncated: bool,
}

/// A dataset, tokenised.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Samples to train on, in the order of the files.
    pub train: Vec<Sample>,
    /// Samples held out, in the order of the files; empty where the recipe asks for none.
    pub validation: Vec<Sample>,
    /// What happened on the way.
    pub report: DataReport,
}

/// What a user should know about a dataset before training on it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DataReport {
    /// Rows read from all files.
    pub rows: usize,
    /// Samples to train on.
    pub train_samples: usize,
    /// Samples held out.
    pub validation_samples: usize,
    /// Samples cut to `max_seq_len`, of both splits.
    pub truncated: usize,
    /// Rows left out because truncation cut off all that would train, of both splits.
    pub dropped: usize,
    /// Tokens of the training samples.
    pub tokens: usize,
    /// Those of them that train.
    pub trained_tokens: usize,
    /// Tokens of the longest sample of both splits.
    pub longest: usize,
    /// The format of the first training file, as named or detected.
    pub format: DataFormat,
}

/// Reads, checks, tokenises and splits the dataset of a recipe. The same seed gives the same split.
///
/// `position_limit` is how many tokens the model has positions for.
///
/// # Errors
/// See [`DataError`]; bad rows are counted, and the first ten are shown.
pub fn load(
    plan: &DataPlan,
    seed: u64,
    tokenizer: &ChatTokenizer,
    position_limit: usize,
) -> Result<Dataset, DataError> {
    if plan.max_seq_len > position_limit {
        return Err(DataError::LongerThanModel {
            max_seq_len: plan.max_seq_len,
            position_limit,
        });
    }
    let mut train = prepare(&plan.train, plan, tokenizer)?;
    train.check("training", plan)?;
    let (mut rows, mut dropped) = (train.rows, train.dropped);
    let validation = if !plan.validation.is_empty() {
        let held_out = prepare(&plan.validation, plan, tokenizer)?;
        held_out.check("validation", plan)?;
        rows += held_out.rows;
        dropped += held_out.dropped;
        held_out.samples
    } else if plan.validation_fraction > 0.0 {
        split(&mut train.samples, plan.validation_fraction, seed)?
    } else {
        Vec::new()
    };
    let both = || train.samples.iter().chain(&validation);
    let report = DataReport {
        rows,
        train_samples: train.samples.len(),
        validation_samples: validation.len(),
        truncated: both().filter(|s| s.truncated).count(),
        dropped,
        tokens: train.samples.iter().map(|s| s.input_ids.len()).sum(),
        trained_tokens: train.samples.iter().map(|s| mask::trained(&s.labels)).sum(),
        longest: both().map(|s| s.input_ids.len()).max().unwrap_or(0),
        format: train.format,
    };
    Ok(Dataset {
        train: train.samples,
        validation,
        report,
    })
}

/// The samples of some files.
struct Prepared {
    samples: Vec<Sample>,
    rows: usize,
    dropped: usize,
    format: DataFormat,
}

impl Prepared {
    fn check(&self, split: &'static str, plan: &DataPlan) -> Result<(), DataError> {
        if self.samples.is_empty() {
            return Err(DataError::NothingLeft {
                split,
                dropped: self.dropped,
                max_seq_len: plan.max_seq_len,
            });
        }
        Ok(())
    }
}

fn prepare(
    files: &[PathBuf],
    plan: &DataPlan,
    tokenizer: &ChatTokenizer,
) -> Result<Prepared, DataError> {
    let mut prepared = Prepared {
        samples: Vec::new(),
        rows: 0,
        dropped: 0,
        format: plan.format,
    };
    let mut bad = BadRows::default();
    for path in files {
        prepare_file(path, plan, tokenizer, &mut prepared, &mut bad)?;
    }
    if bad.count > 0 {
        return Err(DataError::BadRows(bad));
    }
    if prepared.rows == 0 {
        return Err(DataError::Empty {
            files: files.to_owned(),
        });
    }
    Ok(prepared)
}

fn prepare_file(
    path: &Path,
    plan: &DataPlan,
    tokenizer: &ChatTokenizer,
    prepared: &mut Prepared,
    bad: &mut BadRows,
) -> Result<(), DataError> {
    let file: Arc<Path> = path.into();
    let options = MaskOptions {
        max_seq_len: plan.max_seq_len,
        train_on_inputs: plan.train_on_inputs,
    };
    let mut reader = Reader::open(path)?;
    let mut format = plan.format;
    loop {
        let batch = reader.next_batch()?;
        let Some(first) = batch.first() else {
            return Ok(());
        };
        if format == DataFormat::Auto {
            // A first row that tells nothing is reported below, with all others.
            if let Ok(detected) = source::parse(&first.bytes).and_then(|row| detect(&row)) {
                format = detected;
            }
            if prepared.format == DataFormat::Auto {
                prepared.format = format;
            }
        }
        let sample = |record: &Record| -> Result<Option<Sample>, RowError> {
            let row = row(
                source::parse(&record.bytes)?,
                format,
                tokenizer.has_template(),
            )?;
            let id = SampleId {
                file: Arc::clone(&file),
                line: record.line,
            };
            mask::sample(&row, tokenizer, options, id)
        };
        let samples: Vec<_> = batch.par_iter().map(sample).collect();
        prepared.rows += samples.len();
        for (record, sample) in batch.iter().zip(samples) {
            match sample {
                Ok(Some(sample)) => prepared.samples.push(sample),
                Ok(None) => prepared.dropped += 1,
                Err(reason) => bad.push(RowFault {
                    file: Arc::clone(&file),
                    line: record.line,
                    reason,
                }),
            }
        }
    }
}

/// Takes a share of the samples out, at least one, and leaves at least one.
fn split(samples: &mut Vec<Sample>, fraction: f64, seed: u64) -> Result<Vec<Sample>, DataError> {
    let count = samples.len();
    if count < 2 {
        return Err(DataError::TooFewToSplit { rows: count });
    }
    let wanted = (count as f64 * fraction).round() as usize;
    let mut is_held_out = vec![false; count];
    let order = shuffle::permutation(count, seed, shuffle::SPLIT_STREAM);
    for i in &order[..wanted.clamp(1, count - 1)] {
        is_held_out[*i] = true;
    }
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for (sample, is_held_out) in std::mem::take(samples).into_iter().zip(is_held_out) {
        if is_held_out {
            held_out.push(sample);
        } else {
            train.push(sample);
        }
    }
    *samples = train;
    Ok(held_out)
}
