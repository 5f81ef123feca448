//! From the rows of a source to samples: read, given one form, tokenised, masked, cut.
//!
//! One thread reads ahead and one takes what is done, while all others tokenise; what comes out
//! stands in the order of the rows.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use rayon::prelude::*;

use super::contract::Contract;
use super::conversation::{Fields, RowOptions, detect, row};
use super::faults::{DataError, RowError};
use super::mask::{Masked, Masker, trained};
use super::reader::{Place, Reader, Record};
use super::tokenize::ChatTokenizer;
use super::{Sample, SampleId};
use crate::recipe::plan::{DataFormat, DataPlan, Packing, SourcePlan, Truncate};

/// A source with its files found.
#[derive(Debug)]
pub struct Source {
    /// What the recipe says of it.
    pub plan: SourcePlan,
    /// The format of its rows, or `auto`.
    pub format: DataFormat,
    /// Names of its fields.
    pub fields: Fields,
    /// Its files, in order.
    pub files: Vec<Arc<Path>>,
}

/// Rows of one file.
#[derive(Debug)]
pub struct Chunk {
    /// Index of the file in its source.
    pub file: usize,
    /// Format of the rows; `auto` where the first row did not tell.
    pub format: DataFormat,
    /// The rows.
    pub records: Vec<Record>,
}

/// Reads the files of a source, one after the other.
pub struct SourceReader<'a> {
    source: &'a Source,
    file: usize,
    open: Option<(Reader, DataFormat)>,
}

impl<'a> SourceReader<'a> {
    /// Reads from the first row on.
    pub fn new(source: &'a Source) -> Self {
        Self {
            source,
            file: 0,
            open: None,
        }
    }

    /// The next rows, all of one file; `None` at the end of the last.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>, DataError> {
        while let Some(path) = self.source.files.get(self.file) {
            let (reader, format) = match &mut self.open {
                Some(open) => open,
                closed => {
                    let reader = Reader::open(path, self.source.plan.sample_by)?;
                    closed.insert((reader, self.source.format))
                }
            };
            let records = reader.next_batch()?;
            if let Some(first) = records.first() {
                // A first row that tells nothing is reported later, with all others.
                if *format == DataFormat::Auto
                    && let Ok(found) = format_of(first, &self.source.fields)
                {
                    *format = found;
                }
                return Ok(Some(Chunk {
                    file: self.file,
                    format: *format,
                    records,
                }));
            }
            self.file += 1;
            self.open = None;
        }
        Ok(None)
    }

    /// Passes over rows, and returns how many there were to pass over.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn skip(&mut self, rows: u64) -> Result<u64, DataError> {
        let mut skipped = 0;
        while let Some(path) = self.source.files.get(self.file) {
            if skipped == rows {
                break;
            }
            let (reader, _) = match &mut self.open {
                Some(open) => open,
                closed => {
                    let format = first_format(path, self.source)?;
                    let reader = Reader::open(path, self.source.plan.sample_by)?;
                    closed.insert((reader, format))
                }
            };
            let passed = reader.skip(rows - skipped)?;
            skipped += passed;
            if skipped < rows {
                self.file += 1;
                self.open = None;
            }
        }
        Ok(skipped)
    }
}

fn format_of(record: &Record, fields: &Fields) -> Result<DataFormat, RowError> {
    detect(&record.object()?, fields)
}

/// The format of a file, told from its first row, which will be passed over.
fn first_format(path: &Path, source: &Source) -> Result<DataFormat, DataError> {
    if source.format != DataFormat::Auto {
        return Ok(source.format);
    }
    let first = Reader::open(path, source.plan.sample_by)?.next_batch()?;
    let found = first.first().map(|row| format_of(row, &source.fields));
    Ok(found.and_then(Result::ok).unwrap_or(DataFormat::Auto))
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A sample, or the chosen and the rejected one of a pair.
    Samples(Vec<Sample>),
    /// Too long: cutting it left nothing to train, or `truncate: drop` leaves it out.
    Dropped,
    /// It has nothing to train, and the clause `labels` is waived.
    Unlabelled,
}

/// A row with what became of it.
#[derive(Debug)]
pub struct Done {
    /// Where it stands in its file.
    pub place: Place,
    /// What became of it.
    pub outcome: Result<Outcome, RowError>,
}

/// Makes samples of rows.
#[derive(Debug)]
pub struct Pipeline<'a> {
    /// Tokenises and masks.
    pub masker: Masker<'a>,
    max_seq_len: usize,
    truncate: Truncate,
    /// Packing that goes on in the next row cuts nothing.
    wraps: bool,
}

impl<'a> Pipeline<'a> {
    /// As the plan says.
    pub fn new(plan: &DataPlan, tokenizer: &'a ChatTokenizer) -> Self {
        Self {
            masker: Masker {
                tokenizer,
                train_on_inputs: plan.train_on_inputs,
                contract: Contract::new(tokenizer, &plan.waive),
            },
            max_seq_len: plan.max_seq_len,
            truncate: plan.truncate,
            wraps: plan.packing == Packing::Wrap,
        }
    }

    /// What becomes of each row of a chunk, in order.
    pub fn chunk(&self, source: &Source, chunk: &Chunk) -> Vec<Done> {
        let file = &source.files[chunk.file];
        let done = |record: &Record| Done {
            place: record.place,
            outcome: self.row(record, source, chunk.format, file),
        };
        chunk
            .records
            .par_iter()
            .with_min_len(16)
            .map(done)
            .collect()
    }

    /// What becomes of one row.
    ///
    /// # Errors
    /// The row cannot be trained on.
    pub fn row(
        &self,
        record: &Record,
        source: &Source,
        format: DataFormat,
        file: &Arc<Path>,
    ) -> Result<Outcome, RowError> {
        let row = self.parse(record, source, format)?;
        let masked = self.masker.mask(&row)?;
        if masked.iter().any(|masked| trained(&masked.labels) == 0) {
            return Ok(Outcome::Unlabelled);
        }
        let id = SampleId {
            file: Arc::clone(file),
            place: record.place,
        };
        let mut samples = Vec::with_capacity(masked.len());
        for masked in masked {
            match self.cut(masked, &id)? {
                Some(sample) => samples.push(sample),
                None => return Ok(Outcome::Dropped),
            }
        }
        Ok(Outcome::Samples(samples))
    }

    /// The row in one form.
    ///
    /// # Errors
    /// It is not of its format.
    pub fn parse(
        &self,
        record: &Record,
        source: &Source,
        format: DataFormat,
    ) -> Result<super::conversation::Row, RowError> {
        let options = RowOptions {
            format,
            fields: &source.fields,
            has_template: self.masker.tokenizer.has_template(),
        };
        row(record.object()?, &options)
    }

    /// Makes a sample no longer than allowed; `None` where it is left out.
    ///
    /// # Errors
    /// It is too long, and the recipe says that this stops the run.
    pub fn cut(&self, masked: Masked, id: &SampleId) -> Result<Option<Sample>, RowError> {
        let Masked {
            mut input_ids,
            mut labels,
        } = masked;
        let (tokens, limit) = (input_ids.len(), self.max_seq_len);
        let truncated = tokens > limit && !self.wraps;
        if truncated {
            match self.truncate {
                Truncate::Right => {
                    input_ids.truncate(limit);
                    labels.truncate(limit);
                }
                Truncate::Left => {
                    let bos = self.masker.tokenizer.bos_id();
                    let kept = usize::from(bos.is_some() && input_ids.first().copied() == bos);
                    input_ids.drain(kept..kept + tokens - limit);
                    labels.drain(kept..kept + tokens - limit);
                }
                Truncate::Drop => return Ok(None),
                Truncate::Fail => {
                    return Err(RowError::TooLong {
                        tokens,
                        max_seq_len: limit,
                    });
                }
            }
        }
        Ok((trained(&labels) > 0).then(|| Sample {
            input_ids,
            labels,
            source: id.clone(),
            truncated,
        }))
    }

    /// Runs through a source; `each` is told of every row, in order, with the index of its file.
    ///
    /// # Errors
    /// A file cannot be read, or `each` fails.
    pub fn run<E: From<DataError>>(
        &self,
        source: &Source,
        mut each: impl FnMut(&Chunk, Vec<Done>) -> Result<(), E>,
    ) -> Result<(), E> {
        thread::scope(|scope| {
            let (sender, receiver) = sync_channel(1);
            scope.spawn(move || {
                let mut reader = SourceReader::new(source);
                while let Some(chunk) = reader.next_chunk().transpose() {
                    let failed = chunk.is_err();
                    // Nobody listens any more where `each` failed.
                    if sender.send(chunk).is_err() || failed {
                        break;
                    }
                }
            });
            let chunks: Receiver<Result<Chunk, DataError>> = receiver;
            let (sender, receiver) = sync_channel(1);
            scope.spawn(move || {
                for chunk in chunks {
                    let done = chunk.map(|chunk| (self.chunk(source, &chunk), chunk));
                    if sender.send(done).is_err() {
                        break;
                    }
                }
            });
            for done in receiver {
                let (done, chunk) = done?;
                each(&chunk, done)?;
            }
            Ok(())
        })
    }
}
