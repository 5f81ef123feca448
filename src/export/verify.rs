//! Reads a merged model back and compares it with base and adapter, logit by logit.

use std::path::Path;

use burn::tensor::Device;

use crate::adapter::inject::{self, Init};
use crate::adapter::peft::{self, AdapterConfig, AdapterWeights, PeftError};
use crate::device::to_vec;
use crate::model::config::ConfigError;
use crate::model::weights::{Dtype, Weights, WeightsError};
use crate::model::{CausalLm, Keep, Tokens};
use crate::quant::Scheme;
use crate::random::Stream;

/// How near a merged model is to base + adapter, and how far the base alone is.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// Largest difference of two logits, merged against base + adapter.
    pub max_difference: f64,
    /// Mean KL divergence of the next-token distributions, in nats, merged from base + adapter.
    pub kl: f64,
    /// The same divergence of the base alone: what the adapter changes.
    pub kl_of_base: f64,
    /// Positions compared.
    pub positions: usize,
    /// Where the base was quantised in training: how far what either base gives is from that model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_trained: Option<FromTrained>,
}

/// How far models are from the one that was trained, whose base was quantised.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct FromTrained {
    /// The adapter on the base's own weights.
    pub original: Distance,
    /// The adapter on what the quantised weights stand for: none but by rounding.
    pub quantized: Distance,
}

/// How far apart the logits of two models are.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Distance {
    /// Largest difference of two logits.
    pub max_difference: f64,
    /// Mean KL divergence of the next-token distributions, in nats.
    pub kl: f64,
}

impl Distance {
    fn new(from: &[f32], to: &[f32], vocabulary: usize) -> Self {
        Self {
            max_difference: (to.iter().zip(from))
                .map(|(a, b)| f64::from((a - b).abs()))
                .fold(0.0, f64::max),
            kl: divergence(from, to, vocabulary),
        }
    }
}

/// A merged model and what it is made of.
#[derive(Debug, Clone, Copy)]
pub struct Merged<'a> {
    /// The base model.
    pub base: &'a Path,
    /// The adapter.
    pub adapter: (&'a AdapterConfig, &'a AdapterWeights),
    /// The merged model.
    pub merged: &'a Path,
    /// How the base was quantised in training.
    pub trained_on: Option<Scheme>,
    /// How the base was quantised that the adapter is merged into: the same, or not at all.
    pub into: Option<Scheme>,
}

/// Why a merged model is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It is no nearer to base + adapter than half way from the base.
    #[error(
        "the merged model differs from base + adapter by {:.2e} nats, the base alone by {:.2e}: what the adapter learned is lost in the number format; merge with --dtype f32",
        .0.kl, .0.kl_of_base
    )]
    Differs(Comparison),
    /// It is further from base + adapter than its number format explains.
    #[error(
        "the merged model differs from base + adapter by {:.2e} nats and by up to {:.2e} in a logit, more than rounding explains (at most {limit:.0e} nats): its files are damaged or not those of this base and adapter; merge again",
        .found.kl, .found.max_difference
    )]
    Wrong {
        /// What was found.
        found: Comparison,
        /// The largest divergence that rounding explains.
        limit: f64,
    },
    /// Base and base + adapter give the same logits.
    #[error(
        "the adapter changes no logit of the base, so the merged model equals the base; was it trained (a fresh adapter has B = 0)?"
    )]
    Nothing,
    /// A model cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A configuration cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The adapter cannot be read.
    #[error(transparent)]
    Adapter(#[from] PeftError),
}

/// Positions of the probe; enough to see every layer, few enough for a large model on a CPU.
const PROBE: usize = 64;

/// Compares a merged model with base + adapter on a fixed random text, one model in memory at a time.
///
/// # Errors
/// A model cannot be read, or the merged one is not what it should be.
pub fn verify(job: &Merged, device: &Device) -> Result<Comparison, VerifyError> {
    let Probed {
        probe,
        adapted,
        plain,
    } = base_and_adapted(job, job.into, device)?;
    // The adapter on the base that it is not merged into.
    let other = match (job.trained_on, job.into) {
        (Some(_), Some(_)) => Some(base_and_adapted(job, None, device)?.adapted),
        (Some(scheme), None) => Some(base_and_adapted(job, Some(scheme), device)?.adapted),
        (None, _) => None,
    };
    let weights = Weights::open(job.merged)?;
    let model = CausalLm::load(&weights, weights.config()?, device)?;
    let merged = logits(&model, &probe);
    let vocabulary = model.config().vocab_size;
    let Distance { max_difference, kl } = Distance::new(&adapted, &merged, vocabulary);
    let comparison = Comparison {
        max_difference,
        kl,
        kl_of_base: divergence(&adapted, &plain, vocabulary),
        positions: adapted.len() / vocabulary,
        from_trained: other.map(|other| {
            let trained = if job.into.is_some() { &adapted } else { &other };
            let [here, there] = [&merged, &other].map(|x| Distance::new(trained, x, vocabulary));
            let (original, quantized) = match job.into {
                Some(_) => (there, here),
                None => (here, there),
            };
            FromTrained {
                original,
                quantized,
            }
        }),
    };
    if adapted == plain {
        return Err(VerifyError::Nothing);
    }
    // Written so that NaN fails. A weak adapter is near the base, so that only equality tells that
    // it was lost.
    let near = comparison.kl < comparison.kl_of_base / 2.0 || comparison.kl < 1e-9;
    let lost = merged == plain || !near;
    let limit = rounding(&weights);
    if lost && limit > ROUNDING_F32 && comparison.kl <= limit {
        Err(VerifyError::Differs(comparison))
    } else if lost || comparison.kl.is_nan() || comparison.kl > limit {
        Err(VerifyError::Wrong {
            found: comparison,
            limit,
        })
    } else {
        Ok(comparison)
    }
}

/// Divergence, in nats, that f32 arithmetic in another order explains: logits differ by about 1e-4
/// of their size, and the divergence is of the order of the square.
const ROUNDING_F32: f64 = 1e-6;

/// Divergence, in nats, that rounding the weights to their number format explains: ten times and
/// more what was seen (2^-12 of a weight in f16, 2^-9 in bf16).
fn rounding(weights: &Weights) -> f64 {
    let limit = |name: &str| match weights.dtype(name) {
        Some(Dtype::F32) => ROUNDING_F32,
        Some(Dtype::F16) => 1e-3,
        _ => 2e-2,
    };
    weights.names().map(limit).fold(0.0, f64::max)
}

/// A text, and the logits of two models for it.
struct Probed {
    probe: Vec<i32>,
    adapted: Vec<f32>,
    plain: Vec<f32>,
}

/// The logits of base + adapter, and of the base alone.
fn base_and_adapted(
    job: &Merged,
    linears: Option<Scheme>,
    device: &Device,
) -> Result<Probed, VerifyError> {
    let weights = Weights::open(job.base)?;
    let (config, values) = job.adapter;
    let saved = |name: &str| config.saves(name.strip_suffix(".weight").unwrap_or(name));
    let keep = Keep {
        linears,
        in_f32: &saved,
        ..Keep::default()
    };
    let mut model = CausalLm::load_as(&weights, weights.config()?, device, keep)?;
    let probe = probe(&model);
    if let Some(tokens) = &config.trained_tokens {
        model.grow(tokens.vocabulary());
    }
    let plain = logits(&model, &probe);
    let modules = peft::fit_model(job.base, config, values, model.config())?;
    inject::inject(&mut model, config, &modules, &Init::Loaded(values));
    let adapted = logits(&model.frozen(), &probe);
    Ok(Probed {
        probe,
        adapted,
        plain,
    })
}

fn probe(model: &CausalLm) -> Vec<i32> {
    let (stream, vocabulary) = (Stream::new(0), model.config().vocab_size as u64);
    let length = PROBE.min(model.config().max_position_embeddings);
    (0..length as u64)
        .map(|i| (stream.bits(i) % vocabulary) as i32)
        .collect()
}

fn logits(model: &CausalLm, ids: &[i32]) -> Vec<f32> {
    let tokens = Tokens {
        ids,
        batch: 1,
        positions: None,
        segments: None,
    };
    let logits = model.logits(model.hidden(tokens, None, None));
    let n = logits.shape().num_elements();
    to_vec(logits.reshape([n]))
}

/// Mean over rows of `Σ p (ln p - ln q)`, p and q the softmax of the two.
fn divergence(p: &[f32], q: &[f32], vocabulary: usize) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let max = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x.into()));
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        row.iter().map(|&x| f64::from(x) - max - sum.ln()).collect()
    };
    let rows = p.chunks_exact(vocabulary).zip(q.chunks_exact(vocabulary));
    let total: f64 = rows
        .map(|(p, q)| {
            let (p, q) = (log_softmax(p), log_softmax(q));
            p.iter()
                .zip(&q)
                .map(|(p, q)| p.exp() * (p - q))
                .sum::<f64>()
        })
        .sum();
    total / (p.len() / vocabulary).max(1) as f64
}
