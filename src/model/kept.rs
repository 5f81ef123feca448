//! How many bytes a model's tensors take as they are kept, from configuration and file headers alone.

use super::config::ModelConfig;
use super::pieces::pieces;
use super::storage::Keep;
use super::weights::Dtype;
use super::{causal_lm, names};
use crate::quant::Scheme;

/// A tensor of a model as it will be kept.
#[derive(Debug, Clone, PartialEq)]
pub struct KeptTensor {
    /// Its name in transformers 5's modules.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How it is kept.
    pub form: Form,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Bytes that loading it needs beside those, for as long as it takes.
    pub loading: u64,
}

/// How a tensor is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As numbers of this type.
    Dense(Dtype),
    /// Quantised.
    Quantised(Scheme),
    /// In the blocks of a GGUF file, which is mapped and takes no memory.
    Blocks,
}

impl Form {
    /// Bytes of an element of a dense tensor; those of f32 where it is quantised.
    fn width(self) -> u64 {
        match self {
            Self::Dense(Dtype::F16 | Dtype::BF16) => 2,
            _ => size_of::<f32>() as u64,
        }
    }
}

impl KeptTensor {
    /// How many numbers it holds.
    pub fn len(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Every tensor of a model in the order in which it is loaded; `stored` says in which type a tensor of
/// the files is.
pub fn kept_tensors(
    config: &ModelConfig,
    keep: Keep,
    stored: impl Fn(&str) -> Option<Dtype>,
) -> Vec<KeptTensor> {
    let outline = causal_lm::outline(config);
    let quantised: Vec<String> = (outline.linears.iter())
        .filter(|_| keep.linears.is_some() || keep.gguf_blocks)
        .map(|linear| format!("{}.weight", linear.path))
        .collect();
    let quantised: std::collections::BTreeSet<String> = quantised.into_iter().collect();
    let form = |name: &str, shape: &[usize]| {
        if (keep.in_f32)(name) || !outline.matrices.contains(name) {
            return Form::Dense(Dtype::F32);
        }
        match keep.linears.filter(|_| quantised.contains(name)) {
            Some(scheme) => Form::Quantised(scheme),
            None => {
                let pieces = pieces(config, name, shape);
                let mut types = pieces.iter().map(|piece| stored(&piece.name));
                let in_blocks = types.clone().all(|dtype| dtype == Some(Dtype::Quantised));
                match in_blocks && keep.gguf_blocks && quantised.contains(name) {
                    true => Form::Blocks,
                    false => Form::Dense(keep.storage.of(&mut types)),
                }
            }
        }
    };
    (outline.tensors.iter())
        .map(|(name, shape)| {
            let form = form(name, shape);
            kept(config, (name, shape), form, &stored)
        })
        .collect()
}

fn kept(
    config: &ModelConfig,
    (name, shape): (&str, &[usize]),
    form: Form,
    stored: &impl Fn(&str) -> Option<Dtype>,
) -> KeptTensor {
    let n: u64 = shape.iter().map(|n| *n as u64).product();
    let pieces = pieces(config, name, shape);
    let from_blocks = (pieces.iter()).any(|piece| stored(&piece.name) == Some(Dtype::Quantised));
    // Tensors that are put together are read piece by piece beside the whole.
    let piece = match &pieces[..] {
        [_] => 0,
        many => (many.iter())
            .map(|piece| piece.shape.iter().map(|n| *n as u64).product::<u64>())
            .max()
            .unwrap_or(0),
    };
    let in_f32 = n * size_of::<f32>() as u64;
    let (bytes, loading) = match (form, shape) {
        (Form::Quantised(scheme), &[rows, cols]) => {
            (scheme.bytes([rows, cols]) as u64, in_f32 + piece * 4)
        }
        (Form::Blocks, _) => (0, 0),
        (form, _) => {
            let width = form.width();
            // GGUF's blocks become f32 first.
            let between = if from_blocks && width < 4 { in_f32 } else { 0 };
            (n * width, between + piece * width)
        }
    };
    KeptTensor {
        name: name.to_string(),
        shape: shape.to_vec(),
        form,
        bytes,
        loading,
    }
}

/// The name of a linear layer's matrix.
pub fn weight_of(path: &str) -> String {
    match names::parameter_of(path) {
        // Experts' parameters are named without it.
        Some(parameter) if parameter == path => path.to_string(),
        _ => format!("{path}.weight"),
    }
}
