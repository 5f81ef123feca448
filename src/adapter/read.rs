//! Reads a PEFT adapter directory, and holds its tensors against its configuration.

use std::collections::BTreeMap;
use std::path::Path;

use super::config::{AdapterConfig, CONFIG_FILE};
use super::peft::{
    AdapterWeights, BASE_KEY, LoraPair, PICKLE_FILE, PeftError, Saved, WEIGHTS_FILE, matcher,
};
use super::target::Matcher;
use super::vera::{Lambdas, VeraWeights};
use crate::model::names::{self, LoraHalf, PeftTensor};
use crate::model::weights::Weights;
use crate::recipe::plan::TrainedBias;

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
    if let Some(tokens) = &config.trained_tokens {
        for module in [names::EMBEDDING, names::HEAD] {
            // A head that is the embedding has no rows of its own.
            let asked = tokens.of(module).is_some_and(|ids| !ids.is_empty());
            if asked && module == names::EMBEDDING && !found.token_rows.contains_key(module) {
                faults.push(format!("{}: missing", names::token_rows_key(module)));
            }
        }
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
    let mut read = AdapterWeights {
        base: weights.metadata(BASE_KEY),
        ..AdapterWeights::default()
    };
    if config.vera.is_some() {
        read.vera = Some(read_vera(&weights, &found.modules)?);
        found.modules.clear();
    }
    for (module, key) in found.modules {
        let pair = read_pair(&weights, &key, config.use_dora)?;
        read.pairs.insert(module, pair);
    }
    let saved = |key: &str| -> Result<Saved, PeftError> {
        Ok(Saved {
            values: weights.read_f32(key)?,
            shape: weights.shape(key).unwrap_or_default().to_vec(),
        })
    };
    for (name, key) in found.saved {
        read.saved.insert(name, saved(&key)?);
    }
    for (module, key) in found.token_rows {
        read.token_rows.insert(module, saved(&key)?);
    }
    Ok((config, read))
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
    /// Tables of tokens with trained rows, and those rows' keys.
    token_rows: BTreeMap<String, String>,
}

/// How many rows of a table train.
fn tokens_of(config: &AdapterConfig, module: &str) -> usize {
    let tokens = config.trained_tokens.as_ref();
    tokens
        .and_then(|tokens| tokens.of(module))
        .map_or(0, <[usize]>::len)
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
            token_rows: BTreeMap::new(),
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
                Some(PeftTensor::TokenRows(module)) if tokens_of(config, &module) > 0 => {
                    let expected = tokens_of(config, &module);
                    if !matches!(weights.shape(key), Some(&[n, _]) if n == expected) {
                        faults.push(format!(
                            "{key}: expected [{expected}, width], found {:?}",
                            weights.shape(key)
                        ));
                    }
                    found.token_rows.insert(module, key.to_owned());
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
