//! Planned against measured: runs of models with random weights whose peak is mostly tensors.
//!
//! The binary counts the large blocks of its heap, so that what is compared is what a user is told at the
//! end of a run.

use std::fmt::Write;
use std::fs;

use serde_json::{Value, json};

use crate::fixture::{Workspace, base_model};
use crate::random_model;

/// A run.
struct Case {
    name: &'static str,
    /// What sets its model apart.
    config: Value,
    /// Tokens in each row.
    tokens: usize,
    sets: &'static [&'static str],
}

/// The largest difference, as a share of what was measured.
const TOLERANCE: f64 = 0.10;

fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "f32",
            config: json!({}),
            tokens: 512,
            sets: &[
                "train.precision=f32",
                "train.gradient_checkpointing=none",
                "train.micro_batch_size=2",
            ],
        },
        Case {
            name: "bf16, block, packed",
            config: json!({}),
            tokens: 200,
            sets: &[
                "train.precision=bf16",
                "train.gradient_checkpointing=block",
                "data.packing=true",
                "data.max_seq_len=1024",
                "train.micro_batch_size=2",
            ],
        },
        Case {
            name: "nf4-double, block, long context",
            config: json!({}),
            tokens: 2048,
            sets: &[
                "base.quantization=nf4-double",
                "train.gradient_checkpointing=block",
                "data.max_seq_len=2048",
                "adapter.rank=32",
            ],
        },
        Case {
            name: "large vocabulary, tied",
            config: json!({"vocab_size": 98_304, "tie_word_embeddings": true, "num_hidden_layers": 2}),
            tokens: 256,
            sets: &["train.precision=f32", "train.gradient_checkpointing=none"],
        },
        Case {
            name: "embeddings trained",
            config: json!({"vocab_size": 24_576, "num_hidden_layers": 2}),
            tokens: 128,
            sets: &[
                "train.precision=bf16",
                "train.gradient_checkpointing=block",
                "adapter.modules_to_save=[embed_tokens, lm_head]",
                "train.gradient_accumulation_steps=2",
            ],
        },
        Case {
            name: "dropout, DoRA, accumulated",
            config: json!({}),
            tokens: 384,
            sets: &[
                "train.precision=bf16",
                "train.gradient_checkpointing=none",
                "adapter.dropout=0.1",
                "adapter.use_dora=true",
                "train.gradient_accumulation_steps=2",
            ],
        },
    ]
}

/// Smaller ones, as what computes in tests is a processor that passes for a GPU.
#[cfg(feature = "webgpu")]
fn gpu_cases() -> Vec<Case> {
    let small = json!({"num_hidden_layers": 2});
    let case = |name, tokens, sets| Case {
        name,
        config: small.clone(),
        tokens,
        sets,
    };
    vec![
        case(
            "GPU, f32",
            128,
            &[
                "train.precision=f32",
                "train.gradient_checkpointing=none",
                "train.micro_batch_size=2",
            ][..],
        ),
        case(
            "GPU, bf16, block, packed",
            60,
            &[
                "train.precision=bf16",
                "train.gradient_checkpointing=block",
                "data.packing=true",
                "data.max_seq_len=256",
            ],
        ),
        case(
            "GPU, nf4-double, block",
            256,
            &[
                "base.quantization=nf4-double",
                "train.gradient_checkpointing=block",
                "adapter.rank=32",
            ],
        ),
        case(
            "GPU, int8, none",
            192,
            &[
                "base.quantization=int8",
                "train.gradient_checkpointing=none",
            ],
        ),
        case(
            "GPU, embeddings trained",
            96,
            &[
                "train.precision=bf16",
                "train.gradient_checkpointing=block",
                "adapter.modules_to_save=[embed_tokens, lm_head]",
            ],
        ),
        case(
            "GPU, dropout, accumulated",
            128,
            &[
                "train.precision=bf16",
                "train.gradient_checkpointing=none",
                "adapter.dropout=0.1",
                "train.gradient_accumulation_steps=2",
            ],
        ),
    ]
}

/// A Llama of 512 columns.
fn config(changes: &Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "attention_bias": false, "mlp_bias": false, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 3, "hidden_size": 512, "head_dim": 64,
        "intermediate_size": 1536, "max_position_embeddings": 4096, "num_attention_heads": 8,
        "num_hidden_layers": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": false, "vocab_size": 8192, "initializer_range": 0.02,
    });
    let changes = changes.as_object().expect("an object").clone();
    config.as_object_mut().expect("an object").extend(changes);
    config
}

/// Planned and measured bytes of two steps.
pub fn measured(case_config: &Value, tokens: usize, sets: &[&str], device: &str) -> (f64, f64) {
    let workspace = Workspace::new();
    let base = workspace.path("wide");
    base_model(&base);
    fs::remove_file(base.join("model.safetensors")).unwrap();
    fs::write(base.join("config.json"), config(case_config).to_string()).unwrap();
    random_model::write(&base).unwrap();
    let mut rows = String::new();
    for row in 0..16 {
        let ids: Vec<usize> = (0..tokens).map(|i| 4 + (i * 7 + row * 13) % 500).collect();
        writeln!(rows, "{}", json!({"input_ids": ids, "labels": ids})).unwrap();
    }
    workspace.write("rows.jsonl", &rows);
    let max_seq_len = format!("data.max_seq_len={tokens}");
    let all = [
        "base.model=wide",
        "data.train=rows.jsonl",
        "data.format=tokens",
        "data.waive=[end_of_turn, bos, pad, stop_token]",
        "data.cache_limit=0",
        "adapter.rank=16",
        "train.micro_batch_size=1",
        "train.gradient_accumulation_steps=1",
        "train.max_steps=2",
        &max_seq_len,
    ];
    let mut args = vec!["train", "recipe.yaml", "--json", "--device", device];
    args.extend(all.iter().chain(sets).flat_map(|set| ["--set", set]));
    let done = workspace.run(&args).exits(0).event("done");
    let bytes = |key: &str| {
        done[key]
            .as_u64()
            .unwrap_or_else(|| panic!("{key} in {done}")) as f64
    };
    (bytes("memory_planned_bytes"), bytes("memory_peak_bytes"))
}

/// Runs cases, says what each took, and fails after the last if any was off.
fn compare(cases: Vec<Case>, device: &str) {
    let mut wrong = Vec::new();
    for case in cases {
        let (planned, peak) = measured(&case.config, case.tokens, case.sets, device);
        let off = planned / peak - 1.0;
        let line = format!(
            "{}: planned {:.1} MiB, measured {:.1} MiB, {:+.1} %",
            case.name,
            planned / 1048576.0,
            peak / 1048576.0,
            100.0 * off
        );
        eprintln!("{line}");
        if off.abs() > TOLERANCE {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn plans_are_within_a_tenth_of_what_runs_take() {
    compare(cases(), "cpu");
}

#[cfg(feature = "webgpu")]
#[test]
fn plans_for_a_gpu_are_within_a_tenth_too() {
    if crate::gpu::gpu_or_skip().is_some() {
        compare(gpu_cases(), "webgpu");
    }
}
