//! The one table of renames: GGUF tensors → Hugging Face's, PEFT keys ↔ module paths.
//!
//! A *module path* is Hugging Face's, such as `model.layers.0.self_attn.q_proj`; a tensor name is
//! a module path with `.weight` or `.bias`.

pub use super::adaptable::{Adaptable, adaptable};
use super::config::ModelConfig;
use super::families::{ExpertFiles, Family, MlpNames};

/// Modules of a block in GGUF, but its norms, which have names by what they stand before or after:
/// transformers, GGUF. Where gate and up are one, GGUF calls it by the second.
const BLOCK_MODULES: &[(&str, &str)] = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
];

/// The token embedding.
pub const EMBEDDING: &str = "model.embed_tokens";
/// The output head.
pub const HEAD: &str = "lm_head";
/// What the path of a block's module starts with, before the layer's index.
const BLOCK: &str = "model.layers.";
/// The same in GGUF.
const GGUF_BLOCK: &str = "blk.";

/// What PEFT puts before a module path: its wrapper and the model inside it.
const PEFT_PREFIX: &str = "base_model.model.";

/// The two factors of a low-rank delta `s·B·A`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LoraHalf {
    /// `[R, in]`, called `lora_A` on disk.
    A,
    /// `[out, R]`, called `lora_B` on disk.
    B,
}

impl LoraHalf {
    /// Both, A first.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// What PEFT puts after a module path.
    fn suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
        }
    }

    fn lambda_suffix(self) -> &'static str {
        match self {
            Self::A => ".vera_lambda_d",
            Self::B => ".vera_lambda_b",
        }
    }

    fn embedding_suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_embedding_A",
            Self::B => ".lora_embedding_B",
        }
    }
}

/// The tensors of Hugging Face's files that a GGUF tensor holds, equal parts of it in its order: one
/// for most; the matrices of all experts for a `stack` of them; none for a name that it does not know.
pub fn gguf_to_hf(family: &Family, name: &str, stack: Option<usize>) -> Vec<String> {
    let Some((module, field)) = split_field(name) else {
        return Vec::new();
    };
    let top = [
        (EMBEDDING, "token_embd"),
        (family.final_norm, "output_norm"),
        (HEAD, "output"),
    ];
    if let Some((hf, _)) = top.iter().find(|(_, gguf)| *gguf == module) {
        return vec![format!("{hf}.{field}")];
    }
    let Some((layer, part)) = module.strip_prefix(GGUF_BLOCK).and_then(split_layer) else {
        return Vec::new();
    };
    let in_block = |path: &str| in_files(family, &format!("{BLOCK}{layer}.{path}.{field}"));
    match block_module(family, part) {
        Some(module) => vec![in_block(module)],
        None => expert_matrices(family, part, stack)
            .into_iter()
            .map(|(expert, matrix)| in_block(&format!("mlp.experts.{expert}.{matrix}")))
            .collect(),
    }
}

/// The module of a block that GGUF calls `part`.
fn block_module(family: &Family, part: &str) -> Option<&'static str> {
    let norms = &family.norms;
    match part {
        "attn_norm" => norms.before_mixer,
        "post_attention_norm" => norms.after_mixer,
        "ffn_norm" => norms.before_mlp,
        "post_ffw_norm" => norms.after_mlp,
        "ffn_up" => Some(match family.mlp {
            MlpNames::Fused => "mlp.gate_up_proj",
            _ => "mlp.up_proj",
        }),
        _ => {
            let (hf, _) = BLOCK_MODULES.iter().find(|(_, gguf)| *gguf == part)?;
            Some(hf)
        }
    }
}

/// The matrices of experts, by expert and name in Hugging Face's files, that GGUF calls `part`:
/// stacked, or one by one in files from before April 2024.
fn expert_matrices(
    family: &Family,
    part: &str,
    stack: Option<usize>,
) -> Vec<(usize, &'static str)> {
    let ExpertFiles::Each { gate, up, down } = family.expert_files else {
        return Vec::new();
    };
    let one = |part: &str| match part {
        "ffn_gate" => Some(gate),
        "ffn_up" => Some(up),
        "ffn_down" => Some(down),
        _ => None,
    };
    let matrices = match (part.strip_suffix("_exps"), part.rsplit_once('.'), stack) {
        (Some("ffn_gate_up"), _, Some(_)) => vec![gate, up],
        (Some(part), _, Some(_)) => one(part).into_iter().collect(),
        (None, Some((part, expert)), None) => {
            return (one(part).into_iter())
                .filter_map(|matrix| Some((index(expert)?, matrix)))
                .collect();
        }
        _ => Vec::new(),
    };
    (0..stack.unwrap_or(0))
        .flat_map(|expert| matrices.iter().map(move |matrix| (expert, *matrix)))
        .collect()
}

/// Splits `a.b.weight` into `a.b` and `weight`.
fn split_field(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.')
        .filter(|(_, field)| matches!(*field, "weight" | "bias"))
}

/// Splits `12.rest` into 12 and `rest`.
fn split_layer(path: &str) -> Option<(usize, &str)> {
    let (layer, part) = path.split_once('.')?;
    Some((index(layer)?, part))
}

/// The number of a layer or expert. "007" and "+7" are not what any writer produces; they would make
/// two names one.
fn index(text: &str) -> Option<usize> {
    let index: usize = text.parse().ok()?;
    (index.to_string() == text).then_some(index)
}

/// The key under which PEFT stores one half of a module's adapter. The embedding's halves are those of
/// the transposed delta.
pub fn peft_key(module: &str, half: LoraHalf) -> String {
    match module == EMBEDDING {
        true => format!("{PEFT_PREFIX}{module}{}", half.embedding_suffix()),
        false => format!("{PEFT_PREFIX}{module}{}", half.suffix()),
    }
}

/// The module path and half that a PEFT key names, `None` for any other tensor.
pub fn parse_peft_key(key: &str) -> Option<(&str, LoraHalf)> {
    let rest = key.strip_prefix(PEFT_PREFIX)?;
    let halves = LoraHalf::BOTH.into_iter();
    let mut halves = halves.filter_map(|half| {
        let suffix = match rest.starts_with(EMBEDDING) {
            true => half.embedding_suffix(),
            false => half.suffix(),
        };
        Some((rest.strip_suffix(suffix)?, half))
    });
    halves.next().filter(|(module, _)| !module.is_empty())
}

/// The parameter that carries a delta at this path, where it is not a linear layer's in transformers 5:
/// an expert layer is a parameter itself, and a router holds its weight outside of a linear layer.
pub fn parameter_of(path: &str) -> Option<String> {
    if EXPERT_LAYERS.iter().any(|layer| path.ends_with(layer)) {
        return Some(path.to_string());
    }
    let is_router = ROUTERS.iter().any(|router| path.ends_with(router));
    is_router.then(|| format!("{path}.weight"))
}

/// The layers of all experts.
const EXPERT_LAYERS: [&str; 2] = [".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"];
/// Routers.
const ROUTERS: [&str; 2] = [".mlp.gate", ".mlp.router"];

/// The module under which PEFT keeps the delta at this path. Two parameters of one module nest: the
/// first one's delta lies in the `base_layer` of the second's.
pub fn peft_module(path: &str, carries: impl Fn(&str) -> bool) -> String {
    let [gate_up, down] = EXPERT_LAYERS;
    if let Some(block) = path.strip_suffix(gate_up) {
        let inner = match carries(&format!("{block}{down}")) {
            true => BASE_LAYER,
            false => "",
        };
        return format!("{block}.mlp.experts{inner}");
    }
    match path.strip_suffix(down) {
        Some(block) => format!("{block}.mlp.experts"),
        None => path.to_string(),
    }
}

/// The path of the delta that PEFT keeps under this module: the reverse of [`peft_module`].
pub fn delta_path(module: &str, carries: impl Fn(&str) -> bool) -> String {
    let [gate_up, down] = EXPERT_LAYERS;
    if let Some(block) = module.strip_suffix(".mlp.experts.base_layer") {
        return format!("{block}{gate_up}");
    }
    let Some(block) = module.strip_suffix(".mlp.experts") else {
        return module.to_string();
    };
    match carries(&format!("{block}{down}")) {
        true => format!("{block}{down}"),
        false => format!("{block}{gate_up}"),
    }
}

/// What a tensor of an adapter is to the base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeftTensor {
    /// Half of a module's delta.
    Half(String, LoraHalf),
    /// The lengths that DoRA gives the rows of a module's weight.
    Magnitude(String),
    /// The trained rows of a table of tokens.
    TokenRows(String),
    /// One of the factors that VeRA's modules share.
    Projection(LoraHalf),
    /// VeRA's vector of a module: λ_d beside A, λ_b beside B.
    Lambda(String, LoraHalf),
    /// A tensor of the base, by its name, that trained whole.
    Saved(String),
    /// A tensor of the base that PEFT writes beside an adapter of it.
    Frozen,
}

/// What PEFT puts after a module's path for DoRA.
const MAGNITUDE: &str = ".lora_magnitude_vector";
/// What PEFT puts between the path of a module that carries a delta and its own tensors.
const BASE_LAYER: &str = ".base_layer";

/// What PEFT puts after the path of a table of tokens for its trained rows.
const TOKEN_ROWS: &str = ".token_adapter.trainable_tokens_delta";

/// The key under which PEFT stores the trained rows of a table of tokens.
pub fn token_rows_key(module: &str) -> String {
    format!("{PEFT_PREFIX}{module}{TOKEN_ROWS}")
}

/// The key under which PEFT stores a module's magnitudes.
pub fn magnitude_key(module: &str) -> String {
    format!("{PEFT_PREFIX}{module}{MAGNITUDE}")
}

/// The key under which PEFT stores one of the factors that VeRA's modules share.
pub fn projection_key(half: LoraHalf) -> &'static str {
    match half {
        LoraHalf::A => "base_model.vera_A",
        LoraHalf::B => "base_model.vera_B",
    }
}

/// The key under which PEFT stores one of VeRA's vectors of a module.
pub fn lambda_key(module: &str, half: LoraHalf) -> String {
    format!("{PEFT_PREFIX}{module}{}", half.lambda_suffix())
}

/// The key under which PEFT stores a tensor of the base; `wrapped` where its module carries a delta.
pub fn saved_key(name: &str, wrapped: bool) -> String {
    match (wrapped, name.rsplit_once('.')) {
        (true, Some((module, field))) => format!("{PEFT_PREFIX}{module}{BASE_LAYER}.{field}"),
        _ => format!("{PEFT_PREFIX}{name}"),
    }
}

/// What a key of an adapter's file names, `None` for one that PEFT does not write.
pub fn parse_peft_tensor(key: &str) -> Option<PeftTensor> {
    if let Some((module, half)) = parse_peft_key(key) {
        return Some(PeftTensor::Half(module.to_string(), half));
    }
    if let Some(half) = (LoraHalf::BOTH.into_iter()).find(|half| projection_key(*half) == key) {
        return Some(PeftTensor::Projection(half));
    }
    let rest = key.strip_prefix(PEFT_PREFIX)?;
    if let Some(module) = rest.strip_suffix(TOKEN_ROWS) {
        return Some(PeftTensor::TokenRows(module.to_string()));
    }
    for half in LoraHalf::BOTH {
        if let Some(module) = rest.strip_suffix(half.lambda_suffix()) {
            return Some(PeftTensor::Lambda(module.to_string(), half));
        }
    }
    if let Some(module) = rest.strip_suffix(MAGNITUDE) {
        return Some(PeftTensor::Magnitude(module.to_string()));
    }
    let (module, field) = split_field(rest)?;
    match (module.strip_suffix(BASE_LAYER), field) {
        (Some(_), "weight") => Some(PeftTensor::Frozen),
        (Some(module), _) => Some(PeftTensor::Saved(format!("{module}.{field}"))),
        (None, _) => Some(PeftTensor::Saved(rest.to_string())),
    }
}

/// The path of block `layer`.
pub fn block(layer: usize) -> String {
    format!("{BLOCK}{layer}")
}

/// The index of the block that a module path lies in.
pub fn layer_of(module: &str) -> Option<usize> {
    split_layer(module.strip_prefix(BLOCK)?).map(|(layer, _)| layer)
}

/// A linear layer of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linear {
    /// Module path.
    pub path: String,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Whether there is a bias.
    pub bias: bool,
}

/// Every linear layer but the output head, in the model's order.
pub fn linears(config: &ModelConfig) -> Vec<Linear> {
    super::causal_lm::outline(config).linears
}

/// Every tensor of a model with its shape, in its order; a tied output head is not listed.
pub fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    super::causal_lm::outline(config).tensors
}

/// The module path of every linear layer but the output head, in the model's order.
pub fn linear_modules(config: &ModelConfig) -> Vec<String> {
    linears(config)
        .into_iter()
        .map(|linear| linear.path)
        .collect()
}

/// Path and `[out, in]` of every linear layer but the output head, in the model's order.
pub fn linear_shapes(config: &ModelConfig) -> Vec<(String, [usize; 2])> {
    linears(config)
        .into_iter()
        .map(|linear| (linear.path, [linear.out_features, linear.in_features]))
        .collect()
}

/// Whether transformers passes over a tensor of the files: frequencies in old ones, and the layers
/// that predict further tokens, which stand behind the last one or under `mtp`.
pub(super) fn is_passed_over(name: &str, layers: usize) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || name.starts_with("mtp.")
        || layer_of(name).is_some_and(|layer| layer >= layers)
}

/// How a family's files call a tensor of the model.
pub fn in_files(family: &Family, name: &str) -> String {
    let Some((block, part)) = name
        .strip_prefix(BLOCK)
        .and_then(|rest| rest.split_once('.'))
    else {
        return name.to_string();
    };
    let renamed = family.renames.iter().find_map(|(module, file)| {
        let rest = part.strip_prefix(module)?;
        Some(format!("{file}{rest}"))
    });
    let part = renamed.unwrap_or_else(|| part.to_string());
    format!("{BLOCK}{block}.{part}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families;

    #[test]
    fn gguf_names_become_hugging_faces() {
        let family = |model_type: &str| families::by_model_type(model_type).unwrap();
        let hf = |model_type: &str, name: &str| gguf_to_hf(family(model_type), name, None);
        for (family, gguf, expected) in [
            ("llama", "output.weight", "lm_head.weight"),
            (
                "llama",
                "blk.12.ffn_norm.weight",
                "model.layers.12.post_attention_layernorm.weight",
            ),
            (
                "gemma2",
                "blk.0.ffn_norm.weight",
                "model.layers.0.pre_feedforward_layernorm.weight",
            ),
            (
                "phi3",
                "blk.0.ffn_up.weight",
                "model.layers.0.mlp.gate_up_proj.weight",
            ),
            (
                "mixtral",
                "blk.3.ffn_gate_inp.weight",
                "model.layers.3.block_sparse_moe.gate.weight",
            ),
            (
                "mixtral",
                "blk.3.ffn_down.1.weight",
                "model.layers.3.block_sparse_moe.experts.1.w2.weight",
            ),
        ] {
            assert_eq!(hf(family, gguf), [expected]);
        }
        let fused: Vec<String> = ["0.gate_proj", "0.up_proj", "1.gate_proj", "1.up_proj"]
            .map(|matrix| format!("model.layers.0.mlp.experts.{matrix}.weight"))
            .to_vec();
        let name = "blk.0.ffn_gate_up_exps.weight";
        assert_eq!(gguf_to_hf(family("qwen3_moe"), name, Some(2)), fused);
        for unknown in [
            "rope_freqs.weight",
            "blk.x.attn_q.weight",
            "blk.01.attn_q.weight",
            "blk.0.post_ffw_norm.weight",
            "blk.0.ffn_down.+1.weight",
            "blk.0.ffn_down_exps.weight",
            "blk.0",
            "",
        ] {
            assert!(hf("llama", unknown).is_empty(), "{unknown}");
        }
    }

    #[test]
    fn peft_keys_go_there_and_back() {
        let module = "model.layers.3.mlp.up_proj";
        let key = peft_key(module, LoraHalf::B);
        assert_eq!(
            key,
            "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"
        );
        assert_eq!(parse_peft_key(&key), Some((module, LoraHalf::B)));
        assert_eq!(parse_peft_key("base_model.model.lm_head.weight"), None);
        assert_eq!(layer_of(module), Some(3));
        assert_eq!(layer_of("lm_head"), None);
    }
}
