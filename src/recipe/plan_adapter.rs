//! The resolved recipe's adapter.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
    /// Which of them do not after all.
    pub exclude_modules: Option<TargetModules>,
    /// Parameters that carry an adapter though they are no linear layer's.
    pub target_parameters: Option<Vec<String>>,
    /// Layer indices that carry adapters; all when `None`.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Module pattern → rank, first match wins (order of the recipe).
    pub rank_pattern: Vec<(String, usize)>,
    /// Module pattern → alpha, first match wins (order of the recipe).
    pub alpha_pattern: Vec<(String, f64)>,
    /// Scale by `alpha / sqrt(rank)` (arXiv 2312.03732).
    pub use_rslora: bool,
    /// Whether rows of adapted weights have lengths of their own (DoRA, arXiv 2402.09353).
    pub use_dora: bool,
    /// The first values of the adapters.
    pub init_lora_weights: InitMethod,
    /// Which biases train beside the adapters.
    pub bias: TrainedBias,
    /// Ends of the paths of modules that train whole.
    pub modules_to_save: Option<Vec<String>>,
    /// Texts that become tokens, whose rows of the embedding and the output head train.
    pub new_tokens: Option<Vec<String>>,
    /// Ids of tokens whose rows train.
    pub trainable_token_indices: Option<Vec<usize>>,
    /// A PEFT adapter directory to train on from; its configuration replaces the knobs above.
    pub init_from: Option<PathBuf>,
}

/// How weights are adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterMethod {
    /// Low-rank adapters (arXiv 2106.09685).
    Lora,
    /// Vectors around shared random factors (VeRA, arXiv 2310.11454).
    Vera,
    /// All weights train.
    Full,
}

/// The first values of adapters, as PEFT's `init_lora_weights` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitMethod {
    /// A uniform, B zero.
    #[default]
    Kaiming,
    /// A normal, B zero.
    Gaussian,
    /// The principal singular vectors, which the base loses (PiSSA, arXiv 2404.02948).
    Pissa,
    /// The first columns of a QR decomposition, which the base loses (OLoRA, arXiv 2406.01775).
    Olora,
}

/// Which biases of the base train beside the deltas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainedBias {
    /// None.
    #[default]
    None,
    /// All that the model has.
    All,
    /// Those of the layers that carry a delta.
    LoraOnly,
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
