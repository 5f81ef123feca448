//! Rope scaling of a GGUF file, as `config.json` has it.
//!
//! The converter of llama.cpp turns Llama 3's scaling and LongRoPE into tensors of factors; the
//! others stand in the metadata under `rope.scaling`.

use serde_json::{Value, json};

use super::config::{ConfigError, RopeConfig, RopeScaling};
use super::gguf_fields::Fields;

/// Frequency factors, which Llama 3 conversions carry.
const FACTORS: &str = "rope_freqs.weight";
/// Those of LongRoPE, up to the original context and beyond it.
const LONG_ROPE: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

/// The tensors that are part of the configuration.
pub(super) const TENSORS: [&str; 3] = [FACTORS, LONG_ROPE[0], LONG_ROPE[1]];

/// The factors that frequencies are divided by, where the file has them and they change anything.
pub(super) fn factors(fields: &Fields) -> Option<RopeScaling> {
    let factors = read(fields, FACTORS)?;
    (factors.iter())
        .any(|&factor| factor != 1.0)
        .then_some(RopeScaling::Factors(factors))
}

fn read(fields: &Fields, name: &str) -> Option<Vec<f32>> {
    match fields.file.tensors.contains_key(name) {
        true => fields.file.read_f32(name).ok(),
        false => None,
    }
}

/// The value of transformers' `rope_scaling`; `null` for none and where [`factors`] say it all.
/// `prefix` is the architecture's.
pub(super) fn scaling(fields: &Fields, prefix: &str) -> Result<Value, ConfigError> {
    if fields.file.tensors.contains_key(FACTORS) {
        return Ok(Value::Null);
    }
    let rope = |name: &str| format!("{prefix}.rope.scaling.{name}");
    if let [Some(short), Some(long)] = LONG_ROPE.map(|name| read(fields, name)) {
        // transformers 4 takes these three keys and no other. The file's scale of cos and sin is
        // the one that follows from both context lengths.
        return Ok(json!({
            "type": "longrope",
            "short_factor": decimals(&short),
            "long_factor": decimals(&long),
        }));
    }
    let factor = match fields.number(&rope("factor"))? {
        Some(factor) => Some(factor),
        None => fields.number(&format!("{prefix}.rope.scale_linear"))?,
    };
    let key = rope("type");
    let kind = match (fields.file.metadata.str(&key), factor) {
        (Some(kind), _) => kind,
        (None, Some(_)) => "linear",
        (None, None) => "none",
    };
    // llama.cpp counts a factor of 0 as absent.
    let factor = factor.filter(|&factor| factor != 0.0).unwrap_or(1.0);
    match kind {
        "linear" if factor != 1.0 => Ok(json!({"rope_type": "linear", "factor": factor})),
        "none" | "linear" => Ok(Value::Null),
        "yarn" => yarn(fields, prefix, factor),
        other => Err(fields.error(&key, "one of none, linear, yarn", &format!("{other:?}"))),
    }
}

/// YaRN's parameters.
fn yarn(fields: &Fields, prefix: &str, factor: f64) -> Result<Value, ConfigError> {
    let key = |name: &str| format!("{prefix}.rope.scaling.{name}");
    let original = fields.size(&key("original_context_length"))?;
    let original = match original.filter(|&length| length != 0) {
        Some(length) => length,
        None => fields.required(&format!("{prefix}.context_length"))?,
    };
    let mut yarn = json!({
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fields.number(&key("yarn_beta_fast"))?.unwrap_or(32.0),
        "beta_slow": fields.number(&key("yarn_beta_slow"))?.unwrap_or(1.0),
    });
    // The converter keeps transformers' `attention_factor` under the first; the second, which older
    // files have, multiplies what follows from the factor.
    if let Some(scale) = fields.number(&key("yarn_attn_factor"))? {
        yarn["attention_factor"] = json!(scale);
    } else if let Some(scale) = fields.number(&key("attn_factor"))? {
        yarn["attention_factor"] = json!(scale * (1.0 + 0.1 * factor.max(1.0).ln()));
    }
    Ok(yarn)
}

/// The f64s that read as these f32s do: 1.1 was 1.1 before it was converted.
fn decimals(values: &[f32]) -> Vec<f64> {
    let decimal = |value: &f32| value.to_string().parse().unwrap_or(f64::from(*value));
    values.iter().map(decimal).collect()
}

/// The `rope_scaling` that gives a file's frequency factors.
///
/// # Errors
/// When no `rope_scaling` does.
pub(super) fn of_factors(
    fields: &Fields,
    rope: &RopeConfig,
    factors: &[f32],
) -> Result<Value, ConfigError> {
    llama3(rope.theta, factors).ok_or_else(|| ConfigError::Unsupported {
        path: fields.file.path().to_path_buf(),
        what: "a config.json for the frequency factors in rope_freqs.weight".into(),
        remedy: "they are not Llama 3's; start from the model's safetensors instead of its GGUF",
    })
}

/// The Llama 3 scaling that gives these frequency factors, `None` where there is none. The file
/// does not keep its parameters, so the published ones are tried.
fn llama3(theta: f64, factors: &[f32]) -> Option<Value> {
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
        fits.then(|| {
            json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            })
        })
    })
}
