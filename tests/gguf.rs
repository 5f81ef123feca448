//! GGUF: block formats to the bit, a whole model under Hugging Face's names, damaged files.

use std::fs;

use lorafit::model::config::{ModelConfig, RopeScaling};
use lorafit::model::gguf::config_json;
use lorafit::model::weights::{Dtype, Weights, check};
use lorafit::quant::blocks::{BlockKind, dequantise};
use lorafit::quant::gguf::{GgufFile, Value};

use crate::reference::{own, part, reference};
use crate::weights::Random;

#[test]
fn each_block_format_dequantises_to_the_bit() {
    for kind in BlockKind::ALL {
        if kind == BlockKind::F32 {
            continue;
        }
        let Some(path) = part(&format!("quant/gguf/{}.safetensors", kind.name())) else {
            continue;
        };
        let file = fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let blocks = tensors.tensor("blocks").unwrap();
        let golden = tensors.tensor("dequantised").unwrap();
        let expected: Vec<u32> = golden
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| u32::from_le_bytes(*bytes))
            .collect();
        let mut values = vec![0f32; expected.len()];
        dequantise(kind, blocks.data(), &mut values);
        for (at, (value, expected)) in values.iter().zip(expected).enumerate() {
            assert_eq!(value.to_bits(), expected, "{} value {at}", kind.name());
        }
    }
}

#[test]
fn the_llama_golden_reads_under_hugging_faces_names() {
    let Some(path) = part("quant/gguf/llama.gguf") else {
        return;
    };
    let weights = Weights::open(&path).unwrap();
    let config = weights.config().unwrap();
    check(&weights, &config).unwrap_or_else(|error| panic!("{error}"));

    let original = reference().join("models/llama");
    let expected = ModelConfig {
        initializer_range: config.initializer_range,
        ..ModelConfig::from_dir(&original).unwrap()
    };
    assert_eq!(config, expected);

    let golden = reference().join("quant/gguf/llama_expected.safetensors");
    let golden = Weights::open(&golden).unwrap();
    let mut compared = 0;
    for stored in golden.names() {
        let Some(name) = stored.strip_prefix("dequantised.") else {
            continue;
        };
        let expected = golden.read_f32(stored).unwrap();
        assert_eq!(weights.read_f32(name).unwrap(), expected, "{name}");
        compared += 1;
    }
    assert_eq!(compared, 2, "q and k of layer 0 are in the golden");

    let dense = Weights::open(&original).unwrap();
    for name in weights.names() {
        let (got, want) = (
            weights.read_f32(name).unwrap(),
            dense.read_f32(name).unwrap(),
        );
        let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
        for (got, want) in got.iter().zip(want) {
            // Q8_0 rounds to 1/127 of a block's largest value.
            assert!((got - want).abs() <= largest / 127.0, "{name}");
        }
    }
    assert_eq!(weights.dtype("model.norm.weight"), Some(Dtype::F32));
    let q = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(weights.dtype(q), Some(Dtype::Quantised));
    assert!(weights.raw(q).unwrap().is_none());
}

#[test]
fn a_directory_with_one_gguf_is_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let golden = own().join("quant/gguf/llama.gguf");
    fs::copy(golden, dir.path().join("model.gguf")).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    assert!(weights.gguf().is_some());
    check(&weights, &weights.config().unwrap()).unwrap();
}

/// Metadata and tensors to be written as a GGUF file.
pub struct Rewritten {
    pub metadata: Vec<(String, Value)>,
    /// Name, shape innermost first, values.
    pub tensors: Vec<(String, Vec<u64>, Vec<f32>)>,
}

impl Rewritten {
    /// The golden without its tokenizer, all tensors in f32.
    fn golden() -> Self {
        let file = GgufFile::open(&own().join("quant/gguf/llama.gguf")).unwrap();
        let metadata = file.metadata.0.iter();
        let tensors = file.tensors.iter().map(|(name, tensor)| {
            let shape = tensor.shape.iter().rev().map(|&size| size as u64);
            (name.clone(), shape.collect(), file.read_f32(name).unwrap())
        });
        Self {
            metadata: metadata
                .filter(|(key, _)| !key.starts_with("tokenizer"))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            tensors: tensors.collect(),
        }
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(known, _)| known != key);
        self.metadata.push((key.into(), value));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            write_value(&mut out, value);
        }
        let mut offset = 0u64;
        for (name, shape, values) in &self.tensors {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            out.extend(shape.iter().flat_map(|size| size.to_le_bytes()));
            out.extend(0u32.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (4 * values.len() as u64).next_multiple_of(32);
        }
        for (_, _, values) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        out
    }

    pub fn open(&self) -> Result<(tempfile::TempDir, Weights), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        fs::write(&path, self.bytes()).unwrap();
        let weights = Weights::open(&path).map_err(|error| error.to_string())?;
        Ok((dir, weights))
    }
}

pub fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

pub fn write_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Unsigned(n) => {
            out.extend(10u32.to_le_bytes());
            out.extend(n.to_le_bytes());
        }
        // As llama.cpp's converter writes every number.
        Value::Float(x) => {
            out.extend(6u32.to_le_bytes());
            out.extend((*x as f32).to_le_bytes());
        }
        Value::Bool(b) => {
            out.extend(7u32.to_le_bytes());
            out.push((*b).into());
        }
        Value::String(s) => {
            out.extend(8u32.to_le_bytes());
            text(out, s);
        }
        Value::Array(flags) => {
            out.extend(9u32.to_le_bytes());
            out.extend(7u32.to_le_bytes());
            out.extend((flags.len() as u64).to_le_bytes());
            out.extend(
                flags
                    .iter()
                    .map(|flag| u8::from(*flag == Value::Bool(true))),
            );
        }
        other => panic!("not needed: {other:?}"),
    }
}

#[test]
fn rope_scaling_is_read_and_written_back() {
    let mut file = Rewritten::golden();
    file.set("llama.rope.scaling.type", Value::String("linear".into()));
    file.set("llama.rope.scaling.factor", Value::Float(2.5));
    let config = file.open().unwrap().1.config().unwrap();
    assert_eq!(config.ropes[0].scaling, RopeScaling::Linear { factor: 2.5 });

    file.set("llama.rope.scaling.type", Value::String("yarn".into()));
    file.set(
        "llama.rope.scaling.original_context_length",
        Value::Unsigned(32),
    );
    let config = file.open().unwrap().1.config().unwrap();
    match config.ropes[0].scaling.clone() {
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor: None,
            ..
        } => assert_eq!((factor, original_max_position_embeddings), (2.5, 32)),
        other => panic!("{other:?}"),
    }

    file.set("llama.rope.scaling.yarn_attn_factor", Value::Float(1.25));
    let config = file.open().unwrap().1.config().unwrap();
    let RopeScaling::Yarn {
        attention_factor, ..
    } = config.ropes[0].scaling
    else {
        panic!("{:?}", config.ropes[0].scaling)
    };
    assert_eq!(attention_factor, Some(1.25));

    file.set("llama.rope.scaling.type", Value::String("longrope".into()));
    let error = file.open().unwrap_err();
    assert!(
        error.contains("`llama.rope.scaling.type`: expected one of none, linear, yarn"),
        "{error}"
    );
}

#[test]
fn llama_3_frequency_factors_become_llama3_scaling_in_config_json() {
    // As convert_hf_to_gguf.py computes them for factor 8, original context 8192, theta 500000.
    let factors: Vec<f32> = (0..8)
        .map(|pair| {
            let wavelength = 2.0 * std::f64::consts::PI * 500_000f64.powf(pair as f64 / 8.0);
            match wavelength {
                short if short < 8192.0 / 4.0 => 1.0,
                long if long > 8192.0 => 8.0,
                middle => {
                    let smooth = (8192.0 / middle - 1.0) / 3.0;
                    (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32
                }
            }
        })
        .collect();
    let mut file = Rewritten::golden();
    file.set("llama.rope.freq_base", Value::Float(500_000.0));
    file.tensors
        .push(("rope_freqs.weight".into(), vec![8], factors.clone()));
    let (_dir, weights) = file.open().unwrap();
    let config = weights.config().unwrap();
    assert_eq!(config.ropes[0].scaling, RopeScaling::Factors(factors));
    check(&weights, &config).unwrap();
    let json = config_json(weights.gguf().unwrap(), "bfloat16").unwrap();
    assert_eq!(json["rope_scaling"]["rope_type"], "llama3");
    assert_eq!(json["rope_scaling"]["factor"], 8.0);
    let reread = ModelConfig::from_json(&json.to_string(), weights.path()).unwrap();
    assert!(matches!(
        reread.ropes[0].scaling,
        RopeScaling::Llama3 { .. }
    ));

    let last = file.tensors.last_mut().unwrap();
    last.2 = vec![1.0, 2.0, 3.0, 1.0, 5.0, 6.0, 7.0, 8.0];
    let (_dir, weights) = file.open().unwrap();
    let error = config_json(weights.gguf().unwrap(), "bfloat16").unwrap_err();
    assert!(error.to_string().contains("rope_freqs.weight"), "{error}");
}

#[test]
fn tied_heads_biases_and_surplus_tensors_are_seen() {
    let mut file = Rewritten::golden();
    file.tensors.retain(|(name, _, _)| name != "output.weight");
    let config = file.open().unwrap().1.config().unwrap();
    assert!(config.tie_word_embeddings);

    let bias: Vec<f32> = (0..64).map(|row| row as f32).collect();
    file.tensors
        .push(("blk.0.attn_q.bias".into(), vec![64], bias));
    let (_dir, weights) = file.open().unwrap();
    let config = weights.config().unwrap();
    assert!(config.qkv_bias);
    // [(pair, half)] → [(half, pair)] in a head of 16.
    let bias = weights
        .read_f32("model.layers.0.self_attn.q_proj.bias")
        .unwrap();
    assert_eq!(bias[..3], [0.0, 2.0, 4.0]);
    assert_eq!(bias[8..11], [1.0, 3.0, 5.0]);
    let error = check(&weights, &config).unwrap_err().to_string();
    assert!(
        error.contains("missing: model.layers.0.self_attn.k_proj.bias"),
        "{error}"
    );

    file.tensors
        .push(("blk.0.surplus.weight".into(), vec![1], vec![0.0]));
    let (_dir, weights) = file.open().unwrap();
    let error = check(&weights, &config).unwrap_err().to_string();
    assert!(error.contains("extra: blk.0.surplus.weight [1]"), "{error}");
}

#[test]
fn metadata_that_cannot_be_served_is_named() {
    for (key, value, expected) in [
        (
            "general.architecture",
            Value::String("mamba".into()),
            "`mamba` in a GGUF file is not supported; supported: llama, qwen2, qwen3, qwen3moe, \
             gemma, gemma2, gemma3, phi3; other families",
        ),
        (
            "llama.expert_count",
            Value::Unsigned(8),
            "`llama.expert_used_count`: expected a whole number, found nothing",
        ),
        (
            "split.count",
            Value::Unsigned(2),
            "llama-gguf-split --merge",
        ),
        (
            "llama.block_count",
            Value::Bool(true),
            "`llama.block_count`: expected a whole number",
        ),
        (
            "llama.attention.key_length",
            Value::Unsigned(6),
            "`llama.attention.value_length`: expected the head width 6",
        ),
        (
            "llama.attention.head_count",
            Value::Unsigned(0),
            "num_attention_heads",
        ),
        (
            "llama.attention.head_count_kv",
            Value::Unsigned(3),
            "a divisor of num_attention_heads",
        ),
    ] {
        let mut file = Rewritten::golden();
        file.set(key, value);
        let error = file.open().unwrap_err();
        assert!(error.contains(expected), "{key}: {error}");
    }
}

#[test]
fn damaged_files_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, []).unwrap();
    let error = GgufFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("the file is empty"), "{error}");

    let mut small = Rewritten::golden();
    small.tensors.truncate(6);
    for (_, shape, values) in &mut small.tensors {
        shape.truncate(1);
        shape[0] = 32;
        values.resize(32, 0.5);
    }
    let small = small.bytes();
    let header = small.len() - 6 * 128;
    let mut random = Random(11);
    let mut opened = 0;
    for _ in 0..4000 {
        let mut bytes = small.clone();
        random.mutate(&mut bytes, header);
        fs::write(&path, &bytes).unwrap();
        if let Ok(file) = GgufFile::open(&path) {
            opened += 1;
            for name in file.tensors.keys() {
                file.read_f32(name).unwrap();
            }
        }
        if let Ok(weights) = Weights::open(&path) {
            for name in weights.names() {
                weights.read_f32(name).unwrap();
            }
            let _ = check(&weights, &weights.config().unwrap());
        }
    }
    assert!(opened > 100, "{opened} of the damaged files still open");
}

#[test]
fn a_truncated_golden_is_refused_at_every_length() {
    let whole = fs::read(own().join("quant/gguf/llama.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut random = Random(3);
    for _ in 0..200 {
        fs::write(&path, &whole[..random.below(whole.len())]).unwrap();
        assert!(GgufFile::open(&path).is_err());
    }
}
