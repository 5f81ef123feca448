//! One memory-mapped safetensors file, its header checked before a byte of data is read.
//!
//! Format: <https://huggingface.co/docs/safetensors>. The header is parsed here, not by the
//! safetensors crate, so that a fault names the tensor and duplicate names are seen.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::storage::Kept;
use super::weights::{Dtype, WeightsError};
use crate::quant::gguf::release;

/// Longest header accepted, as in the safetensors library.
const MAX_HEADER: usize = 100_000_000;
/// Values converted by one task.
const CHUNK: usize = 1 << 16;

/// A mapped safetensors file.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, Stored>,
}

/// Where and how a tensor lies in its file.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    /// Element type.
    pub(super) dtype: Dtype,
    /// Shape, outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// Bytes in the file.
    range: Range<usize>,
}

impl Shard {
    /// Maps `path` and checks its header against its length.
    pub(super) fn open(path: &Path) -> Result<Self, WeightsError> {
        let read = |source| WeightsError::Read {
            path: path.to_path_buf(),
            source,
        };
        let file = std::fs::File::open(path).map_err(read)?;
        if file.metadata().map_err(read)?.len() < 8 {
            return Err(malformed(
                path,
                "it is shorter than a header's length".into(),
            ));
        }
        // SAFETY: the map is read-only. As with every mapped file, another process that cuts the
        // file short while it is in use ends this one; nothing here writes to model files in place.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let tensors = parse_header(&map).map_err(|what| malformed(path, what))?;
        Ok(Self {
            path: path.to_path_buf(),
            map,
            tensors,
        })
    }

    /// The tensors by name.
    pub(super) fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    /// What the file's metadata say under a key.
    pub(super) fn metadata(&self, key: &str) -> Option<String> {
        let (length, rest) = self.map.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let mut header: HeaderMetadata = serde_json::from_slice(rest.get(..length)?).ok()?;
        header.metadata.remove(key)
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A tensor's bytes as stored.
    pub(super) fn bytes(&self, tensor: &Stored) -> &[u8] {
        &self.map[tensor.range.clone()]
    }

    /// A tensor in another element type; `None` where its own is not a supported float.
    pub(super) fn read<T: Kept>(&self, tensor: &Stored) -> Option<Vec<T>> {
        let bytes = self.bytes(tensor);
        let values = match tensor.dtype {
            stored if stored == T::DTYPE && cfg!(target_endian = "little") => copy(bytes),
            Dtype::F32 => convert(bytes, |four| T::from_f32(f32::from_le_bytes(four))),
            Dtype::F16 => convert(bytes, |two| T::from_f32(f16::from_le_bytes(two).to_f32())),
            Dtype::BF16 => convert(bytes, |two| T::from_f32(bf16::from_le_bytes(two).to_f32())),
            Dtype::Quantised | Dtype::Other(_) => return None,
        };
        release(&self.map, &tensor.range);
        Some(values)
    }
}

/// Elements as they are stored.
fn copy<T: Kept>(bytes: &[u8]) -> Vec<T> {
    let mut values = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytemuck::cast_slice_mut::<T, u8>(&mut values)
        .par_chunks_mut(CHUNK)
        .zip(bytes.par_chunks(CHUNK))
        .for_each(|(to, from)| to.copy_from_slice(from));
    values
}

/// Converts packed little-endian elements, in parallel. Bytes are read one element at a time, as
/// a mapped tensor need not be aligned.
fn convert<const N: usize, T: Kept>(bytes: &[u8], element: fn([u8; N]) -> T) -> Vec<T> {
    let (elements, _) = bytes.as_chunks::<N>();
    let mut values = vec![T::zeroed(); elements.len()];
    values
        .par_chunks_mut(CHUNK)
        .zip(elements.par_chunks(CHUNK))
        .for_each(|(values, elements)| {
            for (value, bytes) in values.iter_mut().zip(elements) {
                *value = element(*bytes);
            }
        });
    values
}

fn malformed(path: &Path, what: String) -> WeightsError {
    WeightsError::Malformed {
        path: path.to_path_buf(),
        what,
    }
}

/// The tensors of a file, each inside it, none overlapping, no byte left over.
fn parse_header(file: &[u8]) -> Result<BTreeMap<String, Stored>, String> {
    let (length, rest) = file
        .split_first_chunk::<8>()
        .ok_or("it is shorter than a header's length")?;
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length)
        .ok()
        .filter(|&length| length <= MAX_HEADER)
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| {
            format!(
                "the header claims {length} bytes, of which the file has {}; it is truncated or not safetensors",
                rest.len()
            )
        })?;
    let Entries(entries) = serde_json::from_slice(header)
        .map_err(|error| format!("the header is not valid JSON: {error}"))?;
    let data = 8 + header.len();
    let mut tensors = BTreeMap::new();
    for (name, value) in entries {
        let tensor = parse_tensor(&value, data, file.len())
            .map_err(|what| format!("tensor `{name}`: {what}"))?;
        tensors.insert(name, tensor);
    }
    check_coverage(&tensors, data, file.len())?;
    Ok(tensors)
}

/// One entry of the header; the data starts at byte `data` of `file_len`.
fn parse_tensor(value: &Value, data: usize, file_len: usize) -> Result<Stored, String> {
    let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let numbers = |key: &str| -> Result<Vec<usize>, String> {
        value
            .get(key)
            .and_then(Value::as_array)
            .and_then(|values| values.iter().map(number).collect())
            .ok_or_else(|| format!("`{key}` is not a list of sizes"))
    };
    let dtype = value
        .get("dtype")
        .and_then(Value::as_str)
        .ok_or("`dtype` is not text")?;
    let (dtype, width) = element(dtype).ok_or_else(|| format!("unknown dtype {dtype:?}"))?;
    let shape = numbers("shape")?;
    let offsets = numbers("data_offsets")?;
    let [begin, end] = offsets[..] else {
        return Err("`data_offsets` are not two".into());
    };
    let room = file_len - data;
    if begin > end || end > room {
        return Err(format!(
            "bytes {begin} to {end} lie outside the file's {room} bytes of data; it is truncated or damaged"
        ));
    }
    let bytes = shape
        .iter()
        .try_fold(width, |bytes, &size| bytes.checked_mul(size));
    if bytes != Some(end - begin) {
        return Err(format!(
            "shape {shape:?} of {dtype} does not fill its {} bytes",
            end - begin
        ));
    }
    Ok(Stored {
        dtype,
        shape,
        range: data + begin..data + end,
    })
}

/// The element type that safetensors calls `name`, and its width in bytes.
fn element(name: &str) -> Option<(Dtype, usize)> {
    Some(match name {
        "F32" => (Dtype::F32, 4),
        "F16" => (Dtype::F16, 2),
        "BF16" => (Dtype::BF16, 2),
        "F64" => (Dtype::Other("F64"), 8),
        "I64" => (Dtype::Other("I64"), 8),
        "U64" => (Dtype::Other("U64"), 8),
        "C64" => (Dtype::Other("C64"), 8),
        "I32" => (Dtype::Other("I32"), 4),
        "U32" => (Dtype::Other("U32"), 4),
        "I16" => (Dtype::Other("I16"), 2),
        "U16" => (Dtype::Other("U16"), 2),
        "I8" => (Dtype::Other("I8"), 1),
        "U8" => (Dtype::Other("U8"), 1),
        "BOOL" => (Dtype::Other("BOOL"), 1),
        "F8_E4M3" => (Dtype::Other("F8_E4M3"), 1),
        "F8_E5M2" => (Dtype::Other("F8_E5M2"), 1),
        "F8_E8M0" => (Dtype::Other("F8_E8M0"), 1),
        _ => return None,
    })
}

/// Every byte of data belongs to one tensor.
fn check_coverage(
    tensors: &BTreeMap<String, Stored>,
    data: usize,
    file_len: usize,
) -> Result<(), String> {
    let mut order: Vec<(&String, &Stored)> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| (tensor.range.start, tensor.range.end));
    let mut at = data;
    for (name, tensor) in order {
        if tensor.range.start != at {
            let fault = match tensor.range.start < at {
                true => "overlaps the tensor before it",
                false => "leaves a gap before it",
            };
            return Err(format!(
                "tensor `{name}`: byte {} {fault}",
                tensor.range.start - data
            ));
        }
        at = tensor.range.end;
    }
    if at != file_len {
        return Err(format!(
            "{} bytes at its end belong to no tensor",
            file_len - at
        ));
    }
    Ok(())
}

/// The part of a header that says nothing of tensors.
#[derive(serde::Deserialize)]
struct HeaderMetadata {
    #[serde(rename = "__metadata__", default)]
    metadata: BTreeMap<String, String>,
}

/// The header's entries apart from `__metadata__`; a name that occurs twice is an error.
struct Entries(BTreeMap<String, Value>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    let value = map.next_value()?;
                    if name != "__metadata__" && entries.insert(name.clone(), value).is_some() {
                        return Err(serde::de::Error::custom(format_args!(
                            "tensor `{name}` occurs twice"
                        )));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(header: &str, data: usize) -> Result<BTreeMap<String, Stored>, String> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + data, 0);
        parse_header(&file)
    }

    #[test]
    fn a_header_that_lies_is_refused_by_name() {
        let tensor = |name: &str, shape: &str, offsets: &str| {
            format!(r#""{name}": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}"#)
        };
        let one = tensor("a", "[2]", "[0, 8]");
        assert!(parse(&format!("{{{one}}}"), 8).is_ok());
        let cases = [
            (format!("{{{one}}}"), 4, "`a`: bytes 0 to 8 lie outside"),
            (format!("{{{one}}}"), 12, "4 bytes at its end"),
            (format!("{{{one}, {one}}}"), 8, "`a` occurs twice"),
            (
                format!("{{{one}, {}}}", tensor("b", "[2]", "[4, 12]")),
                12,
                "`b`: byte 4 overlaps",
            ),
            (
                format!("{{{one}, {}}}", tensor("b", "[1]", "[12, 16]")),
                16,
                "`b`: byte 12 leaves a gap",
            ),
            (
                format!("{{{}}}", tensor("a", "[3]", "[0, 8]")),
                8,
                "shape [3] of F32 does not fill its 8 bytes",
            ),
            (
                format!("{{{}}}", tensor("a", "[4611686018427387904, 4]", "[0, 8]")),
                8,
                "does not fill",
            ),
            (
                format!("{{{}}}", tensor("a", "[-1]", "[0, 8]")),
                8,
                "`shape` is not a list of sizes",
            ),
            (
                format!("{{{}}}", tensor("a", "[2]", "[8, 0]")),
                8,
                "outside",
            ),
            (
                r#"{"a": {"dtype": "Q3"}}"#.into(),
                0,
                "unknown dtype \"Q3\"",
            ),
            ("{\"a\": 3}".into(), 0, "`a`: `dtype`"),
            ("[]".into(), 0, "an object of tensors"),
            ("{".into(), 0, "not valid JSON"),
        ];
        for (header, data, expected) in cases {
            let error = parse(&header, data).unwrap_err();
            assert!(error.contains(expected), "{header}: {error}");
        }
        assert!(parse_header(&[0xff; 64]).unwrap_err().contains("truncated"));
        assert!(parse_header(&[0; 3]).is_err());
    }

    #[test]
    fn unaligned_bytes_convert() {
        let bytes = [9, 0, 0, 128, 63, 0, 0, 0, 192];
        assert_eq!(convert(&bytes[1..], f32::from_le_bytes), [1.0, -2.0]);
        assert_eq!(
            convert(&[0x80, 0x3f], |b| bf16::from_le_bytes(b).to_f32()),
            [1.0]
        );
    }
}
