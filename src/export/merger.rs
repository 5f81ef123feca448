//! Reads a base's tensors with what adapters change in them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use safetensors::Dtype as Stored;
use serde_json::Value;

use super::merged::{MergeError, MergeJob, MergeReport, MergedModule, Rounding};
use super::model::{SaveDtype, Written};
use super::safetensors::TensorInfo;
use crate::adapter::experts;
use crate::adapter::merge::{DeltaSize, merge_into, merge_into_embedding, replace};
use crate::adapter::peft::{AdapterConfig, AdapterWeights, LoraPair, Saved, fit_model};
use crate::adapter::residual::TakenOut;
use crate::adapter::target::ModuleAdapter;
use crate::adapter::tokens::TrainedTokens;
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
    /// Puts others in place of these rows of this module's table of tokens.
    Rows(String, Vec<usize>, Vec<f32>),
}

/// The output head and the embedding.
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
/// What has a row for each token.
const TABLES: [&str; 3] = [HEAD, EMBEDDING, "lm_head.bias"];

/// Whether an adapter changes the embedding or the output head of a model in which they are one
/// matrix, so that they are two from then on.
fn unties(adapter: &AdapterConfig, trained: &AdapterWeights, config: &ModelConfig) -> bool {
    let changes = |module| adapter.saves(module) || trained.pairs.contains_key(module);
    let own_rows = trained.token_rows.contains_key(names::HEAD);
    let changed = [names::HEAD, names::EMBEDDING].into_iter().any(changes);
    config.tie_word_embeddings && (changed || own_rows)
}

/// Reads the base's tensors and adds the deltas.
pub(super) struct Merger<'a> {
    job: &'a MergeJob<'a>,
    weights: &'a Weights,
    /// Names in the base's files of what is merged into as it was quantised.
    quantised: BTreeSet<String>,
    /// By name in the base's files; several are made in turn.
    changes: BTreeMap<String, Vec<Change>>,
    /// Tokens that the merged model has room for.
    vocab_size: usize,
    /// Whether the output head, which is the embedding in the base, is written as its own.
    pub(super) untied: bool,
    /// What the base lost before the adapter trained.
    taken_out: Option<TakenOut>,
    modules: Vec<MergedModule>,
    unchanged: Vec<String>,
    total: DeltaSize,
    rounding: DeltaSize,
}

impl<'a> Merger<'a> {
    pub(super) fn new(
        job: &'a MergeJob<'a>,
        weights: &'a Weights,
        config: &ModelConfig,
        (adapter, trained): &(AdapterConfig, AdapterWeights),
    ) -> Result<Self, MergeError> {
        let fitted = fit_model(&job.adapters[0].0, adapter, trained, config)?;
        let mut trained = trained
            .clone()
            .with_plain_pairs(adapter, &names::adaptable(config));
        let adds = |pair: &LoraPair| {
            let delta = pair.a.iter().any(|x| *x != 0.0) && pair.b.iter().any(|x| *x != 0.0);
            delta || pair.magnitude.is_some()
        };
        // Before anything is written, for this is the common case: an adapter never trained.
        let deltas =
            |m: &ModuleAdapter| m.scaling != 0.0 && trained.pairs.get(&m.module).is_some_and(adds);
        if !fitted.iter().any(deltas) && trained.saved.is_empty() && trained.token_rows.is_empty() {
            let cause =
                "all its deltas are zero (B is zero until the first training step); train it first";
            return Err(MergeError::EqualsBase {
                adapter: job.adapters[0].0.clone(),
                cause,
            });
        }
        let shapes: BTreeMap<_, _> = names::tensors(config).into_iter().collect();
        let file_name = |name: &str| names::in_files(config.family, name);
        let untied = unties(adapter, &trained, config);
        let mut changes: BTreeMap<String, Vec<Change>> = BTreeMap::new();
        let mut change = |name: String, change| changes.entry(name).or_default().push(change);
        for (table, rows) in row_changes(adapter, &trained, untied) {
            change(table.to_owned(), rows);
        }
        for ModuleAdapter {
            module, scaling, ..
        } in fitted
        {
            let Some(pair) = trained.pairs.remove(&module) else {
                continue;
            };
            let Some(&[experts, out, input]) = shapes.get(&module).map(Vec::as_slice) else {
                let name = file_name(&format!("{module}.weight"));
                change(name, Change::Delta(module, vec![pair], scaling));
                continue;
            };
            let shape = [experts, out, input];
            for piece in pieces(config, &module, &shape) {
                let parts = experts::deltas_of(&piece, &pair, shape);
                let module = piece.name.trim_end_matches(".weight").to_owned();
                change(piece.name, Change::Delta(module, parts, scaling));
            }
        }
        for (name, saved) in trained.saved {
            change(file_name(&name), Change::Whole(name, saved));
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
            vocab_size: (adapter.trained_tokens.as_ref())
                .map_or(0, TrainedTokens::vocabulary)
                .max(config.vocab_size),
            modules,
            unchanged,
            total: DeltaSize::default(),
            rounding: DeltaSize::default(),
        })
    }

    /// Tokens that the merged model has room for, where the base has less.
    pub(super) fn new_vocabulary(&self) -> Option<usize> {
        let before = self.weights.shape(EMBEDDING)?.first()?;
        (self.vocab_size > *before).then_some(self.vocab_size)
    }

    /// The tensors to write, in the base's order; a head that was the embedding comes last.
    pub(super) fn tensors(&self) -> Result<Vec<TensorInfo>, MergeError> {
        let info = |name: &str, like: &str| {
            let mut shape = self.weights.shape(like).unwrap_or_default().to_vec();
            if TABLES.contains(&name) {
                shape[0] = self.vocab_size;
            }
            Ok(TensorInfo {
                name: name.to_owned(),
                dtype: self.target(like)?,
                shape,
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
        let changes = self.changes.remove(&info.name).unwrap_or_default();
        let elements = info.shape.iter().product::<usize>();
        let grows = self.weights.shape(name) != Some(&info.shape);
        if let (Some(raw), true, false) = (raw, changes.is_empty(), grows) {
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
        let unmerged = match (raw, scheme) {
            (None, Some(_)) => Some(Cow::Owned(dtype.encode(&values).into_owned())),
            (raw, _) => raw.map(Cow::Borrowed),
        };
        // New rows are trained ones, and new biases zero.
        values.resize(elements, 0.0);
        let mut merged = None;
        for change in changes {
            let found = self.make(change, &mut values);
            let before = merged
                .take()
                .map_or(DeltaSize::default(), |(_, _, size)| size);
            merged = Some((found.0, found.1, before.and(found.2)));
        }
        let Some((module, scaling, size)) = merged else {
            return Ok(Cow::Owned(dtype.encode(&values).into_owned()));
        };
        if !size.is_finite() {
            return Err(MergeError::NotFinite {
                adapter: self.job.adapters[0].0.clone(),
                module,
            });
        }
        let bytes = dtype.encode(&values).into_owned();
        self.rounding = self.rounding.and(dtype.rounding(&values, &bytes));
        if unmerged.as_deref() == Some(&bytes[..]) {
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

    /// Makes a change in a tensor's values; returns what was changed, its scaling and its size.
    fn make(&self, change: Change, values: &mut [f32]) -> (String, f64, DeltaSize) {
        match change {
            Change::Delta(module, mut pairs, scaling) => {
                if let (Some(taken), [pair]) = (self.taken_out, &mut pairs[..])
                    && module != names::EMBEDDING
                {
                    let (rank, shape) = (pair.a_shape[0], [pair.b_shape[0], pair.a_shape[1]]);
                    *pair = pair.minus(&taken.first_values(values, shape, rank, scaling));
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
            Change::Whole(name, saved) => {
                let size = replace(values, saved.values);
                (name, 1.0, size)
            }
            Change::Rows(module, ids, rows) => {
                let width = rows.len() / ids.len().max(1);
                let mut size = DeltaSize::default();
                for (id, row) in ids.iter().zip(rows.chunks_exact(width)) {
                    let place = &mut values[id * width..][..width];
                    size = size.and(replace(place, row.to_vec()));
                }
                (module, 1.0, size)
            }
        }
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
                adapter: self.job.adapters[0].0.clone(),
                cause,
            });
        }
        Ok(MergeReport {
            written,
            modules: self.modules,
            rounding: Rounding {
                max_abs: self.rounding.max_abs,
                norm: self.rounding.sum_of_squares.sqrt(),
            },
            max_abs_delta: self.total.max_abs,
            delta_norm: self.total.sum_of_squares.sqrt(),
            unchanged: self.unchanged,
            tokenizer_from,
        })
    }
}

/// Trained rows: the tensor, the module, the tokens and their rows. A head that parts from the embedding
/// takes its rows along, unless it has its own.
fn row_changes(
    adapter: &AdapterConfig,
    trained: &AdapterWeights,
    untied: bool,
) -> Vec<(&'static str, Change)> {
    let Some(tokens) = &adapter.trained_tokens else {
        return Vec::new();
    };
    let rows = |table: &'static str, module: &str, to: &str| {
        let (ids, rows) = (tokens.of(module)?, trained.token_rows.get(module)?);
        let change = Change::Rows(to.to_owned(), ids.to_vec(), rows.values.clone());
        Some((table, change))
    };
    let own = rows(HEAD, names::HEAD, names::HEAD);
    let shared = || rows(HEAD, names::EMBEDDING, names::HEAD).filter(|_| untied);
    let embedding = rows(EMBEDDING, names::EMBEDDING, names::EMBEDDING);
    embedding.into_iter().chain(own.or_else(shared)).collect()
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
