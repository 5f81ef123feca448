//! `base.quantization: gguf`: models trained on a GGUF file's own blocks are those of its dequantised
//! weights.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use half::{bf16, f16};
use lorafit::model::kept::{Form, KeptTensor, kept_tensors};
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Keep, Storage, Tokens};
use lorafit::quant::blocks::BlockKind;
use lorafit::random::Stream;

use crate::fixture::{Ran, Workspace};
use crate::gguf::{text, write_value};
use crate::reference::{distance, flat, tolerance};
use lorafit::quant::gguf::Value;

const HIDDEN: usize = 256;
const LAYERS: usize = 2;
const VOCABULARY: usize = 512;

/// Where each kind's f16 factors lie in a block, and values with which weights are small and spread
/// around zero.
fn factors(kind: BlockKind) -> &'static [(usize, f32)] {
    match kind {
        BlockKind::F32 | BlockKind::F16 | BlockKind::Bf16 => &[],
        BlockKind::Q8_0 => &[(0, 7e-4)],
        BlockKind::Q4_0 => &[(0, 1e-2)],
        BlockKind::Q4_1 => &[(0, 1e-2), (2, -7.5e-2)],
        BlockKind::Q5_0 => &[(0, 5e-3)],
        BlockKind::Q5_1 => &[(0, 5e-3), (2, -7.75e-2)],
        BlockKind::Q2K => &[(80, 5e-3), (82, 7.5e-3)],
        BlockKind::Q3K => &[(108, 1e-3)],
        BlockKind::Q4K => &[(0, 2e-4), (2, 1.5e-3)],
        BlockKind::Q5K => &[(0, 1e-4), (2, 1.55e-3)],
        BlockKind::Q6K => &[(208, 4e-5)],
    }
}

/// Random blocks.
fn blocks(kind: BlockKind, values: usize, stream: &Stream) -> Vec<u8> {
    let normal = |i: usize| (0.05 * stream.normal(i as u64)) as f32;
    match kind {
        BlockKind::F32 => (0..values).flat_map(|i| normal(i).to_le_bytes()).collect(),
        BlockKind::F16 => (0..values)
            .flat_map(|i| f16::from_f32(normal(i)).to_le_bytes())
            .collect(),
        BlockKind::Bf16 => (0..values)
            .flat_map(|i| bf16::from_f32(normal(i)).to_le_bytes())
            .collect(),
        _ => {
            let bytes = values / kind.block_len() * kind.block_bytes();
            let mut out: Vec<u8> = (0..bytes as u64).map(|i| stream.bits(i) as u8).collect();
            for (n, block) in out.chunks_exact_mut(kind.block_bytes()).enumerate() {
                for (at, factor) in factors(kind) {
                    let spread = 0.5 + (n % 8) as f32 / 8.0;
                    let factor = f16::from_f32(factor * spread).to_le_bytes();
                    block[*at..*at + 2].copy_from_slice(&factor);
                }
            }
            out
        }
    }
}

/// A model of random blocks of every kind that is read, in turn from the `first` on.
fn write_model(architecture: &str, first: usize, to: &Path) {
    let wide = 2 * HIDDEN;
    let mut tensors: Vec<(String, Vec<usize>, BlockKind)> = vec![
        (
            "token_embd.weight".into(),
            vec![VOCABULARY, HIDDEN],
            BlockKind::Q8_0,
        ),
        (
            "output.weight".into(),
            vec![VOCABULARY, HIDDEN],
            BlockKind::Q6K,
        ),
        ("output_norm.weight".into(), vec![HIDDEN], BlockKind::F32),
    ];
    let mut kinds = BlockKind::ALL.iter().cycle().skip(first);
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize], kind| {
            tensors.push((format!("blk.{layer}.{name}"), shape.to_vec(), kind));
        };
        for norm in ["attn_norm.weight", "ffn_norm.weight"] {
            add(norm, &[HIDDEN], BlockKind::F32);
        }
        for (name, shape) in [
            ("attn_q.weight", [HIDDEN, HIDDEN]),
            ("attn_k.weight", [HIDDEN / 2, HIDDEN]),
            ("attn_v.weight", [HIDDEN / 2, HIDDEN]),
            ("attn_output.weight", [HIDDEN, HIDDEN]),
            ("ffn_gate.weight", [wide, HIDDEN]),
            ("ffn_up.weight", [wide, HIDDEN]),
            ("ffn_down.weight", [HIDDEN, wide]),
        ] {
            add(name, &shape, *kinds.next().unwrap());
        }
        if architecture == "qwen2" {
            for (name, rows) in [("q", HIDDEN), ("k", HIDDEN / 2), ("v", HIDDEN / 2)] {
                add(&format!("attn_{name}.bias"), &[rows], BlockKind::F32);
            }
        }
    }
    fs::write(to, gguf_file(architecture, &tensors)).unwrap();
}

fn gguf_file(architecture: &str, tensors: &[(String, Vec<usize>, BlockKind)]) -> Vec<u8> {
    let size = |n: usize| Value::Unsigned(n as u64);
    let own = |key: &str| format!("{architecture}.{key}");
    let metadata = [
        (
            "general.architecture".into(),
            Value::String(architecture.into()),
        ),
        (own("context_length"), size(128)),
        (own("embedding_length"), size(HIDDEN)),
        (own("feed_forward_length"), size(2 * HIDDEN)),
        (own("block_count"), size(LAYERS)),
        (own("attention.head_count"), size(4)),
        (own("attention.head_count_kv"), size(2)),
        (own("attention.layer_norm_rms_epsilon"), Value::Float(1e-5)),
    ];
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in &metadata {
        text(&mut out, key);
        write_value(&mut out, value);
    }
    let (mut data, stream) = (Vec::new(), Stream::new(3));
    for (i, (name, shape, kind)) in tensors.iter().enumerate() {
        let id = (0..64)
            .find(|id| BlockKind::from_id(*id) == Ok(*kind))
            .unwrap();
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        out.extend(shape.iter().rev().flat_map(|n| (*n as u64).to_le_bytes()));
        out.extend(id.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        let mut bytes = blocks(*kind, shape.iter().product(), &stream.split(i as u64));
        if name.ends_with("norm.weight") {
            bytes = [1f32; HIDDEN]
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect();
        }
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}

#[test]
fn logits_are_those_of_the_dequantised_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    // The first linear layers, q and k, have other kinds each time.
    for (architecture, first) in [("llama", 0), ("llama", 5), ("llama", 9), ("qwen2", 3)] {
        write_model(architecture, first, &path);
        let weights = Weights::open(&path).unwrap();
        let keep = |gguf_blocks: bool| Keep {
            storage: Storage::AsStored,
            gguf_blocks,
            ..Keep::default()
        };
        let config = || weights.config().unwrap();
        let load = |gguf_blocks: bool| {
            let keep = keep(gguf_blocks);
            CausalLm::load_as(&weights, config(), &Device::flex(), keep).unwrap()
        };
        let ids: Vec<i32> = (0..80).map(|i| i * 37 % VOCABULARY as i32).collect();
        let tokens = Tokens {
            ids: &ids,
            batch: 2,
            positions: None,
            segments: None,
        };
        let logits = |model: &CausalLm| flat(model.logits(model.hidden(tokens, None, None)));
        let (mut kept, mut whole) = (load(true), load(false));
        let quantised = kept.quantised_parameters();
        assert!(quantised > 0 && whole.quantised_parameters() == 0);
        let planned = kept_tensors(&config(), keep(true), |name| weights.dtype(name));
        let blocks = planned.iter().filter(|tensor| tensor.form == Form::Blocks);
        assert_eq!(
            blocks.clone().map(KeptTensor::len).sum::<u64>(),
            quantised as u64
        );
        assert!(
            blocks
                .into_iter()
                .all(|tensor| (tensor.bytes, tensor.loading) == (0, 0))
        );
        let want: Vec<f64> = logits(&whole).into_iter().map(f64::from).collect();
        let off = distance(&logits(&kept), &want);
        assert!(off <= tolerance::LOGITS, "{architecture} {first}: {off}");
        let spread = want.iter().fold(0f64, |most, x| most.max(x.abs()));
        assert!(
            (0.1..1e3).contains(&spread),
            "the logits say something: {spread}"
        );
    }
}

/// A workspace whose base is a directory with a GGUF file and a tokenizer.
fn workspace(architecture: &str) -> Workspace {
    let workspace = Workspace::new();
    for name in ["model.safetensors", "config.json"] {
        fs::remove_file(workspace.path("base").join(name)).unwrap();
    }
    write_model(architecture, 4, &workspace.path("base/model.gguf"));
    workspace
}

fn train(workspace: &Workspace, quantization: &str) -> Ran {
    let (how, out) = (
        format!("base.quantization={quantization}"),
        format!("output_dir={quantization}"),
    );
    let args = [
        "train",
        "recipe.yaml",
        "--json",
        "--set",
        &how,
        "--set",
        &out,
    ];
    workspace.run(&args).exits(0)
}

fn losses(ran: &Ran) -> Vec<f64> {
    let events = ran.events().into_iter();
    let steps = events.filter(|event| event["event"] == "step");
    steps.map(|event| event["loss"].as_f64().unwrap()).collect()
}

#[test]
fn a_run_on_blocks_is_the_run_on_the_dequantised_file() {
    for architecture in ["llama", "qwen2"] {
        let workspace = workspace(architecture);
        let (kept, whole) = (train(&workspace, "gguf"), train(&workspace, "none"));
        let (got, want) = (losses(&kept), losses(&whole));
        assert_eq!(got.len(), 4);
        for (got, want) in got.iter().zip(&want) {
            // Products of the same numbers, summed in another order, over four steps.
            assert!(
                (got - want).abs() <= 1e-4 * want,
                "{architecture}: {got} {want}"
            );
        }
        let parameters = |ran: &Ran| ran.event("start")["parameters"].clone();
        assert_eq!(parameters(&kept), parameters(&whole));
    }
}

#[test]
fn both_bases_of_a_merge_are_the_blocks() {
    let workspace = workspace("llama");
    train(&workspace, "gguf");
    let merge = |precision: &str| {
        let args = [
            "merge",
            "gguf",
            "--base-precision",
            precision,
            "--out",
            precision,
        ];
        let ran = workspace.run(&args).exits(0);
        assert!(
            ran.err.contains("original and quantized are the same"),
            "{}",
            ran.err
        );
        fs::read(workspace.path(precision).join("model.safetensors")).unwrap()
    };
    assert_eq!(merge("original"), merge("quantized"));
    let args = [
        "generate",
        "--base",
        "base",
        "--adapter",
        "gguf/adapter",
        "--quantization",
        "gguf",
        "--prompt",
        "Define Year.",
        "--max-new-tokens",
        "2",
    ];
    workspace.run(&args).exits(0);
}

#[test]
fn a_base_without_blocks_is_refused() {
    let workspace = Workspace::new();
    let check = ["check", "recipe.yaml", "--set", "base.quantization=gguf"];
    let parts = ["base.quantization", "GGUF file", "base.model", "nf4"];
    workspace.run(&check).fails(2, &parts);
    let base = ["--base", "base", "--quantization", "gguf"];
    let generate = [&["generate", "--prompt", "Hm."], &base[..]].concat();
    workspace
        .run(&generate)
        .fails(1, &["base", "not a GGUF file"]);
    workspace.run(&["train", "recipe.yaml", "--quiet"]).exits(0);
    let merge = [
        &["merge", "--adapter", "run/adapter", "--out", "merged"],
        &base[..],
    ]
    .concat();
    workspace.run(&merge).fails(2, &["base", "not a GGUF file"]);
}
