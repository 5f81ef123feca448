//! A Llama model inside a GGUF file: its configuration, and its rows back in Hugging Face's order.
//!
//! Keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; the permutation and the
//! frequency factors are those of llama.cpp's `convert_hf_to_gguf.py` (`LlamaModel`).

use serde_json::json;

use super::config::{ConfigError, ModelConfig, RopeScaling};
use super::families;
use crate::quant::gguf::GgufFile;

/// The tensor of frequency factors, which Llama 3 conversions carry.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Rows of q and k swap between these two orders within a head: `(half, pair)` in Hugging Face,
/// `(pair, half)` in GGUF.
const PERMUTED: [&str; 2] = ["self_attn.q_proj", "self_attn.k_proj"];

/// The configuration in the file's metadata and tensor list, values not yet checked against each other.
pub(super) fn config(file: &GgufFile) -> Result<ModelConfig, ConfigError> {
    let fields = Fields { file };
    let name = file.metadata.str("general.architecture").unwrap_or("?");
    let family = families::by_model_type(name)
        .filter(|family| family.model_type == "llama")
        .ok_or_else(|| ConfigError::Architecture {
            path: file.path().to_path_buf(),
            key: "general.architecture",
            found: format!("`{name}` in a GGUF file"),
            supported: "llama; other families from their safetensors".into(),
        })?;
    refuse_unsupported(&fields)?;
    let hidden_size = fields.required("llama.embedding_length")?;
    let num_attention_heads = fields.required("llama.attention.head_count")?;
    let head_dim = match fields.size("llama.attention.key_length")? {
        Some(width) => width,
        None => hidden_size.checked_div(num_attention_heads).unwrap_or(0),
    };
    for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        if let Some(width) = fields.size(key)?
            && width != head_dim
        {
            let expected = format!("the head width {head_dim}");
            return Err(fields.error(key, &expected, &width.to_string()));
        }
    }
    let max_position_embeddings = fields.required("llama.context_length")?;
    let mut config = ModelConfig::of_family(
        family,
        &json!({
            "vocab_size": vocab_size(&fields)?,
            "hidden_size": hidden_size,
            "intermediate_size": fields.required("llama.feed_forward_length")?,
            "num_hidden_layers": fields.required("llama.block_count")?,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": fields
                .size("llama.attention.head_count_kv")?
                .unwrap_or(num_attention_heads),
            "head_dim": head_dim,
            "max_position_embeddings": max_position_embeddings,
            "rms_norm_eps": fields.required_number("llama.attention.layer_norm_rms_epsilon")?,
            "attention_bias": file.tensors.contains_key("blk.0.attn_q.bias"),
            "mlp_bias": file.tensors.contains_key("blk.0.ffn_gate.bias"),
            "tie_word_embeddings": !file.tensors.contains_key("output.weight"),
            "rope_theta": fields.number("llama.rope.freq_base")?.unwrap_or(10_000.0),
            "bos_token_id": fields.token("tokenizer.ggml.bos_token_id"),
            "pad_token_id": fields.token("tokenizer.ggml.padding_token_id"),
            "eos_token_id": eos_token_ids(&fields),
        }),
        file.path(),
    )?;
    config.ropes[0].scaling = scaling(&fields, max_position_embeddings)?;
    Ok(config)
}

/// Refuses what would silently give other numbers than llama.cpp's.
fn refuse_unsupported(fields: &Fields) -> Result<(), ConfigError> {
    let unsupported = |what: &str, remedy| {
        Err(ConfigError::Unsupported {
            path: fields.file.path().to_path_buf(),
            what: what.to_string(),
            remedy,
        })
    };
    if fields.size("split.count")?.is_some_and(|count| count > 1) {
        return unsupported(
            "a GGUF model split over several files",
            "join them with llama-gguf-split --merge",
        );
    }
    if fields
        .size("llama.expert_count")?
        .is_some_and(|count| count > 0)
    {
        return unsupported(
            "a mixture of experts",
            "use a model with one feed-forward layer a block",
        );
    }
    Ok(())
}

/// Rows of the embedding, or tokens of the vocabulary where there is none.
fn vocab_size(fields: &Fields) -> Result<usize, ConfigError> {
    let embedding = fields.file.tensors.get("token_embd.weight");
    let tokens = fields.file.metadata.array("tokenizer.ggml.tokens");
    embedding
        .and_then(|tensor| tensor.shape.first().copied())
        .or_else(|| tokens.map(<[_]>::len))
        .ok_or_else(|| fields.error("token_embd.weight", "the embedding", "nothing"))
}

/// Every token at which llama.cpp ends a turn: end of sequence, of turn, of message.
fn eos_token_ids(fields: &Fields) -> Vec<u32> {
    let mut ids = Vec::new();
    for kind in ["eos", "eot", "eom"] {
        let id = fields.token(&format!("tokenizer.ggml.{kind}_token_id"));
        if let Some(id) = id.filter(|id| !ids.contains(id)) {
            ids.push(id);
        }
    }
    ids
}

/// Rope scaling: the factors' tensor where there is one, else `llama.rope.scaling.*`.
fn scaling(fields: &Fields, max_positions: usize) -> Result<RopeScaling, ConfigError> {
    if fields.file.tensors.contains_key(ROPE_FACTORS)
        && let Ok(factors) = fields.file.read_f32(ROPE_FACTORS)
    {
        return Ok(match factors.iter().all(|&factor| factor == 1.0) {
            true => RopeScaling::Default,
            false => RopeScaling::Factors(factors),
        });
    }
    let factor = match fields.number("llama.rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => fields.number("llama.rope.scale_linear")?,
    };
    let key = "llama.rope.scaling.type";
    let kind = match (fields.file.metadata.str(key), factor) {
        (Some(kind), _) => kind,
        (None, Some(_)) => "linear",
        (None, None) => "none",
    };
    // llama.cpp counts a factor of 0 as absent.
    let factor = factor.filter(|&factor| factor != 0.0).unwrap_or(1.0);
    match kind {
        "linear" if factor != 1.0 => Ok(RopeScaling::Linear { factor }),
        "none" | "linear" => Ok(RopeScaling::Default),
        "yarn" => {
            let number = |name: &str| fields.number(&format!("llama.rope.scaling.{name}"));
            let stretch = 1.0 + 0.1 * factor.max(1.0).ln();
            Ok(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: fields
                    .size("llama.rope.scaling.original_context_length")?
                    .filter(|&length| length != 0)
                    .unwrap_or(max_positions),
                attention_factor: number("attn_factor")?.map(|scale| scale * stretch),
                beta_fast: number("yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: number("yarn_beta_slow")?.unwrap_or(1.0),
                mscale: None,
                mscale_all_dim: None,
                truncate: true,
            })
        }
        other => Err(fields.error(key, "one of none, linear, yarn", &format!("{other:?}"))),
    }
}

/// The Llama 3 scaling that gives these frequency factors, `None` where there is none. The file
/// does not keep its parameters, so the published ones are tried.
pub(super) fn llama3_scaling(theta: f64, factors: &[f32]) -> Option<RopeScaling> {
    let (low, high) = (1.0, 4.0);
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    (9..=17).map(|power| 1usize << power).find_map(|original| {
        let context = original as f64;
        let fits = factors.iter().enumerate().all(|(pair, &found)| {
            let turns = theta.powf(pair as f64 / factors.len() as f64);
            let wavelength = 2.0 * std::f64::consts::PI * turns;
            let smooth = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - smooth) / factor + smooth);
            (f64::from(found) - expected).abs() <= 1e-4 * expected
        });
        fits.then_some(RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        })
    })
}

/// A tensor's values with its rows in Hugging Face's order; `name` is Hugging Face's.
pub(super) fn to_hf_rows(name: &str, values: Vec<f32>, config: &ModelConfig) -> Vec<f32> {
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    let [queries, keys] = PERMUTED;
    let heads = match module {
        _ if module.ends_with(queries) => config.num_attention_heads,
        _ if module.ends_with(keys) => config.num_key_value_heads,
        _ => return values,
    };
    let half = config.head_dim / 2;
    let rows = heads * config.head_dim;
    if rows == 0 || !values.len().is_multiple_of(rows) {
        // Misshapen: `weights::check` says so.
        return values;
    }
    // [heads, Dh/2, 2, D] → [heads, 2, Dh/2, D]
    let width = values.len() / rows;
    let mut ordered = Vec::with_capacity(values.len());
    for head in 0..heads {
        for part in 0..2 {
            for pair in 0..half {
                let row = (head * half + pair) * 2 + part;
                ordered.extend_from_slice(&values[row * width..][..width]);
            }
        }
    }
    ordered
}

/// The metadata read by type.
struct Fields<'a> {
    file: &'a GgufFile,
}

impl Fields<'_> {
    fn error(&self, key: &str, expected: &str, found: &str) -> ConfigError {
        ConfigError::Value {
            path: self.file.path().to_path_buf(),
            key: key.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    fn found(&self, key: &str) -> String {
        match self.file.metadata.0.get(key) {
            Some(value) => format!("{value:?}").chars().take(60).collect(),
            None => "nothing".into(),
        }
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        match (
            self.file.metadata.usize(key),
            self.file.metadata.0.contains_key(key),
        ) {
            (None, true) => Err(self.error(key, "a whole number", &self.found(key))),
            (size, _) => Ok(size),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match (
            self.file.metadata.f64(key),
            self.file.metadata.0.contains_key(key),
        ) {
            (None, true) => Err(self.error(key, "a number", &self.found(key))),
            (number, _) => Ok(number),
        }
    }

    fn required(&self, key: &str) -> Result<usize, ConfigError> {
        self.size(key)?
            .ok_or_else(|| self.error(key, "a whole number", "nothing"))
    }

    fn required_number(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?
            .ok_or_else(|| self.error(key, "a number", "nothing"))
    }

    fn token(&self, key: &str) -> Option<u32> {
        u32::try_from(self.file.metadata.usize(key)?).ok()
    }
}
