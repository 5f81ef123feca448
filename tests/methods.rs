//! Every kind of adapter as a user meets it: trained, continued, merged, verified; and sums of several.

use std::fs;

use crate::fixture::{Ran, Workspace};

/// What a recipe sets, and a line of `lorafit check` or a file that shows that it was heard.
const METHODS: &[(&str, &[&str])] = &[
    ("dora", &["adapter.use_dora=true", "adapter.dropout=0.1"]),
    ("gaussian", &["adapter.init_lora_weights=gaussian"]),
    ("pissa", &["adapter.init_lora_weights=pissa"]),
    (
        "olora",
        &[
            "adapter.init_lora_weights=olora",
            "adapter.use_rslora=true",
            "adapter.target_modules=[q_proj, lm_head]",
        ],
    ),
    (
        "vera",
        &[
            "adapter.method=vera",
            "adapter.rank=16",
            "train.learning_rate=0.1",
        ],
    ),
    ("lora_fa", &["train.optimizer=lora_fa"]),
    (
        "ends",
        &[
            "adapter.target_modules=[embed_tokens, lm_head, q_proj]",
            "adapter.dropout=0.1",
        ],
    ),
    (
        "ends with DoRA",
        &[
            "adapter.target_modules=[embed_tokens, lm_head, q_proj]",
            "adapter.use_dora=true",
        ],
    ),
    ("new tokens", &["adapter.new_tokens=[Define, <talk>]"]),
    (
        "listed tokens",
        &[
            "adapter.trainable_token_indices=[70, 300]",
            "adapter.target_modules=[lm_head, q_proj]",
        ],
    ),
    (
        "whole modules",
        &[
            "adapter.modules_to_save=[lm_head, norm]",
            "adapter.bias=all",
        ],
    ),
];

fn train(workspace: &Workspace, out: &str, settings: &[&str], more: &[&str]) -> Ran {
    let mut args = vec!["train", "recipe.yaml", "--json", "--out", out];
    let fixed = ["train.save_steps=2", "train.max_steps=4"];
    for set in fixed.iter().chain(settings) {
        args.extend(["--set", set]);
    }
    args.extend(more);
    workspace.run(&args)
}

#[test]
fn every_method_trains_resumes_and_merges() {
    let workspace = Workspace::new();
    for (name, settings) in METHODS {
        train(&workspace, "straight", settings, &["--overwrite"]).exits(0);
        let merged = workspace
            .run(&["merge", "straight", "--json"])
            .exits(0)
            .event("merged");
        let kl = |key: &str| merged["verified"][key].as_f64().unwrap();
        assert!(kl("kl_of_base") > 1e-6, "{name} learns nothing: {merged}");
        assert!(kl("kl") < 1e-9, "{name}: {merged}");
        // The same from its second step on.
        train(&workspace, "cut", settings, &["--overwrite"]).exits(0);
        fs::remove_dir_all(workspace.path("cut/adapter")).unwrap();
        fs::remove_dir_all(workspace.path("cut/states/step-000004")).unwrap();
        train(&workspace, "cut", settings, &["--resume"]).exits(0);
        let adapter = |run: &str| {
            let path = format!("{run}/adapter/adapter_model.safetensors");
            fs::read(workspace.path(&path)).unwrap()
        };
        assert!(adapter("straight") == adapter("cut"), "{name}");
        // What was written can be trained on from.
        let from = ["adapter.init_from=straight/adapter", "train.max_steps=1"];
        train(&workspace, "on", &from, &["--overwrite"]).exits(0);
    }
}

/// A workspace with two adapters of different rank.
fn two_adapters() -> Workspace {
    let workspace = Workspace::new();
    train(&workspace, "one", &[], &[]).exits(0);
    let other = ["adapter.rank=2", "train.seed=7"];
    train(&workspace, "two", &other, &[]).exits(0);
    workspace
}

fn merge(workspace: &Workspace, base: &str, out: &str, more: &[&str]) -> Ran {
    let args = ["merge", "--json", "--base", base, "--out", out];
    workspace.run(&[&args[..], more].concat())
}

#[test]
fn adapters_are_added_and_taken_out_again() {
    let workspace = two_adapters();
    let both = ["--adapter", "one/adapter=0.5", "--adapter", "two/adapter"];
    let merged = merge(&workspace, "base", "both", &both).exits(0);
    assert!(merged.event("merged")["verified"]["kl"].as_f64().unwrap() < 1e-9);
    // The same by way of one adapter, exact or of a rank that loses nothing.
    for (combination, more) in [("cat", None), ("svd", Some("6"))] {
        let mut args = vec![
            "combine",
            "--combination",
            combination,
            "--out",
            combination,
        ];
        args.extend(both);
        args.extend(more.iter().flat_map(|rank| ["--rank", rank]));
        workspace.run(&args).exits(0);
        let out = format!("both-{combination}");
        merge(&workspace, "base", &out, &["--adapter", combination]).exits(0);
        assert!(distance(&workspace, "both", &out) < 1e-5, "{combination}");
    }
    // A lower rank loses something, and says nothing of it but in the weights.
    let low = ["--combination", "svd", "--rank", "1"];
    merge(&workspace, "base", "low", &[&both[..], &low].concat()).exits(0);
    assert!(distance(&workspace, "both", "low") > 1e-4);
    let linear = ["--combination", "linear"];
    let ran = merge(&workspace, "base", "linear", &[&both[..], &linear].concat());
    ran.fails(1, &["cannot be added by `linear`", "use cat or svd"]);
    // Taken out, the base is left.
    let taken = [&both[..], &["--subtract"]].concat();
    merge(&workspace, "both", "left", &taken).exits(0);
    assert!(distance(&workspace, "base", "left") < 1e-6);
}

#[test]
fn an_adapter_goes_into_its_own_base_once() {
    let workspace = two_adapters();
    let one = ["--adapter", "one/adapter"];
    merge(&workspace, "base", "merged", &one).exits(0);
    let again = merge(&workspace, "merged", "again", &one);
    again.fails(1, &["was merged into this model before", "--force"]);
    let other = merge(&workspace, "merged", "other", &["--adapter", "two/adapter"]);
    other.fails(1, &["was trained on another base", "--force"]);
    let taken = merge(
        &workspace,
        "base",
        "taken",
        &["--adapter", "one/adapter", "--subtract"],
    );
    taken.exits(0); // the base of an adapter is where it may be taken from
    assert!(!workspace.path("again").exists());
    merge(
        &workspace,
        "merged",
        "forced",
        &[&one[..], &["--force"]].concat(),
    )
    .exits(0);
}

#[test]
fn what_a_number_format_loses_is_told() {
    let workspace = two_adapters();
    let ran = merge(
        &workspace,
        "base",
        "half",
        &["--adapter", "one/adapter", "--dtype", "f16"],
    );
    let merged = ran.exits(0).event("merged");
    let figure = |key: &str| merged["rounding"][key].as_f64().unwrap();
    assert!(figure("norm") > 0.0 && figure("max_abs") < 1e-2, "{merged}");
    let whole = merge(&workspace, "base", "whole", &["--adapter", "one/adapter"]).exits(0);
    assert_eq!(whole.event("merged")["rounding"]["norm"], 0.0);
}

#[test]
fn what_cannot_be_is_said_before_training() {
    let workspace = Workspace::new();
    for (settings, parts) in [
        (
            &["adapter.method=vera", "adapter.use_dora=true"][..],
            &["adapter.use_dora", "VeRA has two vectors"][..],
        ),
        (
            &["adapter.init_lora_weights=pissa", "adapter.rank=65"],
            &["a weight of rank", "adapter.rank to"],
        ),
        (
            &[
                "train.optimizer=lora_fa",
                "adapter.target_modules=[embed_tokens]",
            ],
            &["lora_fa trains plain adapters on linear layers only"],
        ),
        (
            &["train.optimizer=lora_fa", "adapter.use_dora=true"],
            &["cannot be combined with adapter.use_dora"],
        ),
        (
            &[
                "adapter.method=vera",
                "adapter.target_modules=[embed_tokens, q_proj]",
            ],
            &["VeRA has no vectors for the embedding"],
        ),
    ] {
        train(&workspace, "run", settings, &[]).fails(2, parts);
    }
}

/// Largest difference of two models' weights.
fn distance(workspace: &Workspace, one: &str, two: &str) -> f32 {
    let open = |dir: &str| lorafit::model::weights::Weights::open(&workspace.path(dir)).unwrap();
    let (one, two) = (open(one), open(two));
    let mut distance = 0f32;
    for name in one.names() {
        let (x, y) = (one.read_f32(name).unwrap(), two.read_f32(name).unwrap());
        for (x, y) in x.iter().zip(&y) {
            distance = distance.max((x - y).abs());
        }
    }
    distance
}
