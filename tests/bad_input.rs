//! Bad input: each is a clear error that names place and remedy; nothing is lost, nothing panics.

use std::fs;

use serde_json::{Value, json};

use crate::fixture::{Workspace, chat};

/// `lorafit check` and `lorafit train` both refuse, and no run directory appears.
#[track_caller]
fn refused(workspace: &Workspace, sets: &[&str], parts: &[&str]) {
    for command in ["check", "train"] {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = [command, "recipe.yaml"].into_iter().chain(sets).collect();
        let ran = workspace.run(&args).fails(2, parts);
        assert!(ran.out.is_empty(), "{}", ran.out);
    }
    assert!(!workspace.path("run").exists());
}

#[test]
fn recipes() {
    let workspace = Workspace::new();
    workspace
        .run(&["train", "none.yaml"])
        .fails(2, &["none.yaml"]);
    refused(
        &workspace,
        &["train.learning_rat=1"],
        &["--set train.learning_rat=1", "train.learning_rate"],
    );
    refused(
        &workspace,
        &["train.learning_rate=fast"],
        &["`fast`", "a number"],
    );
    let typos = workspace.read("recipe.yaml").replace("rank: 4", "rnk: 4");
    workspace.write(
        "recipe.yaml",
        &typos.replace("max_steps: 4", "max_steps: many"),
    );
    refused(
        &workspace,
        &[],
        &[
            "error: recipe.yaml:7: adapter.rnk: ",
            "did you mean adapter.rank?",
            "\n       recipe.yaml:12: train.max_steps: ",
        ],
    );
    workspace.write("recipe.yaml", "base: [\n");
    refused(&workspace, &[], &["recipe.yaml:"]);
}

#[test]
fn datasets() {
    let workspace = Workspace::new();
    refused(&workspace, &["data.train=[none.jsonl]"], &["none.jsonl"]);
    let rows = [
        ("empty", "\n\n".to_owned(), "data.jsonl is empty"),
        (
            "json",
            chat("a", "b") + "{\"messages\": [\n",
            "data.jsonl:2",
        ),
        ("array", "[1]".to_owned(), "data.jsonl:1"),
        (
            "format",
            "{\"question\": \"a\"}\n".to_owned(),
            "cannot tell the format",
        ),
        (
            "role",
            "{\"messages\": [{\"role\": \"robot\", \"content\": \"a\"}]}\n".to_owned(),
            "roles are system, developer, user, assistant and tool",
        ),
        (
            "masked",
            chat("a", "b") + "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n",
            "data.jsonl:2: all labels are masked: the conversation has no assistant turn",
        ),
    ];
    for (what, text, message) in rows {
        eprintln!("{what}");
        workspace.write("data.jsonl", &text);
        refused(&workspace, &[], &[message]);
    }
    workspace.write("data.jsonl", &chat(&"long ".repeat(80), "b"));
    refused(&workspace, &[], &["data.max_seq_len = 64", "raise it"]);
    fs::write(workspace.path("data.jsonl"), b"{\"text\": \"\xff\"}\n").unwrap();
    refused(&workspace, &[], &["data.jsonl:1", "UTF-8"]);
    refused(
        &workspace,
        &["data.max_seq_len=129"],
        &["data.max_seq_len is 129", "positions for 128", "or less"],
    );
}

#[test]
fn base_models() {
    let workspace = Workspace::new();
    refused(
        &workspace,
        &["base.model=nowhere"],
        &["`nowhere`: no such directory"],
    );
    refused(
        &workspace,
        &["base.model=data.jsonl"],
        &["data.jsonl: not a model"],
    );
    refused(
        &workspace,
        &["base.model=someone/model"],
        &["someone/model", "HF_HUB_OFFLINE", "local copy"],
    );
    fs::create_dir(workspace.path("bare")).unwrap();
    refused(
        &workspace,
        &["base.model=bare"],
        &["bare", "no tokenizer.json", "no weights"],
    );
    fs::write(workspace.path("bare/pytorch_model.bin"), "").unwrap();
    refused(&workspace, &["base.model=bare"], &["pickle", "safetensors"]);
    fs::write(workspace.path("bare/model.gguf"), "GGUF").unwrap();
    refused(
        &workspace,
        &["base.model=bare/model.gguf"],
        &["bare/model.gguf"],
    );
}

#[test]
fn weights() {
    let workspace = Workspace::new();
    let path = workspace.path("base/model.safetensors");
    let whole = fs::read(&path).unwrap();
    let write = |bytes: &[u8]| fs::write(&path, bytes).unwrap();
    for length in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        write(&whole[..length]);
        refused(&workspace, &[], &["base/model.safetensors"]);
    }
    let with = |edit: &dyn Fn(&mut Value)| {
        let (header, data) = whole[8..].split_at(header_length(&whole));
        let mut header: Value = serde_json::from_slice(header).unwrap();
        edit(&mut header);
        let header = header.to_string();
        let length = (header.len() as u64).to_le_bytes();
        [&length[..], header.as_bytes(), data].concat()
    };
    const NAME: &str = "model.layers.1.mlp.up_proj.weight";
    for offsets in [
        json!([0, 4]),
        json!([0, 1u64 << 60]),
        json!([64, 0]),
        json!([-1, 4]),
    ] {
        write(&with(&|header| {
            header[NAME]["data_offsets"] = offsets.clone()
        }));
        refused(&workspace, &[], &["base/model.safetensors"]);
    }
    write(&with(&|header| header[NAME]["shape"] = json!([64, 128])));
    refused(
        &workspace,
        &[],
        &[
            "do not fit the configuration",
            NAME,
            "[128, 64]",
            "[64, 128]",
        ],
    );
    write(&with(&|header| {
        let tensor = header.as_object_mut().unwrap().remove(NAME).unwrap();
        header["model.layers.1.mlp.other.weight"] = tensor;
    }));
    refused(&workspace, &[], &[NAME, "model.layers.1.mlp.other.weight"]);
    write(b"\xff\xff\xff\xff\xff\xff\xff\x7f{}");
    refused(&workspace, &[], &["base/model.safetensors"]);
    write(&whole);
    workspace.run(&["check", "recipe.yaml"]).exits(0);
}

/// The length of a safetensors header.
fn header_length(bytes: &[u8]) -> usize {
    u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

#[test]
fn configurations() {
    let workspace = Workspace::new();
    let whole: Value = serde_json::from_str(&workspace.read("base/config.json")).unwrap();
    let with = |key: &str, value: Value| {
        let mut config = whole.clone();
        config[key] = value;
        workspace.write("base/config.json", &config.to_string());
    };
    with("model_type", json!("mamba"));
    refused(
        &workspace,
        &[],
        &["base/config.json", "mamba", "supported: llama"],
    );
    // What is wrong with the data is said in the same breath.
    workspace.write("empty.jsonl", "");
    refused(
        &workspace,
        &["data.train=[empty.jsonl]"],
        &["mamba", "empty.jsonl is empty"],
    );
    with("num_attention_heads", json!(0));
    refused(
        &workspace,
        &[],
        &["base/config.json", "num_attention_heads"],
    );
    with("vocab_size", json!(1_u64 << 62));
    refused(&workspace, &[], &["base"]);
    with("num_hidden_layers", json!(1_000_000_000));
    refused(&workspace, &[], &["base"]);
    workspace.write("base/config.json", "{");
    refused(&workspace, &[], &["base/config.json"]);
    fs::remove_file(workspace.path("base/config.json")).unwrap();
    refused(&workspace, &[], &["config.json"]);
}

#[test]
fn tokenizers() {
    let workspace = Workspace::new();
    let prompt = ["--prompt", "x"];
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/models/llama");
    let args = [&["generate", "--base", golden][..], &prompt].concat();
    workspace
        .run(&args)
        .fails(1, &["no tokenizer.json", "download it with the model"]);
    workspace.write("base/tokenizer.json", "{}");
    refused(&workspace, &[], &["tokenizer.json"]);
    workspace
        .run(&["generate", "--base", "base", "--prompt", "x"])
        .fails(1, &["tokenizer.json"]);
}

#[test]
fn prompts() {
    let workspace = Workspace::new();
    let generate =
        |prompt: &str| workspace.run(&["generate", "--base", "base", "--prompt", prompt]);
    generate(&"word ".repeat(200)).fails(2, &["positions for 128", "shorten it"]);
    let args = [
        "generate",
        "--base",
        "base",
        "--adapter",
        "nowhere",
        "--prompt",
        "x",
    ];
    workspace.run(&args).fails(1, &["nowhere"]);
    workspace
        .run(&["generate", "--base", "nowhere", "--prompt", "x"])
        .fails(1, &["`nowhere`"]);
}

#[test]
fn adapters() {
    let workspace = Workspace::new();
    refused(&workspace, &["adapter.init_from=nowhere"], &["nowhere"]);
    refused(
        &workspace,
        &["adapter.target_modules=[q_prj]"],
        &["q_prj", "q_proj"],
    );
    refused(&workspace, &["adapter.layers_to_transform=[7]"], &["7"]);
    fs::create_dir(workspace.path("pickled")).unwrap();
    workspace.write("pickled/adapter_model.bin", "");
    let args = [
        "merge",
        "--base",
        "base",
        "--adapter",
        "pickled",
        "--out",
        "merged",
    ];
    workspace.run(&args).fails(1, &["pickled"]);
    assert!(!workspace.path("merged").exists());
}

#[test]
fn outputs() {
    let workspace = Workspace::new();
    let train =
        |args: &[&str]| workspace.run(&[&["train", "recipe.yaml", "--quiet"][..], args].concat());
    train(&["--out", "data.jsonl/run"]).fails(1, &["data.jsonl/run"]);
    if cfg!(target_os = "linux") {
        train(&["--out", "/proc/run"]).fails(1, &["/proc/run"]);
    }
    fs::create_dir(workspace.path("mine")).unwrap();
    workspace.write("mine/thesis.txt", "years of work");
    train(&["--out", "mine"]).fails(2, &["mine is not empty", "--out"]);
    train(&["--out", "mine", "--overwrite"]).fails(2, &["mine is not empty"]);
    assert_eq!(workspace.names("mine"), ["thesis.txt"]);

    train(&[]).exits(0);
    let adapter = fs::read(workspace.path("run/adapter/adapter_model.safetensors")).unwrap();
    let metrics = workspace.read("run/metrics.jsonl");
    train(&[]).fails(
        2,
        &[
            "run already holds a run",
            "--resume",
            "--overwrite",
            "--out",
        ],
    );
    train(&["--resume", "--set", "train.learning_rate=0.5"])
        .fails(2, &["train.learning_rate: 0.01 → 0.5", "--overwrite"]);
    workspace.write("data.jsonl", &chat("other", "data"));
    train(&["--resume"]).fails(
        2,
        &["the data or the base model is not what", "--overwrite"],
    );
    assert_eq!(
        fs::read(workspace.path("run/adapter/adapter_model.safetensors")).unwrap(),
        adapter
    );
    assert_eq!(workspace.read("run/metrics.jsonl"), metrics);

    let merge = |out: &str| workspace.run(&["merge", "run", "--out", out]);
    merge("mine").fails(1, &["mine", "not empty", "--out"]);
    merge("data.jsonl").fails(1, &["data.jsonl"]);
    merge("base/merged").fails(1, &["lies in the base"]);
    workspace
        .run(&["merge", "nowhere"])
        .fails(2, &["nowhere/recipe.yaml"]);
    fs::remove_dir_all(workspace.path("run/adapter")).unwrap();
    merge("merged").fails(2, &["run has no adapter yet", "--resume"]);
    assert_eq!(workspace.names("mine"), ["thesis.txt"]);

    train(&["--overwrite"]).exits(0);
    assert!(workspace.path("run/adapter").is_dir());
}
