//! From a plan to everything a run needs, short of loading weights: what `lorafit check` does.

use std::path::{Path, PathBuf};

pub use super::choice::AdapterChoice;
use super::choice::{self, Findings};
use crate::adapter::config::AdapterConfig;
use crate::adapter::inject::{self, Init};
use crate::data::tokenize::new_tokens::NewToken;
use crate::data::tokenize::{ChatTokenizer, TokenizerError};
use crate::data::{self, Dataset};
use crate::export::sidecar::has_tokenizer;
use crate::hub;
use crate::kernels::is_cpu;
use crate::model::config::ModelConfig;
use crate::model::weights::{self, Weights, WeightsError};
use crate::model::{CausalLm, Keep, Storage};
use crate::recipe::{BaseInit, Plan};

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
    /// Loads the base model onto a device, with its adapters injected or all weights trainable.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub fn model(&self, device: &burn::tensor::Device) -> Result<CausalLm, WeightsError> {
        let seed = self.plan.train.seed;
        let mut model = match &self.weights {
            Some(weights) => {
                let (config, storage) = (self.config.clone(), self.storage(device));
                let in_f32 =
                    |name: &str| choice::changes(self.adapter.as_ref(), &self.config, name);
                let keep = Keep {
                    storage,
                    linears: self.plan.base.quantization.scheme(),
                    in_f32: &in_f32,
                };
                CausalLm::load_as(weights, config, device, keep)?
            }
            None => CausalLm::random(self.config.clone(), seed, device)?,
        };
        match &self.adapter {
            Some(choice) => {
                let init = match &choice.values {
                    Some(values) => Init::Loaded(values),
                    None => Init::Fresh { seed },
                };
                self.begin_new_tokens(&mut model);
                inject::inject(&mut model, &choice.config, &choice.modules, &init);
            }
            None => inject::train_all(&mut model),
        }
        Ok(model)
    }

    /// How the frozen matrices are kept.
    pub fn storage(&self, device: &burn::tensor::Device) -> Storage {
        let adapts = self.adapter.is_some();
        choice::storage(self.plan.train.precision, adapts, is_cpu(device))
    }

    /// Tokens that the model has embeddings for once its adapter is in.
    pub fn vocab_size(&self) -> usize {
        choice::vocabulary(&self.config, self.adapter.as_ref())
    }

    /// Gives each new token the mean of the rows of the tokens that it takes the place of.
    fn begin_new_tokens(&self, model: &mut CausalLm) {
        if self.new_tokens.is_empty() {
            return;
        }
        model.grow(self.vocab_size());
        for token in &self.new_tokens {
            model.set_to_mean(token.id as usize, &token.pieces);
        }
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
