//! What the rest of lorafit relies on in a configuration: sizes in range, heads that divide,
//! numbers that are finite. Checked once, after reading.

use std::path::Path;

use super::config::{ConfigError, ModelConfig, RopeScaling};
use crate::nn::RouterRule;

/// Largest width, vocabulary or head count accepted, so that no product downstream overflows.
const MAX_SIZE: usize = 1 << 24;
/// Most blocks accepted.
pub(super) const MAX_LAYERS: usize = 4096;
/// Longest context accepted.
const MAX_POSITIONS: usize = 1 << 30;

/// Reports the first value that cannot be.
pub(super) fn check(config: &ModelConfig, path: &Path) -> Result<(), ConfigError> {
    let check = Check { path };
    check.sizes(config)?;
    check.heads(config)?;
    for (key, value) in [
        (config.family.defaults.eps_key, config.norm_eps),
        ("initializer_range", config.initializer_range),
    ] {
        check.that((0.0..=1.0).contains(&value), key, "0 to 1", value)?;
    }
    for rope in &config.ropes {
        check.positive("rope_theta", rope.theta)?;
        let even = rope.dim.is_multiple_of(2) && (1..=config.head_dim).contains(&rope.dim);
        check.that(
            even,
            "partial_rotary_factor",
            "an even number of columns",
            rope.dim,
        )?;
        check.scaling(&rope.scaling, rope.dim)?;
    }
    check.numbers(config)?;
    check.layers(config)?;
    check.experts(config)?;
    check.linear(config)
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
        let holds = config.head_dim.is_multiple_of(2) || config.latent.is_some();
        self.that(holds, "head_dim", "an even number", config.head_dim)
    }

    fn factors(&self, key: &str, found: usize, dim: usize) -> Result<(), ConfigError> {
        let expected = format!("{} numbers, one for two columns that rotate", dim / 2);
        self.that(found == dim / 2, key, &expected, found)
    }

    /// Factors that would make every number 0 or none.
    fn numbers(&self, config: &ModelConfig) -> Result<(), ConfigError> {
        self.positive("attention_multiplier", config.attention_scale)?;
        self.positive("embedding_multiplier", config.embedding_multiplier)?;
        self.positive("residual_multiplier", config.residual_multiplier)?;
        self.positive("logit_scale", config.logit_scale)?;
        for (key, cap) in [
            ("attn_logit_softcapping", config.attention_soft_cap),
            ("final_logit_softcapping", config.logit_soft_cap),
        ] {
            self.positive(key, cap.unwrap_or(1.0))?;
        }
        Ok(())
    }

    fn layers(&self, config: &ModelConfig) -> Result<(), ConfigError> {
        for layer in &config.layers {
            let holds = layer.window != Some(0);
            self.that(holds, "sliding_window", "1 or more, or null", 0)?;
        }
        if let Some(latent) = &config.latent {
            for (key, value) in [
                ("q_lora_rank", latent.q_lora_rank.unwrap_or(1)),
                ("kv_lora_rank", latent.kv_lora_rank),
                ("qk_rope_head_dim", latent.qk_rope_head_dim),
                ("v_head_dim", latent.v_head_dim),
            ] {
                self.size(key, value)?;
            }
        }
        Ok(())
    }

    fn experts(&self, config: &ModelConfig) -> Result<(), ConfigError> {
        let (Some(moe), true) = (&config.moe, config.layers.iter().any(|layer| layer.sparse))
        else {
            return Ok(());
        };
        self.size("num_experts", moe.num_experts)?;
        self.size("moe_intermediate_size", moe.intermediate_size)?;
        let (key, chosen) = ("num_experts_per_tok", moe.num_experts_per_tok);
        let expected = format!("1 to {} experts", moe.num_experts);
        let mut most = moe.num_experts;
        if let RouterRule::Sigmoid { groups, kept, .. } = moe.rule {
            let expected = format!("a divisor of the number of experts {}", moe.num_experts);
            let holds = groups > 0 && moe.num_experts.is_multiple_of(groups);
            self.that(holds, "n_group", &expected, groups)?;
            let expected = format!("1 to n_group {groups}");
            self.that((1..=groups).contains(&kept), "topk_group", &expected, kept)?;
            most = moe.num_experts / groups * kept;
        }
        self.that((1..=most).contains(&chosen), key, &expected, chosen)
    }

    fn linear(&self, config: &ModelConfig) -> Result<(), ConfigError> {
        let Some(linear) = &config.linear else {
            return Ok(());
        };
        for (key, value) in [
            ("linear_num_key_heads", linear.num_key_heads),
            ("linear_num_value_heads", linear.num_value_heads),
            ("linear_key_head_dim", linear.key_head_dim),
            ("linear_value_head_dim", linear.value_head_dim),
            ("linear_conv_kernel_dim", linear.conv_kernel_dim),
        ] {
            self.size(key, value)?;
        }
        let expected = format!(
            "a multiple of linear_num_key_heads {}",
            linear.num_key_heads
        );
        let holds = linear.num_value_heads.is_multiple_of(linear.num_key_heads);
        let key = "linear_num_value_heads";
        self.that(holds, key, &expected, linear.num_value_heads)
    }

    fn size(&self, key: &str, value: usize) -> Result<(), ConfigError> {
        let holds = (1..=MAX_SIZE).contains(&value);
        self.that(holds, key, &format!("1 to {MAX_SIZE}"), value)
    }

    fn original(&self, length: usize) -> Result<(), ConfigError> {
        let key = "original_max_position_embeddings";
        let holds = (1..=MAX_POSITIONS).contains(&length);
        self.that(holds, key, &format!("1 to {MAX_POSITIONS}"), length)
    }

    fn scaling(&self, scaling: &RopeScaling, dim: usize) -> Result<(), ConfigError> {
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
            RopeScaling::Long {
                short_factor,
                long_factor,
                original_max_position_embeddings,
                attention_factor,
            } => {
                self.positive("attention_factor", *attention_factor)?;
                self.original(*original_max_position_embeddings)?;
                for (key, factors) in [("short_factor", short_factor), ("long_factor", long_factor)]
                {
                    self.factors(key, factors.len(), dim)?;
                    factors
                        .iter()
                        .try_for_each(|&factor| self.positive(key, factor))?;
                }
                Ok(())
            }
            RopeScaling::Factors(factors) => {
                let key = "rope_freqs.weight";
                self.factors(key, factors.len(), dim)?;
                factors
                    .iter()
                    .try_for_each(|&factor| self.positive(key, f64::from(factor)))
            }
        }
    }
}
