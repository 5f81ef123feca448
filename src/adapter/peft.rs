//! An adapter directory as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

pub use super::config::{AdapterConfig, AdapterConfigError, CONFIG_FILE, TrainedBias};
pub use super::read::read_adapter;
use super::target::{Matcher, ModuleAdapter, TargetError};
use super::vera::{Lambdas, VeraWeights};
use crate::model::config::ModelConfig;
use crate::model::names::{self, Adaptable};
use crate::model::weights::WeightsError;

/// The weights' file name in an adapter directory.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What PEFT called it before safetensors; a pickle, never read.
pub(super) const PICKLE_FILE: &str = "adapter_model.bin";

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
    /// Trained rows of tables of tokens, by the tables' paths; their order is the configuration's.
    pub token_rows: BTreeMap<String, Saved>,
    /// VeRA's vectors and projections, in place of `pairs`.
    pub vera: Option<VeraWeights>,
    /// Fingerprint of the base that it was trained on, where the file says so
    /// ([`Weights::fingerprint`](crate::model::weights::Weights::fingerprint)).
    pub base: Option<String>,
}

/// The key of a file's metadata under which the base's fingerprint stands.
pub const BASE_KEY: &str = "lorafit.base";

impl AdapterWeights {
    /// A hash (BLAKE3) of all its values.
    pub fn hash(&self) -> String {
        let mut hash = blake3::Hasher::new();
        let mut add = |name: &str, values: &[f32]| {
            hash.update(name.as_bytes());
            hash.update(bytemuck::cast_slice(values));
        };
        for (module, pair) in &self.pairs {
            add(module, &pair.a);
            add(module, &pair.b);
            add(module, pair.magnitude.as_deref().unwrap_or_default());
        }
        for (module, lambdas) in self.vera.iter().flat_map(|vera| &vera.lambdas) {
            add(module, &lambdas.d);
            add(module, &lambdas.b);
        }
        for (name, saved) in self.saved.iter().chain(&self.token_rows) {
            add(name, &saved.values);
        }
        hash.finalize().to_hex()[..32].to_string()
    }

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
        let saved = self.saved.values().chain(self.token_rows.values());
        let saved = saved.map(|saved| saved.values.len());
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
    let grown;
    let model = match &config.trained_tokens {
        Some(tokens) if tokens.vocabulary() > model.vocab_size => {
            grown = ModelConfig {
                vocab_size: tokens.vocabulary(),
                ..model.clone()
            };
            &grown
        }
        _ => model,
    };
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
    for (module, rows) in &adapter.token_rows {
        if rows.shape.get(1) != Some(&model.hidden_size) {
            faults.push(format!(
                "{module}: expected trained rows of {}, found {:?}",
                model.hidden_size, rows.shape
            ));
        }
    }
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
