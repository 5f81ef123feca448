//! Frozen weights in 16 bits: how far the numbers of a model move, and that training follows f32's.
//!
//! bf16 has 8 significant bits, so rounding moves a number by 2⁻⁷/√12 of its power of two, 1.5e-3 of
//! itself in the mean square. Two factors of a product are rounded, weights and activations, which
//! leaves its result 2.1e-3 off, as the errors of a sum's terms average out as the terms do. Along a
//! model of L layers lie 4 L + 2 such products (q/k/v, o, gate/up and down in each layer, embedding
//! and head), whose errors add in squares. Norms, softmaxes and gates may double that on the way
//! forward and again on the way back; a linear attention, whose decay is exponential and whose state
//! carries the errors of all earlier tokens, may double it once more each way. What f16 leaves is the same, 8 times
//! smaller: an error that is not rounding's would not be.
//!
//! An expert that is chosen by a hair in f32 may lose to another: a token's numbers are then others,
//! and so are those of all later ones. Only what comes before is compared, and few may be lost so.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use lorafit::device::scalar;
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Keep, Storage, Tokens};
use lorafit::train::step;

use crate::fixture::Workspace;
use crate::reference::{
    Case, Figures, Tensors, failed, flat, not_yet, reference, run_all, unpacked,
};

/// Mean square error that rounding both factors leaves in a product, as a share of it.
const PRODUCT: f64 = 2.1e-3;
/// What norms and softmaxes may make of it, one way.
const AMPLIFIED: f64 = 2.0;
/// What a linear attention may make of that, one way.
const BY_STATE: f64 = 2.0;
/// Share of the routers' choices that may fall otherwise.
const RECHOSEN: f64 = 0.02;

/// `‖got - want‖ / ‖want‖`
fn relative(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let off: f64 = (got.iter().zip(want))
        .map(|(got, want)| (f64::from(*got) - want).powi(2))
        .sum();
    let size: f64 = want.iter().map(|want| want * want).sum();
    (off / size).sqrt()
}

/// The tokens of each row up to the first for which a router chooses other experts than in f32.
fn unmoved(
    model: &CausalLm,
    input: Tokens,
    expected: &Tensors,
    figures: &mut Figures,
) -> Vec<usize> {
    let tokens = input.ids.len() / input.batch;
    let mut unmoved = vec![tokens; input.batch];
    let (Some(moe), true) = (model.config().moe, expected.has("router_logits")) else {
        return unmoved;
    };
    let chosen = |logits: &[f64]| {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&i, &j| logits[j].total_cmp(&logits[i]));
        order.truncate(moe.num_experts_per_tok);
        order.sort();
        order
    };
    let got: Vec<f64> = (model.router_logits(input).into_iter())
        .flat_map(|logits| flat(logits).into_iter().map(f64::from))
        .collect();
    let want = expected.floats("router_logits");
    let choices = || (got.chunks_exact(moe.num_experts)).zip(want.chunks_exact(moe.num_experts));
    let mut moved = 0;
    for (i, (got, want)) in choices().enumerate() {
        if chosen(got) != chosen(want) {
            moved += 1;
            let token = i % input.ids.len();
            let first = &mut unmoved[token / tokens];
            *first = (*first).min(token % tokens);
        }
    }
    let share = f64::from(moved) / choices().count() as f64;
    figures.check("rechosen", "choices of experts", share, RECHOSEN);
    unmoved
}

/// Loads a golden, whose weights are f32, with its matrices rounded to 16 bits.
fn model_case(dir: &Path, storage: Storage) -> Case {
    let weights = Weights::open(dir).map_err(failed)?;
    let config = weights.config().map_err(not_yet)?;
    let products = 4.0 * config.num_hidden_layers as f64 + 2.0;
    let product = match storage {
        Storage::Bf16 => PRODUCT,
        _ => PRODUCT / 8.0,
    };
    let amplified = match config.linear {
        Some(_) => AMPLIFIED * BY_STATE,
        None => AMPLIFIED,
    };
    let allowed = amplified * product * products.sqrt();
    let keep = Keep {
        storage,
        ..Keep::default()
    };
    let model = CausalLm::load_as(&weights, config, &Device::flex(), keep).map_err(failed)?;
    let expected = Tensors::open(&dir.join("expected.safetensors"));
    let ids = expected.ints("input_ids");
    let tokens = expected.shape("input_ids")[1];
    let positions: Vec<usize> = (expected.ints("position_ids").iter())
        .map(|&position| position as usize)
        .collect();
    let input = Tokens {
        ids: &ids,
        batch: ids.len() / tokens,
        positions: Some(&positions),
        segments: None,
    };
    let mut figures = Figures::default();
    let unmoved = unmoved(&model, input, &expected, &mut figures);
    let embedded = model.embed(input).autodiff().require_grad();
    let hidden = model.body(embedded.clone(), input, None, None);
    let logits = flat(model.logits(hidden.clone().inner()));
    let (want, width) = (expected.floats("logits"), model.config().vocab_size);
    let (mut got_rows, mut want_rows) = (Vec::new(), Vec::new());
    for (row, count) in unmoved.iter().enumerate() {
        let range = row * tokens * width..(row * tokens + count) * width;
        got_rows.extend_from_slice(&logits[range.clone()]);
        want_rows.extend_from_slice(&want[range]);
    }
    let off = relative(&got_rows, &want_rows);
    figures.check("logits", "logits", off, allowed);
    if unmoved.iter().any(|count| *count < tokens) {
        return figures.verdict();
    }
    let targets: Arc<[i32]> = step::targets(&unpacked(ids.clone(), ids.clone(), tokens));
    let count = targets.iter().filter(|&&target| target >= 0).count() as f64;
    let loss = (model.loss_sum(hidden, targets, None)).mul_scalar(1.0 / count);
    let off = (scalar(loss.clone().inner()) - expected.floats("loss")[0]).abs();
    figures.check("loss", "loss", off, allowed);
    let mut gradients = loss.backward();
    let gradient = embedded.grad_remove(&mut gradients).expect("a gradient");
    let off = relative(&flat(gradient), &expected.floats("grad_layer0_input"));
    let allowed = allowed * amplified;
    figures.check("gradient", "grad_layer0_input", off, allowed);
    figures.verdict()
}

#[test]
fn models_in_bf16_stay_close_to_transformers() {
    run_all(&reference().join("models"), |dir| {
        model_case(dir, Storage::Bf16)
    });
}

#[test]
fn models_in_f16_stay_closer() {
    run_all(&reference().join("models"), |dir| {
        model_case(dir, Storage::F16)
    });
}

/// What the binary says of each step with the precision given.
fn losses(workspace: &Workspace, precision: &str) -> Vec<f64> {
    let set = format!("train.precision={precision}");
    let args = [
        "train",
        "recipe.yaml",
        "--out",
        precision,
        "--set",
        &set,
        "--json",
    ];
    let events = workspace.run(&args).exits(0).events();
    let steps = events.iter().filter(|event| event["event"] == "step");
    steps
        .map(|event| event["loss"].as_f64().expect("a loss"))
        .collect()
}

#[test]
fn training_in_16_bits_follows_f32() {
    let workspace = Workspace::new();
    let f32 = losses(&workspace, "f32");
    assert_eq!(f32.len(), 4);
    // The base's files are f32, so that `auto` is the same.
    assert_eq!(losses(&workspace, "auto"), f32);
    for (precision, allowed) in [("bf16", 8e-3), ("f16", 1e-3)] {
        let half = losses(&workspace, precision);
        assert_ne!(half, f32, "{precision}");
        for (half, f32) in half.iter().zip(&f32) {
            assert!(
                (half - f32).abs() <= allowed * f32,
                "{precision}: {half} {f32}"
            );
        }
    }
}

#[test]
fn all_weights_do_not_train_in_16_bits() {
    let workspace = Workspace::new();
    let full = "adapter.method=full";
    let args = |precision| ["check", "recipe.yaml", "--set", full, "--set", precision];
    let recipe = crate::fixture::RECIPE.replace("adapter:\n  rank: 4\n  alpha: 8\n", "");
    workspace.write("recipe.yaml", &recipe);
    workspace.run(&args("train.precision=f32")).exits(0);
    workspace.run(&args("train.precision=auto")).exits(0);
    let parts = ["train.precision", "all weights train", "set it to f32"];
    workspace
        .run(&args("train.precision=bf16"))
        .fails(2, &parts);
}

/// What trains is in f32, whatever its neighbours are, and begins with what the files say.
#[test]
fn what_trains_stays_f32() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama");
    let weights = Weights::open(&dir).unwrap();
    let trains = |name: &str| name.ends_with("q_proj.weight");
    let config = weights.config().unwrap();
    let device = Device::flex();
    let keep = Keep {
        storage: Storage::Bf16,
        in_f32: &trains,
        ..Keep::default()
    };
    let mut model = CausalLm::load_as(&weights, config, &device, keep).unwrap();
    let bits = |stored: f32| half::bf16::from_f32(stored).to_f32();
    let mut matrices = 0;
    model.visit(&mut |name, mut parameter| {
        let before = lorafit::device::to_vec(parameter.flat());
        let stored = weights.read_f32(name).unwrap();
        let is_rounded = parameter.shape().len() == 2 && !trains(name);
        matrices += usize::from(is_rounded);
        let want: Vec<f32> = match is_rounded {
            true => stored.into_iter().map(bits).collect(),
            false => stored,
        };
        assert_eq!(before, want, "{name}");
        parameter.set_trainable(true);
        let update = parameter.flat() + 1e-6;
        parameter.set_flat(update.clone());
        let (got, want) = [parameter.flat(), update]
            .map(lorafit::device::to_vec)
            .into();
        assert_eq!(got, want, "{name} is not in f32");
    });
    assert_eq!(matrices, 3 * 6 + 2);
}
