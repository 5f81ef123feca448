//! Reads datasets row by row: JSON lines, or one JSON array of objects in a `.json` file.
//!
//! JSON lines are read in bounded batches, so that a file may be larger than memory; an array is
//! read whole. Here rows are bytes with a line number: [`parse`] makes objects of them.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value};

use super::faults::{DataError, RowError, type_name};

/// A batch ends after this many rows …
const BATCH_ROWS: usize = 8192;
/// … or this many bytes, whichever comes first.
const BATCH_BYTES: usize = 16 << 20;

const UTF8_BOM: &[u8] = b"\xef\xbb\xbf";

/// One row as it stands in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Line on which it starts, from 1.
    pub line: usize,
    /// Its bytes, without white space around them.
    pub bytes: Vec<u8>,
}

impl Record {
    fn new(line: usize, bytes: &[u8]) -> Self {
        let bytes = bytes.trim_ascii().to_vec();
        Self { line, bytes }
    }
}

/// A dataset file, read in batches.
#[derive(Debug)]
pub struct Reader {
    path: std::path::PathBuf,
    input: BufReader<File>,
    line: usize,
    is_json: bool,
}

impl Reader {
    /// Opens a dataset file.
    ///
    /// # Errors
    /// The file does not exist, is a directory, or cannot be read.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let unreadable = |source| DataError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.is_dir() {
            return Err(unreadable(std::io::ErrorKind::IsADirectory.into()));
        }
        Ok(Self {
            path: path.to_owned(),
            input: BufReader::with_capacity(1 << 20, file),
            line: 0,
            is_json: path.extension().is_some_and(|ext| ext == "json"),
        })
    }

    /// The next rows in order; none at the end of the file. Blank lines are no rows.
    ///
    /// # Errors
    /// The file cannot be read, or its JSON array is cut off.
    pub fn next_batch(&mut self) -> Result<Vec<Record>, DataError> {
        if self.line == 0 && self.is_json && self.starts_with_bracket()? {
            return self.read_array();
        }
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < BATCH_ROWS && bytes < BATCH_BYTES {
            let mut buffer = Vec::new();
            let read = self.input.read_until(b'\n', &mut buffer);
            if read.map_err(|e| self.unreadable(e))? == 0 {
                break;
            }
            self.line += 1;
            if self.line == 1 && buffer.starts_with(UTF8_BOM) {
                buffer.drain(..UTF8_BOM.len());
            }
            bytes += buffer.len();
            let record = Record::new(self.line, &buffer);
            if !record.bytes.is_empty() {
                batch.push(record);
            }
        }
        // A run of blank lines as long as a batch is not the end of the file.
        if batch.is_empty() && bytes > 0 {
            return self.next_batch();
        }
        Ok(batch)
    }

    fn unreadable(&self, source: std::io::Error) -> DataError {
        DataError::Unreadable {
            path: self.path.clone(),
            source,
        }
    }

    /// Whether the first character that is not white space opens an array.
    fn starts_with_bracket(&mut self) -> Result<bool, DataError> {
        let head = match self.input.fill_buf() {
            Ok(head) => head.strip_prefix(UTF8_BOM).unwrap_or(head),
            Err(e) => return Err(self.unreadable(e)),
        };
        Ok(head.trim_ascii_start().first() == Some(&b'['))
    }

    fn read_array(&mut self) -> Result<Vec<Record>, DataError> {
        let mut text = Vec::new();
        let read = self.input.read_to_end(&mut text);
        read.map_err(|e| self.unreadable(e))?;
        let text = text.strip_prefix(UTF8_BOM).unwrap_or(&text);
        let (records, last_line) = split_array(text).map_err(|line| DataError::UnclosedArray {
            path: self.path.clone(),
            line,
        })?;
        self.line = last_line;
        Ok(records)
    }
}

/// Cuts the elements out of a JSON array and counts lines; what the elements hold is left to the
/// JSON parser. `Err` is the line of an array that does not end.
fn split_array(text: &[u8]) -> Result<(Vec<Record>, usize), usize> {
    let mut records = Vec::new();
    let (mut line, mut array_line) = (1, 1);
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    let mut start: Option<(usize, usize)> = None;
    let mut after_comma = false;
    for (i, &byte) in text.iter().enumerate() {
        line += usize::from(byte == b'\n');
        if in_string {
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        match byte {
            b'[' if depth == 0 && start.is_none() => (depth, array_line) = (1, line),
            b',' | b']' if depth == 1 => {
                after_comma |= byte == b',';
                match start.take() {
                    Some((from, line)) => records.push(Record::new(line, &text[from..i])),
                    // Nothing before or behind a comma: an empty row, which does not parse.
                    None if after_comma => records.push(Record::new(line, b"")),
                    None => {}
                }
                depth = usize::from(byte == b',');
            }
            byte if byte.is_ascii_whitespace() => {}
            byte => {
                start.get_or_insert((i, line));
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth -= usize::from(depth > 1),
                    _ => {}
                }
            }
        }
    }
    if depth > 0 {
        return Err(array_line);
    }
    // Whatever stands behind the array becomes a row that does not parse.
    if let Some((from, line)) = start {
        records.push(Record::new(line, &text[from..]));
    }
    Ok((records, line))
}

/// The JSON object in a row.
///
/// # Errors
/// Not UTF-8, not JSON, not an object.
pub fn parse(bytes: &[u8]) -> Result<Map<String, Value>, RowError> {
    let text = std::str::from_utf8(bytes).map_err(|e| RowError::NotUtf8 {
        offset: e.valid_up_to(),
    })?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(text: &str) -> Vec<(usize, String)> {
        let (records, _) = split_array(text.as_bytes()).expect("a closed array");
        records
            .into_iter()
            .map(|r| (r.line, String::from_utf8_lossy(&r.bytes).into_owned()))
            .collect()
    }

    #[test]
    fn arrays_are_cut_into_elements() {
        assert_eq!(elements("[]"), []);
        assert_eq!(
            elements("[\n{\"a\": \"],[\\\"\"},\n\n {\"b\": [1, {}]}\n]\n"),
            [
                (2, "{\"a\": \"],[\\\"\"}".to_owned()),
                (4, "{\"b\": [1, {}]}".to_owned())
            ]
        );
    }

    #[test]
    fn broken_arrays_leave_rows_that_do_not_parse() {
        assert_eq!(split_array(b"\n[{\"a\": 1},").unwrap_err(), 2);
        assert_eq!(split_array(b"[{\"a\": \"]").unwrap_err(), 1);
        for text in [
            "[{},]", "[,{}]", "[{}] x", "[{} {}]", "[}]", "[{]}]", "[{}] }",
        ] {
            let bad = elements(text)
                .iter()
                .any(|(_, row)| parse(row.as_bytes()).is_err());
            assert!(bad, "{text}");
        }
    }

    #[test]
    fn rows_that_are_no_objects_say_what_they_are() {
        let says = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
        assert_eq!(says(b"[1]"), "a row must be a JSON object, found an array");
        assert!(says(b"{\"a\": \xff}").starts_with("not UTF-8"));
        assert_eq!(says(b"{\"a\" 1}"), "not valid JSON: expected `:`");
    }
}
