//! Reads the rotary embedding out of Hugging Face's `config.json`, standardised as in transformers'
//! `modeling_rope_utils.py` (`convert_rope_params_to_dict`, `standardize_rope_params`).

use serde_json::{Map, Value};

use super::config::{ConfigError, ModelConfig, RopeConfig, RopeScaling};
use super::config_json::Fields;
use super::families::Family;

/// Rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).
pub(super) fn rope(
    root: &Fields,
    family: &Family,
    head_dim: usize,
    max_positions: usize,
) -> Result<RopeConfig, ConfigError> {
    let empty = Value::Object(Map::new());
    let (key, value) = ["rope_scaling", "rope_parameters"]
        .into_iter()
        .find_map(|key| root.get(key).map(|value| (key, value)))
        .unwrap_or(("rope_parameters", &empty));
    let fields = Fields::new(value, root.path, key)?;
    let theta = match fields.number("rope_theta")? {
        Some(theta) => theta,
        None => (root.number("rope_theta")?).unwrap_or(family.defaults.rope_theta),
    };
    let dim = rotary_dim(root, &fields, family, head_dim)?;
    let scaling = scaling(root, &fields, family, max_positions)?;
    Ok(RopeConfig {
        theta,
        dim,
        scaling,
    })
}

/// How many columns of a head rotate.
fn rotary_dim(
    root: &Fields,
    fields: &Fields,
    family: &Family,
    head_dim: usize,
) -> Result<usize, ConfigError> {
    let key = "partial_rotary_factor";
    let given = match fields.number(key)? {
        Some(share) => Some(share),
        None => root.number(key)?,
    };
    match (given, family.defaults.partial_rotary_factor) {
        (Some(share), None) if share != 1.0 => Err(fields.error(key, "1", &share.to_string())),
        (Some(share), _) | (None, Some(share)) => {
            if !(share > 0.0 && share <= 1.0) {
                return Err(fields.error(key, "more than 0, at most 1", &share.to_string()));
            }
            Ok((head_dim as f64 * share) as usize)
        }
        (None, None) => Ok(head_dim),
    }
}

/// Rope scaling as `fields` have it.
fn scaling(
    root: &Fields,
    fields: &Fields,
    family: &Family,
    max_positions: usize,
) -> Result<RopeScaling, ConfigError> {
    let kind = match fields.text("rope_type")? {
        Some(kind) => Some(kind),
        None => fields.text("type")?,
    };
    let original = || -> Result<usize, ConfigError> {
        let key = "original_max_position_embeddings";
        Ok(
            match (root.size(key)?, family.defaults.original_positions) {
                (Some(length), _) => length,
                (None, Some(length)) => length,
                (None, None) => fields.size(key)?.unwrap_or(max_positions),
            },
        )
    };
    Ok(match kind.unwrap_or("default") {
        "default" => RopeScaling::Default,
        // The names of LongRoPE in the first Phi 3 releases.
        "su" | "yarn" if family.defaults.original_positions.is_some() => {
            long(fields, original()?, max_positions)?
        }
        "linear" => RopeScaling::Linear {
            factor: fields.required("factor")?,
        },
        "dynamic" => RopeScaling::Dynamic {
            factor: fields.required("factor")?,
            original_max_position_embeddings: max_positions,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: fields.required("factor")?,
            low_freq_factor: fields.required("low_freq_factor")?,
            high_freq_factor: fields.required("high_freq_factor")?,
            original_max_position_embeddings: original()?,
        },
        "yarn" => yarn(fields, original()?, max_positions)?,
        "longrope" => long(fields, original()?, max_positions)?,
        other => {
            let supported = "one of default, linear, dynamic, llama3, yarn, longrope";
            return Err(fields.error("rope_type", supported, &format!("{other:?}")));
        }
    })
}

/// LongRoPE's parameters.
fn long(fields: &Fields, original: usize, max: usize) -> Result<RopeScaling, ConfigError> {
    let factors = |key: &str| -> Result<Vec<f64>, ConfigError> {
        let expected = "a list of numbers";
        let list = fields.read(key, expected, |value| {
            value.as_array()?.iter().map(Value::as_f64).collect()
        })?;
        list.ok_or_else(|| fields.error(key, expected, "nothing"))
    };
    let factor = match fields.number("factor")? {
        Some(factor) => factor,
        None => max as f64 / original as f64,
    };
    let derived = match factor <= 1.0 {
        true => 1.0,
        false => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    Ok(RopeScaling::Long {
        short_factor: factors("short_factor")?,
        long_factor: factors("long_factor")?,
        original_max_position_embeddings: original,
        attention_factor: fields.number("attention_factor")?.unwrap_or(derived),
    })
}

impl ModelConfig {
    /// Reads the rotary embeddings of families whose full and sliding layers have their own, and
    /// gives each layer its own: `ropes[0]` for full layers, `ropes[1]` for sliding ones.
    ///
    /// transformers 5 nests `rope_parameters` by kind of layer; in files of transformers 4,
    /// `rope_scaling` is about the full layers alone. `bases` are, for each kind, the key outside
    /// of these objects and the default.
    pub(super) fn two_ropes(
        &mut self,
        root: &Fields,
        sliding: &[bool],
        bases: [(&str, f64); 2],
    ) -> Result<(), ConfigError> {
        let empty = Value::Object(Map::new());
        let nested = match root.get("rope_parameters") {
            Some(value) => Fields::new(value, root.path, "rope_parameters")?,
            None => Fields::new(&empty, root.path, "rope_parameters")?,
        };
        let mut ropes = Vec::new();
        for ((kind, old), (key, base)) in [
            ("full_attention", "rope_scaling"),
            ("sliding_attention", ""),
        ]
        .into_iter()
        .zip(bases)
        {
            let inner = Fields::new(nested.get(kind).unwrap_or(&empty), root.path, kind)?;
            let fields = match root.get(old) {
                Some(value) => Fields::new(value, root.path, old)?,
                None => Fields::new(nested.get(kind).unwrap_or(&empty), root.path, kind)?,
            };
            let theta = match (fields.number("rope_theta")?, inner.number("rope_theta")?) {
                (Some(theta), _) | (None, Some(theta)) => theta,
                (None, None) => root.number(key)?.unwrap_or(base),
            };
            ropes.push(RopeConfig {
                theta,
                dim: rotary_dim(root, &fields, self.family, self.head_dim)?,
                scaling: scaling(
                    &Fields::new(&empty, root.path, "")?,
                    &fields,
                    self.family,
                    self.max_position_embeddings,
                )?,
            });
        }
        self.ropes = ropes;
        for (layer, sliding) in self.layers.iter_mut().zip(sliding) {
            layer.rope = Some(usize::from(*sliding));
        }
        Ok(())
    }
}

/// YaRN's parameters; zeros count as absent, as Python's `or` has it in transformers.
fn yarn(fields: &Fields, original: usize, max: usize) -> Result<RopeScaling, ConfigError> {
    let non_zero = |key: &str| -> Result<Option<f64>, ConfigError> {
        Ok(fields.number(key)?.filter(|&value| value != 0.0))
    };
    Ok(RopeScaling::Yarn {
        factor: match fields.number("factor")? {
            Some(factor) => factor,
            None => max as f64 / original as f64,
        },
        original_max_position_embeddings: original,
        attention_factor: fields.number("attention_factor")?,
        beta_fast: non_zero("beta_fast")?.unwrap_or(32.0),
        beta_slow: non_zero("beta_slow")?.unwrap_or(1.0),
        mscale: non_zero("mscale")?,
        mscale_all_dim: non_zero("mscale_all_dim")?,
        truncate: fields.flag("truncate")?.unwrap_or(true),
    })
}
