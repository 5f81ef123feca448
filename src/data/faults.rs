//! What can be wrong with a dataset, in words that name file, line and remedy; [`RowError`] is what
//! can be wrong with a row.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::reader::Place;
pub use super::row_error::RowError;
use crate::hub::HubError;
use crate::recipe::plan::OnBadRow;

/// How many bad rows an error shows.
const SHOWN_ROWS: usize = 10;

/// Why a dataset cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file that cannot be opened or read.
    #[error("cannot read dataset {path}: {source}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A JSON array that is cut off.
    #[error("{path}:{line}: the JSON array that starts here is not closed; is the file complete?", path = path.display())]
    UnclosedArray {
        /// The file.
        path: PathBuf,
        /// Line of the opening bracket.
        line: usize,
    },
    /// Files without a single row.
    #[error("dataset {files} is empty: expected one JSON object a line, found none", files = list(files))]
    Empty {
        /// The files.
        files: Vec<PathBuf>,
    },
    /// Rows that cannot be trained on.
    #[error("{0}")]
    BadRows(RowFaults),
    /// `max_seq_len` beyond what the model can place.
    #[error(
        "data.max_seq_len is {max_seq_len}, but the model has positions for {position_limit} tokens only; set data.max_seq_len to {position_limit} or less"
    )]
    LongerThanModel {
        /// The recipe's limit.
        max_seq_len: usize,
        /// The model's limit.
        position_limit: usize,
    },
    /// Truncation left nothing to train on.
    #[error(
        "no {split} row is left: data.max_seq_len = {max_seq_len} cuts off every trained token of all {dropped} rows{}; raise it",
        left_out(*other)
    )]
    NothingLeft {
        /// `training` or `validation`.
        split: &'static str,
        /// Rows that were left out for their length.
        dropped: usize,
        /// Rows that were left out because they are bad or have nothing to train.
        other: usize,
        /// The recipe's limit.
        max_seq_len: usize,
    },
    /// A source without files.
    #[error(
        "there is no dataset file in {path}; expected .jsonl, .json, .csv, .tsv, .parquet or .txt, also with .gz or .zst"
    )]
    NoFiles {
        /// The source's path.
        path: String,
    },
    /// A file that is written to while it is read.
    #[error("{path} changes while it is read; try again when it is complete", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Ids that the model has no embedding for, found while streaming.
    #[error(
        "{row}: token id {id} is not in the model's vocabulary of {vocab_size}; the tokenizer does not belong to this model"
    )]
    OutsideVocabulary {
        /// Where the row stands.
        row: String,
        /// The id.
        id: u32,
        /// Embeddings of the model.
        vocab_size: usize,
    },
    /// A stream without a single sample.
    #[error(
        "data.streaming: no row of the whole data can be trained on; `lorafit data preview` shows why"
    )]
    EmptyStream,
    /// Preference pairs, which no objective trains on yet.
    #[error(
        "preference pairs cannot be trained on yet: rows of `prompt`, `chosen` and `rejected` can be looked at with `lorafit data preview`; to train on the chosen answers map them, `fields: {{messages: chosen}}` or `{{completion: chosen}}`"
    )]
    Preference,
    /// A dataset of the hub cannot be had.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// Too few rows to hold some out.
    #[error(
        "data.validation_fraction needs at least 2 rows to split, found {rows}; set it to 0 or add rows"
    )]
    TooFewToSplit {
        /// Rows that can train.
        rows: usize,
    },
    /// A row that takes too much memory.
    #[error("{path}:{place}: the row that begins here is larger than {limit}, which no row may be; is a quote or bracket left open?", path = path.display(), limit = size(*limit))]
    RowTooLarge {
        /// The file.
        path: PathBuf,
        /// Where the row begins.
        place: Place,
        /// The most bytes of a row.
        limit: usize,
    },
    /// A packed file that does not unpack.
    #[error("cannot unpack dataset {path}: its {packing} data are cut off or damaged ({source}); download it, or pack it, again", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// `gzip` or `zstd`.
        packing: &'static str,
        /// What the decoder says.
        source: std::io::Error,
    },
    /// A file that is no known kind of dataset.
    #[error("cannot tell what kind of dataset {path} is, from its name or its content; known are .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt and .md, the text formats also with .gz or .zst behind", path = path.display())]
    UnknownKind {
        /// The file.
        path: PathBuf,
    },
    /// The first line of a table.
    #[error("{path}:{line}: the header {reason}", path = path.display())]
    BadHeader {
        /// The file.
        path: PathBuf,
        /// Line of the header.
        line: u64,
        /// What it does, and the remedy.
        reason: String,
    },
    /// A Parquet file that cannot be read.
    #[error("cannot read Parquet file {path}: {message}", path = path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The row, if any, and what is wrong.
        message: String,
    },
    /// A Parquet file inside of something that cannot be read from the end.
    #[error("{path} is a Parquet file packed with {packing}; unpack it first (Parquet is compressed inside)", path = path.display())]
    PackedParquet {
        /// The file.
        path: PathBuf,
        /// `gzip` or `zstd`.
        packing: &'static str,
    },
    /// A field mapping of a name that lorafit does not read.
    #[error("fields: `{name}` is no field of a row{nearest} Fields are {known}")]
    UnknownField {
        /// The name.
        name: String,
        /// The question whether another was meant, or a full stop.
        nearest: String,
        /// All names.
        known: String,
    },
    /// A field mapping to nothing.
    #[error(
        "fields: `{name}` is read from `{key}`, which names no key; write a key, or keys of nested objects with dots between them"
    )]
    EmptyFieldKey {
        /// lorafit's name.
        name: String,
        /// The dataset's.
        key: String,
    },
}

/// Rows that cannot be trained on: their number, and the first of them.
#[derive(Debug, Default)]
pub struct RowFaults {
    /// How many.
    pub count: usize,
    /// The first ones, in the order of the files.
    pub shown: Vec<RowFault>,
}

impl RowFaults {
    fn push(&mut self, fault: RowFault) {
        self.count += 1;
        if self.shown.len() < SHOWN_ROWS {
            self.shown.push(fault);
        }
    }

    /// Adds those of a later part of the data.
    pub fn append(&mut self, later: Self) {
        let room = SHOWN_ROWS.saturating_sub(self.shown.len());
        self.shown.extend(later.shown.into_iter().take(room));
        self.count += later.count;
    }
}

/// Sorts the faults of rows into those that stop the run and those that are left out.
#[derive(Debug)]
pub struct BadRows {
    on_bad_row: OnBadRow,
    stopping: RowFaults,
    skipped: RowFaults,
}

impl BadRows {
    /// None yet.
    pub fn new(on_bad_row: OnBadRow) -> Self {
        Self {
            on_bad_row,
            stopping: RowFaults::default(),
            skipped: RowFaults::default(),
        }
    }

    /// Adds one.
    pub fn push(&mut self, fault: RowFault) {
        if self.on_bad_row == OnBadRow::Skip && fault.reason.may_skip() {
            self.skipped.push(fault);
        } else {
            self.stopping.push(fault);
        }
    }

    /// The rows that are left out.
    ///
    /// # Errors
    /// Rows that stop the run.
    pub fn settle(self) -> Result<RowFaults, DataError> {
        if self.stopping.count > 0 {
            return Err(DataError::BadRows(self.stopping));
        }
        Ok(self.skipped)
    }
}

impl fmt::Display for RowFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.count, self.shown.as_slice()) {
            (1, [only]) => write!(f, "{only}"),
            (count, shown) => {
                write!(f, "{count} rows cannot be trained on")?;
                if shown.len() < count {
                    write!(f, ", the first {}", shown.len())?;
                }
                f.write_str(":")?;
                let mut before = String::new();
                for fault in shown {
                    let reason = fault.in_words();
                    let said = if reason == before {
                        "the same"
                    } else {
                        &reason
                    };
                    write!(f, "\n  {}: {said}", fault.at())?;
                    before = reason;
                }
                Ok(())
            }
        }
    }
}

/// One bad row and where it is.
#[derive(Debug)]
pub struct RowFault {
    /// The file.
    pub file: Arc<Path>,
    /// Where the row begins.
    pub place: Place,
    /// What is wrong.
    pub reason: RowError,
}

impl RowFault {
    /// File and line.
    fn at(&self) -> String {
        let file = self.file.display();
        match (&self.reason, self.place) {
            // The line inside the row matters where a row spans several.
            (RowError::Json { line, column, .. }, Place::Line(first)) => {
                format!("{file}:{}:{column}", first + *line as u64 - 1)
            }
            (_, place) => format!("{file}:{place}"),
        }
    }

    /// What is wrong, and whether that can be waived.
    fn in_words(&self) -> String {
        match self.reason.clause() {
            Some(clause) => format!(
                "{} (mask contract, clause `{name}`; `data.waive: [{name}]` lets such rows train)",
                self.reason,
                name = clause.name()
            ),
            None => self.reason.to_string(),
        }
    }
}

impl fmt::Display for RowFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at(), self.in_words())
    }
}

fn left_out(rows: usize) -> String {
    match rows {
        0 => String::new(),
        rows => format!(" that could be read, and {rows} others are bad or have nothing to train"),
    }
}

fn list(files: &[PathBuf]) -> String {
    let names: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
    names.join(", ")
}

/// A number of bytes, in MiB where it is whole.
fn size(bytes: usize) -> String {
    match (bytes >> 20, bytes % (1 << 20)) {
        (mib @ 1.., 0) => format!("{mib} MiB"),
        _ => format!("{bytes} bytes"),
    }
}
