//! An adapter directory as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

pub use super::config::{AdapterConfig, AdapterConfigError, CONFIG_FILE};
use super::target::{Matcher, ModuleAdapter, TargetError};
use crate::model::names::{self, LoraHalf};
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
}

/// Reads an adapter: its configuration, and its factors by module path.
///
/// # Dtypes
/// F32, F16 and BF16 files; the factors are f32.
///
/// # Errors
/// [`PeftError`]; tensors that are missing, unknown, of other shapes than the configuration
/// says, or on modules that it does not choose are all listed in one error.
pub fn read_adapter(dir: &Path) -> Result<(AdapterConfig, BTreeMap<String, LoraPair>), PeftError> {
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
    let modules = modules_of(&weights, &mut faults);
    for module in &modules {
        check_module(&weights, &matcher, module, &mut faults);
    }
    if modules.is_empty() && faults.is_empty() {
        faults.push("no tensors".to_owned());
    }
    if !faults.is_empty() {
        return Err(PeftError::Tensors {
            path,
            against: CONFIG_FILE,
            faults,
        });
    }
    let mut pairs = BTreeMap::new();
    for module in modules {
        pairs.insert(module.clone(), read_pair(&weights, &module)?);
    }
    Ok((config, pairs))
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

/// The modules that tensors belong to; tensors that are no half of a pair are faults.
fn modules_of(weights: &Weights, faults: &mut Vec<String>) -> BTreeSet<String> {
    let mut modules = BTreeSet::new();
    for name in weights.names() {
        match names::parse_peft_key(name) {
            Some((module, _)) => {
                modules.insert(module.to_owned());
            }
            None => faults.push(format!("{name}: not a lora_A or lora_B of a linear layer")),
        }
    }
    modules
}

fn check_module(weights: &Weights, matcher: &Matcher, module: &str, faults: &mut Vec<String>) {
    if !matcher.selects(module) {
        faults.push(format!(
            "{module}: has tensors, but the configuration does not choose it"
        ));
    }
    let rank = matcher.adapter(module).rank;
    for half in LoraHalf::BOTH {
        let key = names::peft_key(module, half);
        let expected = match half {
            LoraHalf::A => format!("[{rank}, in]"),
            LoraHalf::B => format!("[out, {rank}]"),
        };
        let ranked = |shape: &[usize]| match (half, shape) {
            (LoraHalf::A, [r, _]) | (LoraHalf::B, [_, r]) => *r == rank,
            _ => false,
        };
        match weights.shape(&key) {
            None => faults.push(format!("{key}: missing, expected {expected}")),
            Some(shape) if ranked(shape) => {}
            Some(shape) => faults.push(format!("{key}: expected {expected}, found {shape:?}")),
        }
    }
}

fn read_pair(weights: &Weights, module: &str) -> Result<LoraPair, PeftError> {
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
    })
}

/// Checks an adapter against the base model's linear layers, given as path and `[out, in]`, and
/// returns what each module's adapter is scaled by, in the layers' order.
///
/// # Errors
/// Modules that the base lacks, shapes that differ, and modules that the configuration chooses
/// but the file lacks (PEFT would leave them untrained), all in one error.
pub fn fit(
    dir: &Path,
    config: &AdapterConfig,
    pairs: &BTreeMap<String, LoraPair>,
    linears: &[(String, [usize; 2])],
) -> Result<Vec<ModuleAdapter>, PeftError> {
    let matcher = matcher(config, dir)?;
    let mut faults = Vec::new();
    let mut adapters = Vec::new();
    let mut known = BTreeSet::new();
    for (module, [out, inputs]) in linears {
        known.insert(module);
        match pairs.get(module) {
            Some(pair) => {
                let found = [pair.b_shape[0], pair.a_shape[1]];
                if found != [*out, *inputs] {
                    faults.push(format!(
                        "{module}: expected [{out}, {inputs}], found {found:?}"
                    ));
                }
                adapters.push(matcher.adapter(module));
            }
            None if matcher.selects(module) => {
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
