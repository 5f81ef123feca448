//! Knobs of the base model and the dataset.

use super::super::knob_words::{CLAUSE, FORMAT};
use super::super::schema::Initial::Required;
use super::super::schema::{Kind, Knob};
use super::*;

pub(super) const KNOBS: &[Knob] = &[
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
    Knob::new(
        "base.quantization",
        Kind::Choice(&[
            ("none", "as `train.precision` says"),
            ("nf4", "4.5 bits a value (QLoRA, arXiv 2305.14314)"),
            ("nf4-double", "4.13 bits a value: NF4 whose scales are quantised too"),
            ("int8", "8 bits a value, a scale for each row (LLM.int8's storage, arXiv 2208.07339)"),
            (
                "gguf",
                "the blocks of the base's GGUF file, mapped as they are: nothing is converted or copied, and the adapter trains on exactly the weights that are served",
            ),
        ]),
        "none",
        "How the matrices of linear layers are kept, all but those of experts, routers and the output head. But for `gguf` they are quantised as they are loaded, one at a time. They are multiplied in the type of `train.precision`. On a GPU they lie quantised in its memory and are dequantised tile by tile as they are multiplied; the blocks of `gguf` stay in the host's and are dequantised and sent at each use.",
    )
    .elsewhere(&["load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type", "quantize"]),
    Knob::new(
        "base.cache_dir",
        Kind::NewDirectory,
        "null",
        "Where matrices that lorafit quantised are kept, to be mapped by the next run; null means `lorafit` in the user's cache directory.",
    ),
    Knob::new(
        "base.cache_limit",
        Kind::Real(ZERO, With(1e6)),
        "40",
        "Most that is kept there, the least recently used going first; 0 keeps nothing.",
    )
    .counts("GiB"),
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
];
