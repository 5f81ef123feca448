//! Which adapters a plan asks for, and what they make of the base; nothing is read but an adapter that
//! is trained on from.

use std::collections::BTreeSet;
use std::fmt;

use crate::adapter::config::AdapterConfig;
use crate::adapter::experts::converted;
use crate::adapter::peft::{self, AdapterWeights};
use crate::adapter::target::{self, ModuleAdapter, Targeting};
use crate::adapter::tokens::TrainedTokens;
use crate::adapter::vera::VeraConfig;
use crate::data::tokenize::new_tokens::NewToken;
use crate::model::config::ModelConfig;
use crate::model::{Storage, names};
use crate::recipe::{AdapterMethod, Optimizer, Plan, Precision};

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

/// Collects what independent checks find.
#[derive(Debug, Default)]
pub(super) struct Findings(pub(super) Vec<String>);

impl Findings {
    /// What a check gave, unless it found a fault.
    pub(super) fn take<T, E: fmt::Display>(&mut self, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.0.push(error.to_string())).ok()
    }
}

/// The adapters of a plan; `None` with `adapter.method: full`.
///
/// # Errors
/// All that is wrong with them.
pub fn find(
    plan: &Plan,
    config: &ModelConfig,
    new_tokens: &[NewToken],
) -> Result<Option<AdapterChoice>, Vec<String>> {
    let mut findings = Findings::default();
    let choice = choose(plan, config, new_tokens, &mut findings);
    match findings.0.is_empty() {
        true => Ok(choice),
        false => Err(findings.0),
    }
}

/// Chooses the adapters of a plan; `None` with `adapter.method: full`, and where there are findings.
pub(super) fn choose(
    plan: &Plan,
    config: &ModelConfig,
    new_tokens: &[NewToken],
    findings: &mut Findings,
) -> Option<AdapterChoice> {
    if plan.adapter.method == AdapterMethod::Full {
        return None;
    }
    let choice = chosen(plan, config, new_tokens, findings)?;
    if plan.train.optimizer == Optimizer::LoraFa {
        check_lora_fa(&choice, findings);
    }
    Some(choice)
}

fn chosen(
    plan: &Plan,
    config: &ModelConfig,
    new_tokens: &[NewToken],
    findings: &mut Findings,
) -> Option<AdapterChoice> {
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

/// How the frozen matrices are kept.
///
/// `auto` rounds nothing: 16 bits cost no time where the kernels read them as they are.
pub fn storage(precision: Precision, adapts: bool, reads_16_bits: bool) -> Storage {
    match precision {
        Precision::Auto if adapts && reads_16_bits => Storage::AsStored,
        Precision::Auto | Precision::F32 => Storage::F32,
        Precision::Bf16 => Storage::Bf16,
        Precision::F16 => Storage::F16,
    }
}

/// Whether a tensor of the base trains, or loses a part to its adapter at first.
pub fn changes(adapter: Option<&AdapterChoice>, model: &ModelConfig, name: &str) -> bool {
    let Some(AdapterChoice {
        config, modules, ..
    }) = adapter
    else {
        return true;
    };
    let module = name.strip_suffix(".weight").unwrap_or(name);
    // A head that is the embedding's twin is copied from it.
    let is_twin = model.tie_word_embeddings && module == names::EMBEDDING;
    let changes = |module: &str| {
        let adapted = || modules.iter().any(|chosen| chosen.module == module);
        config.saves(module) || (config.taken_out().is_some() && adapted())
    };
    changes(module) || (is_twin && changes(names::HEAD))
}

/// Tokens that the model has embeddings for once its adapter is in.
pub(super) fn vocabulary(config: &ModelConfig, adapter: Option<&AdapterChoice>) -> usize {
    let tokens = adapter.and_then(|choice| choice.config.trained_tokens.as_ref());
    tokens
        .map_or(0, TrainedTokens::vocabulary)
        .max(config.vocab_size)
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
