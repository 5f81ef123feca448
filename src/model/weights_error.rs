//! Why a base model's weights cannot be read.

use std::path::PathBuf;

use super::config::ConfigError;
use super::weights::Dtype;
use crate::quant::NotFinite;
use crate::quant::gguf::GgufError;

/// Most faults listed in one error.
const MAX_LISTED: usize = 20;

/// Why weights cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file cannot be read.
    #[error("{}: cannot read the weights: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A directory has no weights.
    #[error("{}: no weights: expected model.safetensors, model.safetensors.index.json or a .gguf file", path.display())]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },
    /// There are only pickled weights.
    #[error(
        "{}: pickled weights are never read, as they can run code; convert them on a machine you trust: \
         AutoModelForCausalLM.from_pretrained(dir).save_pretrained(out) writes safetensors", path.display()
    )]
    Pickle {
        /// The pickle.
        path: PathBuf,
    },
    /// A safetensors file or index is damaged.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A GGUF file is damaged or not supported.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Blocks are to be kept that there are not.
    #[error("{}: not a GGUF file, so there are no blocks to keep; name a .gguf file, or quantise the base with nf4, nf4-double or int8", path.display())]
    NotGguf {
        /// Model directory or file.
        path: PathBuf,
    },
    /// There is no such tensor.
    #[error("{}: no tensor `{name}`", path.display())]
    NoTensor {
        /// Model directory or file.
        path: PathBuf,
        /// Hugging Face name.
        name: String,
    },
    /// A tensor's element type is not supported.
    #[error("{}: tensor `{name}` is stored as {dtype}; supported: F32, F16, BF16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// Hugging Face name.
        name: String,
        /// How it is stored.
        dtype: Dtype,
    },
    /// A matrix cannot be quantised.
    #[error("{}: tensor `{name}` cannot be quantised: {source}", path.display())]
    NotFinite {
        /// Model directory or file.
        path: PathBuf,
        /// Name in transformers 5's modules.
        name: String,
        /// What is wrong with it.
        source: NotFinite,
    },
    /// The tensors are not those that the configuration calls for.
    #[error("{}: the weights do not fit the configuration:{}", path.display(), listed(faults))]
    Mismatch {
        /// Model directory or file.
        path: PathBuf,
        /// One line each: missing, extra, misshapen, of an unsupported type.
        faults: Vec<String>,
    },
}

/// The faults one a line, the first [`MAX_LISTED`] of them.
fn listed(faults: &[String]) -> String {
    let mut text = String::new();
    for fault in faults.iter().take(MAX_LISTED) {
        text.push_str("\n  ");
        text.push_str(fault);
    }
    if faults.len() > MAX_LISTED {
        text.push_str(&format!("\n  and {} more", faults.len() - MAX_LISTED));
    }
    text
}
