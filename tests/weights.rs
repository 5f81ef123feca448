//! Configurations and weights of base models: what is read, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lorafit::model::config::{ModelConfig, RopeScaling};
use lorafit::model::names;
use lorafit::model::weights::{Dtype, Weights, check, expected_tensors};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::reference::own;

/// Pseudo-random numbers (splitmix64), the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e3779b97f4a7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }

    /// Overwrites, cuts or lengthens `bytes`; most changes fall in the first `header` bytes.
    pub fn mutate(&mut self, bytes: &mut Vec<u8>, header: usize) {
        for _ in 0..1 + self.below(4) {
            let at = self.below(header.min(bytes.len()));
            match self.below(8) {
                0 => bytes.truncate(self.below(bytes.len())),
                1 => bytes.insert(at, self.below(256) as u8),
                2 => {
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].fill([0, 0xff, 0x7f][self.below(3)]);
                }
                3 if !bytes.is_empty() => drop(bytes.remove(at)),
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = self.below(256) as u8;
                    }
                }
            }
        }
    }
}

fn models() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = fs::read_dir(own().join("models"))
        .expect("the goldens are there")
        .map(|entry| entry.unwrap().path())
        .collect();
    dirs.sort();
    dirs
}

/// A tiny model directory: configuration and f32 tensors of zeros, `edit`ed before writing.
fn tiny(edit: impl FnOnce(&mut Value, &mut BTreeMap<String, Vec<usize>>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config = json!({
        "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6,
        "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": true,
    });
    let parsed = ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap();
    let mut tensors: BTreeMap<_, _> = expected_tensors(&parsed).into_iter().collect();
    edit(&mut config, &mut tensors);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), &tensors);
    dir
}

fn write_safetensors(path: &Path, tensors: &BTreeMap<String, Vec<usize>>) {
    let zeros = vec![0u8; 4096];
    let views = tensors.iter().map(|(name, shape)| {
        let bytes = 4 * shape.iter().product::<usize>();
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), &zeros[..bytes]);
        (name, view.unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn open_and_check(dir: &Path) -> Result<(), String> {
    let weights = Weights::open(dir).map_err(|error| error.to_string())?;
    let config = weights.config().map_err(|error| error.to_string())?;
    check(&weights, &config).map_err(|error| error.to_string())
}

#[test]
fn each_golden_parses_in_both_styles_and_its_tensors_fit() {
    let mut seen = 0;
    for dir in models() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let config = ModelConfig::from_dir(&dir).unwrap_or_else(|error| panic!("{error}"));
        let v4 = dir.join("config_v4.json");
        if v4.exists() {
            let text = fs::read_to_string(&v4).unwrap();
            assert_eq!(
                ModelConfig::from_json(&text, &v4).unwrap(),
                config,
                "{name}"
            );
        }
        let weights = Weights::open(&dir).unwrap();
        check(&weights, &config).unwrap_or_else(|error| panic!("{name}: {error}"));
        for name in weights.names() {
            let values = weights.read_f32(name).unwrap();
            let shape = weights.shape(name).unwrap();
            assert_eq!(values.len(), shape.iter().product::<usize>());
            assert!(values.iter().all(|value| value.is_finite()));
        }
        seen += 1;
    }
    assert!(seen >= 30, "{seen} models");
}

#[test]
fn rope_goldens_read_as_written() {
    let scaling = |name: &str| {
        let dir = own().join("models").join(name);
        ModelConfig::from_dir(&dir).unwrap().ropes[0]
            .scaling
            .clone()
    };
    assert_eq!(scaling("llama"), RopeScaling::Default);
    assert_eq!(
        scaling("llama_rope_linear"),
        RopeScaling::Linear { factor: 2.5 }
    );
    let dynamic = RopeScaling::Dynamic {
        factor: 2.0,
        original_max_position_embeddings: 10,
    };
    assert_eq!(scaling("llama_rope_dynamic"), dynamic);
}

#[test]
fn shards_and_bf16_are_read() {
    let sharded = Weights::open(&own().join("models/qwen2")).unwrap();
    assert!(sharded.names().count() > 10);
    let bf16 = Weights::open(&own().join("models/qwen3")).unwrap();
    let name = "model.norm.weight";
    assert_eq!(bf16.dtype(name), Some(Dtype::BF16));
    let raw = bf16.raw(name).unwrap().unwrap();
    let values = bf16.read_f32(name).unwrap();
    let high = [raw[0], raw[1]];
    assert_eq!(
        values[0].to_bits() >> 16,
        u32::from(u16::from_le_bytes(high))
    );
    assert_eq!(values.len() * 2, raw.len());
}

#[test]
fn linear_modules_stand_in_the_models_order() {
    let dir = own().join("models/llama");
    let config = ModelConfig::from_dir(&dir).unwrap();
    let modules = names::linear_modules(&config);
    assert_eq!(modules.len(), 7 * config.num_hidden_layers);
    assert_eq!(modules[0], "model.layers.0.self_attn.q_proj");
    assert_eq!(modules[6], "model.layers.0.mlp.down_proj");
    let weights = Weights::open(&dir).unwrap();
    for linear in names::linears(&config) {
        let shape = weights.shape(&format!("{}.weight", linear.path)).unwrap();
        assert_eq!(shape, [linear.out_features, linear.in_features]);
    }
}

#[test]
fn all_faults_come_in_one_error() {
    let dir = tiny(|_, tensors| {
        tensors.remove("model.layers.0.mlp.up_proj.weight");
        tensors.insert("model.layers.1.mlp.up_proj.weight".into(), vec![6, 3]);
        tensors.insert("model.surplus".into(), vec![2]);
        tensors.insert(
            "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
            vec![1],
        );
    });
    let error = open_and_check(dir.path()).unwrap_err();
    for expected in [
        "missing: model.layers.0.mlp.up_proj.weight [6, 4]",
        "misshapen: model.layers.1.mlp.up_proj.weight expected [6, 4], found [6, 3]",
        "extra: model.surplus [2]",
    ] {
        assert!(error.contains(expected), "{error}");
    }
    assert!(!error.contains("inv_freq"), "{error}");

    let dir = tiny(|config, _| config["num_hidden_layers"] = json!(9));
    let error = open_and_check(dir.path()).unwrap_err();
    assert!(error.contains("and 43 more"), "{error}");
}

#[test]
fn a_tied_head_may_be_stored() {
    let dir = tiny(|_, tensors| {
        tensors.insert("lm_head.weight".into(), vec![8, 4]);
    });
    open_and_check(dir.path()).unwrap();
    let dir = tiny(|config, _| config["tie_word_embeddings"] = json!(false));
    let error = open_and_check(dir.path()).unwrap_err();
    assert!(error.contains("missing: lm_head.weight [8, 4]"), "{error}");
}

#[test]
fn truncated_and_foreign_files_are_refused() {
    let dir = tiny(|_, _| {});
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 5, 100, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let error = open_and_check(dir.path()).unwrap_err();
        assert!(error.contains("model.safetensors"), "{error}");
    }
    fs::remove_file(&path).unwrap();
    let error = open_and_check(dir.path()).unwrap_err();
    assert!(error.contains("no weights"), "{error}");
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    let error = open_and_check(dir.path()).unwrap_err();
    assert!(error.contains("pickled weights are never read"), "{error}");
    let error = open_and_check(&dir.path().join("pytorch_model.bin")).unwrap_err();
    assert!(error.contains("save_pretrained"), "{error}");
    let error = open_and_check(&dir.path().join("absent.safetensors")).unwrap_err();
    assert!(error.contains("absent.safetensors: cannot read"), "{error}");
}

#[test]
fn integer_weights_are_named() {
    let dir = tiny(|_, _| {});
    let data = [0u8; 4];
    let view = TensorView::new(safetensors::Dtype::I32, vec![1], &data).unwrap();
    let path = dir.path().join("other.safetensors");
    safetensors::serialize_to_file([("t", view)], None, &path).unwrap();
    let weights = Weights::open(&path).unwrap();
    let error = weights.read_f32("t").unwrap_err().to_string();
    assert!(
        error.contains("tensor `t` is stored as I32; supported: F32, F16, BF16"),
        "{error}"
    );
    assert!(weights.read_f32("u").is_err());
}

#[test]
fn an_index_that_lies_is_refused() {
    let dir = tiny(|_, _| {});
    let data = dir.path().join("model.safetensors");
    fs::rename(data, dir.path().join("a.safetensors")).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    for (map, expected) in [
        (
            json!({"t": "../a.safetensors"}),
            "shards are files beside the index",
        ),
        (
            json!({"t": "/etc/passwd"}),
            "shards are files beside the index",
        ),
        (
            json!({"t": "sub/a.safetensors"}),
            "shards are files beside the index",
        ),
        (json!({"t": ".."}), "shards are files beside the index"),
        (json!({"t": ""}), "shards are files beside the index"),
        (json!({"t": "a.bin"}), "not a .safetensors file"),
        (json!({"t": "b.safetensors"}), "b.safetensors: cannot read"),
        (
            json!({"t": "a.safetensors"}),
            "tensor `t` in a.safetensors, which has no such tensor",
        ),
        (json!({}), "`weight_map` is empty"),
        (json!([]), "not an index of shards"),
    ] {
        fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
        let error = open_and_check(dir.path()).unwrap_err();
        assert!(error.contains(expected), "{map}: {error}");
    }
    let map = json!({"weight_map": {"model.norm.weight": "a.safetensors"}});
    fs::write(&index, map.to_string()).unwrap();
    open_and_check(dir.path()).unwrap();
}

#[test]
fn damaged_bytes_never_panic() {
    let dir = tiny(|_, _| {});
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = whole.len() - 4 * 200;
    let config = fs::read(dir.path().join("config.json")).unwrap();
    let mut random = Random(7);
    for _ in 0..3000 {
        let mut bytes = whole.clone();
        random.mutate(&mut bytes, header);
        fs::write(&path, &bytes).unwrap();
        if let Ok(weights) = Weights::open(&path) {
            for name in weights.names() {
                let _ = weights.read_f32(name);
            }
        }
        let mut text = config.clone();
        random.mutate(&mut text, config.len());
        let text = String::from_utf8_lossy(&text);
        if let Ok(config) = ModelConfig::from_json(&text, &path) {
            expected_tensors(&config);
        }
    }
}
