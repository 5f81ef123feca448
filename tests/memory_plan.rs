//! `lorafit plan`, and what `lorafit train` makes of the plan.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::fixture::Workspace;

/// A recipe on a directory with nothing but a configuration.
fn with_config_alone() -> Workspace {
    let workspace = Workspace::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    fs::create_dir(workspace.path("config")).unwrap();
    fs::copy(
        golden.join("models/llama/config.json"),
        workspace.path("config/config.json"),
    )
    .unwrap();
    let recipe = workspace
        .read("recipe.yaml")
        .replace("model: base", "model: config  # none else");
    workspace.write("alone.yaml", &recipe);
    workspace
}

fn plan(workspace: &Workspace, args: &[&str]) -> Value {
    let all = [&["plan", "--json", "--device", "cpu"], args].concat();
    workspace.run(&all).exits(0).event("memory_plan")
}

fn needed(event: &Value) -> u64 {
    event["needed_bytes"].as_u64().unwrap()
}

#[test]
fn a_configuration_is_enough_and_weights_change_nothing() {
    let workspace = with_config_alone();
    let (alone, with) = (
        plan(&workspace, &["alone.yaml"]),
        plan(&workspace, &["recipe.yaml"]),
    );
    assert_eq!(alone["phases"], with["phases"]);
    let ran = workspace
        .run(&["plan", "alone.yaml", "--device", "cpu", "--vram", "1GiB"])
        .exits(0);
    for part in [
        "base",
        "activations",
        "step",
        "merge",
        "peak",
        "fits: ",
        "longest context",
    ] {
        assert!(ran.out.contains(part), "no {part} in\n{}", ran.out);
    }
    workspace
        .run(&["plan", "missing.yaml"])
        .fails(2, &["missing.yaml"]);
    fs::write(workspace.path("config/config.json"), "{").unwrap();
    workspace
        .run(&["plan", "alone.yaml"])
        .fails(2, &["config.json", "not valid JSON"]);
}

#[test]
fn each_knob_moves_the_plan_the_right_way() {
    let workspace = with_config_alone();
    let with = |sets: &[&str]| {
        let mut args = vec!["alone.yaml"];
        args.extend(sets.iter().flat_map(|set| ["--set", set]));
        needed(&plan(&workspace, &args))
    };
    let none = "train.gradient_checkpointing=none";
    let plain = with(&[none]);
    for less in [
        "train.gradient_checkpointing=block",
        "base.quantization=nf4-double",
        "train.precision=bf16",
        "train.micro_batch_size=1",
        "data.max_seq_len=32",
        "adapter.rank=1",
    ] {
        let key = less.split('=').next().unwrap();
        let sets: Vec<&str> = [none, less]
            .into_iter()
            .filter(|s| *s == less || !s.starts_with(key))
            .collect();
        assert!(with(&sets) < plain, "{less}");
    }
    for more in [
        "adapter.dropout=0.1",
        "adapter.use_dora=true",
        "adapter.modules_to_save=[lm_head]",
        "train.micro_batch_size=4",
        "adapter.rank=8",
    ] {
        assert!(with(&[none, more]) > plain, "{more}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    let workspace = Workspace::new();
    let train = |more: &[&str]| {
        let keeps_all = "train.gradient_checkpointing=none";
        let args = [
            "train",
            "recipe.yaml",
            "--device",
            "cpu",
            "--set",
            keeps_all,
        ];
        workspace.run(&[&args[..], more].concat())
    };
    // Twice, as a process that has tokenised holds more than one that finds its samples in the cache.
    train(&["--dry-run"]).exits(0);
    let planned = train(&["--dry-run", "--json"]).exits(0).event("memory");
    let room = planned["planned_bytes"].as_u64().unwrap() - 200_000;
    let room = room.to_string();
    train(&["--vram", &room]).fails(2, &["does not fit", "`step`", "makes it fit", "--force"]);
    assert!(!workspace.path("run").exists());
    train(&["--vram", &room, "--dry-run"]).fails(2, &["does not fit"]);
    train(&["--vram", "100"]).fails(2, &["no change of its knobs makes it fit"]);
    let ran = train(&["--vram", &room, "--force"]).exits(0);
    assert!(ran.err.contains("measured peak"), "{}", ran.err);
}

#[test]
fn each_step_tells_what_is_in_use() {
    let workspace = Workspace::new();
    let ran = workspace
        .run(&["train", "recipe.yaml", "--device", "cpu", "--json"])
        .exits(0);
    let done = ran.event("done");
    let steps = ran
        .events()
        .into_iter()
        .filter(|event| event["event"] == "step");
    let peaks: Vec<(u64, u64)> = steps
        .map(|step| ["memory_bytes", "memory_peak_bytes"].map(|key| step[key].as_u64().unwrap()))
        .map(|[now, peak]| (now, peak))
        .collect();
    assert_eq!(peaks.len(), 4);
    assert!(peaks.is_sorted_by_key(|(_, peak)| *peak), "{peaks:?}");
    assert!(
        peaks.iter().all(|(now, peak)| 0 < *now && now <= peak),
        "{peaks:?}"
    );
    assert!(
        done["memory_peak_bytes"].as_u64().unwrap() >= peaks[3].1,
        "{done}"
    );
}

#[test]
fn auto_changes_what_is_needed_and_nothing_else() {
    let workspace = with_config_alone();
    let text = "\
# a recipe
base:
  model: config  # the base
data:
  train: [data.jsonl]
  max_seq_len: 64
adapter:
  rank: 64  # wide
train:
  micro_batch_size: 8   # many
  gradient_checkpointing: none
output_dir: run
";
    workspace.write("large.yaml", text);
    let all = needed(&plan(&workspace, &["large.yaml"]));
    let auto = |room: u64, out: &str| {
        let room = room.to_string();
        let args = [
            "plan",
            "large.yaml",
            "--device",
            "cpu",
            "--vram",
            &room,
            "--auto",
            "-o",
            out,
        ];
        workspace.run(&args)
    };
    let ran = auto(all - 1, "a.yaml").exits(0);
    assert!(
        ran.err.contains("train.gradient_checkpointing=block"),
        "{}",
        ran.err
    );
    let want = text.replace(
        "gradient_checkpointing: none",
        "gradient_checkpointing: block",
    );
    assert_eq!(workspace.read("a.yaml"), want);
    assert!(needed(&plan(&workspace, &["a.yaml"])) < all);
    let ran = auto(all, "b.yaml").exits(0);
    assert!(ran.err.contains("as it was"), "{}", ran.err);
    assert_eq!(workspace.read("b.yaml"), text);
    // Cheap changes come first, and bits of the base are the last but the rank.
    let least = all / 2;
    auto(least, "c.yaml").exits(0);
    let text = workspace.read("c.yaml");
    assert!(
        text.contains("# a recipe\n") && text.contains("# wide"),
        "{text}"
    );
    assert!(needed(&plan(&workspace, &["c.yaml"])) <= least, "{text}");
    auto(1000, "d.yaml").fails(2, &["smaller base model"]);
    assert!(!workspace.path("d.yaml").exists());
    auto(all, "a.yaml").fails(1, &["a.yaml exists already"]);
    workspace.run(&["plan", "large.yaml", "--auto"]).exits(2);
}

#[test]
fn a_recipe_that_is_not_one_knob_a_line_is_left_alone() {
    let workspace = with_config_alone();
    workspace.write(
        "flow.yaml",
        "{base: {model: config}, data: {train: [data.jsonl], max_seq_len: 64}, train: {micro_batch_size: 8, gradient_checkpointing: none}}\n",
    );
    let room = (needed(&plan(&workspace, &["flow.yaml"])) - 1).to_string();
    let args = [
        "plan",
        "flow.yaml",
        "--device",
        "cpu",
        "--vram",
        &room,
        "--auto",
        "-o",
        "out.yaml",
    ];
    workspace.run(&args).fails(2, &["one knob a line", "--set"]);
    assert!(!workspace.path("out.yaml").exists());
}
