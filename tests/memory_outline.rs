//! What the memory plan takes a model and an adapter to consist of is what they consist of.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device};
use lorafit::adapter::config::AdapterConfig;
use lorafit::adapter::inject::{self, Init};
use lorafit::adapter::outline::Outline;
use lorafit::adapter::peft;
use lorafit::kernels::Weight;
use lorafit::model::kept::{Form, kept_tensors};
use lorafit::model::weights::{Dtype, Weights};
use lorafit::model::{CausalLm, Keep, Storage};
use lorafit::nn::Parameter;
use lorafit::quant::Scheme;
use serde_json::{Value, json};

use crate::reference::sets;

/// Every adapter of the references, also with the first values that take something out of the base.
#[test]
fn an_adapter_s_outline_is_what_trains() {
    let mut cases = 0;
    for set in sets() {
        for entry in std::fs::read_dir(set.join("lora")).unwrap() {
            let case = entry.unwrap().path();
            let hyper = std::fs::read_to_string(case.join("hyper.json")).unwrap();
            let hyper: Value = serde_json::from_str(&hyper).unwrap();
            let base = set.join("models").join(hyper["base"].as_str().unwrap());
            let adapter = case.join("adapter_init");
            let Ok(config) = AdapterConfig::load(&adapter) else {
                continue;
            };
            let weights = Weights::open(&base).unwrap();
            let model = weights.config().unwrap();
            let (_, values) = peft::read_adapter(&adapter).unwrap();
            let modules = peft::fit_model(&case, &config, &values, &model).unwrap();
            let mut loaded = CausalLm::load(&weights, model.clone(), &Device::flex()).unwrap();
            inject::inject(&mut loaded, &config, &modules, &Init::Loaded(&values));
            let mut trained = BTreeMap::new();
            loaded.visit_trainable(&mut |name, parameter| {
                trained.insert(name.to_string(), parameter.shape());
            });
            let outline = Outline::new(&model, &config, &modules);
            assert_eq!(outline.trained, trained, "{}", case.display());
            assert_eq!(
                outline.vocab_size,
                loaded.config().vocab_size,
                "{}",
                case.display()
            );
            let unties = model.tie_word_embeddings && !loaded.is_tied();
            assert_eq!(outline.unties, unties, "{}", case.display());
            cases += 1;
        }
    }
    assert!(cases > 20, "{cases}");
}

/// A head that begins with a part of the embedding that it was becomes a tensor of its own.
#[test]
fn a_head_that_loses_something_is_untied() {
    let base = crate::reference::own().join("models/llama_tied");
    let weights = Weights::open(&base).unwrap();
    let model = weights.config().unwrap();
    let targeting = lorafit::adapter::target::Targeting {
        target_modules: lorafit::recipe::TargetModules::Names(vec!["lm_head".into()]),
        ..lorafit::adapter::target::Targeting::all_linear(2, 4.0)
    };
    let paths = ["lm_head".to_string()];
    let modules = lorafit::adapter::target::select(&targeting, &paths).unwrap();
    let config = AdapterConfig {
        init_lora_weights: json!("pissa"),
        ..AdapterConfig::new("base", None, targeting, 0.0)
    };
    let mut loaded = CausalLm::load(&weights, model.clone(), &Device::flex()).unwrap();
    inject::inject(&mut loaded, &config, &modules, &Init::Fresh { seed: 1 });
    let outline = Outline::new(&model, &config, &modules);
    assert!(outline.unties && !loaded.is_tied());
    assert_eq!(outline.trained.len(), 2);
    assert_eq!(outline.frozen.len(), 2, "{:?}", outline.frozen);
}

/// Bytes by name of a loaded model: of its tensors, and of its quantised matrices.
fn loaded_bytes(model: &mut CausalLm) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::new();
    model.visit(&mut |name, parameter| {
        let dtype = match &parameter {
            Parameter::Vector(x) => x.dtype(),
            Parameter::Matrix(x) => x.dtype(),
            Parameter::Cube(x) => x.dtype(),
        };
        let width = if dtype == DType::F32 { 4 } else { 2 };
        let n: usize = parameter.shape().iter().product();
        bytes.insert(name.to_string(), (n * width) as u64);
    });
    for (path, weight, _) in model.deltas() {
        if let Weight::Quantised(weight) = weight {
            bytes.insert(format!("{path}.weight"), weight.bytes() as u64);
        }
    }
    bytes
}

#[test]
fn a_base_takes_the_bytes_that_were_planned() {
    let in_f32 = |name: &str| name.ends_with("layers.0.self_attn.o_proj.weight");
    for family in [
        "llama",
        "mixtral",
        "qwen3_next",
        "deepseek_v3",
        "gpt_oss",
        "phi3",
    ] {
        let weights = Weights::open(&crate::reference::own().join("models").join(family)).unwrap();
        let config = weights.config().unwrap();
        for storage in [Storage::F32, Storage::Bf16, Storage::F16, Storage::AsStored] {
            for linears in [
                None,
                Some(Scheme::Nf4),
                Some(Scheme::Nf4Double),
                Some(Scheme::Int8),
            ] {
                let keep = Keep {
                    storage,
                    linears,
                    in_f32: &in_f32,
                    ..Keep::default()
                };
                let planned = kept_tensors(&config, keep, |name| weights.dtype(name));
                let planned: BTreeMap<String, u64> = (planned.into_iter())
                    .map(|tensor| (tensor.name, tensor.bytes))
                    .collect();
                let device = Device::flex();
                let mut model = CausalLm::load_as(&weights, config.clone(), &device, keep).unwrap();
                let found = loaded_bytes(&mut model);
                assert_eq!(planned, found, "{family} {storage:?} {linears:?}");
            }
        }
    }
}

/// Matrices are read as they are kept; those that are quantised are in f32 for a moment.
#[test]
fn what_loading_needs_beside_the_tensors() {
    let weights = Weights::open(&crate::reference::own().join("models/mixtral")).unwrap();
    let config = weights.config().unwrap();
    let keep = Keep {
        linears: Some(Scheme::Nf4),
        ..Keep::default()
    };
    for tensor in kept_tensors(&config, keep, |_| Some(Dtype::F32)) {
        let n = tensor.len();
        match tensor.form {
            Form::Blocks => panic!("{} is in no GGUF file", tensor.name),
            Form::Quantised(_) => assert_eq!(tensor.loading, 4 * n, "{}", tensor.name),
            // Experts are put together from one matrix each.
            Form::Dense(_) if tensor.shape.len() == 3 => {
                assert!((1..4 * n).contains(&tensor.loading), "{}", tensor.name)
            }
            Form::Dense(_) => assert_eq!(tensor.loading, 0, "{}", tensor.name),
        }
    }
}
