//! `base.quantization`: training on a base in fewer bits, and merging into either base.

use serde_json::Value;

use crate::fixture::{Ran, Workspace};
use crate::verify::edit;

const SCHEMES: [&str; 3] = ["nf4", "nf4-double", "int8"];

/// Trains into `out` with the base quantised so.
fn train(workspace: &Workspace, quantization: &str, out: &str) -> Ran {
    let quantization = format!("base.quantization={quantization}");
    let out = format!("output_dir={out}");
    let sets = [quantization.as_str(), out.as_str(), "train.max_steps=12"];
    let mut args = vec!["train", "recipe.yaml", "--json"];
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    workspace.run(&args).exits(0)
}

fn losses(ran: &Ran) -> Vec<f64> {
    let steps = ran
        .events()
        .into_iter()
        .filter(|event| event["event"] == "step");
    steps
        .map(|event| event["loss"].as_f64().expect("a loss"))
        .collect()
}

#[test]
fn a_quantised_base_trains_nearly_as_the_whole_one() {
    let workspace = Workspace::new();
    let whole = train(&workspace, "none", "none");
    let want = losses(&whole);
    for scheme in SCHEMES {
        let ran = train(&workspace, scheme, scheme);
        let parameters = |ran: &Ran| ran.event("start")["parameters"].clone();
        assert_eq!(parameters(&ran), parameters(&whole));
        let got = losses(&ran);
        assert_eq!(got.len(), want.len());
        assert_ne!(got, want, "{scheme}: nothing was quantised");
        assert!(got[11] < got[0] - 0.5, "{scheme}: {got:?}");
        // The first loss is the base's alone: of random weights, whose logits are of size one and move
        // by about a tenth of that in NF4 and by a hundredth in int8.
        let allowed = if scheme == "int8" { 0.02 } else { 0.2 };
        assert!(
            (got[0] - want[0]).abs() < allowed,
            "{scheme}: {got:?} {want:?}"
        );
    }
}

#[test]
fn a_merge_offers_both_bases_and_tells_the_error_of_each() {
    let workspace = Workspace::new();
    train(&workspace, "nf4-double", "run");
    let merge = |out: &str, more: &[&str]| -> Value {
        let args = ["merge", "run", "--json", "--out", out];
        let ran = workspace.run(&[&args[..], more].concat()).exits(0);
        ran.event("merged")["verified"].clone()
    };
    let number =
        |verified: &Value, path: &str| verified.pointer(path).and_then(Value::as_f64).expect(path);
    let original = merge("original", &[]);
    let quantized = merge("quantized", &["--base-precision", "quantized"]);
    for verified in [&original, &quantized] {
        // Each is what its own base gives with the adapter, but for rounding.
        assert!(number(verified, "/kl") < 1e-6, "{verified}");
        assert!(
            number(verified, "/from_trained/original/kl") > 1e-4,
            "{verified}"
        );
        assert!(
            number(verified, "/from_trained/quantized/kl") < 1e-6,
            "{verified}"
        );
    }
    assert_ne!(
        std::fs::read(workspace.path("original/model.safetensors")).unwrap(),
        std::fs::read(workspace.path("quantized/model.safetensors")).unwrap()
    );
    // Without the run directory, the options say the same.
    let args = [
        "merge",
        "--base",
        "base",
        "--adapter",
        "run/adapter",
        "--quantization",
        "nf4-double",
        "--base-precision",
        "quantized",
        "--out",
        "again",
    ];
    let ran = workspace.run(&args).exits(0);
    assert!(
        ran.err.contains("the original base is off by KL"),
        "{}",
        ran.err
    );
    assert_eq!(
        std::fs::read(workspace.path("again/model.safetensors")).unwrap(),
        std::fs::read(workspace.path("quantized/model.safetensors")).unwrap()
    );
    // A quantised base also answers.
    let args = [
        "generate",
        "--base",
        "base",
        "--adapter",
        "run/adapter",
        "--quantization",
        "nf4-double",
        "--prompt",
        "Define Year.",
        "--max-new-tokens",
        "4",
    ];
    workspace.run(&args).exits(0);
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let workspace = Workspace::new();
    let check = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["check", "recipe.yaml"].into_iter().chain(sets).collect();
        workspace.run(&args)
    };
    check(&["base.quantization=nf4", "adapter.method=full"])
        .fails(2, &["base.quantization", "all weights train"]);
    check(&["base.quantization=int8", "adapter.init_lora_weights=pissa"])
        .fails(2, &["base.quantization", "PiSSA"]);
    check(&["base.quantization=nf5"]).fails(2, &["base.quantization", "did you mean `nf4`?"]);
    let path = workspace.path("base/model.safetensors");
    edit(&path, "layers.1.mlp.up_proj.weight", |_| f32::NAN);
    let args = ["train", "recipe.yaml", "--set", "base.quantization=nf4"];
    workspace.run(&args).fails(
        1,
        &[
            "layers.1.mlp.up_proj.weight",
            "cannot be quantised",
            "element 0 is NaN",
        ],
    );
}

#[test]
fn modules_that_train_whole_stay_whole() {
    let workspace = Workspace::new();
    let args = [
        "train",
        "recipe.yaml",
        "--quiet",
        "--set",
        "base.quantization=nf4",
        "--set",
        "adapter.modules_to_save=[k_proj]",
        "--set",
        "adapter.target_modules=[q_proj]",
    ];
    workspace.run(&args).exits(0);
    let merged = ["merge", "run", "--base-precision", "quantized"];
    workspace.run(&merged).exits(0);
}
