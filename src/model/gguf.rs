//! A model inside a GGUF file: its configuration as `config.json` would have it, and its tensors
//! under Hugging Face's names, with their values.
//!
//! Keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; what became of names and
//! values is what llama.cpp's `convert_hf_to_gguf.py` does, undone.

use serde_json::{Map, Value, json};

use super::config::{ConfigError, ModelConfig, RopeScaling};
use super::families::{Family, by_model_type};
use super::gguf_arch::{self, Architecture, Kind};
use super::gguf_fields::Fields;
use super::{config_check, gguf_rope, names};
use crate::nn::NormKind;
use crate::quant::gguf::{GgufFile, Value as Metadatum};
use crate::quant::stored::RowOrder;

/// Rows of q and k swap between these two orders within a head: `(half, pair)` in Hugging Face,
/// `(pair, half)` in GGUF.
const PERMUTED: [&str; 2] = ["self_attn.q_proj", "self_attn.k_proj"];

/// The configuration in the file's metadata and tensor list, values not yet checked against each other.
pub(super) fn config(file: &GgufFile) -> Result<ModelConfig, ConfigError> {
    let fields = Fields { file };
    let architecture = gguf_arch::of(&fields)?;
    let keys = Value::Object(keys(&fields, architecture)?);
    let family = by_model_type(architecture.model_type).expect("a family for each architecture");
    let mut config = ModelConfig::of_family(family, &keys, file.path())?;
    if let Some(factors) = gguf_rope::factors(&fields) {
        config.ropes[0].scaling = factors;
    }
    Ok(config)
}

/// The `config.json` of the model in a GGUF file, with keys that transformers 4 and 5 both read.
/// `dtype` is the weights' (`float32`, `float16`, `bfloat16`).
///
/// # Errors
/// When the file is no model, or has frequency factors that no `rope_scaling` expresses.
pub fn config_json(file: &GgufFile, dtype: &str) -> Result<Value, ConfigError> {
    let fields = Fields { file };
    let config = ModelConfig::from_gguf(file)?;
    let mut keys = keys(&fields, gguf_arch::of(&fields)?)?;
    if let RopeScaling::Factors(factors) = &config.ropes[0].scaling {
        let scaling = gguf_rope::of_factors(&fields, &config.ropes[0], factors)?;
        keys.insert("rope_scaling".into(), scaling);
    }
    for (key, value) in [
        ("architectures", json!([config.family.class_name])),
        ("model_type", json!(config.family.model_type)),
        ("torch_dtype", json!(dtype)),
        ("use_cache", json!(true)),
    ] {
        keys.insert(key.into(), value);
    }
    Ok(Value::Object(keys))
}

/// The file's metadata as keys of `config.json`.
fn keys(fields: &Fields, architecture: &Architecture) -> Result<Map<String, Value>, ConfigError> {
    let name = architecture.name;
    let mut keys = Map::new();
    for (gguf, hf, kind) in gguf_arch::COMMON.iter().chain(architecture.keys) {
        let key = format!("{name}.{gguf}");
        let value = match kind {
            Kind::Size => Some(json!(fields.required(&key)?)),
            Kind::Number => Some(json!(fields.required_number(&key)?)),
            Kind::SizeIfAny => fields.size(&key)?.map(|size| json!(size)),
            Kind::NumberIfAny => fields.number(&key)?.map(|number| json!(number)),
            Kind::Window => (fields.size(&key)?).map(|width| match width {
                0 => Value::Null,
                width => json!(width),
            }),
        };
        if let Some(value) = value {
            keys.insert(hf.to_string(), value);
        }
    }
    for (key, value) in architecture.fixed {
        keys.insert(key.to_string(), json!(value));
    }
    for (key, tensor) in architecture.biases {
        let there = fields.file.tensors.contains_key(*tensor);
        keys.insert(key.to_string(), json!(there));
    }
    heads(fields, architecture, &mut keys)?;
    layers(fields, architecture, &mut keys)?;
    let theta = fields.number(&format!("{name}.rope.freq_base"))?;
    for (key, value) in [
        ("vocab_size", json!(vocab_size(fields)?)),
        ("rope_theta", json!(theta.unwrap_or(10_000.0))),
        ("rope_scaling", gguf_rope::scaling(fields, name)?),
        (
            "tie_word_embeddings",
            json!(!fields.file.tensors.contains_key("output.weight")),
        ),
        (
            "bos_token_id",
            json!(fields.token("tokenizer.ggml.bos_token_id")),
        ),
        (
            "pad_token_id",
            json!(fields.token("tokenizer.ggml.padding_token_id")),
        ),
        ("eos_token_id", eos_token_id(fields)),
        (
            "pad_token_id",
            json!(fields.token("tokenizer.ggml.padding_token_id")),
        ),
    ] {
        keys.insert(key.into(), value);
    }
    Ok(keys)
}

/// Widths of the heads, and what scores are divided by.
fn heads(
    fields: &Fields,
    architecture: &Architecture,
    keys: &mut Map<String, Value>,
) -> Result<(), ConfigError> {
    let name = architecture.name;
    let heads = fields.required(&format!("{name}.attention.head_count"))?;
    let hidden = fields.required(&format!("{name}.embedding_length"))?;
    let kv = fields.size(&format!("{name}.attention.head_count_kv"))?;
    let quotient = hidden.checked_div(heads).unwrap_or(0);
    let key = format!("{name}.attention.key_length");
    let head_dim = fields.size(&key)?.unwrap_or(quotient);
    keys.insert("num_key_value_heads".into(), json!(kv.unwrap_or(heads)));
    keys.insert("head_dim".into(), json!(head_dim));
    let rotary = format!("{name}.rope.dimension_count");
    for key in [format!("{name}.attention.value_length"), rotary.clone()] {
        match fields.size(&key)? {
            Some(width) if key == rotary && architecture.partial_rotary && width < head_dim => {
                let share = rotary_share(width, head_dim);
                keys.insert("partial_rotary_factor".into(), json!(share));
            }
            Some(width) if width != head_dim => {
                let expected = format!("the head width {head_dim}");
                return Err(fields.error(&key, &expected, &width.to_string()));
            }
            _ => {}
        }
    }
    if let Some(wide) = architecture.wide_scores {
        // The file does not say; llama.cpp knows the one model by its layers.
        let layers = fields.required(&format!("{name}.block_count"))?;
        let scalar = if layers == wide { quotient } else { head_dim };
        keys.insert("query_pre_attn_scalar".into(), json!(scalar));
    }
    Ok(())
}

/// The share of a head that rotates, such that `head_dim · share`, cut to a whole number as
/// transformers does, is `width`.
fn rotary_share(width: usize, head_dim: usize) -> f64 {
    let share = width as f64 / head_dim as f64;
    match head_dim as f64 * share < width as f64 {
        true => share.next_up(),
        false => share,
    }
}

/// `layer_types` of architectures in which some layers slide: all but the last of so many, or those
/// that the file lists; none where there is no window.
fn layers(
    fields: &Fields,
    architecture: &Architecture,
    keys: &mut Map<String, Value>,
) -> Result<(), ConfigError> {
    let Some(pattern) = architecture.pattern else {
        return Ok(());
    };
    let count = fields.required(&format!("{}.block_count", architecture.name))?;
    if count > config_check::MAX_LAYERS {
        // The check of the configuration says so.
        return Ok(());
    }
    let key = format!("{}.attention.sliding_window_pattern", architecture.name);
    let listed = fields.file.metadata.array(&key).map(|list| {
        let slides = |value: &Metadatum| matches!(value, Metadatum::Bool(true));
        list.iter().map(slides).collect::<Vec<bool>>()
    });
    let pattern = match listed {
        Some(_) => pattern,
        None => fields.size(&key)?.unwrap_or(pattern),
    };
    let window = keys.get("sliding_window");
    let windows = window.map_or(architecture.always_slides, |width| !width.is_null());
    let types: Vec<&str> = (0..count)
        .map(|layer| match &listed {
            Some(slides) => slides.get(layer).copied().unwrap_or(false),
            None => pattern == 0 || layer % pattern + 1 < pattern,
        })
        .map(|slides| match slides && windows {
            true => "sliding_attention",
            false => "full_attention",
        })
        .collect();
    keys.insert("layer_types".into(), json!(types));
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
fn eos_token_id(fields: &Fields) -> Value {
    let mut ids = Vec::new();
    for kind in ["eos", "eot", "eom"] {
        let id = fields.token(&format!("tokenizer.ggml.{kind}_token_id"));
        if let Some(id) = id.filter(|id| !ids.contains(id)) {
            ids.push(id);
        }
    }
    match ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    }
}

/// Where a tensor of Hugging Face's lies in a GGUF file.
pub(super) struct Stored {
    /// The tensor that it is, or part of.
    pub(super) name: String,
    /// Its own shape.
    pub(super) shape: Vec<usize>,
    /// Which of how many equal parts it is.
    pub(super) part: (usize, usize),
}

/// The file's tensors under Hugging Face's names; one that has none keeps its own, and
/// [`check`](super::weights::check) says that there should be no such tensor.
pub(super) fn tensors(file: &GgufFile, family: &Family) -> Vec<(String, Stored)> {
    let mut tensors = Vec::new();
    for (name, tensor) in &file.tensors {
        if gguf_rope::TENSORS.contains(&name.as_str()) {
            continue;
        }
        let stack = match tensor.shape.as_slice() {
            [stack, _, _] => Some(*stack),
            _ => None,
        };
        let mut found = names::gguf_to_hf(family, name, stack);
        let shape = part_shape(&tensor.shape, found.len()).unwrap_or_else(|| {
            found = vec![name.clone()];
            tensor.shape.clone()
        });
        let parts = found.len();
        tensors.extend(found.into_iter().enumerate().map(|(part, hf)| {
            let stored = Stored {
                name: name.clone(),
                shape: shape.clone(),
                part: (part, parts),
            };
            (hf, stored)
        }));
    }
    tensors
}

/// The shape of one of the equal parts of a tensor: of a matrix itself, or of the matrices that are
/// stacked in it. `None` where it does not divide.
fn part_shape(shape: &[usize], parts: usize) -> Option<Vec<usize>> {
    match shape {
        _ if parts == 0 => None,
        &[stack, rows, columns] => {
            let rows = stack * rows;
            (rows.is_multiple_of(parts)).then(|| vec![rows / parts, columns])
        }
        _ => (parts == 1).then(|| shape.to_vec()),
    }
}

/// A tensor's values as Hugging Face has them; `name` is Hugging Face's.
pub(super) fn to_hf_values(name: &str, mut values: Vec<f32>, config: &ModelConfig) -> Vec<f32> {
    let norms = config.family.norm;
    if norms == NormKind::RmsPlusOne && name.ends_with("norm.weight") {
        // GGUF holds the factor itself.
        values.iter_mut().for_each(|value| *value -= 1.0);
    }
    match row_order(name, config) {
        RowOrder::AsStored => values,
        order => to_hf_rows(values, order, rows(name, config)),
    }
}

/// Where the file has the rows of a tensor of Hugging Face's.
pub(super) fn row_order(name: &str, config: &ModelConfig) -> RowOrder {
    let head_dim = config.head_dim;
    match gguf_arch::permutes(config.family) && rows(name, config) > 0 {
        true => RowOrder::Interleaved { head_dim },
        false => RowOrder::AsStored,
    }
}

/// Rows of q and k; 0 for all else.
fn rows(name: &str, config: &ModelConfig) -> usize {
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    let [queries, keys] = PERMUTED;
    let heads = match module {
        _ if module.ends_with(queries) => config.num_attention_heads,
        _ if module.ends_with(keys) => config.num_key_value_heads,
        _ => 0,
    };
    heads * config.head_dim
}

/// The values of q and k with their rows in Hugging Face's order.
fn to_hf_rows(values: Vec<f32>, order: RowOrder, rows: usize) -> Vec<f32> {
    if !values.len().is_multiple_of(rows) {
        // Misshapen: `weights::check` says so.
        return values;
    }
    // [heads, Dh/2, 2, D] → [heads, 2, Dh/2, D]
    let width = values.len() / rows;
    let mut ordered = Vec::with_capacity(values.len());
    for row in 0..rows {
        ordered.extend_from_slice(&values[order.stored(row) * width..][..width]);
    }
    ordered
}
