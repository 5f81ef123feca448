//! An adapter directory as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

pub use super::config::{AdapterConfig, AdapterConfigError, CONFIG_FILE, TrainedBias};
use super::target::{Matcher, ModuleAdapter, TargetError};
use super::vera::{Lambdas, VeraWeights};
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
        let ([rank, input], [out, _]) = (self.a_shape, self.b_shape);
        Self {
            a: transposed(&self.b, self.b_shape),
            a_shape: [rank, out],
            b: transposed(&self.a, self.a_shape),
            b_shape: [input, rank],
            magnitude: self.magnitude.clone(),
        }
    }
}

/// A matrix, row-major, with rows and columns exchanged.
pub(super) fn transposed(values: &[f32], [rows, cols]: [usize; 2]) -> Vec<f32> {
    let columns = 0..cols;
    columns
        .flat_map(|col| (0..rows).map(move |row| values[row * cols + col]))
        .collect()
}

/// Everything that an adapter's file holds, in f32.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterWeights {
    /// Deltas by module path.
    pub pairs: BTreeMap<String, LoraPair>,
    /// Tensors of the base that trained whole, by name.
    pub saved: BTreeMap<String, Saved>,
    /// VeRA's vectors and projections, in place of `pairs`.
    pub vera: Option<VeraWeights>,
}

impl AdapterWeights {
    /// How many modules it adapts.
    pub fn modules(&self) -> usize {
        let vera = self.vera.as_ref();
        self.pairs.len() + vera.map_or(0, |vera| vera.lambdas.len())
    }

    /// The same with VeRA's deltas as LoRA's, whose scaling is 1.
    pub fn with_plain_pairs(mut self, config: &AdapterConfig, layers: &[Adaptable]) -> Self {
        let (Some(vera), Some(settings)) = (self.vera.take(), &config.vera) else {
            return self;
        };
        let shared = vera.projections(settings, layers);
        for layer in layers {
            if let Some(lambdas) = vera.lambdas.get(&layer.path) {
                let pair = VeraWeights::pair(lambdas, &shared, layer.in_features);
                self.pairs.insert(layer.path.clone(), pair);
            }
        }
        self
    }

    /// How many trained numbers it holds.
    pub fn parameters(&self) -> usize {
        let pairs = self.pairs.values().map(|pair| {
            let magnitudes = pair.magnitude.as_ref().map_or(0, Vec::len);
            pair.a.len() + pair.b.len() + magnitudes
        });
        let saved = self.saved.values().map(|saved| saved.values.len());
        let lambdas = (self.vera.iter())
            .flat_map(|vera| vera.lambdas.values())
            .map(|lambdas| lambdas.b.len() + lambdas.d.len());
        pairs.chain(saved).chain(lambdas).sum()
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
    let mut found = Found::new(&weights, &config, &matcher, &mut faults);
    for (module, key) in &found.modules {
        if !matcher.selects(module) {
            faults.push(format!(
                "{module}: has tensors, but the configuration does not choose it"
            ));
        }
        let rank = matcher.adapter(module).rank;
        match config.vera.is_some() {
            true => check_lambdas(&weights, rank, key, &mut faults),
            false => check_module(&weights, rank, &config, (module, key), &mut faults),
        }
    }
    if config.vera.is_some() {
        check_projections(&weights, &config, &mut faults);
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
    if config.vera.is_some() {
        read.vera = Some(read_vera(&weights, &found.modules)?);
        found.modules.clear();
    }
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
                Some(PeftTensor::Half(module, _)) if config.vera.is_none() => {
                    let path = names::delta_path(&module, |path| matcher.selects(path));
                    found.modules.insert(path, module);
                }
                Some(PeftTensor::Magnitude(_)) if config.use_dora => {}
                Some(PeftTensor::Saved(name)) if trains(config, &name) => {
                    found.saved.insert(name, key.to_owned());
                }
                Some(PeftTensor::Lambda(module, _)) if config.vera.is_some() => {
                    found.modules.insert(module.clone(), module);
                }
                Some(PeftTensor::Projection(_)) if config.vera.is_some() => {}
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
    rank: usize,
    config: &AdapterConfig,
    (module, key_module): (&str, &str),
    faults: &mut Vec<String>,
) {
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
    let pair = LoraPair {
        a,
        a_shape,
        b,
        b_shape,
        magnitude: match dora {
            true => Some(weights.read_f32(&names::magnitude_key(module))?),
            false => None,
        },
    };
    Ok(match module == names::EMBEDDING {
        true => pair.transposed(),
        false => pair,
    })
}

/// VeRA's vectors of a module: λ_d `[R]`, λ_b `[out]`.
fn check_lambdas(weights: &Weights, rank: usize, module: &str, faults: &mut Vec<String>) {
    for half in LoraHalf::BOTH {
        let key = names::lambda_key(module, half);
        match (half, weights.shape(&key)) {
            (LoraHalf::A, Some(&[n])) if n == rank => {}
            (LoraHalf::B, Some(&[_])) => {}
            (LoraHalf::A, found) => {
                faults.push(format!("{key}: expected [{rank}], found {found:?}"));
            }
            (LoraHalf::B, found) => faults.push(format!("{key}: expected [out], found {found:?}")),
        }
    }
}

/// VeRA's projections, A `[R, in]` and B `[out, R]`, which the file may lack.
fn check_projections(weights: &Weights, config: &AdapterConfig, faults: &mut Vec<String>) {
    let rank = config.targeting.rank;
    let saved = config.vera.is_some_and(|vera| vera.save_projection);
    for half in LoraHalf::BOTH {
        let key = names::projection_key(half);
        match (half, weights.shape(key)) {
            (_, None) if !saved => {}
            (LoraHalf::A, Some(&[r, _])) | (LoraHalf::B, Some(&[_, r])) if r == rank => {}
            (_, found) => faults.push(format!(
                "{key}: expected a matrix of rank {rank}, found {found:?}"
            )),
        }
    }
}

fn read_vera(
    weights: &Weights,
    modules: &BTreeMap<String, String>,
) -> Result<VeraWeights, PeftError> {
    let mut lambdas = BTreeMap::new();
    for module in modules.keys() {
        let read = |half| weights.read_f32(&names::lambda_key(module, half));
        let (d, b) = (read(LoraHalf::A)?, read(LoraHalf::B)?);
        lambdas.insert(module.clone(), Lambdas { d, b });
    }
    let [a, b] = LoraHalf::BOTH.map(names::projection_key);
    let shared = match (weights.shape(a), weights.shape(b)) {
        (Some(&[rank, input]), Some(&[out, _])) => Some(LoraPair {
            a: weights.read_f32(a)?,
            a_shape: [rank, input],
            b: weights.read_f32(b)?,
            b_shape: [out, rank],
            magnitude: None,
        }),
        _ => None,
    };
    Ok(VeraWeights { shared, lambdas })
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
    let layers = names::adaptable(model);
    let modules = match &adapter.vera {
        Some(vera) => fit_vera(dir, config, vera, &layers)?,
        None => fit(dir, config, &adapter.pairs, &layers)?,
    };
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

/// [`fit`] for VeRA.
fn fit_vera(
    dir: &Path,
    config: &AdapterConfig,
    vera: &VeraWeights,
    layers: &[Adaptable],
) -> Result<Vec<ModuleAdapter>, PeftError> {
    // The vectors with the projections' widths stand for the factors that they scale.
    let widest = vera.shared.as_ref().map(|s| [s.b_shape[0], s.a_shape[1]]);
    let factors = |(module, lambdas): (&String, &Lambdas)| {
        let layer = layers.iter().find(|layer| layer.path == *module)?;
        let [out, input] = widest.unwrap_or([layer.out_features, layer.in_features]);
        let pair = LoraPair {
            a: Vec::new(),
            a_shape: [lambdas.d.len(), layer.in_features.min(input)],
            b: Vec::new(),
            b_shape: [lambdas.b.len().min(out), lambdas.d.len()],
            magnitude: None,
        };
        Some((module.clone(), pair))
    };
    let pairs = vera.lambdas.iter().filter_map(factors).collect();
    fit(dir, config, &pairs, layers)
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
