//! The bytes of every phase of a run.

use std::path::Path;

use serde::Serialize;

use super::block::Rows;
use super::bytes::{Bytes, Kind};
use super::kernels::{F32, Platform};
use super::layers::Facts;
use super::step::{self, StepBytes};
use crate::adapter::config::AdapterConfig;
use crate::adapter::outline::Outline;
use crate::data::tokenize::new_tokens::NewToken;
use crate::model::config::ModelConfig;
use crate::model::kept::{Form, KeptTensor, kept_tensors};
use crate::model::weights::{Dtype, Weights, WeightsError};
use crate::model::{Keep, names};
use crate::recipe::{Optimizer, Packing, Plan, Quantization};
use crate::train::choice;
use crate::train::heap;
use crate::train::moments_8bit::{self, Moments8};
use crate::train::prepare::Prepared;
use crate::train::recompute::Retain;

/// A part of a run, or what is done with its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The base is read.
    Load,
    /// Its linear layers are quantised as they are read.
    Quantise,
    /// A forward and backward pass, and the optimizer.
    Step,
    /// The validation rows, and samples of text.
    Eval,
    /// A run state or the result is written.
    Save,
    /// `lorafit merge`, which compares whole models in f32, in the host's memory.
    Merge,
}

impl Phase {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Quantise => "quantise",
            Self::Step => "step",
            Self::Eval => "eval",
            Self::Save => "save",
            Self::Merge => "merge",
        }
    }
}

/// The largest size of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PhaseBytes {
    /// The phase.
    pub phase: Phase,
    /// What it holds when it holds most.
    pub bytes: Bytes,
}

/// How much memory a run needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The phases that the run goes through, in order, and the merge after it.
    pub phases: Vec<PhaseBytes>,
    /// Bytes in the host's memory that training on a GPU needs.
    pub on_host: u64,
}

/// What is planned with, beside the recipe.
#[derive(Debug)]
pub struct Planner<'a> {
    /// The base's configuration.
    pub config: &'a ModelConfig,
    /// The base's files; `None` where there is only a configuration.
    pub weights: Option<&'a Weights>,
    /// In which type a base without files is taken to be stored.
    pub assumed: Dtype,
    /// Tokens that the recipe adds.
    pub new_tokens: Vec<NewToken>,
    /// What it runs on.
    pub platform: Platform,
    /// Tokens of the longest sample, where that is known.
    pub longest: Option<usize>,
    /// Whether there is anything to validate on; as the recipe says where `None`.
    pub validates: Option<bool>,
    /// Bytes that the process holds already.
    pub process: u64,
}

/// A base model, as far as sizes go.
#[derive(Debug)]
pub struct Base {
    config: ModelConfig,
    weights: Option<Weights>,
    assumed: Dtype,
}

impl Base {
    /// Reads the configuration of a model and, where there are any, the headers of its files.
    ///
    /// # Errors
    /// Neither can be read.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let weights = match Weights::open(path) {
            Err(WeightsError::NoWeights { .. }) => None,
            opened => Some(opened?),
        };
        let config = match &weights {
            Some(weights) => weights.config()?,
            None => ModelConfig::from_dir(path)?,
        };
        Ok(Self {
            config,
            weights,
            assumed: named_dtype(path),
        })
    }
}

/// The type that `config.json` names; f32 where it names none.
fn named_dtype(dir: &Path) -> Dtype {
    let text = std::fs::read_to_string(dir.join("config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let named = ["dtype", "torch_dtype"];
    let named = named.iter().find_map(|key| config.get(key)?.as_str());
    match named {
        Some("bfloat16") => Dtype::BF16,
        Some("float16") => Dtype::F16,
        _ => Dtype::F32,
    }
}

impl<'a> Planner<'a> {
    /// For a run whose data are known.
    pub fn of_run(run: &'a Prepared, platform: Platform) -> Self {
        let report = &run.dataset.report;
        Self {
            config: &run.config,
            weights: run.weights.as_ref(),
            assumed: Dtype::F32,
            new_tokens: run.new_tokens.clone(),
            platform,
            longest: (!report.streaming).then_some(report.longest),
            validates: Some(!run.dataset.validation.is_empty()),
            process: match platform.on_cpu {
                true => heap::in_use().unwrap_or(0),
                false => 0,
            },
        }
    }

    /// For a recipe alone: samples as long as they may be, each new token's text one token.
    pub fn of_base(base: &'a Base, plan: &Plan, platform: Platform) -> Self {
        let texts = plan.adapter.new_tokens.iter().flatten();
        let new_tokens = (base.config.vocab_size as u32..)
            .zip(texts)
            .map(|(id, _)| NewToken {
                id,
                pieces: Vec::new(),
            });
        Self {
            config: &base.config,
            weights: base.weights.as_ref(),
            assumed: base.assumed,
            new_tokens: new_tokens.collect(),
            platform,
            longest: None,
            validates: None,
            process: 0,
        }
    }

    /// Plans what a recipe asks for.
    ///
    /// # Errors
    /// All that is wrong with its adapters.
    pub fn plan(&self, plan: &Plan) -> Result<MemoryPlan, Vec<String>> {
        Ok(self.outlook(plan)?.plan(plan))
    }

    /// What a recipe makes of the model, whatever its rows are.
    ///
    /// # Errors
    /// As [`Planner::plan`].
    pub(super) fn outlook(&self, plan: &Plan) -> Result<Outlook<'_>, Vec<String>> {
        let adapter = choice::find(plan, self.config, &self.new_tokens)?;
        let outline = match &adapter {
            Some(choice) => Outline::new(self.config, &choice.config, &choice.modules),
            None => Outline::of_all(self.config),
        };
        let mut config = self.config.clone();
        config.vocab_size = outline.vocab_size;
        let in_f32 = |name: &str| choice::changes(adapter.as_ref(), self.config, name);
        let (precision, adapts) = (plan.train.precision, adapter.is_some());
        let keep = Keep {
            storage: choice::storage(precision, adapts, self.platform.reads_16_bits()),
            linears: plan.base.quantization.scheme(),
            gguf_blocks: plan.base.quantization == Quantization::Gguf,
            cached: None,
            in_f32: &in_f32,
        };
        let kept = kept_tensors(&config, keep, |name| match self.weights {
            Some(weights) => weights.dtype(name),
            None => Some(self.assumed),
        });
        Ok(Outlook {
            planner: self,
            adapter: adapter.map(|choice| choice.config),
            config,
            outline,
            kept,
        })
    }
}

/// A model with a recipe's adapters.
pub(super) struct Outlook<'a> {
    planner: &'a Planner<'a>,
    /// `None` where all weights train.
    adapter: Option<AdapterConfig>,
    /// The base's, with the tokens that the recipe adds.
    config: ModelConfig,
    outline: Outline,
    /// The tensors of the base as they will be kept.
    kept: Vec<KeptTensor>,
}

impl MemoryPlan {
    /// The phases of the run itself, without the merge.
    fn of_run(&self) -> impl Iterator<Item = &PhaseBytes> {
        self.phases
            .iter()
            .filter(|found| found.phase != Phase::Merge)
    }

    /// The phase of the run that needs most.
    pub fn peak(&self) -> PhaseBytes {
        let mut peak = PhaseBytes {
            phase: Phase::Load,
            bytes: Bytes::default(),
        };
        for found in self.of_run() {
            if found.bytes.total() > peak.bytes.total() {
                peak = *found;
            }
        }
        peak
    }

    /// Bytes that the run needs at its peak.
    pub fn needed(&self) -> u64 {
        self.peak().bytes.total()
    }
}

impl Outlook<'_> {
    /// Plans a recipe that differs from the one it was made for in its rows at most.
    pub(super) fn plan(&self, plan: &Plan) -> MemoryPlan {
        let (kept, platform) = (&self.kept[..], self.planner.platform);
        let facts = Facts {
            config: &self.config,
            adapter: self.adapter.as_ref(),
            outline: &self.outline,
            forms: (kept.iter())
                .map(|tensor| (tensor.name.as_str(), tensor.form))
                .collect(),
            platform,
            freezes_a: plan.train.optimizer == Optimizer::LoraFa,
        };
        let process = Bytes::of(Kind::Process, self.planner.process);
        let moments = Bytes::of(Kind::Optimizer, moments(&facts, plan.train.optimizer));
        let resident = process + model_bytes(&facts, kept) + moments;
        let mut phases: Vec<PhaseBytes> = (loading(&facts, kept, platform).into_iter())
            .map(|(phase, bytes)| PhaseBytes {
                phase,
                bytes: process + bytes,
            })
            .collect();
        let mut push = |phase, bytes| phases.push(PhaseBytes { phase, bytes });
        let step = self.step(&facts, plan);
        let page = step::largest_block(&facts, self.rows(plan));
        push(Phase::Step, with_pool(resident + step.peak, page, platform));
        if let Some(bytes) = self.evaluation(&facts, plan) {
            push(Phase::Eval, with_pool(resident + bytes, page, platform));
        }
        push(Phase::Save, resident + saving(&facts, platform));
        if self.adapter.is_some() {
            push(Phase::Merge, merging(&facts, kept));
        }
        MemoryPlan {
            phases,
            on_host: step.on_host,
        }
    }

    /// The largest step. Where it is left to lorafit what is kept, that is a step of the largest
    /// micro-batch, or of the largest of which everything is kept.
    fn step(&self, facts: &Facts, plan: &Plan) -> StepBytes {
        let (train, rows) = (&plan.train, self.rows(plan));
        let accumulates = train.gradient_accumulation_steps > 1;
        let on_cpu = self.planner.platform.on_cpu;
        let retain = |tokens| Retain::planned(train, facts.config, tokens, on_cpu);
        let largest = step::training(facts, rows, retain(rows.tokens), accumulates);
        let packed = plan.data.packing != Packing::Off;
        if retain(rows.tokens) == Retain::Graphs || retain(1) != Retain::Graphs || packed {
            return largest;
        }
        let (mut kept, mut again) = (1, rows.tokens);
        while again - kept > 1 {
            let middle = kept.midpoint(again);
            match retain(middle) {
                Retain::Graphs => kept = middle,
                _ => again = middle,
            }
        }
        let rows = Rows {
            tokens: kept,
            longest: rows.longest.min(kept),
        };
        let smaller = step::training(facts, rows, Retain::Graphs, accumulates);
        StepBytes {
            peak: largest.peak.larger(smaller.peak),
            ..largest
        }
    }

    /// Validation and samples; `None` where there are neither.
    fn evaluation(&self, facts: &Facts, plan: &Plan) -> Option<Bytes> {
        let data = &plan.data;
        let asked = !data.validation.is_empty() || data.validation_fraction > 0.0;
        let validates = self.planner.validates.unwrap_or(asked);
        let sample = &plan.sample;
        let samples = !sample.prompts.is_empty();
        let text = samples.then(|| step::generation(facts, PROMPT + sample.max_new_tokens));
        let rows = validates.then(|| step::evaluation(facts, self.rows(plan)));
        [text, rows].into_iter().flatten().reduce(Bytes::larger)
    }

    /// The rows of the largest micro-batch; validation has the same.
    fn rows(&self, plan: &Plan) -> Rows {
        let data = &plan.data;
        let most = data.max_seq_len;
        let longest = self.planner.longest.unwrap_or(most).clamp(1, most);
        let row = match data.packing {
            Packing::On | Packing::Wrap => most,
            Packing::Off => longest,
        };
        Rows {
            tokens: plan.train.micro_batch_size * row,
            longest,
        }
    }
}

/// Tokens of a prompt of some length.
const PROMPT: usize = 256;

/// What the model takes once it is loaded and its adapters are in.
fn model_bytes(facts: &Facts, kept: &[KeptTensor]) -> Bytes {
    let base = kept.iter().map(|tensor| tensor.bytes).sum();
    let is_base = |name: &str| facts.forms.contains_key(name);
    let trained = facts.outline.trained.iter();
    let added = trained
        .filter(|(name, _)| !is_base(name))
        .chain(&facts.outline.frozen);
    let size = |shape: &Vec<usize>| shape.iter().map(|n| *n as u64).product::<u64>() * F32;
    let mut adapters: u64 = added.map(|(_, shape)| size(shape)).sum();
    if facts.outline.unties
        && !facts
            .outline
            .trained
            .contains_key(&format!("{}.weight", names::HEAD))
    {
        // A head that lost a part to its adapter.
        adapters += size(&vec![facts.outline.vocab_size, facts.config.hidden_size]);
    }
    Bytes::of(Kind::Base, base) + Bytes::of(Kind::Adapters, adapters)
}

/// What the optimizer keeps of each tensor that trains: two moments in f32, or in 8 bits, which are in the
/// host's memory.
fn moments(facts: &Facts, optimizer: Optimizer) -> u64 {
    let in_8_bits = |bytes: u64| {
        let n = (bytes / F32) as usize;
        match (n < moments_8bit::FEWEST, facts.platform.on_cpu) {
            (true, _) => 2 * bytes,
            (false, true) => Moments8::bytes_of(n) as u64,
            (false, false) => 0,
        }
    };
    match optimizer {
        Optimizer::Adamw | Optimizer::LoraFa => 2 * facts.gradients(),
        Optimizer::Adamw8bit => {
            let trained = facts.outline.trained.keys();
            let gradients = trained.filter_map(|name| facts.gradient(name));
            gradients.map(in_8_bits).sum()
        }
    }
}

/// The largest size while the base is read tensor by tensor, and while its matrices are quantised; with
/// what making the adapters needs.
fn loading(facts: &Facts, kept: &[KeptTensor], platform: Platform) -> Vec<(Phase, Bytes)> {
    let mut base = 0;
    let mut load = Bytes::default();
    let mut quantise = None;
    for tensor in kept {
        base += tensor.bytes;
        // A GPU's tensors are converted in the host's memory.
        let beside = if platform.on_cpu { tensor.loading } else { 0 };
        let here = Bytes::of(Kind::Base, base) + Bytes::of(Kind::Workspace, beside);
        match tensor.form {
            Form::Quantised(_) => {
                quantise = Some(quantise.unwrap_or(Bytes::default()).larger(here));
            }
            Form::Dense(_) | Form::Blocks => load = load.larger(here),
        }
    }
    let all = model_bytes(facts, kept);
    load = load.larger(all + Bytes::of(Kind::Workspace, making_adapters(facts, kept)));
    let quantise = quantise.map(|bytes| (Phase::Quantise, bytes));
    [Some((Phase::Load, load)), quantise]
        .into_iter()
        .flatten()
        .collect()
}

/// What putting the adapters in needs: DoRA's row lengths take a matrix in f32; PiSSA and OLoRA hold what
/// is left of all matrices beside the matrices, and take one apart in f64.
fn making_adapters(facts: &Facts, kept: &[KeptTensor]) -> u64 {
    let Some(config) = facts.adapter else {
        return 0;
    };
    let adapted = |tensor: &&KeptTensor| {
        let path = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        facts
            .outline
            .trained
            .contains_key(&format!("{path}.lora_a"))
    };
    let sizes = kept.iter().filter(adapted).map(|tensor| tensor.len() * F32);
    let largest = sizes.clone().max().unwrap_or(0);
    match (config.taken_out(), config.use_dora) {
        (Some(_), _) => sizes.sum::<u64>() + 2 * largest,
        (None, true) => 2 * largest,
        (None, false) => 0,
    }
}

/// What writing what trains needs: copies of one tensor at a time for a run state, and of all of an
/// adapter for the result. On a GPU they are in the host's memory.
fn saving(facts: &Facts, platform: Platform) -> Bytes {
    if !platform.on_cpu {
        return Bytes::default();
    }
    let sizes = facts.outline.trained.keys();
    let sizes = sizes.filter_map(|name| facts.gradient(name));
    let largest = sizes.clone().max().unwrap_or(0);
    let all = match facts.adapter {
        Some(_) => sizes.sum(),
        None => 0,
    };
    Bytes::of(Kind::Workspace, all + 2 * largest)
}

/// The merged model in f32, or the base with its adapter: one at a time, and the logits of both.
fn merging(facts: &Facts, kept: &[KeptTensor]) -> Bytes {
    let base: u64 = kept.iter().map(|tensor| tensor.len() * F32).sum();
    let adapters = model_bytes(facts, kept)[Kind::Adapters];
    let probe = 64 * facts.outline.vocab_size as u64 * F32;
    Bytes::of(Kind::Base, base)
        + Bytes::of(Kind::Adapters, adapters)
        + Bytes::of(Kind::Logits, 3 * probe)
}

/// A GPU's memory comes in pages as large as the largest block of a step, of which the last is seldom
/// full, and one of 8 MiB for what is tiny (cubecl's adaptive pool). Weights lie apart.
fn with_pool(bytes: Bytes, page: u64, platform: Platform) -> Bytes {
    match platform.on_cpu {
        true => bytes,
        false => bytes + Bytes::of(Kind::Workspace, page + (8 << 20)),
    }
}
