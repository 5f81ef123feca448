//! Runs sources through the pipeline into a store: from the cache where it is there, else onto
//! the disk, else into memory.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::Progress;
use super::cache::Cache;
use super::faults::{BadRows, DataError, RowFault};
use super::pipeline::{Chunk, Done, Outcome, Pipeline, Source};
use super::store::{Store, StoreWriter};
use crate::recipe::plan::{DataFormat, OnBadRow};

/// What is known of all samples of a store together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Rows read.
    pub rows: usize,
    /// Rows left out for their length.
    pub dropped: usize,
    /// Rows left out because nothing in them trains.
    pub unlabelled: usize,
    /// Rows left out because they cannot be read.
    pub bad_rows: usize,
    /// The first of them.
    pub bad_rows_shown: Vec<String>,
    /// What each source gave.
    pub sources: Vec<SourceCounts>,
    /// The largest id and the index of its first sample.
    pub largest_id: Option<(u32, u64)>,
}

impl Meta {
    /// What a store says of itself; nothing where it is from elsewhere.
    pub fn read(store: &Store) -> Self {
        serde_json::from_slice(store.meta()).unwrap_or_default()
    }

    /// The format of the first source.
    pub fn format(&self) -> DataFormat {
        self.sources
            .first()
            .map_or(DataFormat::Auto, |source| source.format)
    }
}

/// What one source gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceCounts {
    /// Its path in the recipe.
    pub path: String,
    /// The format of its first file.
    pub format: DataFormat,
    /// Rows read.
    pub rows: usize,
    /// Samples.
    pub samples: usize,
    /// Tokens of the samples.
    pub tokens: usize,
}

impl SourceCounts {
    /// Nothing yet.
    pub fn new(source: &Source) -> Self {
        Self {
            path: source.plan.path.clone(),
            format: source.format,
            rows: 0,
            samples: 0,
            tokens: 0,
        }
    }
}

/// A store with what is known of it.
#[derive(Debug)]
pub struct Tokenised {
    /// The samples.
    pub store: Arc<Store>,
    /// What is known of them.
    pub meta: Meta,
    /// Whether they were there already.
    pub cached: bool,
    /// Why they are not kept, where they should be.
    pub not_kept: Option<String>,
}

/// Why a store was not written.
enum Stop {
    Data(DataError),
    Write(io::Error),
}

impl From<DataError> for Stop {
    fn from(error: DataError) -> Self {
        Self::Data(error)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

/// Sources on their way into a store.
pub struct Ingest<'a, 'p> {
    /// Makes samples.
    pub pipeline: &'a Pipeline<'p>,
    /// Where rows are from.
    pub sources: &'a [Source],
    /// [`stamps`] of the files, from before they were looked at for the first time.
    pub before: Vec<Option<(u64, SystemTime)>>,
    /// What becomes of rows that cannot be read.
    pub on_bad_row: OnBadRow,
    /// Told how far it is.
    pub progress: &'a mut dyn FnMut(Progress),
}

impl Ingest<'_, '_> {
    /// Tokenises the sources, or finds them tokenised in a cache under a key.
    ///
    /// Where the cache cannot be written the samples are held in memory, and it is said why.
    ///
    /// # Errors
    /// A file cannot be read or changes meanwhile, or rows cannot be trained on.
    pub fn run(&mut self, cache: Option<(&Cache, &str)>) -> Result<Tokenised, DataError> {
        let mut not_kept = None;
        if let Some((cache, key)) = cache {
            if let Some(store) = cache.find(key) {
                return Ok(self.tokenised(store, true, None));
            }
            match self.write_cache(cache, key) {
                Ok(store) => return Ok(self.tokenised(store, false, None)),
                Err(Stop::Data(error)) => return Err(error),
                Err(Stop::Write(error)) => {
                    not_kept = Some(format!("{}: {error}", cache.dir().display()));
                }
            }
        }
        match self.write_memory() {
            Ok(store) => Ok(self.tokenised(store, false, not_kept)),
            Err(Stop::Data(error)) => Err(error),
            Err(Stop::Write(source)) => Err(DataError::Unreadable {
                path: "memory".into(),
                source,
            }),
        }
    }

    fn tokenised(&self, mut store: Store, cached: bool, not_kept: Option<String>) -> Tokenised {
        let files = self.sources.iter().flat_map(|source| &source.files);
        store.name_files(files.map(Arc::clone).collect());
        Tokenised {
            meta: Meta::read(&store),
            store: Arc::new(store),
            cached,
            not_kept,
        }
    }

    fn write_cache(&mut self, cache: &Cache, key: &str) -> Result<Store, Stop> {
        let mut pending = cache.begin(key)?;
        let meta = self.fill(&mut pending.writer)?;
        Ok(cache.finish(pending, &to_json(&meta))?)
    }

    fn write_memory(&mut self) -> Result<Store, Stop> {
        let mut writer = StoreWriter::new(Vec::new(), Vec::new())?;
        let meta = self.fill(&mut writer)?;
        Ok(Store::from_memory(writer.into_memory(&to_json(&meta))?)?)
    }

    fn fill<W: Write>(&mut self, writer: &mut StoreWriter<W>) -> Result<Meta, Stop> {
        let mut meta = Meta::default();
        let mut bad = BadRows::new(self.on_bad_row);
        let mut first_file = 0;
        let mut tokens = 0;
        for source in self.sources {
            let mut counts = SourceCounts::new(source);
            self.pipeline.run(source, |chunk, done| {
                let file = first_file + chunk.file as u32;
                take(
                    source,
                    chunk,
                    done,
                    file,
                    writer,
                    (&mut meta, &mut counts, &mut bad),
                )?;
                let rows = meta.rows;
                let tokens = tokens + counts.tokens;
                (self.progress)(Progress::Tokenise { rows, tokens });
                Ok::<_, Stop>(())
            })?;
            tokens += counts.tokens;
            first_file += source.files.len() as u32;
            meta.sources.push(counts);
        }
        if let Some(changed) = changed(self.sources, &self.before) {
            return Err(DataError::Changed {
                path: changed.into(),
            }
            .into());
        }
        let skipped = bad.settle()?;
        meta.bad_rows = skipped.count;
        meta.bad_rows_shown = skipped.shown.iter().map(ToString::to_string).collect();
        meta.largest_id = writer.largest_id();
        Ok(meta)
    }
}

fn to_json(meta: &Meta) -> Vec<u8> {
    serde_json::to_vec(meta).unwrap_or_default()
}

/// Writes the samples of a chunk and counts its rows.
fn take<W: Write>(
    source: &Source,
    chunk: &Chunk,
    done: Vec<Done>,
    file: u32,
    writer: &mut StoreWriter<W>,
    (meta, counts, bad): (&mut Meta, &mut SourceCounts, &mut BadRows),
) -> Result<(), Stop> {
    if counts.format == DataFormat::Auto {
        counts.format = chunk.format;
    }
    counts.rows += done.len();
    meta.rows += done.len();
    for Done { place, outcome } in done {
        match outcome {
            Ok(Outcome::Samples(samples)) => {
                for (side, sample) in samples.iter().enumerate() {
                    writer.push(sample, file, side == 1)?;
                    counts.samples += 1;
                    counts.tokens += sample.input_ids.len();
                }
            }
            Ok(Outcome::Dropped) => meta.dropped += 1,
            Ok(Outcome::Unlabelled) => meta.unlabelled += 1,
            Err(reason) => bad.push(RowFault {
                file: Arc::clone(&source.files[chunk.file]),
                place,
                reason,
            }),
        }
    }
    Ok(())
}

/// Length and time of each file, to tell whether it changes.
pub fn stamps(sources: &[Source]) -> Vec<Option<(u64, SystemTime)>> {
    let files = sources.iter().flat_map(|source| &source.files);
    files.map(|file| stamp(file)).collect()
}

fn stamp(file: &Path) -> Option<(u64, SystemTime)> {
    let metadata = std::fs::metadata(file).ok()?;
    Some((metadata.len(), metadata.modified().ok()?))
}

fn changed<'a>(sources: &'a [Source], before: &[Option<(u64, SystemTime)>]) -> Option<&'a Path> {
    let files = sources.iter().flat_map(|source| &source.files);
    let mut pairs = files.zip(before);
    let (file, _) = pairs.find(|(file, before)| stamp(file) != **before)?;
    Some(file)
}
