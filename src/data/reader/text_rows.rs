//! Plain text: each line, each paragraph, or the whole file is a row `{"text": …}`.

use serde_json::{Map, Value};

use super::compressed::Input;
use super::record::{Batch, Content, Place, utf8};
use super::{Rows, too_large};
use crate::data::faults::{DataError, RowError};
use crate::recipe::plan::SampleBy;

/// A text file.
pub(super) struct TextRows {
    input: Input,
    sample_by: SampleBy,
    limit: usize,
    line: u64,
}

impl TextRows {
    /// Reads from the first line on.
    pub fn new(input: Input, sample_by: SampleBy, limit: usize) -> Self {
        Self {
            input,
            sample_by,
            limit,
            line: 0,
        }
    }

    /// Whether one more line was there. `start` is where the row begins in the buffer, `first` its
    /// first line.
    fn append_line(
        &mut self,
        batch: &mut Batch,
        start: usize,
        first: u64,
    ) -> Result<bool, DataError> {
        // One byte more than is allowed tells a row that is too large from one that just fits.
        let room = (self.limit + 1).saturating_sub(batch.text.len() - start);
        let read = self.input.read_line(&mut batch.text, room)?;
        if batch.text.len() - start > self.limit {
            return Err(too_large(&self.input, Place::Line(first), self.limit));
        }
        self.line += u64::from(read > 0);
        Ok(read > 0)
    }

    /// Reads one line that is not blank.
    fn line(&mut self, batch: &mut Batch) -> Result<bool, DataError> {
        let start = batch.text.len();
        while self.append_line(batch, start, self.line + 1)? {
            if !is_blank(&batch.text[start..]) {
                batch.push(
                    Place::Line(self.line),
                    Content::Text(line_range(batch, start)),
                );
                return Ok(true);
            }
            batch.text.truncate(start);
        }
        Ok(false)
    }

    /// Reads lines up to a blank one.
    fn paragraph(&mut self, batch: &mut Batch) -> Result<bool, DataError> {
        let start = batch.text.len();
        let mut first = self.line + 1;
        loop {
            let line_start = batch.text.len();
            let is_end = !self.append_line(batch, start, first)?;
            if is_end || is_blank(&batch.text[line_start..]) {
                batch.text.truncate(line_start);
                if line_start > start {
                    batch.push(Place::Line(first), Content::Text(line_range(batch, start)));
                }
                if is_end || line_start > start {
                    return Ok(line_start > start);
                }
                first = self.line + 1;
            }
        }
    }

    /// Reads all there is.
    fn document(&mut self, batch: &mut Batch) -> Result<bool, DataError> {
        let start = batch.text.len();
        while self.append_line(batch, start, 1)? {}
        if is_blank(&batch.text[start..]) {
            batch.text.truncate(start);
            return Ok(false);
        }
        batch.push(Place::Line(1), Content::Text(start..batch.text.len()));
        Ok(true)
    }
}

impl Rows for TextRows {
    fn next(&mut self, batch: &mut Batch) -> Result<bool, DataError> {
        match self.sample_by {
            SampleBy::Line => self.line(batch),
            SampleBy::Paragraph => self.paragraph(batch),
            SampleBy::Document => self.document(batch),
        }
    }
}

fn is_blank(text: &[u8]) -> bool {
    text.trim_ascii().is_empty()
}

/// What was read from `start` on, without the last line end.
fn line_range(batch: &Batch, start: usize) -> std::ops::Range<usize> {
    let text = &batch.text[start..];
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    start..start + text.len()
}

/// The row of a text, with `\n` at the ends of lines whatever the file has.
pub(super) fn object(bytes: &[u8]) -> Result<Map<String, Value>, RowError> {
    let text = utf8(bytes)?.replace("\r\n", "\n");
    Ok(Map::from_iter([("text".to_owned(), Value::String(text))]))
}
