//! The GGUF container: metadata and tensor index, memory-mapped.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::blocks::{self, BlockKind};
use super::gguf_parse;
use super::stored::{BlockMatrix, RowOrder};

/// Why a GGUF file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be read.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is damaged or of a version that is not supported.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// There is no such tensor.
    #[error("{}: no tensor `{name}`", path.display())]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// GGUF name.
        name: String,
    },
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// `f32` or `f64`.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values of one type.
    Array(Vec<Value>),
}

/// The metadata of a GGUF file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(pub BTreeMap<String, Value>);

impl Metadata {
    /// The text under `key`.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.0.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The integer under `key`, if it is one and not negative.
    pub fn usize(&self, key: &str) -> Option<usize> {
        match self.0.get(key)? {
            Value::Unsigned(n) => usize::try_from(*n).ok(),
            Value::Signed(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    /// The number under `key`.
    pub fn f64(&self, key: &str) -> Option<f64> {
        match self.0.get(key)? {
            Value::Float(x) => Some(*x),
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// The boolean under `key`.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.0.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The array under `key`.
    pub fn array(&self, key: &str) -> Option<&[Value]> {
        match self.0.get(key)? {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }
}

/// A mapped GGUF file, checked from end to end.
#[derive(Debug)]
pub struct GgufFile {
    /// The metadata.
    pub metadata: Metadata,
    /// The tensors by GGUF name.
    pub tensors: BTreeMap<String, GgufTensor>,
    path: PathBuf,
    /// Shared with the matrices that are kept as they lie in it.
    map: Arc<Mmap>,
}

/// Where and how a tensor lies in its file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTensor {
    /// Shape, outermost dimension first (the reverse of the file's order).
    pub shape: Vec<usize>,
    /// How the values are stored.
    pub kind: BlockKind,
    /// Bytes in the file.
    pub(super) range: Range<usize>,
}

impl GgufTensor {
    /// The bytes of part `part` of `parts` equal ones; rows are whole blocks.
    fn part(&self, part: usize, parts: usize) -> Range<usize> {
        let bytes = self.range.len() / parts;
        let start = self.range.start + part * bytes;
        start..start + bytes
    }
}

impl GgufFile {
    /// Maps `path` and checks everything that reading relies on.
    ///
    /// # Errors
    /// When the file is not little-endian GGUF 2 or 3, is damaged or truncated, or holds a tensor
    /// of a type that is not supported.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let read = |source| GgufError::Read {
            path: path.to_path_buf(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        if file.metadata().map_err(read)?.len() == 0 {
            return Err(GgufError::Malformed {
                path: path.to_path_buf(),
                what: "the file is empty".into(),
            });
        }
        // SAFETY: the map is read-only. As with every mapped file, another process that cuts the
        // file short while it is in use ends this one; nothing here writes to model files in place.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let (metadata, tensors) = gguf_parse::parse(&map).map_err(|what| GgufError::Malformed {
            path: path.to_path_buf(),
            what,
        })?;
        Ok(Self {
            metadata,
            tensors,
            path: path.to_path_buf(),
            map: Arc::new(map),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A tensor dequantised, row-major, its rows as the file has them.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, GgufError> {
        self.read_part(name, 0, 1)
    }

    /// Part `part` of the `parts` equal ones that a tensor's rows make up, dequantised. `parts` must
    /// divide the number of rows.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn read_part(&self, name: &str, part: usize, parts: usize) -> Result<Vec<f32>, GgufError> {
        let tensor = self.tensor(name)?;
        let mut values = vec![0f32; tensor.shape.iter().product::<usize>() / parts];
        let range = tensor.part(part, parts);
        blocks::dequantise(tensor.kind, &self.map[range.clone()], &mut values);
        release(&self.map, &range);
        Ok(values)
    }

    /// The same part as it lies in the file, a matrix of rows of the tensor's width.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn matrix(
        &self,
        name: &str,
        (part, parts): (usize, usize),
        order: RowOrder,
    ) -> Result<BlockMatrix, GgufError> {
        let tensor = self.tensor(name)?;
        let cols = tensor.shape.last().copied().unwrap_or(1);
        let rows = tensor.shape.iter().product::<usize>() / cols / parts;
        let bytes = (self.map.clone(), tensor.part(part, parts));
        Ok(BlockMatrix::new(bytes, tensor.kind, [rows, cols], order))
    }

    fn tensor(&self, name: &str) -> Result<&GgufTensor, GgufError> {
        self.tensors.get(name).ok_or_else(|| GgufError::NoTensor {
            path: self.path.clone(),
            name: name.to_string(),
        })
    }
}

/// Lets the system drop the pages of a range that has been read, so that a model being loaded is
/// not resident twice. Only advice: where it fails it costs memory, nothing else.
pub(crate) fn release(map: &Mmap, range: &Range<usize>) {
    #[cfg(unix)]
    {
        use memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is shared, read-only and backed by a file: dropped pages are read again.
        let _ = unsafe { map.unchecked_advise_range(DontNeed, range.start, range.len()) };
    }
    #[cfg(not(unix))]
    let _ = (map, range);
}
