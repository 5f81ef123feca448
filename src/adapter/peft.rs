//! An adapter directory as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

pub use super::config::{AdapterConfig, AdapterConfigError, CONFIG_FILE, TrainedBias};
use super::target::{Matcher, ModuleAdapter, TargetError};
use crate::model::config::ModelConfig;
use crate::model::names::{self, Adaptable, LoraHalf, PeftTensor};
use crate::model::weights::{Weights, WeightsError};

/// The weights' file name in an adapter directory.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What PEFT called it before safetensors; a pickle, never read.
const PICKLE_FILE: &str = "adapter_model.bin";

/// How many faults a message lists.
const MAX_LISTED: usize = 20;

/// Why an adapter cannot be read or does not fit.
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] AdapterConfigError),
    /// Its choice of modules.
    #[error("{}: {source}", path.display())]
    Target {
        /// `adapter_config.json`.
        path: PathBuf,
        /// What is wrong.
        source: TargetError,
    },
    /// No weights.
    #[error(
        "{}: no {WEIGHTS_FILE}; expected a PEFT adapter directory, such as a run's adapter",
        dir.display()
    )]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// Only a pickle.
    #[error(
        "{}: found only {PICKLE_FILE}, a pickle, which can run code and is never read; save it again \
         with PEFT: PeftModel.from_pretrained(base, DIR).save_pretrained(OUT)",
        dir.display()
    )]
    Pickle {
        /// The directory.
        dir: PathBuf,
    },
    /// The weights' file.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Tensors that do not fit the configuration or the base model.
    #[error("{}: the adapter does not fit {against}: {}", path.display(), Listed(faults))]
    Tensors {
        /// The file.
        path: PathBuf,
        /// What it was compared with.
        against: &'static str,
        /// One line each.
        faults: Vec<String>,
    },
}

/// The first faults, and how many more there are.
struct Listed<'a>(&'a [String]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in self.0.iter().take(MAX_LISTED) {
            write!(f, "\n  {fault}")?;
        }
        match self.0.len().checked_sub(MAX_LISTED) {
            Some(more) if more > 0 => write!(f, "\n  and {more} more"),
            _ => Ok(()),
        }
    }
}

/// The two factors of one module's delta `s·B·A`, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// `A`, row-major.
    pub a: Vec<f32>,
    /// `[R, in]`
    pub a_shape: [usize; 2],
    /// `B`, row-major.
    pub b: Vec<f32>,
    /// `[out, R]`
    pub b_shape: [usize; 2],
    /// DoRA's length of each row of the weight, `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

impl LoraPair {
    /// The delta of the transposed weight: `(B·A)ᵀ = Aᵀ·Bᵀ`.
    pub fn transposed(&self) -> Self {
        let transpose = |values: &[f32], [rows, cols]: [usize; 2]| -> Vec<f32> {
            let columns = 0..cols;
            columns
                .flat_map(|col| (0..rows).map(move |row| values[row * cols + col]))
                .collect()
        };
        let ([rank, input], [out, _]) = (self.a_shape, self.b_shape);
        Self {
            a: transpose(&self.b, self.b_shape),
            a_shape: [rank, out],
            b: transpose(&self.a, self.a_shape),
            b_shape: [input, rank],
            magnitude: self.magnitude.clone(),
        }
    }
}

/// Everything that an adapter's file holds, in f32.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterWeights {
    /// Deltas by module path.
    pub pairs: BTreeMap<String, LoraPair>,
    /// Tensors of the base that trained whole, by name.
    pub saved: BTreeMap<String, Saved>,
}

impl AdapterWeights {
    /// How many numbers it holds.
    pub fn parameters(&self) -> usize {
        let pairs = self.pairs.values().map(|pair| {
            let magnitudes = pair.magnitude.as_ref().map_or(0, Vec::len);
            pair.a.len() + pair.b.len() + magnitudes
        });
        let saved = self.saved.values().map(|saved| saved.values.len());
        pairs.chain(saved).sum()
    }
}

/// A tensor of the base that trained whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// The values, row-major.
    pub values: Vec<f32>,
    /// The shape.
    pub shape: Vec<usize>,
}

/// Reads an adapter: its configuration, and its tensors.
///
/// # Dtypes
/// F32, F16 and BF16 files; the factors are f32.
///
/// # Errors
/// [`PeftError`]; tensors that are missing, unknown, of other shapes than the configuration
/// says, or on modules that it does not choose are all listed in one error.
pub fn read_adapter(dir: &Path) -> Result<(AdapterConfig, AdapterWeights), PeftError> {
    let config = AdapterConfig::load(dir)?;
    let matcher = matcher(&config, dir)?;
    let path = dir.join(WEIGHTS_FILE);
    if !path.is_file() {
        let dir = dir.to_owned();
        let pickle = dir.join(PICKLE_FILE).is_file();
        return Err(if pickle {
            PeftError::Pickle { dir }
        } else {
            PeftError::NoWeights { dir }
        });
    }
    let weights = Weights::open(&path)?;
    let mut faults = Vec::new();
    let found = Found::new(&weights, &config, &matcher, &mut faults);
    for (module, key) in &found.modules {
        check_module(&weights, &matcher, &config, (module, key), &mut faults);
    }
    if found.modules.is_empty() && faults.is_empty() {
        faults.push("no tensors".to_owned());
    }
    if !faults.is_empty() {
        return Err(PeftError::Tensors {
            path,
            against: CONFIG_FILE,
            faults,
        });
    }
    let mut read = AdapterWeights::default();
    for (module, key) in found.modules {
        let pair = read_pair(&weights, &key, config.use_dora)?;
        read.pairs.insert(module, pair);
    }
    for (name, key) in found.saved {
        let saved = Saved {
            values: weights.read_f32(&key)?,
            shape: weights.shape(&key).unwrap_or_default().to_vec(),
        };
        read.saved.insert(name, saved);
    }
    Ok((config, read))
}

/// The compiled choice of modules; its ranks and scalings.
///
/// # Errors
/// Regular expressions and knobs that cannot be used.
pub fn matcher(config: &AdapterConfig, dir: &Path) -> Result<Matcher, PeftError> {
    Matcher::new(&config.targeting).map_err(|source| PeftError::Target {
        path: dir.join(CONFIG_FILE),
        source,
    })
}

/// Whether a path is that of all experts' layer.
fn is_expert_layer(path: &str) -> bool {
    names::parameter_of(path).is_some_and(|parameter| parameter == path)
}

/// What a file holds.
struct Found {
    /// Paths of deltas, and the modules under which the file keeps them.
    modules: BTreeMap<String, String>,
    /// Tensors of the base that trained: their names, and their keys in the file.
    saved: BTreeMap<String, String>,
}

impl Found {
    /// Sorts a file's tensors; those that the configuration does not account for are faults.
    fn new(
        weights: &Weights,
        config: &AdapterConfig,
        matcher: &Matcher,
        faults: &mut Vec<String>,
    ) -> Self {
        let mut found = Self {
            modules: BTreeMap::new(),
            saved: BTreeMap::new(),
        };
        for key in weights.names() {
            match names::parse_peft_tensor(key) {
                Some(PeftTensor::Half(module, _)) => {
                    let path = names::delta_path(&module, |path| matcher.selects(path));
                    found.modules.insert(path, module);
                }
                Some(PeftTensor::Magnitude(_)) if config.use_dora => {}
                Some(PeftTensor::Saved(name)) if trains(config, &name) => {
                    found.saved.insert(name, key.to_owned());
                }
                Some(PeftTensor::Frozen) => {}
                _ => faults.push(format!(
                    "{key}: not a lora_A or lora_B of a linear layer, nor anything else that \
                     {CONFIG_FILE} speaks of"
                )),
            }
        }
        found
    }
}

/// Whether a tensor of the base trains beside the deltas.
fn trains(config: &AdapterConfig, name: &str) -> bool {
    let (module, field) = name.rsplit_once('.').unwrap_or((name, ""));
    config.saves(module) || (config.bias != TrainedBias::None && field == "bias")
}

fn check_module(
    weights: &Weights,
    matcher: &Matcher,
    config: &AdapterConfig,
    (module, key_module): (&str, &str),
    faults: &mut Vec<String>,
) {
    if !matcher.selects(module) {
        faults.push(format!(
            "{module}: has tensors, but the configuration does not choose it"
        ));
    }
    let rank = matcher.adapter(module).rank;
    let shape = |half| weights.shape(&names::peft_key(key_module, half));
    // All experts' deltas lie in one pair, whose rank is theirs together.
    let experts = match shape(LoraHalf::A) {
        Some([rows, _]) if is_expert_layer(module) && rows.is_multiple_of(rank) => rows / rank,
        _ => 1,
    };
    for half in LoraHalf::BOTH {
        let key = names::peft_key(key_module, half);
        let expected = match half {
            LoraHalf::A => format!("[{}, in]", rank * experts),
            LoraHalf::B => format!("[out, {}]", rank * experts),
        };
        let ranked = |shape: &[usize]| match (half, shape) {
            (LoraHalf::A, [r, _]) | (LoraHalf::B, [_, r]) => *r == rank * experts,
            _ => false,
        };
        match weights.shape(&key) {
            None => faults.push(format!("{key}: missing, expected {expected}")),
            Some(shape) if ranked(shape) => {}
            Some(shape) => faults.push(format!("{key}: expected {expected}, found {shape:?}")),
        }
    }
    let key = names::magnitude_key(key_module);
    let rows = shape(LoraHalf::B);
    match (weights.shape(&key), rows) {
        (None, _) if config.use_dora => faults.push(format!("{key}: missing, expected [out]")),
        (Some(found), Some([out, _])) if found != [*out] => {
            faults.push(format!("{key}: expected [{out}], found {found:?}"));
        }
        _ => {}
    }
}

fn read_pair(weights: &Weights, module: &str, dora: bool) -> Result<LoraPair, PeftError> {
    let read = |half| -> Result<(Vec<f32>, [usize; 2]), PeftError> {
        let key = names::peft_key(module, half);
        let values = weights.read_f32(&key)?;
        // Checked to be two by `check_module`.
        let shape = weights
            .shape(&key)
            .and_then(|s| s.try_into().ok())
            .unwrap_or_default();
        Ok((values, shape))
    };
    let (a, a_shape) = read(LoraHalf::A)?;
    let (b, b_shape) = read(LoraHalf::B)?;
    Ok(LoraPair {
        a,
        a_shape,
        b,
        b_shape,
        magnitude: match dora {
            true => Some(weights.read_f32(&names::magnitude_key(module))?),
            false => None,
        },
    })
}

/// [`fit`] to the linear layers of a model, and the tensors that trained whole to its tensors.
///
/// # Errors
/// As [`fit`]; tensors that the base lacks or has in another shape.
pub fn fit_model(
    dir: &Path,
    config: &AdapterConfig,
    adapter: &AdapterWeights,
    model: &ModelConfig,
) -> Result<Vec<ModuleAdapter>, PeftError> {
    let modules = fit(dir, config, &adapter.pairs, &names::adaptable(model))?;
    let head = (
        format!("{}.weight", names::HEAD),
        vec![model.vocab_size, model.hidden_size],
    );
    let tensors: BTreeMap<String, Vec<usize>> =
        names::tensors(model).into_iter().chain([head]).collect();
    let mut faults = Vec::new();
    for (name, saved) in &adapter.saved {
        match tensors.get(name) {
            Some(shape) if *shape == saved.shape => {}
            Some(shape) => faults.push(format!(
                "{name}: expected {shape:?}, found {:?}",
                saved.shape
            )),
            None => faults.push(format!("{name}: the base model has no such tensor")),
        }
    }
    match faults.is_empty() {
        true => Ok(modules),
        false => Err(PeftError::Tensors {
            path: dir.join(WEIGHTS_FILE),
            against: "the base model",
            faults,
        }),
    }
}

/// Checks an adapter against the base model's layers and
/// returns what each module's adapter is scaled by, in the layers' order.
///
/// # Errors
/// Modules that the base lacks, shapes that differ, and modules that the configuration chooses
/// but the file lacks (PEFT would leave them untrained), all in one error.
pub fn fit(
    dir: &Path,
    config: &AdapterConfig,
    pairs: &BTreeMap<String, LoraPair>,
    layers: &[Adaptable],
) -> Result<Vec<ModuleAdapter>, PeftError> {
    let matcher = matcher(config, dir)?;
    let mut faults = Vec::new();
    let mut adapters = Vec::new();
    let mut known = BTreeSet::new();
    for layer in layers {
        let module = &layer.path;
        known.insert(module);
        match pairs.get(module) {
            Some(pair) => {
                let adapter = matcher.adapter(module);
                let expected = (
                    adapter.rank * layer.experts,
                    [layer.out_features, layer.in_features],
                );
                let found = (pair.a_shape[0], [pair.b_shape[0], pair.a_shape[1]]);
                if found.1 != expected.1 {
                    faults.push(format!(
                        "{module}: expected {:?}, found {:?}",
                        expected.1, found.1
                    ));
                } else if found.0 != expected.0 {
                    faults.push(format!(
                        "{module}: expected rank {}, found {}",
                        expected.0, found.0
                    ));
                }
                adapters.push(adapter);
            }
            None if matcher.selects(module) && !config.saves(module) => {
                faults.push(format!(
                    "{module}: chosen by the configuration, but has no tensors"
                ));
            }
            None => {}
        }
    }
    let strangers = pairs.keys().filter(|module| !known.contains(module));
    faults.extend(strangers.map(|m| format!("{m}: the base model has no such linear layer")));
    if faults.is_empty() {
        return Ok(adapters);
    }
    Err(PeftError::Tensors {
        path: dir.join(WEIGHTS_FILE),
        against: "the base model",
        faults,
    })
}
