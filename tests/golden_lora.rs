//! Training runs give PEFT's losses, norms, gradients, adapters and merged logits, step by step.

use std::collections::BTreeSet;
use std::path::Path;

use burn::tensor::Device;
use lorafit::adapter::config::{AdapterConfig, AdapterConfigError};
use lorafit::adapter::inject::{self, Init};
use lorafit::adapter::peft::{self, AdapterWeights, LoraPair};
use lorafit::data::batch::Batch;
use lorafit::device::to_vec;
use lorafit::export::merged::{MergeJob, merge};
use lorafit::export::model::SaveDtype;
use lorafit::model::config::ModelConfig;
use lorafit::model::names::LoraHalf;
use lorafit::model::{CausalLm, Keep, Tokens, names};
use lorafit::quant::Scheme;
use lorafit::recipe::LrScheduler;
use lorafit::train::optimizer::{AdamW, AdamWConfig};
use lorafit::train::recompute::Retain;
use lorafit::train::schedule::Schedule;
use lorafit::train::step::{self, Gradients};
use serde_json::Value;

use crate::reference::{
    Case, Figures, Tensors, Verdict, distance, failed, flat, load, load_as, not_yet, run_all, sets,
    tolerance, unpacked,
};

/// Reads an adapter; what lorafit has not is not supported yet.
fn read_adapter(dir: &Path) -> Result<(AdapterConfig, AdapterWeights), Verdict> {
    let config = AdapterConfig::load(dir).map_err(|error| match error {
        AdapterConfigError::Unsupported { .. } => not_yet(error),
        _ => failed(error),
    })?;
    let (_, weights) = peft::read_adapter(dir).map_err(failed)?;
    Ok((config, weights))
}

/// What a LoRA case trains with.
struct Hyper {
    json: Value,
}

impl Hyper {
    fn open(case: &Path) -> Result<Self, Verdict> {
        let text = std::fs::read_to_string(case.join("hyper.json")).map_err(failed)?;
        let json: Value = serde_json::from_str(&text).map_err(failed)?;
        let known = [
            "lr",
            "betas",
            "eps",
            "weight_decay",
            "loraplus_lr_ratio",
            "loraplus_lr_embedding",
        ];
        for key in json["optimizer"].as_object().expect("optimizer").keys() {
            if !known.contains(&key.as_str()) {
                return Err(not_yet(format!("the optimizer's {key}")));
            }
        }
        Ok(Self { json })
    }

    /// How the base is quantised.
    fn scheme(&self) -> Option<Scheme> {
        (self.json["nf4_base"] == Value::Bool(true)).then_some(Scheme::Nf4Double)
    }

    fn number(&self, path: &str) -> f64 {
        self.json.pointer(path).and_then(Value::as_f64).expect(path)
    }

    /// The names of the optimizer's groups.
    fn groups(&self) -> impl Iterator<Item = &str> {
        let names = self.json["lr_groups"].as_array().expect("lr_groups");
        names.iter().map(|name| name.as_str().expect("a name"))
    }

    /// What LoRA+ multiplies the learning rate of B by.
    fn ratio(&self) -> f64 {
        let ratio = self.json.pointer("/optimizer/loraplus_lr_ratio");
        ratio.and_then(Value::as_f64).unwrap_or(1.0)
    }

    /// LoRA+'s learning rate of the embedding's adapter.
    fn embedding_rate(&self) -> f64 {
        let rate = self.json.pointer("/optimizer/loraplus_lr_embedding");
        rate.and_then(Value::as_f64).unwrap_or(1e-6)
    }

    fn optimizer(&self) -> AdamW {
        AdamW::new(AdamWConfig {
            beta1: self.number("/optimizer/betas/0"),
            beta2: self.number("/optimizer/betas/1"),
            eps: self.number("/optimizer/eps"),
            weight_decay: self.number("/optimizer/weight_decay"),
            loraplus_lr_ratio: self.ratio(),
            embedding_lr_ratio: match self.ratio() == 1.0 {
                true => 1.0,
                false => self.embedding_rate() / self.number("/optimizer/lr"),
            },
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
    let base = set_of(case)
        .join("models")
        .join(hyper.json["base"].as_str().expect("base"));
    let keep = Keep {
        linears: hyper.scheme(),
        ..Keep::default()
    };
    let mut model = load_as(&base, keep)?;
    let (config, weights) = read_adapter(&case.join("adapter_init"))?;
    let modules = peft::fit_model(case, &config, &weights, model.config()).map_err(failed)?;
    let config = with_init(config, case)?;
    inject::inject(&mut model, &config, &modules, &Init::Loaded(&weights));
    let expected = Tensors::open(&case.join("expected.safetensors"));
    let mut figures = Figures::default();
    if config.taken_out().is_some() {
        check_residual(&mut model, case, &mut figures);
    }
    if hyper.scheme().is_some() {
        check_dequantised(&mut model, case, &mut figures)?;
    }
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
    // What was trained beside a changed base is saved for the base as it was.
    let plain = case.join("adapter_final_as_plain_lora");
    let last = match config.taken_out() {
        Some(_) => plain,
        None => case.join("adapter_final"),
    };
    check_final(&mut model, &last, &config.as_written(), &mut figures)?;
    check_merge(&last, (&base, hyper.scheme()), &expected, &mut figures)?;
    figures.verdict()
}

/// The quantised weights stand for those that the reference trained on, bit for bit.
fn check_dequantised(
    model: &mut CausalLm,
    case: &Path,
    figures: &mut Figures,
) -> Result<(), Verdict> {
    let sample = Tensors::open(&case.join("base_dequantised_sample.safetensors"));
    let mut seen = 0;
    for (module, weight, _) in model.deltas() {
        let name = format!("{module}.weight");
        if sample.has(&name) {
            let got = flat(weight.in_f32(&Device::flex()));
            figures.check("base", &name, distance(&got, &sample.floats(&name)), 0.0);
            seen += 1;
        }
    }
    match seen {
        0 => Err(failed("the sample names no module")),
        _ => Ok(()),
    }
}

/// The configuration with the initialisation that the case's author asked for: PEFT's files say of a
/// changed base only that A and B are given.
fn with_init(config: AdapterConfig, case: &Path) -> Result<AdapterConfig, Verdict> {
    let spec = std::fs::read_to_string(set_of(case).join("spec.json")).map_err(failed)?;
    let spec: Value = serde_json::from_str(&spec).map_err(failed)?;
    let name = case.file_name().expect("a name").to_string_lossy();
    let init = &spec["lora"][name.as_ref()]["peft"]["init_lora_weights"];
    let config = match init {
        Value::Null => config,
        init => AdapterConfig {
            init_lora_weights: init.clone(),
            ..config
        },
    };
    match config.taken_out() {
        None if case.join("base_residual.safetensors").exists() => {
            Err(not_yet(format!("the initialisation {init}")))
        }
        _ => Ok(config),
    }
}

/// The base has lost what PEFT takes out of it.
fn check_residual(model: &mut CausalLm, case: &Path, figures: &mut Figures) {
    let residual = Tensors::open(&case.join("base_residual.safetensors"));
    model.visit(&mut |name, parameter| {
        if !parameter.is_trainable() && residual.file().names().contains(&name) {
            let off = distance(&to_vec(parameter.flat()), &residual.floats(name));
            figures.check("residual", name, off, tolerance::ADAPTER);
        }
    });
}

fn probe(model: &CausalLm, expected: &Tensors) -> Vec<f32> {
    let ids = expected.ints("probe_input_ids");
    let input = Tokens {
        ids: &ids,
        batch: expected.shape("probe_input_ids")[0],
        positions: None,
        segments: None,
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
            unpacked(ids[rows.clone()].to_vec(), labels[rows].to_vec(), tokens)
        })
        .collect();
    let (losses, norms) = (expected.floats("loss"), expected.floats("grad_norm"));
    let (rates, counts) = (expected.floats("lr"), expected.ints("n_label_tokens"));
    let groups = expected.shape("lr")[1];
    let (mut optimizer, schedule) = (hyper.optimizer(), hyper.schedule()?);
    for (i, batches) in batches.chunks_exact(accum).enumerate() {
        let mut got = step::gradients(model, batches, None, Retain::Graphs, &|| false)
            .expect("not interrupted");
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
        for (group, want) in hyper.groups().zip(&rates[i * groups..(i + 1) * groups]) {
            let rate = match group {
                "embedding" => rate * hyper.embedding_rate() / hyper.number("/optimizer/lr"),
                group if group.starts_with('B') => rate * hyper.ratio(),
                _ => rate,
            };
            let off = (rate - want).abs();
            figures.check("lr", &format!("lr[{i}]"), off, tolerance::LEARNING_RATE);
        }
        let tokens = (got.label_tokens as f64 - f64::from(counts[i])).abs();
        figures.check("tokens", &format!("n_label_tokens[{i}]"), tokens, 0.0);
        optimizer.step(model, got.gradients, rate);
    }
    Ok(())
}

fn check_gradients(gradients: &Gradients, expected: &Tensors, figures: &mut Figures) {
    let adapted: BTreeSet<&str> = (gradients.keys())
        .filter_map(|name| (name.strip_suffix(".lora_a")).or(name.strip_suffix(".lambda_d")))
        .collect();
    for (name, gradient) in gradients {
        let (module, field) = name.rsplit_once('.').expect("a tensor of a module");
        let kept = names::peft_module(module, |path| adapted.contains(path));
        let swapped = module == names::EMBEDDING;
        let key = match field {
            "lora_a" if swapped => names::peft_key(&kept, LoraHalf::B),
            "lora_b" if swapped => names::peft_key(&kept, LoraHalf::A),
            "lora_a" => names::peft_key(&kept, LoraHalf::A),
            "lora_b" => names::peft_key(&kept, LoraHalf::B),
            "lambda_d" => names::lambda_key(module, LoraHalf::A),
            "lambda_b" => names::lambda_key(module, LoraHalf::B),
            "token_rows" => names::token_rows_key(module),
            "magnitude" => names::magnitude_key(module),
            _ => names::saved_key(name, adapted.contains(module)),
        };
        let want = expected.floats(&format!("grad0.{key}"));
        let got = to_vec(gradient.clone());
        let off = match swapped && field.starts_with("lora") {
            // PEFT keeps the transposed delta's.
            true => distance(
                &transposed(&got, expected.shape(&format!("grad0.{key}"))[0]),
                &want,
            ),
            false => distance(&got, &want),
        };
        figures.check("gradient", &key, off, tolerance::GRADIENT);
    }
    let wanted = expected
        .file()
        .names()
        .iter()
        // Frozen tensors that the file holds stand among the gradients.
        .filter(|n| n.starts_with("grad0.") && !is_frozen(n))
        .count();
    let missing = wanted.abs_diff(gradients.len()) as f64;
    figures.check("gradients missing", "number of gradients", missing, 0.0);
}

/// Whether a tensor of an adapter's file does not train: wrapped embeddings, VeRA's projections.
fn is_frozen(name: &str) -> bool {
    let projections = LoraHalf::BOTH.map(names::projection_key);
    name.ends_with("base_layer.weight") || projections.iter().any(|key| name.ends_with(key))
}

/// The transposed matrix, which has `rows` rows.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    (0..values.len())
        .map(|i| values[i % columns * rows + i / columns])
        .collect()
}

fn check_final(
    model: &mut CausalLm,
    dir: &Path,
    config: &AdapterConfig,
    figures: &mut Figures,
) -> Result<(), Verdict> {
    let (written, want) = peft::read_adapter(dir).map_err(failed)?;
    let got = inject::extract(model);
    if !got.pairs.keys().eq(want.pairs.keys()) || !got.saved.keys().eq(want.saved.keys()) {
        return Err(failed("the trained modules differ"));
    }
    let scale = |config: &AdapterConfig| (config.targeting.rank, config.targeting.alpha);
    if scale(config) != scale(&written) {
        return Err(failed("rank and alpha differ"));
    }
    let mut check = |name: String, got: &[f32], want: &[f32]| {
        let want: Vec<f64> = want.iter().map(|&x| f64::from(x)).collect();
        figures.check("adapter", &name, distance(got, &want), tolerance::ADAPTER);
    };
    for (module, want) in &want.pairs {
        let got = &got.pairs[module];
        if is_doubled(dir) {
            // Singular vectors have no sign: only the product is the same.
            check(format!("{module} B A"), &product(got), &product(want));
            continue;
        }
        check(format!("{module} A"), &got.a, &want.a);
        check(format!("{module} B"), &got.b, &want.b);
        if let (Some(got), Some(want)) = (&got.magnitude, &want.magnitude) {
            check(format!("{module} magnitude"), got, want);
        }
    }
    if !got.token_rows.keys().eq(want.token_rows.keys()) {
        return Err(failed("the tables with trained rows differ"));
    }
    for (module, want) in &want.token_rows {
        let name = format!("{module} rows");
        check(name, &got.token_rows[module].values, &want.values);
    }
    if let (Some(got), Some(want)) = (&got.vera, &want.vera) {
        if got.shared != want.shared || !got.lambdas.keys().eq(want.lambdas.keys()) {
            return Err(failed("the projections differ"));
        }
        for (module, want) in &want.lambdas {
            check(
                format!("{module} lambda_d"),
                &got.lambdas[module].d,
                &want.d,
            );
            check(
                format!("{module} lambda_b"),
                &got.lambdas[module].b,
                &want.b,
            );
        }
    }
    for (name, want) in &want.saved {
        check(name.clone(), &got.saved[name].values, &want.values);
    }
    Ok(())
}

/// Whether an adapter was made plain, so that it holds singular vectors of the base.
fn is_doubled(dir: &Path) -> bool {
    dir.ends_with("adapter_final_as_plain_lora")
}

/// `B A`, row-major.
fn product(pair: &LoraPair) -> Vec<f32> {
    let ([rank, input], [out, _]) = (pair.a_shape, pair.b_shape);
    let mut product = vec![0f32; out * input];
    for (row, b) in product
        .chunks_exact_mut(input)
        .zip(pair.b.chunks_exact(rank))
    {
        for (b, a) in b.iter().zip(pair.a.chunks_exact(input)) {
            row.iter_mut().zip(a).for_each(|(to, a)| *to += b * a);
        }
    }
    product
}

/// PEFT's own final adapter, merged here, gives the logits of PEFT's merge.
fn check_merge(
    adapter: &Path,
    (base, quantised): (&Path, Option<Scheme>),
    expected: &Tensors,
    figures: &mut Figures,
) -> Result<(), Verdict> {
    let scratch = tempfile::tempdir().map_err(failed)?;
    let out = scratch.path().join("merged");
    let job = MergeJob {
        quantised,
        // The reference merges in f32, whatever the base is stored in.
        dtype: Some(SaveDtype::F32),
        shard_size: 60_000,
        ..MergeJob::new(base, adapter, &out)
    };
    merge(&job, &mut |_| {}).map_err(failed)?;
    let merged = load(&out)?;
    // PEFT merges what an embedding learned into the head that it is tied to as well, which never saw
    // it; here they part, so that the merge is the model that was trained.
    let (_, trained) = peft::read_adapter(adapter).map_err(failed)?;
    let ends = [names::EMBEDDING, names::HEAD];
    let config = ModelConfig::from_dir(base).map_err(failed)?;
    let want = match config.tie_word_embeddings
        && ends.iter().any(|end| trained.pairs.contains_key(*end))
    {
        true => "logits_after",
        false => "logits_merged",
    };
    let off = distance(&probe(&merged, expected), &expected.floats(want));
    figures.check(
        "merged logits",
        "logits_merged",
        off,
        tolerance::TRAINED_LOGITS,
    );
    Ok(())
}

/// The set that a case belongs to.
fn set_of(case: &Path) -> &Path {
    case.ancestors().nth(2).expect("SET/lora/CASE")
}

/// Every case of the sets; the README's table of adapters names those of the project's own that pass.
#[test]
fn lora_equals_peft() {
    let folders = sets().into_iter().map(|set| set.join("lora"));
    let passed: BTreeSet<String> = folders.flat_map(|f| run_all(&f, lora_case)).collect();
    if std::env::var_os("LORAFIT_REFERENCE").is_some() {
        return;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(path).expect("README.md");
    let (_, table) = readme.split_once("## Adapters\n").expect("the table");
    let (table, _) = table.split_once("\n## ").expect("another section");
    let rows = table.lines().filter(|line| line.starts_with("| "));
    let listed: BTreeSet<String> = (rows.skip(1))
        .flat_map(|row| {
            row.trim_end_matches(" |")
                .rsplit("| ")
                .next()
                .unwrap_or("")
                .split(", ")
        })
        .map(str::to_owned)
        .collect();
    let difference: Vec<_> = listed.symmetric_difference(&passed).collect();
    assert!(
        difference.is_empty(),
        "README.md, section Adapters: listed or passed, but not both: {difference:?}"
    );
}
