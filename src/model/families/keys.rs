//! Keys of `config.json` that several families share.

use serde_json::Value;

use super::Fields;
use crate::model::config::{ConfigError, ModelConfig};

/// What `layer_types` says of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayerType {
    Full,
    Sliding,
    Linear,
}

impl LayerType {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "full_attention" => Some(Self::Full),
            "sliding_attention" => Some(Self::Sliding),
            "linear_attention" => Some(Self::Linear),
            _ => None,
        }
    }
}

/// `layer_types`, or what `default` says of each layer where there is none.
pub(super) fn layer_types(
    fields: &Fields,
    config: &ModelConfig,
    default: impl Fn(usize) -> LayerType,
) -> Result<Vec<LayerType>, ConfigError> {
    let (key, n) = ("layer_types", config.num_hidden_layers);
    let expected = format!("a list of {n} kinds of layers");
    let given = fields.read(key, &expected, |value| match value {
        Value::Array(items) if items.len() == n => items
            .iter()
            .map(|item| LayerType::parse(item.as_str()?))
            .collect(),
        _ => None,
    })?;
    Ok(given.unwrap_or_else(|| (0..n).map(default).collect()))
}

/// A list with a number for each layer.
pub(super) fn by_layer(
    fields: &Fields,
    key: &str,
    config: &ModelConfig,
) -> Result<Option<Vec<u64>>, ConfigError> {
    let n = config.num_hidden_layers;
    fields.read(key, &format!("a list of {n} numbers"), |value| {
        let items = value.as_array().filter(|items| items.len() == n)?;
        items.iter().map(Value::as_u64).collect()
    })
}

/// A list of layer numbers; empty where the key is missing.
pub(super) fn layer_list(fields: &Fields, key: &str) -> Result<Vec<usize>, ConfigError> {
    let layers = fields.read(key, "a list of layer numbers", |value| {
        let number = |item: &Value| item.as_u64().and_then(|n| usize::try_from(n).ok());
        value.as_array()?.iter().map(number).collect()
    })?;
    Ok(layers.unwrap_or_default())
}

/// `sliding_window`: `default` where the key is missing, none where it is `null`.
pub(super) fn window(
    fields: &Fields,
    default: Option<usize>,
) -> Result<Option<usize>, ConfigError> {
    match fields.has("sliding_window") {
        true => fields.size("sliding_window"),
        false => Ok(default),
    }
}

/// Which layers slide.
pub(super) fn sliding(types: &[LayerType]) -> Vec<bool> {
    types
        .iter()
        .map(|kind| *kind == LayerType::Sliding)
        .collect()
}

/// Gives the window to the layers that slide.
pub(super) fn slide(config: &mut ModelConfig, types: &[LayerType], window: Option<usize>) {
    for (layer, kind) in config.layers.iter_mut().zip(types) {
        layer.window = window.filter(|_| *kind == LayerType::Sliding);
    }
}

/// Gives the window to all layers.
pub(super) fn slide_all(config: &mut ModelConfig, window: Option<usize>) {
    for layer in &mut config.layers {
        layer.window = window;
    }
}

/// Which layers are sparse: every `decoder_sparse_step`th that `mlp_only_layers` does not name.
pub(super) fn sparse_steps(fields: &Fields, config: &mut ModelConfig) -> Result<(), ConfigError> {
    let step = fields.size("decoder_sparse_step")?.unwrap_or(1);
    let dense = layer_list(fields, "mlp_only_layers")?;
    for (i, layer) in config.layers.iter_mut().enumerate() {
        layer.sparse = !dense.contains(&i) && step > 0 && (i + 1).is_multiple_of(step);
    }
    Ok(())
}
