//! Knobs of the adapter.

use super::super::schema::{Kind, Knob};
use super::*;

pub(super) const KNOBS: &[Knob] = &[
    // ---- adapter
    Knob::new(
        "adapter.method",
        Kind::Choice(&[
            ("lora", "low-rank adapters beside frozen weights"),
            (
                "vera",
                "two vectors for each adapted layer around random factors that all share (VeRA, arXiv 2310.11454): far fewer numbers, wants a rank of about 256 and ten times the learning rate",
            ),
            ("full", "all weights train; small models need it"),
        ]),
        "lora",
        "Which weights train.",
    )
    .elsewhere(&["peft_type", "type", "adapter", "fine_tune_type"]),
    Knob::new(
        "adapter.rank",
        RANK,
        "16",
        "Rank of the adapters: more rank learns more and takes more memory.",
    )
    .alias(&["r"])
    .elsewhere(&["lora_r", "lora_rank"]),
    Knob::new(
        "adapter.alpha",
        ALPHA,
        "32",
        "Strength of the adapters, which are scaled by `alpha / rank`.",
    )
    .elsewhere(&["lora_alpha", "scale", "scaling"]),
    Knob::new(
        "adapter.dropout",
        Kind::Real(ZERO, BELOW_ONE),
        "0",
        "Probability with which an element of an adapter's input is dropped in training.",
    )
    .elsewhere(&["lora_dropout"]),
    Knob::new(
        "adapter.target_modules",
        Kind::Targets,
        "all-linear",
        "Which linear layers carry an adapter: `all-linear` (all but the output head), module names such as `[q_proj, v_proj]`, or a regular expression that matches whole module paths.",
    )
    .elsewhere(&["lora_target_modules", "modules", "keys"]),
    Knob::new(
        "adapter.exclude_modules",
        Kind::Targets,
        "null",
        "Linear layers that carry no adapter although `target_modules` chooses them: names or a regular expression.",
    )
    .elsewhere(&["lora_exclude_modules"]),
    Knob::new(
        "adapter.target_parameters",
        Kind::List(&Kind::Text, 1),
        "null",
        "Parameters that carry an adapter though they are no linear layer's, by the ends of their names: `[mlp.experts.gate_up_proj, mlp.experts.down_proj]` for experts, `[gate.weight]` for routers. `all-linear` chooses them where PEFT does.",
    ),
    Knob::new(
        "adapter.layers_to_transform",
        Kind::List(&Kind::Integer(0, 65_535), 1),
        "null",
        "Numbers of the layers that carry adapters, counted from 0; null means all.",
    )
    .elsewhere(&["layers", "num_layers", "lora_layers"]),
    Knob::new(
        "adapter.rank_pattern",
        Kind::Patterns(&RANK),
        "{}",
        "Ranks of some modules: a map from a name or regular expression to a rank, first match wins.",
    ),
    Knob::new(
        "adapter.alpha_pattern",
        Kind::Patterns(&ALPHA),
        "{}",
        "Alphas of some modules: a map from a name or regular expression to an alpha, first match wins.",
    ),
    Knob::new(
        "adapter.use_rslora",
        Kind::Boolean,
        "false",
        "Scale by `alpha / sqrt(rank)`, which suits high ranks (arXiv 2312.03732).",
    )
    .elsewhere(&["rslora"]),
    Knob::new(
        "adapter.use_dora",
        Kind::Boolean,
        "false",
        "Give each row of an adapted weight a length of its own that trains (DoRA, arXiv 2402.09353): often better at low ranks, slower.",
    )
    .elsewhere(&["dora", "peft_use_dora"]),
    Knob::new(
        "adapter.init_lora_weights",
        Kind::Choice(&[
            ("kaiming", "A uniform, B zero: PEFT's `true`"),
            ("gaussian", "A normal, B zero"),
            (
                "pissa",
                "principal singular vectors, which the base loses (PiSSA, arXiv 2404.02948): often learns faster; takes minutes to start on a large model",
            ),
            (
                "olora",
                "first columns of a QR decomposition, which the base loses (OLoRA, arXiv 2406.01775)",
            ),
        ]),
        "kaiming",
        "First values of the adapters. An adapter of `pissa` or `olora` is saved as a plain one of twice the rank, for the base as it was.",
    )
    .elsewhere(&["init_weights", "pissa_init", "use_olora"]),
    Knob::new(
        "adapter.bias",
        Kind::Choice(&[
            ("none", "no biases"),
            ("lora_only", "those of the layers that carry an adapter"),
            ("all", "all that the model has"),
        ]),
        "none",
        "Which biases of the base train beside the adapters. They are saved with the adapter and stay on when it is switched off.",
    )
    .elsewhere(&["lora_bias", "train_bias"]),
    Knob::new(
        "adapter.modules_to_save",
        Kind::List(&Kind::Text, 1),
        "null",
        "Modules that train whole and are saved whole with the adapter, by the ends of their paths: `[lm_head, embed_tokens]`.",
    )
    .elsewhere(&["lora_modules_to_save", "additional_target"]),
    Knob::new(
        "adapter.new_tokens",
        Kind::List(&Kind::Text, 1),
        "null",
        "Texts that become tokens of their own, such as `[<tool>, </tool>]`. Only their rows of the embedding and the output head train; each begins as the mean of the tokens that it takes the place of. The adapter's tokenizer knows them, and so does the merged model.",
    )
    .elsewhere(&["tokens", "added_tokens", "add_tokens"]),
    Knob::new(
        "adapter.trainable_token_indices",
        Kind::List(&Kind::Integer(0, 16_777_215), 1),
        "null",
        "Ids of tokens whose rows of the embedding and the output head train, such as reserved ones that the chat template uses.",
    )
    .elsewhere(&["fix_untrained_tokens", "lora_trainable_tokens"]),
    Knob::new(
        "adapter.init_from",
        Kind::Directory,
        "null",
        "A PEFT adapter directory to train on from; its configuration replaces the knobs above.",
    )
    .elsewhere(&["lora_model_dir", "adapter_name_or_path"]),
];
