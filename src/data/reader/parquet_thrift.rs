//! As much of Thrift's compact protocol as it takes to distrust a Parquet file.
//!
//! The `parquet` crate reads the metadata; but it reserves memory by numbers that the file claims,
//! and goes as deep as a schema is nested. Neither can be caught once it fails, so both are looked
//! at before.
//!
//! # References
//! Apache Thrift, "Thrift compact protocol"; Apache Parquet, `parquet.thrift`.

/// Structs, lists and maps inside each other; Parquet's own go less deep.
const MAX_DEPTH: usize = 32;

/// A type, as the low four bits of a header tell it.
type Kind = u8;
const STOP: Kind = 0;
const BINARY: Kind = 8;
const STRUCT: Kind = 12;

/// Where a reader of Thrift stands. `None` from any method: the bytes are no Thrift, or cut off.
pub(super) struct Thrift<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Thrift<'a> {
    /// Reads from the first byte on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// An unsigned integer of variable length.
    pub fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// A signed integer: zigzag.
    pub fn int(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// The next field of a struct: its number and type; `STOP` at the end.
    fn field(&mut self, before: i64) -> Option<(i64, Kind)> {
        let header = self.byte()?;
        let (delta, kind) = (header >> 4, header & 0x0f);
        if kind == STOP {
            return Some((before, STOP));
        }
        let id = if delta == 0 {
            self.int()?
        } else {
            before.checked_add(i64::from(delta))?
        };
        Some((id, kind))
    }

    /// Goes through the fields of a struct; `read` returns whether it has read the field.
    pub fn fields(
        &mut self,
        mut read: impl FnMut(&mut Self, i64, Kind) -> Option<bool>,
    ) -> Option<()> {
        let mut id = 0;
        loop {
            let (next, kind) = self.field(id)?;
            if kind == STOP {
                return Some(());
            }
            id = next;
            if !read(self, id, kind)? {
                self.skip(kind, MAX_DEPTH)?;
            }
        }
    }

    /// The length and type of a list.
    pub fn list(&mut self) -> Option<(u64, Kind)> {
        let header = self.byte()?;
        let size = match header >> 4 {
            15 => self.varint()?,
            size => u64::from(size),
        };
        Some((size, header & 0x0f))
    }

    fn advance(&mut self, count: u64) -> Option<()> {
        let at = self.at.checked_add(usize::try_from(count).ok()?)?;
        self.at = (at <= self.bytes.len()).then_some(at)?;
        Some(())
    }

    /// The next bytes as they are, or as many as there are.
    pub fn take_up_to(&mut self, count: usize) -> &'a [u8] {
        let rest = &self.bytes[self.at..];
        let taken = &rest[..count.min(rest.len())];
        self.at += taken.len();
        taken
    }

    fn skip(&mut self, kind: Kind, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match kind {
            // Booleans are in the header of their field.
            1 | 2 => Some(()),
            3 => self.advance(1),
            4..=6 => self.varint().map(drop),
            7 => self.advance(8),
            BINARY => {
                let length = self.varint()?;
                self.advance(length)
            }
            9 | 10 => {
                let (size, kind) = self.list()?;
                (0..size).try_for_each(|_| self.skip_element(kind, depth))
            }
            11 => {
                let size = self.varint()?;
                let kinds = if size > 0 { self.byte()? } else { 0 };
                (0..size).try_for_each(|_| {
                    self.skip_element(kinds >> 4, depth)?;
                    self.skip_element(kinds & 0x0f, depth)
                })
            }
            STRUCT => self.fields(|reader, _, kind| reader.skip(kind, depth).map(|()| true)),
            13 => self.advance(16),
            _ => None,
        }
    }

    /// Elements of lists and maps take at least one byte each, so that a claimed size is no loop.
    fn skip_element(&mut self, kind: Kind, depth: usize) -> Option<()> {
        match kind {
            1 | 2 => self.advance(1),
            kind => self.skip(kind, depth),
        }
    }
}

/// The numbers of children in the schema of a file's metadata, in the order of the schema.
pub(super) fn schema_children(metadata: &[u8]) -> Option<Vec<i64>> {
    const SCHEMA: i64 = 2;
    const NUM_CHILDREN: i64 = 5;
    let mut children = Vec::new();
    Thrift::new(metadata).fields(|thrift, id, _| {
        if id != SCHEMA {
            return Some(false);
        }
        let (size, kind) = thrift.list()?;
        for _ in 0..if kind == STRUCT { size } else { 0 } {
            let mut count = 0;
            thrift.fields(|thrift, id, _| {
                if id == NUM_CHILDREN {
                    count = thrift.int()?;
                }
                Some(id == NUM_CHILDREN)
            })?;
            children.push(count);
        }
        Some(true)
    })?;
    Some(children)
}

/// What is looked at of a page's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PageHeader {
    /// Bytes of the header itself.
    pub length: usize,
    /// Bytes of the page when unpacked.
    pub unpacked: i64,
    /// Bytes of the page in the file.
    pub packed: i64,
}

impl PageHeader {
    /// Reads the header at the beginning of `bytes`.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut header = Self::default();
        let mut thrift = Thrift::new(bytes);
        thrift.fields(|thrift, id, _| {
            match id {
                2 => header.unpacked = thrift.int()?,
                3 => header.packed = thrift.int()?,
                _ => return Some(false),
            }
            Some(true)
        })?;
        header.length = thrift.position();
        Some(header)
    }
}
