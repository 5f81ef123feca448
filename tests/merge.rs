//! Adapters written as PEFT does, and merged into their base.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use half::bf16;
use lorafit::adapter::config::AdapterConfig;
use lorafit::adapter::peft::{AdapterWeights, LoraPair, fit, read_adapter};
use lorafit::adapter::target::Targeting;
use lorafit::data::tokenize::ChatTokenizer;
use lorafit::export::merged::{MergeError, MergeJob, merge, prepare};
use lorafit::export::model::{DEFAULT_SHARD_SIZE, SaveDtype, write_model};
use lorafit::export::peft::{ModelCard, write_adapter};
use lorafit::export::write::WriteError;
use lorafit::model::names;
use lorafit::model::weights::{Dtype, Weights, check};
use lorafit::recipe::plan::TargetModules;
use serde_json::{Value, json};

use crate::reference::own;

fn llama() -> &'static Path {
    static PATH: LazyLock<PathBuf> = LazyLock::new(|| own().join("models/llama"));
    &PATH
}

fn adapter(case: &str, state: &str) -> PathBuf {
    own().join("lora").join(case).join(state)
}

fn job<'a>(base: &'a Path, adapter: &'a Path, out: &'a Path) -> MergeJob<'a> {
    MergeJob {
        base,
        adapter,
        quantised: None,
        out,
        dtype: None,
        shard_size: DEFAULT_SHARD_SIZE,
    }
}

fn json_file(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Names in a directory, sorted.
pub fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = (fs::read_dir(dir).unwrap())
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Every tensor of base + adapter, computed one element at a time in f64.
fn slowly_merged(base: &Path, adapter: &Path) -> BTreeMap<String, Vec<f64>> {
    let weights = Weights::open(base).unwrap();
    let (config, AdapterWeights { pairs, .. }) = read_adapter(adapter).unwrap();
    let layers = names::adaptable(&weights.config().unwrap());
    let mut tensors: BTreeMap<String, Vec<f64>> = (weights.names())
        .map(|name| {
            let values = weights.read_f32(name).unwrap();
            (name.to_owned(), values.into_iter().map(f64::from).collect())
        })
        .collect();
    for module in fit(adapter, &config, &pairs, &layers).unwrap() {
        let pair = &pairs[&module.module];
        let (rank, inputs) = (pair.a_shape[0], pair.a_shape[1]);
        let w = tensors
            .get_mut(&format!("{}.weight", module.module))
            .unwrap();
        for (i, w) in w.iter_mut().enumerate() {
            let (row, column) = (i / inputs, i % inputs);
            for r in 0..rank {
                let product =
                    f64::from(pair.b[row * rank + r]) * f64::from(pair.a[r * inputs + column]);
                *w += module.scaling * product;
            }
        }
    }
    tensors
}

#[test]
fn merged_weights_are_base_plus_delta() {
    for case in [
        "all_linear",
        "attention_patterns",
        "rslora",
        "layers_subset",
        "regex_target",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (out, adapter) = (dir.path().join("out"), adapter(case, "adapter_final"));
        let mut last = 0;
        let report = merge(&job(llama(), &adapter, &out), &mut |p| {
            assert!(p.done >= last && p.done <= p.total);
            last = p.done;
        })
        .unwrap();
        assert_eq!(names_in(dir.path()), ["out"]);
        assert_eq!(
            json_file(&out.join("config.json")),
            json_file(&llama().join("config.json"))
        );
        let expected = slowly_merged(llama(), &adapter);
        let merged = Weights::open(&out).unwrap();
        check(&merged, &merged.config().unwrap()).unwrap();
        assert_eq!(merged.names().count(), expected.len());
        assert_eq!(report.written.tensors, expected.len());
        let base = Weights::open(llama()).unwrap();
        let mut changed = 0;
        for (name, expected) in expected {
            let found = merged.read_f32(&name).unwrap();
            for (x, y) in found.iter().zip(&expected) {
                assert!((f64::from(*x) - y).abs() < 1e-6, "{case} {name}: {x} {y}");
            }
            changed += usize::from(merged.raw(&name).unwrap() != base.raw(&name).unwrap());
        }
        assert_eq!(changed, report.modules.len(), "{case}");
        assert!(
            report.delta_norm > 0.0 && report.max_abs_delta > 0.0 && report.unchanged.is_empty()
        );
    }
}

#[test]
fn a_type_that_is_asked_for_is_rounded_to_once() {
    let dir = tempfile::tempdir().unwrap();
    let (out, adapter) = (dir.path().join("out"), adapter("rslora", "adapter_final"));
    let job = MergeJob {
        dtype: Some(SaveDtype::Bf16),
        ..job(llama(), &adapter, &out)
    };
    merge(&job, &mut |_| ()).unwrap();
    let config = json_file(&out.join("config.json"));
    assert_eq!(config["dtype"], "bfloat16");
    assert_eq!(config.get("torch_dtype"), None);
    let merged = Weights::open(&out).unwrap();
    for (name, expected) in slowly_merged(llama(), &adapter) {
        assert_eq!(merged.dtype(&name), Some(Dtype::BF16));
        for (x, y) in merged.read_f32(&name).unwrap().iter().zip(&expected) {
            let rounded = bf16::from_f64(*y).to_f64();
            // Half a step where f32 and f64 fall on two sides of a tie.
            assert!(
                (f64::from(*x) - rounded).abs() <= y.abs() / 128.0,
                "{name}: {x} {y}"
            );
        }
    }

    // A bf16 base stays bf16, and a later f32 merge is f32.
    let again = dir.path().join("again");
    merge(
        &MergeJob {
            base: &out,
            out: &again,
            dtype: None,
            ..job
        },
        &mut |_| (),
    )
    .unwrap();
    let weights = Weights::open(&again).unwrap();
    assert!(
        weights
            .names()
            .all(|name| weights.dtype(name) == Some(Dtype::BF16))
    );
    assert_eq!(json_file(&again.join("config.json"))["dtype"], "bfloat16");
}

#[test]
fn shards_have_an_index_and_keep_below_their_size() {
    let dir = tempfile::tempdir().unwrap();
    let (one, many) = (dir.path().join("one"), dir.path().join("many"));
    let adapter = adapter("all_linear", "adapter_final");
    let single = job(llama(), &adapter, &one);
    assert_eq!(merge(&single, &mut |_| ()).unwrap().written.shards, 1);
    let size = 100_000;
    let sharded = MergeJob {
        out: &many,
        shard_size: size,
        ..single
    };
    let written = merge(&sharded, &mut |_| ()).unwrap().written;
    assert!(written.shards > 2);

    let index = json_file(&many.join("model.safetensors.index.json"));
    assert_eq!(index["metadata"]["total_size"], json!(written.bytes));
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), written.tensors);
    for i in 1..=written.shards {
        let file = format!("model-{i:05}-of-{:05}.safetensors", written.shards);
        let inside = map.values().filter(|f| **f == file).count();
        let bytes = fs::metadata(many.join(&file)).unwrap().len();
        // The embedding and the head, 512 × 64 × 4 bytes, are larger than a shard.
        assert!(
            inside > 0 && (bytes < size + 4096 || inside == 1),
            "{file}: {bytes}"
        );
    }
    let (one, many) = (Weights::open(&one).unwrap(), Weights::open(&many).unwrap());
    assert!(one.names().eq(many.names()));
    assert!(
        one.names()
            .all(|name| one.raw(name).unwrap() == many.raw(name).unwrap())
    );
}

#[test]
fn places_that_would_lose_something_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (dir.path().join("base"), adapter("rslora", "adapter_final"));
    fs::create_dir(&base).unwrap();
    let link = dir.path().join("link");
    let message = |out: &Path, adapter: &Path| {
        merge(&job(&base, adapter, out), &mut |_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(message(&base, &adapter).contains("lies in the base"));
    assert!(message(&base.join("deep/merged"), &adapter).contains("lies in the base"));
    assert!(message(&adapter.join("x"), &adapter).contains("lies in the adapter"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&base, &link).unwrap();
        assert!(message(&link.join("x"), &adapter).contains("lies in the base"));
    }
    let taken = dir.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("precious"), "").unwrap();
    assert!(message(&taken, &adapter).contains("not empty"));
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(message(&dir.path().join("file"), &adapter).contains("not empty"));
}

#[test]
fn a_merge_that_equals_the_base_fails_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let untrained = adapter("all_linear", "adapter_init");
    let error = merge(&job(llama(), &untrained, &out), &mut |_| ()).unwrap_err();
    assert!(matches!(error, MergeError::EqualsBase { .. }));
    assert!(error.to_string().contains("train it first"), "{error}");

    // Too small for bf16 to hold.
    let (base, tiny) = (dir.path().join("base"), dir.path().join("tiny"));
    let bf16 = MergeJob {
        dtype: Some(SaveDtype::Bf16),
        ..job(llama(), &untrained, &base)
    };
    let trained = adapter("all_linear", "adapter_final");
    merge(
        &MergeJob {
            adapter: &trained,
            ..bf16
        },
        &mut |_| (),
    )
    .unwrap();
    write_scaled(&tiny, 1e-12);
    let error = merge(&job(&base, &tiny, &out), &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("--dtype f32"), "{error}");

    write_scaled(&tiny, f32::INFINITY);
    let error = merge(&job(&base, &tiny, &out), &mut |_| ()).unwrap_err();
    assert!(matches!(error, MergeError::NotFinite { .. }), "{error}");
    assert_eq!(names_in(dir.path()), ["base", "tiny"]);
}

/// The trained golden adapter with B multiplied by `factor`.
fn write_scaled(dir: &Path, factor: f32) {
    let (config, mut weights) = read_adapter(&adapter("all_linear", "adapter_final")).unwrap();
    for pair in weights.pairs.values_mut() {
        pair.b.iter_mut().for_each(|x| *x *= factor);
    }
    write_adapter(dir, &config, &weights, |_| Ok(()), &ModelCard::default()).unwrap();
}

#[test]
fn an_unpublished_merge_disappears() {
    let dir = tempfile::tempdir().unwrap();
    let (out, adapter) = (
        dir.path().join("deep/out"),
        adapter("rslora", "adapter_final"),
    );
    let prepared = prepare(&job(llama(), &adapter, &out), &mut |_| ()).unwrap();
    Weights::open(prepared.path()).unwrap();
    assert!(!out.exists());
    drop(prepared);
    assert_eq!(names_in(&dir.path().join("deep")), Vec::<String>::new());
}

#[test]
fn the_tokenizer_is_the_adapters_if_it_has_one() {
    let dir = tempfile::tempdir().unwrap();
    let (base, own) = (dir.path().join("base"), dir.path().join("adapter"));
    fs::create_dir(&base).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(llama().join(file), base.join(file)).unwrap();
    }
    for file in [
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE.txt",
        "generation_config.json",
    ] {
        fs::write(base.join(file), format!("base {file}")).unwrap();
    }
    fs::write(base.join("pytorch_model.bin"), "never").unwrap();
    write_scaled(&own, 1.0);
    let merged = |name: &str| {
        let out = dir.path().join(name);
        let report = merge(&job(&base, &own, &out), &mut |_| ()).unwrap();
        (out, report.tokenizer_from)
    };
    let (out, from) = merged("first");
    assert_eq!(from.as_deref(), Some(base.as_path()));
    let files = [
        "LICENSE.txt",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
    ];
    assert_eq!(names_in(&out)[..4], files);
    assert_eq!(names_in(&out)[4..], ["model.safetensors", "tokenizer.json"]);

    fs::write(own.join("tokenizer.json"), "own").unwrap();
    let (out, from) = merged("second");
    assert_eq!(from.as_deref(), Some(own.as_path()));
    assert_eq!(fs::read(out.join("tokenizer.json")).unwrap(), b"own");
    assert!(!out.join("chat_template.jinja").exists());
}

#[test]
fn tied_embeddings_stay_tied() {
    let dir = tempfile::tempdir().unwrap();
    let (base, own) = (own().join("models/llama_tied"), dir.path().join("adapter"));
    let weights = Weights::open(&base).unwrap();
    let config = weights.config().unwrap();
    let targeting = Targeting {
        target_modules: TargetModules::Names(vec!["down_proj".to_owned()]),
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: Vec::new(),
        rank: 1,
        alpha: 2.0,
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        use_rslora: false,
        target_parameters: Vec::new(),
    };
    let pairs = (names::linears(&config).into_iter())
        .filter(|l| l.path.ends_with("down_proj"))
        .map(|l| {
            let (a_shape, b_shape) = ([1, l.in_features], [l.out_features, 1]);
            let pair = LoraPair {
                a: vec![0.5; l.in_features],
                a_shape,
                b: vec![0.25; l.out_features],
                b_shape,
                magnitude: None,
            };
            (l.path, pair)
        })
        .collect();
    let adapter = AdapterConfig::new("org/tied", None, targeting, 0.05);
    let weights = AdapterWeights {
        pairs,
        ..AdapterWeights::default()
    };
    write_adapter(&own, &adapter, &weights, |_| Ok(()), &ModelCard::default()).unwrap();
    let out = dir.path().join("out");
    let report = merge(&job(&base, &own, &out), &mut |_| ()).unwrap();
    assert_eq!(report.max_abs_delta, 0.25);
    let merged = Weights::open(&out).unwrap();
    assert_eq!(merged.shape("lm_head.weight"), None);
    check(&merged, &merged.config().unwrap()).unwrap();
}

#[test]
fn a_gguf_base_becomes_a_hugging_face_model() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (own().join("quant/gguf/llama.gguf"), dir.path().join("out"));
    let adapter = adapter("all_linear", "adapter_final");
    let report = merge(&job(&base, &adapter, &out), &mut |_| ()).unwrap();
    assert_eq!(report.tokenizer_from.as_deref(), Some(base.as_path()));
    let merged = Weights::open(&out).unwrap();
    let config = merged.config().unwrap();
    check(&merged, &config).unwrap();
    assert_eq!(
        json_file(&out.join("config.json"))["torch_dtype"],
        "bfloat16"
    );
    assert!(
        merged
            .names()
            .all(|name| merged.dtype(name) == Some(Dtype::BF16))
    );
    for (name, expected) in slowly_merged(&base, &adapter) {
        for (x, y) in merged.read_f32(&name).unwrap().iter().zip(&expected) {
            assert!(
                (f64::from(*x) - y).abs() <= y.abs() / 256.0 + 1e-6,
                "{name}: {x} {y}"
            );
        }
    }
    let original = ChatTokenizer::open(&base, None).unwrap();
    let copied = ChatTokenizer::open(&out, None).unwrap();
    let text = "the river runs to the sea";
    assert_eq!(
        copied.encode(text, true).unwrap(),
        original.encode(text, true).unwrap()
    );

    let f32_out = dir.path().join("f32");
    let job = MergeJob {
        dtype: Some(SaveDtype::F32),
        ..job(&base, &adapter, &f32_out)
    };
    merge(&job, &mut |_| ()).unwrap();
    let exact = Weights::open(&f32_out).unwrap();
    for (name, expected) in slowly_merged(&base, &adapter) {
        for (x, y) in exact.read_f32(&name).unwrap().iter().zip(&expected) {
            assert!((f64::from(*x) - y).abs() < 1e-6, "{name}: {x} {y}");
        }
    }
}

#[test]
fn a_fully_trained_model_is_written_from_its_values() {
    let dir = tempfile::tempdir().unwrap();
    let base = Weights::open(llama()).unwrap();
    let tensors: Vec<(String, Vec<usize>)> = (base.names())
        .map(|name| (name.to_owned(), base.shape(name).unwrap().to_vec()))
        .collect();
    let config = json_file(&llama().join("config.json"));
    let read = |name: &str| -> Result<Vec<f32>, WriteError> { Ok(base.read_f32(name).unwrap()) };
    let written = write_model(
        dir.path(),
        &config,
        &tensors,
        SaveDtype::F16,
        DEFAULT_SHARD_SIZE,
        read,
    )
    .unwrap();
    assert_eq!(written.tensors, tensors.len());
    let model = Weights::open(dir.path()).unwrap();
    check(&model, &model.config().unwrap()).unwrap();
    assert!(
        model
            .names()
            .all(|name| model.dtype(name) == Some(Dtype::F16))
    );
    assert_eq!(
        json_file(&dir.path().join("config.json"))["dtype"],
        "float16"
    );
    let short = |_: &str| -> Result<Vec<f32>, WriteError> { Ok(vec![0.0]) };
    let error = write_model(
        dir.path(),
        &config,
        &tensors,
        SaveDtype::F32,
        1 << 30,
        short,
    );
    assert!(error.unwrap_err().to_string().contains("found 4 bytes"));
    assert_eq!(model.names().count(), tensors.len());
}
