//! Parquet, row group by row group.
//!
//! The `parquet` crate's own reader assembles rows, so that lists, structs and maps come as they
//! were written. It asserts where files are damaged: a panic becomes an error here, and no message
//! of it reaches the terminal.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Once};

use parquet::basic::Compression;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};

use super::parquet_pages::{CheckedGroup, check_headers};
use super::parquet_thrift::schema_children;
use super::record::{Batch, Content, Place};
use super::{Rows, parquet_values};
use crate::data::faults::DataError;

/// How Parquet files begin and end.
pub(super) const MAGIC: &[u8] = b"PAR1";
/// How Parquet files end whose metadata are encrypted.
const ENCRYPTED_MAGIC: &[u8] = b"PARE";

/// Largest metadata of a file.
const MAX_FOOTER_BYTES: u64 = 256 << 20;
/// Deepest nesting of a schema.
const MAX_SCHEMA_DEPTH: usize = 64;
/// Rows of a column decoded at once, where each row has one value.
const FLAT_ROWS: usize = 1024;
/// The same where a row may have many values, which multiply the memory.
const NESTED_ROWS: usize = 16;

/// A Parquet file.
pub(super) struct ParquetRows {
    path: Arc<Path>,
    limit: usize,
    reader: SerializedFileReader<File>,
    file: File,
    /// The row group after the one that is being read.
    next_group: usize,
    rows: Option<ReaderIter>,
    /// Rows of that row group that are still to come.
    left: u64,
    /// Rows read so far.
    row: u64,
}

impl ParquetRows {
    /// Reads the metadata.
    pub fn open(path: &Arc<Path>, limit: usize) -> Result<Self, DataError> {
        let unreadable = |source| DataError::Unreadable {
            path: path.to_path_buf(),
            source,
        };
        let file = File::open(path).map_err(unreadable)?;
        let clone = file.try_clone().map_err(unreadable)?;
        let reader = guarded(move || {
            check_footer(&file)?;
            Ok(SerializedFileReader::new(file)?)
        });
        let reader = reader.map_err(|message| fault(path, message))?;
        Ok(Self {
            path: Arc::clone(path),
            limit,
            reader,
            file: clone,
            next_group: 0,
            rows: None,
            left: 0,
            row: 0,
        })
    }

    /// Opens the next row group.
    fn open_group(&mut self) -> Result<(), DataError> {
        let rows = guarded(|| {
            let group = self.reader.get_row_group(self.next_group)?;
            check_group(&self.file, group.metadata())?;
            let schema = group.metadata().schema_descr_ptr();
            let is_nested = schema.columns().iter().any(|c| c.max_rep_level() > 0);
            let rows = if is_nested { NESTED_ROWS } else { FLAT_ROWS };
            let builder = TreeBuilder::new().with_batch_size(rows);
            Ok(builder.as_iter(schema, &CheckedGroup { group })?)
        });
        self.rows = Some(rows.map_err(|message| self.fail(message))?);
        self.left = self.group_rows().unwrap_or(0);
        self.next_group += 1;
        Ok(())
    }

    /// Rows of the next row group; none at the end of the file.
    fn group_rows(&self) -> Option<u64> {
        let group = self.reader.metadata().row_groups().get(self.next_group)?;
        // A negative number is refused when the group is opened.
        Some(u64::try_from(group.num_rows()).unwrap_or(u64::MAX))
    }

    /// An error behind which nothing more is read.
    fn fail(&mut self, message: String) -> DataError {
        (self.rows, self.left) = (None, 0);
        self.next_group = self.reader.num_row_groups();
        let row = Place::Row(self.row + 1);
        fault(&self.path, format!("{row}: {message}"))
    }
}

impl Rows for ParquetRows {
    fn next(&mut self, batch: &mut Batch) -> Result<bool, DataError> {
        while self.left == 0 {
            match self.group_rows() {
                Some(0) => self.next_group += 1,
                Some(_) => self.open_group()?,
                None => return Ok(false),
            }
        }
        let Some(rows) = &mut self.rows else {
            return Ok(false);
        };
        let row = match guarded(|| Ok(rows.next().transpose()?)) {
            Ok(Some(row)) => row,
            Ok(None) => return Err(self.fail("the row group ends too early".to_owned())),
            Err(message) => return Err(self.fail(message)),
        };
        let bytes = parquet_values::bytes(&row);
        let place = Place::Row(self.row + 1);
        if bytes > self.limit {
            return Err(DataError::RowTooLarge {
                path: self.path.to_path_buf(),
                place,
                limit: self.limit,
            });
        }
        self.row += 1;
        self.left -= 1;
        batch.push_sized(place, Content::Columns(Box::new(row)), bytes);
        Ok(true)
    }

    /// Goes past whole row groups without unpacking them.
    fn skip(&mut self, rows: u64, batch: &mut Batch) -> Result<u64, DataError> {
        let mut skipped = 0;
        while skipped < rows {
            match self.group_rows() {
                Some(count) if self.left == 0 && count <= rows - skipped => {
                    self.next_group += 1;
                    self.row += count;
                    skipped += count;
                }
                _ => {
                    batch.clear();
                    if !self.next(batch)? {
                        break;
                    }
                    skipped += 1;
                }
            }
        }
        batch.clear();
        Ok(skipped)
    }
}

/// Refuses metadata that could exhaust memory or the stack before the crate finds its fault.
fn check_footer(file: &File) -> Result<(), Fault> {
    let length = file.metadata()?.len();
    let mut file = file;
    let mut tail = [0; 8];
    if length < 12 {
        return Err("the file is cut off".into());
    }
    file.seek(SeekFrom::End(-8))?;
    file.read_exact(&mut tail)?;
    if &tail[4..] == ENCRYPTED_MAGIC {
        return Err("the file is encrypted; decrypt it first".into());
    }
    if &tail[4..] != MAGIC {
        return Err("the file does not end as Parquet does; is it complete?".into());
    }
    let size = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    if size > MAX_FOOTER_BYTES || size + 8 > length {
        return Err("the metadata have an impossible size".into());
    }
    file.seek(SeekFrom::Start(length - 8 - size))?;
    let mut metadata = Vec::new();
    file.take(size).read_to_end(&mut metadata)?;
    match schema_children(&metadata) {
        Some(children) if is_tree(&children) => Ok(()),
        _ => Err("the schema is damaged, or nested too deep".into()),
    }
}

/// Whether numbers of children, depth first, make one tree that is not too deep.
fn is_tree(children: &[i64]) -> bool {
    // Children that are still to come, on each level above.
    let mut open: Vec<u64> = Vec::new();
    for (i, count) in children.iter().enumerate() {
        let Ok(count) = u64::try_from(*count) else {
            return false;
        };
        while open.last() == Some(&0) {
            open.pop();
        }
        match open.last_mut() {
            Some(left) => *left -= 1,
            None if i > 0 => return false,
            None => {}
        }
        open.push(count);
        if open.len() > MAX_SCHEMA_DEPTH || count > children.len() as u64 {
            return false;
        }
    }
    !children.is_empty() && open.iter().all(|left| *left == 0)
}

/// Refuses a row group before its pages are unpacked.
fn check_group(file: &File, group: &RowGroupMetaData) -> Result<(), Fault> {
    if group.num_rows() < 0 || group.columns().is_empty() {
        return Err("a row group has no columns, or an impossible number of rows".into());
    }
    for column in group.columns() {
        let codec = match column.compression() {
            Compression::BROTLI(_) => "brotli",
            Compression::LZO => "LZO",
            _ => {
                check_headers(file, column)?;
                continue;
            }
        };
        return Err(format!(
            "column `{}` is compressed with {codec}, which is not supported; write the file again with zstd or snappy",
            column.column_path().string()
        )
        .into());
    }
    Ok(())
}

fn fault(path: &Path, message: String) -> DataError {
    DataError::Parquet {
        path: path.to_owned(),
        message,
    }
}

/// Anything that can go wrong while a file is read.
type Fault = Box<dyn std::error::Error + Send + Sync>;

thread_local! {
    /// Whether a panic on this thread is caught, and its message is ours to tell.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs something that may panic; the message of a failure or a panic is the error.
fn guarded<T>(run: impl FnOnce() -> Result<T, Fault>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // At the end of a thread, its flag may be gone.
            if !IS_GUARDED.try_with(Cell::get).unwrap_or(false) {
                tell(panic);
            }
        }));
    });
    let outer = IS_GUARDED.replace(true);
    // What a panic leaves half done is not used again: readers stop at their first error.
    let result = catch_unwind(AssertUnwindSafe(run));
    IS_GUARDED.set(outer);
    match result {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the file is damaged".to_owned()),
    }
}
