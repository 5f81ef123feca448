//! Every knob of a recipe, declared once: key, type and range, default, unit, effect.
//!
//! A test holds this table against the fields of [`Plan`](super::Plan).

use super::knob_words::{CLAUSE, FORMAT};
use super::schema::Edge::{With, Without};
use super::schema::Initial::{Required, RunsRecipeName};
use super::schema::{Edge, Kind, Knob};

/// Steps, epochs and the like: more than anyone trains, few enough for every computation.
const MANY: u64 = 1_000_000_000;
const POSITIVE: Edge = Without(0.0);
const ZERO: Edge = With(0.0);
const BELOW_ONE: Edge = Without(1.0);
const ONE: Edge = With(1.0);
const RANK: Kind = Kind::Integer(1, 65_536);
const ALPHA: Kind = Kind::Real(POSITIVE, With(1e6));

/// All knobs, in the order of a recipe.
pub static KNOBS: &[Knob] = &[
    // ---- base
    Knob::new(
        "base.model",
        Kind::Model,
        "",
        "The base model: a directory with `config.json` and safetensors, a `.gguf` file, or a Hugging Face model id.",
    )
    .initially(Required)
    .elsewhere(&[
        "base_model",
        "model_name",
        "model_name_or_path",
        "model_id",
        "checkpoint",
    ]),
    Knob::new(
        "base.revision",
        Kind::Text,
        "main",
        "Branch, tag or commit of a Hugging Face model id.",
    ),
    Knob::new(
        "base.init",
        Kind::Choice(&[
            ("pretrained", "from the model's weight files"),
            (
                "random",
                "drawn from `train.seed`; needs only `config.json` and a tokenizer, and `adapter.method: full`",
            ),
        ]),
        "pretrained",
        "Where the first weights come from.",
    ),
    // ---- data
    Knob::new(
        "data.train",
        Kind::List(&Kind::Source, 1),
        "",
        "Training data. JSON lines, JSON, CSV, TSV, Parquet or text, also gzip or zstd of these. A source that needs more than its path is a map of `path` with `format`, `weight` (how often an epoch sees each row; 0.5 is every other row), `fields` (`{messages: dialog}` where the rows' names differ), `sample_by` (text files: `line`, `paragraph` or `document`), and for the hub `config`, `split` and `revision`.",
    )
    .initially(Required)
    .elsewhere(&["dataset", "datasets", "train_file", "path", "data_files"]),
    Knob::new(
        "data.format",
        FORMAT,
        "auto",
        "Format of the rows, for sources that do not name their own.",
    )
    .elsewhere(&["type", "dataset_type"]),
    Knob::new(
        "data.validation",
        Kind::List(&Kind::Source, 0),
        "[]",
        "Validation data, given as `data.train` is.",
    )
    .elsewhere(&["eval", "test", "valid", "val", "validation_file"]),
    Knob::new(
        "data.validation_fraction",
        Kind::Real(ZERO, BELOW_ONE),
        "0",
        "Share of the training rows held out for validation, instead of files.",
    )
    .elsewhere(&["val_set_size", "validation_split", "test_size"]),
    Knob::new(
        "data.max_seq_len",
        Kind::Integer(2, 16_777_216),
        "1024",
        "Longest sample, and the length of packed rows. Memory grows with it.",
    )
    .counts("tokens")
    .elsewhere(&[
        "sequence_len",
        "max_length",
        "cutoff_len",
        "max_seq_length",
        "context_length",
        "block_size",
    ]),
    Knob::new(
        "data.truncate",
        Kind::Choice(&[
            ("right", "their end is cut off"),
            ("left", "their beginning is cut off, behind BOS"),
            ("drop", "they are left out"),
            ("fail", "they stop the run"),
        ]),
        "right",
        "What becomes of samples longer than `max_seq_len`; they are counted and shown.",
    )
    .elsewhere(&["truncation", "truncation_side", "overflow"]),
    Knob::new(
        "data.packing",
        Kind::Choice(&[
            ("false", "each sample is padded to the longest of its micro-batch"),
            (
                "true",
                "whole samples fill rows of `max_seq_len` tokens, none sees another",
            ),
            (
                "wrap",
                "all rows are full: a sample that does not fit goes on in the next row, where it no longer sees its beginning",
            ),
        ]),
        "false",
        "Whether several samples share a row: faster, with the same loss and gradients for the same samples. `train.micro_batch_size` counts rows then.",
    )
    .elsewhere(&["sample_packing", "pack", "packed", "neat_packing"]),
    Knob::new(
        "data.group_by_length",
        Kind::Boolean,
        "true",
        "Whether samples of like length share a micro-batch, which saves padding. Without packing only.",
    ),
    Knob::new(
        "data.train_on_inputs",
        Kind::Boolean,
        "false",
        "Whether system and user turns train too, not only assistant turns.",
    ),
    Knob::new(
        "data.chat_template",
        Kind::ChatTemplate,
        "null",
        "A chat template that replaces the model's own: a name (see recipes/chat_templates) or a Jinja file.",
    )
    .elsewhere(&["template", "conversation_template", "jinja_template", "chat_template_path"]),
    Knob::new(
        "data.shuffle",
        Kind::Boolean,
        "true",
        "Whether the rows are shuffled, anew in each epoch, by `train.seed`.",
    ),
    Knob::new(
        "data.streaming",
        Kind::Boolean,
        "false",
        "Whether rows are read and tokenised while training, without a first pass over the data and without a cache. Needs `train.max_steps`.",
    ),
    Knob::new(
        "data.shuffle_buffer",
        Kind::Integer(1, 100_000_000),
        "10000",
        "Rows that are held in memory and shuffled together when streaming.",
    )
    .counts("rows")
    .elsewhere(&["buffer_size", "shuffle_buffer_size"]),
    Knob::new(
        "data.on_bad_row",
        Kind::Choice(&[
            ("fail", "they stop the run, the first ten are shown"),
            ("skip", "they are left out, counted, and the first ten are shown"),
        ]),
        "fail",
        "What becomes of rows that cannot be read.",
    ),
    Knob::new(
        "data.waive",
        Kind::List(&CLAUSE, 0),
        "[]",
        "Clauses of the mask contract that this dataset need not keep.",
    ),
    Knob::new(
        "data.cache_dir",
        Kind::NewDirectory,
        "null",
        "Where tokenised datasets are kept; null means `lorafit` in the user's cache directory.",
    ),
    Knob::new(
        "data.cache_limit",
        Kind::Real(ZERO, With(1e6)),
        "20",
        "Most that is kept there, the least recently used going first; 0 keeps nothing.",
    )
    .counts("GiB"),
    // ---- adapter
    Knob::new(
        "adapter.method",
        Kind::Choice(&[
            ("lora", "low-rank adapters beside frozen weights"),
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
        "adapter.init_from",
        Kind::Directory,
        "null",
        "A PEFT adapter directory to train on from; its configuration replaces the knobs above.",
    )
    .elsewhere(&["lora_model_dir", "adapter_name_or_path"]),
    // ---- train
    Knob::new(
        "train.micro_batch_size",
        Kind::Integer(1, 65_536),
        "1",
        "Samples in one forward and backward pass. Memory grows with it.",
    )
    .counts("samples")
    .elsewhere(&[
        "batch_size",
        "per_device_train_batch_size",
        "train_batch_size",
    ]),
    Knob::new(
        "train.gradient_accumulation_steps",
        Kind::Integer(1, 1_048_576),
        "8",
        "Micro-batches in one optimizer step: a larger batch without more memory.",
    )
    .counts("micro-batches")
    .elsewhere(&["grad_accumulation_steps", "accumulation"]),
    Knob::new(
        "train.learning_rate",
        Kind::Real(POSITIVE, ONE),
        "2e-4",
        "Peak learning rate. The default suits LoRA; `adapter.method: full` usually wants about a tenth, 2e-5.",
    )
    .elsewhere(&["lr", "peak_lr", "max_lr"]),
    Knob::new(
        "train.loraplus_lr_ratio",
        Kind::Real(POSITIVE, With(1e6)),
        "1.0",
        "How many times the learning rate of A the B of an adapter has (LoRA+, arXiv 2402.12354, which recommends 16); 1 is plain LoRA.",
    )
    .elsewhere(&["loraplus_ratio", "lora_plus_ratio"]),
    Knob::new(
        "train.lr_scheduler",
        Kind::Choice(&[
            ("constant", "stays at the peak"),
            ("linear", "falls to 0 in a straight line"),
            ("cosine", "falls to 0 along half a cosine"),
        ]),
        "cosine",
        "Course of the learning rate after warm-up.",
    )
    .elsewhere(&["lr_scheduler_type", "scheduler", "schedule", "lr_schedule"]),
    Knob::new(
        "train.warmup_steps",
        Kind::Integer(0, MANY),
        "null",
        "Steps over which the learning rate rises from 0; replaces `warmup_ratio`.",
    )
    .counts("steps")
    .elsewhere(&["warmup", "num_warmup_steps"]),
    Knob::new(
        "train.warmup_ratio",
        Kind::Real(ZERO, BELOW_ONE),
        "0.03",
        "Share of all steps over which the learning rate rises from 0.",
    ),
    Knob::new(
        "train.num_epochs",
        Kind::Real(POSITIVE, With(1e6)),
        "1",
        "Passes over the training rows; need not be whole.",
    )
    .counts("epochs")
    .elsewhere(&["epochs", "num_train_epochs", "epoch"]),
    Knob::new(
        "train.max_steps",
        Kind::Integer(1, MANY),
        "null",
        "Optimizer steps of the run; replaces `num_epochs`.",
    )
    .counts("steps")
    .elsewhere(&["steps", "iters", "max_iters", "num_steps"]),
    Knob::new(
        "train.max_grad_norm",
        Kind::Real(ZERO, With(1e9)),
        "1.0",
        "Gradients are scaled down to this global norm; 0 turns clipping off.",
    )
    .elsewhere(&["gradient_clipping", "grad_clip", "clip"]),
    Knob::new(
        "train.weight_decay",
        Kind::Real(ZERO, With(10.0)),
        "0.0",
        "Decoupled weight decay; biases and norms are spared.",
    ),
    Knob::new(
        "train.adam_beta1",
        Kind::Real(ZERO, BELOW_ONE),
        "0.9",
        "AdamW: decay of the mean of the gradients.",
    )
    .elsewhere(&["beta1", "betas"]),
    Knob::new(
        "train.adam_beta2",
        Kind::Real(ZERO, BELOW_ONE),
        "0.999",
        "AdamW: decay of the mean of their squares.",
    )
    .elsewhere(&["beta2"]),
    Knob::new(
        "train.adam_eps",
        Kind::Real(POSITIVE, ONE),
        "1e-8",
        "AdamW: keeps the division by the root of the squares finite.",
    )
    .elsewhere(&["adam_epsilon", "eps", "epsilon"]),
    Knob::new(
        "train.seed",
        Kind::Integer(0, u64::MAX),
        "42",
        "Seed of everything random: adapters, shuffling, dropout, split, samples.",
    )
    .elsewhere(&["random_seed", "data_seed"]),
    Knob::new(
        "train.logging_steps",
        Kind::Integer(1, MANY),
        "1",
        "Steps between two log lines.",
    )
    .counts("steps")
    .elsewhere(&["steps_per_report", "log_every", "log_interval"]),
    Knob::new(
        "train.eval_steps",
        Kind::Integer(0, MANY),
        "0",
        "Steps between two evaluations; 0 means at the end of the run only.",
    )
    .counts("steps")
    .elsewhere(&["steps_per_eval", "eval_every", "eval_interval", "evals_per_epoch"]),
    Knob::new(
        "train.save_steps",
        Kind::Integer(0, MANY),
        "0",
        "Steps between two saved run states; 0 means only at the end and when interrupted.",
    )
    .counts("steps")
    .elsewhere(&["save_every", "saves_per_epoch", "checkpoint_steps"]),
    Knob::new(
        "train.save_total_limit",
        Kind::Integer(1, 1_000_000),
        "2",
        "How many of the last run states are kept, beside the best.",
    )
    .counts("run states"),
    Knob::new(
        "train.early_stopping_patience",
        Kind::Integer(1, 1_000_000),
        "null",
        "The run stops after this many evaluations without improvement; null never stops it. Needs validation rows and `eval_steps`.",
    )
    .counts("evaluations")
    .elsewhere(&["patience", "early_stopping"]),
    // ---- sample
    Knob::new(
        "sample.prompts",
        Kind::List(&Kind::Text, 0),
        "[]",
        "User prompts that the model answers before training, at evaluations and after; none means no samples.",
    )
    .elsewhere(&["prompt"]),
    Knob::new(
        "sample.max_new_tokens",
        Kind::Integer(1, 16_777_216),
        "48",
        "Longest answer.",
    )
    .counts("tokens")
    .elsewhere(&["max_tokens"]),
    Knob::new(
        "sample.temperature",
        Kind::Real(ZERO, With(100.0)),
        "0",
        "Randomness of the answer; 0 always picks the likeliest token.",
    )
    .elsewhere(&["temp"]),
    Knob::new(
        "sample.top_p",
        Kind::Real(POSITIVE, ONE),
        "1",
        "Draw from the smallest set of tokens with this total probability; 1 draws from all.",
    ),
    // ---- top
    Knob::new(
        "output_dir",
        Kind::NewDirectory,
        "",
        "The run directory: resolved recipe, metrics, run states, adapter. Never overwritten without being asked.",
    )
    .initially(RunsRecipeName)
    .elsewhere(&["out", "output", "out_dir", "adapter_path", "run_dir"]),
];
