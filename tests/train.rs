//! What a run computes, where it ends, and what it says when it cannot go on.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use lorafit::adapter::config::AdapterConfig;
use lorafit::adapter::inject::{self, Init};
use lorafit::adapter::peft::{AdapterWeights, LoraPair};
use lorafit::adapter::target::{ModuleAdapter, Targeting};
use lorafit::data::batch::{Batch, collate};
use lorafit::data::reader::Place;
use lorafit::data::{IGNORE_INDEX, Sample, SampleId};
use lorafit::device::to_vec;
use lorafit::model::CausalLm;
use lorafit::model::names::linear_shapes;
use lorafit::model::weights::Weights;
use lorafit::random::Stream;
use lorafit::train::recompute::Retain;
use lorafit::train::step::{self, StepGradients};
use serde_json::Value;

use crate::fixture::{RECIPE, Ran, Workspace, chat};

/// `|got - want| / max|want|` of losses and gradients of the same samples, split differently:
/// the same f32 sums in another order, which moves them by about 1e-6.
pub(crate) const SPLIT_TOLERANCE: f64 = 1e-5;

/// Eight samples whose lengths and trained tokens are as uneven as they get.
pub(crate) fn uneven_samples() -> Vec<Sample> {
    let random = Stream::new(11);
    let shapes = [
        (5, 1),
        (60, 50),
        (9, 2),
        (33, 4),
        (2, 1),
        (47, 46),
        (18, 9),
        (25, 1),
    ];
    let sample = |(i, (length, trained)): (usize, &(usize, usize))| {
        let random = random.split(i as u64);
        let input_ids: Vec<u32> = (0..*length)
            .map(|t| (random.bits(t as u64) % 512) as u32)
            .collect();
        let labels = input_ids.iter().enumerate();
        let labels = labels.map(|(t, &id)| {
            if t + trained >= *length {
                id as i32
            } else {
                IGNORE_INDEX
            }
        });
        Sample {
            labels: labels.collect(),
            input_ids,
            source: SampleId {
                file: Path::new("rows").into(),
                place: Place::Line(i as u64 + 1),
            },
            truncated: false,
        }
    };
    shapes.iter().enumerate().map(sample).collect()
}

/// The tiny Llama; with adapters whose B is not zero, so that A has gradients too, or all trainable.
pub(crate) fn tiny_model(full: bool, device: &Device) -> CausalLm {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama");
    let weights = Weights::open(&base).unwrap();
    let mut model = CausalLm::load(&weights, weights.config().unwrap(), device).unwrap();
    if full {
        inject::train_all(&mut model);
        return model;
    }
    let random = Stream::new(5);
    let (mut modules, mut pairs) = (Vec::new(), BTreeMap::new());
    for (i, (module, [out, input])) in linear_shapes(model.config()).into_iter().enumerate() {
        let random = random.split(i as u64);
        let draw = |n: usize, half: u64| -> Vec<f32> {
            (0..n as u64)
                .map(|i| (random.split(half).normal(i) * 0.1) as f32)
                .collect()
        };
        let pair = LoraPair {
            a: draw(4 * input, 0),
            a_shape: [4, input],
            b: draw(out * 4, 1),
            b_shape: [out, 4],
            magnitude: None,
        };
        pairs.insert(module.clone(), pair);
        modules.push(ModuleAdapter {
            module,
            rank: 4,
            alpha: 8.0,
            scaling: 2.0,
        });
    }
    let weights = AdapterWeights {
        pairs,
        ..AdapterWeights::default()
    };
    let config = AdapterConfig::new("tiny", None, Targeting::all_linear(4, 8.0), 0.0);
    inject::inject(&mut model, &config, &modules, &Init::Loaded(&weights));
    model
}

pub(crate) fn gradients(model: &mut CausalLm, batches: &[Batch]) -> StepGradients {
    step::gradients(model, batches, None, Retain::Graphs, &|| false).expect("nobody interrupts")
}

pub(crate) fn batches(samples: &[Sample], micro_batch: usize) -> Vec<Batch> {
    let chunks = samples.chunks(micro_batch);
    chunks
        .map(|rows| collate(&rows.iter().collect::<Vec<_>>(), 3))
        .collect()
}

/// Asserts equal losses and gradients.
#[track_caller]
pub(crate) fn assert_equal(want: &StepGradients, got: &StepGradients, tolerance: f64, what: &str) {
    assert_eq!(want.label_tokens, got.label_tokens, "{what}");
    let off = (want.loss - got.loss).abs() / want.loss.abs();
    assert!(
        off < tolerance,
        "{what}: loss {} and {}: {off:.2e}",
        want.loss,
        got.loss
    );
    assert!(
        !want.gradients.is_empty() && want.gradients.len() == got.gradients.len(),
        "{what}"
    );
    for (name, want) in &want.gradients {
        let (want, got) = (to_vec(want.clone()), to_vec(got.gradients[name].clone()));
        let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
        let off = want.iter().zip(&got).map(|(w, g)| (w - g).abs() / largest);
        // Not `max`, which would drop a NaN.
        let off = off.fold(0f32, |m, x| if x <= m { m } else { x });
        assert!(
            f64::from(off) < tolerance,
            "{what}: gradient of {name}: {off:.2e}"
        );
    }
}

#[test]
fn batch_and_accumulation_are_one_choice() {
    let samples = uneven_samples();
    for full in [false, true] {
        let mut model = tiny_model(full, &Device::flex());
        let whole = gradients(&mut model, &batches(&samples, 8));
        for micro_batch in [4, 2, 1, 3] {
            let split = gradients(&mut model, &batches(&samples, micro_batch));
            let what = format!("micro-batches of {micro_batch}, full {full}");
            assert_equal(&whole, &split, SPLIT_TOLERANCE, &what);
        }
        // The samples tell the right loss from the mean of the micro-batches' means.
        let each = samples
            .iter()
            .map(|s| gradients(&mut model, &batches(std::slice::from_ref(s), 1)).loss);
        let mean_of_means = each.sum::<f64>() / samples.len() as f64;
        assert!(
            (mean_of_means / whole.loss - 1.0).abs() > 10.0 * SPLIT_TOLERANCE,
            "{mean_of_means} {}",
            whole.loss
        );
    }
}

/// The events of one kind in `run/metrics.jsonl`.
pub(crate) fn metrics(workspace: &Workspace, kind: &str) -> Vec<Value> {
    let text = workspace.read("run/metrics.jsonl");
    let events = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect(line));
    events.filter(|event| event["event"] == kind).collect()
}

pub(crate) fn train(workspace: &Workspace, args: &[&str]) -> Ran {
    workspace.run(&[&["train", "recipe.yaml", "--quiet"], args].concat())
}

pub(crate) fn column(events: &[Value], key: &str) -> Vec<f64> {
    events
        .iter()
        .map(|event| event[key].as_f64().expect(key))
        .collect()
}

/// Writes `value` over the whole row of `id` in the base's embedding.
fn poison_embedding(base: &Path, id: usize, value: f32) {
    let path = base.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let tensor = &json["model.embed_tokens.weight"];
    assert_eq!(tensor["dtype"], "F32");
    let width = 4 * tensor["shape"][1].as_u64().unwrap() as usize;
    let start = header + tensor["data_offsets"][0].as_u64().unwrap() as usize + id * width;
    for element in bytes[start..start + width].chunks_exact_mut(4) {
        element.copy_from_slice(&value.to_le_bytes());
    }
    fs::write(path, bytes).unwrap();
}

/// The id of a token by its text in the vocabulary.
fn token_id(workspace: &Workspace, token: &str) -> usize {
    let json: Value = serde_json::from_str(&workspace.read("base/tokenizer.json")).unwrap();
    json["model"]["vocab"][token].as_u64().expect(token) as usize
}

/// Rows 1 to 3 train; row 4 is the only one with a `@`, whose embedding is not finite.
fn poisoned(value: f32) -> Workspace {
    let workspace = Workspace::new();
    let rows = ["One.", "Two.", "Three.", "At @.", "Five."].map(|answer| chat("Say.", answer));
    workspace.write("data.jsonl", &rows.concat());
    poison_embedding(&workspace.path("base"), token_id(&workspace, "@"), value);
    let recipe = "base: {model: base}\ndata: {train: [data.jsonl], max_seq_len: 64, shuffle: false}\n\
        train: {micro_batch_size: 1, gradient_accumulation_steps: 1, save_steps: 1}\noutput_dir: run\n";
    workspace.write("recipe.yaml", recipe);
    workspace
}

#[test]
fn a_loss_that_is_no_number_stops_with_step_and_rows() {
    for value in [f32::INFINITY, f32::NAN] {
        let workspace = poisoned(value);
        let parts = [
            "step 3: the loss is",
            "data.jsonl:4;",
            "the last run state is kept",
        ];
        train(&workspace, &[]).fails(1, &parts);
        assert_eq!(
            workspace.names("run/states"),
            ["step-000002", "step-000003"]
        );
        assert_eq!(
            column(&metrics(&workspace, "step"), "step"),
            [1.0, 2.0, 3.0]
        );
        assert!(!workspace.path("run/adapter").exists());
        // It goes on from there to the same end.
        train(&workspace, &["--resume"]).fails(1, &parts);
        assert_eq!(
            workspace.names("run/states"),
            ["step-000002", "step-000003"]
        );
    }
}

#[test]
fn a_validation_loss_that_is_no_number_stops_too() {
    let workspace = poisoned(f32::NAN);
    workspace.write("validation.jsonl", &chat("Say.", "At @."));
    let set = ["--set", "data.validation=[validation.jsonl]"];
    train(&workspace, &set).fails(1, &["step 0: the validation loss is NaN"]);
}

/// A decay above 1 turns the weights over and makes them grow at every step, beyond f32 at last.
#[test]
fn weights_that_explode_stop_the_run() {
    let workspace = Workspace::new();
    let recipe = workspace.read("recipe.yaml");
    let recipe = recipe.replace("  rank: 4\n  alpha: 8\n", "  method: full\n");
    workspace.write("recipe.yaml", &recipe);
    let sets = [
        "train.learning_rate=1",
        "train.weight_decay=10",
        "train.lr_scheduler=constant",
        "train.max_steps=200",
    ];
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    train(&workspace, &args).fails(1, &["lower train.learning_rate", "data.jsonl:"]);
    let losses = column(&metrics(&workspace, "step"), "loss");
    assert!(losses.len() < 200 && losses.iter().all(|loss| loss.is_finite()));
}

/// Training rows and validation rows that contradict each other: the validation loss falls while
/// the format is learned, and rises when the answers are.
fn contradicting() -> Workspace {
    let workspace = Workspace::new();
    let rows = |answer: &str| -> String {
        (0..4)
            .map(|i| chat(&format!("Define {i}."), answer))
            .collect()
    };
    workspace.write(
        "data.jsonl",
        &rows("A person who talks when you wish him to listen."),
    );
    workspace.write("validation.jsonl", &rows("A person who talks, or kicks."));
    let recipe = "base: {model: base}\n\
        data: {train: [data.jsonl], validation: [validation.jsonl], max_seq_len: 64}\n\
        adapter: {rank: 4}\n\
        train:\n  {micro_batch_size: 4, gradient_accumulation_steps: 1, learning_rate: 1.0e-2, max_steps: 200,\n  \
        warmup_steps: 0, lr_scheduler: constant, eval_steps: 2, early_stopping_patience: 3, save_steps: 1}\n\
        output_dir: run\n";
    workspace.write("recipe.yaml", recipe);
    workspace
}

#[test]
fn a_run_stops_early_and_keeps_the_best() {
    let workspace = contradicting();
    train(&workspace, &[]).exits(0);
    let evals = metrics(&workspace, "eval");
    let (steps, losses) = (column(&evals, "step"), column(&evals, "loss"));
    let lowest = losses.iter().copied().fold(f64::INFINITY, f64::min);
    let best = steps[losses.iter().position(|&loss| loss == lowest).unwrap()];
    assert!(best >= 2.0, "it never improved: {losses:?}");
    let last = *steps.last().unwrap();
    assert_eq!(
        last,
        best + 6.0,
        "three evaluations after the best: {losses:?}"
    );
    let stop = metrics(&workspace, "early_stop");
    assert_eq!(
        (column(&stop, "step"), column(&stop, "best_step")),
        (vec![last], vec![best])
    );
    assert_eq!(
        column(&metrics(&workspace, "step"), "step").len(),
        last as usize
    );
    let mut marked = evals.iter().filter(|eval| eval["best"] == true);
    assert_eq!(marked.next_back().unwrap()["step"].as_f64(), Some(best));
    let states = [best, last - 1.0, last].map(|step| format!("step-{step:06}"));
    assert_eq!(workspace.names("run/states"), states);
    let adapter =
        |dir: &str| fs::read(workspace.path(dir).join("adapter_model.safetensors")).unwrap();
    assert_ne!(adapter("run/adapter"), adapter("run/adapter-best"));
    // The best is what a run that ended there would have written.
    let steps = format!("train.max_steps={best}");
    train(&workspace, &["--set", &steps, "--out", "short"]).exits(0);
    assert_eq!(adapter("short/adapter"), adapter("run/adapter-best"));
    assert!(!workspace.path("short/adapter-best").exists());
    let card = workspace.read("run/adapter-best/README.md");
    assert!(card.contains(&format!("{lowest:.4}")), "{card}");
}

#[test]
fn a_stopped_early_run_that_is_resumed_stays_stopped() {
    let workspace = contradicting();
    train(&workspace, &[]).exits(0);
    let before = (
        workspace.names("run/states"),
        column(&metrics(&workspace, "eval"), "loss"),
    );
    train(&workspace, &["--resume"]).exits(0);
    let after = (
        workspace.names("run/states"),
        column(&metrics(&workspace, "eval"), "loss"),
    );
    assert_eq!(before, after);
    assert_eq!(metrics(&workspace, "done").len(), 1);
}

#[test]
fn the_last_states_are_kept() {
    let workspace = Workspace::new();
    let args = [
        "--set",
        "train.save_steps=1",
        "--set",
        "train.save_total_limit=3",
        "--set",
        "train.max_steps=6",
    ];
    train(&workspace, &args).exits(0);
    assert_eq!(
        workspace.names("run/states"),
        ["step-000004", "step-000005", "step-000006"]
    );
}

/// Six rows in steps of four: two steps an epoch.
#[test]
fn epochs_and_steps_end_a_run() {
    let small = [
        "--set",
        "train.gradient_accumulation_steps=2",
        "--overwrite",
    ];
    for (set, steps) in [
        ("num_epochs=1", 2),
        ("num_epochs=1.5", 3),
        ("num_epochs=0.1", 1),
        ("max_steps=5", 5),
    ] {
        let workspace = Workspace::new();
        let recipe = workspace
            .read("recipe.yaml")
            .replace("  max_steps: 4\n", "");
        workspace.write("recipe.yaml", &recipe);
        train(
            &workspace,
            &[&small[..], &["--set", &format!("train.{set}")]].concat(),
        )
        .exits(0);
        let events = metrics(&workspace, "step");
        assert_eq!(events.len(), steps, "{set}");
        let epochs: Vec<f64> = (1..=steps).map(|step| step as f64 / 2.0).collect();
        assert_eq!(column(&events, "epoch"), epochs, "{set}");
    }
}

#[test]
fn learning_rates_are_the_recipes() {
    let rates = |shape: &str| {
        let workspace = Workspace::new();
        let shape = format!("train.lr_scheduler={shape}");
        let args = [
            "--set",
            &shape,
            "--set",
            "train.warmup_steps=2",
            "--set",
            "train.max_steps=6",
        ];
        train(&workspace, &args).exits(0);
        column(&metrics(&workspace, "step"), "learning_rate")
    };
    let expected = |factors: [f64; 6]| factors.map(|factor| factor * 1e-2);
    assert_eq!(rates("constant"), expected([0.0, 0.5, 1.0, 1.0, 1.0, 1.0]));
    assert_eq!(rates("linear"), expected([0.0, 0.5, 1.0, 0.75, 0.5, 0.25]));
    let cosine = rates("cosine");
    let half = |x: f64| 0.5 * (1.0 + (std::f64::consts::PI * x).cos());
    let want = expected([0.0, 0.5, 1.0, half(0.25), 0.5, half(0.75)]);
    assert!(
        cosine
            .iter()
            .zip(want)
            .all(|(got, want)| (got - want).abs() < 1e-15),
        "{cosine:?}"
    );
}

#[test]
fn training_goes_on_from_an_adapter() {
    let workspace = Workspace::new();
    workspace.run(&["train", "recipe.yaml"]).exits(0);
    // An adapter made here; PEFT's own come in through the same files (the goldens train from them).
    let again = RECIPE
        .replace("  rank: 4\n  alpha: 8\n", "  init_from: run/adapter\n")
        .replace("output_dir: run", "output_dir: again");
    workspace.write("again.yaml", &again);
    // The first step of a warm-up has learning rate 0: the adapter must come out as it went in.
    let still = [
        "--set",
        "train.max_steps=1",
        "--set",
        "train.warmup_steps=1",
    ];
    let args = [&["train", "again.yaml"], &still[..]].concat();
    workspace.run(&args).exits(0);
    let weights = |run: &str| {
        let file = workspace
            .path(run)
            .join("adapter/adapter_model.safetensors");
        fs::read(file).unwrap()
    };
    assert_eq!(weights("run"), weights("again"));
    // And it trains: with a learning rate it moves.
    let args = ["train", "again.yaml", "--out", "moved"];
    workspace.run(&args).exits(0);
    assert_ne!(weights("run"), weights("moved"));
}
