//! Tokenised samples in one file, written once from front to back and then memory-mapped: a
//! dataset takes no more memory than what is being looked at.
//!
//! ```text
//! magic, version                       16 bytes
//! samples, one after the other         ids u32[tokens], then the labels
//! index, one entry a sample            ENTRY bytes each
//! meta                                 JSON
//! footer: index at, samples, meta at, meta bytes, blake3 of index and meta, magic
//! ```
//!
//! All numbers are little-endian. Labels are runs of tokens that train (start and length, u32 each),
//! since a label is always its own id.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::mask::trained;
use super::reader::Place;
use super::{IGNORE_INDEX, Sample, SampleId, contract};

const MAGIC: &[u8; 8] = b"lorafitD";
const VERSION: u64 = 1;
const HEADER: usize = 16;
const ENTRY: usize = 40;
const FOOTER: usize = 4 * 8 + 32 + 8;

/// Flag of a sample that was cut.
const TRUNCATED: u32 = 1;
/// Flag of the second sample of a preference pair.
const REJECTED: u32 = 2;
/// Bit of a place that counts rows, not lines.
const IS_ROW: u64 = 1 << 63;

/// What the index knows of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    offset: u64,
    place: u64,
    /// T
    pub tokens: u32,
    runs: u32,
    /// Tokens that train.
    pub trained: u32,
    /// Index of its file.
    pub file: u32,
    flags: u32,
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.place.to_le_bytes());
        let numbers = [self.tokens, self.runs, self.trained, self.file, self.flags];
        for (number, slot) in numbers.iter().zip(bytes[16..].chunks_exact_mut(4)) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let number = |at: usize| word(&bytes[16 + 4 * at..]);
        Self {
            offset: long(bytes),
            place: long(&bytes[8..]),
            tokens: number(0),
            runs: number(1),
            trained: number(2),
            file: number(3),
            flags: number(4),
        }
    }

    /// Bytes of the sample.
    fn length(&self) -> u64 {
        4 * (u64::from(self.tokens) + 2 * u64::from(self.runs))
    }

    /// Whether it was longer than `max_seq_len`.
    pub fn is_truncated(&self) -> bool {
        self.flags & TRUNCATED != 0
    }

    /// Whether it is the rejected side of a preference pair.
    pub fn is_rejected(&self) -> bool {
        self.flags & REJECTED != 0
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

fn long(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}

/// Writes a store: samples to one place, their index to another until the end.
pub struct StoreWriter<W> {
    data: W,
    index: W,
    offset: u64,
    samples: u64,
    largest_id: Option<(u32, u64)>,
    scratch: Vec<u8>,
}

impl<W: Write> StoreWriter<W> {
    /// Begins a store.
    ///
    /// # Errors
    /// The header cannot be written.
    pub fn new(mut data: W, index: W) -> io::Result<Self> {
        data.write_all(MAGIC)?;
        data.write_all(&VERSION.to_le_bytes())?;
        Ok(Self {
            data,
            index,
            offset: HEADER as u64,
            samples: 0,
            largest_id: None,
            scratch: Vec::new(),
        })
    }

    /// Samples written so far.
    pub fn len(&self) -> u64 {
        self.samples
    }

    /// Whether none is written.
    pub fn is_empty(&self) -> bool {
        self.samples == 0
    }

    /// The largest id and the index of its first sample.
    pub fn largest_id(&self) -> Option<(u32, u64)> {
        self.largest_id
    }

    /// Appends a sample of the file with this index.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    pub fn push(&mut self, sample: &Sample, file: u32, is_rejected: bool) -> io::Result<()> {
        let too_long = || io::Error::other("a sample of more than 2³² tokens");
        let tokens = u32::try_from(sample.input_ids.len()).map_err(|_| too_long())?;
        self.scratch.clear();
        for id in &sample.input_ids {
            self.scratch.extend_from_slice(&id.to_le_bytes());
        }
        let runs = self.labels(sample);
        let mut flags = 0;
        if sample.truncated {
            flags |= TRUNCATED;
        }
        if is_rejected {
            flags |= REJECTED;
        }
        let entry = Entry {
            offset: self.offset,
            place: match sample.source.place {
                Place::Line(n) => n,
                Place::Row(n) => n | IS_ROW,
            },
            tokens,
            runs,
            trained: trained(&sample.labels) as u32,
            file,
            flags,
        };
        self.data.write_all(&self.scratch)?;
        self.index.write_all(&entry.to_bytes())?;
        let largest = sample.input_ids.iter().copied().max().unwrap_or(0);
        if self.largest_id.is_none_or(|(id, _)| largest > id) {
            self.largest_id = Some((largest, self.samples));
        }
        self.offset += self.scratch.len() as u64;
        self.samples += 1;
        Ok(())
    }

    /// Puts the labels behind the ids; returns the number of runs.
    fn labels(&mut self, sample: &Sample) -> u32 {
        let runs = contract::runs(&sample.labels);
        for run in &runs {
            let numbers = [run.start as u32, run.len() as u32];
            for number in numbers {
                self.scratch.extend_from_slice(&number.to_le_bytes());
            }
        }
        runs.len() as u32
    }

    /// Ends the samples; [`seal`] writes what comes behind them.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    fn finish(mut self) -> io::Result<(W, W, u64, u64)> {
        self.data.flush()?;
        self.index.flush()?;
        Ok((self.data, self.index, self.offset, self.samples))
    }
}

/// Writes index, meta and footer behind the samples.
fn seal(
    data: &mut impl Write,
    index: &mut impl Read,
    (index_at, samples): (u64, u64),
    meta: &[u8],
) -> io::Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = index.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        data.write_all(&buffer[..count])?;
    }
    hasher.update(meta);
    data.write_all(meta)?;
    let meta_at = index_at + samples * ENTRY as u64;
    for number in [index_at, samples, meta_at, meta.len() as u64] {
        data.write_all(&number.to_le_bytes())?;
    }
    data.write_all(hasher.finalize().as_bytes())?;
    data.write_all(MAGIC)?;
    data.flush()
}

impl StoreWriter<Vec<u8>> {
    /// Ends a store that is kept in memory.
    ///
    /// # Errors
    /// None in practice: memory can be written.
    pub fn into_memory(self, meta: &[u8]) -> io::Result<Vec<u8>> {
        let (mut data, index, offset, samples) = self.finish()?;
        seal(&mut data, &mut index.as_slice(), (offset, samples), meta)?;
        Ok(data)
    }
}

impl StoreWriter<BufWriter<File>> {
    /// Ends a store on disk, and sees that it is there.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    pub fn into_file(self, meta: &[u8]) -> io::Result<()> {
        let (mut data, index, offset, samples) = self.finish()?;
        let mut index = index.into_inner().map_err(io::IntoInnerError::into_error)?;
        index.seek(SeekFrom::Start(0))?;
        seal(&mut data, &mut index, (offset, samples), meta)?;
        let data = data.into_inner().map_err(io::IntoInnerError::into_error)?;
        data.sync_all()
    }
}

/// Tokenised samples.
pub struct Store {
    bytes: Bytes,
    index_at: usize,
    samples: usize,
    meta: Vec<u8>,
    files: Vec<Arc<Path>>,
}

/// A store without samples.
pub(super) static EMPTY: Store = Store {
    bytes: Bytes::Memory(Vec::new()),
    index_at: 0,
    samples: 0,
    meta: Vec::new(),
    files: Vec::new(),
};

enum Bytes {
    Mapped(Mmap),
    Memory(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({} samples)", self.samples)
    }
}

impl Store {
    /// Maps a store on disk.
    ///
    /// # Errors
    /// The file cannot be read, or is not a whole store.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: stores are written under another name, renamed into place and never changed
        // after that; removing one leaves its pages mapped.
        let map = unsafe { Mmap::map(&file)? };
        Self::new(Bytes::Mapped(map))
    }

    /// A store in memory.
    ///
    /// # Errors
    /// The bytes are not a whole store.
    pub fn from_memory(bytes: Vec<u8>) -> io::Result<Self> {
        Self::new(Bytes::Memory(bytes))
    }

    fn new(bytes: Bytes) -> io::Result<Self> {
        let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let is_store = bytes.len() >= HEADER + FOOTER
            && bytes.starts_with(MAGIC)
            && bytes.ends_with(MAGIC)
            && long(&bytes[8..]) == VERSION;
        if !is_store {
            return Err(damaged("not a tokenised dataset of this version"));
        }
        let footer_at = bytes.len() - FOOTER;
        let footer = &bytes[footer_at..];
        let number = |at: usize| usize::try_from(long(&footer[8 * at..])).unwrap_or(usize::MAX);
        let (index_at, samples, meta_at, meta_len) = (number(0), number(1), number(2), number(3));
        let index_end = samples
            .checked_mul(ENTRY)
            .and_then(|length| length.checked_add(index_at));
        let fits = index_at >= HEADER
            && index_end == Some(meta_at)
            && meta_at.checked_add(meta_len) == Some(footer_at);
        if !fits {
            return Err(damaged("a tokenised dataset that is cut off"));
        }
        if blake3::hash(&bytes[index_at..footer_at]).as_bytes() != &footer[32..64] {
            return Err(damaged("a damaged tokenised dataset"));
        }
        Ok(Self {
            meta: bytes[meta_at..footer_at].to_vec(),
            bytes,
            index_at,
            samples,
            files: Vec::new(),
        })
    }

    /// What the writer put down beside the samples.
    pub fn meta(&self) -> &[u8] {
        &self.meta
    }

    /// Names the files that samples are from.
    pub fn name_files(&mut self, files: Vec<Arc<Path>>) {
        self.files = files;
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.samples
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.samples == 0
    }

    /// What is known of a sample.
    pub fn entry(&self, i: usize) -> Entry {
        let at = self.index_at + i * ENTRY;
        Entry::from_bytes(&self.bytes[at..at + ENTRY])
    }

    /// Reads a sample.
    pub fn get(&self, i: usize) -> Sample {
        let entry = self.entry(i);
        let source = SampleId {
            file: self
                .files
                .get(entry.file as usize)
                .map_or_else(|| Path::new("").into(), Arc::clone),
            place: match entry.place & IS_ROW {
                0 => Place::Line(entry.place),
                _ => Place::Row(entry.place & !IS_ROW),
            },
        };
        let (input_ids, labels) = self.tokens(&entry);
        Sample {
            input_ids,
            labels,
            source,
            truncated: entry.is_truncated(),
        }
    }

    /// Ids and labels; empty where the index points outside the samples.
    fn tokens(&self, entry: &Entry) -> (Vec<u32>, Vec<i32>) {
        let range = usize::try_from(entry.offset)
            .ok()
            .zip(usize::try_from(entry.length()).ok())
            .and_then(|(start, length)| Some(start..start.checked_add(length)?));
        let within = range.filter(|range| range.start >= HEADER && range.end <= self.index_at);
        let bytes = within.map_or(&[][..], |range| &self.bytes[range]);
        let (ids, labels) = bytes.split_at((4 * entry.tokens as usize).min(bytes.len()));
        let ids: Vec<u32> = ids.chunks_exact(4).map(word).collect();
        let mut written = vec![IGNORE_INDEX; ids.len()];
        for run in labels.chunks_exact(8) {
            let (start, length) = (word(run) as usize, word(&run[4..]) as usize);
            let run = start.min(ids.len())..start.saturating_add(length).min(ids.len());
            for (label, id) in written[run.clone()].iter_mut().zip(&ids[run]) {
                *label = *id as i32;
            }
        }
        (ids, written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ids: &[u32], labels: &[i32], place: Place) -> Sample {
        Sample {
            input_ids: ids.to_vec(),
            labels: labels.to_vec(),
            source: SampleId {
                file: Path::new("a").into(),
                place,
            },
            truncated: ids.len() == 3,
        }
    }

    fn store() -> (Vec<Sample>, Vec<u8>) {
        let x = IGNORE_INDEX;
        let samples = vec![
            sample(&[7, 8, 9], &[x, 8, 9], Place::Line(4)),
            sample(&[], &[], Place::Row(2)),
            sample(
                &[1, 2, 3, 4],
                &[1, x, 3, x],
                Place::Row(u64::from(u32::MAX)),
            ),
        ];
        let mut writer = StoreWriter::new(Vec::new(), Vec::new()).unwrap();
        for sample in &samples {
            writer.push(sample, 0, false).unwrap();
        }
        assert_eq!(writer.largest_id(), Some((9, 0)));
        (samples, writer.into_memory(b"{}").unwrap())
    }

    #[test]
    fn samples_come_back_as_they_were() {
        let (samples, bytes) = store();
        let mut store = Store::from_memory(bytes).unwrap();
        store.name_files(vec![Path::new("a").into()]);
        assert_eq!((store.len(), store.meta()), (3, &b"{}"[..]));
        for (i, sample) in samples.iter().enumerate() {
            assert_eq!(store.get(i), *sample);
        }
        let entry = store.entry(0);
        assert_eq!((entry.tokens, entry.trained), (3, 2));
        assert!(entry.is_truncated() && !entry.is_rejected());
    }

    #[test]
    fn damage_is_found_or_does_no_harm() {
        let (_, bytes) = store();
        for cut in 0..bytes.len() {
            assert!(Store::from_memory(bytes[..cut].to_vec()).is_err(), "{cut}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            if let Ok(store) = Store::from_memory(damaged) {
                (0..store.len()).for_each(|i| drop(store.get(i)));
            }
        }
    }
}
