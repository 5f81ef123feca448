//! Merging: base and adapter become one model directory, tensor by tensor.
//!
//! No more than the largest tensor is in memory at once: in f32, and once more as it is written.
//! The directory appears whole, after [`PreparedMerge::publish`], so that a merge which fails
//! verification leaves nothing behind.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::merger::Merger;
use super::model::{DEFAULT_SHARD_SIZE, SaveDtype, Written, with_dtype, write_json, write_weights};
use super::safetensors::TensorInfo;
use super::sidecar::{copy_notices, copy_tokenizer, directory, has_tokenizer, read_config};
use super::write::{PartialDir, WriteError, is_taken};
use crate::adapter::combine::{Combination, CombineError, Weighted, combine};
use crate::adapter::peft::{AdapterConfig, AdapterWeights, PeftError, fit_model, read_adapter};
use crate::data::tokenize::ChatTokenizer;
use crate::model::config::{ConfigError, ModelConfig};
use crate::model::weights::{Dtype, Weights, WeightsError, check};
use crate::model::{gguf, names};
use crate::quant::{NotFinite, Scheme};

/// Why a merge failed.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The base's weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The base's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The adapter.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// The result cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The tokenizer of a GGUF base.
    #[error("cannot write the tokenizer of {}: {source}", base.display())]
    Tokenizer {
        /// The base.
        base: PathBuf,
        /// What is wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The output directory holds something.
    #[error("{}: not empty; a merge never overwrites: choose another --out or remove it", out.display())]
    Taken {
        /// The output directory.
        out: PathBuf,
    },
    /// The output directory is one of the inputs or lies in one.
    #[error("{}: lies in the {what} {}; choose an --out outside of it", out.display(), input.display())]
    Inside {
        /// The output directory.
        out: PathBuf,
        /// "base" or "adapter".
        what: &'static str,
        /// Its directory.
        input: PathBuf,
    },
    /// Adapters that cannot be added.
    #[error(transparent)]
    Combine(#[from] CombineError),
    /// An adapter that does not belong to the base.
    #[error(
        "{}: {cause}, {}; give the base that it was trained on, or --force if you mean it",
        adapter.display(), base.display()
    )]
    OtherBase {
        /// The adapter.
        adapter: PathBuf,
        /// The base.
        base: PathBuf,
        /// What is wrong.
        cause: &'static str,
    },
    /// The adapter changes nothing.
    #[error("the merge of {} equals the base: {cause}", adapter.display())]
    EqualsBase {
        /// The adapter.
        adapter: PathBuf,
        /// Why, and what to do.
        cause: &'static str,
    },
    /// A delta holds infinities or is not a number.
    #[error("{}: the delta of {module} is not finite; train again with a lower learning rate", adapter.display())]
    NotFinite {
        /// The adapter.
        adapter: PathBuf,
        /// The module.
        module: String,
    },
    /// The base cannot be quantised as it was in training.
    #[error("tensor `{name}` of the base cannot be quantised: {source}")]
    Quantise {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        source: NotFinite,
    },
    /// A tensor of a type that cannot be converted.
    #[error(
        "{name} is stored as {dtype}, which cannot be merged or converted; expected F32, F16 or BF16"
    )]
    Dtype {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: Dtype,
    },
}

/// What to merge, and where to.
#[derive(Debug, Clone)]
pub struct MergeJob<'a> {
    /// The base model: a directory, a safetensors file or a GGUF file.
    pub base: &'a Path,
    /// PEFT adapter directories, at least one, with what their deltas are multiplied by.
    pub adapters: Vec<(PathBuf, f64)>,
    /// How several become one.
    pub combination: Combination,
    /// Whether the deltas are taken away instead of added.
    pub subtract: bool,
    /// Whether a base that is not the adapters' own is merged into all the same.
    pub force: bool,
    /// How the base was quantised in training, to merge into what those weights stand for; into the
    /// base's own when `None`.
    pub quantised: Option<Scheme>,
    /// The new model directory; must not exist or be empty.
    pub out: &'a Path,
    /// Type of all weights; each keeps its own when `None` (bf16 for a GGUF base).
    pub dtype: Option<SaveDtype>,
    /// Largest size of a weight file in bytes.
    pub shard_size: u64,
}

impl<'a> MergeJob<'a> {
    /// One adapter into its base, in the base's types.
    pub fn new(base: &'a Path, adapter: &Path, out: &'a Path) -> Self {
        Self {
            base,
            adapters: vec![(adapter.to_owned(), 1.0)],
            combination: Combination::Cat,
            subtract: false,
            force: false,
            quantised: None,
            out,
            dtype: None,
            shard_size: DEFAULT_SHARD_SIZE,
        }
    }
}

/// How far a merge is.
#[derive(Debug, Clone, Copy)]
pub struct MergeProgress<'a> {
    /// The tensor that is next.
    pub tensor: &'a str,
    /// Bytes written.
    pub done: u64,
    /// Bytes to write.
    pub total: u64,
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeReport {
    /// Tensors, bytes and files.
    pub written: Written,
    /// The merged modules with scaling and Frobenius norm of what was added.
    pub modules: Vec<MergedModule>,
    /// What rounding to the written type lost.
    pub rounding: Rounding,
    /// Largest absolute element that was added.
    pub max_abs_delta: f32,
    /// Frobenius norm of all that was added.
    pub delta_norm: f64,
    /// Modules whose delta was lost in rounding to the type that was written.
    pub unchanged: Vec<String>,
    /// Where the tokenizer comes from: the adapter if it has one, else the base; `None` when
    /// neither has.
    pub tokenizer_from: Option<PathBuf>,
}

/// The difference between merged weights in f32 and as they are written.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Rounding {
    /// Largest absolute difference.
    pub max_abs: f32,
    /// Frobenius norm of all differences.
    pub norm: f64,
}

/// One merged module.
#[derive(Debug, Clone, PartialEq)]
pub struct MergedModule {
    /// Module path.
    pub module: String,
    /// What `B·A` was multiplied by.
    pub scaling: f64,
    /// Frobenius norm of the delta.
    pub delta_norm: f64,
}

/// A merged model that is complete but not yet in its place.
#[derive(Debug)]
pub struct PreparedMerge {
    dir: PartialDir,
    report: MergeReport,
    adapter: (AdapterConfig, AdapterWeights),
}

impl PreparedMerge {
    /// Where the model is now: read it back from here.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The one adapter that stands for all: verify the model with it.
    pub fn adapter(&self) -> (&AdapterConfig, &AdapterWeights) {
        (&self.adapter.0, &self.adapter.1)
    }

    /// What was done.
    pub fn report(&self) -> &MergeReport {
        &self.report
    }

    /// Puts the model in its place. Dropped instead, it is removed.
    ///
    /// # Errors
    /// When something came to be there meanwhile, or the system refuses.
    pub fn publish(self) -> Result<MergeReport, MergeError> {
        self.dir.publish()?;
        Ok(self.report)
    }
}

/// Merges and publishes in one go, without verification.
///
/// # Errors
/// As [`prepare`] and [`PreparedMerge::publish`].
pub fn merge(
    job: &MergeJob,
    progress: &mut dyn FnMut(MergeProgress),
) -> Result<MergeReport, MergeError> {
    prepare(job, progress)?.publish()
}

/// Merges into a temporary directory beside `job.out`.
///
/// The delta is computed and added in f32, and rounded once.
///
/// # Errors
/// [`MergeError`]; nothing is left behind then.
pub fn prepare(
    job: &MergeJob,
    progress: &mut dyn FnMut(MergeProgress),
) -> Result<PreparedMerge, MergeError> {
    check_places(job)?;
    let weights = Weights::open(job.base)?;
    let config = weights.config()?;
    check(&weights, &config)?;
    let (adapters, merged) = read_adapters(job, &weights, &config)?;
    let adapter = one_adapter(job, adapters)?;
    let mut merger = Merger::new(job, &weights, &config, &adapter)?;
    let dir = PartialDir::create(job.out)?;
    let tokenizer_from = write_sidecars(job, &weights, &merger, dir.path())?;
    let tensors = merger.tensors()?;
    let total = tensors.iter().filter_map(TensorInfo::bytes).sum::<usize>() as u64;
    let mut done = 0;
    let metadata = [("format", "pt"), (MERGED_KEY, merged.as_str())];
    let written = write_weights(dir.path(), &metadata, tensors, job.shard_size, |info| {
        progress(MergeProgress {
            tensor: &info.name,
            done,
            total,
        });
        let bytes = merger.read(info)?;
        done += bytes.len() as u64;
        Ok::<_, MergeError>(bytes)
    })?;
    let report = merger.report(written, tokenizer_from)?;
    Ok(PreparedMerge {
        dir,
        report,
        adapter,
    })
}

/// The key of a file's metadata under which the hashes of the adapters stand that were merged into it.
const MERGED_KEY: &str = "lorafit.merged";

/// Reads the adapters, and refuses those that do not belong to this base; returns the hashes of all that
/// are in the merged model too.
fn read_adapters(
    job: &MergeJob,
    weights: &Weights,
    config: &ModelConfig,
) -> Result<(Vec<Weighted>, String), MergeError> {
    let (fingerprint, layers) = (weights.fingerprint(), names::adaptable(config));
    let before = weights.metadata(MERGED_KEY).unwrap_or_default();
    let mut adapters = Vec::new();
    let mut inside: Vec<String> = before.split_whitespace().map(str::to_owned).collect();
    for (dir, weight) in &job.adapters {
        let (mut adapter, trained) = read_adapter(dir)?;
        fit_model(dir, &adapter, &trained, config)?;
        let hash = trained.hash();
        let is_in = inside.contains(&hash);
        let is_other = (trained.base.as_ref()).is_some_and(|base| *base != fingerprint);
        let cause = match (job.force, job.subtract, is_in) {
            (true, ..) => None,
            (_, false, true) => Some("was merged into this model before"),
            (_, true, false) if is_other => Some("was not merged into this model"),
            (_, false, false) if is_other => Some("was trained on another base than this one"),
            _ => None,
        };
        if let Some(cause) = cause {
            return Err(MergeError::OtherBase {
                adapter: dir.clone(),
                base: job.base.into(),
                cause,
            });
        }
        match job.subtract {
            true => inside.retain(|other| *other != hash),
            false => inside.push(hash),
        }
        adapters.push(Weighted {
            dir: dir.clone(),
            weight: if job.subtract { -weight } else { *weight },
            weights: trained.with_plain_pairs(&adapter, &layers),
            config: {
                // Its deltas are LoRA's now.
                adapter.vera = None;
                adapter
            },
        });
    }
    Ok((adapters, inside.join(" ")))
}

/// One adapter with weight 1 as it is, or what stands for several.
fn one_adapter(
    job: &MergeJob,
    mut adapters: Vec<Weighted>,
) -> Result<(AdapterConfig, AdapterWeights), MergeError> {
    match (adapters.pop(), adapters.is_empty(), job.combination) {
        (Some(one), true, Combination::Cat) if one.weight == 1.0 => Ok((one.config, one.weights)),
        (last, ..) => {
            adapters.extend(last);
            Ok(combine(&adapters, job.combination)?)
        }
    }
}

/// Refuses an output that is taken or lies in an input.
fn check_places(job: &MergeJob) -> Result<(), MergeError> {
    let out = real(job.out);
    let adapters = job
        .adapters
        .iter()
        .map(|(dir, _)| ("adapter", dir.as_path()));
    for (what, input) in adapters.chain([("base", job.base)]) {
        let real = real(input);
        if out.starts_with(&real) {
            return Err(MergeError::Inside {
                out: job.out.into(),
                what,
                input: input.into(),
            });
        }
    }
    if is_taken(job.out) {
        return Err(MergeError::Taken {
            out: job.out.into(),
        });
    }
    Ok(())
}

/// The path with links resolved as far as it exists.
fn real(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let existing = path
        .ancestors()
        .find_map(|above| Some((above, above.canonicalize().ok()?)));
    match existing {
        Some((above, real)) => match path.strip_prefix(above) {
            Ok(rest) if !rest.as_os_str().is_empty() => real.join(rest),
            _ => real,
        },
        None => path,
    }
}

/// Writes `config.json`, the tokenizer and the notices; returns where the tokenizer came from.
fn write_sidecars(
    job: &MergeJob,
    weights: &Weights,
    merger: &Merger,
    to: &Path,
) -> Result<Option<PathBuf>, MergeError> {
    let from_gguf = weights.gguf().is_some();
    let base_dir = directory(job.base);
    let mut config_json = if let Some(file) = weights.gguf() {
        gguf::config_json(file, job.dtype.unwrap_or(SaveDtype::Bf16).torch_name())?
    } else {
        copy_notices(base_dir, to)?;
        match job.dtype {
            Some(dtype) => with_dtype(&read_config(base_dir)?, dtype),
            None => read_config(base_dir)?,
        }
    };
    if merger.untied {
        config_json["tie_word_embeddings"] = Value::Bool(false);
    }
    if let Some(vocab_size) = merger.new_vocabulary() {
        config_json["vocab_size"] = Value::from(vocab_size);
    }
    write_json(&to.join("config.json"), &config_json)?;
    // An adapter's own tokenizer carries the chat template that it was trained with.
    let mut dirs = job.adapters.iter().map(|(dir, _)| dir);
    if let Some(dir) = dirs.find(|dir| has_tokenizer(dir)) {
        copy_tokenizer(dir, to)?;
        Ok(Some(dir.clone()))
    } else if from_gguf {
        let wrap = |source| MergeError::Tokenizer {
            base: job.base.to_owned(),
            source,
        };
        let tokenizer = ChatTokenizer::open(job.base, None).map_err(|e| wrap(e.into()))?;
        tokenizer.save(to).map_err(|e| wrap(e.into()))?;
        Ok(Some(job.base.to_owned()))
    } else {
        let copied = copy_tokenizer(base_dir, to)?;
        Ok((!copied.is_empty()).then(|| base_dir.to_owned()))
    }
}
