//! Dataset rows become token ids with labels, then batches.
//!
//! [`source`] finds the files and [`reader`] reads their rows, whatever kind of file they stand in.
//! [`conversation`] gives rows one form, [`template`] renders them with a chat template,
//! [`mod@tokenize`] turns text into ids, [`mask`] decides which ids train, and [`contract`] checks
//! that what trains is what generation needs. [`pipeline`] does all that for a source on all cores;
//! [`ingest`] keeps what comes out in a [`store`] on disk, named by a [`fingerprint`] of what it is
//! made from and kept in the [`cache`].
//!
//! [`loader`] puts samples in order ([`shuffle`]), packs them into rows ([`pack`]) and cuts those
//! into steps, or [`stream`] does so while it reads; [`feed`] is either, and [`batch`] what it
//! gives. [`preview`] and [`stats`] show a dataset to people. [`faults`] says what is wrong with
//! one (`row_error` with a row of it). This module imports no burn.

pub mod batch;
pub mod cache;
pub mod contract;
pub mod conversation;
pub mod faults;
pub mod feed;
pub mod fingerprint;
pub mod ingest;
pub mod loader;
pub mod mask;
pub mod pack;
pub mod pipeline;
pub mod preview;
pub mod reader;
mod row_error;
pub mod shuffle;
pub mod source;
pub mod stats;
pub mod store;
pub mod stream;
pub mod template;
pub mod tokenize;

use std::path::Path;
use std::sync::Arc;

pub use faults::DataError;

use self::cache::Cache;
use self::fingerprint::Look;
use self::ingest::{Ingest, Meta, SourceCounts, Tokenised};
use self::loader::Share;
use self::pipeline::{Pipeline, Source};
use self::reader::Place;
use self::store::{Entry, Store};
use self::tokenize::ChatTokenizer;
use crate::hub;
use crate::recipe::plan::{DataFormat, DataPlan, SourcePlan};

/// The label of a token that does not train.
pub const IGNORE_INDEX: i32 = -100;

/// Where a sample is from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SampleId {
    /// The file.
    pub file: Arc<Path>,
    /// Where the row stands in it.
    pub place: Place,
}

impl std::fmt::Display for SampleId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.place)
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

/// Samples to train on or to measure.
#[derive(Debug, Clone, Default)]
pub struct Split {
    store: Option<Arc<Store>>,
    /// Indices in the store.
    samples: Vec<u32>,
    /// The source of each file of the store, and its weight.
    files: Arc<[(usize, f64)]>,
}

impl Split {
    fn all(tokenised: &Tokenised, sources: &[Source]) -> Self {
        let files = sources.iter().enumerate().flat_map(|(i, source)| {
            let weight = source.plan.weight;
            source.files.iter().map(move |_| (i, weight))
        });
        Self {
            samples: (0..tokenised.store.len() as u32).collect(),
            store: Some(Arc::clone(&tokenised.store)),
            files: files.collect(),
        }
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Reads a sample.
    ///
    /// # Panics
    /// There is no such sample.
    pub fn get(&self, i: usize) -> Sample {
        self.store().get(self.samples[i] as usize)
    }

    /// All samples, in the order of the files.
    pub fn iter(&self) -> impl Iterator<Item = Sample> {
        (0..self.len()).map(|i| self.get(i))
    }

    /// What is known of each sample.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        self.samples.iter().map(|i| self.store().entry(*i as usize))
    }

    /// Tokens of each sample.
    pub fn lengths(&self) -> Vec<u32> {
        self.entries().map(|entry| entry.tokens).collect()
    }

    /// The samples of each source, with its weight.
    pub fn shares(&self) -> Vec<Share> {
        let mut shares: Vec<Share> = Vec::new();
        for (i, entry) in self.entries().enumerate() {
            let (source, weight) = self
                .files
                .get(entry.file as usize)
                .copied()
                .unwrap_or((0, 1.0));
            while shares.len() <= source {
                let samples = Vec::new();
                shares.push(Share { samples, weight });
            }
            shares[source].weight = weight;
            shares[source].samples.push(i as u32);
        }
        shares
    }

    fn store(&self) -> &Store {
        // A split without a store has no samples to ask for.
        self.store.as_deref().unwrap_or(&store::EMPTY)
    }
}

/// A dataset, tokenised.
#[derive(Debug)]
pub struct Dataset {
    /// Samples to train on; none where they are streamed.
    pub train: Split,
    /// Where samples are streamed from.
    pub stream: Option<Vec<Source>>,
    /// Samples held out; none where the recipe asks for none.
    pub validation: Split,
    /// What happened on the way.
    pub report: DataReport,
    /// Identifies the samples.
    pub key: String,
}

/// What a user should know about a dataset before training on it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct DataReport {
    /// Rows read from all files; of the first block, where the data are streamed.
    pub rows: usize,
    /// Samples to train on.
    pub train_samples: usize,
    /// Samples held out.
    pub validation_samples: usize,
    /// Samples cut to `max_seq_len`, of both splits.
    pub truncated: usize,
    /// Rows left out for their length: truncation cut off all that would train, or `truncate:
    /// drop`. Of both splits.
    pub dropped: usize,
    /// Rows left out because nothing in them trains (`waive: [labels]`). Of both splits.
    pub unlabelled: usize,
    /// Rows left out because they cannot be read (`on_bad_row: skip`). Of both splits.
    pub bad_rows: usize,
    /// The first of them.
    pub bad_rows_shown: Vec<String>,
    /// Tokens of the training samples.
    pub tokens: usize,
    /// Those of them that train.
    pub trained_tokens: usize,
    /// Tokens of the longest sample of both splits.
    pub longest: usize,
    /// The format of the first training file, as named or detected.
    pub format: DataFormat,
    /// What each training source gave.
    pub sources: Vec<SourceCounts>,
    /// Whether nothing had to be tokenised.
    pub cached: bool,
    /// Why the samples are not kept for the next run, where they should be.
    pub not_kept: Option<String>,
    /// Whether rows are read while training.
    pub streaming: bool,
}

/// Tells of the work before training; called often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A file of the hub arrives.
    Download(hub::Progress),
    /// Rows are tokenised.
    Tokenise {
        /// Rows so far.
        rows: usize,
        /// Tokens so far.
        tokens: usize,
    },
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
    progress: &mut dyn FnMut(Progress),
) -> Result<Dataset, DataError> {
    if plan.max_seq_len > position_limit {
        return Err(DataError::LongerThanModel {
            max_seq_len: plan.max_seq_len,
            position_limit,
        });
    }
    let mut loading = Loading {
        plan,
        pipeline: Pipeline::new(plan, tokenizer),
        cache: Cache::of(plan),
        progress,
    };
    let sources = loading.find(&plan.train)?;
    if plan.streaming {
        return loading.streamed(sources);
    }
    let (train, key) = loading.tokenise(&sources, "training")?;
    let mut dataset = Dataset {
        train: Split::all(&train, &sources),
        stream: None,
        validation: Split::default(),
        report: report(&train),
        key,
    };
    if !plan.validation.is_empty() {
        loading.validation(&mut dataset)?;
    } else if plan.validation_fraction > 0.0 {
        split(&mut dataset, plan.validation_fraction, seed)?;
    }
    dataset.count();
    Ok(dataset)
}

impl Dataset {
    /// Counts the samples of both splits.
    fn count(&mut self) {
        let report = &mut self.report;
        report.train_samples = self.train.len();
        report.validation_samples = self.validation.len();
        for entry in self.train.entries() {
            report.tokens += entry.tokens as usize;
            report.trained_tokens += entry.trained as usize;
        }
        for entry in self.train.entries().chain(self.validation.entries()) {
            report.truncated += usize::from(entry.is_truncated());
            report.longest = report.longest.max(entry.tokens as usize);
        }
    }

    /// Whether there are preference pairs among the samples.
    pub fn holds_pairs(&self) -> bool {
        let mut entries = self.train.entries().chain(self.validation.entries());
        entries.any(|entry| entry.is_rejected())
    }

    /// The first sample with an id that a vocabulary of this size does not have.
    pub fn outside(&self, vocab_size: usize) -> Option<(u32, SampleId)> {
        let splits = [&self.train, &self.validation].into_iter();
        splits
            .filter_map(|split| split.store.as_deref())
            .find_map(|store| {
                let (id, at) = Meta::read(store).largest_id?;
                (id as usize >= vocab_size).then(|| (id, store.get(at as usize).source))
            })
    }
}

/// What loading works with.
struct Loading<'a> {
    plan: &'a DataPlan,
    pipeline: Pipeline<'a>,
    cache: Option<Cache>,
    progress: &'a mut dyn FnMut(Progress),
}

impl Loading<'_> {
    fn find(&mut self, sources: &[SourcePlan]) -> Result<Vec<Source>, DataError> {
        let progress = &mut *self.progress;
        source::find(sources, self.plan.format, &mut |event| {
            progress(Progress::Download(event));
        })
    }

    /// The samples of some sources, and what identifies them.
    fn tokenise(
        &mut self,
        sources: &[Source],
        split: &'static str,
    ) -> Result<(Tokenised, String), DataError> {
        let tokenizer = self.pipeline.masker.tokenizer;
        let before = ingest::stamps(sources);
        let key = fingerprint::key(self.plan, sources, tokenizer, Look::Whole)?;
        let mut ingest = Ingest {
            pipeline: &self.pipeline,
            sources,
            before,
            on_bad_row: self.plan.on_bad_row,
            progress: self.progress,
        };
        let cache = self.cache.as_ref();
        let tokenised = ingest.run(cache.map(|cache| (cache, key.as_str())))?;
        let Meta { rows, dropped, .. } = tokenised.meta;
        if rows == 0 {
            let files = sources.iter().flat_map(|source| &source.files);
            return Err(DataError::Empty {
                files: files.map(|file| file.to_path_buf()).collect(),
            });
        }
        if tokenised.store.is_empty() {
            return Err(DataError::NothingLeft {
                split,
                dropped,
                other: rows - dropped,
                max_seq_len: self.plan.max_seq_len,
            });
        }
        Ok((tokenised, key))
    }

    /// Adds the samples of `data.validation`.
    fn validation(&mut self, dataset: &mut Dataset) -> Result<(), DataError> {
        let sources = self.find(&self.plan.validation)?;
        let (held_out, key) = self.tokenise(&sources, "validation")?;
        dataset.validation = Split::all(&held_out, &sources);
        dataset.key += &key;
        let (report, meta) = (&mut dataset.report, held_out.meta);
        report.rows += meta.rows;
        report.dropped += meta.dropped;
        report.unlabelled += meta.unlabelled;
        report.bad_rows += meta.bad_rows;
        report.bad_rows_shown.extend(meta.bad_rows_shown);
        report.cached &= held_out.cached;
        Ok(())
    }

    /// A dataset whose training rows are read while training: the first block is looked at now.
    fn streamed(mut self, sources: Vec<Source>) -> Result<Dataset, DataError> {
        let tokenizer = self.pipeline.masker.tokenizer;
        let key = fingerprint::key(self.plan, &sources, tokenizer, Look::Ends)?;
        let pipeline = Pipeline::new(self.plan, tokenizer);
        let report = stream::first_block(self.plan, pipeline, &sources)?;
        let mut dataset = Dataset {
            train: Split::default(),
            stream: Some(sources),
            validation: Split::default(),
            report,
            key,
        };
        if !self.plan.validation.is_empty() {
            self.validation(&mut dataset)?;
        }
        let (samples, longest) = (dataset.report.train_samples, dataset.report.longest);
        dataset.count();
        dataset.report.train_samples = samples;
        dataset.report.longest = longest.max(dataset.report.longest);
        Ok(dataset)
    }
}

fn report(train: &Tokenised) -> DataReport {
    let meta = &train.meta;
    DataReport {
        rows: meta.rows,
        train_samples: 0,
        validation_samples: 0,
        truncated: 0,
        dropped: meta.dropped,
        unlabelled: meta.unlabelled,
        bad_rows: meta.bad_rows,
        bad_rows_shown: meta.bad_rows_shown.clone(),
        tokens: 0,
        trained_tokens: 0,
        longest: 0,
        format: meta.format(),
        sources: meta.sources.clone(),
        cached: train.cached,
        not_kept: train.not_kept.clone(),
        streaming: false,
    }
}

/// Takes a share of the samples out, at least one, and leaves at least one.
fn split(dataset: &mut Dataset, fraction: f64, seed: u64) -> Result<(), DataError> {
    let count = dataset.train.len();
    if count < 2 {
        return Err(DataError::TooFewToSplit { rows: count });
    }
    let wanted = (count as f64 * fraction).round() as usize;
    let mut is_held_out = vec![false; count];
    let order = shuffle::permutation(count, seed, shuffle::SPLIT_STREAM);
    for i in &order[..wanted.clamp(1, count - 1)] {
        is_held_out[*i] = true;
    }
    let all = std::mem::take(&mut dataset.train.samples);
    let (held_out, train) = all.into_iter().partition(|i| is_held_out[*i as usize]);
    dataset.validation = Split {
        samples: held_out,
        ..dataset.train.clone()
    };
    dataset.train.samples = train;
    Ok(())
}
