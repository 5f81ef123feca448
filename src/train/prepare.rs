//! From a plan to everything a run needs, short of loading weights: what `lorafit check` does.

use std::path::{Path, PathBuf};

pub use super::choice::AdapterChoice;
use super::choice::{self, Findings};
use crate::adapter::config::AdapterConfig;
use crate::data::tokenize::new_tokens::NewToken;
use crate::data::tokenize::{ChatTokenizer, TokenizerError};
use crate::data::{self, Dataset};
use crate::export::sidecar::has_tokenizer;
use crate::hub;
use crate::model::config::ModelConfig;
use crate::model::weights::{self, Weights};
use crate::recipe::{BaseInit, Plan, Quantization};

/// A plan with its base model found, its data tokenised and its adapters chosen.
#[derive(Debug)]
pub struct Prepared {
    /// The plan.
    pub plan: Plan,
    /// The base model on this machine.
    pub base: PathBuf,
    /// Its configuration.
    pub config: ModelConfig,
    /// Its weights; `None` with `base.init: random`.
    pub weights: Option<Weights>,
    /// Its tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// Tokens that the recipe adds.
    pub new_tokens: Vec<NewToken>,
    /// The samples.
    pub dataset: Dataset,
    /// What carries adapters; `None` with `adapter.method: full`.
    pub adapter: Option<AdapterChoice>,
}

/// Why a plan cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The base model was not found.
    #[error(transparent)]
    Base(#[from] hub::HubError),
    /// Everything that is wrong with the plan, its base model and its data.
    #[error("{}", .0.join("\n"))]
    Faults(Vec<String>),
}

/// Finds the base model, checks it, tokenises the data and chooses the adapters.
///
/// # Errors
/// All that is wrong, as far as one fault does not hide another.
pub fn prepare(
    plan: Plan,
    progress: &mut dyn FnMut(data::Progress),
) -> Result<Prepared, PrepareError> {
    let mut findings = Findings::default();
    let base = locate(&plan, progress)?;
    let (tokenizer, new_tokens) = findings.take(tokenizer(&plan, &base)).unzip();
    let new_tokens = new_tokens.unwrap_or_default();
    let (config, weights) = open_weights(&plan, &base, &mut findings);
    let adapter = config
        .as_ref()
        .and_then(|config| choice::choose(&plan, config, &new_tokens, &mut findings));
    let limit = config
        .as_ref()
        .map_or(usize::MAX, |config| config.max_position_embeddings);
    let dataset = tokenizer.as_ref().and_then(|tokenizer| {
        let seed = plan.train.seed;
        findings.take(data::load(&plan.data, seed, tokenizer, limit, progress))
    });
    if let (Some(dataset), Some(config)) = (&dataset, &config) {
        check_vocabulary(
            dataset,
            choice::vocabulary(config, adapter.as_ref()),
            &mut findings,
        );
        if dataset.holds_pairs() {
            findings.0.push(data::DataError::Preference.to_string());
        }
    }
    match (config, tokenizer, dataset) {
        (Some(config), Some(tokenizer), Some(dataset)) if findings.0.is_empty() => Ok(Prepared {
            base,
            config,
            weights,
            tokenizer,
            new_tokens,
            dataset,
            adapter,
            plan,
        }),
        _ => Err(PrepareError::Faults(findings.0)),
    }
}

/// The configuration and, unless they are drawn at random, the checked weights.
fn open_weights(
    plan: &Plan,
    base: &std::path::Path,
    findings: &mut Findings,
) -> (Option<ModelConfig>, Option<Weights>) {
    if plan.base.init == BaseInit::Random {
        return (findings.take(ModelConfig::from_dir(base)), None);
    }
    let Some(weights) = findings.take(Weights::open(base)) else {
        return (None, None);
    };
    if plan.base.quantization == Quantization::Gguf && weights.gguf().is_none() {
        findings.0.push(format!(
            "base.quantization: gguf keeps the blocks of a GGUF file, and the base {} is none; name a \
             .gguf file in base.model, or quantise it with nf4, nf4-double or int8",
            base.display()
        ));
    }
    let config = findings.take(weights.config());
    if let Some(config) = &config {
        findings.take(weights::check(&weights, config));
    }
    (config, Some(weights))
}

/// The tokenizer of a run, with the recipe's new tokens. An adapter that is trained on from and has
/// tokens of its own brings its tokenizer along.
///
/// # Errors
/// See [`TokenizerError`].
pub fn tokenizer(
    plan: &Plan,
    base: &Path,
) -> Result<(ChatTokenizer, Vec<NewToken>), TokenizerError> {
    let template = plan.data.chat_template.as_deref().map(Path::new);
    let knows_more = |dir: &&Path| {
        let config = AdapterConfig::load(dir);
        has_tokenizer(dir) && config.is_ok_and(|config| config.trained_tokens.is_some())
    };
    let adapter = plan.adapter.init_from.as_deref().filter(knows_more);
    let mut tokenizer = ChatTokenizer::open(adapter.unwrap_or(base), template)?;
    let new = match &plan.adapter.new_tokens {
        Some(texts) => tokenizer.add_tokens(texts)?,
        None => Vec::new(),
    };
    Ok((tokenizer, new))
}

/// A tokenizer with more ids than the model has embeddings would read past the table.
fn check_vocabulary(dataset: &Dataset, vocab_size: usize, findings: &mut Findings) {
    if let Some((id, source)) = dataset.outside(vocab_size) {
        findings.0.push(
            data::DataError::OutsideVocabulary {
                row: source.to_string(),
                id,
                vocab_size,
            }
            .to_string(),
        );
    }
}

/// Finds the base model of a plan.
///
/// # Errors
/// There is none, or it cannot be downloaded.
pub fn locate(
    plan: &Plan,
    progress: &mut dyn FnMut(data::Progress),
) -> Result<PathBuf, hub::HubError> {
    hub::locate(&plan.base.model, &plan.base.revision, &mut |event| {
        progress(data::Progress::Download(event));
    })
}

impl Prepared {
    /// Tokens that the model has embeddings for once its adapter is in.
    pub fn vocab_size(&self) -> usize {
        choice::vocabulary(&self.config, self.adapter.as_ref())
    }

    /// Identifies the samples and the base model, so that a resumed run can tell that they are the
    /// same.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        hash.update(&(self.dataset.train.len() as u64).to_le_bytes());
        hash.update(self.dataset.key.as_bytes());
        if let Some(weights) = &self.weights {
            hash.update(weights.fingerprint().as_bytes());
        }
        hash.finalize().to_hex()[..16].to_string()
    }
}
