//! What a finished run writes: a PEFT adapter, or with `adapter.method: full` a whole model.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use serde_json::Value;

use super::prepare::Prepared;
use crate::adapter::inject;
use crate::export::model::{DEFAULT_SHARD_SIZE, SaveDtype, write_model};
use crate::export::peft::{ModelCard, WriteAdapterError, write_adapter};
use crate::export::sidecar::{copy_notices, directory, read_config};
use crate::export::write::{PartialDir, WriteError};
use crate::model::CausalLm;
use crate::model::config::ConfigError;
use crate::model::gguf::config_json;
use crate::model::pieces::pieces;
use crate::model::weights::{Dtype, Weights};
use crate::quant::gguf::GgufFile;
use crate::recipe::resolve;

/// Why a result could not be written.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] WriteAdapterError),
    /// The model.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The tokenizer.
    #[error("cannot write the tokenizer: {0}")]
    Tokenizer(Box<dyn Error + Send + Sync>),
    /// The base's configuration cannot be expressed.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Writes the trained weights of a run into `dir`, which appears whole or not at all.
///
/// # Errors
/// The disk is full or cannot be written.
pub fn write(
    run: &Prepared,
    model: &mut CausalLm,
    metrics: Vec<(String, String)>,
    dir: &Path,
) -> Result<(), FinishError> {
    match &run.adapter {
        Some(choice) => {
            let mut adapter = inject::extract(model);
            adapter.base = run.weights.as_ref().map(Weights::fingerprint);
            let card = ModelCard {
                recipe_yaml: resolve::to_yaml(&run.plan),
                metrics,
            };
            let save_tokenizer = |dir: &Path| match run.tokenizer.save(dir) {
                Ok(_) => Ok(()),
                Err(error) => Err(error.into()),
            };
            Ok(write_adapter(
                dir,
                &choice.config.as_written(),
                &adapter,
                save_tokenizer,
                &card,
            )?)
        }
        None => write_whole_model(run, model, dir),
    }
}

fn write_whole_model(run: &Prepared, model: &mut CausalLm, dir: &Path) -> Result<(), FinishError> {
    let mut values = BTreeMap::new();
    let mut tensors = Vec::new();
    model.visit(&mut |name, parameter| {
        for piece in pieces(&run.config, name, &parameter.shape()) {
            tensors.push((piece.name.clone(), piece.shape.clone()));
            values.insert(piece.name.clone(), (parameter.flat(), piece));
        }
    });
    let config = base_config(run)?;
    let dtype = stored_dtype(run, &config);
    let partial = PartialDir::create(dir)?;
    write_model(
        partial.path(),
        &config,
        &tensors,
        dtype,
        DEFAULT_SHARD_SIZE,
        |name| {
            let stored = values.get(name).cloned();
            let stored = stored.map(|(values, piece)| piece.take(values));
            Ok::<_, WriteError>(stored.unwrap_or_default())
        },
    )?;
    // What lies beside a GGUF file need not be the model's.
    if gguf(run).is_none() {
        copy_notices(directory(&run.base), partial.path())?;
    }
    let saved = run.tokenizer.save(partial.path());
    saved.map_err(|error| FinishError::Tokenizer(error.into()))?;
    Ok(partial.publish_replacing()?)
}

/// The base's `config.json` as it is, or made from GGUF metadata.
fn base_config(run: &Prepared) -> Result<Value, FinishError> {
    match gguf(run) {
        Some(file) => Ok(config_json(file, "bfloat16")?),
        None => Ok(read_config(directory(&run.base))?),
    }
}

/// The base, if it is a GGUF file.
fn gguf(run: &Prepared) -> Option<&GgufFile> {
    run.weights.as_ref().and_then(Weights::gguf)
}

/// The number format of the base: of its weights, else what its configuration says.
fn stored_dtype(run: &Prepared, config: &Value) -> SaveDtype {
    if let Some(weights) = &run.weights {
        let first = weights.names().next().and_then(|name| weights.dtype(name));
        return match first {
            Some(Dtype::F32) => SaveDtype::F32,
            Some(Dtype::F16) => SaveDtype::F16,
            _ => SaveDtype::Bf16,
        };
    }
    let named = ["dtype", "torch_dtype"]
        .into_iter()
        .find_map(|key| config.get(key)?.as_str());
    match named {
        Some("bfloat16") => SaveDtype::Bf16,
        Some("float16") => SaveDtype::F16,
        _ => SaveDtype::F32,
    }
}
