//! A base model's tensors: memory-mapped safetensors (one file or shards) or GGUF, converted one at a
//! time. Pickle is never read.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use super::config::{ConfigError, ModelConfig};
use super::pieces::pieces;
use super::shard::Shard;
use super::storage::Kept;
pub use super::weights_error::WeightsError;
use super::{causal_lm, gguf, names};
use crate::quant::blocks::BlockKind;
use crate::quant::gguf::GgufFile;
use crate::quant::stored::BlockMatrix;

/// The one file of a small model.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The table of a sharded one.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// Blocks of a GGUF quantisation.
    Quantised,
    /// A safetensors type that lorafit does not read, by its name there.
    Other(&'static str),
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Quantised => "quantised",
            Self::Other(name) => name,
        })
    }
}

/// The tensors of a model, under Hugging Face's names.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    source: Source,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
enum Source {
    Safetensors(Vec<Shard>),
    Gguf {
        file: Box<GgufFile>,
        config: Box<ModelConfig>,
    },
}

#[derive(Debug)]
struct Tensor {
    shape: Vec<usize>,
    dtype: Dtype,
    /// Index of the shard; 0 in GGUF.
    shard: usize,
    /// Its name in the file.
    stored_name: String,
    /// Which of how many equal parts of the stored tensor it is; the whole in safetensors.
    part: (usize, usize),
}

impl Weights {
    /// Opens a model directory, a `.safetensors` file or a `.gguf` file.
    ///
    /// # Errors
    /// When there are no readable weights, or a header is damaged.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        if path.is_dir() {
            return Self::open_dir(path);
        }
        match path.extension().and_then(|ext| ext.to_str()) {
            Some("gguf") => Self::open_gguf(path, path),
            Some("bin" | "pt" | "pth") => Err(WeightsError::Pickle {
                path: path.to_path_buf(),
            }),
            _ => Ok(Self::from_shards(
                path,
                vec![Shard::open(path)?],
                &BTreeMap::new(),
            )),
        }
    }

    fn open_dir(dir: &Path) -> Result<Self, WeightsError> {
        let single = dir.join(SINGLE);
        if single.is_file() {
            return Ok(Self::from_shards(
                dir,
                vec![Shard::open(&single)?],
                &BTreeMap::new(),
            ));
        }
        let index = dir.join(INDEX);
        if index.is_file() {
            return Self::open_sharded(dir, &index);
        }
        let with_extension = |wanted: &[&str]| -> Result<Vec<PathBuf>, WeightsError> {
            let read = |source| WeightsError::Read {
                path: dir.to_path_buf(),
                source,
            };
            let mut found = Vec::new();
            for entry in std::fs::read_dir(dir).map_err(read)? {
                let path = entry.map_err(read)?.path();
                let extension = path.extension().and_then(|ext| ext.to_str());
                if extension.is_some_and(|ext| wanted.contains(&ext)) {
                    found.push(path);
                }
            }
            Ok(found)
        };
        if let [one] = with_extension(&["gguf"])?.as_slice() {
            return Self::open_gguf(dir, one);
        }
        match with_extension(&["bin", "pt", "pth"])?.into_iter().next() {
            Some(path) => Err(WeightsError::Pickle { path }),
            None => Err(WeightsError::NoWeights {
                path: dir.to_path_buf(),
            }),
        }
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Self, WeightsError> {
        let files = read_index(index)?;
        let mut shards: Vec<Shard> = Vec::new();
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        for file in files.values() {
            if !numbers.contains_key(file.as_str()) {
                numbers.insert(file, shards.len());
                shards.push(Shard::open(&dir.join(file))?);
            }
        }
        for (name, file) in &files {
            if !shards[numbers[file.as_str()]].tensors().contains_key(name) {
                return Err(WeightsError::Malformed {
                    path: index.to_path_buf(),
                    what: format!("it places tensor `{name}` in {file}, which has no such tensor"),
                });
            }
        }
        let owners = files.iter();
        let owners = owners.map(|(name, file)| (name.as_str(), numbers[file.as_str()]));
        Ok(Self::from_shards(dir, shards, &owners.collect()))
    }

    /// Gathers the tensors of all shards; where two have the same name, `owners` decides.
    fn from_shards(path: &Path, shards: Vec<Shard>, owners: &BTreeMap<&str, usize>) -> Self {
        let mut tensors = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for (name, stored) in shard.tensors() {
                let placed = owners.get(name.as_str());
                if placed.is_some_and(|placed| *placed != number) {
                    continue;
                }
                let tensor = Tensor {
                    shape: stored.shape.clone(),
                    dtype: stored.dtype,
                    shard: number,
                    stored_name: name.clone(),
                    part: (0, 1),
                };
                tensors.insert(name.clone(), tensor);
            }
        }
        Self {
            path: path.to_path_buf(),
            source: Source::Safetensors(shards),
            tensors,
        }
    }

    fn open_gguf(path: &Path, file: &Path) -> Result<Self, WeightsError> {
        let file = GgufFile::open(file)?;
        let config = ModelConfig::from_gguf(&file)?;
        let tensors = gguf::tensors(&file, config.family)
            .into_iter()
            .map(|(name, stored)| {
                let tensor = Tensor {
                    shape: stored.shape,
                    dtype: match file.tensors[&stored.name].kind {
                        BlockKind::F32 => Dtype::F32,
                        BlockKind::F16 => Dtype::F16,
                        BlockKind::Bf16 => Dtype::BF16,
                        _ => Dtype::Quantised,
                    },
                    shard: 0,
                    stored_name: stored.name,
                    part: stored.part,
                };
                (name, tensor)
            })
            .collect();
        Ok(Self {
            path: path.to_path_buf(),
            source: Source::Gguf {
                file: Box::new(file),
                config: Box::new(config),
            },
            tensors,
        })
    }

    /// The model directory or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open GGUF file, when that is where the weights are.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.source {
            Source::Gguf { file, .. } => Some(file),
            Source::Safetensors(_) => None,
        }
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.tensors.get(name)?.shape)
    }

    /// How a tensor is stored.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        Some(self.tensors.get(name)?.dtype)
    }

    /// A tensor in f32, row-major, in Hugging Face's order of rows.
    ///
    /// # Errors
    /// When there is no such tensor, or its element type is not supported.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        self.read(name)
    }

    /// The same in the type in which it is kept.
    pub(super) fn read<T: Kept>(&self, name: &str) -> Result<Vec<T>, WeightsError> {
        let tensor = self.tensor(name)?;
        match &self.source {
            Source::Safetensors(shards) => {
                let shard = &shards[tensor.shard];
                let stored = &shard.tensors()[&tensor.stored_name];
                shard.read(stored).ok_or_else(|| WeightsError::Dtype {
                    path: shard.path().to_path_buf(),
                    name: name.to_string(),
                    dtype: tensor.dtype,
                })
            }
            Source::Gguf { file, config } => {
                let (part, parts) = tensor.part;
                let values = file.read_part(&tensor.stored_name, part, parts)?;
                let values = gguf::to_hf_values(name, values, config);
                Ok(values.into_iter().map(T::from_f32).collect())
            }
        }
    }

    /// A matrix as the GGUF file has it, mapped, its rows in Hugging Face's order; `None` where it is not in
    /// blocks there but in f32, f16 or bf16.
    ///
    /// # Errors
    /// The weights are not in a GGUF file, or there is no such tensor.
    pub fn blocks(&self, name: &str) -> Result<Option<BlockMatrix>, WeightsError> {
        let tensor = self.tensor(name)?;
        let Source::Gguf { file, config } = &self.source else {
            return Err(WeightsError::NotGguf {
                path: self.path.clone(),
            });
        };
        if tensor.dtype != Dtype::Quantised || tensor.shape.len() != 2 {
            return Ok(None);
        }
        let order = gguf::row_order(name, config);
        let matrix = file.matrix(&tensor.stored_name, tensor.part, order)?;
        Ok(Some(matrix))
    }

    /// A tensor's bytes as safetensors stores them; `None` in GGUF, whose layout differs.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn raw(&self, name: &str) -> Result<Option<&[u8]>, WeightsError> {
        let tensor = self.tensor(name)?;
        Ok(match &self.source {
            Source::Safetensors(shards) => {
                let shard = &shards[tensor.shard];
                Some(shard.bytes(&shard.tensors()[&tensor.stored_name]))
            }
            Source::Gguf { .. } => None,
        })
    }

    /// What the metadata of the files say under a key; GGUF has other ones.
    pub fn metadata(&self, key: &str) -> Option<String> {
        match &self.source {
            Source::Safetensors(shards) => shards.iter().find_map(|shard| shard.metadata(key)),
            Source::Gguf { .. } => None,
        }
    }

    /// The model's configuration: `config.json` beside the weights, or GGUF metadata.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn config(&self) -> Result<ModelConfig, ConfigError> {
        match &self.source {
            Source::Gguf { config, .. } => Ok((**config).clone()),
            Source::Safetensors(_) if self.path.is_dir() => ModelConfig::from_dir(&self.path),
            Source::Safetensors(_) => {
                ModelConfig::from_dir(self.path.parent().unwrap_or(Path::new(".")))
            }
        }
    }

    fn tensor(&self, name: &str) -> Result<&Tensor, WeightsError> {
        self.tensors
            .get(name)
            .ok_or_else(|| WeightsError::NoTensor {
                path: self.path.clone(),
                name: name.to_string(),
            })
    }
}

/// Tensor name → file name, each a plain name in the index's own directory.
pub(crate) fn read_index(index: &Path) -> Result<BTreeMap<String, String>, WeightsError> {
    let malformed = |what: String| WeightsError::Malformed {
        path: index.to_path_buf(),
        what,
    };
    let text = std::fs::read(index).map_err(|source| WeightsError::Read {
        path: index.to_path_buf(),
        source,
    })?;
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = serde_json::from_slice(&text)
        .map_err(|error| malformed(format!("not an index of shards: {error}")))?;
    if weight_map.is_empty() {
        return Err(malformed("`weight_map` is empty".into()));
    }
    for (name, file) in &weight_map {
        let mut parts = Path::new(file).components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(only)), None) if only == file.as_str()
        );
        if !plain || file.contains('\\') {
            return Err(malformed(format!(
                "tensor `{name}` is placed in {file:?}; shards are files beside the index"
            )));
        }
        if !file.ends_with(".safetensors") {
            return Err(malformed(format!(
                "tensor `{name}` is placed in {file:?}, which is not a .safetensors file"
            )));
        }
    }
    Ok(weight_map)
}

/// Every tensor that the configuration calls for, as its files call it, with its shape. A tied
/// output head is not listed.
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    (causal_lm::outline(config).tensors.iter())
        .flat_map(|(name, shape)| pieces(config, name, shape))
        .map(|piece| (piece.name, piece.shape))
        .collect()
}

/// Compares the tensors with those the configuration calls for. A tied output head may be stored
/// or not; what transformers passes over is passed over.
///
/// # Errors
/// [`WeightsError::Mismatch`] with every missing, extra and misshapen tensor.
pub fn check(weights: &Weights, config: &ModelConfig) -> Result<(), WeightsError> {
    let mut expected: BTreeMap<String, Vec<usize>> = expected_tensors(config).into_iter().collect();
    let mut faults: Vec<String> = expected
        .iter()
        .filter(|(name, _)| !weights.tensors.contains_key(*name))
        .map(|(name, shape)| format!("missing: {name} {shape:?}"))
        .collect();
    expected
        .entry(format!("{}.weight", names::HEAD))
        .or_insert_with(|| vec![config.vocab_size, config.hidden_size]);
    for (name, tensor) in &weights.tensors {
        if names::is_passed_over(name, config.num_hidden_layers) {
            continue;
        }
        match expected.get(name) {
            None => faults.push(format!("extra: {name} {:?}", tensor.shape)),
            Some(shape) if *shape != tensor.shape => faults.push(format!(
                "misshapen: {name} expected {shape:?}, found {:?}",
                tensor.shape
            )),
            Some(_) => {}
        }
        if let Dtype::Other(dtype) = tensor.dtype {
            faults.push(format!(
                "stored as {dtype}: {name}; supported: F32, F16, BF16"
            ));
        }
    }
    match faults.is_empty() {
        true => Ok(()),
        false => Err(WeightsError::Mismatch {
            path: weights.path.clone(),
            faults,
        }),
    }
}
