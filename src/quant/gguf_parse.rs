//! Parses a GGUF file from front to back. Nothing in it is believed: lengths are bounded by the
//! file, nesting and the number of values by constants.

use std::collections::BTreeMap;

use super::blocks::BlockKind;
use super::gguf::{GgufTensor, Metadata, Value};

/// First bytes of every file.
const MAGIC: &[u8; 4] = b"GGUF";
/// Alignment of tensor data where `general.alignment` does not say otherwise.
const DEFAULT_ALIGNMENT: usize = 32;
/// Most values that the metadata may hold, arrays' elements counted. The largest vocabularies
/// have under a million; a file that claims more would only exhaust memory.
const MAX_VALUES: usize = 1 << 23;
/// Deepest nesting of arrays.
const MAX_DEPTH: usize = 4;
/// Most dimensions of a tensor (`GGML_MAX_DIMS`).
const MAX_DIMS: usize = 4;

/// Metadata and tensors of a whole file.
pub(super) fn parse(file: &[u8]) -> Result<(Metadata, BTreeMap<String, GgufTensor>), String> {
    let mut cursor = Cursor {
        bytes: file,
        at: 0,
        values_left: MAX_VALUES,
    };
    if cursor.take(4)? != MAGIC {
        return Err("not a GGUF file: it does not start with \"GGUF\"".into());
    }
    match cursor.u32()? {
        2 | 3 => {}
        1 => {
            return Err(
                "GGUF version 1 is not supported; convert the model again with a current llama.cpp"
                    .into(),
            );
        }
        version if version.swap_bytes() <= 3 => {
            return Err(
                "big-endian GGUF is not supported; convert the model for a little-endian machine"
                    .into(),
            );
        }
        version => {
            return Err(format!(
                "GGUF version {version} is not supported; supported: 2, 3"
            ));
        }
    }
    let tensor_count = cursor.u64()?;
    let metadata_count = cursor.u64()?;
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = cursor
            .string()
            .map_err(|what| format!("metadata: {what}"))?;
        let value = cursor
            .typed_value()
            .map_err(|what| format!("metadata `{key}`: {what}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("metadata `{key}` occurs twice"));
        }
    }
    let metadata = Metadata(metadata);
    let mut entries = BTreeMap::new();
    for _ in 0..tensor_count {
        let name = cursor.string().map_err(|what| format!("tensors: {what}"))?;
        let entry = cursor
            .tensor_entry()
            .map_err(|what| format!("tensor `{name}`: {what}"))?;
        if entries.insert(name.clone(), entry).is_some() {
            return Err(format!("tensor `{name}` occurs twice"));
        }
    }
    let alignment = alignment(&metadata)?;
    let data = cursor.at.next_multiple_of(alignment);
    let tensors = place(entries, data, alignment, file.len())?;
    Ok((metadata, tensors))
}

/// `general.alignment`, a small power of two.
fn alignment(metadata: &Metadata) -> Result<usize, String> {
    let key = "general.alignment";
    if !metadata.0.contains_key(key) {
        return Ok(DEFAULT_ALIGNMENT);
    }
    metadata
        .usize(key)
        .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
        .ok_or_else(|| format!("metadata `{key}` is not a power of two up to 1 MiB"))
}

/// A tensor as the file describes it.
struct Entry {
    shape: Vec<usize>,
    kind: BlockKind,
    /// From the start of the data.
    offset: u64,
}

/// Turns offsets into ranges inside the file, aligned and not overlapping.
fn place(
    entries: BTreeMap<String, Entry>,
    data: usize,
    alignment: usize,
    file_len: usize,
) -> Result<BTreeMap<String, GgufTensor>, String> {
    let mut tensors = BTreeMap::new();
    for (
        name,
        Entry {
            shape,
            kind,
            offset,
        },
    ) in entries
    {
        let bytes = kind
            .bytes_of(&shape)
            .map_err(|what| format!("tensor `{name}`: {what}"))?;
        let range = usize::try_from(offset)
            .ok()
            .filter(|offset| offset.is_multiple_of(alignment))
            .and_then(|offset| {
                let start = data.checked_add(offset)?;
                Some(start..start.checked_add(bytes)?)
            })
            .ok_or_else(|| {
                format!("tensor `{name}`: offset {offset} is not a multiple of {alignment}")
            })?;
        if range.end > file_len {
            return Err(format!(
                "tensor `{name}`: bytes {} to {} lie outside the file's {file_len}; it is truncated or damaged",
                range.start, range.end
            ));
        }
        tensors.insert(name, GgufTensor { shape, kind, range });
    }
    let mut order: Vec<(&String, &GgufTensor)> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| tensor.range.start);
    for pair in order.windows(2) {
        let [(first, before), (second, after)] = pair else {
            continue;
        };
        if after.range.start < before.range.end {
            return Err(format!("tensors `{first}` and `{second}` overlap"));
        }
    }
    Ok(tensors)
}

/// Reads a file from front to back, never past its end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    values_left: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..count).ok_or_else(|| {
            format!(
                "{count} bytes are wanted at byte {}, and the file has {} more; it is truncated or damaged",
                self.at,
                rest.len()
            )
        })?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A length in bytes or elements; the file's own length bounds it where it is used.
    fn length(&mut self) -> Result<usize, String> {
        let length = self.u64()?;
        usize::try_from(length).map_err(|_| format!("a length of {length}"))
    }

    fn string(&mut self) -> Result<String, String> {
        let length = self.length()?;
        let bytes = self.take(length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(error) => Err(format!("text that is not UTF-8: {error}")),
        }
    }

    fn typed_value(&mut self) -> Result<Value, String> {
        let kind = self.u32()?;
        self.value(kind, MAX_DEPTH)
    }

    /// A value of the type that GGUF numbers `kind`.
    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, String> {
        self.values_left = self
            .values_left
            .checked_sub(1)
            .ok_or_else(|| format!("there are more than {MAX_VALUES} values"))?;
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(shortest(f32::from_le_bytes(self.array()?))),
            7 => match self.array()? {
                [0u8] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("a boolean of {other}")),
            },
            8 => Value::String(self.string()?),
            9 => {
                let kind = self.u32()?;
                let count = self.length()?;
                let Some(depth) = depth.checked_sub(1) else {
                    return Err(format!("arrays are nested deeper than {MAX_DEPTH}"));
                };
                if count > self.values_left || count > self.bytes.len() - self.at {
                    return Err(format!("an array of {count} values"));
                }
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, depth)?);
                }
                Value::Array(values)
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("unknown type {other}")),
        })
    }

    fn tensor_entry(&mut self) -> Result<Entry, String> {
        let dims = self.u32()? as usize;
        if dims == 0 || dims > MAX_DIMS {
            return Err(format!("{dims} dimensions; expected 1 to {MAX_DIMS}"));
        }
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            shape.push(self.length()?);
        }
        shape.reverse();
        let kind = BlockKind::from_id(self.u32()?)?;
        let offset = self.u64()?;
        Ok(Entry {
            shape,
            kind,
            offset,
        })
    }
}

/// The f64 that reads as this f32 does, so that an epsilon stored as f32 1e-5 is 1e-5 again.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of version 3 with the given metadata and tensor entries, and `data` zero bytes.
    fn file(metadata: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend((tensors.len() as u64).to_le_bytes());
        file.extend((metadata.len() as u64).to_le_bytes());
        file.extend(metadata.iter().chain(tensors).flatten());
        file.resize(file.len().next_multiple_of(32) + data, 0);
        file
    }

    fn text(text: &str) -> Vec<u8> {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes
    }

    fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [&text(key)[..], &kind.to_le_bytes(), value].concat()
    }

    fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut bytes = text(name);
        bytes.extend((dims.len() as u32).to_le_bytes());
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    #[test]
    fn values_of_each_type_are_read() {
        let nested = [
            &9u32.to_le_bytes()[..],
            &1u64.to_le_bytes(),
            &8u32.to_le_bytes(),
            &1u64.to_le_bytes(),
            &text("x"),
        ]
        .concat();
        let bytes = file(
            &[
                pair("i", 5, &(-2i32).to_le_bytes()),
                pair("eps", 6, &1e-5f32.to_le_bytes()),
                pair("yes", 7, &[1]),
                pair("nested", 9, &nested),
            ],
            &[tensor("t", &[4, 2], 0, 0)],
            32,
        );
        let (metadata, tensors) = parse(&bytes).unwrap();
        assert_eq!(metadata.0["i"], Value::Signed(-2));
        assert_eq!(metadata.f64("eps"), Some(1e-5));
        assert_eq!(metadata.bool("yes"), Some(true));
        let inner = Value::Array(vec![Value::String("x".into())]);
        assert_eq!(metadata.array("nested"), Some(&[inner][..]));
        assert_eq!(tensors["t"].shape, [2, 4]);
    }

    #[test]
    fn damage_is_named() {
        let huge = [&4u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        let deep: Vec<u8> = [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()]
            .concat()
            .repeat(40);
        let cases = [
            (b"GGML\x03\0\0\0".to_vec(), "not a GGUF file"),
            (b"GGUF\x01\0\0\0".to_vec(), "version 1"),
            (b"GGUF\0\0\0\x03".to_vec(), "big-endian"),
            (b"GGUF\x09\0\0\0".to_vec(), "version 9"),
            (b"GGUF\x03\0\0\0\x05".to_vec(), "truncated"),
            (
                file(
                    &[pair("a", 4, &huge[..4]), pair("a", 4, &huge[..4])],
                    &[],
                    0,
                ),
                "`a` occurs twice",
            ),
            (
                file(&[pair("a", 9, &huge)], &[], 0),
                "an array of 18446744073709551615",
            ),
            (file(&[pair("a", 9, &deep)], &[], 64), "nested deeper"),
            (file(&[pair("a", 99, &[])], &[], 64), "unknown type 99"),
            (file(&[pair("a", 7, &[2])], &[], 64), "a boolean of 2"),
            (
                file(&[pair("a", 8, &u64::MAX.to_le_bytes())], &[], 0),
                "`a`: 18446744073709551615 bytes",
            ),
            (
                file(&[pair("general.alignment", 4, &[3, 0, 0, 0])], &[], 0),
                "power of two",
            ),
            (
                file(&[], &[tensor("t", &[8], 0, 0)], 16),
                "`t`: bytes 64 to 96 lie outside",
            ),
            (
                file(&[], &[tensor("t", &[8], 0, 4)], 64),
                "not a multiple of 32",
            ),
            (file(&[], &[tensor("t", &[31], 8, 0)], 64), "blocks of 32"),
            (
                file(&[], &[tensor("t", &[1 << 40, 1 << 40], 0, 0)], 64),
                "overflow",
            ),
            (
                file(&[], &[tensor("t", &[0], 0, 0)], 64),
                "a dimension of 0",
            ),
            (file(&[], &[tensor("t", &[8], 10, 0)], 64), "Q2_K"),
            (file(&[], &[tensor("t", &[8], 77, 0)], 64), "ggml type 77"),
            (
                file(&[], &[tensor("t", &[8], 0, 0), tensor("u", &[8], 0, 0)], 64),
                "`t` and `u` overlap",
            ),
            (
                file(
                    &[],
                    &[tensor("t", &[8], 0, 0), tensor("t", &[8], 0, 32)],
                    64,
                ),
                "`t` occurs twice",
            ),
        ];
        for (bytes, expected) in cases {
            let error = parse(&bytes).unwrap_err();
            assert!(
                error.contains(expected),
                "expected {expected:?} in {error:?}"
            );
        }
    }
}
