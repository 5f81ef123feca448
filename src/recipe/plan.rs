//! The resolved recipe: what the rest of lorafit reads.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use super::plan_adapter::{AdapterMethod, AdapterPlan, InitMethod, TargetModules, TrainedBias};

use crate::quant::Scheme;

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
    /// How its linear layers are quantised.
    pub quantization: Quantization,
    /// Where quantised bases are kept; the user's cache directory when `None`.
    pub cache_dir: Option<PathBuf>,
    /// Most that is kept there, in GiB; 0 keeps nothing.
    pub cache_limit: f64,
}

/// How the linear layers of the base model are quantised as it is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantization {
    /// Not at all.
    #[default]
    None,
    /// 4 bits (QLoRA, arXiv 2305.14314).
    Nf4,
    /// 4 bits, with scales in 8 bits.
    Nf4Double,
    /// 8 bits, a scale for each row.
    Int8,
    /// As they are in the blocks of the base's GGUF file.
    Gguf,
}

impl Quantization {
    /// How lorafit quantises them itself, if it does.
    pub fn scheme(self) -> Option<Scheme> {
        match self {
            Self::None | Self::Gguf => None,
            Self::Nf4 => Some(Scheme::Nf4),
            Self::Nf4Double => Some(Scheme::Nf4Double),
            Self::Int8 => Some(Scheme::Int8),
        }
    }
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
    /// Training data.
    pub train: Vec<SourcePlan>,
    /// Format of the rows of sources that name none.
    pub format: DataFormat,
    /// Validation data; empty when the split is a fraction or there is none.
    pub validation: Vec<SourcePlan>,
    /// Share of the training rows held out for validation, in `[0, 1)`.
    pub validation_fraction: f64,
    /// Longest sample in tokens.
    pub max_seq_len: usize,
    /// What becomes of longer samples.
    pub truncate: Truncate,
    /// Whether several samples share a row of `max_seq_len` tokens.
    pub packing: Packing,
    /// Whether samples of like length are put into one micro-batch, when nothing is packed.
    pub group_by_length: bool,
    /// Whether prompts train too, not only assistant turns.
    pub train_on_inputs: bool,
    /// A chat template that replaces the model's own: a name, or a Jinja file.
    pub chat_template: Option<String>,
    /// Whether the rows are shuffled, anew in each epoch, by `train.seed`.
    pub shuffle: bool,
    /// Whether rows are read and tokenised while training, in bounded memory.
    pub streaming: bool,
    /// Rows that are held and shuffled together when streaming.
    pub shuffle_buffer: usize,
    /// What becomes of rows that cannot be read.
    pub on_bad_row: OnBadRow,
    /// Clauses of the mask contract that do not hold for this dataset.
    pub waive: Vec<Clause>,
    /// Where tokenised datasets are kept; the user's cache directory when `None`.
    pub cache_dir: Option<PathBuf>,
    /// Most that is kept there, in GiB; 0 keeps nothing.
    pub cache_limit: f64,
}

/// Rows from one place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourcePlan {
    /// A file, a directory, a pattern, or `hf://owner/name`.
    pub path: String,
    /// Format of its rows; the dataset's when `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DataFormat>,
    /// How often an epoch sees each of its rows.
    #[serde(default = "once", skip_serializing_if = "is_once")]
    pub weight: f64,
    /// lorafit's name of a field → the rows' own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fields: BTreeMap<String, String>,
    /// Configuration of a dataset of the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// Split of a dataset of the hub; `train` when `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Branch, tag or commit of a dataset of the hub; `main` when `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// What a row of a text file is.
    #[serde(default, skip_serializing_if = "SampleBy::is_line")]
    pub sample_by: SampleBy,
}

impl SourcePlan {
    /// A path with nothing else said.
    pub fn new(path: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            format: None,
            weight: 1.0,
            fields: BTreeMap::new(),
            config: None,
            split: None,
            revision: None,
            sample_by: SampleBy::Line,
        }
    }
}

fn once() -> f64 {
    1.0
}

fn is_once(weight: &f64) -> bool {
    *weight == 1.0
}

/// What a row of a text file is (`sample_by` of Hugging Face's `datasets`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SampleBy {
    /// A line.
    #[default]
    Line,
    /// Lines up to a blank one.
    Paragraph,
    /// The whole file.
    Document,
}

impl SampleBy {
    fn is_line(&self) -> bool {
        *self == Self::Line
    }
}

/// Format of dataset rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataFormat {
    /// Told from the keys of the first row.
    Auto,
    /// `{"messages": [{"role": …, "content": …}, …]}`
    Messages,
    /// `{"conversations": [{"from": …, "value": …}, …]}`
    Sharegpt,
    /// `{"instruction": …, "input": …, "output": …}`
    Alpaca,
    /// `{"prompt": …, "completion": …}`
    PromptCompletion,
    /// `{"text": …}`
    Text,
    /// `{"input_ids": …, "labels": …}`
    Tokens,
    /// `{"prompt": …, "chosen": …, "rejected": …}`
    Preference,
}

impl DataFormat {
    /// The name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::Alpaca => "alpaca",
            Self::PromptCompletion => "prompt_completion",
            Self::Text => "text",
            Self::Tokens => "tokens",
            Self::Preference => "preference",
        }
    }
}

/// What becomes of samples longer than `max_seq_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncate {
    /// Their end is cut off.
    Right,
    /// Their beginning is cut off, behind BOS.
    Left,
    /// They are left out.
    Drop,
    /// They stop the run.
    Fail,
}

impl std::fmt::Display for Truncate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Right => "right",
            Self::Left => "left",
            Self::Drop => "drop",
            Self::Fail => "fail",
        })
    }
}

/// Whether several samples share a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Packing {
    /// Each sample is a row of its own.
    #[serde(rename = "false")]
    Off,
    /// Whole samples fill rows.
    #[serde(rename = "true")]
    On,
    /// As [`Packing::On`], and what does not fit goes on in the next row.
    #[serde(rename = "wrap")]
    Wrap,
}

/// What becomes of rows that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRow {
    /// They stop the run.
    Fail,
    /// They are left out, counted and listed.
    Skip,
}

/// A clause of the mask contract: what must hold for each row that trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clause {
    /// Each trained turn ends with a labelled token on which generation stops.
    EndOfTurn,
    /// A row has one beginning-of-sequence token, where the model has one.
    Bos,
    /// The padding token carries no label anywhere.
    Pad,
    /// Something trains.
    Labels,
    /// The token that ends turns is what `generation_config.json` and the tokenizer say.
    StopToken,
}

impl Clause {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::EndOfTurn,
        Self::Bos,
        Self::Pad,
        Self::Labels,
        Self::StopToken,
    ];

    /// The name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndOfTurn => "end_of_turn",
            Self::Bos => "bos",
            Self::Pad => "pad",
            Self::Labels => "labels",
            Self::StopToken => "stop_token",
        }
    }
}

/// How the weights train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainPlan {
    /// Samples in one forward/backward.
    pub micro_batch_size: usize,
    /// Micro-batches in one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// What is kept between the forward and the backward pass.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Whether what blocks are computed again from is held in the host's memory.
    pub offload_activations: bool,
    /// Which rule turns gradients into steps.
    pub optimizer: Optimizer,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How many times the learning rate of A the B of a delta has (LoRA+).
    pub loraplus_lr_ratio: f64,
    /// Learning rate of the embedding's adapter where the ratio is not 1.
    pub loraplus_lr_embedding: f64,
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
    /// Type of the frozen matrices.
    pub precision: Precision,
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

/// What is kept between the forward and the backward pass; the numbers do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientCheckpointing {
    /// All activations.
    None,
    /// The input of each block, which is computed again.
    Block,
    /// All activations where they are small, else the inputs.
    Auto,
}

/// What turns gradients into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW (arXiv 1711.05101).
    Adamw,
    /// AdamW with moments in 8 bits (arXiv 2110.02861).
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// AdamW on B alone, with its gradient projected (LoRA-FA, arXiv 2308.03303).
    LoraFa,
}

/// Type in which the frozen matrices of the base are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// That of the base's files, f32 where all weights train.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
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
