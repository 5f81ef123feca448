//! Models of every architecture, converted as llama.cpp's converter does, read as the models they
//! were.
//!
//! `converted.json` holds what the converter itself made of the goldens (`scripts/gguf_reference.py`):
//! configuration, metadata, each tensor's shape and checksum, and gguf-py's names. The files that are
//! read here are checked against it, tensor by tensor.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use lorafit::export::merged::{MergeJob, merge};
use lorafit::export::model::{DEFAULT_SHARD_SIZE, SaveDtype};
use lorafit::model::config::{ModelConfig, RopeScaling};
use lorafit::model::gguf::config_json;
use lorafit::model::weights::{Weights, check};
use lorafit::model::{CausalLm, Tokens};
use lorafit::quant::gguf::Value as Metadatum;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::gguf::Rewritten;
use crate::reference::{Tensors, distance, flat, own, tolerance};
use crate::weights::Random;

/// The goldens by name, as the converter had them.
fn converted() -> BTreeMap<String, Value> {
    let text = fs::read(own().join("converted.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// Writes the golden with the configuration that the converter had. A layer whose feed-forward layer
/// the golden has otherwise gets that of layer 0.
fn write_golden(name: &str, entry: &Value, to: &Path) {
    let golden = Weights::open(&own().join("models").join(name)).unwrap();
    let tensors: Vec<(&String, Vec<usize>, Vec<u8>)> = entry["names"]
        .as_object()
        .unwrap()
        .keys()
        .map(|key| {
            let first = key.replace(".1.mlp.", ".0.mlp.");
            let from = golden.shape(key).map_or(first.as_str(), |_| key);
            let values = golden.read_f32(from).unwrap();
            let bytes = values.iter().flat_map(|value| value.to_le_bytes());
            (key, golden.shape(from).unwrap().to_vec(), bytes.collect())
        })
        .collect();
    let views = tensors.iter().map(|(key, shape, bytes)| {
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        (key.as_str(), view)
    });
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(to.join("model.safetensors"), file).unwrap();
    fs::write(to.join("config.json"), entry["config"].to_string()).unwrap();
}

/// The GGUF name of a tensor, and its place in a stack of experts.
fn gguf_name(hf: &str, entry: &Value) -> (String, usize) {
    if let Some(name) = entry["names"][hf].as_str() {
        return (name.into(), 0);
    }
    let parts: Vec<&str> = hf.split('.').collect();
    let [_, _, layer, _, "experts", expert, matrix, field] = parts[..] else {
        panic!("no GGUF name for {hf}")
    };
    let matrix = match matrix {
        "w1" | "gate_proj" => "ffn_gate_exps",
        "w2" | "down_proj" => "ffn_down_exps",
        "w3" | "up_proj" => "ffn_up_exps",
        other => panic!("{other}"),
    };
    (
        format!("blk.{layer}.{matrix}.{field}"),
        expert.parse().unwrap(),
    )
}

/// What the converter does to a tensor's values.
fn gguf_values(hf: &str, mut values: Vec<f32>, entry: &Value) -> Vec<f32> {
    let architecture = text(&entry["architecture"]);
    if architecture.starts_with("gemma") && hf.ends_with("norm.weight") {
        values.iter_mut().for_each(|value| *value += 1.0);
    }
    let heads = match hf {
        _ if architecture != "llama" => return values,
        _ if hf.contains("q_proj") => "num_attention_heads",
        _ if hf.contains("k_proj") => "num_key_value_heads",
        _ => return values,
    };
    let config = &entry["config"];
    let size = |key: &str| config[key].as_u64().map(|size| size as usize);
    let head_dim = size("head_dim")
        .unwrap_or_else(|| size("hidden_size").unwrap() / size("num_attention_heads").unwrap());
    // [heads, 2, Dh/2, columns] → [heads, Dh/2, 2, columns]
    let columns = values.len() / (size(heads).unwrap() * head_dim);
    let mut permuted = Vec::new();
    for head in values.chunks_exact(head_dim * columns) {
        let rows: Vec<&[f32]> = head.chunks_exact(columns).collect();
        for (first, second) in rows.iter().zip(&rows[head_dim / 2..]) {
            permuted.extend_from_slice(first);
            permuted.extend_from_slice(second);
        }
    }
    permuted
}

/// Shapes and values by place.
type Stack = BTreeMap<usize, (Vec<usize>, Vec<f32>)>;

/// The golden as a GGUF file, and the proof that llama.cpp's converter makes the same of it.
fn convert(entry: &Value, golden: &Weights) -> Rewritten {
    let mut stacks: BTreeMap<String, Stack> = BTreeMap::new();
    for hf in golden.names() {
        let (name, expert) = gguf_name(hf, entry);
        let values = gguf_values(hf, golden.read_f32(hf).unwrap(), entry);
        let shape = golden.shape(hf).unwrap().to_vec();
        stacks
            .entry(name)
            .or_default()
            .insert(expert, (shape, values));
    }
    let mut tensors: Vec<(String, Vec<u64>, Vec<f32>)> = Vec::new();
    for (name, stack) in stacks {
        let mut shape: Vec<u64> = stack[&0].0.iter().rev().map(|&size| size as u64).collect();
        if name.contains("_exps.") {
            shape.push(stack.len() as u64);
        }
        let values = stack.into_values().flat_map(|(_, values)| values);
        tensors.push((name, shape, values.collect()));
    }
    let expected = entry["tensors"].as_object().unwrap();
    for (name, computed) in expected {
        // The factors of rope, which the converter computes.
        if let Some(values) = computed[2].as_array() {
            let values: Vec<f32> = values.iter().map(|x| x.as_f64().unwrap() as f32).collect();
            tensors.push((name.clone(), vec![values.len() as u64], values));
        }
    }
    assert_eq!(tensors.len(), expected.len());
    for (name, shape, values) in &tensors {
        let outermost_first: Vec<u64> = shape.iter().rev().copied().collect();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(
            expected[name][0],
            serde_json::json!(outermost_first),
            "{name}"
        );
        assert_eq!(expected[name][1], crc32(&bytes), "{name}");
    }
    let metadata = entry["metadata"].as_object().unwrap().iter();
    let metadata = metadata.map(|(key, value)| (key.clone(), metadatum(value)));
    let mut file = Rewritten {
        metadata: metadata.collect(),
        tensors,
    };
    file.set("general.architecture", metadatum(&entry["architecture"]));
    file
}

fn metadatum(value: &Value) -> Metadatum {
    match value {
        Value::String(text) => Metadatum::String(text.clone()),
        value => match value.as_u64() {
            Some(n) => Metadatum::Unsigned(n),
            None => Metadatum::Float(value.as_f64().unwrap()),
        },
    }
}

/// CRC-32 of zip and zlib.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// Whether a tensor's values are the golden's; of Gemma's norms, but for the rounding of 1 + w, which
/// is half of 2^-22 where the sum is below 4.
fn equal(model: &str, tensor: &str, got: &[f32], want: &[f32]) -> bool {
    let shifted = model.starts_with("gemma") && tensor.ends_with("norm.weight");
    let tolerance = if shifted { 2f32.powi(-23) } else { 0.0 };
    got.len() == want.len()
        && (got.iter().zip(want)).all(|(got, want)| (got - want).abs() <= tolerance)
}

/// A golden as a directory and as a GGUF file.
struct Pair {
    dir: tempfile::TempDir,
    golden: Weights,
    file: Rewritten,
}

impl Pair {
    fn new(name: &str) -> Self {
        let entry = &converted()[name];
        let dir = tempfile::tempdir().unwrap();
        write_golden(name, entry, dir.path());
        let golden = Weights::open(dir.path()).unwrap();
        let file = convert(entry, &golden);
        Self { dir, golden, file }
    }

    /// Tensors equal the golden's, and so do logits with `expected` as the golden's configuration.
    fn agrees(&self, name: &str, weights: &Weights, expected: ModelConfig) {
        let config = weights.config().unwrap();
        check(weights, &config).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(weights.names().eq(self.golden.names()), "{name}");
        for tensor in weights.names() {
            assert_eq!(weights.shape(tensor), self.golden.shape(tensor), "{tensor}");
            let got = weights.read_f32(tensor).unwrap();
            let want = self.golden.read_f32(tensor).unwrap();
            assert!(equal(name, tensor, &got, &want), "{name}: {tensor}");
        }
        let golden = Tensors::open(&own().join("models").join(name).join("expected.safetensors"));
        let logits = |weights: &Weights, config: ModelConfig| -> Vec<f32> {
            let ids = golden.ints("input_ids");
            let tokens = Tokens {
                ids: &ids,
                batch: golden.shape("input_ids")[0],
                positions: None,
                segments: None,
            };
            let model = CausalLm::load(weights, config, &Device::flex()).unwrap();
            let hidden = model.body(model.embed(tokens), tokens, None, None);
            flat(model.logits(hidden))
        };
        let got = logits(weights, config);
        let want: Vec<f64> = (logits(&self.golden, expected).iter())
            .map(|&logit| f64::from(logit))
            .collect();
        let off = distance(&got, &want);
        assert!(off <= tolerance::LOGITS, "{name}: {off}");
        if !EDITED.contains(&name) {
            let off = distance(&got, &golden.floats("logits"));
            assert!(
                off <= tolerance::LOGITS,
                "{name}: off transformers' by {off}"
            );
        }
    }
}

/// Goldens that GGUF cannot express whole (see the script), whose logits are therefore not
/// transformers'.
const EDITED: [&str; 4] = ["gemma2", "gemma3_text", "mistral", "qwen3_moe"];

/// What the golden's configuration is once it went through GGUF.
fn expected_config(name: &str, pair: &Pair, found: &ModelConfig) -> ModelConfig {
    let text = fs::read_to_string(pair.dir.path().join("config.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    if name == "mistral" {
        // llama.cpp computes Mistral as a Llama, without its window.
        json["model_type"] = "llama".into();
        json["architectures"][0] = "LlamaForCausalLM".into();
    }
    json["initializer_range"] = found.initializer_range.into();
    ModelConfig::from_json(&json.to_string(), pair.dir.path()).unwrap()
}

#[test]
fn each_architecture_reads_as_the_model_it_was() {
    let names: Vec<String> = converted().into_keys().collect();
    assert!(names.len() >= 16, "{names:?}");
    for name in &names {
        let pair = Pair::new(name);
        let (_dir, weights) = pair
            .file
            .open()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = weights.config().unwrap();
        let golden = expected_config(name, &pair, &found);
        let mut expected = golden.clone();
        let json = config_json(weights.gguf().unwrap(), "float32");
        if let RopeScaling::Factors(_) = found.ropes[0].scaling {
            // Of Llama 3's scaling, contexts of published models are found again; 32 is none.
            let error = json.unwrap_err().to_string();
            assert!(error.contains("rope_freqs.weight"), "{error}");
            assert_eq!(name, "llama_rope_llama3");
            expected.ropes[0].scaling = found.ropes[0].scaling.clone();
        } else {
            let written = ModelConfig::from_json(&json.unwrap().to_string(), pair.dir.path());
            assert_eq!(written.unwrap(), found, "{name}: config.json");
        }
        assert_eq!(found, expected, "{name}");
        pair.agrees(name, &weights, golden);
    }
}

#[test]
fn experts_read_one_by_one_and_with_gate_and_up_in_one() {
    let mut pair = Pair::new("mixtral");
    let mut tensors = Vec::new();
    for (name, shape, values) in pair.file.tensors.drain(..) {
        let Some((matrix, field)) = name.split_once("_exps.") else {
            tensors.push((name, shape, values));
            continue;
        };
        let each = values.len() / shape[2] as usize;
        for (expert, values) in values.chunks_exact(each).enumerate() {
            let name = format!("{matrix}.{expert}.{field}");
            tensors.push((name, shape[..2].to_vec(), values.to_vec()));
        }
    }
    pair.file.tensors = tensors;
    let (_dir, weights) = pair.file.open().unwrap();
    let config = weights.config().unwrap();
    pair.agrees("mixtral", &weights, config);

    let mut pair = Pair::new("qwen3_moe");
    for layer in 0..2 {
        let mut take = |part: &str| {
            let name = format!("blk.{layer}.ffn_{part}_exps.weight");
            let at = pair
                .file
                .tensors
                .iter()
                .position(|(known, _, _)| *known == name);
            pair.file.tensors.remove(at.unwrap())
        };
        let ((_, shape, gates), (_, _, ups)) = (take("gate"), take("up"));
        let each = (shape[0] * shape[1]) as usize;
        let both = gates.chunks_exact(each).zip(ups.chunks_exact(each));
        let values = both.flat_map(|(gate, up)| [gate, up].concat()).collect();
        let name = format!("blk.{layer}.ffn_gate_up_exps.weight");
        let shape = vec![shape[0], 2 * shape[1], shape[2]];
        pair.file.tensors.push((name, shape, values));
    }
    let (_dir, weights) = pair.file.open().unwrap();
    let config = weights.config().unwrap();
    pair.agrees("qwen3_moe", &weights, config);
}

#[test]
fn merges_into_a_gguf_base_are_those_into_its_safetensors() {
    for (name, case) in [
        ("gemma2", "gemma2_lora"),
        ("mixtral", "mixtral_attention"),
        ("phi3", "phi3_fused"),
    ] {
        let pair = Pair::new(name);
        let (dir, _weights) = pair.file.open().unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(own().join("tokenizer").join(file), dir.path().join(file)).unwrap();
        }
        let outside = tempfile::tempdir().unwrap();
        let merged = |base: &Path, out: &str| {
            let job = MergeJob {
                base,
                adapter: &own().join("lora").join(case).join("adapter_final"),
                quantised: None,
                out: &outside.path().join(out),
                dtype: Some(SaveDtype::F32),
                shard_size: DEFAULT_SHARD_SIZE,
            };
            merge(&job, &mut |_| ()).unwrap_or_else(|error| panic!("{name}: {error}"));
            Weights::open(job.out).unwrap()
        };
        let got = merged(dir.path(), "of_gguf");
        let want = merged(pair.dir.path(), "of_safetensors");
        let config = got.config().unwrap();
        assert_eq!(config, expected_config(name, &pair, &config), "{name}");
        check(&got, &config).unwrap();
        assert!(got.names().eq(want.names()), "{name}");
        for tensor in got.names() {
            let (got, want) = (
                got.read_f32(tensor).unwrap(),
                want.read_f32(tensor).unwrap(),
            );
            assert!(equal(name, tensor, &got, &want), "{name}: {tensor}");
        }
    }
}

#[test]
fn a_stack_of_other_experts_than_the_metadata_says_is_a_fault() {
    let mut file = Pair::new("mixtral").file;
    file.set("llama.expert_count", Metadatum::Unsigned(3));
    let (_dir, weights) = file.open().unwrap();
    let error = check(&weights, &weights.config().unwrap())
        .unwrap_err()
        .to_string();
    let extra = "extra: model.layers.0.block_sparse_moe.experts.3.w1.weight [40, 32]";
    assert!(error.contains(extra), "{error}");
}

#[test]
fn damaged_files_of_each_kind_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut random = Random(17);
    for name in ["mixtral", "gemma3_text", "phi3_longrope"] {
        let file = Pair::new(name).file;
        let whole = file.bytes();
        let values: usize = file.tensors.iter().map(|(_, _, values)| values.len()).sum();
        let header = whole.len() - 4 * values;
        let mut opened = 0;
        for _ in 0..500 {
            let mut bytes = whole.clone();
            random.mutate(&mut bytes, header);
            fs::write(&path, &bytes).unwrap();
            if let Ok(weights) = Weights::open(&path) {
                opened += 1;
                for tensor in weights.names() {
                    weights.read_f32(tensor).unwrap();
                }
                let _ = check(&weights, &weights.config().unwrap());
                let _ = config_json(weights.gguf().unwrap(), "float32");
            }
        }
        assert!(
            opened > 10,
            "{name}: {opened} of the damaged files still open"
        );
    }
}

#[test]
fn what_the_metadata_says_of_windows_scores_and_rotation_is_heard() {
    let read = |name: &str, changes: &[(&str, Metadatum)]| {
        let mut file = Pair::new(name).file;
        for (key, value) in changes {
            file.set(key, value.clone());
        }
        file.open().unwrap().1.config().unwrap()
    };
    let windows = |config: &ModelConfig| -> Vec<Option<usize>> {
        config.layers.iter().map(|layer| layer.window).collect()
    };
    let pattern = "gemma3.attention.sliding_window_pattern";
    let three = read("gemma3_text", &[(pattern, Metadatum::Unsigned(3))]);
    assert_eq!(windows(&three), [Some(5), Some(5), None]);
    let ropes: Vec<Option<usize>> = three.layers.iter().map(|layer| layer.rope).collect();
    assert_eq!(ropes, [Some(1), Some(1), Some(0)]);
    let flags = [false, true, false].map(Metadatum::Bool).to_vec();
    let listed = read("gemma3_text", &[(pattern, Metadatum::Array(flags))]);
    assert_eq!(windows(&listed), [None, Some(5), None]);
    let window = "gemma3.attention.sliding_window";
    let full = read("gemma3_text", &[(window, Metadatum::Unsigned(0))]);
    assert_eq!(windows(&full), [None; 3]);
    assert_eq!(full.layers[0].rope, Some(0));

    // Gemma 2 27B: hidden_size / heads = 8, where heads are 12 wide.
    let large = read("gemma2", &[("gemma2.block_count", Metadatum::Unsigned(46))]);
    assert!((large.attention_scale - 8f64.powf(-0.5)).abs() < 1e-12);

    let rotary = "phi3.rope.dimension_count";
    let part = read("phi3", &[(rotary, Metadatum::Unsigned(6))]);
    assert_eq!((part.ropes[0].dim, part.head_dim), (6, 8));
}
