//! Rotary frequencies and their stretching for long contexts, as in transformers'
//! `modeling_rope_utils.py`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::f64::consts::{PI, TAU};

use burn::tensor::{Device, Tensor, TensorData};

/// Rotary position embedding (arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How many columns of a head rotate; an even number.
    pub dim: usize,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Rope scaling, as in transformers' `modeling_rope_utils.py`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Frequencies divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// NTK-aware scaling that depends on the length of the batch.
    Dynamic {
        /// Stretch.
        factor: f64,
        /// Length up to which nothing changes.
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1's scaling by wavelength.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Below this many turns over the original context a frequency is low.
        low_freq_factor: f64,
        /// Above this many turns a frequency is left alone.
        high_freq_factor: f64,
        /// Original context length.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Stretch.
        factor: f64,
        /// Original context length.
        original_max_position_embeddings: usize,
        /// Scale of cos and sin; derived from `factor` and the mscales when `None`.
        attention_factor: Option<f64>,
        /// Ramp start in turns.
        beta_fast: f64,
        /// Ramp end in turns.
        beta_slow: f64,
        /// DeepSeek's mscale.
        mscale: Option<f64>,
        /// DeepSeek's mscale_all_dim.
        mscale_all_dim: Option<f64>,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753): frequencies divided one by one, by one set of factors up to
    /// the original context and by another beyond it.
    Long {
        /// Up to the original context, `[dim / 2]`.
        short_factor: Vec<f64>,
        /// Beyond it, `[dim / 2]`.
        long_factor: Vec<f64>,
        /// Original context length.
        original_max_position_embeddings: usize,
        /// Scale of cos and sin.
        attention_factor: f64,
    },
    /// Frequencies divided one by one (GGUF's `rope_freqs.weight`). `[dim / 2]`
    Factors(Vec<f32>),
}

/// Frequencies of a model's rotary embedding.
#[derive(Debug, Clone)]
pub struct Rope {
    config: RopeConfig,
}

/// Frequencies for one length, and the factor of cos and sin.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Radians per position, `[dim / 2]`.
    pub inverse: Vec<f64>,
    /// Factor of cos and sin ("attention factor").
    pub attention_factor: f64,
}

impl Rope {
    /// Of a configuration.
    pub fn new(config: RopeConfig) -> Self {
        Self { config }
    }

    /// cos and sin of each row's position, `[N, dim / 2]` each.
    ///
    /// Dynamic scaling and LongRoPE depend on the largest position of the whole batch, as in transformers.
    pub fn tables(&self, positions: &[usize], device: &Device) -> (Tensor<2>, Tensor<2>) {
        let length = positions.iter().max().map_or(0, |p| p + 1);
        let frequencies = self.frequencies(length);
        let half = self.config.dim / 2;
        let n = positions.len() * half;
        let (mut cos, mut sin) = (Vec::with_capacity(n), Vec::with_capacity(n));
        // Packed rows come back to the same positions: each is computed once, then copied.
        let mut computed = HashMap::new();
        for &position in positions {
            match computed.entry(position) {
                Entry::Occupied(row) => {
                    let at: usize = *row.get();
                    cos.extend_from_within(at..at + half);
                    sin.extend_from_within(at..at + half);
                }
                Entry::Vacant(row) => {
                    row.insert(cos.len());
                    for inverse in &frequencies.inverse {
                        // The angle is rounded to f32 first, as transformers computes it in f32.
                        let angle = f64::from(position as f32 * *inverse as f32);
                        let factor = frequencies.attention_factor as f32;
                        cos.push(angle.cos() as f32 * factor);
                        sin.push(angle.sin() as f32 * factor);
                    }
                }
            }
        }
        let table = |values: Vec<f32>| {
            Tensor::from_data(TensorData::new(values, [positions.len(), half]), device)
        };
        (table(cos), table(sin))
    }

    /// The frequencies for sequences of `length` tokens.
    pub fn frequencies(&self, length: usize) -> Frequencies {
        let dim = self.config.dim;
        let plain = plain_frequencies(self.config.theta, dim);
        let unscaled = |inverse| Frequencies {
            inverse,
            attention_factor: 1.0,
        };
        match &self.config.scaling {
            RopeScaling::Default => unscaled(plain),
            RopeScaling::Linear { factor } => unscaled(plain.iter().map(|f| f / factor).collect()),
            RopeScaling::Factors(factors) => unscaled(
                plain
                    .iter()
                    .zip(factors)
                    .map(|(f, factor)| f / f64::from(*factor))
                    .collect(),
            ),
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings: original,
            } => {
                let length = length.max(*original) as f64;
                let stretch = factor * length / *original as f64 - (factor - 1.0);
                let exponent = dim as f64 / (dim as f64 - 2.0);
                let theta = self.config.theta * stretch.powf(exponent);
                unscaled(plain_frequencies(theta, dim))
            }
            RopeScaling::Long {
                short_factor,
                long_factor,
                original_max_position_embeddings: original,
                attention_factor,
            } => {
                let factors = match length > *original {
                    true => long_factor,
                    false => short_factor,
                };
                Frequencies {
                    inverse: plain.iter().zip(factors).map(|(f, by)| f / by).collect(),
                    attention_factor: *attention_factor,
                }
            }
            RopeScaling::Llama3 { .. } => unscaled(llama3(&self.config.scaling, plain)),
            RopeScaling::Yarn { .. } => yarn(&self.config, dim, plain),
        }
    }
}

/// `θ^(-2i / dim)` for i in `0 .. dim / 2`.
fn plain_frequencies(theta: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2)
        .map(|i| theta.powf(-(2.0 * i as f64) / dim as f64))
        .collect()
}

/// Llama 3.1: long wavelengths are stretched, short ones kept, those between blended.
fn llama3(scaling: &RopeScaling, plain: Vec<f64>) -> Vec<f64> {
    let &RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    } = scaling
    else {
        return plain;
    };
    plain
        .into_iter()
        .map(|f| {
            let turns = original as f64 * f / TAU;
            if turns < low {
                f / factor
            } else if turns > high {
                f
            } else {
                let smooth = (turns - low) / (high - low);
                (1.0 - smooth) * f / factor + smooth * f
            }
        })
        .collect()
}

/// How much YaRN sharpens attention for contexts stretched by `factor` (`get_mscale`).
pub(crate) fn yarn_scale(factor: f64, mscale: f64) -> f64 {
    match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * mscale * factor.ln() + 1.0,
    }
}

/// YaRN (arXiv 2309.00071): interpolates low frequencies, keeps high ones, with a linear ramp.
fn yarn(config: &RopeConfig, dim: usize, plain: Vec<f64>) -> Frequencies {
    let &RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor,
        beta_fast,
        beta_slow,
        mscale,
        mscale_all_dim,
        truncate,
    } = &config.scaling
    else {
        return Frequencies {
            inverse: plain,
            attention_factor: 1.0,
        };
    };
    let scale_of = |mscale: f64| yarn_scale(factor, mscale);
    let attention_factor = attention_factor.unwrap_or(match (mscale, mscale_all_dim) {
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale_of(m) / scale_of(all),
        _ => scale_of(1.0),
    });
    // The dimension whose frequency makes `turns` rotations over the original context.
    let dimension = |turns: f64| {
        dim as f64 * (original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * config.theta.ln())
    };
    let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001; // transformers' guard against a ramp of width 0
    }
    let inverse = plain
        .into_iter()
        .enumerate()
        .map(|(i, f)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / factor * ramp + f * (1.0 - ramp)
        })
        .collect();
    Frequencies {
        inverse,
        attention_factor,
    }
}
