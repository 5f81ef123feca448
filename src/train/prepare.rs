//! From a plan to everything a run needs, short of loading weights: what `lorafit check` does.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::adapter::config::AdapterConfig;
use crate::adapter::experts::converted;
use crate::adapter::inject::{self, Init};
use crate::adapter::peft::{self, AdapterWeights};
use crate::adapter::target::{self, ModuleAdapter, Targeting};
use crate::adapter::tokens::TrainedTokens;
use crate::adapter::vera::VeraConfig;
use crate::data::tokenize::new_tokens::NewToken;
use crate::data::tokenize::{ChatTokenizer, TokenizerError};
use crate::data::{self, Dataset};
use crate::export::sidecar::has_tokenizer;
use crate::hub;
use crate::kernels::is_fused;
use crate::model::config::ModelConfig;
use crate::model::weights::{self, Weights, WeightsError};
use crate::model::{CausalLm, Keep, Storage, names};
use crate::recipe::{AdapterMethod, BaseInit, Optimizer, Plan, Precision};

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

/// The adapters of a run.
#[derive(Debug)]
pub struct AdapterChoice {
    /// The configuration that will be written.
    pub config: AdapterConfig,
    /// The modules.
    pub modules: Vec<ModuleAdapter>,
    /// Values to train on from (`adapter.init_from`).
    pub values: Option<AdapterWeights>,
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

/// Collects what independent checks find.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    fn take<T, E: fmt::Display>(&mut self, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.0.push(error.to_string())).ok()
    }
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
        .and_then(|config| choose_adapters(&plan, config, &new_tokens, &mut findings));
    if let (Some(choice), Optimizer::LoraFa) = (&adapter, plan.train.optimizer) {
        check_lora_fa(choice, &mut findings);
    }
    let limit = config
        .as_ref()
        .map_or(usize::MAX, |config| config.max_position_embeddings);
    let dataset = tokenizer.as_ref().and_then(|tokenizer| {
        let seed = plan.train.seed;
        findings.take(data::load(&plan.data, seed, tokenizer, limit, progress))
    });
    if let (Some(dataset), Some(config)) = (&dataset, &config) {
        check_vocabulary(dataset, vocabulary(config, adapter.as_ref()), &mut findings);
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

fn choose_adapters(
    plan: &Plan,
    config: &ModelConfig,
    new_tokens: &[NewToken],
    findings: &mut Findings,
) -> Option<AdapterChoice> {
    if plan.adapter.method == AdapterMethod::Full {
        return None;
    }
    if let Some(dir) = &plan.adapter.init_from {
        let (adapter_config, values) = findings.take(peft::read_adapter(dir))?;
        let fit = peft::fit_model(dir, &adapter_config, &values, config);
        return Some(AdapterChoice {
            modules: findings.take(fit)?,
            config: adapter_config,
            values: Some(values),
        });
    }
    let mut targeting = Targeting::from(&plan.adapter);
    let vera = (plan.adapter.method == AdapterMethod::Vera)
        .then(|| VeraConfig::new(plan.train.seed & u64::from(u32::MAX)));
    match vera {
        // Its deltas are not scaled.
        Some(_) => targeting.alpha = targeting.rank as f64,
        None => targeting = findings.take(converted(&targeting, config))?,
    }
    let linear: Vec<String> = (names::adaptable(config).into_iter())
        .map(|layer| layer.path)
        .collect();
    let mut modules = findings.take(target::select(&targeting, &linear))?;
    let written = findings.take(target::as_written(&targeting, &linear))?;
    let revision = Some(plan.base.revision.as_str());
    let adapter = AdapterConfig::new(&plan.base.model, revision, written, plan.adapter.dropout)
        .with_plan(&plan.adapter);
    let adapter = AdapterConfig {
        vera,
        trained_tokens: trained_tokens(plan, new_tokens, config.tie_word_embeddings),
        ..adapter
    };
    check_tokens(&adapter, &modules, config, new_tokens, findings);
    check_saved(&adapter, config, findings);
    check_experts(&adapter, &modules, findings);
    if vera.is_some()
        && modules
            .iter()
            .any(|chosen| chosen.module == names::EMBEDDING)
    {
        let cause = "adapter.target_modules: VeRA has no vectors for the embedding (nor has it in \
                     PEFT); leave embed_tokens out";
        findings.0.push(cause.to_owned());
    }
    check_first_values(&adapter, &modules, config, findings);
    // What trains whole needs no delta; PEFT leaves it out too.
    modules.retain(|chosen| !adapter.saves(&chosen.module));
    Some(AdapterChoice {
        config: adapter,
        modules,
        values: None,
    })
}

/// Tokens that the model has embeddings for once its adapter is in.
fn vocabulary(config: &ModelConfig, adapter: Option<&AdapterChoice>) -> usize {
    let tokens = adapter.and_then(|choice| choice.config.trained_tokens.as_ref());
    tokens
        .map_or(0, TrainedTokens::vocabulary)
        .max(config.vocab_size)
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

/// The tokens whose rows train: new ones, and those that the recipe lists.
fn trained_tokens(plan: &Plan, new: &[NewToken], tied: bool) -> Option<TrainedTokens> {
    let listed = plan.adapter.trainable_token_indices.iter().flatten();
    let ids: BTreeSet<usize> = (listed.copied())
        .chain(new.iter().map(|token| token.id as usize))
        .collect();
    (!ids.is_empty()).then(|| TrainedTokens::everywhere(ids.into_iter().collect(), tied))
}

/// What PEFT refuses beside trained tokens, and ids that name nothing.
fn check_tokens(
    adapter: &AdapterConfig,
    chosen: &[ModuleAdapter],
    config: &ModelConfig,
    new: &[NewToken],
    findings: &mut Findings,
) {
    let Some(tokens) = &adapter.trained_tokens else {
        return;
    };
    let key = "adapter.trainable_token_indices and adapter.new_tokens";
    let both = [names::EMBEDDING, names::HEAD];
    let embeds = chosen.iter().any(|m| m.module == names::EMBEDDING);
    let whole = both.iter().any(|module| adapter.saves(module));
    let changed_head =
        adapter.taken_out().is_some() && chosen.iter().any(|m| m.module == names::HEAD);
    if embeds || whole || changed_head {
        let what = match (embeds, whole) {
            (true, _) => "an adapter on the embedding",
            (_, true) => "an embedding or output head in modules_to_save",
            _ => "an output head that begins with a part of its weight",
        };
        findings.0.push(format!(
            "{key}: cannot be combined with {what} (nor can they in PEFT); leave one of them out"
        ));
    }
    let room = new.iter().map(|token| token.id as usize + 1).max();
    let room = room.unwrap_or(0).max(config.vocab_size);
    if tokens.vocabulary() > room {
        findings.0.push(format!(
            "adapter.trainable_token_indices: token {} is not in the vocabulary of {room}; add new \
             tokens by their text with adapter.new_tokens",
            tokens.vocabulary() - 1
        ));
    }
}

/// What PEFT refuses for experts and routers, so that an adapter made so would not load there.
fn check_experts(adapter: &AdapterConfig, chosen: &[ModuleAdapter], findings: &mut Findings) {
    let is_parameter = |adapter: &&ModuleAdapter| names::parameter_of(&adapter.module).is_some();
    let Some(first) = chosen.iter().find(is_parameter) else {
        return;
    };
    for (on, knob, off) in [
        (adapter.lora_dropout != 0.0, "adapter.dropout", "0"),
        (adapter.use_dora, "adapter.use_dora", "false"),
    ] {
        if on {
            findings.0.push(format!(
                "{knob}: cannot be combined with an adapter on {} (nor can it in PEFT); set {knob} to \
                 {off}, or leave experts and routers out of target_modules and target_parameters",
                first.module
            ));
        }
    }
}

/// LoRA-FA knows plain LoRA on linear layers only: PEFT takes an embedding's A for frozen, which is
/// zero, mixes the projections of experts up, and pairs tensors wrongly where there is a third.
fn check_lora_fa(choice: &AdapterChoice, findings: &mut Findings) {
    let is_other = |module: &str| {
        module == names::EMBEDDING || names::parameter_of(module).is_some_and(|p| p == module)
    };
    let other = choice.modules.iter().find(|m| is_other(&m.module));
    let found = match (other, choice.config.use_dora, choice.config.vera) {
        (Some(other), ..) => format!("{} is none", other.module),
        (_, true, _) => "these have DoRA's magnitudes".to_owned(),
        (.., Some(_)) => "these are VeRA's".to_owned(),
        _ => return,
    };
    findings.0.push(format!(
        "train.optimizer: lora_fa trains plain adapters on linear layers only, and {found}; set \
         train.optimizer: adamw or choose other adapters"
    ));
}

/// What is taken out of a weight has at most the weight's rank, and experts lose nothing (in PEFT).
fn check_first_values(
    adapter: &AdapterConfig,
    chosen: &[ModuleAdapter],
    config: &ModelConfig,
    findings: &mut Findings,
) {
    if adapter.taken_out().is_none() {
        return;
    }
    let key = "adapter.init_lora_weights";
    let layers = names::adaptable(config);
    for adapter in chosen {
        let module = &adapter.module;
        if names::parameter_of(module).is_some() {
            findings.0.push(format!(
                "{key}: {module} cannot begin with a part of its weight (nor can it in PEFT); set \
                 {key} to kaiming or leave experts and routers out"
            ));
            return;
        }
        let width = (layers.iter().find(|layer| layer.path == *module))
            .map_or(0, |layer| layer.out_features.min(layer.in_features));
        if adapter.rank > width {
            findings.0.push(format!(
                "{key}: {module} has a weight of rank {width}, which has no {} directions to begin \
                 with; set adapter.rank to {width} or less",
                adapter.rank
            ));
            return;
        }
    }
}

/// A name of `modules_to_save` that no module has would train nothing and say nothing, as in PEFT.
fn check_saved(adapter: &AdapterConfig, config: &ModelConfig, findings: &mut Findings) {
    let mut modules: BTreeSet<String> = (names::tensors(config).iter())
        .filter_map(|(name, _)| Some(name.rsplit_once('.')?.0.to_string()))
        .collect();
    modules.insert(names::HEAD.to_string());
    for end in &adapter.modules_to_save {
        if end.is_empty() || !modules.iter().any(|module| module.ends_with(end)) {
            let ends: BTreeSet<&str> = (modules.iter())
                .filter_map(|module| module.rsplit('.').next())
                .collect();
            findings.0.push(format!(
                "adapter.modules_to_save: no module's path ends with {end:?}; the modules are {}",
                ends.into_iter().collect::<Vec<_>>().join(", ")
            ));
        }
    }
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
                let in_f32 = |name: &str| self.changes(name);
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
    ///
    /// `auto` rounds nothing: 16 bits cost no time, as the kernels of processor and GPUs read them as they
    /// are.
    pub fn storage(&self, device: &burn::tensor::Device) -> Storage {
        match self.plan.train.precision {
            Precision::Auto if self.adapter.is_some() && is_fused(device) => Storage::AsStored,
            Precision::Auto | Precision::F32 => Storage::F32,
            Precision::Bf16 => Storage::Bf16,
            Precision::F16 => Storage::F16,
        }
    }

    /// Whether a tensor of the base trains, or loses a part to its adapter at first.
    fn changes(&self, name: &str) -> bool {
        let Some(AdapterChoice {
            config, modules, ..
        }) = &self.adapter
        else {
            return true;
        };
        let module = name.strip_suffix(".weight").unwrap_or(name);
        // A head that is the embedding's twin is copied from it.
        let is_twin = self.config.tie_word_embeddings && module == names::EMBEDDING;
        let changes = |module: &str| {
            let adapted = || modules.iter().any(|chosen| chosen.module == module);
            config.saves(module) || (config.taken_out().is_some() && adapted())
        };
        changes(module) || (is_twin && changes(names::HEAD))
    }

    /// Tokens that the model has embeddings for once its adapter is in.
    pub fn vocab_size(&self) -> usize {
        vocabulary(&self.config, self.adapter.as_ref())
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
