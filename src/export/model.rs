//! A model directory as Hugging Face writes it: weights in shards, their index, `config.json`.

use std::borrow::Cow;
use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::safetensors::{SafetensorsWriter, TensorInfo, f32_bytes};
use super::write::{WriteError, atomic_bytes};
use crate::adapter::merge::DeltaSize;

/// What transformers calls the weights of a model in one file.
const SINGLE: &str = "model.safetensors";

/// The index of a model in several files.
const INDEX: &str = "model.safetensors.index.json";

/// Size of a shard where none is asked for, in bytes; transformers 4's.
pub const DEFAULT_SHARD_SIZE: u64 = 5_000_000_000;

/// A type that weights are saved in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveDtype {
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl SaveDtype {
    /// What `config.json` calls it.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// What safetensors calls it.
    pub fn stored(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// The type that safetensors calls so, if weights are saved in it.
    pub fn from_stored(dtype: Dtype) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16]
            .into_iter()
            .find(|d| d.stored() == dtype)
    }

    /// Values rounded to this type (to nearest, ties to even), little-endian.
    pub fn encode(self, values: &[f32]) -> Cow<'_, [u8]> {
        match self {
            Self::F32 => f32_bytes(values),
            Self::F16 => encode16(values, |x| f16::from_f32(x).to_le_bytes()).into(),
            Self::Bf16 => encode16(values, |x| bf16::from_f32(x).to_le_bytes()).into(),
        }
    }

    /// How far [`SaveDtype::encode`] moved the values.
    pub fn rounding(self, values: &[f32], bytes: &[u8]) -> DeltaSize {
        let decode: fn([u8; 2]) -> f32 = match self {
            Self::F32 => return DeltaSize::default(),
            Self::F16 => |pair| f16::from_le_bytes(pair).to_f32(),
            Self::Bf16 => |pair| bf16::from_le_bytes(pair).to_f32(),
        };
        let (pairs, _) = bytes.as_chunks::<2>();
        (values.par_iter().zip(pairs))
            .map(|(value, pair)| DeltaSize::of(decode(*pair) - value))
            .reduce(DeltaSize::default, DeltaSize::and)
    }
}

fn encode16(values: &[f32], encode: impl Fn(f32) -> [u8; 2] + Sync) -> Vec<u8> {
    const RUN: usize = 1 << 14;
    let mut bytes = vec![0; 2 * values.len()];
    (bytes.par_chunks_mut(2 * RUN).zip(values.par_chunks(RUN))).for_each(|(bytes, values)| {
        for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
            bytes.copy_from_slice(&encode(*value));
        }
    });
    bytes
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Number of tensors.
    pub tensors: usize,
    /// Their bytes, without headers.
    pub bytes: u64,
    /// Number of weight files.
    pub shards: usize,
}

/// Writes weights into `dir`, in one file or in shards with an index, one tensor at a time.
///
/// A shard holds at most `shard_size` bytes, or one tensor that is larger. `read` gives the bytes
/// of a tensor as stored; it is called once for each, in the order of the files.
///
/// # Errors
/// What `read` says, or why a file could not be written.
pub fn write_weights<'a, E: From<WriteError>>(
    dir: &Path,
    metadata: &[(&str, &str)],
    tensors: Vec<TensorInfo>,
    shard_size: u64,
    mut read: impl FnMut(&TensorInfo) -> Result<Cow<'a, [u8]>, E>,
) -> Result<Written, E> {
    let mut written = Written {
        tensors: tensors.len(),
        bytes: 0,
        shards: 0,
    };
    let shards = split(tensors, shard_size);
    written.shards = shards.len();
    let parameters: usize = shards
        .iter()
        .flatten()
        .map(|t| t.shape.iter().product::<usize>())
        .sum();
    let mut weight_map = Map::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let file = match written.shards {
            1 => SINGLE.to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        for tensor in &shard {
            weight_map.insert(tensor.name.clone(), json!(file));
        }
        let path = dir.join(&file);
        let mut writer = SafetensorsWriter::create(&path, metadata, shard)?;
        while let Some(next) = writer.pending().cloned() {
            let bytes = read(&next)?;
            writer.write(&next.name, &bytes)?;
            written.bytes += bytes.len() as u64;
        }
        writer.finish()?;
    }
    if written.shards > 1 {
        weight_map.sort_keys();
        let metadata = json!({"total_parameters": parameters, "total_size": written.bytes});
        let index = json!({"metadata": metadata, "weight_map": weight_map});
        write_json(&dir.join(INDEX), &index)?;
    }
    Ok(written)
}

/// Fills shard after shard, in the order given.
fn split(tensors: Vec<TensorInfo>, shard_size: u64) -> Vec<Vec<TensorInfo>> {
    let mut shards: Vec<Vec<TensorInfo>> = vec![Vec::new()];
    let mut filled = 0_u64;
    for tensor in tensors {
        // A size that overflows is refused by the writer.
        let bytes = tensor.bytes().unwrap_or(usize::MAX) as u64;
        let full = filled.saturating_add(bytes) > shard_size;
        match shards.last_mut() {
            Some(last) if !full || last.is_empty() => last.push(tensor),
            _ => {
                shards.push(vec![tensor]);
                filled = 0;
            }
        }
        filled = filled.saturating_add(bytes);
    }
    shards
}

/// Writes a whole model into `dir`: `config.json`, saying `dtype`, and the weights in that type.
///
/// `read` gives a tensor's values by name; only one tensor need exist at a time. The tokenizer is
/// the caller's.
///
/// # Errors
/// What `read` says, a tensor of another size than announced, or why a file could not be written.
pub fn write_model<E: From<WriteError>>(
    dir: &Path,
    config: &Value,
    tensors: &[(String, Vec<usize>)],
    dtype: SaveDtype,
    shard_size: u64,
    mut read: impl FnMut(&str) -> Result<Vec<f32>, E>,
) -> Result<Written, E> {
    write_json(&dir.join("config.json"), &with_dtype(config, dtype))?;
    let infos = (tensors.iter())
        .map(|(name, shape)| TensorInfo {
            name: name.clone(),
            dtype: dtype.stored(),
            shape: shape.clone(),
        })
        .collect();
    write_weights(dir, &[("format", "pt")], infos, shard_size, |info| {
        let values = read(&info.name)?;
        Ok(Cow::Owned(dtype.encode(&values).into_owned()))
    })
}

/// The configuration with the type of its weights, under the key it has for that: `dtype` since
/// transformers 5, `torch_dtype` before (which 5 reads too).
pub fn with_dtype(config: &Value, dtype: SaveDtype) -> Value {
    let mut config = config.clone();
    if let Value::Object(map) = &mut config {
        let keys: Vec<&str> = ["dtype", "torch_dtype"]
            .into_iter()
            .filter(|key| map.contains_key(*key))
            .collect();
        for key in if keys.is_empty() {
            vec!["torch_dtype"]
        } else {
            keys
        } {
            map.insert(key.to_owned(), json!(dtype.torch_name()));
        }
    }
    config
}

/// Writes JSON as Hugging Face does: two blanks of indent and a final newline.
///
/// # Errors
/// Why the file could not be written.
pub fn write_json(path: &Path, value: &Value) -> Result<(), WriteError> {
    atomic_bytes(path, format!("{value:#}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_hold_what_fits() {
        let tensor = |name: &str, n| TensorInfo {
            name: name.to_owned(),
            dtype: Dtype::U8,
            shape: vec![n],
        };
        let tensors = vec![
            tensor("a", 6),
            tensor("b", 4),
            tensor("c", 1),
            tensor("d", 99),
            tensor("e", 1),
        ];
        let names: Vec<String> = (split(tensors, 10).into_iter())
            .map(|shard| shard.into_iter().map(|t| t.name).collect())
            .collect();
        assert_eq!(names, ["ab", "c", "d", "e"]);
    }

    #[test]
    fn values_round_to_nearest_even() {
        let bytes = SaveDtype::Bf16
            .encode(&[1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0])
            .into_owned();
        let values: Vec<f32> = bytes
            .chunks(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect();
        assert_eq!(values, [1.0, 1.0, 1.015_625]);
    }

    #[test]
    fn the_dtype_goes_under_the_key_in_use() {
        let set = |config| with_dtype(&config, SaveDtype::F16);
        assert_eq!(set(json!({"dtype": "x"})), json!({"dtype": "float16"}));
        assert_eq!(set(json!({})), json!({"torch_dtype": "float16"}));
    }
}
