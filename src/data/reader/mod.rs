//! Opens a dataset file and gives its rows in batches.
//!
//! What a file holds is told by its name where the name says it, and else by its first bytes; what
//! it is packed with is always told by its bytes. Files may be larger than memory: no more than a
//! batch is held, and no row is larger than [`MAX_ROW_BYTES`].
//!
//! `compressed` unpacks a file; `json_rows`, `csv_rows`, `text_rows` and `parquet_rows` cut it into
//! [`Record`]s, the last with pages, values and the footer's encoding in files of their own.

mod compressed;
mod csv_rows;
mod json_rows;
mod parquet_pages;
mod parquet_rows;
mod parquet_thrift;
mod parquet_values;
mod record;
mod text_rows;

use std::fmt;
use std::path::Path;

use self::compressed::Input;
use self::csv_rows::CsvRows;
use self::json_rows::{JsonLines, JsonValues, Layout, layout};
use self::parquet_rows::ParquetRows;
use self::record::Batch;
pub use self::record::{Place, Record};
use self::text_rows::TextRows;
use super::faults::DataError;
use crate::recipe::plan::SampleBy;

/// A batch ends after this many rows …
pub const BATCH_ROWS: usize = 8192;
/// … or this many bytes, whichever comes first.
pub const BATCH_BYTES: usize = 16 << 20;
/// The most bytes that a row may take.
pub const MAX_ROW_BYTES: usize = 64 << 20;

/// How much a reader holds at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most rows of a batch.
    pub batch_rows: usize,
    /// About the most bytes of a batch.
    pub batch_bytes: usize,
    /// Most bytes of a row; a larger one is an error.
    pub row_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            batch_rows: BATCH_ROWS,
            batch_bytes: BATCH_BYTES,
            row_bytes: MAX_ROW_BYTES,
        }
    }
}

/// A dataset file, read in batches.
pub struct Reader {
    rows: Box<dyn Rows + Send>,
    limits: Limits,
}

/// What cuts a file into rows.
trait Rows {
    /// Appends the next row; whether there was one.
    fn next(&mut self, batch: &mut Batch) -> Result<bool, DataError>;

    /// Goes past rows; how many there were. What is read on the way is left out of `batch`.
    fn skip(&mut self, rows: u64, batch: &mut Batch) -> Result<u64, DataError> {
        let mut skipped = 0;
        while skipped < rows && self.next(batch)? {
            batch.clear();
            skipped += 1;
        }
        Ok(skipped)
    }
}

impl Reader {
    /// Opens a dataset file. `sample_by` says what a row of a text file is.
    ///
    /// # Errors
    /// The file does not exist, is a directory, cannot be read or unpacked, or is of a kind that
    /// neither its name nor its content tells.
    pub fn open(path: &Path, sample_by: SampleBy) -> Result<Self, DataError> {
        Self::open_within(path, sample_by, Limits::default())
    }

    /// Opens a dataset file and holds no more at once than `limits` say.
    ///
    /// # Errors
    /// Those of [`Reader::open`].
    pub fn open_within(
        path: &Path,
        sample_by: SampleBy,
        limits: Limits,
    ) -> Result<Self, DataError> {
        let input = Input::open(path)?;
        let limit = limits.row_bytes;
        let rows: Box<dyn Rows + Send> = match Kind::of(&input)? {
            Kind::JsonLines => Box::new(JsonLines::new(input, limit)),
            Kind::Json => match layout(input.head()) {
                Layout::Lines => Box::new(JsonLines::new(input, limit)),
                layout => Box::new(JsonValues::new(input, layout, limit)),
            },
            Kind::Csv => Box::new(CsvRows::new(input, None, limit)),
            Kind::Tsv => Box::new(CsvRows::new(input, Some(b'\t'), limit)),
            Kind::Text => Box::new(TextRows::new(input, sample_by, limit)),
            Kind::Parquet => Box::new(ParquetRows::open(input.path(), limit)?),
        };
        Ok(Self { rows, limits })
    }

    /// The next rows in order, at most [`BATCH_ROWS`] of them and about [`BATCH_BYTES`] bytes; none
    /// at the end of the file. Blank lines are no rows. Rows that are wrong in themselves say so
    /// when they are asked for their object.
    ///
    /// # Errors
    /// The file cannot be read or unpacked, its JSON array is cut off, its table has no usable
    /// header, or a row is too large.
    pub fn next_batch(&mut self) -> Result<Vec<Record>, DataError> {
        let mut batch = Batch::default();
        while batch.rows() < self.limits.batch_rows && batch.bytes() < self.limits.batch_bytes {
            if !self.rows.next(&mut batch)? {
                break;
            }
        }
        Ok(batch.into_records())
    }

    /// Goes past rows without parsing them; returns how many there were, which is less than asked
    /// for at the end of the file only.
    ///
    /// # Errors
    /// Those of [`Reader::next_batch`].
    pub fn skip(&mut self, rows: u64) -> Result<u64, DataError> {
        self.rows.skip(rows, &mut Batch::default())
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What a dataset file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    JsonLines,
    Json,
    Csv,
    Tsv,
    Parquet,
    Text,
}

impl Kind {
    /// By the end of a file name, a suffix of compression left out.
    fn by_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let packed = [".gz", ".gzip", ".zst", ".zstd"].iter();
        let name = packed.fold(name.as_str(), |name, end| {
            name.strip_suffix(end).unwrap_or(name)
        });
        let (_, extension) = name.rsplit_once('.')?;
        match extension {
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "csv" => Some(Self::Csv),
            "tsv" => Some(Self::Tsv),
            "parquet" => Some(Self::Parquet),
            "txt" | "text" | "md" => Some(Self::Text),
            _ => None,
        }
    }

    fn of(input: &Input) -> Result<Self, DataError> {
        let path = input.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let head = input.head();
        let kind = if head.starts_with(parquet_rows::MAGIC) {
            Some(Self::Parquet)
        } else {
            Self::by_name(&name).or_else(|| match head.trim_ascii_start().first() {
                // Nothing holds no rows, whatever it is.
                Some(b'[' | b'{') | None => Some(Self::Json),
                Some(_) => None,
            })
        };
        match (kind, input.packing()) {
            (Some(Self::Parquet), Some(packing)) => Err(DataError::PackedParquet {
                path: path.to_path_buf(),
                packing,
            }),
            (Some(kind), _) => Ok(kind),
            (None, _) => Err(DataError::UnknownKind {
                path: path.to_path_buf(),
            }),
        }
    }
}

/// Whether a file name says a dataset file, for taking the files of a directory. What describes a
/// dataset (`README.md`, `dataset_infos.json`) and what is hidden is none.
#[must_use]
pub fn is_data_file(name: &str) -> bool {
    const ABOUT: [&str; 4] = ["readme", "license", "dataset_info", "state.json"];
    let lower = name.to_ascii_lowercase();
    Kind::by_name(name).is_some()
        && !lower.starts_with(['.', '_'])
        && !ABOUT.iter().any(|about| lower.starts_with(about))
}

/// The error of a row beyond the limit.
fn too_large(input: &Input, place: Place, limit: usize) -> DataError {
    DataError::RowTooLarge {
        path: input.path().to_path_buf(),
        place,
        limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_files_hold() {
        for (name, kind) in [
            ("a.jsonl", Some(Kind::JsonLines)),
            ("a.b.JSON.gz", Some(Kind::Json)),
            ("train-00000-of-00002.parquet", Some(Kind::Parquet)),
            ("a.tsv.zst", Some(Kind::Tsv)),
            ("a.txt", Some(Kind::Text)),
            ("a.gz", None),
            ("jsonl", None),
            ("a.py", None),
        ] {
            assert_eq!(Kind::by_name(name), kind, "{name}");
        }
        assert!(is_data_file("train.csv.gz"));
        for name in ["README.md", ".hidden.json", "dataset_infos.json", "a.png"] {
            assert!(!is_data_file(name), "{name}");
        }
    }
}
