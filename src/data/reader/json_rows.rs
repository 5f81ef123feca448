//! JSON lines, and JSON values that span lines: the elements of one array, or objects one after
//! another.
//!
//! Rows are cut out by their quotes and brackets alone, as the file streams past; what stands
//! between them is left to the JSON parser, so that one broken row is one bad row.

use memchr::memchr3;

use super::compressed::Input;
use super::record::{Batch, Content, Place};
use super::{Rows, too_large};
use crate::data::faults::DataError;

/// JSON lines: one row a line, blank lines are none.
pub(super) struct JsonLines {
    input: Input,
    limit: usize,
    line: u64,
}

impl JsonLines {
    /// Reads from the first line on.
    pub fn new(input: Input, limit: usize) -> Self {
        Self {
            input,
            limit,
            line: 0,
        }
    }
}

impl Rows for JsonLines {
    fn next(&mut self, batch: &mut Batch) -> Result<bool, DataError> {
        let start = batch.text.len();
        // Room for the end of a line that is as long as it may be.
        let room = self.limit + 2;
        while let read @ 1.. = self.input.read_line(&mut batch.text, room)? {
            self.line += 1;
            let range = batch.trimmed(start);
            if range.len() > self.limit || (read == room && !batch.text.ends_with(b"\n")) {
                let place = Place::Line(self.line);
                return Err(too_large(&self.input, place, self.limit));
            }
            if !range.is_empty() {
                batch.push(Place::Line(self.line), Content::Json(range));
                return Ok(true);
            }
            batch.text.truncate(start);
        }
        Ok(false)
    }
}

/// How the text of a `.json` file is cut into rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// One row a line.
    Lines,
    /// One array whose elements are the rows.
    Array,
    /// Values one after another, over any number of lines.
    Values,
}

/// Tells how a `.json` file is laid out from its first bytes: a `{` that its line does not close
/// opens an object over several lines.
pub(super) fn layout(head: &[u8]) -> Layout {
    let head = head.trim_ascii_start();
    if head.first() == Some(&b'[') {
        return Layout::Array;
    }
    let Some(end) = head.iter().position(|byte| *byte == b'\n') else {
        return Layout::Lines;
    };
    let mut nesting = Nesting::default();
    for byte in &head[..end] {
        nesting.step(*byte);
    }
    if head.first() == Some(&b'{') && nesting.depth > 0 && !nesting.in_string {
        Layout::Values
    } else {
        Layout::Lines
    }
}

/// How deep in brackets, and whether in a string.
#[derive(Debug, Default)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    fn step(&mut self, byte: u8) {
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
            return;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }

    /// How many of the first bytes of a string cannot end it and are no line end.
    fn idle(&self, bytes: &[u8]) -> usize {
        if self.in_string && !self.escaped {
            memchr3(b'"', b'\\', b'\n', bytes).unwrap_or(bytes.len())
        } else {
            0
        }
    }
}

/// Where the next byte stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Around {
    /// Outside of any array; the next value is a row of its own.
    Nothing,
    /// In the array that opens on this line.
    Array {
        line: u64,
        /// Whether a comma was seen in it.
        has_comma: bool,
    },
    /// Behind an array, in something that should not be there.
    Rest,
}

/// Rows that may span lines.
pub(super) struct JsonValues {
    input: Input,
    limit: usize,
    splitter: Splitter,
}

impl JsonValues {
    /// Reads from the first byte on.
    pub fn new(input: Input, layout: Layout, limit: usize) -> Self {
        Self {
            input,
            limit,
            splitter: Splitter::new(layout),
        }
    }
}

impl Rows for JsonValues {
    fn next(&mut self, batch: &mut Batch) -> Result<bool, DataError> {
        let start = batch.text.len();
        let line = loop {
            let chunk = self.input.peek()?;
            if chunk.is_empty() {
                let end = self.splitter.end();
                break end.map_err(|line| DataError::UnclosedArray {
                    path: self.input.path().to_path_buf(),
                    line: usize::try_from(line).unwrap_or(usize::MAX),
                })?;
            }
            let (used, line) = self.splitter.scan(chunk, &mut batch.text);
            self.input.consume(used);
            if batch.text.len() - start > self.limit {
                let line = line.or(self.splitter.row).unwrap_or(self.splitter.line);
                return Err(too_large(&self.input, Place::Line(line), self.limit));
            }
            if line.is_some() {
                break line;
            }
        };
        if let Some(line) = line {
            let range = batch.trimmed(start);
            batch.push(Place::Line(line), Content::Json(range));
        }
        Ok(line.is_some())
    }
}

/// Finds the rows in text that comes in chunks.
struct Splitter {
    layout: Layout,
    around: Around,
    nesting: Nesting,
    /// Line of the next byte.
    line: u64,
    /// Line on which the row began, inside a row.
    row: Option<u64>,
}

impl Splitter {
    fn new(layout: Layout) -> Self {
        Self {
            layout,
            around: Around::Nothing,
            nesting: Nesting::default(),
            line: 1,
            row: None,
        }
    }

    /// Goes through a chunk, at most up to the end of a row, and appends what belongs to the row.
    /// Tells how far it went, and the line on which the row that ends there began.
    fn scan(&mut self, chunk: &[u8], text: &mut Vec<u8>) -> (usize, Option<u64>) {
        // Where the part of the row in this chunk begins.
        let mut from = 0;
        let mut i = 0;
        while i < chunk.len() {
            i += self.nesting.idle(&chunk[i..]);
            let Some(&byte) = chunk.get(i) else { break };
            let line = self.line;
            self.line += u64::from(byte == b'\n');
            if self.row.is_some() {
                if self.ends_before(byte) {
                    text.extend_from_slice(&chunk[from..i]);
                    self.leave(byte);
                    return (i + 1, self.row.take());
                }
            } else if byte.is_ascii_whitespace() {
                i += 1;
                continue;
            } else if self.is_between(byte) {
                if self.misses_row(byte) {
                    return (i + 1, Some(line));
                }
                i += 1;
                continue;
            } else {
                self.enter(line);
                from = i;
            }
            self.nesting.step(byte);
            i += 1;
            if self.ends_behind(byte) {
                text.extend_from_slice(&chunk[from..i]);
                return (i, self.row.take());
            }
        }
        if self.row.is_some() {
            text.extend_from_slice(&chunk[from..]);
        }
        (chunk.len(), None)
    }

    /// Whether a byte that no row holds belongs to an array around the rows.
    fn is_between(&self, byte: u8) -> bool {
        match self.around {
            Around::Nothing => byte == b'[' && self.layout == Layout::Array,
            Around::Array { .. } => matches!(byte, b',' | b']'),
            Around::Rest => false,
        }
    }

    /// Takes such a byte; whether a row is missing before it.
    fn misses_row(&mut self, byte: u8) -> bool {
        match (self.around, byte) {
            (Around::Array { has_comma, .. }, b',' | b']') => {
                self.leave(byte);
                has_comma || byte == b','
            }
            _ => {
                self.around = Around::Array {
                    line: self.line,
                    has_comma: false,
                };
                false
            }
        }
    }

    /// Begins a row.
    fn enter(&mut self, line: u64) {
        if self.around == Around::Nothing && self.layout == Layout::Array {
            self.around = Around::Rest;
        }
        self.row = Some(line);
        self.nesting = Nesting::default();
    }

    /// Whether a row ends before this byte.
    fn ends_before(&self, byte: u8) -> bool {
        let is_inside = self.nesting.in_string || self.nesting.depth > 0;
        !is_inside
            && match self.around {
                Around::Array { .. } => matches!(byte, b',' | b']'),
                // What is no object ends with its line, so that objects behind it are found.
                Around::Nothing => byte == b'\n',
                Around::Rest => false,
            }
    }

    /// Whether a row ends behind this byte.
    fn ends_behind(&self, byte: u8) -> bool {
        self.layout == Layout::Values
            && matches!(byte, b'}' | b']')
            && !self.nesting.in_string
            && self.nesting.depth == 0
    }

    /// Goes past the comma or bracket behind an element.
    fn leave(&mut self, byte: u8) {
        match &mut self.around {
            Around::Array { has_comma, .. } if byte == b',' => *has_comma = true,
            Around::Array { .. } => self.around = Around::Nothing,
            Around::Nothing | Around::Rest => {}
        }
    }

    /// The end of the file: the line of a row that ends there. `Err` is the line of an array that
    /// does not end.
    fn end(&mut self) -> Result<Option<u64>, u64> {
        match self.around {
            Around::Array { line, .. } => Err(line),
            _ => Ok(self.row.take()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows with their lines, whatever the sizes of chunks; `Err` is the line of an unclosed array.
    fn rows(layout: Layout, text: &str) -> Result<Vec<(u64, String)>, u64> {
        let by_chunks = |size: usize| {
            let mut splitter = Splitter::new(layout);
            let (mut found, mut row) = (Vec::new(), Vec::new());
            let mut push = |line, row: &mut Vec<u8>| {
                let bytes = std::mem::take(row);
                found.push((
                    line,
                    String::from_utf8(bytes.trim_ascii().to_vec()).unwrap(),
                ));
            };
            for mut chunk in text.as_bytes().chunks(size) {
                while !chunk.is_empty() {
                    let (used, line) = splitter.scan(chunk, &mut row);
                    chunk = &chunk[used..];
                    line.into_iter().for_each(|line| push(line, &mut row));
                }
            }
            let end = splitter.end()?;
            end.into_iter().for_each(|line| push(line, &mut row));
            Ok(found)
        };
        let whole = by_chunks(text.len().max(1));
        for size in 1..8 {
            assert_eq!(by_chunks(size), whole, "{text} in chunks of {size}");
        }
        whole
    }

    fn elements(text: &str) -> Vec<(u64, String)> {
        rows(Layout::Array, text).unwrap()
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
        assert_eq!(rows(Layout::Array, "\n[{\"a\": 1},"), Err(2));
        assert_eq!(rows(Layout::Array, "[{\"a\": \"]"), Err(1));
        for text in [
            "[{},]", "[,{}]", "[{}] x", "[{} {}]", "[}]", "[{]}]", "[{}] }",
        ] {
            let bad = elements(text).iter().any(|(_, row)| {
                !serde_json::from_str(row).is_ok_and(|v: serde_json::Value| v.is_object())
            });
            assert!(bad, "{text}");
        }
    }

    #[test]
    fn objects_over_several_lines_are_rows() {
        let text = "{\n \"a\": \"}{\"\n}\n\n{\"b\": [\n]} {}\nx\n{}";
        let want = [
            (1, "{\n \"a\": \"}{\"\n}"),
            (5, "{\"b\": [\n]}"),
            (6, "{}"),
            (7, "x"),
            (8, "{}"),
        ];
        let want: Vec<_> = want.iter().map(|(l, s)| (*l, (*s).to_owned())).collect();
        assert_eq!(rows(Layout::Values, text), Ok(want));
    }

    #[test]
    fn the_layout_is_told_by_the_first_line() {
        for (text, want) in [
            ("", Layout::Lines),
            (" \n [", Layout::Array),
            ("{\"a\": 1}\n", Layout::Lines),
            ("{\"a\": \"{\"}\n", Layout::Lines),
            ("{\"a\": 1}", Layout::Lines),
            ("{\n", Layout::Values),
            ("{\"a\": [\n", Layout::Values),
        ] {
            assert_eq!(layout(text.as_bytes()), want, "{text}");
        }
    }
}
