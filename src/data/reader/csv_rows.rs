//! Tables with a header: CSV and TSV.
//!
//! Records are cut out as the file streams past, by the state of their quotes alone; splitting
//! them into cells is left to whoever wants the row. Quotes are those of RFC 4180, read as leniently
//! as spreadsheets write them: a quote inside a bare cell is a character, and so is what stands
//! behind a closing quote.
//!
//! # References
//! RFC 4180.

use std::collections::HashSet;
use std::sync::Arc;

use memchr::{memchr, memchr_iter, memchr2};
use serde_json::{Map, Value};

use super::compressed::Input;
use super::record::{Batch, Content, Place, utf8};
use super::{Rows, too_large};
use crate::data::faults::{DataError, RowError};

/// The names of the columns, and what stands between cells.
#[derive(Debug)]
pub(super) struct Header {
    names: Vec<String>,
    delimiter: u8,
}

/// A table.
pub(super) struct CsvRows {
    input: Input,
    limit: usize,
    /// Told from the header where the name of the file does not say it.
    delimiter: Option<u8>,
    header: Option<Arc<Header>>,
    /// Line of the next byte.
    line: u64,
}

impl CsvRows {
    /// Reads from the header on.
    pub fn new(input: Input, delimiter: Option<u8>, limit: usize) -> Self {
        Self {
            input,
            limit,
            delimiter,
            header: None,
            line: 1,
        }
    }

    /// Appends the next record that is not blank, with its line end; tells its line.
    fn record(&mut self, text: &mut Vec<u8>, delimiter: u8) -> Result<Option<u64>, DataError> {
        let start = text.len();
        loop {
            let line = self.line;
            let mut quotes = Quotes::new(delimiter);
            loop {
                let chunk = self.input.peek()?;
                if chunk.is_empty() {
                    break;
                }
                let (used, is_end) = quotes.scan(chunk);
                text.extend_from_slice(&chunk[..used]);
                self.line += memchr_iter(b'\n', &chunk[..used]).count() as u64;
                self.input.consume(used);
                if text.len() - start > self.limit {
                    return Err(too_large(&self.input, Place::Line(line), self.limit));
                }
                if is_end {
                    break;
                }
            }
            match &text[start..] {
                [] => return Ok(None),
                b"\n" | b"\r\n" => text.truncate(start),
                _ => return Ok(Some(line)),
            }
        }
    }

    /// Reads the names of the columns; none in an empty file.
    fn read_header(&mut self) -> Result<Option<Arc<Header>>, DataError> {
        let mut text = Vec::new();
        // No name holds a line end, so that any delimiter finds the end of the header.
        let delimiter = self.delimiter.unwrap_or(b',');
        let Some(line) = self.record(&mut text, delimiter)? else {
            return Ok(None);
        };
        let fault = |reason: String| DataError::BadHeader {
            path: self.input.path().to_path_buf(),
            line,
            reason,
        };
        let text = without_line_end(&text);
        let text = utf8(text).map_err(|e| fault(format!("is {e}")))?;
        let delimiter = self.delimiter.unwrap_or_else(|| delimiter_of(text));
        let cells = cells(text, delimiter).map_err(|e| fault(e.to_string()))?;
        let names: Vec<String> = cells.iter().map(|name| name.trim().to_owned()).collect();
        let mut seen = HashSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(name.as_str())) {
            return Err(fault(format!(
                "names column `{twice}` twice; rename one of them"
            )));
        }
        Ok(Some(Arc::new(Header { names, delimiter })))
    }
}

impl Rows for CsvRows {
    fn next(&mut self, batch: &mut Batch) -> Result<bool, DataError> {
        if self.header.is_none() {
            self.header = self.read_header()?;
        }
        let Some(header) = self.header.clone() else {
            return Ok(false);
        };
        let start = batch.text.len();
        let Some(line) = self.record(&mut batch.text, header.delimiter)? else {
            return Ok(false);
        };
        let end = start + without_line_end(&batch.text[start..]).len();
        batch.push(Place::Line(line), Content::Cells(start..end, header));
        Ok(true)
    }
}

/// The row of a record.
pub(super) fn object(record: &[u8], header: &Header) -> Result<Map<String, Value>, RowError> {
    let cells = cells(utf8(record)?, header.delimiter)?;
    if cells.len() != header.names.len() {
        return Err(RowError::CellCount {
            expected: header.names.len(),
            found: cells.len(),
        });
    }
    let names = header.names.iter().cloned();
    Ok(names.zip(cells.into_iter().map(Value::String)).collect())
}

/// Where a byte stands in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    /// At the beginning of a cell.
    Start,
    /// In a cell, where quotes are characters.
    Bare,
    /// In quotes.
    Quoted,
    /// Behind a quote in quotes: the first of two, or the closing one.
    AfterQuote,
}

/// Finds the end of a record.
struct Quotes {
    delimiter: u8,
    inside: Inside,
}

impl Quotes {
    fn new(delimiter: u8) -> Self {
        Self {
            delimiter,
            inside: Inside::Start,
        }
    }

    /// Goes through a chunk up to the end of the record; tells how far, and whether it is there.
    fn scan(&mut self, chunk: &[u8]) -> (usize, bool) {
        let mut i = 0;
        while i < chunk.len() {
            let rest = &chunk[i..];
            let idle = match self.inside {
                Inside::Quoted => memchr(b'"', rest),
                Inside::Bare => memchr2(self.delimiter, b'\n', rest),
                Inside::Start | Inside::AfterQuote => Some(0),
            };
            let Some(idle) = idle else { break };
            i += idle + 1;
            let byte = rest[idle];
            if byte == b'\n' && self.inside != Inside::Quoted {
                return (i, true);
            }
            self.inside = self.inside.step(byte, self.delimiter);
        }
        (chunk.len(), false)
    }
}

impl Inside {
    fn step(self, byte: u8, delimiter: u8) -> Self {
        match (self, byte) {
            (Self::Start, b'"') | (Self::AfterQuote, b'"') => Self::Quoted,
            (Self::Quoted, b'"') => Self::AfterQuote,
            (Self::Quoted, _) => Self::Quoted,
            (_, byte) if byte == delimiter => Self::Start,
            _ => Self::Bare,
        }
    }
}

/// Splits a record, without its line end, into its cells.
fn cells(record: &str, delimiter: u8) -> Result<Vec<String>, RowError> {
    let mut cells = Vec::new();
    let mut cell = String::new();
    // Where the part of the cell begins that is not yet copied.
    let mut from = 0;
    let mut inside = Inside::Start;
    for (i, byte) in record.bytes().enumerate() {
        let next = inside.step(byte, delimiter);
        // Only delimiters and quotes are left out: ASCII, so that slices stay whole characters.
        let is_left_out = matches!(
            (inside, next),
            (Inside::Start, Inside::Quoted) | (_, Inside::Start | Inside::AfterQuote)
        );
        if is_left_out {
            cell.push_str(&record[from..i]);
            from = i + 1;
        }
        if next == Inside::Start {
            cells.push(std::mem::take(&mut cell));
        }
        inside = next;
    }
    if inside == Inside::Quoted {
        return Err(RowError::UnclosedQuote);
    }
    cell.push_str(&record[from..]);
    cells.push(cell);
    Ok(cells)
}

/// The delimiter of a header: a comma, unless there is none, but a semicolon or a tab.
fn delimiter_of(header: &str) -> u8 {
    let has = |delimiter: u8| cells(header, delimiter).is_ok_and(|cells| cells.len() > 1);
    [b',', b';', b'\t']
        .into_iter()
        .find(|d| has(*d))
        .unwrap_or(b',')
}

fn without_line_end(record: &[u8]) -> &[u8] {
    let record = record.strip_suffix(b"\n").unwrap_or(record);
    record.strip_suffix(b"\r").unwrap_or(record)
}
