//! Reads Hugging Face's `config.json`.
//!
//! Defaults are those of the family's class in transformers; `config_rope.rs` reads the rotary
//! embedding.

use std::path::Path;

use serde_json::{Map, Value};

use super::config::{ConfigError, LayerConfig, Mixer, ModelConfig, QkNorm};
use super::config_check;
use super::config_rope::rope;
use super::families::{self, FAMILIES, Family};
use crate::kernels::Activation;

/// The configuration in `text`, values not yet checked against each other.
pub(super) fn parse(text: &str, path: &Path) -> Result<ModelConfig, ConfigError> {
    let value: Value = serde_json::from_str(text).map_err(|source| ConfigError::Json {
        path: path.to_path_buf(),
        source,
    })?;
    let root = Fields::new(&value, path, "")?;
    let family = family(&root)?;
    refuse_unsupported(&root)?;
    of_family(&root, family)
}

fn of_family(root: &Fields, family: &'static Family) -> Result<ModelConfig, ConfigError> {
    let mut config = common(root, family)?;
    (family.configure)(root, &mut config)?;
    Ok(config)
}

/// What the keys that all families have say.
fn common(root: &Fields, family: &'static Family) -> Result<ModelConfig, ConfigError> {
    let d = &family.defaults;
    let size = |key, default| Ok::<usize, ConfigError>(root.size(key)?.unwrap_or(default));
    let hidden_size = size("hidden_size", d.hidden_size)?;
    let heads = size("num_attention_heads", d.num_attention_heads)?;
    let positions = size("max_position_embeddings", d.max_position_embeddings)?;
    let layers = size("num_hidden_layers", d.num_hidden_layers)?;
    let head_dim = match (root.size("head_dim")?, d.head_dim) {
        (Some(width), _) => width,
        (None, Some(width)) if !root.has("head_dim") => width,
        _ => default_head_dim(root, hidden_size, heads)?,
    };
    let act = root.text(d.act_key)?.unwrap_or(d.act);
    let hidden_act = Activation::from_hf(act).ok_or_else(|| {
        let expected = "an activation that lorafit has, such as silu or gelu_pytorch_tanh";
        root.error(d.act_key, expected, &format!("{act:?}"))
    })?;
    let layer = LayerConfig {
        mixer: Mixer::Attention,
        window: None,
        rope: Some(0),
        sparse: false,
    };
    Ok(ModelConfig {
        family,
        vocab_size: size("vocab_size", d.vocab_size)?,
        hidden_size,
        intermediate_size: size("intermediate_size", d.intermediate_size)?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: match root.has("num_key_value_heads") {
            true => size("num_key_value_heads", heads)?,
            false => d.num_key_value_heads.unwrap_or(heads),
        },
        head_dim,
        max_position_embeddings: positions,
        norm_eps: root.number(d.eps_key)?.unwrap_or(d.eps),
        hidden_act,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        attention_scale: (head_dim as f64).powf(-0.5),
        attention_soft_cap: None,
        qk_norm: QkNorm::None,
        ropes: vec![rope(root, family, head_dim, positions)?],
        layers: vec![layer; layers.min(config_check::MAX_LAYERS)],
        latent: None,
        linear: None,
        moe: None,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logit_scale: 1.0,
        logit_soft_cap: None,
        tie_word_embeddings: root
            .flag("tie_word_embeddings")?
            .unwrap_or(d.tie_word_embeddings),
        initializer_range: root
            .number("initializer_range")?
            .unwrap_or(d.initializer_range),
        bos_token_id: root
            .ids("bos_token_id", d.bos_token_id.as_slice())?
            .first()
            .copied(),
        pad_token_id: root
            .ids("pad_token_id", d.pad_token_id.as_slice())?
            .first()
            .copied(),
        eos_token_ids: root.ids("eos_token_id", d.eos_token_ids)?,
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
fn family(root: &Fields) -> Result<&'static Family, ConfigError> {
    let refuse = |key: &'static str, found: String| ConfigError::Architecture {
        path: root.path.to_path_buf(),
        key,
        found,
        supported: families::supported(),
    };
    let classes: Vec<&str> = match root.get("architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let family = match (root.text("model_type")?, classes.first()) {
        (Some(name), _) => families::by_model_type(name)
            .ok_or_else(|| refuse("model_type", format!("`{name}`")))?,
        (None, Some(class)) => (FAMILIES.iter())
            .find(|family| family.class_name == *class)
            .ok_or_else(|| refuse("architectures", format!("{classes:?}")))?,
        (None, None) => return Err(root.error("model_type", "the model's family", "nothing")),
    };
    if !classes.is_empty() && !classes.contains(&family.class_name) {
        return Err(refuse("architectures", format!("{classes:?}")));
    }
    Ok(family)
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
    if root.flag("is_causal")? == Some(false) {
        return unsupported(
            "`is_causal: false`".into(),
            "lorafit trains models that write text from left to right",
        );
    }
    Ok(())
}

impl ModelConfig {
    /// The configuration of a model of this family with the given keys of `config.json`.
    pub(super) fn of_family(
        family: &'static Family,
        keys: &Value,
        path: &Path,
    ) -> Result<Self, ConfigError> {
        of_family(&Fields::new(keys, path, "")?, family)
    }
}

/// A JSON object whose values are read by type; `null` counts as absent.
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// The file, for messages.
    pub(super) path: &'a Path,
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(
        value: &'a Value,
        path: &'a Path,
        prefix: &'a str,
    ) -> Result<Self, ConfigError> {
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

    pub(super) fn error(&self, key: &str, expected: &str, found: &str) -> ConfigError {
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

    /// Whether the key is there, be it `null`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn read<T>(
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
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.read(key, "a whole number", |value| match value.as_u64() {
            Some(n) => usize::try_from(n).ok(),
            None => value
                .as_f64()
                .filter(|x| x.fract() == 0.0 && (0.0..1e15).contains(x))
                .map(|x| x as usize),
        })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.read(key, "a number", Value::as_f64)
    }

    pub(super) fn required(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?
            .ok_or_else(|| self.error(key, "a number", "nothing"))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.read(key, "text", Value::as_str)
    }

    /// One token id or a list of them; `default` when the key is absent, none when it is `null`.
    fn ids(&self, key: &str, default: &[u32]) -> Result<Vec<u32>, ConfigError> {
        if !self.has(key) {
            return Ok(default.to_vec());
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
    use crate::model::config::RopeScaling;

    fn read(text: &str) -> Result<ModelConfig, String> {
        ModelConfig::from_json(text, Path::new("config.json")).map_err(|error| error.to_string())
    }

    #[test]
    fn absent_keys_have_the_defaults_of_llama_config() {
        let config = read(r#"{"model_type": "llama"}"#).unwrap();
        assert_eq!(config.hidden_size, 4096);
        assert_eq!(config.num_key_value_heads, 32);
        assert_eq!(config.head_dim, 128);
        assert_eq!(config.ropes[0].theta, 10_000.0);
        assert_eq!(config.norm_eps, 1e-6);
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
        assert_eq!(config.ropes[0].scaling, expected);
    }

    #[test]
    fn faults_name_the_key_and_what_would_do() {
        let cases = [
            (r#"{"model_type": "mamba"}"#, "supported: llama, mistral"),
            (
                r#"{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}"#,
                "LlamaForSequenceClassification",
            ),
            (
                r#"{"architectures": ["GPT2LMHeadModel"]}"#,
                "GPT2LMHeadModel",
            ),
            (r#"{"hidden_size": 8}"#, "`model_type`: expected"),
            (r#"{"model_type": "llama", "hidden_act": "glu"}"#, "silu"),
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
                "`rope_scaling.rope_type`: expected one of default, linear, dynamic, llama3, yarn, longrope",
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
