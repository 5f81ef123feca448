//! The same numbers on a GPU as on the CPU: logits, loss, gradients, and a few steps of training.
//!
//! Runs on whatever WebGPU finds, software renderers such as Mesa's lavapipe included (set
//! `XDG_RUNTIME_DIR` to any folder for it). Without a device it says that it was skipped; with
//! `LORAFIT_REQUIRE_GPU_TESTS=1` that is a failure. One test for all, because compiling shaders
//! takes most of the time and is shared within a process.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use lorafit::data::IGNORE_INDEX;
use lorafit::data::batch::Batch;
use lorafit::device::{self, to_vec};
use lorafit::kernels::{QuantWeight, Weight, linear};
use lorafit::model::{CausalLm, Tokens};
use lorafit::quant::{QuantMatrix, Scheme};
use lorafit::train::optimizer::{AdamW, AdamWConfig};
use lorafit::train::recompute::Retain;
use lorafit::train::step::{self, DropoutSeed};

use crate::recompute::assert_same;
use crate::train::{assert_equal, gradients, tiny_model};

/// `|gpu - cpu| / max|cpu|`: products over as few as 130 elements differ by up to 1e-4 between
/// wgpu and the CPU, plain operations included, because the sums run in another order.
const TOLERANCE: f64 = 1e-4;

/// Losses after some steps: Adam divides small gradients by their own size, so their differences
/// grow with each step.
const TRAINED_TOLERANCE: f64 = 1e-3;

/// The GPU, or a line that says why the test is skipped (a failure where GPU tests are required).
pub fn gpu_or_skip() -> Option<(Device, String)> {
    match device::webgpu() {
        Ok(found) => Some((found.device, found.name)),
        Err(reason) => {
            let required = std::env::var_os("LORAFIT_REQUIRE_GPU_TESTS").is_some_and(|v| v == "1");
            assert!(!required, "LORAFIT_REQUIRE_GPU_TESTS is set, but {reason}");
            // Not `eprintln!`, which the test runner swallows when a test passes.
            let _ = writeln!(std::io::stderr(), "skipped: {reason}");
            None
        }
    }
}

/// Two rows of different length, whose second halves train: a sample each or, `packed`, several.
fn batch(packed: bool) -> Batch {
    let (batch, tokens) = (2, 24);
    let input_ids: Vec<i32> = (0..batch * tokens).map(|i| (i * 37 % 509) as i32).collect();
    let lengths = vec![tokens, tokens - 7];
    let label = |(i, &id): (usize, &i32)| {
        let (row, position) = (i / tokens, i % tokens);
        let trains = position >= tokens / 2 && position < lengths[row];
        if trains { id } else { IGNORE_INDEX }
    };
    let segment_starts: Arc<[usize]> = if packed {
        [0, 1, 9, 24, 36, 41, 48].into()
    } else {
        [0, 24, 41, 48].into()
    };
    let segments = segment_starts.windows(2);
    Batch {
        batch,
        tokens,
        position_ids: segments.flat_map(|ends| 0..ends[1] - ends[0]).collect(),
        segment_starts,
        labels: input_ids.iter().enumerate().map(label).collect(),
        input_ids,
        lengths,
    }
}

fn logits(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    let model = model.frozen();
    let tokens = Tokens {
        ids: &batch.input_ids,
        batch: batch.batch,
        positions: Some(&batch.position_ids),
        segments: Some(&batch.segment_starts),
    };
    let logits = model.logits(model.hidden(tokens, None, None));
    let n = logits.shape().num_elements();
    to_vec(logits.reshape([n]))
}

fn assert_logits(want: &[f32], got: &[f32]) {
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert_eq!(want.len(), got.len());
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        let off = f64::from((want - got).abs() / largest);
        assert!(
            off < TOLERANCE,
            "logit {i}: {want} on the CPU, {got} on the GPU"
        );
    }
}

/// Losses of some optimizer steps on one batch.
fn train(model: &mut CausalLm, batch: &Batch, steps: usize) -> Vec<f64> {
    let mut optimizer = AdamW::new(AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        loraplus_lr_ratio: 1.0,
        embedding_lr_ratio: 1.0,
    });
    let mut losses = Vec::new();
    for _ in 0..steps {
        let mut result = gradients(model, std::slice::from_ref(batch));
        step::clip(&mut result.gradients, 1.0);
        losses.push(result.loss);
        optimizer.step(model, result.gradients, 5e-3);
    }
    losses
}

#[test]
fn a_gpu_gives_the_numbers_of_the_cpu() {
    let Some((gpu, name)) = gpu_or_skip() else {
        return;
    };
    eprintln!("testing on {name}");
    let (mut on_cpu, mut on_gpu) = (tiny_model(false, &Device::flex()), tiny_model(false, &gpu));
    for packed in [false, true] {
        let batch = batch(packed);
        let (want, got) = (logits(&on_cpu, &batch), logits(&on_gpu, &batch));
        assert_logits(&want, &got);
        let want = gradients(&mut on_cpu, std::slice::from_ref(&batch));
        let got = gradients(&mut on_gpu, std::slice::from_ref(&batch));
        let what = format!("GPU against CPU, packed {packed}");
        assert_equal(&want, &got, TOLERANCE, &what);
    }
    recompute_changes_nothing(&mut on_gpu, &batch(true));
    quantised_weights_stay_quantised(&gpu);
    let batch = batch(true);
    let (want, got) = (train(&mut on_cpu, &batch, 4), train(&mut on_gpu, &batch, 4));
    assert!(want[3] < want[0] * 0.95, "nothing was learned: {want:?}");
    for (want, got) in want.iter().zip(&got) {
        let off = (want - got).abs() / want;
        assert!(
            off < TRAINED_TOLERANCE,
            "{want} on the CPU, {got} on the GPU: {off:.2e}"
        );
    }
}

/// Whatever is kept, on the device or off it, every bit is the same on one device.
fn recompute_changes_nothing(model: &mut CausalLm, batch: &Batch) {
    let batches = std::slice::from_ref(batch);
    let mut run = |retain| {
        let masks = Some(DropoutSeed { seed: 3, step: 5 });
        step::gradients(model, batches, masks, retain, &|| false).expect("nobody interrupts")
    };
    let want = run(Retain::Graphs);
    for retain in [Retain::Inputs, Retain::InputsOnHost] {
        assert_same(&want, &run(retain), &format!("GPU, {retain:?}"));
    }
}

/// A quantised weight is multiplied, forward and backward, without ever being whole in f32.
fn quantised_weights_stay_quantised(gpu: &Device) {
    let shape @ [out, input] = [4096, 8192];
    let values: Vec<f32> = (0..out * input)
        .map(|i| (i * 7919 % 1013) as f32 / 1013.0 - 0.5)
        .collect();
    let matrix = QuantMatrix::quantise(&values, shape, Scheme::Nf4Double).expect("finite");
    let reserved = || {
        gpu.sync().expect("the device works");
        gpu.memory_pool_usage().expect("counted").bytes_reserved
    };
    let before = reserved();
    let weight = Weight::Quantised(Arc::new(QuantWeight::new(matrix, false, gpu)));
    let x = Tensor::<2>::ones([2, input], gpu).autodiff().require_grad();
    let y = linear(x.clone(), weight);
    let mut gradients = y.sum().backward();
    let gradient = x.grad_remove(&mut gradients).expect("a gradient");
    assert_eq!(gradient.dims(), [2, input]);
    let (grown, dense) = (reserved() - before, 4 * (out * input) as u64);
    assert!(
        grown < dense / 2,
        "{grown} bytes for a weight of {dense} in f32"
    );
}

/// Losses of the first steps of `recipes/quickstart.yaml`, as a user trains it, with other settings.
fn quickstart(device: &str, sets: [&str; 2]) -> Vec<f64> {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let run = scratch.path().join("run");
    let output = Command::new(env!("CARGO_BIN_EXE_lorafit"))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .env("LORAFIT_CACHE", scratch.path().join("cache"))
        .args(["train", "recipes/quickstart.yaml", "--device", device])
        .args(["--set", sets[0], "--set", sets[1]])
        .args([
            "--set",
            "train.max_steps=3",
            "--set",
            "train.warmup_steps=0",
        ])
        .args([
            "--set",
            "train.micro_batch_size=2",
            "--set",
            "sample.prompts=[]",
        ])
        .args([
            "--set",
            "data.validation_fraction=0",
            "--set",
            "train.eval_steps=0",
            "--out",
        ])
        .arg(&run)
        .output()
        .expect("lorafit starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "--device {device}: {errors}");
    assert!(run.join("adapter/adapter_model.safetensors").is_file());
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"))
        .filter(|event| event["event"] == "step")
        .map(|event| event["loss"].as_f64().expect("a loss"))
        .collect()
}

#[test]
fn the_quickstart_trains_on_a_gpu() {
    if gpu_or_skip().is_none() {
        return;
    }
    let mut seen = Vec::new();
    for sets in [
        ["base.quantization=none", "train.precision=f32"],
        ["base.quantization=nf4-double", "train.precision=f16"],
    ] {
        let (want, got) = (quickstart("cpu", sets), quickstart("webgpu", sets));
        assert_eq!((want.len(), got.len()), (3, 3));
        for (want, got) in want.iter().zip(&got) {
            let off = (want - got).abs() / want;
            assert!(
                off < TRAINED_TOLERANCE,
                "{sets:?}: {want} on the CPU, {got} on the GPU: {off:.2e}"
            );
        }
        seen.push(got);
    }
    assert_ne!(seen[0], seen[1], "nothing was quantised");
}
