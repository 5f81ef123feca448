//! A safetensors file written tensor by tensor, so that no more than one need be in memory.
//!
//! Format: <https://github.com/huggingface/safetensors#format>

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::write::{AtomicFile, WriteError};

/// What the header says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Size of the tensor in the file; `None` when it overflows.
    pub fn bytes(&self) -> Option<usize> {
        let elements = self
            .shape
            .iter()
            .try_fold(1_usize, |n, d| n.checked_mul(*d))?;
        elements
            .checked_mul(self.dtype.bitsize())
            .map(|bits| bits / 8)
    }
}

/// Writes one safetensors file; it appears, atomically, with [`SafetensorsWriter::finish`].
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    tensors: Vec<TensorInfo>,
    written: usize,
    bytes: u64,
}

impl SafetensorsWriter {
    /// Starts a file with these tensors and `metadata` (Hugging Face's readers expect
    /// `("format", "pt")`).
    ///
    /// The tensors are put into the order of the safetensors library, which keeps each aligned:
    /// widest type first, then by name. They must come in that order, see
    /// [`SafetensorsWriter::order`].
    ///
    /// # Errors
    /// Two tensors of one name, a size that overflows, or what the system says.
    pub fn create(
        path: &Path,
        metadata: &[(&str, &str)],
        mut tensors: Vec<TensorInfo>,
    ) -> Result<Self, WriteError> {
        tensors.sort_by(|x, y| y.dtype.cmp(&x.dtype).then_with(|| x.name.cmp(&y.name)));
        let header = header(path, metadata, &tensors)?;
        let mut file = AtomicFile::create(path)?;
        file.append(&(header.len() as u64).to_le_bytes())?;
        file.append(&header)?;
        let bytes = 8 + header.len() as u64;
        Ok(Self {
            file,
            tensors,
            written: 0,
            bytes,
        })
    }

    /// The tensor to write next.
    pub fn pending(&self) -> Option<&TensorInfo> {
        self.tensors.get(self.written)
    }

    /// The tensors in the order in which they must be written.
    pub fn order(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Writes the next tensor, little-endian and row-major.
    ///
    /// # Errors
    /// When it is not the next one or not of the announced size, or what the system says.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        let wrong = |file: &AtomicFile, expected, found| WriteError::Tensor {
            path: file.path().to_owned(),
            tensor: name.to_owned(),
            expected,
            found,
        };
        let next = self
            .tensors
            .get(self.written)
            .filter(|next| next.name == name);
        let Some(next) = next else {
            let next = self
                .tensors
                .get(self.written)
                .map_or("no more tensors", |t| &t.name);
            return Err(wrong(&self.file, next.to_owned(), name.to_owned()));
        };
        if next.bytes() != Some(bytes.len()) {
            let expected = format!("{:?} {:?}", next.dtype, next.shape);
            return Err(wrong(
                &self.file,
                expected,
                format!("{} bytes", bytes.len()),
            ));
        }
        self.file.append(bytes)?;
        self.written += 1;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Puts the file in its place and returns its size in bytes.
    ///
    /// # Errors
    /// When tensors are missing, or what the system says.
    pub fn finish(self) -> Result<u64, WriteError> {
        if let Some(missing) = self.tensors.get(self.written) {
            return Err(WriteError::Tensor {
                path: self.file.path().to_owned(),
                tensor: missing.name.clone(),
                expected: format!("{} tensors", self.tensors.len()),
                found: format!("{}", self.written),
            });
        }
        self.file.commit()?;
        Ok(self.bytes)
    }
}

/// The JSON header, padded with blanks to a multiple of 8 bytes as the library does.
fn header(
    path: &Path,
    metadata: &[(&str, &str)],
    tensors: &[TensorInfo],
) -> Result<Vec<u8>, WriteError> {
    let wrong = |info: &TensorInfo, expected: &str, found: String| WriteError::Tensor {
        path: path.to_owned(),
        tensor: info.name.clone(),
        expected: expected.to_owned(),
        found,
    };
    let mut json = Map::new();
    if !metadata.is_empty() {
        let pairs = metadata
            .iter()
            .map(|(k, v)| ((*k).to_owned(), Value::from(*v)));
        json.insert("__metadata__".to_owned(), Value::Object(pairs.collect()));
    }
    let mut start = 0_usize;
    for info in tensors {
        let end = info
            .bytes()
            .and_then(|bytes| start.checked_add(bytes))
            .ok_or_else(|| {
                wrong(
                    info,
                    "a size that fits in memory",
                    format!("shape {:?}", info.shape),
                )
            })?;
        let entry = json!({
            "dtype": info.dtype.to_string(),
            "shape": info.shape,
            "data_offsets": [start, end],
        });
        if json.insert(info.name.clone(), entry).is_some() {
            return Err(wrong(info, "one tensor of this name", "two".to_owned()));
        }
        start = end;
    }
    let mut bytes = Value::Object(json).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

/// Writes tensors that are in memory to a safetensors file, atomically; returns its size in bytes.
///
/// # Errors
/// As [`SafetensorsWriter`].
pub fn write_safetensors(
    path: &Path,
    metadata: &[(&str, &str)],
    tensors: &[(TensorInfo, &[u8])],
) -> Result<u64, WriteError> {
    let infos = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = SafetensorsWriter::create(path, metadata, infos)?;
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by(|(x, _), (y, _)| y.dtype.cmp(&x.dtype).then_with(|| x.name.cmp(&y.name)));
    for (info, bytes) in sorted {
        writer.write(&info.name, bytes)?;
    }
    writer.finish()
}

/// The bytes of `f32` values in a safetensors file.
pub fn f32_bytes(values: &[f32]) -> std::borrow::Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        bytemuck::cast_slice(values).into()
    } else {
        values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<u8>>()
            .into()
    }
}
