//! VeRA (arXiv 2310.11454): all layers share one random, frozen pair of factors, and each trains two
//! vectors: `y = W x + λ_b ⊙ (B (λ_d ⊙ (A x)))`.
//!
//! A module takes the leading columns of A and rows of B that fit it. Layout and random numbers are
//! those of PEFT 0.21 (`peft/tuners/vera`), so that a file without the projections can be completed.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::peft::LoraPair;
use crate::model::names::Adaptable;

/// What `adapter_config.json` says of VeRA alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VeraConfig {
    /// Seed of the projections.
    pub projection_prng_key: u64,
    /// Whether the file holds the projections; they are drawn from the key again where it does not.
    pub save_projection: bool,
    /// First value of λ_d.
    pub d_initial: f64,
}

impl VeraConfig {
    /// PEFT's defaults with a key.
    pub fn new(projection_prng_key: u64) -> Self {
        Self {
            projection_prng_key,
            save_projection: true,
            d_initial: 0.1,
        }
    }

    /// The keys that VeRA alone has, and those that LoRA calls otherwise.
    pub(super) fn keys(&self, dropout: f64) -> Map<String, Value> {
        let keys = [
            ("peft_type", json!("VERA")),
            ("d_initial", json!(self.d_initial)),
            ("init_weights", json!(true)),
            ("projection_prng_key", json!(self.projection_prng_key)),
            ("save_projection", json!(self.save_projection)),
            ("vera_dropout", json!(dropout)),
        ];
        keys.map(|(key, value)| (key.to_owned(), value))
            .into_iter()
            .collect()
    }
}

/// The keys of LoRA's configuration that VeRA's has too.
pub(super) const SHARED_KEYS: [&str; 13] = [
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
];

/// The vectors of one module.
#[derive(Debug, Clone, PartialEq)]
pub struct Lambdas {
    /// λ_d, `[R]`
    pub d: Vec<f32>,
    /// λ_b, `[out]`
    pub b: Vec<f32>,
}

/// What a VeRA adapter's file holds.
#[derive(Debug, Clone, PartialEq)]
pub struct VeraWeights {
    /// A `[R, in]` and B `[out, R]` for the widest layer; `None` where the file lacks them.
    pub shared: Option<LoraPair>,
    /// The vectors by module path.
    pub lambdas: BTreeMap<String, Lambdas>,
}

impl VeraWeights {
    /// The projections: the file's, or drawn from its key for the layers that have vectors.
    pub fn projections(&self, config: &VeraConfig, layers: &[Adaptable]) -> LoraPair {
        match &self.shared {
            Some(shared) => shared.clone(),
            None => {
                let rank = self.lambdas.values().next().map_or(0, |l| l.d.len());
                let adapted = layers.iter().filter(|l| self.lambdas.contains_key(&l.path));
                projections(config.projection_prng_key, rank, adapted)
            }
        }
    }

    /// The delta of a module as LoRA has it, with scaling 1.
    pub fn pair(lambdas: &Lambdas, shared: &LoraPair, input: usize) -> LoraPair {
        let (rank, out, width) = (lambdas.d.len(), lambdas.b.len(), shared.a_shape[1]);
        let a = (lambdas.d.iter().enumerate())
            .flat_map(|(k, d)| shared.a[k * width..][..input].iter().map(move |a| a * d))
            .collect();
        let b = (lambdas.b.iter().enumerate())
            .flat_map(|(o, l)| shared.b[o * rank..][..rank].iter().map(move |b| b * l))
            .collect();
        LoraPair {
            a,
            a_shape: [rank, input],
            b,
            b_shape: [out, rank],
            magnitude: None,
        }
    }
}

/// The shared factors for these layers: Kaiming uniform, A before B from one Mersenne Twister, bit
/// for bit as torch's generator on a CPU draws them.
pub fn projections<'a>(
    key: u64,
    rank: usize,
    layers: impl Iterator<Item = &'a Adaptable>,
) -> LoraPair {
    let widest = layers.fold([0, 0], |[out, input], layer| {
        [out.max(layer.out_features), input.max(layer.in_features)]
    });
    let [out, input] = widest;
    let mut random = MersenneTwister::new(key as u32);
    let mut draw = |count: usize, fan: usize| -> Vec<f32> {
        let bound = 3f64.sqrt() * (2f64.sqrt() / (fan as f64).sqrt());
        let (low, width) = (-bound as f32, bound as f32 - -bound as f32);
        let mut next = || (random.next() & 0xFF_FFFF) as f32 / 16_777_216.0;
        (0..count).map(|_| next().mul_add(width, low)).collect()
    };
    LoraPair {
        a: draw(rank * input, input),
        a_shape: [rank, input],
        b: draw(out * rank, rank),
        b_shape: [out, rank],
        magnitude: None,
    }
}

/// MT19937 (Matsumoto and Nishimura 1998, <https://doi.org/10.1145/272991.272995>).
struct MersenneTwister {
    state: [u32; Self::N],
    at: usize,
}

impl MersenneTwister {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [seed; Self::N];
        for i in 1..Self::N {
            let last = state[i - 1];
            state[i] = (last ^ (last >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        Self { state, at: Self::N }
    }

    fn next(&mut self) -> u32 {
        if self.at == Self::N {
            for i in 0..Self::N {
                let next = self.state[(i + 1) % Self::N];
                let y = (self.state[i] & 0x8000_0000) | (next & 0x7FFF_FFFF);
                let twisted = (y >> 1) ^ if y & 1 == 1 { 0x9908_B0DF } else { 0 };
                self.state[i] = self.state[(i + Self::M) % Self::N] ^ twisted;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C_5680;
        y ^= (y << 15) & 0xEFC6_0000;
        y ^ (y >> 18)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_twister_is_the_known_one() {
        // The C++ standard's check of `std::mt19937`.
        let mut random = MersenneTwister::new(5489);
        let ten_thousandth = (0..10_000).map(|_| random.next()).last();
        assert_eq!(ten_thousandth, Some(4_123_659_995));
    }
}
