//! `lorafit data`, and what `check` and `train` say of a dataset.

use serde_json::{Value, json};

use crate::fixture::{Ran, Workspace, chat};
use crate::hub_server::Hub;

const CHAT: &str = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\\u001b[2J\"}]}\n";

fn preview(workspace: &Workspace, args: &[&str]) -> Ran {
    workspace.run(&[&["data", "preview", "recipe.yaml"], args].concat())
}

#[test]
fn a_dataset_of_the_hub_trains_from_its_parquet_files() {
    let hub = Hub::start(
        "datasets",
        &[
            ("README.md", b"# rows"),
            (
                "data/train-00000-of-00001.parquet",
                include_bytes!("golden/data/rows.parquet"),
            ),
        ],
    );
    let workspace = Workspace::new();
    let source = "data.train={path: hf://someone/tiny, format: text}";
    // Two of its three rows have no text.
    let skip = "data.on_bad_row=skip";
    let args = [
        "train",
        "recipe.yaml",
        "--json",
        "--set",
        source,
        "--set",
        skip,
    ];
    let mut command = workspace.command(&args);
    command
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_TOKEN", "hf_test");
    let ran = Ran::from(&args, command.output().unwrap()).exits(0);
    let data = &ran.event("plan")["data"];
    assert_eq!(
        (&data["rows"], &data["train_samples"]),
        (&json!(3), &json!(1))
    );
    // What was downloaded serves without the hub.
    let args = ["check", "recipe.yaml", "--set", source, "--set", skip];
    workspace.run(&args).exits(0);
}

#[test]
fn a_preview_shows_what_trains() {
    let workspace = Workspace::new();
    let ran = preview(&workspace, &["--rows", "2"]).exits(0);
    for part in [
        "row 1  data.jsonl:1  ",
        "user      │ <|im_start|>user⏎",
        "│ Define Bore.<|im_end|>⏎",
        "⟦A person who talks.<|im_end|>⟧",
        "row 2  data.jsonl:2  ",
    ] {
        assert!(ran.out.contains(part), "no `{part}` in {}", ran.out);
    }
    assert!(!ran.out.contains("row 3"), "{}", ran.out);
    assert!(ran.err.is_empty(), "{}", ran.err);
    let ran = preview(&workspace, &["--row", "5", "--tokens"]).exits(0);
    assert!(ran.out.contains("row 5  data.jsonl:5"), "{}", ran.out);
    let line = |text: &str| {
        let mut lines = ran.out.lines();
        lines.find(|line| line.contains(text)).unwrap().to_owned()
    };
    assert!(line("<|im_start|>").starts_with("     0        0       0       1 "));
    assert!(ran.out.contains("yes"), "{}", ran.out);
    preview(&workspace, &["--row", "7"]).fails(2, &["there is no row 7"]);
    preview(&workspace, &["--row", "0"]).fails(2, &["--row"]);
}

#[test]
fn a_preview_shows_bad_rows_with_their_faults() {
    let workspace = Workspace::new();
    let rows = [
        CHAT.to_owned(),
        "not JSON\n".to_owned(),
        chat("c", "d").replace("\"assistant\"", "\"user\""),
        chat("e", &"word ".repeat(90)),
    ];
    workspace.write("data.jsonl", &rows.concat());
    let ran = preview(&workspace, &[]).exits(0);
    for part in [
        "data.jsonl:2",
        "not valid JSON",
        "all labels are masked",
        "to 64 tokens",
    ] {
        assert!(ran.out.contains(part), "no `{part}` in {}", ran.out);
    }
    // What a row holds does not drive the terminal.
    assert!(!ran.out.contains('\u{1b}'), "{}", ran.out);
}

#[test]
fn a_preview_for_scripts_is_complete() {
    let workspace = Workspace::new();
    let ran = preview(&workspace, &["--rows", "1", "--json"]).exits(0);
    let row = ran.event("row");
    assert_eq!(
        (&row["number"], &row["source"]),
        (&json!(1), &json!("data.jsonl:1"))
    );
    let tokens = row["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert_eq!(
        text,
        "<|im_start|>user\nDefine Bore.<|im_end|>\n<|im_start|>assistant\nA person who talks.<|im_end|>\n"
    );
    let trained: String = tokens
        .iter()
        .filter(|t| t["trained"] == true)
        .map(|t| t["text"].as_str().unwrap())
        .collect();
    assert_eq!(trained, "A person who talks.<|im_end|>");
    for (i, token) in tokens.iter().enumerate() {
        assert_eq!(
            (&token["position"], &token["segment"]),
            (&json!(i), &json!(0))
        );
    }
    let special: Vec<&Value> = tokens.iter().filter(|t| t["special"] == true).collect();
    assert_eq!(special.len(), 4);
}

#[test]
fn a_packed_preview_has_segments_whose_positions_restart() {
    let workspace = Workspace::new();
    let args = [
        "--packed",
        "--set",
        "data.packing=true",
        "--json",
        "--rows",
        "99",
    ];
    let ran = preview(&workspace, &args).exits(0);
    let rows = ran.events();
    let mut samples = 0;
    for row in &rows {
        let tokens = row["tokens"].as_array().unwrap();
        assert!(tokens.len() <= 64);
        let (mut segment, mut position) = (0, 0);
        for token in tokens {
            if token["segment"] != json!(segment) {
                (segment, position) = (segment + 1, 0);
            }
            assert_eq!(
                (&token["segment"], &token["position"]),
                (&json!(segment), &json!(position))
            );
            position += 1;
            let is_answer = token["trained"] == true;
            assert!(!is_answer || token["role"] == "assistant", "{token}");
        }
        samples += segment + 1;
    }
    assert_eq!(samples, 6);
    assert!(rows.len() < 6, "nothing is packed");
}

#[test]
fn a_page_stands_alone_and_hides_nothing() {
    let workspace = Workspace::new();
    let script = chat("</script><script>alert(1)</script>", "<b>&amp;");
    workspace.write("data.jsonl", &script);
    let ran = preview(&workspace, &["--html", "page.html"]).exits(0);
    assert!(ran.err.contains("wrote 1 row to page.html"), "{}", ran.err);
    let page = workspace.read("page.html");
    for outside in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "the page asks for {outside}");
    }
    assert!(!page.contains("<script>alert"), "rows are no code");
    preview(&workspace, &["--html", "none/page.html"]).fails(1, &["none/page.html"]);
}

#[test]
fn stats_count_everything() {
    let workspace = Workspace::new();
    let rows = [
        chat("a", "b"),
        chat("a", "b"),
        chat("a", &"word ".repeat(60)),
        chat(&"word ".repeat(60), "b"),
        chat("c", "d"),
    ];
    workspace.write("data.jsonl", &rows.concat());
    let args = ["data", "stats", "recipe.yaml", "--set", "data.packing=true"];
    let ran = workspace.run(&args).exits(0);
    for part in [
        "1 dropped",
        "1 truncated",
        "1 duplicates",
        "max_seq_len 64",
        "█",
        "filled",
    ] {
        assert!(ran.out.contains(part), "no `{part}` in {}", ran.out);
    }
    let ran = workspace.run(&[&args[..], &["--json"]].concat()).exits(0);
    let stats = ran.event("stats");
    for (key, want) in [
        ("rows", json!(5)),
        ("samples", json!(4)),
        ("dropped", json!(1)),
        ("truncated", json!(1)),
        ("duplicates", json!(1)),
        ("steps", json!(4)),
        ("max_seq_len", json!(64)),
        ("packing", json!("on")),
        ("cached", json!(true)),
    ] {
        assert_eq!(stats[key], want, "{key}");
    }
    let bins = stats["lengths"]["bins"].as_array().unwrap();
    let counted: u64 = bins.iter().map(|bin| bin["count"].as_u64().unwrap()).sum();
    assert_eq!(counted, 4);
    let rows = stats["rows_per_epoch"].as_u64().unwrap() as f64;
    let fill = stats["tokens"].as_f64().unwrap() / (rows * 64.0);
    assert!((stats["fill"].as_f64().unwrap() - fill).abs() < 1e-9);
}

#[test]
fn a_broken_contract_is_shown_with_its_row_and_waived_by_name() {
    let workspace = Workspace::new();
    let bad = chat("a", "b<|pad|>");
    workspace.write("data.jsonl", &(chat("a", "b") + &bad));
    for command in ["check", "train"] {
        workspace.run(&[command, "recipe.yaml"]).fails(
            2,
            &[
                "data.jsonl:2: ",
                "`<|pad|>` is both the padding token",
                "data.waive: [pad]",
            ],
        );
    }
    let waive = ["--set", "data.waive=[pad]"];
    let ran = workspace
        .run(&[&["check", "recipe.yaml"], &waive[..]].concat())
        .exits(0);
    assert!(ran.err.contains("waived: pad"), "{}", ran.err);
    workspace
        .run(&[&["train", "recipe.yaml"], &waive[..]].concat())
        .exits(0);
}

#[test]
fn bad_rows_that_are_skipped_are_listed() {
    let workspace = Workspace::new();
    workspace.write(
        "data.jsonl",
        &(chat("a", "b") + "{\"messages\": 3}\n" + &chat("c", "d")),
    );
    workspace
        .run(&["check", "recipe.yaml"])
        .fails(2, &["data.jsonl:2: `messages`"]);
    let ran = workspace
        .run(&["check", "recipe.yaml", "--set", "data.on_bad_row=skip"])
        .exits(0);
    assert!(
        ran.err.contains("data.jsonl:2: `messages` must be"),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("1 of 3 rows"), "{}", ran.err);
}

#[test]
fn packed_and_streamed_runs_train() {
    let workspace = Workspace::new();
    for (out, sets) in [
        ("packed", &["data.packing=true"][..]),
        ("wrapped", &["data.packing=wrap"]),
        (
            "streamed",
            &["data.streaming=true", "data.shuffle_buffer=4"],
        ),
    ] {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["train", "recipe.yaml", "--json", "--out", out]
            .into_iter()
            .chain(sets)
            .collect();
        let ran = workspace.run(&args).exits(0);
        let events = ran.events();
        let steps = events.iter().filter(|event| event["event"] == "step");
        let losses: Vec<f64> = steps.map(|step| step["loss"].as_f64().unwrap()).collect();
        assert_eq!(losses.len(), 4, "{out}");
        assert!(losses[3] < losses[0], "{out}: {losses:?}");
        assert!(workspace.path(out).join("adapter").exists());
    }
    let args = [
        "check",
        "recipe.yaml",
        "--set",
        "data.streaming=true",
        "--set",
        "train.max_steps=null",
    ];
    workspace
        .run(&args)
        .fails(2, &["data.streaming", "train.max_steps"]);
}

/// A stream may meet a bad row late: what was trained is kept, and the run goes on without it.
#[test]
fn a_row_that_stops_a_stream_late_costs_nothing_before_it() {
    let workspace = Workspace::new();
    let good = workspace.read("data.jsonl");
    workspace.write(
        "data.jsonl",
        &(good.clone() + "{\"messages\": 3}\n" + &good),
    );
    let args = [
        "train",
        "recipe.yaml",
        "--resume",
        "--set",
        "data.streaming=true",
    ];
    let sets = [
        "--set",
        "data.shuffle_buffer=4",
        "--set",
        "train.gradient_accumulation_steps=1",
    ];
    let args = [&args[..], &sets].concat();
    workspace.run(&args).fails(
        1,
        &[
            "after step 2: ",
            "data.jsonl:7: `messages` must be",
            "--resume",
        ],
    );
    assert_eq!(workspace.names("run/states"), ["step-000002"]);
    let ran = workspace
        .run(&[&args[..], &["--set", "data.on_bad_row=skip"]].concat())
        .exits(0);
    assert!(
        ran.err.contains("data.jsonl:7: `messages` must be"),
        "{}",
        ran.err
    );
    assert!(workspace.path("run/adapter").exists());
}
