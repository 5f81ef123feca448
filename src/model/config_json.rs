//! Reads Hugging Face's `config.json`.
//!
//! Defaults are those of transformers' `LlamaConfig`; rope parameters are standardised as in its
//! `modeling_rope_utils.py` (`convert_rope_params_to_dict`, `standardize_rope_params`).

use std::path::Path;

use serde_json::{Map, Value};

use super::config::{Architecture, ConfigError, ModelConfig, RopeConfig, RopeScaling};

/// The configuration in `text`, values not yet checked against each other.
pub(super) fn parse(text: &str, path: &Path) -> Result<ModelConfig, ConfigError> {
    let value: Value = serde_json::from_str(text).map_err(|source| ConfigError::Json {
        path: path.to_path_buf(),
        source,
    })?;
    let root = Fields::new(&value, path, "")?;
    let architecture = architecture(&root)?;
    refuse_unsupported(&root)?;
    let hidden_size = root.size("hidden_size")?.unwrap_or(4096);
    let num_attention_heads = root.size("num_attention_heads")?.unwrap_or(32);
    let max_position_embeddings = root.size("max_position_embeddings")?.unwrap_or(2048);
    Ok(ModelConfig {
        architecture,
        vocab_size: root.size("vocab_size")?.unwrap_or(32000),
        hidden_size,
        intermediate_size: root.size("intermediate_size")?.unwrap_or(11008),
        num_hidden_layers: root.size("num_hidden_layers")?.unwrap_or(32),
        num_attention_heads,
        num_key_value_heads: root
            .size("num_key_value_heads")?
            .unwrap_or(num_attention_heads),
        head_dim: match root.size("head_dim")? {
            Some(width) => width,
            None => default_head_dim(&root, hidden_size, num_attention_heads)?,
        },
        max_position_embeddings,
        rms_norm_eps: root.number("rms_norm_eps")?.unwrap_or(1e-6),
        attention_bias: root.flag("attention_bias")?.unwrap_or(false),
        mlp_bias: root.flag("mlp_bias")?.unwrap_or(false),
        tie_word_embeddings: root.flag("tie_word_embeddings")?.unwrap_or(false),
        initializer_range: root.number("initializer_range")?.unwrap_or(0.02),
        rope: rope(&root, max_position_embeddings)?,
        bos_token_id: root.ids("bos_token_id", 1)?.first().copied(),
        eos_token_ids: root.ids("eos_token_id", 2)?,
    })
}

/// `hidden_size / num_attention_heads`, which must come out whole.
fn default_head_dim(root: &Fields, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
    if heads == 0 || !hidden.is_multiple_of(heads) {
        let expected = format!("a divisor of hidden_size {hidden}, as there is no head_dim");
        return Err(root.error("num_attention_heads", &expected, &heads.to_string()));
    }
    Ok(hidden / heads)
}

/// The family, from `model_type`, or from `architectures` where there is none.
fn architecture(root: &Fields) -> Result<Architecture, ConfigError> {
    let refuse = |key: &'static str, found: String| ConfigError::Architecture {
        path: root.path.to_path_buf(),
        key,
        found,
    };
    let classes: Vec<&str> = match root.get("architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let architecture = match (root.text("model_type")?, classes.first()) {
        (Some(name), _) => Architecture::from_model_type(name)
            .ok_or_else(|| refuse("model_type", format!("`{name}`")))?,
        (None, Some(_)) => Architecture::Llama,
        (None, None) => return Err(root.error("model_type", "the model's family", "nothing")),
    };
    if !classes.is_empty() && !classes.contains(&architecture.class_name()) {
        return Err(refuse("architectures", format!("{classes:?}")));
    }
    Ok(architecture)
}

/// Refuses what would silently give other numbers than transformers'.
fn refuse_unsupported(root: &Fields) -> Result<(), ConfigError> {
    let unsupported = |what: String, remedy| {
        Err(ConfigError::Unsupported {
            path: root.path.to_path_buf(),
            what,
            remedy,
        })
    };
    match root.text("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return unsupported(
                format!("`hidden_act` {other:?}"),
                "a Llama model has \"silu\"",
            );
        }
    }
    if let Some(quantisation) = root.get("quantization_config") {
        let method = quantisation.get("quant_method").and_then(Value::as_str);
        return unsupported(
            format!(
                "a base whose weights are stored with `quantization_config` {:?}",
                method.unwrap_or("?")
            ),
            "use the model's original f32, f16 or bf16 weights, or a GGUF file",
        );
    }
    Ok(())
}

/// Rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).
fn rope(root: &Fields, max_positions: usize) -> Result<RopeConfig, ConfigError> {
    let empty = Value::Object(Map::new());
    let (key, value) = ["rope_scaling", "rope_parameters"]
        .into_iter()
        .find_map(|key| root.get(key).map(|value| (key, value)))
        .unwrap_or(("rope_parameters", &empty));
    let fields = Fields::new(value, root.path, key)?;
    for source in [&fields, root] {
        if let Some(share) = source.number("partial_rotary_factor")?
            && share != 1.0
        {
            return Err(source.error("partial_rotary_factor", "1", &share.to_string()));
        }
    }
    let theta = match fields.number("rope_theta")? {
        Some(theta) => theta,
        None => root.number("rope_theta")?.unwrap_or(10_000.0),
    };
    let kind = match fields.text("rope_type")? {
        Some(kind) => Some(kind),
        None => fields.text("type")?,
    };
    let original = || -> Result<usize, ConfigError> {
        let key = "original_max_position_embeddings";
        Ok(match root.size(key)? {
            Some(length) => length,
            None => fields.size(key)?.unwrap_or(max_positions),
        })
    };
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::Default,
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
        "yarn" => yarn(&fields, original()?, max_positions)?,
        other => {
            let supported = "one of default, linear, dynamic, llama3, yarn";
            return Err(fields.error("rope_type", supported, &format!("{other:?}")));
        }
    };
    Ok(RopeConfig { theta, scaling })
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

/// A JSON object whose values are read by type; `null` counts as absent.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: &'a Path,
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    fn new(value: &'a Value, path: &'a Path, prefix: &'a str) -> Result<Self, ConfigError> {
        match value {
            Value::Object(object) => Ok(Self {
                object,
                path,
                prefix,
            }),
            other => Err(ConfigError::Value {
                path: path.to_path_buf(),
                key: prefix.to_string(),
                expected: "an object".into(),
                found: shown(other),
            }),
        }
    }

    fn error(&self, key: &str, expected: &str, found: &str) -> ConfigError {
        ConfigError::Value {
            path: self.path.to_path_buf(),
            key: match self.prefix {
                "" => key.to_string(),
                prefix => format!("{prefix}.{key}"),
            },
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.error(key, expected, &shown(value))),
        }
    }

    /// A size; `32.0` counts, as some converters write it.
    fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.read(key, "a whole number", |value| match value.as_u64() {
            Some(n) => usize::try_from(n).ok(),
            None => value
                .as_f64()
                .filter(|x| x.fract() == 0.0 && (0.0..1e15).contains(x))
                .map(|x| x as usize),
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.read(key, "a number", Value::as_f64)
    }

    fn required(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?
            .ok_or_else(|| self.error(key, "a number", "nothing"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.read(key, "text", Value::as_str)
    }

    /// One token id or a list of them; `default` when the key is absent, none when it is `null`.
    fn ids(&self, key: &str, default: u32) -> Result<Vec<u32>, ConfigError> {
        if !self.object.contains_key(key) {
            return Ok(vec![default]);
        }
        let id = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.read(key, "a token id or a list of them", |value| match value {
            Value::Array(values) => values.iter().map(id).collect(),
            // Old conversions write -1 for "none".
            Value::Number(n) if n.as_i64() == Some(-1) => Some(Vec::new()),
            one => id(one).map(|one| vec![one]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}

/// A value for a message, cut where it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ModelConfig, String> {
        ModelConfig::from_json(text, Path::new("config.json")).map_err(|error| error.to_string())
    }

    #[test]
    fn absent_keys_have_the_defaults_of_llama_config() {
        let config = read(r#"{"model_type": "llama"}"#).unwrap();
        assert_eq!(config.hidden_size, 4096);
        assert_eq!(config.num_key_value_heads, 32);
        assert_eq!(config.head_dim, 128);
        assert_eq!(config.rope.theta, 10_000.0);
        assert_eq!(config.rms_norm_eps, 1e-6);
        assert_eq!(config.bos_token_id, Some(1));
        assert_eq!(config.eos_token_ids, [2]);
    }

    #[test]
    fn yarn_falls_back_as_transformers_does() {
        let config = read(
            r#"{"model_type": "llama", "max_position_embeddings": 128, "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "yarn", "factor": null, "beta_fast": 0, "mscale": 0.7}}"#,
        )
        .unwrap();
        let expected = RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32,
            attention_factor: None,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(0.7),
            mscale_all_dim: None,
            truncate: true,
        };
        assert_eq!(config.rope.scaling, expected);
    }

    #[test]
    fn faults_name_the_key_and_what_would_do() {
        let cases = [
            (r#"{"model_type": "mamba"}"#, "llama (LlamaForCausalLM)"),
            (
                r#"{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}"#,
                "LlamaForSequenceClassification",
            ),
            (
                r#"{"architectures": ["GPT2LMHeadModel"]}"#,
                "GPT2LMHeadModel",
            ),
            (r#"{"hidden_size": 8}"#, "`model_type`: expected"),
            (r#"{"model_type": "llama", "hidden_act": "gelu"}"#, "silu"),
            (
                r#"{"model_type": "llama", "hidden_size": "64"}"#,
                "`hidden_size`: expected a whole number",
            ),
            (
                r#"{"model_type": "llama", "hidden_size": -64}"#,
                "`hidden_size`",
            ),
            (
                r#"{"model_type": "llama", "hidden_size": 100}"#,
                "num_attention_heads",
            ),
            (
                r#"{"model_type": "llama", "num_key_value_heads": 5}"#,
                "a divisor of num_attention_heads 32",
            ),
            (
                r#"{"model_type": "llama", "num_key_value_heads": 0}"#,
                "`num_key_value_heads`: expected 1 to",
            ),
            (
                r#"{"model_type": "llama", "num_attention_heads": 0}"#,
                "`num_attention_heads`",
            ),
            (
                r#"{"model_type": "llama", "head_dim": 15}"#,
                "an even number",
            ),
            (
                r#"{"model_type": "llama", "vocab_size": 18446744073709551615}"#,
                "`vocab_size`",
            ),
            (
                r#"{"model_type": "llama", "head_dim": 16000000}"#,
                "`num_attention_heads × head_dim`",
            ),
            (
                r#"{"model_type": "llama", "rope_theta": 0}"#,
                "`rope_theta`: expected a positive number",
            ),
            (
                r#"{"model_type": "llama", "rope_scaling": {"type": "su"}}"#,
                "`rope_scaling.rope_type`: expected one of default, linear, dynamic, llama3, yarn",
            ),
            (
                r#"{"model_type": "llama", "rope_parameters": {"rope_type": "linear"}}"#,
                "`rope_parameters.factor`: expected a number, found nothing",
            ),
            (
                r#"{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}"#,
                "gptq",
            ),
            (
                r#"{"model_type": "llama", "partial_rotary_factor": 0.5}"#,
                "partial_rotary_factor",
            ),
            (r#"[1]"#, "an object"),
            (r#"{"model_type": "#, "not valid JSON"),
        ];
        for (text, expected) in cases {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
