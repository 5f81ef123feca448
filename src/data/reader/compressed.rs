//! The bytes of a dataset file, unpacked where they are packed.
//!
//! What a file is packed with is told by its first bytes, not by its name. Everything streams: a
//! file that unpacks to more than memory holds is read as far as its rows are asked for.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use crate::data::faults::DataError;

/// Bytes read at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes at the beginning that tell what a file holds.
const HEAD_BYTES: u64 = 4096;

const GZIP_MAGIC: &[u8] = b"\x1f\x8b";
const ZSTD_MAGIC: &[u8] = b"\x28\xb5\x2f\xfd";
const UTF8_BOM: &[u8] = b"\xef\xbb\xbf";

/// A dataset file that is read from its beginning to its end.
pub(super) struct Input {
    path: Arc<Path>,
    bytes: Box<dyn BufRead + Send>,
    packing: Option<&'static str>,
    head: Vec<u8>,
}

impl Input {
    /// Opens a file and unpacks it, if need be; a byte-order mark is left out.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let path: Arc<Path> = path.into();
        let fault = |error| fault(&path, None, error);
        let file = File::open(&path).map_err(fault)?;
        if file.metadata().map_err(fault)?.is_dir() {
            return Err(fault(io::ErrorKind::IsADirectory.into()));
        }
        let file = BufReader::with_capacity(BUFFER_BYTES, file);
        let (head, bytes) = with_head(file).map_err(fault)?;
        let (packing, unpacked): (_, Box<dyn Read + Send>) = if head.starts_with(GZIP_MAGIC) {
            // A file may hold several members, as bgzip and concatenation make them.
            let decoder = flate2::bufread::MultiGzDecoder::new(bytes);
            ("gzip", Box::new(decoder))
        } else if head.starts_with(ZSTD_MAGIC) {
            let decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(fault)?;
            ("zstd", Box::new(decoder))
        } else {
            return Ok(Self::new(path.clone(), None, head, bytes));
        };
        let unpacked = BufReader::with_capacity(BUFFER_BYTES, unpacked);
        let (head, bytes) =
            with_head(unpacked).map_err(|e| self::fault(&path, Some(packing), e))?;
        Ok(Self::new(path.clone(), Some(packing), head, bytes))
    }

    fn new(
        path: Arc<Path>,
        packing: Option<&'static str>,
        mut head: Vec<u8>,
        mut bytes: Box<dyn BufRead + Send>,
    ) -> Self {
        if head.starts_with(UTF8_BOM) {
            // The head is the first thing in `bytes`, as one piece.
            bytes.consume(UTF8_BOM.len());
            head.drain(..UTF8_BOM.len());
        }
        Self {
            path,
            bytes,
            packing,
            head,
        }
    }

    /// The file.
    pub fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// What the file is packed with.
    pub fn packing(&self) -> Option<&'static str> {
        self.packing
    }

    /// The first bytes, up to a few thousand, whatever has been read since.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// The next bytes; none at the end of the file.
    pub fn peek(&mut self) -> Result<&[u8], DataError> {
        self.bytes
            .fill_buf()
            .map_err(|e| fault(&self.path, self.packing, e))
    }

    /// Goes on by so many of the bytes seen by [`Input::peek`].
    pub fn consume(&mut self, count: usize) {
        self.bytes.consume(count);
    }

    /// Appends a line with its end, but no more than `limit` bytes; returns how many.
    pub fn read_line(&mut self, line: &mut Vec<u8>, limit: usize) -> Result<usize, DataError> {
        let mut bytes = (&mut self.bytes).take(limit as u64);
        bytes
            .read_until(b'\n', line)
            .map_err(|e| fault(&self.path, self.packing, e))
    }
}

/// Reads the beginning and puts it back.
fn with_head(
    mut bytes: impl BufRead + Send + 'static,
) -> io::Result<(Vec<u8>, Box<dyn BufRead + Send>)> {
    let mut head = Vec::new();
    (&mut bytes).take(HEAD_BYTES).read_to_end(&mut head)?;
    let whole = Cursor::new(head.clone()).chain(bytes);
    Ok((head, Box::new(whole)))
}

fn fault(path: &Path, packing: Option<&'static str>, source: io::Error) -> DataError {
    let path = path.to_owned();
    match packing {
        Some(packing) => DataError::Damaged {
            path,
            packing,
            source,
        },
        None => DataError::Unreadable { path, source },
    }
}
