//! What the rest of lorafit relies on in a configuration: sizes in range, heads that divide,
//! numbers that are finite. Checked once, after reading.

use std::path::Path;

use super::config::{ConfigError, ModelConfig, RopeScaling};

/// Largest width, vocabulary or head count accepted, so that no product downstream overflows.
const MAX_SIZE: usize = 1 << 24;
/// Most blocks accepted.
const MAX_LAYERS: usize = 4096;
/// Longest context accepted.
const MAX_POSITIONS: usize = 1 << 30;

/// Reports the first value that cannot be.
pub(super) fn check(config: &ModelConfig, path: &Path) -> Result<(), ConfigError> {
    let check = Check { path };
    check.sizes(config)?;
    check.heads(config)?;
    for (key, value) in [
        ("rms_norm_eps", config.rms_norm_eps),
        ("initializer_range", config.initializer_range),
    ] {
        check.that((0.0..=1.0).contains(&value), key, "0 to 1", value)?;
    }
    check.positive("rope_theta", config.rope.theta)?;
    check.scaling(&config.rope.scaling, config.head_dim)
}

/// Where the values come from.
struct Check<'a> {
    path: &'a Path,
}

impl Check<'_> {
    fn that(
        &self,
        holds: bool,
        key: &str,
        expected: &str,
        found: impl ToString,
    ) -> Result<(), ConfigError> {
        match holds {
            true => Ok(()),
            false => Err(ConfigError::Value {
                path: self.path.to_path_buf(),
                key: key.to_string(),
                expected: expected.to_string(),
                found: found.to_string(),
            }),
        }
    }

    fn positive(&self, key: &str, value: f64) -> Result<(), ConfigError> {
        let holds = value.is_finite() && value > 0.0;
        self.that(holds, key, "a positive number", value)
    }

    fn sizes(&self, config: &ModelConfig) -> Result<(), ConfigError> {
        let heads_width = config.num_attention_heads.saturating_mul(config.head_dim);
        for (key, value, max) in [
            ("vocab_size", config.vocab_size, MAX_SIZE),
            ("hidden_size", config.hidden_size, MAX_SIZE),
            ("intermediate_size", config.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", config.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", config.num_attention_heads, MAX_SIZE),
            ("num_key_value_heads", config.num_key_value_heads, MAX_SIZE),
            ("head_dim", config.head_dim, MAX_SIZE),
            ("num_attention_heads × head_dim", heads_width, MAX_SIZE),
            (
                "max_position_embeddings",
                config.max_position_embeddings,
                MAX_POSITIONS,
            ),
        ] {
            let holds = (1..=max).contains(&value);
            self.that(holds, key, &format!("1 to {max}"), value)?;
        }
        Ok(())
    }

    fn heads(&self, config: &ModelConfig) -> Result<(), ConfigError> {
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let expected = format!("a divisor of num_attention_heads {heads}");
        let holds = heads.is_multiple_of(kv_heads);
        self.that(holds, "num_key_value_heads", &expected, kv_heads)?;
        let holds = config.head_dim.is_multiple_of(2);
        self.that(holds, "head_dim", "an even number", config.head_dim)
    }

    fn original(&self, length: usize) -> Result<(), ConfigError> {
        let key = "original_max_position_embeddings";
        let holds = (1..=MAX_POSITIONS).contains(&length);
        self.that(holds, key, &format!("1 to {MAX_POSITIONS}"), length)
    }

    fn scaling(&self, scaling: &RopeScaling, head_dim: usize) -> Result<(), ConfigError> {
        match scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => self.positive("factor", *factor),
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings,
            } => {
                self.positive("factor", *factor)?;
                self.original(*original_max_position_embeddings)
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                self.positive("factor", *factor)?;
                self.positive("low_freq_factor", *low_freq_factor)?;
                self.positive("high_freq_factor", *high_freq_factor)?;
                self.original(*original_max_position_embeddings)?;
                let expected = format!("more than low_freq_factor {low_freq_factor}");
                let holds = high_freq_factor > low_freq_factor;
                self.that(holds, "high_freq_factor", &expected, high_freq_factor)
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                ..
            } => {
                self.positive("factor", *factor)?;
                self.positive("beta_fast", *beta_fast)?;
                self.positive("beta_slow", *beta_slow)?;
                self.positive("attention_factor", attention_factor.unwrap_or(1.0))?;
                self.original(*original_max_position_embeddings)
            }
            RopeScaling::Factors(factors) => {
                let key = "rope_freqs.weight";
                let expected = format!("head_dim / 2 = {} numbers", head_dim / 2);
                self.that(factors.len() == head_dim / 2, key, &expected, factors.len())?;
                factors
                    .iter()
                    .try_for_each(|&factor| self.positive(key, f64::from(factor)))
            }
        }
    }
}
