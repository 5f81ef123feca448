//! The binary as a user meets it: commands, what they print where, exit codes.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;

use crate::fixture::{Ran, Workspace, chat};

const COMMANDS: [&str; 8] = [
    "train",
    "merge",
    "check",
    "generate",
    "init",
    "schema",
    "devices",
    "completions",
];

#[test]
fn help_ends_with_an_example() {
    let workspace = Workspace::new();
    for command in COMMANDS {
        let ran = workspace.run(&[command, "--help"]).exits(0);
        let (_, example) = ran.out.rsplit_once("Example:\n").expect(&ran.out);
        assert!(example.starts_with("  lorafit "), "{}", ran.out);
    }
    let ran = workspace.run(&["--help"]).exits(0);
    assert!(ran.out.contains("130 interrupted"), "{}", ran.out);
    workspace.run(&["--version"]).exits(0);
}

#[test]
fn bad_usage_exits_with_2() {
    let workspace = Workspace::new();
    for args in [
        &[][..],
        &["tune"],
        &["train"],
        &["train", "recipe.yaml", "--device", "gpu"],
        &["train", "recipe.yaml", "--resume", "--overwrite"],
        &[
            "generate", "--base", "base", "--prompt", "x", "--top-p", "2",
        ],
        &["merge", "--base", "base"],
        &["completions", "cmd"],
    ] {
        workspace.run(args).exits(2);
    }
    let missing = ["vulkan", "metal", "webgpu", "cuda"].map(|kind| {
        let ran = workspace.run(&["check", "recipe.yaml", "--device", kind]);
        (ran.code == Some(2)).then(|| ran.fails(2, &[kind, "--device cpu"]))
    });
    assert!(missing.iter().any(Option::is_some), "a GPU of every kind?");
}

#[test]
fn a_recipe_is_checked_without_training() {
    let workspace = Workspace::new();
    let ran = workspace.run(&["check", "recipe.yaml"]).exits(0);
    assert_eq!(ran.out, "ok: recipe.yaml can be trained\n");
    for part in [
        "6 rows (messages)",
        "21 adapters",
        "4, 1 an epoch: 4.00 epochs",
        "cpu (",
        "(39 %)",
        "servers  vLLM loads the adapter as it is\n",
        "llama.cpp and Ollama load it as GGUF: they read",
        "MLX refuses it (any adapter): ",
    ] {
        assert!(ran.err.contains(part), "no `{part}` in {}", ran.err);
    }
    assert!(!ran.err.contains("warning"), "{}", ran.err);
    assert!(!workspace.path("run").exists());

    let ran = workspace.run(&["check", "recipe.yaml", "--quiet"]).exits(0);
    assert!(ran.err.is_empty(), "{}", ran.err);

    let ran = workspace
        .run(&["train", "recipe.yaml", "--dry-run"])
        .exits(0);
    assert!(ran.out.starts_with("ok"), "{}", ran.out);
    assert!(!workspace.path("run").exists());
}

#[test]
fn a_check_for_scripts_has_numbers() {
    let workspace = Workspace::new();
    let ran = workspace.run(&["check", "recipe.yaml", "--json"]).exits(0);
    assert!(ran.err.is_empty(), "{}", ran.err);
    let plan = ran.event("plan");
    assert_eq!(plan["data"]["rows"], 6);
    assert_eq!(plan["data"]["train_samples"], 6);
    assert_eq!(plan["steps"], 4);
    assert_eq!(plan["steps_per_epoch"], 1);
    assert_eq!(plan["adapters"], 21);
    assert_eq!(plan["base"]["vocab_size"], 512);
    assert_eq!(plan["base"]["parameters"], 176_576);
    // Rank 4 on q, k, v, o, gate, up and down of 3 layers.
    let trained = 3 * 4 * (128 + 96 + 96 + 128 + 3 * 192);
    assert_eq!(plan["trainable_parameters"], trained);
    let share = plan["trained_share"].as_f64().unwrap();
    assert!(share > 0.0 && share < 1.0, "{share}");
    assert_eq!(ran.events().last().unwrap()["event"], "ok");
    let servers = ran.event("servers");
    assert_eq!(servers["loads"], serde_json::json!(["vLLM"]));

    let dora = ["--set", "adapter.use_dora=true", "--json"];
    let ran = workspace.run(&[&["check", "recipe.yaml"][..], &dora].concat());
    let servers = ran.exits(0).event("servers");
    assert_eq!(servers["loads"], serde_json::json!([]));
    let found = servers["findings"].as_array().unwrap();
    assert_eq!(found.len(), 3, "{found:#?}");
    for (finding, choice) in found
        .iter()
        .zip(["`use_dora`", "`use_dora`", "any adapter"])
    {
        assert_eq!(finding["effect"], "refuses");
        assert_eq!(finding["choice"], choice);
    }

    let full = ["--set", "adapter.method=full", "--json"];
    let ran = workspace.run(&[&["check", "recipe.yaml"][..], &full].concat());
    let ran = ran.exits(0);
    assert!(ran.events().iter().all(|event| event["event"] != "servers"));
    let plan = ran.event("plan");
    assert_eq!(plan["trainable_parameters"], 176_576);
    assert_eq!(
        (plan["adapters"].as_u64(), &plan["method"]),
        (Some(0), &"full".into())
    );
}

#[test]
fn warnings_say_how_many_and_what_to_do() {
    let workspace = Workspace::new();
    let long = "word ".repeat(60);
    let rows = [chat("a", "b"), chat("a", &long), chat(&long, "b")].concat();
    workspace.write("data.jsonl", &rows);
    std::fs::remove_file(workspace.path("base/chat_template.jinja")).unwrap();
    let template =
        env!("CARGO_MANIFEST_DIR").to_owned() + "/tests/golden/tokenizer/chat_template.jinja";
    let set = format!("data.chat_template={template}");
    std::fs::create_dir(workspace.path("run")).unwrap();
    workspace.write("run/notes.txt", "mine");
    let args = ["check", "recipe.yaml", "--set", &set];
    let ran = workspace.run(&args).exits(0);
    for part in [
        "warning: 1 of 3 rows are longer than data.max_seq_len = 64 tokens and were cut on the right; raise it",
        "warning: 1 of 3 rows were left out: they are longer than data.max_seq_len = 64, and cutting them there leaves nothing to train; raise it",
        "warning: run is not empty",
        "--overwrite",
    ] {
        assert!(ran.err.contains(part), "no `{part}` in {}", ran.err);
    }
    assert!(ran.out.starts_with("ok"), "{}", ran.out);

    let ran = workspace.run(&[&args[..], &["--json"]].concat()).exits(0);
    let warnings: Vec<Value> = ran.events();
    let kinds: Vec<&Value> = warnings
        .iter()
        .filter(|event| event["event"] == "warning")
        .map(|event| &event["kind"])
        .collect();
    assert_eq!(kinds, ["truncated", "dropped", "output_taken"]);
    assert!(warnings.iter().any(|event| event["count"] == 1));

    workspace.write("text.jsonl", "{\"text\": \"a plain text\"}\n");
    let text = [
        "--set",
        "data.train=[text.jsonl]",
        "--set",
        "sample.prompts=[Once]",
    ];
    let ran = workspace.run(&[&["check", "recipe.yaml"][..], &text].concat());
    let err = ran.exits(0).err;
    assert!(
        err.contains("no chat template") && err.contains("data.chat_template"),
        "{err}"
    );
}

#[test]
fn training_prints_lines_without_a_terminal() {
    let workspace = Workspace::new();
    let args = [
        "train",
        "recipe.yaml",
        "--set",
        "train.logging_steps=3",
        "--set",
        "train.max_steps=5",
        "--set",
        "sample.prompts=[Define Year.]",
        "--set",
        "sample.max_new_tokens=4",
    ];
    let ran = workspace.run(&args).exits(0);
    assert!(ran.out.is_empty(), "{}", ran.out);
    assert!(
        ran.err.is_ascii() || !ran.err.contains('\u{1b}'),
        "{}",
        ran.err
    );
    let steps: Vec<&str> = ran
        .err
        .lines()
        .filter_map(|line| line.strip_prefix("step ")?.split_once("  loss "))
        .map(|(step, _)| step)
        .collect();
    assert_eq!(steps, ["1/5", "3/5", "5/5"], "{}", ran.err);
    for part in [
        " lr ",
        " grad ",
        " tok/s",
        " left",
        "Define Year. → ",
        "done after 5 steps",
    ] {
        assert!(ran.err.contains(part), "no `{part}` in {}", ran.err);
    }
    let metrics = workspace.read("run/metrics.jsonl");
    let steps = metrics
        .lines()
        .filter(|line| line.contains("\"event\":\"step\""));
    assert_eq!(steps.count(), 5, "{metrics}");
}

#[test]
fn training_for_scripts_prints_events_alone() {
    let workspace = Workspace::new();
    let ran = workspace.run(&["train", "recipe.yaml", "--json"]).exits(0);
    assert!(ran.err.is_empty(), "{}", ran.err);
    let events = ran.events();
    let steps: Vec<u64> = events
        .iter()
        .filter(|event| event["event"] == "step")
        .map(|event| event["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    assert_eq!(ran.event("plan")["steps"], 4);
    assert_eq!(ran.event("start")["total_steps"], 4);
    assert_eq!(ran.event("done")["output"], "run/adapter");

    let ran = workspace
        .run(&["train", "recipe.yaml", "--out", "quiet", "--quiet"])
        .exits(0);
    assert!(ran.out.is_empty() && ran.err.is_empty(), "{ran:?}");
    let args = ["train", "recipe.yaml", "--out", "both", "--quiet", "--json"];
    let events = workspace.run(&args).exits(0).events();
    assert_eq!(events.len(), 1, "{events:?}");

    let ran = workspace
        .run(&["train", "recipe.yaml", "--json"])
        .fails(2, &["--resume"]);
    let error = ran.event("error");
    assert_eq!(error["exit_code"], 2);
    assert!(error["message"].as_str().unwrap().contains("--overwrite"));
}

#[test]
fn a_run_merges_and_generates() {
    let workspace = Workspace::new();
    workspace.run(&["train", "recipe.yaml", "--quiet"]).exits(0);
    let ran = workspace.run(&["merge", "run", "--json"]).exits(0);
    assert!(ran.err.is_empty(), "{}", ran.err);
    let merged = ran.event("merged");
    assert_eq!(merged["modules"], 21);
    assert_eq!(merged["output"], "run/merged");
    assert!(
        merged["verified"]["kl"].as_f64().unwrap() < 1e-6,
        "{merged}"
    );
    let args = [
        "merge",
        "--base",
        "base",
        "--adapter",
        "run/adapter",
        "--out",
        "bf16",
        "--dtype",
        "bf16",
    ];
    let ran = workspace.run(&args).exits(0);
    assert!(ran.err.contains("21 modules into bf16"), "{}", ran.err);
    assert!(
        ran.err.contains("verified  against base + adapter"),
        "{}",
        ran.err
    );
    assert!(ran.out.is_empty());

    let prompt = [
        "--prompt",
        "Define Year.",
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
    ];
    let answer = |base: &[&str]| {
        let ran = workspace
            .run(&[&["generate"][..], base, &prompt].concat())
            .exits(0);
        assert!(ran.err.is_empty(), "{}", ran.err);
        ran.out
    };
    let adapted = answer(&["--base", "base", "--adapter", "run/adapter"]);
    assert_eq!(adapted, answer(&["--base", "run/merged"]));

    let args = ["generate", "--base", "run/merged", "--json"];
    let ran = workspace.run(&[&args[..], &prompt].concat()).exits(0);
    let event = ran.event("generate");
    assert_eq!(
        event["text"].as_str().unwrap(),
        adapted.strip_suffix('\n').unwrap()
    );
    assert!(event["tokens"].as_u64().unwrap() <= 8);
    assert!(event["prompt_tokens"].as_u64().unwrap() > 4);
    assert!(["length", "stop_token"].contains(&event["end"].as_str().unwrap()));
}

#[test]
fn a_recipe_begins_with_init() {
    let workspace = Workspace::new();
    let ran = workspace.run(&["init", "new.yaml"]).exits(0);
    assert!(
        ran.out.is_empty() && ran.err.contains("lorafit check new.yaml"),
        "{ran:?}"
    );
    let ran = workspace.run(&["init", "-"]).exits(0);
    assert_eq!(ran.out, workspace.read("new.yaml"));
    workspace.write("new.yaml", "mine");
    workspace
        .run(&["init", "new.yaml"])
        .fails(1, &["new.yaml", "exists already", "remove it"]);
    assert_eq!(workspace.read("new.yaml"), "mine");
    workspace
        .run(&["init", "no/new.yaml"])
        .fails(1, &["cannot create no/new.yaml"]);
    let ran = workspace.run(&["init", "--json", "other.yaml"]).exits(0);
    assert_eq!(ran.event("init")["path"], "other.yaml");
}

#[test]
fn devices_and_schema_are_results() {
    let workspace = Workspace::new();
    let ran = workspace.run(&["devices"]).exits(0);
    assert!(ran.out.starts_with("cpu "), "{}", ran.out);
    let events = workspace.run(&["devices", "--json"]).exits(0).events();
    assert_eq!(events[0]["device"], "cpu");
    let ran = workspace.run(&["schema"]).exits(0);
    let schema: Value = serde_json::from_str(&ran.out).unwrap();
    assert!(schema["properties"]["train"].is_object());
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let ran = workspace.run(&["completions", shell]).exits(0);
        assert!(ran.out.contains("lorafit"), "{shell}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let workspace = Workspace::new();
    for args in [
        &["schema"][..],
        &["schema", "--markdown"],
        &["completions", "bash"],
        &["init", "-"],
        &["devices"],
        &["check", "recipe.yaml"],
        &["check", "recipe.yaml", "--json"],
        &["train", "recipe.yaml", "--json"],
        &["merge", "run", "--json"],
        &[
            "generate",
            "--base",
            "base",
            "--prompt",
            "x",
            "--max-new-tokens",
            "4",
        ],
    ] {
        let mut child = workspace.command(args).spawn().unwrap();
        drop(child.stdout.take());
        Ran::from(args, child.wait_with_output().unwrap()).exits(0);
    }
    // Nobody reads standard error either.
    for args in [
        &["train", "recipe.yaml", "--out", "b"][..],
        &["train", "recipe.yaml"],
    ] {
        let mut child = workspace.command(args).spawn().unwrap();
        drop((child.stdout.take(), child.stderr.take()));
        let code = child.wait().unwrap().code();
        assert_eq!(code, Some(if args.len() > 2 { 0 } else { 2 }));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_told() {
    let workspace = Workspace::new();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    for args in [
        &["schema"][..],
        &["completions", "bash"],
        &["check", "recipe.yaml"],
    ] {
        let output = workspace.command(args).stdout(full()).output().unwrap();
        Ran::from(args, output).fails(1, &["cannot write to standard output", "No space left"]);
    }
    let args = ["train", "recipe.yaml", "--json"];
    let output = workspace.command(&args).stdout(full()).output().unwrap();
    let ran = Ran::from(&args, output).exits(0);
    assert_eq!(ran.err.matches("events are lost").count(), 1, "{}", ran.err);
    assert!(workspace.path("run/adapter").is_dir());
}

#[test]
#[cfg(unix)]
fn an_interrupted_run_exits_with_130_and_resumes() {
    let workspace = Workspace::new();
    let endless = ["--set", "train.max_steps=1000000", "--json"];
    let args = [&["train", "recipe.yaml"][..], &endless].concat();
    let mut child = workspace.command(&args).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = |kind: &str| {
        let mut lines = lines.by_ref().map(|line| line.unwrap());
        let wanted = format!("{{\"event\":\"{kind}\"");
        lines.find(|line| line.starts_with(&wanted)).expect(kind)
    };
    next("step");
    let interrupt = |id: u32| {
        let id = id.to_string();
        let sent = std::process::Command::new("kill")
            .args(["-INT", &id])
            .status();
        assert!(sent.unwrap().success());
    };
    interrupt(child.id());
    let line: Value = serde_json::from_str(&next("interrupted")).unwrap();
    let step = line["step"].as_u64().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(workspace.names("run/states"), [format!("step-{step:06}")]);
    // And on it goes.
    let args = [&args[..], &["--resume"]].concat();
    let mut child = workspace.command(&args).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let start = lines.find_map(|line| {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        (event["event"] == "start").then_some(event)
    });
    assert_eq!(start.unwrap()["step"], step);
    interrupt(child.id());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
