//! Adapters as PEFT writes them: read, refused, and written again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lorafit::adapter::peft::{AdapterConfig, AdapterWeights, fit, read_adapter};
use lorafit::adapter::target::{ALL_LINEAR, Targeting, as_written, select};
use lorafit::adapter::vera::VeraWeights;
use lorafit::export::peft::{ModelCard, write_adapter};
use lorafit::export::safetensors::{TensorInfo, f32_bytes, write_safetensors};
use lorafit::model::config::ModelConfig;
use lorafit::model::names::{self, Adaptable};
use lorafit::recipe::plan::TargetModules;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::merge::names_in;
use crate::reference::own;

/// The cases that are plain LoRA on `models/llama`.
const PLAIN: [&str; 5] = [
    "all_linear",
    "attention_patterns",
    "rslora",
    "layers_subset",
    "regex_target",
];

fn case(name: &str) -> PathBuf {
    own().join("lora").join(name)
}

fn json_file(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The layers of the golden base.
fn linears() -> Vec<Adaptable> {
    let config = ModelConfig::from_dir(&own().join("models/llama")).unwrap();
    names::adaptable(&config)
}

fn modules() -> Vec<String> {
    linears().into_iter().map(|layer| layer.path).collect()
}

/// What the case's author passed to PEFT, as lorafit states it.
fn choice(name: &str) -> Targeting {
    let spec = &json_file(&own().join("spec.json"))["lora"][name]["peft"];
    let list = |key: &str| -> Vec<String> {
        match &spec[key] {
            Value::String(one) => vec![one.clone()],
            Value::Array(many) => many
                .iter()
                .map(|v| v.as_str().unwrap().to_owned())
                .collect(),
            _ => Vec::new(),
        }
    };
    let pairs = |key: &str| -> Vec<(String, f64)> {
        let map = spec[key].as_object().cloned().unwrap_or_default();
        map.into_iter()
            .map(|(p, v)| (p, v.as_f64().unwrap()))
            .collect()
    };
    Targeting {
        target_modules: match &spec["target_modules"] {
            Value::String(pattern) => TargetModules::Pattern(pattern.clone()),
            _ => TargetModules::Names(list("target_modules")),
        },
        exclude_modules: None,
        layers_to_transform: spec["layers_to_transform"].as_array().map(|layers| {
            layers
                .iter()
                .map(|v| v.as_u64().unwrap() as usize)
                .collect()
        }),
        layers_pattern: list("layers_pattern"),
        rank: spec["r"].as_u64().unwrap() as usize,
        alpha: spec["lora_alpha"].as_f64().unwrap(),
        rank_pattern: pairs("rank_pattern")
            .into_iter()
            .map(|(p, r)| (p, r as usize))
            .collect(),
        alpha_pattern: pairs("alpha_pattern"),
        use_rslora: spec["use_rslora"].as_bool().unwrap_or(false),
        target_parameters: Vec::new(),
    }
}

#[test]
fn the_same_choice_gives_pefts_configuration() {
    for name in PLAIN {
        let targeting = as_written(&choice(name), &modules()).unwrap();
        let written = AdapterConfig::new("models/llama", None, targeting, 0.0).to_json();
        let golden = json_file(&case(name).join("adapter_init/adapter_config.json"));
        assert_eq!(written, golden, "{name}");
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&written), keys(&golden), "{name}: order of keys");
    }
}

#[test]
fn the_same_choice_gives_pefts_tensors() {
    for name in PLAIN {
        let shapes: BTreeMap<String, [usize; 2]> = (linears().into_iter())
            .map(|layer| (layer.path, [layer.out_features, layer.in_features]))
            .collect();
        let mut expected = BTreeMap::new();
        for adapter in select(&choice(name), &modules()).unwrap() {
            let [out, inputs] = shapes[&adapter.module];
            expected.insert(
                format!("base_model.model.{}.lora_A.weight", adapter.module),
                vec![adapter.rank, inputs],
            );
            expected.insert(
                format!("base_model.model.{}.lora_B.weight", adapter.module),
                vec![out, adapter.rank],
            );
        }
        let bytes = fs::read(case(name).join("adapter_init/adapter_model.safetensors")).unwrap();
        let golden: BTreeMap<String, Vec<usize>> =
            (SafeTensors::deserialize(&bytes).unwrap().iter())
                .map(|(key, tensor)| (key.to_owned(), tensor.shape().to_vec()))
                .collect();
        assert_eq!(expected, golden, "{name}");
    }
}

#[test]
fn pefts_adapters_load_and_fit_their_base() {
    for name in PLAIN {
        for state in ["adapter_init", "adapter_final"] {
            let dir = case(name).join(state);
            let (config, AdapterWeights { pairs, .. }) = read_adapter(&dir).unwrap();
            let adapters = fit(&dir, &config, &pairs, &linears()).unwrap();
            assert_eq!(adapters.len(), pairs.len(), "{name}");
            let written = config.to_json();
            assert_eq!(
                written,
                json_file(&dir.join("adapter_config.json")),
                "{name}"
            );
        }
    }
    let (config, AdapterWeights { pairs, .. }) =
        read_adapter(&case("attention_patterns").join("adapter_final")).unwrap();
    let dir = Path::new("adapter");
    let scalings: BTreeMap<String, f64> =
        (fit(dir, &config, &pairs, &linears()).unwrap().into_iter())
            .map(|adapter| (adapter.module, adapter.scaling))
            .collect();
    assert_eq!(scalings["model.layers.1.self_attn.q_proj"], 4.0);
    assert_eq!(scalings["model.layers.2.self_attn.k_proj"], 0.75);
    assert_eq!(scalings["model.layers.0.self_attn.o_proj"], 5.0);
}

#[test]
fn veras_projections_are_pefts_bit_for_bit() {
    let dir = case("vera").join("adapter_init");
    let (config, AdapterWeights { vera, .. }) = read_adapter(&dir).unwrap();
    let (settings, vera) = (config.vera.unwrap(), vera.unwrap());
    assert_eq!(
        config.to_json(),
        json_file(&dir.join("adapter_config.json"))
    );
    let drawn_anew = VeraWeights {
        shared: None,
        lambdas: vera.lambdas.clone(),
    };
    let drawn = drawn_anew.projections(&settings, &linears());
    assert_eq!(Some(drawn), vera.shared);
}

#[test]
fn an_adapter_for_another_base_does_not_fit() {
    let dir = case("all_linear").join("adapter_init");
    let (config, AdapterWeights { pairs, .. }) = read_adapter(&dir).unwrap();
    let mut base = linears();
    base[0].in_features = 65;
    base[1].path = "model.layers.9.self_attn.k_proj".to_owned();
    let error = fit(&dir, &config, &pairs, &base).unwrap_err().to_string();
    for part in [
        "layers.0.self_attn.q_proj: expected [64, 65], found [64, 64]",
        "layers.9.self_attn.k_proj: chosen by the configuration",
        "layers.0.self_attn.k_proj: the base model has no such",
    ] {
        assert!(error.contains(part), "{part} not in {error}");
    }
}

/// An adapter directory with these tensors (key, shape) and rank 2.
fn write_dir(dir: &Path, tensors: &[(&str, &[usize])]) {
    let config = json!({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]});
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let values = vec![1.0_f32; 64];
    let tensors: Vec<_> = (tensors.iter())
        .map(|(key, shape)| {
            let (name, shape) = (format!("base_model.model.{key}.weight"), shape.to_vec());
            let bytes = &bytemuck::cast_slice(&values)[..4 * shape.iter().product::<usize>()];
            (
                TensorInfo {
                    name,
                    dtype: Dtype::F32,
                    shape,
                },
                bytes,
            )
        })
        .collect();
    write_safetensors(&dir.join("adapter_model.safetensors"), &[], &tensors).unwrap();
}

#[test]
fn all_bad_tensors_come_in_one_error() {
    let dir = tempfile::tempdir().unwrap();
    write_dir(
        dir.path(),
        &[
            ("l.0.q_proj.lora_A", &[3, 4]),
            ("l.0.q_proj.lora_B", &[4, 2]),
            ("l.1.q_proj.lora_A", &[2, 4]),
            ("l.2.v_proj.lora_A", &[2, 4]),
            ("l.2.v_proj.lora_B", &[4, 2]),
            ("lm_head", &[4, 4]),
        ],
    );
    let error = read_adapter(dir.path()).unwrap_err().to_string();
    for part in [
        "l.0.q_proj.lora_A.weight: expected [2, in], found [3, 4]",
        "l.1.q_proj.lora_B.weight: missing, expected [out, 2]",
        "l.2.v_proj: has tensors, but the configuration does not choose it",
        "lm_head.weight: not a lora_A or lora_B",
    ] {
        assert!(error.contains(part), "{part} not in {error}");
    }
}

#[test]
fn pickles_and_missing_files_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let error = |dir: &Path| read_adapter(dir).unwrap_err().to_string();
    assert!(error(dir.path()).contains("adapter_config.json"));
    write_dir(dir.path(), &[]);
    assert!(
        error(dir.path()).contains("no tensors"),
        "{}",
        error(dir.path())
    );
    fs::remove_file(dir.path().join("adapter_model.safetensors")).unwrap();
    assert!(error(dir.path()).contains("no adapter_model.safetensors"));
    fs::write(dir.path().join("adapter_model.bin"), b"\x80\x02").unwrap();
    let text = error(dir.path());
    assert!(
        text.contains("pickle") && text.contains("save_pretrained"),
        "{text}"
    );
}

#[test]
fn half_precision_factors_become_f32() {
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), &[]);
    let half = half::f16::from_f32(1.5).to_le_bytes().repeat(8);
    let brain = half::bf16::from_f32(-0.25).to_le_bytes().repeat(8);
    let info = |half: &str, dtype, shape| TensorInfo {
        name: format!("base_model.model.l.q_proj.lora_{half}.weight"),
        dtype,
        shape,
    };
    let tensors = [
        (info("A", Dtype::F16, vec![2, 4]), half.as_slice()),
        (info("B", Dtype::BF16, vec![4, 2]), brain.as_slice()),
    ];
    write_safetensors(&dir.path().join("adapter_model.safetensors"), &[], &tensors).unwrap();
    let (_, AdapterWeights { pairs, .. }) = read_adapter(dir.path()).unwrap();
    assert_eq!(pairs["l.q_proj"].a, [1.5; 8]);
    assert_eq!(pairs["l.q_proj"].b, [-0.25; 8]);
    assert_eq!(f32_bytes(&[1.0]).as_ref(), 1.0_f32.to_le_bytes());
}

#[test]
fn a_recipe_default_reads_as_all_linear() {
    assert_eq!(select(&choice("all_linear"), &modules()).unwrap().len(), 21);
    assert_eq!(
        choice("all_linear").target_modules,
        TargetModules::Pattern(ALL_LINEAR.to_owned())
    );
}

#[test]
fn an_adapter_is_written_byte_for_byte_as_peft_does() {
    for case in [
        "all_linear",
        "attention_patterns",
        "layers_subset",
        "dora",
        "bias_lora_only",
        "modules_to_save",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let golden = self::case(case).join("adapter_final");
        let (config, pairs) = read_adapter(&golden).unwrap();
        let out = dir.path().join("adapter");
        let card = ModelCard {
            recipe_yaml: "train:\n  seed: 1\n".to_owned(),
            metrics: vec![("eval_loss".to_owned(), "1.25".to_owned())],
        };
        let save = |to: &Path| Ok(fs::write(to.join("tokenizer.json"), "{}")?);
        write_adapter(&out, &config, &pairs, save, &card).unwrap();
        let bytes = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert!(bytes(&out) == bytes(&golden), "{case}");
        let text = fs::read_to_string(out.join("README.md")).unwrap();
        for part in [
            "---\n",
            "library_name: peft\n",
            "- lorafit\n",
            "| eval_loss | 1.25 |",
            "  seed: 1\n",
            "PeftModel.from_pretrained",
            "lorafit generate --base",
        ] {
            assert!(text.contains(part), "{part} not in {text}");
        }
        let files = [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
        ];
        assert_eq!(names_in(&out), files);
        assert_eq!(read_adapter(&out).unwrap(), (config.clone(), pairs.clone()));

        // Written again in its place, but never over anything else.
        write_adapter(&out, &config, &pairs, |_| Ok(()), &card).unwrap();
        assert_eq!(names_in(&out).len(), 3);
        let failed = write_adapter(&out, &config, &pairs, |_| Err("no disk".into()), &card);
        assert!(failed.unwrap_err().to_string().contains("no disk"));
        assert_eq!(names_in(&out).len(), 3);
        fs::remove_file(out.join("adapter_config.json")).unwrap();
        let taken = write_adapter(&out, &config, &pairs, |_| Ok(()), &card);
        assert!(taken.unwrap_err().to_string().contains("already exists"));
        assert_eq!(names_in(dir.path()), ["adapter"]);
    }
}
