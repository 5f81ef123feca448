//! Reads a base's tensors with what adapters change in them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use safetensors::Dtype as Stored;
use serde_json::Value;

use super::merged::{MergeError, MergeJob, MergeReport, MergedModule};
use super::model::{SaveDtype, Written};
use super::safetensors::TensorInfo;
use crate::adapter::experts;
use crate::adapter::merge::{DeltaSize, merge_into, merge_into_embedding, replace};
use crate::adapter::peft::{AdapterConfig, AdapterWeights, LoraPair, Saved, fit_model};
use crate::adapter::residual::TakenOut;
use crate::adapter::target::ModuleAdapter;
use crate::model::config::ModelConfig;
use crate::model::names;
use crate::model::pieces::pieces;
use crate::model::storage::quantised_tensors;
use crate::model::weights::{Dtype, Weights};
use crate::quant::QuantMatrix;

/// What an adapter does to a tensor of the base.
#[derive(Debug)]
enum Change {
    /// Adds to the weight of this module, with this scaling. A tensor of several matrices has a delta
    /// for each.
    Delta(String, Vec<LoraPair>, f64),
    /// Puts another in place of the tensor of this name.
    Whole(String, Saved),
}

/// The output head and the embedding.
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Whether an adapter changes the embedding or the output head of a model in which they are one
/// matrix, so that they are two from then on.
fn unties(adapter: &AdapterConfig, trained: &AdapterWeights, config: &ModelConfig) -> bool {
    let changes = |module| adapter.saves(module) || trained.pairs.contains_key(module);
    config.tie_word_embeddings && [names::HEAD, names::EMBEDDING].into_iter().any(changes)
}

/// Reads the base's tensors and adds the deltas.
pub(super) struct Merger<'a> {
    job: &'a MergeJob<'a>,
    weights: &'a Weights,
    /// Names in the base's files of what is merged into as it was quantised.
    quantised: BTreeSet<String>,
    /// By name in the base's files.
    changes: BTreeMap<String, Change>,
    /// Whether the output head, which is the embedding in the base, is written as its own.
    pub(super) untied: bool,
    /// What the base lost before the adapter trained.
    taken_out: Option<TakenOut>,
    modules: Vec<MergedModule>,
    unchanged: Vec<String>,
    total: DeltaSize,
}

impl<'a> Merger<'a> {
    pub(super) fn new(
        job: &'a MergeJob<'a>,
        weights: &'a Weights,
        config: &ModelConfig,
        adapter: &AdapterConfig,
        trained: AdapterWeights,
    ) -> Result<Self, MergeError> {
        let fitted = fit_model(job.adapter, adapter, &trained, config)?;
        let mut trained = trained.with_plain_pairs(adapter, &names::adaptable(config));
        let adds = |pair: &LoraPair| {
            let delta = pair.a.iter().any(|x| *x != 0.0) && pair.b.iter().any(|x| *x != 0.0);
            delta || pair.magnitude.is_some()
        };
        // Before anything is written, for this is the common case: an adapter never trained.
        let deltas =
            |m: &ModuleAdapter| m.scaling != 0.0 && trained.pairs.get(&m.module).is_some_and(adds);
        if !fitted.iter().any(deltas) && trained.saved.is_empty() {
            let cause =
                "all its deltas are zero (B is zero until the first training step); train it first";
            return Err(MergeError::EqualsBase {
                adapter: job.adapter.into(),
                cause,
            });
        }
        let shapes: BTreeMap<_, _> = names::tensors(config).into_iter().collect();
        let file_name = |name: &str| names::in_files(config.family, name);
        let untied = unties(adapter, &trained, config);
        let mut changes = BTreeMap::new();
        for ModuleAdapter {
            module, scaling, ..
        } in fitted
        {
            let Some(pair) = trained.pairs.remove(&module) else {
                continue;
            };
            let Some(&[experts, out, input]) = shapes.get(&module).map(Vec::as_slice) else {
                let name = file_name(&format!("{module}.weight"));
                changes.insert(name, Change::Delta(module, vec![pair], scaling));
                continue;
            };
            let shape = [experts, out, input];
            for piece in pieces(config, &module, &shape) {
                let parts = experts::deltas_of(&piece, &pair, shape);
                let module = piece.name.trim_end_matches(".weight").to_owned();
                changes.insert(piece.name, Change::Delta(module, parts, scaling));
            }
        }
        for (name, saved) in trained.saved {
            changes.insert(file_name(&name), Change::Whole(name, saved));
        }
        let (modules, unchanged) = (Vec::new(), Vec::new());
        Ok(Self {
            job,
            weights,
            untied,
            taken_out: adapter.taken_out(),
            quantised: match job.quantised {
                Some(_) => quantised_tensors(config),
                None => BTreeSet::new(),
            },
            changes,
            modules,
            unchanged,
            total: DeltaSize::default(),
        })
    }

    /// The tensors to write, in the base's order; a head that was the embedding comes last.
    pub(super) fn tensors(&self) -> Result<Vec<TensorInfo>, MergeError> {
        let info = |name: &str, like: &str| {
            Ok(TensorInfo {
                name: name.to_owned(),
                dtype: self.target(like)?,
                shape: self.weights.shape(like).unwrap_or_default().to_vec(),
            })
        };
        let head = self.untied.then(|| info(HEAD, EMBEDDING));
        (self.weights.names())
            .filter(|name| !self.untied || *name != HEAD)
            .map(|name| info(name, name))
            .chain(head)
            .collect()
    }

    /// The type a tensor is written in. Integers and the like keep theirs, whatever is asked for.
    fn target(&self, name: &str) -> Result<Stored, MergeError> {
        let dtype = self.weights.dtype(name).unwrap_or(Dtype::F32);
        let asked = self.job.dtype.map(SaveDtype::stored);
        match (dtype, stored(dtype)) {
            (Dtype::Other(_), Some(stored)) => Ok(stored),
            (Dtype::Other(_), None) => Err(MergeError::Dtype {
                name: name.to_owned(),
                dtype,
            }),
            (_, Some(stored)) if self.weights.gguf().is_none() => Ok(asked.unwrap_or(stored)),
            _ => Ok(asked.unwrap_or(Stored::BF16)),
        }
    }

    /// A tensor's bytes as they are to be written.
    pub(super) fn read(&mut self, info: &TensorInfo) -> Result<Cow<'a, [u8]>, MergeError> {
        let name = match self.untied && info.name == HEAD {
            true => EMBEDDING,
            false => info.name.as_str(),
        };
        let same = self.weights.dtype(name).and_then(stored) == Some(info.dtype);
        let scheme = self.job.quantised.filter(|_| self.quantised.contains(name));
        let raw = self.weights.raw(name)?.filter(|_| same && scheme.is_none());
        let change = self.changes.remove(&info.name);
        if let (Some(raw), None) = (raw, &change) {
            return Ok(Cow::Borrowed(raw));
        }
        let dtype = SaveDtype::from_stored(info.dtype).ok_or_else(|| MergeError::Dtype {
            name: name.to_owned(),
            dtype: self.weights.dtype(name).unwrap_or(Dtype::F32),
        })?;
        let mut values = self.weights.read_f32(name)?;
        if let Some(scheme) = scheme {
            let wrap = |source| MergeError::Quantise {
                name: name.to_owned(),
                source,
            };
            let shape = [info.shape[0], info.shape[1]];
            let matrix = QuantMatrix::quantise(&values, shape, scheme).map_err(wrap)?;
            matrix.dequantise_rows(0, &mut values);
        }
        // To tell whether rounding loses the delta.
        let before = match (raw, scheme) {
            (None, Some(_)) => Some(Cow::Owned(dtype.encode(&values).into_owned())),
            (raw, _) => raw.map(Cow::Borrowed),
        };
        let (module, scaling, size) = match change {
            None => return Ok(Cow::Owned(dtype.encode(&values).into_owned())),
            Some(Change::Delta(module, mut pairs, scaling)) => {
                if let (Some(taken), [pair]) = (self.taken_out, &mut pairs[..])
                    && module != names::EMBEDDING
                {
                    let (rank, shape) = (pair.a_shape[0], [pair.b_shape[0], pair.a_shape[1]]);
                    *pair = pair.minus(&taken.first_values(&values, shape, rank, scaling));
                }
                let matrix = values.len() / pairs.len();
                let parts = values.chunks_mut(matrix.max(1)).zip(&pairs);
                let sizes = parts.map(|(w, pair)| match module == names::EMBEDDING {
                    true => merge_into_embedding(w, pair, scaling),
                    false => merge_into(w, pair, scaling),
                });
                let size = sizes.fold(DeltaSize::default(), DeltaSize::and);
                (module, scaling, size)
            }
            Some(Change::Whole(name, saved)) => {
                let size = replace(&mut values, saved.values);
                (name, 1.0, size)
            }
        };
        if !size.is_finite() {
            return Err(MergeError::NotFinite {
                adapter: self.job.adapter.into(),
                module,
            });
        }
        let bytes = dtype.encode(&values).into_owned();
        if before.as_deref() == Some(&bytes[..]) {
            self.unchanged.push(module.clone());
        }
        self.total = self.total.and(size);
        let delta_norm = size.sum_of_squares.sqrt();
        self.modules.push(MergedModule {
            module,
            scaling,
            delta_norm,
        });
        Ok(Cow::Owned(bytes))
    }

    pub(super) fn report(
        self,
        written: Written,
        tokenizer_from: Option<PathBuf>,
    ) -> Result<MergeReport, MergeError> {
        if self.unchanged.len() == self.modules.len() {
            let cause =
                "the deltas are lost in rounding to the base's type; merge with --dtype f32";
            return Err(MergeError::EqualsBase {
                adapter: self.job.adapter.into(),
                cause,
            });
        }
        Ok(MergeReport {
            written,
            modules: self.modules,
            max_abs_delta: self.total.max_abs,
            delta_norm: self.total.sum_of_squares.sqrt(),
            unchanged: self.unchanged,
            tokenizer_from,
        })
    }
}

/// What safetensors calls the type; `None` for GGUF's.
fn stored(dtype: Dtype) -> Option<Stored> {
    match dtype {
        Dtype::F32 => Some(Stored::F32),
        Dtype::F16 => Some(Stored::F16),
        Dtype::BF16 => Some(Stored::BF16),
        Dtype::Quantised => None,
        Dtype::Other(name) => serde_json::from_value(Value::from(name)).ok(),
    }
}
