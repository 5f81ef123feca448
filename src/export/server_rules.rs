//! What each server makes of what an adapter can be: one table, each rule with its source.
//!
//! The versions are those of [`VERSIONS`](super::servers::VERSIONS). The rules of llama.cpp were also
//! tried, converter and library, on small models of each family: what it loads gave PEFT's logits up
//! to 2e-5, and what is marked as misread moved them by as much as the choice does. Of vLLM its check
//! of `adapter_config.json` was run; the rest, and MLX, was read in the sources alone.

use super::servers::{Adapter, Effect, Families, Rule, Verdict};
use Families::{All, Except, Only};

/// `MaxLoRARanks` of vLLM's `config/lora.py`; 16 unless told otherwise.
const VLLM_RANKS: [u64; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];

/// Initialisations of PEFT that leave the base as it is (`_init_is_supported` of vLLM's
/// `lora/peft_helper.py`).
const INIT_ALONE: [&str; 5] = ["gaussian", "eva", "orthogonal", "mica", "lora_ga"];

/// Families whose embedding takes an adapter in vLLM: `embedding_modules` of their classes in its
/// `model_executor/models`, the last five's in `transformers/base.py` there.
const VLLM_EMBEDDING: &[&str] = &[
    "llama",
    "mixtral",
    "phi3",
    "qwen3",
    "qwen3_moe",
    "qwen3_5_text",
    "granite",
    "cohere",
    "olmo2",
    "olmo3",
    "phi",
    "smollm3",
    "starcoder2",
];

/// Families whose output head takes an adapter in vLLM; from the same places.
const VLLM_HEAD: &[&str] = &[
    "llama",
    "mixtral",
    "phi3",
    "qwen3",
    "qwen3_moe",
    "qwen3_5_text",
    "granite",
];

/// Families of whose adapters llama.cpp's converter drops that on the head.
const GEMMA: &[&str] = &["gemma", "gemma2", "gemma3_text"];

const LOADS: Verdict = Verdict {
    effect: Effect::Loads,
    cell: "yes",
    why: "",
    remedy: merge,
};

const fn with(cell: &'static str, why: &'static str, remedy: fn(&Adapter) -> String) -> Verdict {
    Verdict {
        effect: Effect::LoadsWith,
        cell,
        why,
        remedy,
    }
}

const fn misreads(why: &'static str) -> Verdict {
    Verdict {
        effect: Effect::Misreads,
        cell: "**wrong**",
        why,
        remedy: merge,
    }
}

const fn refuses(why: &'static str) -> Verdict {
    Verdict {
        effect: Effect::Refuses,
        cell: "no",
        why,
        remedy: merge,
    }
}

const fn rule(
    choice: &'static str,
    families: Families,
    holds: fn(&Adapter) -> bool,
    [vllm, gguf]: [Verdict; 2],
) -> Rule {
    Rule {
        choice,
        families,
        holds,
        verdicts: [vllm, gguf, LOADS],
    }
}

const UNKNOWN: Verdict = refuses("there is no support for it");
const CONVERTER: Verdict = refuses("the converter takes lora_A and lora_B and nothing else");

const HEADS_ALONE: Verdict = refuses("it takes no whole modules but classification heads");

/// All rules; the first is about every adapter.
pub(super) static RULES: &[Rule] = &[
    // llama.cpp src/llama-adapter.cpp (general.type); mlx-lm tuner/utils.py load_adapters (num_layers).
    Rule {
        choice: "any adapter",
        families: All,
        holds: |_| true,
        verdicts: [
            LOADS,
            with("as GGUF", "they read adapters as GGUF alone", convert),
            refuses("mlx-lm reads only adapters of its own layout"),
        ],
    },
    // vLLM lora/peft_helper.py validate_legal; config/lora.py max_lora_rank.
    rule(
        "rank 17 to 512",
        All,
        |a| a.rank() > 16,
        [
            with(
                "with `--max-lora-rank`",
                "it takes ranks up to 16 unless told otherwise",
                max_rank,
            ),
            LOADS,
        ],
    ),
    // vLLM config/lora.py MaxLoRARanks.
    rule(
        "rank over 512",
        All,
        |a| a.rank() > 512,
        [
            refuses("512 is the most that it can be told to take"),
            LOADS,
        ],
    ),
    // llama.cpp convert_lora_to_gguf.py set_gguf_parameters (lora_alpha); src/llama-adapter.h get_scale.
    rule(
        "`alpha_pattern`",
        All,
        |a| a.sets("alpha_pattern"),
        [LOADS, misreads("they know one alpha for all modules")],
    ),
    // The same; vLLM lora/peft_helper.py _scaling.
    rule(
        "`use_rslora`",
        All,
        |a| a.sets("use_rslora"),
        [
            LOADS,
            Verdict {
                remedy: plain_scaling,
                ..misreads("they scale by alpha / rank all the same")
            },
        ],
    ),
    // vLLM lora/peft_helper.py _validate_features; llama.cpp convert_lora_to_gguf.py get_tensors.
    rule(
        "`use_dora`",
        All,
        |a| a.sets("use_dora"),
        [UNKNOWN, CONVERTER],
    ),
    // vLLM lora/peft_helper.py from_dict; llama.cpp convert_lora_to_gguf.py: both want lora_alpha.
    rule(
        "VeRA",
        All,
        |a| a.config["peft_type"] == "VERA",
        [UNKNOWN, UNKNOWN],
    ),
    // vLLM lora/peft_helper.py _init_is_supported; llama.cpp convert_lora_to_gguf.py does not look.
    rule(
        "PiSSA or OLoRA, not converted to LoRA",
        All,
        changes_base,
        [
            refuses("it serves the base unchanged"),
            misreads("they add the adapter to the base unchanged"),
        ],
    ),
    // vLLM lora/peft_helper.py validate_legal.
    rule("`bias`", All, |a| a.sets("bias"), [UNKNOWN, LOADS]),
    // llama.cpp convert_lora_to_gguf.py get_tensors: "Unexpected name '….base_layer.bias'".
    rule(
        "`bias` of a base that has biases",
        All,
        |a| a.has_biases,
        [LOADS, CONVERTER],
    ),
    // vLLM lora/peft_helper.py _validate_features; llama.cpp convert_lora_to_gguf.py get_tensors.
    rule(
        "`modules_to_save`",
        All,
        |a| a.sets("modules_to_save") && !saves_norms_alone(a),
        [HEADS_ALONE, CONVERTER],
    ),
    // The same lets norms pass; llama.cpp src/llama-adapter.cpp passes over them.
    rule(
        "`modules_to_save` of norms alone",
        All,
        |a| a.sets("modules_to_save") && saves_norms_alone(a),
        [HEADS_ALONE, misreads("they leave norms out")],
    ),
    // vLLM lora/utils.py parse_fine_tuned_lora_name; llama.cpp convert_lora_to_gguf.py get_tensors.
    rule(
        "`trainable_token_indices`",
        All,
        |a| a.sets("trainable_token_indices"),
        [UNKNOWN, CONVERTER],
    ),
    // vLLM lora/utils.py get_supported_lora_modules; lora/lora_model.py check_unexpected_modules.
    rule(
        "an adapter on `embed_tokens`",
        Except(VLLM_EMBEDDING),
        is_on_embedding,
        [
            refuses("it takes none on the embedding of this family"),
            LOADS,
        ],
    ),
    // llama.cpp src/llama-graph.cpp build_lora_mm: takes the pair of token_embd.weight; GGML_ASSERT.
    rule(
        "an adapter on an `embed_tokens` that is the head too",
        All,
        |a| is_on_embedding(a) && a.tied_head,
        [
            LOADS,
            refuses("they take it for the output head's and abort at the first token"),
        ],
    ),
    // vLLM, as for embed_tokens.
    rule(
        "an adapter on `lm_head`",
        Except(VLLM_HEAD),
        is_on_head,
        [
            refuses("it takes none on the output head of this family"),
            LOADS,
        ],
    ),
    // llama.cpp src/llama-adapter.cpp: "LoRA tensor 'output.weight' does not exist in base model".
    rule(
        "an adapter on an `lm_head` that is the embedding too",
        Except(GEMMA),
        |a| is_on_head(a) && a.tied_head,
        [LOADS, refuses("the head is no tensor of its own there")],
    ),
    // llama.cpp conversion/gemma.py filter_tensors.
    rule(
        "an adapter on `lm_head`",
        Only(GEMMA),
        is_on_head,
        [LOADS, misreads("the converter leaves it out")],
    ),
    // llama.cpp convert_lora_to_gguf.py get_tensors: PEFT saves the head with its bias.
    rule(
        "an adapter on `lm_head`",
        Only(&["phi"]),
        is_on_head,
        [LOADS, CONVERTER],
    ),
    // vLLM model_executor/models/mixtral.py (block_sparse_moe, where PEFT has mlp);
    // lora/model_manager.py activate_adapter skips what finds no module.
    rule(
        "adapters on experts or router",
        Only(&["mixtral"]),
        |a| is_on_experts(a) || is_on_router(a),
        [
            misreads("it has them under another name and leaves the adapters out"),
            LOADS,
        ],
    ),
    // vLLM lora/model_manager.py _validate_moe_lora_format; is_3d_moe_weight of models/gpt_oss.py.
    rule(
        "adapters on experts",
        Except(&["gpt_oss", "mixtral"]),
        is_on_experts,
        [
            with(
                "with `--enable-mixed-moe-lora-format`",
                "PEFT saves those of all experts as one, which it expects apart",
                mixed_format,
            ),
            LOADS,
        ],
    ),
    // llama.cpp convert_lora_to_gguf.py: "Can not map tensor", "Unprocessed experts".
    rule(
        "adapters on experts",
        All,
        is_on_experts,
        [
            LOADS,
            refuses("the converter cannot map PEFT's adapters on experts"),
        ],
    ),
    // llama.cpp conversion/deepseek.py and qwen.py split these; LoraTorchTensor: NotImplementedError.
    rule(
        "an adapter on `kv_b_proj` of deepseek_v3 or `in_proj_qkvz` of qwen3_next",
        All,
        |a| a.is_on(&["kv_b_proj", "in_proj_qkvz"]),
        [
            LOADS,
            refuses("the converter cannot take the adapter apart as it does the weight"),
        ],
    ),
];

fn is_on_embedding(adapter: &Adapter) -> bool {
    adapter.is_on(&["embed_tokens"])
}

fn is_on_head(adapter: &Adapter) -> bool {
    adapter.is_on(&["lm_head"])
}

/// On routed experts, whose parameters are called `….experts.down_proj`.
fn is_on_experts(adapter: &Adapter) -> bool {
    let mut modules = adapter.modules.iter();
    modules.any(|path| path.contains(".experts."))
}

fn is_on_router(adapter: &Adapter) -> bool {
    adapter.is_on(&["gate", "router"])
}

fn saves_norms_alone(adapter: &Adapter) -> bool {
    let saved = adapter.config["modules_to_save"].as_array();
    let mut names = saved.into_iter().flatten().filter_map(|name| name.as_str());
    names.all(|name| name == "norm" || name.contains("_layernorm"))
}

fn changes_base(adapter: &Adapter) -> bool {
    let init = adapter.config["init_lora_weights"].as_str();
    init.is_some_and(|init| !INIT_ALONE.contains(&init.to_lowercase().as_str()))
}

fn merge(_: &Adapter) -> String {
    "merge it (`lorafit merge`) and serve the merged model".to_owned()
}

fn convert(_: &Adapter) -> String {
    "convert it with llama.cpp's `convert_lora_to_gguf.py --base BASE ADAPTER`".to_owned()
}

fn max_rank(adapter: &Adapter) -> String {
    let limit = VLLM_RANKS.iter().find(|limit| **limit >= adapter.rank());
    limit.map_or_else(
        || merge(adapter),
        |limit| format!("serve with `--max-lora-rank {limit}`"),
    )
}

fn mixed_format(_: &Adapter) -> String {
    "serve with `--enable-mixed-moe-lora-format` and give the adapter as `--lora-modules \
     '{\"name\": …, \"path\": …, \"is_3d_lora_weight\": true}'`"
        .to_owned()
}

/// `alpha / √R = (alpha · √R) / R`: the same scaling without `use_rslora`, where R is one number.
fn plain_scaling(adapter: &Adapter) -> String {
    let alpha = adapter.config["lora_alpha"].as_f64();
    let (Some(alpha), false) = (alpha, adapter.sets("rank_pattern")) else {
        return merge(adapter);
    };
    let alpha = (alpha * (adapter.rank() as f64).sqrt() * 1e6).round() / 1e6;
    format!(
        "train with adapter.use_rslora: false and adapter.alpha: {alpha} (the same scaling), or {}",
        merge(adapter)
    )
}
