//! Models give transformers' logits, losses, gradients and greedy texts.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use lorafit::device::scalar;
use lorafit::infer::{Sampling, generate};
use lorafit::model::config::ModelConfig;
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Tokens};
use lorafit::train::step;

use crate::reference::{
    Case, Figures, Tensors, distance, failed, flat, load, run_all, tolerance, unpacked,
};

fn shifted(labels: &[i32], tokens: usize) -> Arc<[i32]> {
    step::targets(&unpacked(labels.to_vec(), labels.to_vec(), tokens))
}

fn model_case(dir: &Path) -> Case {
    let model = load(dir)?;
    let expected = Tensors::open(&dir.join("expected.safetensors"));
    let mut figures = Figures::default();
    check_forward(&model, &expected, &mut figures);
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
    let loss = model.loss_sum(hidden, targets).mul_scalar(1.0 / count);
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

#[test]
fn models_equal_transformers() {
    run_all("models", model_case);
}
