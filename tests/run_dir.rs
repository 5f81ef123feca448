//! A run directory belongs to one run and one process, and nothing else in it is touched.

use std::fs;
use std::time::{Duration, Instant};

use crate::fixture::Workspace;
use crate::train::{column, metrics, train};

#[test]
fn a_run_is_replaced_only_when_asked_and_nothing_else_is() {
    let workspace = Workspace::new();
    train(&workspace, &[]).exits(0);
    let first = workspace.read("run/metrics.jsonl");
    train(&workspace, &[]).fails(
        2,
        &[
            "run already holds a run",
            "--resume",
            "--overwrite",
            "--out",
        ],
    );
    assert_eq!(first, workspace.read("run/metrics.jsonl"));
    workspace.write("run/notes.txt", "mine");
    fs::create_dir(workspace.path("run/plots")).unwrap();
    workspace.write("run/plots/loss.svg", "mine");
    workspace.write("run/states/notes.txt", "not a state");
    train(&workspace, &["--overwrite", "--set", "train.max_steps=2"]).exits(0);
    assert_eq!(workspace.read("run/notes.txt"), "mine");
    assert_eq!(workspace.read("run/plots/loss.svg"), "mine");
    assert_eq!(column(&metrics(&workspace, "step"), "step"), [1.0, 2.0]);
    assert!(workspace.read("run/recipe.yaml").contains("max_steps: 2"));
}

#[test]
fn a_directory_that_is_no_run_is_never_touched() {
    for flag in ["--resume", "--overwrite", "--json"] {
        let workspace = Workspace::new();
        fs::create_dir(workspace.path("run")).unwrap();
        workspace.write("run/thesis.txt", "mine");
        train(&workspace, &[flag]).fails(2, &["run is not empty and holds no run", "--out"]);
        assert_eq!(workspace.names("run"), ["thesis.txt"]);
    }
}

#[test]
fn a_changed_recipe_or_dataset_is_not_continued() {
    let workspace = Workspace::new();
    train(&workspace, &[]).exits(0);
    let changed = ["--resume", "--set", "train.learning_rate=0.5"];
    train(&workspace, &changed).fails(2, &["train.learning_rate: 0.01 → 0.5", "--overwrite"]);
    let data = workspace.read("data.jsonl");
    workspace.write("data.jsonl", &data.replace("talks", "walks"));
    train(&workspace, &["--resume"]).fails(
        2,
        &["the data or the base model is not what", "put them back"],
    );
    workspace.write("data.jsonl", &data);
    // What changes no number may change.
    train(&workspace, &["--resume", "--set", "train.save_steps=1"]).exits(0);
}

#[test]
fn two_processes_cannot_train_in_one_run() {
    let workspace = Workspace::new();
    let long = [
        "train",
        "recipe.yaml",
        "--quiet",
        "--set",
        "train.max_steps=100000",
    ];
    let mut first = workspace.command(&long).spawn().expect("lorafit starts");
    let begin = Instant::now();
    let training =
        || workspace.path("run/metrics.jsonl").exists() && !metrics(&workspace, "start").is_empty();
    while !training() {
        assert!(begin.elapsed() < Duration::from_secs(60) && first.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(2));
    }
    for flag in ["--resume", "--overwrite"] {
        let args = [flag, "--set", "train.max_steps=100000"];
        train(&workspace, &args).fails(2, &["another process is training in run", "--out"]);
    }
    first.kill().unwrap();
    first.wait().unwrap();
    // The lock dies with its owner.
    train(&workspace, &["--overwrite"]).exits(0);
}
