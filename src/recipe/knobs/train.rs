//! Knobs of training, samples and the run directory.

use super::super::schema::Initial::RunsRecipeName;
use super::super::schema::{Kind, Knob};
use super::*;

pub(super) const KNOBS: &[Knob] = &[
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
        "train.gradient_checkpointing",
        Kind::Choice(&[
            (
                "none",
                "all activations, which is fastest",
            ),
            (
                "block",
                "the input of each block, which is computed again on the way back: a fraction of the memory, about a third more time",
            ),
            (
                "auto",
                "as `block` where the activations of a micro-batch would take more than about 1 GiB, else as `none`",
            ),
        ]),
        "auto",
        "What is kept between the forward and the backward pass. The numbers are the same, bit for bit, and a run may go on with another setting.",
    )
    .elsewhere(&[
        "activation_checkpointing",
        "enable_activation_checkpointing",
        "use_gradient_checkpointing",
        "grad_checkpoint",
    ]),
    Knob::new(
        "train.offload_activations",
        Kind::Boolean,
        "false",
        "Hold the inputs of blocks, which `gradient_checkpointing` keeps, in the host's memory: less memory on a GPU, more time. Changes nothing on the CPU.",
    )
    .elsewhere(&[
        "activation_offloading",
        "enable_activation_offloading",
        "offload_to_cpu",
    ]),
    Knob::new(
        "train.optimizer",
        Kind::Choice(&[
            ("adamw", "AdamW, as torch has it"),
            (
                "adamw_8bit",
                "the same with its moments in 8 bits (arXiv 2110.02861, bitsandbytes' blocks of 256 and code books): a quarter of the optimizer's memory, none of a GPU's, which sends gradients and weights through the host instead; tensors of fewer than 4096 numbers keep theirs in f32",
            ),
            (
                "lora_fa",
                "A of the adapters is frozen, B trains by a projected gradient (LoRA-FA, arXiv 2308.03303), as PEFT's `create_lorafa_optimizer` does it: half the optimizer's memory",
            ),
        ]),
        "adamw",
        "What turns gradients into steps.",
    )
    .elsewhere(&["optim", "optimizer_type", "opt"]),
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
        "train.loraplus_lr_embedding",
        Kind::Real(POSITIVE, ONE),
        "1e-6",
        "Peak learning rate of the embedding's adapter under LoRA+; without it, where `train.loraplus_lr_ratio` is 1, that of the others.",
    ),
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
        "train.precision",
        Kind::Choice(&[
            ("auto", "f32 where all weights train, else the base's own type"),
            ("f32", "32 bits; multiplied in f32"),
            (
                "bf16",
                "16 bits; multiplied in bf16 where that is faster (AMX on Intel's processors, AVX512-BF16 on AMD's, tensor cores for bf16 on GPUs), in f32 elsewhere",
            ),
            (
                "f16",
                "16 bits; multiplied in f32; the loss is scaled, and steps whose gradients overflow are skipped, as by torch's GradScaler",
            ),
        ]),
        "auto",
        "Type in which the frozen matrices of the base are kept. Sums, norms, routers and all that trains are f32 in any case, so bf16 and f16 cannot be combined with `adapter.method: full`.",
    )
    .elsewhere(&["bf16", "fp16", "dtype", "torch_dtype"]),
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
