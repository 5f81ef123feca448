//! From a plan to everything a run needs, short of loading weights: what `lorafit check` does.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::adapter::config::AdapterConfig;
use crate::adapter::experts::converted;
use crate::adapter::inject::{self, Init};
use crate::adapter::peft::{self, AdapterWeights};
use crate::adapter::target::{self, ModuleAdapter, Targeting};
use crate::adapter::vera::VeraConfig;
use crate::data::tokenize::ChatTokenizer;
use crate::data::{self, Dataset};
use crate::hub;
use crate::kernels::is_cpu;
use crate::model::config::ModelConfig;
use crate::model::weights::{self, Weights, WeightsError};
use crate::model::{CausalLm, Keep, Storage, names};
use crate::random::Stream;
use crate::recipe::{AdapterMethod, BaseInit, Plan, Precision};

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

/// Bytes of each end of a tensor that a fingerprint sees.
const ENDS: usize = 32;

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
    let template = plan.data.chat_template.as_deref().map(Path::new);
    let tokenizer = findings.take(ChatTokenizer::open(&base, template));
    let (config, weights) = open_weights(&plan, &base, &mut findings);
    let adapter = config
        .as_ref()
        .and_then(|config| choose_adapters(&plan, config, &mut findings));
    let limit = config
        .as_ref()
        .map_or(usize::MAX, |config| config.max_position_embeddings);
    let dataset = tokenizer.as_ref().and_then(|tokenizer| {
        let seed = plan.train.seed;
        findings.take(data::load(&plan.data, seed, tokenizer, limit, progress))
    });
    if let (Some(dataset), Some(config)) = (&dataset, &config) {
        check_vocabulary(dataset, config, &mut findings);
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
    let adapter = AdapterConfig { vera, ..adapter };
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
fn check_vocabulary(dataset: &Dataset, config: &ModelConfig, findings: &mut Findings) {
    if let Some((id, source)) = dataset.outside(config.vocab_size) {
        findings.0.push(
            data::DataError::OutsideVocabulary {
                row: source.to_string(),
                id,
                vocab_size: config.vocab_size,
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
                inject::inject(&mut model, &choice.config, &choice.modules, &init);
            }
            None => inject::train_all(&mut model),
        }
        Ok(model)
    }

    /// How the frozen matrices are kept.
    ///
    /// `auto` rounds nothing: on the processor, 16 bits cost no time, as its kernels read them as they
    /// are.
    pub fn storage(&self, device: &burn::tensor::Device) -> Storage {
        match self.plan.train.precision {
            Precision::Auto if self.adapter.is_some() && is_cpu(device) => Storage::AsStored,
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

    /// Identifies the samples and the base model, so that a resumed run can tell that they are the
    /// same. Of each base tensor it sees name, shape and both ends, which any retraining changes.
    pub fn fingerprint(&self) -> String {
        let mut stream = Stream::new(self.dataset.train.len() as u64);
        let mut fold = |bytes: &[u8]| {
            for byte in bytes {
                stream = stream.split(u64::from(*byte));
            }
        };
        fold(self.dataset.key.as_bytes());
        let weights = self.weights.iter();
        for (weights, name) in weights.flat_map(|w| w.names().map(move |name| (w, name))) {
            fold(name.as_bytes());
            for size in weights.shape(name).unwrap_or_default() {
                fold(&size.to_le_bytes());
            }
            if let Ok(Some(raw)) = weights.raw(name) {
                fold(&raw[..raw.len().min(ENDS)]);
                fold(&raw[raw.len().saturating_sub(ENDS)..]);
            }
        }
        format!("{:016x}", stream.bits(0))
    }
}
