//! One row of a dataset file, as it stands in the file until somebody asks for its object.
//!
//! Readers cut files into records; what a record holds is parsed by [`Record::object`], which
//! callers may do on many cores. The text of all records of a batch lies in one shared buffer.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use parquet::record::Row;
use serde_json::{Map, Value};

use super::csv_rows::{self, Header};
use super::{parquet_values, text_rows};
use crate::data::row_error::{RowError, type_name};

/// Where a row stands in its file, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// The line on which it starts, in text formats.
    Line(u64),
    /// Its number among the rows, in Parquet.
    Row(u64),
}

impl Place {
    /// The line or the row.
    #[must_use]
    pub fn number(self) -> u64 {
        match self {
            Self::Line(number) | Self::Row(number) => number,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "{line}"),
            Self::Row(row) => write!(f, "row {row}"),
        }
    }
}

/// One row as it stands in the file.
#[derive(Debug, Clone)]
pub struct Record {
    /// Where it is.
    pub place: Place,
    content: Content,
    text: Arc<Vec<u8>>,
}

/// What a row is made of; ranges are of the batch's buffer.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// JSON that should be an object.
    Json(Range<usize>),
    /// A line, paragraph or document.
    Text(Range<usize>),
    /// Cells with delimiters between them, not yet split.
    Cells(Range<usize>, Arc<Header>),
    /// A row of Parquet.
    Columns(Box<Row>),
}

impl Record {
    /// The row as a JSON object.
    ///
    /// # Errors
    /// The row is not UTF-8, not JSON, not an object, or has other cells than the header says.
    pub fn object(&self) -> Result<Map<String, Value>, RowError> {
        match &self.content {
            Content::Json(range) => parse(&self.text[range.clone()]),
            Content::Text(range) => text_rows::object(&self.text[range.clone()]),
            Content::Cells(range, header) => csv_rows::object(&self.text[range.clone()], header),
            Content::Columns(row) => Ok(parquet_values::object(row)),
        }
    }

    /// The row as a JSON object; see [`Record::object`].
    ///
    /// # Errors
    /// Those of [`Record::object`].
    pub fn into_object(self) -> Result<Map<String, Value>, RowError> {
        self.object()
    }
}

/// Records in the making: rows are appended to one buffer, which they share in the end.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The text of all rows.
    pub text: Vec<u8>,
    rows: Vec<(Place, Content)>,
    /// Bytes of rows that do not lie in `text`.
    elsewhere: usize,
}

impl Batch {
    /// Adds a row.
    pub fn push(&mut self, place: Place, content: Content) {
        self.rows.push((place, content));
    }

    /// Adds a row that takes about so many bytes outside the buffer.
    pub fn push_sized(&mut self, place: Place, content: Content, bytes: usize) {
        self.elsewhere += bytes;
        self.rows.push((place, content));
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// About how many bytes the rows take.
    pub fn bytes(&self) -> usize {
        self.text.len() + self.elsewhere
    }

    /// Forgets all rows and keeps the buffer.
    pub fn clear(&mut self) {
        self.text.clear();
        self.rows.clear();
        self.elsewhere = 0;
    }

    /// The range of the buffer from `start` on, without white space around it.
    pub fn trimmed(&self, start: usize) -> Range<usize> {
        let text = &self.text[start..];
        let from = start + (text.len() - text.trim_ascii_start().len());
        from..from + text.trim_ascii().len()
    }

    /// The rows as records.
    pub fn into_records(self) -> Vec<Record> {
        let text = Arc::new(self.text);
        let record = |(place, content)| Record {
            place,
            content,
            text: Arc::clone(&text),
        };
        self.rows.into_iter().map(record).collect()
    }
}

/// The JSON object in a row.
fn parse(bytes: &[u8]) -> Result<Map<String, Value>, RowError> {
    let text = utf8(bytes)?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(RowError::NotAnObject {
            found: type_name(&other),
        }),
        Err(error) => {
            let message = error.to_string();
            let end = message.rfind(" at line ").unwrap_or(message.len());
            Err(RowError::Json {
                line: error.line().max(1),
                column: error.column(),
                message: message[..end].to_owned(),
            })
        }
    }
}

/// The text of a row.
pub(super) fn utf8(bytes: &[u8]) -> Result<&str, RowError> {
    std::str::from_utf8(bytes).map_err(|e| RowError::NotUtf8 {
        offset: e.valid_up_to(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_no_objects_say_what_they_are() {
        let says = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
        assert_eq!(says(b"[1]"), "a row must be a JSON object, found an array");
        assert!(says(b"{\"a\": \xff}").starts_with("not UTF-8"));
        assert_eq!(says(b"{\"a\" 1}"), "not valid JSON: expected `:`");
    }
}
