//! Hugging Face's numbers: every case of a reference set, discovered by listing its folder.
//!
//! The set is `tests/golden`, or the folder named by `LORAFIT_REFERENCE`, made by the same script
//! with any seeds, shapes and options. Each case prints one line: passed, failed with the figure,
//! or not supported yet with the reason.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use lorafit::adapter::config::{AdapterConfig, AdapterConfigError};
use lorafit::adapter::inject::{self, Init};
use lorafit::adapter::peft::{self, LoraPair};
use lorafit::data::loader::Batch;
use lorafit::device::{scalar, to_vec};
use lorafit::export::merged::{MergeJob, merge};
use lorafit::infer::{Sampling, generate};
use lorafit::model::config::{ConfigError, ModelConfig};
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Tokens, names};
use lorafit::recipe::LrScheduler;
use lorafit::train::optimizer::{AdamW, AdamWConfig};
use lorafit::train::schedule::Schedule;
use lorafit::train::step::{self, Gradients};
use safetensors::SafeTensors;
use serde_json::Value;

/// Tolerances of the reference's README, on `|got - want| / max(1, max|want|)`, all in f32.
mod tolerance {
    /// Logits and hidden states: another order of sums changes transformers' own by 1.3e-6.
    pub const LOGITS: f64 = 2e-5;
    /// One loss.
    pub const LOSS: f64 = 1e-5;
    /// Gradients and their norms at the first step.
    pub const GRADIENT: f64 = 2e-5;
    /// Losses and norms over a whole run, in which rounding accumulates.
    pub const TRAINING: f64 = 5e-5;
    /// Weights after training: Adam divides small gradients by their own size.
    pub const ADAPTER: f64 = 2e-4;
    /// Logits after training, and of the merged model.
    pub const TRAINED_LOGITS: f64 = 1e-4;
    /// Learning rates are computed in f64 on both sides.
    pub const LEARNING_RATE: f64 = 1e-12;
}

/// What became of a case.
enum Verdict {
    Passed(String),
    NotYet(String),
    Failed(String),
}

type Case = Result<String, Verdict>;

fn not_yet(reason: impl ToString) -> Verdict {
    Verdict::NotYet(reason.to_string())
}

fn failed(reason: impl ToString) -> Verdict {
    Verdict::Failed(reason.to_string())
}

fn reference() -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("LORAFIT_REFERENCE").map_or_else(own, PathBuf::from)
}

/// Runs every case of a folder, prints a line each, and fails if one failed or none passed.
fn run_all(folder: &str, run: impl Fn(&Path) -> Case) {
    let folder = reference().join(folder);
    let mut cases: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    let (mut passed, mut failures) = (0, Vec::new());
    // Not `println!`, which the test runner swallows when a test passes.
    let mut out = std::io::stderr().lock();
    for case in cases {
        let kind = folder.file_name().expect("a name").to_string_lossy();
        let name = format!(
            "{kind}/{}",
            case.file_name().expect("a name").to_string_lossy()
        );
        let verdict = run(&case).map_or_else(|verdict| verdict, Verdict::Passed);
        let line = match verdict {
            Verdict::Passed(figures) => {
                passed += 1;
                format!("golden {name}: passed ({figures})")
            }
            Verdict::NotYet(reason) => {
                let reason = reason.lines().next().unwrap_or_default().to_string();
                format!("golden {name}: not supported yet: {reason}")
            }
            Verdict::Failed(figures) => {
                failures.push(name.clone());
                format!("golden {name}: FAILED: {figures}")
            }
        };
        writeln!(out, "{line}").expect("stderr");
    }
    assert!(failures.is_empty(), "failed: {failures:?}");
    assert!(passed > 0, "no case of {} is supported", folder.display());
}

/// The tensors of a safetensors file, as f64.
struct Tensors {
    bytes: Vec<u8>,
}

impl Tensors {
    fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { bytes }
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("a safetensors file")
    }

    fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.file().tensor(name).expect(name).shape().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f64> {
        let file = self.file();
        let view = file.tensor(name).expect(name);
        let data = view.data();
        match view.dtype() {
            safetensors::Dtype::F32 => data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect(),
            safetensors::Dtype::F64 => (data
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b)))
            .collect(),
            dtype => panic!("{name}: {dtype:?}"),
        }
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        let file = self.file();
        let view = file.tensor(name).expect(name);
        let words = view.data().as_chunks::<8>().0.iter();
        words.map(|b| i64::from_le_bytes(*b) as i32).collect()
    }
}

/// `max|got - want| / max(1, max|want|)`
fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1f64, |m, x| m.max(x.abs()));
    let worst = (got.iter().zip(want)).fold(0f64, |m, (g, w)| {
        let off = (f64::from(*g) - w).abs();
        if off > m || off.is_nan() { off } else { m }
    });
    worst / scale
}

/// The largest distance of each kind of number, and whether all are within their tolerance.
#[derive(Default)]
struct Figures {
    worst: BTreeMap<&'static str, f64>,
    faults: Vec<String>,
}

impl Figures {
    fn check(&mut self, kind: &'static str, name: &str, off: f64, tolerance: f64) {
        let worst = self.worst.entry(kind).or_insert(0.0);
        *worst = worst.max(off);
        if off > tolerance || off.is_nan() {
            self.faults
                .push(format!("{name} off by {off:.2e}, allowed {tolerance:.0e}"));
        }
    }

    fn verdict(self) -> Case {
        let figures: Vec<String> = (self.worst.iter())
            .map(|(kind, off)| format!("{kind} {off:.1e}"))
            .collect();
        if self.faults.is_empty() {
            Ok(figures.join(", "))
        } else {
            Err(failed(self.faults.join("; ")))
        }
    }
}

fn flat(tensor: Tensor<2>) -> Vec<f32> {
    let n = tensor.shape().num_elements();
    to_vec(tensor.reshape([n]))
}

fn load(dir: &Path) -> Result<CausalLm, Verdict> {
    let weights = Weights::open(dir).map_err(failed)?;
    let config = weights.config().map_err(|error| match error {
        ConfigError::Architecture { .. } | ConfigError::Unsupported { .. } => not_yet(error),
        _ => failed(error),
    })?;
    CausalLm::load(&weights, config, &Device::flex()).map_err(failed)
}

/// Reads an adapter; what it asks for beyond plain LoRA on linear layers is not supported yet.
fn read_adapter(dir: &Path) -> Result<(AdapterConfig, BTreeMap<String, LoraPair>), Verdict> {
    let tensors = Tensors::open(&dir.join("adapter_model.safetensors"));
    let config = AdapterConfig::load(dir).map_err(|error| match error {
        AdapterConfigError::Unsupported { .. } => not_yet(error),
        _ => failed(error),
    })?;
    let strange = |name: &&str| {
        names::parse_peft_key(name).is_none_or(|(module, _)| !module.contains(".layers."))
    };
    let file = tensors.file();
    if let Some(name) = file.names().into_iter().find(strange) {
        return Err(not_yet(format!("the adapter tensor {name}")));
    }
    let (_, pairs) = peft::read_adapter(dir).map_err(failed)?;
    Ok((config, pairs))
}

fn shifted(labels: &[i32], tokens: usize) -> Arc<[i32]> {
    let batch = Batch {
        batch: labels.len() / tokens,
        tokens,
        input_ids: labels.to_vec(),
        labels: labels.to_vec(),
        lengths: Vec::new(),
    };
    step::targets(&batch)
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

/// What a LoRA case trains with.
struct Hyper {
    json: Value,
}

impl Hyper {
    fn open(case: &Path) -> Result<Self, Verdict> {
        let text = std::fs::read_to_string(case.join("hyper.json")).map_err(failed)?;
        let json: Value = serde_json::from_str(&text).map_err(failed)?;
        if json["nf4_base"] == Value::Bool(true) {
            return Err(not_yet("a 4-bit base"));
        }
        let known = ["lr", "betas", "eps", "weight_decay"];
        for key in json["optimizer"].as_object().expect("optimizer").keys() {
            if !known.contains(&key.as_str()) {
                return Err(not_yet(format!("the optimizer's {key}")));
            }
        }
        if case.join("base_residual.safetensors").exists() {
            return Err(not_yet("an initialisation that changes the base"));
        }
        Ok(Self { json })
    }

    fn number(&self, path: &str) -> f64 {
        self.json.pointer(path).and_then(Value::as_f64).expect(path)
    }

    fn optimizer(&self) -> AdamW {
        AdamW::new(AdamWConfig {
            beta1: self.number("/optimizer/betas/0"),
            beta2: self.number("/optimizer/betas/1"),
            eps: self.number("/optimizer/eps"),
            weight_decay: self.number("/optimizer/weight_decay"),
        })
    }

    fn schedule(&self) -> Result<Schedule, Verdict> {
        let shape = match self.json["schedule"]["kind"].as_str() {
            Some("cosine") => LrScheduler::Cosine,
            Some("linear") => LrScheduler::Linear,
            Some("constant") => LrScheduler::Constant,
            other => return Err(not_yet(format!("the schedule {other:?}"))),
        };
        Ok(Schedule {
            peak: self.number("/optimizer/lr"),
            shape,
            warmup_steps: self.number("/schedule/warmup_steps") as usize,
            total_steps: self.number("/schedule/total_steps") as usize,
        })
    }
}

fn lora_case(case: &Path) -> Case {
    let hyper = Hyper::open(case)?;
    let base = reference()
        .join("models")
        .join(hyper.json["base"].as_str().expect("base"));
    let mut model = load(&base)?;
    let (config, pairs) = read_adapter(&case.join("adapter_init"))?;
    let shapes = names::linear_shapes(model.config());
    let modules = peft::fit(case, &config, &pairs, &shapes).map_err(failed)?;
    inject::inject(
        &mut model,
        &modules,
        config.lora_dropout,
        &Init::Loaded(&pairs),
    );
    let expected = Tensors::open(&case.join("expected.safetensors"));
    let mut figures = Figures::default();
    let probe = |model: &CausalLm| probe(model, &expected);
    let before = expected.floats("logits_before");
    figures.check(
        "logits",
        "logits_before",
        distance(&probe(&model), &before),
        tolerance::LOGITS,
    );
    train(&mut model, case, &hyper, &expected, &mut figures)?;
    let after = expected.floats("logits_after");
    let off = distance(&probe(&model.frozen()), &after);
    figures.check(
        "trained logits",
        "logits_after",
        off,
        tolerance::TRAINED_LOGITS,
    );
    check_final(&mut model, case, &mut figures)?;
    check_merge(case, &base, &expected, &mut figures)?;
    figures.verdict()
}

fn probe(model: &CausalLm, expected: &Tensors) -> Vec<f32> {
    let ids = expected.ints("probe_input_ids");
    let input = Tokens {
        ids: &ids,
        batch: expected.shape("probe_input_ids")[0],
        positions: None,
    };
    flat(
        model
            .frozen()
            .logits(model.frozen().hidden(input, None, None)),
    )
}

/// The whole training run, step by step against PEFT's.
fn train(
    model: &mut CausalLm,
    case: &Path,
    hyper: &Hyper,
    expected: &Tensors,
    figures: &mut Figures,
) -> Result<(), Verdict> {
    let batches = Tensors::open(&case.join("batches.safetensors"));
    let (ids, labels) = (batches.ints("input_ids"), batches.ints("labels"));
    let [all, batch, tokens] = batches.shape("input_ids")[..] else {
        panic!("input_ids are [steps * accum, B, T]")
    };
    let accum = hyper.number("/accum") as usize;
    let batches: Vec<Batch> = (0..all)
        .map(|i| {
            let rows = i * batch * tokens..(i + 1) * batch * tokens;
            Batch {
                batch,
                tokens,
                input_ids: ids[rows.clone()].to_vec(),
                labels: labels[rows].to_vec(),
                lengths: vec![tokens; batch],
            }
        })
        .collect();
    let (losses, norms) = (expected.floats("loss"), expected.floats("grad_norm"));
    let (rates, counts) = (expected.floats("lr"), expected.ints("n_label_tokens"));
    let groups = expected.shape("lr")[1];
    let (mut optimizer, schedule) = (hyper.optimizer(), hyper.schedule()?);
    for (i, batches) in batches.chunks_exact(accum).enumerate() {
        let mut got = step::gradients(model, batches, None, &|| false).expect("not interrupted");
        let (loss_tolerance, norm_tolerance) = if i == 0 {
            check_gradients(&got.gradients, expected, figures);
            (tolerance::LOSS, tolerance::GRADIENT)
        } else {
            (tolerance::TRAINING, tolerance::TRAINING)
        };
        let norm = step::clip(&mut got.gradients, hyper.number("/max_grad_norm"));
        let rate = schedule.learning_rate(i);
        let scaled = |got: f64, want: f64| (got - want).abs() / want.abs().max(1.0);
        figures.check(
            "loss",
            &format!("loss[{i}]"),
            scaled(got.loss, losses[i]),
            loss_tolerance,
        );
        figures.check(
            "norm",
            &format!("grad_norm[{i}]"),
            scaled(norm, norms[i]),
            norm_tolerance,
        );
        figures.check(
            "lr",
            &format!("lr[{i}]"),
            (rate - rates[i * groups]).abs(),
            tolerance::LEARNING_RATE,
        );
        let tokens = (got.label_tokens as f64 - f64::from(counts[i])).abs();
        figures.check("tokens", &format!("n_label_tokens[{i}]"), tokens, 0.0);
        optimizer.step(model, got.gradients, rate);
    }
    Ok(())
}

fn check_gradients(gradients: &Gradients, expected: &Tensors, figures: &mut Figures) {
    for (name, gradient) in gradients {
        let (module, half) = name.rsplit_once(".lora_").expect("an adapter's tensor");
        let key = format!(
            "grad0.base_model.model.{module}.lora_{}.weight",
            half.to_uppercase()
        );
        let off = distance(&to_vec(gradient.clone()), &expected.floats(&key));
        figures.check("gradient", &key, off, tolerance::GRADIENT);
    }
    let wanted = expected
        .file()
        .names()
        .iter()
        .filter(|n| n.starts_with("grad0."))
        .count();
    let missing = wanted.abs_diff(gradients.len()) as f64;
    figures.check("gradients missing", "number of gradients", missing, 0.0);
}

fn check_final(model: &mut CausalLm, case: &Path, figures: &mut Figures) -> Result<(), Verdict> {
    let (_, want) = peft::read_adapter(&case.join("adapter_final")).map_err(failed)?;
    let got: BTreeMap<String, LoraPair> = inject::extract(model).into_iter().collect();
    let keys = |pairs: &BTreeMap<String, LoraPair>| pairs.keys().cloned().collect::<Vec<_>>();
    if keys(&got) != keys(&want) {
        return Err(failed("the trained modules differ"));
    }
    for (module, want) in &want {
        let got = &got[module];
        for (half, got, want) in [("A", &got.a, &want.a), ("B", &got.b, &want.b)] {
            let want: Vec<f64> = want.iter().map(|&x| f64::from(x)).collect();
            let name = format!("{module} {half}");
            figures.check("adapter", &name, distance(got, &want), tolerance::ADAPTER);
        }
    }
    Ok(())
}

/// PEFT's own final adapter, merged here, gives the logits of PEFT's merge.
fn check_merge(
    case: &Path,
    base: &Path,
    expected: &Tensors,
    figures: &mut Figures,
) -> Result<(), Verdict> {
    let scratch = tempfile::tempdir().map_err(failed)?;
    let out = scratch.path().join("merged");
    let job = MergeJob {
        base,
        adapter: &case.join("adapter_final"),
        out: &out,
        dtype: None,
        shard_size: 60_000,
    };
    merge(&job, &mut |_| {}).map_err(failed)?;
    let merged = load(&out)?;
    let off = distance(&probe(&merged, expected), &expected.floats("logits_merged"));
    figures.check(
        "merged logits",
        "logits_merged",
        off,
        tolerance::TRAINED_LOGITS,
    );
    Ok(())
}

#[test]
fn lora_equals_peft() {
    run_all("lora", lora_case);
}

/// A tensor of the test's own device, so that a broken comparison cannot pass unseen.
#[test]
fn the_comparison_sees_a_difference() {
    assert!(distance(&[1.0, 2.0], &[1.0, 2.5]) > 0.1);
    assert!(distance(&[f32::NAN], &[1.0]).is_nan());
    let tensor = Tensor::<2>::from_data(TensorData::new(vec![1f32, 2.0], [1, 2]), &Device::flex());
    assert_eq!(flat(tensor), [1.0, 2.0]);
    assert!(
        !Tensors {
            bytes: vec![2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']
        }
        .has("x")
    );
}
