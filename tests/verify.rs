//! A merged model is base + adapter, and the check that says so can fail.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use lorafit::adapter::peft::read_adapter;
use lorafit::export::verify::{self, VerifyError};
use serde_json::Value;

use crate::fixture::{Ran, Workspace};

/// A workspace with a trained adapter in `run/`.
fn trained() -> Workspace {
    let workspace = Workspace::new();
    let args = [
        "train",
        "recipe.yaml",
        "--quiet",
        "--set",
        "train.max_steps=12",
    ];
    workspace.run(&args).exits(0);
    workspace
}

/// Merges `adapter` of the base into `out`.
fn merge<'a>(adapter: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = [
        "merge",
        "--json",
        "--base",
        "base",
        "--adapter",
        adapter,
        "--out",
        out,
    ];
    [&args[..], more].concat()
}

/// How a merge compared: largest logit difference, divergence, and that of the base alone.
fn verified(ran: &Ran) -> [f64; 3] {
    let event = ran.event("merged");
    ["max_difference", "kl", "kl_of_base"].map(|key| {
        let figure = event["verified"][key].as_f64();
        figure.unwrap_or_else(|| panic!("no {key} in {event}"))
    })
}

/// Changes the f32 values of each tensor whose name ends with `suffix`.
pub fn edit(path: &Path, suffix: &str, change: impl Fn(f32) -> f32) {
    let mut bytes = fs::read(path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let mut changed = 0;
    for (name, tensor) in header.as_object().unwrap() {
        if !name.ends_with(suffix) || name == "__metadata__" {
            continue;
        }
        assert_eq!(tensor["dtype"], "F32");
        let at = |i: usize| start + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        for element in bytes[at(0)..at(1)].chunks_exact_mut(4) {
            let value = change(f32::from_le_bytes(element.try_into().unwrap()));
            element.copy_from_slice(&value.to_le_bytes());
        }
        changed += 1;
    }
    assert!(changed > 0, "no tensor ends with {suffix}");
    fs::write(path, bytes).unwrap();
}

fn answer(workspace: &Workspace, args: &[&str]) -> String {
    let all = [
        &[
            "generate",
            "--json",
            "--prompt",
            "Define Bore.",
            "--max-new-tokens",
            "24",
        ],
        args,
    ]
    .concat();
    let ran = workspace.run(&all).exits(0);
    ran.event("generate")["text"]
        .as_str()
        .expect("a text")
        .to_string()
}

#[test]
fn a_merged_run_answers_as_base_and_adapter() {
    let workspace = trained();
    let ran = workspace.run(&["merge", "run", "--json"]).exits(0);
    let [difference, kl, of_base] = verified(&ran);
    assert!(
        difference < 1e-4 && kl < 1e-9 && of_base > 1e-3,
        "{}",
        ran.out
    );
    let with_adapter = answer(&workspace, &["--base", "base", "--adapter", "run/adapter"]);
    assert_eq!(with_adapter, answer(&workspace, &["--base", "run/merged"]));
    assert_ne!(
        with_adapter,
        answer(&workspace, &["--base", "base"]),
        "the adapter says nothing new"
    );
    let again = workspace.run(&["merge", "run"]);
    again.fails(1, &["run/merged: not empty", "never overwrites"]);
}

#[test]
fn a_merge_in_bf16_is_near_and_says_how_near() {
    let workspace = trained();
    let ran = workspace
        .run(&merge("run/adapter", "half", &["--dtype", "bf16"]))
        .exits(0);
    let [_, kl, of_base] = verified(&ran);
    assert!(kl > 0.0 && kl < of_base / 10.0, "{}", ran.out);
    let config: Value = serde_json::from_str(&workspace.read("half/config.json")).unwrap();
    let dtype = config.get("dtype").or(config.get("torch_dtype"));
    assert_eq!(dtype, Some(&Value::from("bfloat16")));
    let size = |dir: &str| {
        fs::metadata(workspace.path(dir).join("model.safetensors"))
            .unwrap()
            .len()
    };
    assert!(size("half") < size("base") * 6 / 10);
}

#[test]
fn a_fresh_adapter_is_no_merge() {
    let workspace = trained();
    let adapter = workspace.path("run/adapter/adapter_model.safetensors");
    edit(&adapter, "lora_B.weight", |_| 0.0);
    let ran = workspace.run(&merge("run/adapter", "merged", &[]));
    ran.fails(1, &["equals the base", "B is zero", "train it first"]);
    assert!(!workspace.path("merged").exists());
    let left = workspace.names("");
    assert!(
        left.iter().all(|name| !name.contains(".partial-")),
        "{left:?}"
    );
}

/// Verifies what is in `merged/` against the run's adapter.
fn check(workspace: &Workspace) -> Result<verify::Comparison, VerifyError> {
    let [base, adapter, merged] =
        ["base", "run/adapter", "merged"].map(|name| workspace.path(name));
    let (config, weights) = read_adapter(&adapter).unwrap();
    let job = verify::Merged {
        base: &base,
        adapter: (&config, &weights),
        merged: &merged,
        trained_on: None,
        into: None,
    };
    verify::verify(&job, &Device::flex())
}

#[test]
fn a_wrong_merge_is_found_out() {
    let workspace = trained();
    workspace.run(&merge("run/adapter", "merged", &[])).exits(0);
    check(&workspace).expect("a right merge");
    let path = workspace.path("merged/model.safetensors");
    let right = fs::read(&path).unwrap();
    for (suffix, factor) in [
        ("layers.1.mlp.down_proj.weight", 1.5),
        ("layers.0.self_attn.q_proj.weight", f32::NAN),
    ] {
        edit(&path, suffix, |value| value * factor);
        let error = check(&workspace).expect_err(suffix);
        assert!(matches!(error, VerifyError::Wrong { .. }), "{error}");
        fs::write(&path, &right).unwrap();
    }
    // A delta of another strength, as with a wrong alpha, is a wrong merge too.
    let adapter = workspace.path("run/adapter/adapter_model.safetensors");
    edit(&adapter, "lora_B.weight", |value| value * 1.1);
    assert!(matches!(check(&workspace), Err(VerifyError::Wrong { .. })));
}

/// The base in place of the merge, with a trained adapter and with one so weak that base and merge
/// are hardly told apart.
#[test]
fn a_merge_that_equals_the_base_fails() {
    let workspace = trained();
    fs::create_dir(workspace.path("merged")).unwrap();
    for name in workspace.names("base") {
        fs::copy(
            workspace.path("base").join(&name),
            workspace.path("merged").join(&name),
        )
        .unwrap();
    }
    let adapter = workspace.path("run/adapter/adapter_model.safetensors");
    for factor in [1.0, 1e-4] {
        edit(&adapter, "lora_B.weight", |value| value * factor);
        let error = check(&workspace).expect_err("the base is no merge");
        assert!(matches!(error, VerifyError::Wrong { .. }), "{error}");
    }
}

/// bf16 holds 8 bits of a weight: a delta far below that rounds away.
#[test]
fn a_delta_lost_in_rounding_is_found_out() {
    let workspace = trained();
    // The base's weights as bf16 has them, so that rounding changes nothing but the delta.
    edit(&workspace.path("base/model.safetensors"), "", |value| {
        half::bf16::from_f32(value).to_f32()
    });
    let adapter = workspace.path("run/adapter/adapter_model.safetensors");
    edit(&adapter, "lora_B.weight", |value| value * 1e-4);
    let ran = workspace.run(&merge(
        "run/adapter",
        "half",
        &["--dtype", "bf16", "--force"],
    ));
    ran.fails(1, &["lost", "--dtype f32"]);
    assert!(!workspace.path("half").exists());
    workspace
        .run(&merge(
            "run/adapter",
            "whole",
            &["--dtype", "f32", "--force"],
        ))
        .exits(0);
}

#[test]
fn a_run_of_all_weights_has_nothing_to_merge_but_generates() {
    let workspace = Workspace::new();
    let recipe = workspace.read("recipe.yaml");
    let recipe = recipe
        .replace("  rank: 4\n  alpha: 8\n", "  method: full\n")
        .replace("1.0e-2", "1.0e-3");
    workspace.write("recipe.yaml", &recipe);
    workspace.run(&["train", "recipe.yaml", "--quiet"]).exits(0);
    workspace
        .run(&["merge", "run"])
        .fails(2, &["nothing to merge", "run/model"]);
    assert_ne!(
        answer(&workspace, &["--base", "run/model"]),
        answer(&workspace, &["--base", "base"])
    );
}

#[test]
fn an_unfinished_run_says_how_to_finish() {
    let workspace = trained();
    fs::remove_dir_all(workspace.path("run/adapter")).unwrap();
    workspace
        .run(&["merge", "run"])
        .fails(2, &["run has no adapter yet", "--resume --out run"]);
    workspace
        .run(&[
            "train",
            "recipe.yaml",
            "--quiet",
            "--set",
            "train.max_steps=12",
            "--resume",
        ])
        .exits(0);
    workspace.run(&["merge", "run"]).exits(0);
}
