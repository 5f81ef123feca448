//! Blocks that are computed again on the way back give the loss and the gradients, bit for bit, of
//! blocks whose activations were kept.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use lorafit::adapter::config::AdapterConfig;
use lorafit::adapter::experts::converted;
use lorafit::adapter::inject::{self, Init};
use lorafit::adapter::target::{self, Targeting};
use lorafit::data::IGNORE_INDEX;
use lorafit::data::batch::Batch;
use lorafit::device::to_vec;
use lorafit::model::config::ModelConfig;
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Tokens, names};
use lorafit::nn::Dropout;
use lorafit::random::Stream;
use lorafit::recipe::GradientCheckpointing;
use lorafit::recipe::load::load;
use lorafit::train::recompute::{self, Retain};
use lorafit::train::step::{self, DropoutSeed, Gradients, StepGradients};

use crate::fixture::{Workspace, chat};

/// Attention with all its variants, latent attention, linear attention, experts; heads that are
/// embeddings.
const FAMILIES: [&str; 6] = [
    "llama",
    "gemma2",
    "mixtral",
    "deepseek_v3",
    "qwen3_next",
    "gpt_oss",
];

const MASKS: DropoutSeed = DropoutSeed { seed: 3, step: 5 };

fn base(family: &str) -> CausalLm {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    let weights = Weights::open(&base.join(family)).unwrap();
    CausalLm::load(&weights, weights.config().unwrap(), &Device::flex()).unwrap()
}

/// A golden model with adapters under dropout, on every linear layer unless `change` says otherwise.
fn adapted(family: &str, change: impl FnOnce(&mut Targeting, &mut AdapterConfig)) -> CausalLm {
    let mut model = base(family);
    let mut targeting = Targeting::all_linear(4, 8.0);
    let mut config = AdapterConfig::new(family, None, targeting.clone(), 0.25);
    change(&mut targeting, &mut config);
    if family == "gpt_oss" {
        // Where `all-linear` leaves the experts out.
        targeting.target_parameters = vec!["mlp.experts.gate_up_proj".into()];
    }
    let targeting = converted(&targeting, model.config()).unwrap();
    let adaptable = names::adaptable(model.config()).into_iter();
    let paths: Vec<String> = adaptable.map(|layer| layer.path).collect();
    let modules = target::select(&targeting, &paths).unwrap();
    config.targeting = targeting;
    inject::inject(&mut model, &config, &modules, &Init::Fresh { seed: 1 });
    disturb(&mut model);
    model
}

/// Moves what trains away from its first values: behind a B of zeros A would have no gradients.
fn disturb(model: &mut CausalLm) {
    let mut stream = Stream::new(9);
    model.visit_trainable(&mut |_, mut parameter| {
        stream = stream.split(1);
        let values = parameter.flat();
        let n = values.dims()[0];
        let noise = (0..n as u64).map(|i| (stream.normal(i) * 0.05) as f32);
        let noise = TensorData::new(noise.collect::<Vec<_>>(), [n]);
        parameter.set_flat(values + Tensor::from_data(noise, &Device::flex()));
    });
}

/// Two micro-batches of packed rows.
fn packed(config: &ModelConfig) -> [Batch; 2] {
    [7, 8].map(|seed| {
        let stream = Stream::new(seed);
        let vocabulary = config.vocab_size as u64;
        let mut input_ids: Vec<i32> = (0..48)
            .map(|i| (stream.bits(i) % vocabulary) as i32)
            .collect();
        if let Some(pad) = config.pad_token_id {
            input_ids[5] = pad as i32;
        }
        let segment_starts: Arc<[usize]> = [0, 1, 9, 24, 36, 41, 48].into();
        let segments = segment_starts.windows(2);
        Batch {
            batch: 2,
            tokens: 24,
            labels: (input_ids.iter().enumerate())
                .map(|(i, &id)| if i % 5 < 3 { id } else { IGNORE_INDEX })
                .collect(),
            position_ids: segments.flat_map(|ends| 0..ends[1] - ends[0]).collect(),
            segment_starts,
            input_ids,
            lengths: vec![24, 17],
        }
    })
}

fn gradients(model: &mut CausalLm, retain: Retain) -> StepGradients {
    let batches = packed(model.config());
    step::gradients(model, &batches, Some(MASKS), retain, &|| false).expect("nobody interrupts")
}

fn bits(gradient: &Tensor<1>) -> Vec<u32> {
    let values = to_vec(gradient.clone()).into_iter();
    values.map(f32::to_bits).collect()
}

/// Asserts that every bit is equal, and that there is something to compare.
#[track_caller]
pub(crate) fn assert_same(want: &StepGradients, got: &StepGradients, what: &str) {
    assert_eq!(want.loss.to_bits(), got.loss.to_bits(), "{what}");
    let names = |gradients: &Gradients| gradients.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&want.gradients), names(&got.gradients), "{what}");
    assert!(!want.gradients.is_empty(), "{what} has no gradients");
    for (name, want) in &want.gradients {
        let want = bits(want);
        // Infinities and numbers that are none would compare equal.
        assert!(want.iter().all(|&bits| f32::from_bits(bits).is_finite()));
        assert!(want == bits(&got.gradients[name]), "{what}: {name}");
    }
}

/// Asserts that all that trains has a gradient.
#[track_caller]
fn assert_complete(model: &mut CausalLm, got: &StepGradients, what: &str) {
    model.visit_trainable(&mut |name, _| {
        // What decides which experts are chosen, and nothing else, is not differentiated.
        let only_chooses = name.ends_with("e_score_correction_bias");
        assert!(
            only_chooses || got.gradients.contains_key(name),
            "{what}: {name} has none"
        );
    });
}

#[track_caller]
fn assert_recompute_changes_nothing(model: &mut CausalLm, what: &str) {
    let want = gradients(model, Retain::Graphs);
    assert_complete(model, &want, what);
    for retain in [Retain::Inputs, Retain::InputsOnHost] {
        assert_same(
            &want,
            &gradients(model, retain),
            &format!("{what}, {retain:?}"),
        );
    }
}

#[test]
fn adapters_of_every_kind_of_block_have_the_same_gradients() {
    for family in FAMILIES {
        let mut model = adapted(family, |_, _| {});
        assert_recompute_changes_nothing(&mut model, family);
    }
}

#[test]
fn all_weights_of_every_kind_of_block_have_the_same_gradients() {
    for family in FAMILIES {
        let mut model = base(family);
        inject::train_all(&mut model);
        assert_recompute_changes_nothing(&mut model, family);
    }
}

/// Gradients reach the embedding, stop at the lowest adapter, or stay in the head.
#[test]
fn the_ends_and_the_layers_that_are_left_out_change_nothing() {
    let names = |names: &[&str]| {
        let names = names.iter().map(ToString::to_string).collect();
        lorafit::recipe::TargetModules::Names(names)
    };
    for family in ["llama", "llama_tied", "gemma2"] {
        for dora in [false, true] {
            let mut model = adapted(family, |targeting, config| {
                targeting.target_modules = names(&["embed_tokens", "lm_head", "q_proj"]);
                config.use_dora = dora;
            });
            assert_recompute_changes_nothing(&mut model, &format!("ends of {family}"));
        }
        let mut model = adapted(family, |targeting, _| {
            targeting.layers_to_transform = Some(vec![1]);
        });
        assert_recompute_changes_nothing(&mut model, &format!("one layer of {family}"));
        let mut model = adapted(family, |targeting, _| {
            targeting.target_modules = names(&["lm_head"]);
        });
        assert_recompute_changes_nothing(&mut model, &format!("head of {family}"));
    }
}

/// The graph of the whole model, not cut at the blocks, gives the same bits; so the cut pass is
/// compared with more than itself.
#[test]
fn one_graph_of_all_blocks_has_the_same_gradients() {
    for family in FAMILIES {
        for full in [false, true] {
            let mut model = if full {
                let mut model = base(family);
                inject::train_all(&mut model);
                model
            } else {
                adapted(family, |_, _| {})
            };
            let [batch, _] = packed(model.config());
            let targets = step::targets(&batch);
            let labelled = targets.iter().filter(|&&target| target >= 0).count();
            let tokens = Tokens {
                ids: &batch.input_ids,
                batch: batch.batch,
                positions: Some(&batch.position_ids),
                segments: Some(&batch.segment_starts),
            };
            let masks = Some(Dropout::new(MASKS.seed, MASKS.step, 0));
            let hidden = model.hidden(tokens, None, masks);
            let loss = model.loss_sum(hidden, targets, masks) * (1.0 / labelled as f64);
            let mut found = loss.backward();
            let mut whole = Gradients::new();
            model.visit_trainable(&mut |name, parameter| {
                if let Some(gradient) = parameter.take_gradient(&mut found) {
                    whole.insert(name.to_string(), gradient);
                }
            });
            let whole = StepGradients {
                loss: f64::from(to_vec(loss.inner())[0]),
                label_tokens: labelled,
                gradients: whole,
            };
            let cut = step::gradients(&mut model, &[batch], Some(MASKS), Retain::Inputs, &|| false);
            let what = format!("{family}, all weights {full}");
            assert_same(&whole, &cut.expect("nobody interrupts"), &what);
        }
    }
}

/// So that a mask that is drawn anew could be seen above.
#[test]
fn other_masks_give_other_gradients() {
    let mut model = adapted("llama", |_, _| {});
    let batches = packed(model.config());
    let mut first = |step| {
        let masks = DropoutSeed { step, ..MASKS };
        let got = step::gradients(&mut model, &batches, Some(masks), Retain::Inputs, &|| false);
        bits(&got.expect("nobody interrupts").gradients["model.layers.0.self_attn.q_proj.lora_a"])
    };
    assert!(first(5) != first(6));
}

/// A workspace whose run has dropout, packed rows and two micro-batches in a step.
fn workspace() -> Workspace {
    let workspace = Workspace::new();
    let rows: String = (0..24)
        .map(|i| {
            let answer = "A person who talks when you wish. ".repeat(1 + i % 3);
            chat(&format!("Define number {i}."), answer.trim_end())
        })
        .collect();
    workspace.write("data.jsonl", &rows);
    workspace
}

fn train(workspace: &Workspace, out: &str, sets: &[&str], resume: bool) -> Vec<u8> {
    let fixed = [
        "data.packing=true",
        "train.gradient_accumulation_steps=2",
        "train.save_steps=2",
    ];
    let mut args = vec!["train", "recipe.yaml", "--out", out, "--quiet"];
    args.extend(fixed.iter().chain(sets).flat_map(|set| ["--set", set]));
    args.push(if resume { "--resume" } else { "--overwrite" });
    workspace.run(&args).exits(0);
    fs::read(workspace.path(&format!("{out}/adapter/adapter_model.safetensors"))).unwrap()
}

/// Whatever trains, on whatever base.
const RUNS: [&[&str]; 5] = [
    &["adapter.dropout=0.2"],
    &["adapter.dropout=0.2", "adapter.use_dora=true"],
    &["base.quantization=nf4", "adapter.dropout=0.2"],
    &["train.precision=bf16", "adapter.bias=all"],
    &["adapter.trainable_token_indices=[5, 9]"],
];

#[test]
fn runs_end_with_the_same_bytes_and_may_change_in_between() {
    let workspace = workspace();
    for settings in RUNS {
        let run = |out, checkpointing: &str, resume| {
            let checkpointing = format!("train.gradient_checkpointing={checkpointing}");
            let sets = [settings, &[checkpointing.as_str()]].concat();
            train(&workspace, out, &sets, resume)
        };
        let kept = run("kept", "none", false);
        assert!(kept == run("again", "block", false), "{settings:?}");
        // Back to the state of step 2, and on in the other way.
        fs::remove_dir_all(workspace.path("kept/adapter")).unwrap();
        fs::remove_dir_all(workspace.path("kept/states/step-000004")).unwrap();
        assert!(kept == run("kept", "block", true), "{settings:?}");
    }
}

#[test]
fn keeping_nothing_elsewhere_is_a_fault() {
    let workspace = workspace();
    let sets = [
        "train.gradient_checkpointing=none",
        "train.offload_activations=true",
    ];
    let mut args = vec!["check", "recipe.yaml"];
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    workspace.run(&args).fails(
        2,
        &[
            "train.offload_activations",
            "has no effect",
            "set train.gradient_checkpointing: block",
        ],
    );
}

#[test]
fn small_activations_are_kept_and_large_ones_computed_again() {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart.yaml");
    let mut plan = load(&recipe, &[]).expect("a plan");
    let device = Device::flex();
    let model = base("llama");
    let mut choose = |checkpointing, tokens| {
        plan.train.gradient_checkpointing = checkpointing;
        plan.train.offload_activations = true;
        Retain::choose(&plan.train, model.config(), tokens, &device)
    };
    let each = recompute::activation_bytes(model.config(), 1);
    let limit = (1 << 30) / each;
    assert_eq!(choose(GradientCheckpointing::Auto, limit), Retain::Graphs);
    // The CPU's memory is the host's already.
    assert_eq!(
        choose(GradientCheckpointing::Auto, limit + 1),
        Retain::Inputs
    );
    assert_eq!(
        choose(GradientCheckpointing::None, limit + 1),
        Retain::Graphs
    );
    assert_eq!(choose(GradientCheckpointing::Block, 1), Retain::Inputs);
}
