//! Writes a configuration as Hugging Face's `config.json`.

use std::path::Path;

use serde_json::{Value, json};

use super::config::{ConfigError, ModelConfig, RopeConfig, RopeScaling};

impl ModelConfig {
    /// The configuration of a Llama model from a GGUF file as `config.json`, with keys that transformers 4 and 5 both read.
    /// `dtype` is the weights' (`float32`, `float16`, `bfloat16`).
    ///
    /// # Errors
    /// When `path`, the GGUF file this configuration came from, has frequency factors that no
    /// `rope_scaling` expresses.
    pub fn to_hf_json(&self, dtype: &str, path: &Path) -> Result<Value, ConfigError> {
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        Ok(json!({
            "architectures": [self.family.class_name],
            "attention_bias": self.qkv_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "model_type": self.family.model_type,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.norm_eps,
            "rope_scaling": self.ropes[0].scaling_json(path)?,
            "rope_theta": self.ropes[0].theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        }))
    }
}

impl RopeConfig {
    /// The value of transformers' `rope_scaling`.
    fn scaling_json(&self, path: &Path) -> Result<Value, ConfigError> {
        Ok(match &self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Dynamic { factor, .. } => {
                json!({"rope_type": "dynamic", "factor": factor})
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            yarn @ RopeScaling::Yarn { .. } => yarn_json(yarn),
            RopeScaling::Long {
                short_factor,
                long_factor,
                original_max_position_embeddings,
                attention_factor,
            } => json!({
                "rope_type": "longrope",
                "short_factor": short_factor,
                "long_factor": long_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
                "attention_factor": attention_factor,
            }),
            RopeScaling::Factors(factors) => {
                let scaling = super::gguf::llama3_scaling(self.theta, factors).ok_or_else(|| {
                    ConfigError::Unsupported {
                        path: path.to_path_buf(),
                        what: "a config.json for the frequency factors in rope_freqs.weight".into(),
                        remedy: "they are not Llama 3's; start from the model's safetensors instead of its GGUF",
                    }
                })?;
                let rope = RopeConfig {
                    scaling,
                    ..self.clone()
                };
                return rope.scaling_json(path);
            }
        })
    }
}

/// YaRN's parameters, those at their defaults left out; `null` for any other scaling.
fn yarn_json(scaling: &RopeScaling) -> Value {
    let RopeScaling::Yarn {
        factor,
        original_max_position_embeddings,
        attention_factor,
        beta_fast,
        beta_slow,
        mscale,
        mscale_all_dim,
        truncate,
    } = scaling
    else {
        return Value::Null;
    };
    let mut yarn = json!({
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_max_position_embeddings,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
    });
    for (key, value) in [
        ("attention_factor", attention_factor),
        ("mscale", mscale),
        ("mscale_all_dim", mscale_all_dim),
    ] {
        if let Some(value) = value {
            yarn[key] = json!(value);
        }
    }
    if !truncate {
        yarn["truncate"] = json!(false);
    }
    yarn
}
