//! Models give transformers' logits, losses, gradients and greedy texts.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use lorafit::device::scalar;
use lorafit::infer::{Sampling, generate};
use lorafit::model::config::ModelConfig;
use lorafit::model::families::FAMILIES;
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Tokens};
use lorafit::nn::Rope;
use lorafit::train::step;

use crate::reference::{
    Case, Figures, Tensors, distance, failed, flat, load, own, reference, run_all, sets, tolerance,
    unpacked,
};

fn shifted(labels: &[i32], tokens: usize) -> Arc<[i32]> {
    step::targets(&unpacked(labels.to_vec(), labels.to_vec(), tokens))
}

fn model_case(dir: &Path) -> Case {
    let model = load(dir)?;
    let expected = Tensors::open(&dir.join("expected.safetensors"));
    let mut figures = Figures::default();
    check_forward(&model, &expected, &mut figures);
    check_rope(&model, &expected, &mut figures);
    check_routers(&model, &expected, &mut figures);
    check_greedy(&model, &expected, &mut figures);
    let v4 = dir.join("config_v4.json");
    if v4.exists() {
        let text = std::fs::read_to_string(&v4).expect("config_v4.json");
        let config = ModelConfig::from_json(&text, &v4).map_err(failed)?;
        let weights = Weights::open(dir).map_err(failed)?;
        let model = CausalLm::load(&weights, config, &Device::flex()).map_err(failed)?;
        check_forward(&model, &expected, &mut figures);
    }
    figures.verdict()
}

fn check_forward(model: &CausalLm, expected: &Tensors, figures: &mut Figures) {
    let ids = expected.ints("input_ids");
    let [batch, tokens] = expected.shape("input_ids")[..] else {
        panic!("input_ids are [B, T]")
    };
    let positions: Vec<usize> = expected
        .ints("position_ids")
        .iter()
        .map(|&p| p as usize)
        .collect();
    let input = Tokens {
        ids: &ids,
        batch,
        positions: Some(&positions),
        segments: None,
    };
    let embedded = model.embed(input).autodiff().require_grad();
    let hidden = model.body(embedded.clone(), input, None, None);
    let logits = flat(model.logits(hidden.clone().inner()));
    figures.check(
        "logits",
        "logits",
        distance(&logits, &expected.floats("logits")),
        tolerance::LOGITS,
    );
    let states = expected.floats("hidden_states");
    let last = &states[states.len() - hidden.shape().num_elements()..];
    figures.check(
        "hidden",
        "hidden_states[L]",
        distance(&flat(hidden.clone().inner()), last),
        tolerance::LOGITS,
    );
    let targets = shifted(&ids, tokens);
    let count = targets.iter().filter(|&&t| t >= 0).count() as f64;
    let loss = model
        .loss_sum(hidden, targets, None)
        .mul_scalar(1.0 / count);
    let got = scalar(loss.clone().inner());
    figures.check(
        "loss",
        "loss",
        (got - expected.floats("loss")[0]).abs(),
        tolerance::LOSS,
    );
    let mut gradients = loss.backward();
    let gradient = embedded.grad_remove(&mut gradients).expect("a gradient");
    let want = expected.floats("grad_layer0_input");
    figures.check(
        "gradient",
        "grad_layer0_input",
        distance(&flat(gradient), &want),
        tolerance::GRADIENT,
    );
}

/// The frequencies of models that have one rotary embedding.
fn check_rope(model: &CausalLm, expected: &Tensors, figures: &mut Figures) {
    let ([rope], true) = (&model.config().ropes[..], expected.has("rope_inv_freq")) else {
        return;
    };
    let tokens = expected.shape("input_ids")[1];
    let got = Rope::new(rope.clone()).frequencies(tokens);
    let inverse: Vec<f32> = got.inverse.iter().map(|&f| f as f32).collect();
    let want = expected.floats("rope_inv_freq");
    let off = distance(&inverse, &want);
    figures.check("rope", "rope_inv_freq", off, tolerance::LOGITS);
    let want = expected.floats("rope_attention_scaling")[0];
    let off = (got.attention_factor - want).abs();
    figures.check("rope", "rope_attention_scaling", off, tolerance::LOSS);
}

/// The routers' logits, layer by layer.
fn check_routers(model: &CausalLm, expected: &Tensors, figures: &mut Figures) {
    if !expected.has("router_logits") {
        return;
    }
    let ids = expected.ints("input_ids");
    let input = Tokens {
        ids: &ids,
        batch: expected.shape("input_ids")[0],
        positions: None,
        segments: None,
    };
    let got: Vec<f32> = (model.router_logits(input).into_iter())
        .flat_map(flat)
        .collect();
    let off = distance(&got, &expected.floats("router_logits"));
    figures.check("router", "router_logits", off, tolerance::LOGITS);
}

/// The greedy continuation, through the KV cache.
fn check_greedy(model: &CausalLm, expected: &Tensors, figures: &mut Figures) {
    // Closer calls than our own rounding may fall either way.
    if expected.floats("greedy_min_margin")[0] < tolerance::LOGITS * 10.0 {
        return;
    }
    let tokens = expected.shape("input_ids")[1];
    let length = expected.shape("greedy_ids")[1];
    let ids = expected.ints("greedy_ids");
    let sampling = Sampling {
        max_new_tokens: length - tokens / 2,
        temperature: 0.0,
        top_p: 1.0,
        seed: 0,
    };
    // Dynamic rope rotates cached keys by the frequencies of their time, a full pass by the last.
    for row in ids.chunks_exact(length) {
        let prompt: Vec<u32> = row[..tokens / 2].iter().map(|&id| id as u32).collect();
        let got = generate(model, &prompt, &[], sampling, &mut |_| true);
        let same = got
            .iter()
            .zip(&row[tokens / 2..])
            .filter(|(g, w)| **g as i32 != **w)
            .count();
        figures.check("greedy", "greedy_ids", same as f64, 0.0);
    }
}

/// The README's table of families, from the cases that pass.
fn table(passed: &[String]) -> String {
    let mut table = String::from("| `model_type` | class | models compared |\n|---|---|---|\n");
    for family in FAMILIES {
        let of_family = |case: &&String| {
            let config = ModelConfig::from_dir(&own().join("models").join(case));
            config.is_ok_and(|config| config.family == *family)
        };
        let cases: Vec<&str> = (passed.iter().filter(of_family))
            .map(String::as_str)
            .collect();
        if !cases.is_empty() {
            let (name, class) = (family.model_type, family.class_name);
            table += &format!("| `{name}` | `{class}` | {} |\n", cases.join(", "));
        }
    }
    table
}

/// Every case of the set; of the project's own set, the README's table says the same.
#[test]
fn models_equal_transformers() {
    let passed = run_all(&reference().join("models"), model_case);
    if reference() != own() {
        return;
    }
    // Other shapes and options of the same families.
    for set in sets().iter().skip(1) {
        run_all(&set.join("models"), model_case);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(path).expect("README.md");
    let table = table(&passed);
    assert!(
        readme.contains(&table),
        "README.md lacks the table of families that pass:\n{table}"
    );
}
