//! The resolved recipe: what the rest of lorafit reads.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything a run needs, with every default written out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The model that is trained from.
    pub base: BasePlan,
    /// What it is trained on.
    pub data: DataPlan,
    /// Which weights train.
    pub adapter: AdapterPlan,
    /// How they train.
    pub train: TrainPlan,
    /// Texts written before, during and after training.
    pub sample: SamplePlan,
    /// The run directory.
    pub output_dir: PathBuf,
}

/// The base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BasePlan {
    /// A directory with `config.json` and safetensors, a `.gguf` file, or a Hugging Face model id.
    pub model: String,
    /// Branch, tag or commit of a Hugging Face model id.
    pub revision: String,
    /// Where the first weights come from.
    pub init: BaseInit,
}

/// Where the base model's weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BaseInit {
    /// From the model's weight files.
    Pretrained,
    /// Drawn at random from `train.seed` and the configuration's `initializer_range`;
    /// needs only `config.json` and a tokenizer, and `adapter.method: full`.
    Random,
}

/// The dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataPlan {
    /// Training files.
    pub train: Vec<PathBuf>,
    /// Format of the rows.
    pub format: DataFormat,
    /// Validation files; empty when the split is a fraction or there is none.
    pub validation: Vec<PathBuf>,
    /// Share of the training rows held out for validation, in `[0, 1)`.
    pub validation_fraction: f64,
    /// Longest sample in tokens; longer ones are cut on the right and counted.
    pub max_seq_len: usize,
    /// Whether prompts train too, not only assistant turns.
    pub train_on_inputs: bool,
    /// A Jinja chat template file that replaces the model's own.
    pub chat_template: Option<PathBuf>,
    /// Whether the rows are shuffled, anew in each epoch, by `train.seed`.
    pub shuffle: bool,
}

/// Format of dataset rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// Told from the keys of the first row.
    Auto,
    /// `{"messages": [{"role": …, "content": …}, …]}`
    Messages,
    /// `{"instruction": …, "input": …, "output": …}`
    Alpaca,
    /// `{"text": …}`
    Text,
}

/// Which weights train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterPlan {
    /// LoRA adapters or all weights.
    pub method: AdapterMethod,
    /// Rank R of the adapters.
    pub rank: usize,
    /// LoRA alpha; the scaling is `alpha / rank`, or `alpha / sqrt(rank)` with `use_rslora`.
    pub alpha: f64,
    /// Probability with which an element of an adapter's input is dropped in training.
    pub dropout: f64,
    /// Which linear layers carry an adapter.
    pub target_modules: TargetModules,
    /// Layer indices that carry adapters; all when `None`.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Module pattern → rank, first match wins (order of the recipe).
    pub rank_pattern: Vec<(String, usize)>,
    /// Module pattern → alpha, first match wins (order of the recipe).
    pub alpha_pattern: Vec<(String, f64)>,
    /// Scale by `alpha / sqrt(rank)` (arXiv 2312.03732).
    pub use_rslora: bool,
    /// A PEFT adapter directory to train on from; its configuration replaces the knobs above.
    pub init_from: Option<PathBuf>,
}

/// How weights are adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterMethod {
    /// Low-rank adapters (arXiv 2106.09685).
    Lora,
    /// All weights train.
    Full,
}

/// Which linear layers carry an adapter, with PEFT's meaning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `all-linear` (every linear layer but the output head), or a regular expression that
    /// matches a whole module path.
    Pattern(String),
    /// Module names, matched against the end of the module path.
    Names(Vec<String>),
}

/// How the weights train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainPlan {
    /// Samples in one forward/backward.
    pub micro_batch_size: usize,
    /// Micro-batches in one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate over the run.
    pub lr_scheduler: LrScheduler,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: Option<usize>,
    /// Share of all steps that warm up, when `warmup_steps` is not given.
    pub warmup_ratio: f64,
    /// Passes over the training rows, when `max_steps` is not given.
    pub num_epochs: f64,
    /// Optimizer steps; replaces `num_epochs`.
    pub max_steps: Option<usize>,
    /// Gradients are scaled down to this global norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Decoupled weight decay; biases and norms are spared.
    pub weight_decay: f64,
    /// AdamW beta 1.
    pub adam_beta1: f64,
    /// AdamW beta 2.
    pub adam_beta2: f64,
    /// AdamW epsilon.
    pub adam_eps: f64,
    /// Seed of everything random.
    pub seed: u64,
    /// Steps between two log lines.
    pub logging_steps: usize,
    /// Steps between two evaluations on the validation split; 0 means at the end of the run only.
    pub eval_steps: usize,
    /// Steps between two run states; 0 means at the end of the run only.
    pub save_steps: usize,
    /// How many of the last run states are kept.
    pub save_total_limit: usize,
    /// Evaluations without improvement after which the run stops early; `None` never stops.
    pub early_stopping_patience: Option<usize>,
}

/// Learning-rate schedule after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduler {
    /// Stays at the peak.
    Constant,
    /// Falls to 0 in a straight line.
    Linear,
    /// Falls to 0 along half a cosine.
    Cosine,
}

/// Texts generated from fixed prompts before training, at evaluations and after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplePlan {
    /// User prompts; none means no samples.
    pub prompts: Vec<String>,
    /// Longest answer in tokens.
    pub max_new_tokens: usize,
    /// 0 picks the likeliest token.
    pub temperature: f64,
    /// Nucleus sampling: the smallest set of tokens with this total probability.
    pub top_p: f64,
}
