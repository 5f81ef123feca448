//! Quantised matrices in one file, written once from front to back and then mapped: what took minutes
//! to quantise is there at once the next time, and takes no memory but the pages of the file.
//!
//! ```text
//! magic, version                                     16 bytes
//! codes and scales of each matrix, native, aligned
//! index: key, and where which matrix lies            JSON
//! footer: index at, index bytes, blake3 of all before, magic
//! ```
//!
//! Nothing of a file is used before its hash has been checked from end to end: one that is cut, damaged,
//! or of another version or machine is as good as none.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::{QuantMatrix, Scheme};

const MAGIC: &[u8; 8] = b"lorafitQ";
/// To be raised with the layout of the file, and with whatever changes what a matrix is quantised to.
pub const VERSION: u64 = 1;
/// Where numbers of every width and whole cache lines may begin.
const ALIGNMENT: usize = 64;
const FOOTER: usize = 8 + 8 + 32 + 8;

#[derive(Serialize, Deserialize)]
struct Index {
    key: String,
    matrices: BTreeMap<String, Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    scheme: Scheme,
    shape: [usize; 2],
    parts: Vec<Range<usize>>,
}

/// Writes a store.
pub struct StoreWriter<W> {
    to: W,
    hash: blake3::Hasher,
    at: usize,
    index: Index,
}

impl<W: Write> StoreWriter<W> {
    /// Begins a store of what `key` identifies.
    ///
    /// # Errors
    /// The header cannot be written.
    pub fn new(to: W, key: &str) -> io::Result<Self> {
        let mut writer = Self {
            to,
            hash: blake3::Hasher::new(),
            at: 0,
            index: Index {
                key: key.to_owned(),
                matrices: BTreeMap::new(),
            },
        };
        writer.append(MAGIC)?;
        writer.append(&version())?;
        Ok(writer)
    }

    /// Appends a matrix; one that lies in a file of its own is left out.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    pub fn push(&mut self, name: &str, matrix: &QuantMatrix) -> io::Result<()> {
        let Some((scheme, bytes)) = matrix.parts() else {
            return Ok(());
        };
        let mut parts = Vec::new();
        for bytes in bytes {
            let padding = self.at.next_multiple_of(ALIGNMENT) - self.at;
            self.append(&[0; ALIGNMENT][..padding])?;
            parts.push(self.at..self.at + bytes.len());
            self.append(bytes)?;
        }
        let entry = Entry {
            scheme,
            shape: matrix.shape(),
            parts,
        };
        self.index.matrices.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Writes index and footer.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        let index = serde_json::to_vec(&self.index)?;
        let at = self.at;
        self.append(&index)?;
        for number in [at, index.len()] {
            self.append(&(number as u64).to_le_bytes())?;
        }
        let hash = self.hash.finalize();
        self.to.write_all(hash.as_bytes())?;
        self.to.write_all(MAGIC)?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.hash.update_rayon(bytes);
        self.at += bytes.len();
        Ok(())
    }
}

/// The version, which a machine of the other byte order reads as another.
fn version() -> [u8; 8] {
    VERSION.to_ne_bytes()
}

/// A mapped store.
pub struct QuantStore {
    map: Arc<Mmap>,
    index: Index,
}

impl QuantStore {
    /// Maps a store and checks all of it.
    ///
    /// # Errors
    /// It cannot be read, is damaged or cut, of another version, or not of this key.
    pub fn open(path: &Path, key: &str) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only, and stores are never written in place: they appear whole under
        // their name. As with every mapped file, a process that cuts it short ends this one.
        let map = unsafe { Mmap::map(&file) }?;
        let damaged = || io::Error::from(io::ErrorKind::InvalidData);
        let (body, footer) = (map.split_last_chunk::<FOOTER>()).ok_or_else(damaged)?;
        if !body.starts_with(&[&MAGIC[..], &version()[..]].concat()) || !footer.ends_with(MAGIC) {
            return Err(damaged());
        }
        let hashed = &map[..body.len() + 16];
        if blake3::Hasher::new().update_rayon(hashed).finalize() != footer[16..48] {
            return Err(damaged());
        }
        let number = |at: usize| {
            let bytes = footer[at..].first_chunk().copied().unwrap_or_default();
            usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let index = (body.get(number(0)..))
            .and_then(|rest| rest.get(..number(8)))
            .ok_or_else(damaged)?;
        let index: Index = serde_json::from_slice(index)?;
        if index.key != key {
            return Err(damaged());
        }
        Ok(Self {
            map: Arc::new(map),
            index,
        })
    }

    /// The matrix of this name, if it is there, of this shape and scheme.
    pub fn get(&self, name: &str, shape: [usize; 2], scheme: Scheme) -> Option<QuantMatrix> {
        let entry = self.index.matrices.get(name)?;
        if (entry.shape, entry.scheme) != (shape, scheme) {
            return None;
        }
        QuantMatrix::from_parts(scheme, shape, &self.map, &entry.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    const SCHEMES: [Scheme; 3] = [Scheme::Nf4, Scheme::Nf4Double, Scheme::Int8];
    const SHAPE: [usize; 2] = [37, 129];

    fn matrices() -> Vec<QuantMatrix> {
        let stream = Stream::new(8);
        let n = (SHAPE[0] * SHAPE[1]) as u64;
        let values: Vec<f32> = (0..n).map(|i| stream.normal(i) as f32).collect();
        let quantise = |scheme| QuantMatrix::quantise(&values, SHAPE, scheme).unwrap();
        SCHEMES.map(quantise).to_vec()
    }

    fn bytes() -> Vec<u8> {
        let mut writer = StoreWriter::new(Vec::new(), "key").unwrap();
        for (scheme, matrix) in SCHEMES.iter().zip(matrices()) {
            writer.push(&format!("{scheme:?}"), &matrix).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn matrices_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        std::fs::write(&path, bytes()).unwrap();
        let store = QuantStore::open(&path, "key").unwrap();
        for (scheme, matrix) in SCHEMES.into_iter().zip(matrices()) {
            let name = format!("{scheme:?}");
            let got = store.get(&name, SHAPE, scheme).unwrap();
            assert_eq!(got, matrix);
            assert_eq!(got.dequantised(), matrix.dequantised());
            assert_eq!(got.bytes(), matrix.bytes());
            assert!(store.get(&name, [129, 37], scheme).is_none());
        }
        assert!(store.get("Nf4", SHAPE, Scheme::Int8).is_none());
        assert!(store.get("other", SHAPE, Scheme::Nf4).is_none());
        assert!(QuantStore::open(&path, "other").is_err());
    }

    #[test]
    fn what_is_damaged_or_cut_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let whole = bytes();
        let stream = Stream::new(9);
        for i in 0..300 {
            let at = (stream.bits(i) % whole.len() as u64) as usize;
            let mut damaged = whole.clone();
            match i % 3 {
                0 => damaged.truncate(at),
                1 => damaged[at] ^= 1 << (i % 8),
                _ => damaged.insert(at, 0),
            }
            std::fs::write(&path, damaged).unwrap();
            assert!(QuantStore::open(&path, "key").is_err(), "{i} {at}");
        }
    }
}
