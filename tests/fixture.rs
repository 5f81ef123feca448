//! A workspace with a base model, a dataset and a recipe that train in milliseconds, and the
//! binary run in it as a user would.
//!
//! The base is the smallest Llama of the goldens with the tokenizer and chat template of the
//! goldens: 512 tokens, 3 layers, 128 positions. Its answers mean nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A scratch directory with `base/`, `data.jsonl` and `recipe.yaml` (4 steps, output in `run/`).
pub struct Workspace {
    dir: tempfile::TempDir,
}

/// What `recipe.yaml` says.
pub const RECIPE: &str = "\
base:
  model: base
data:
  train: [data.jsonl]
  max_seq_len: 64
adapter:
  rank: 4
  alpha: 8
train:
  micro_batch_size: 2
  learning_rate: 1.0e-2
  max_steps: 4
  logging_steps: 1
output_dir: run
";

impl Workspace {
    /// A fresh one.
    pub fn new() -> Self {
        let workspace = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        base_model(&workspace.path("base"));
        let rows = [
            ("Define Bore.", "A person who talks."),
            ("Define Year.", "A period of days."),
            ("Define Cat.", "A soft thing to be kicked."),
            ("Define Dog.", "A kind of deity."),
            ("Define Once.", "Enough."),
            ("Define Quiet.", "What a house is without a child in it."),
        ];
        let rows: String = rows
            .iter()
            .map(|(user, answer)| chat(user, answer))
            .collect();
        workspace.write("data.jsonl", &rows);
        workspace.write("recipe.yaml", RECIPE);
        workspace
    }

    /// The path of something in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a text file.
    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Reads a text file.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Names in a directory, sorted.
    pub fn names(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(name)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// The binary with arguments, not started yet: in the workspace, on the CPU, offline.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorafit"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.path("hub"))
            .env("LORAFIT_CACHE", self.path("cache"))
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_ENDPOINT")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs the binary to its end.
    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::from(args, self.command(args).output().unwrap())
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
    what: String,
}

impl Ran {
    /// Reads what a command left.
    pub fn from(args: &[&str], output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
            what: args.join(" "),
        }
    }

    /// Asserts the exit code, and that nothing panicked.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        let all = format!("lorafit {}\n{}\n{}", self.what, self.out, self.err);
        assert_eq!(self.code, Some(code), "{all}");
        assert!(!all.contains("panicked"), "{all}");
        self
    }

    /// Asserts that it failed with `code` and an error that holds each of `parts`.
    #[track_caller]
    pub fn fails(self, code: i32, parts: &[&str]) -> Self {
        let ran = self.exits(code);
        assert!(ran.err.contains("error: "), "{}", ran.err);
        for part in parts {
            assert!(
                ran.err.contains(part),
                "lorafit {}: no `{part}` in:\n{}",
                ran.what,
                ran.err
            );
        }
        ran
    }

    /// The lines of standard output, each of which must be a JSON object with an `event`.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        let parse = |line: &str| {
            let event: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
            assert!(event["event"].is_string(), "{line}");
            event
        };
        self.out.lines().map(parse).collect()
    }

    /// The only event of a kind.
    #[track_caller]
    pub fn event(&self, kind: &str) -> Value {
        let events = self.events();
        let mut found = events.iter().filter(|event| event["event"] == kind);
        let event = found
            .next()
            .unwrap_or_else(|| panic!("no {kind} in {}", self.out));
        assert!(found.next().is_none(), "several {kind} in {}", self.out);
        event.clone()
    }
}

/// One chat row.
pub fn chat(user: &str, answer: &str) -> String {
    let row = serde_json::json!({"messages": [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
    ]});
    format!("{row}\n")
}

/// Writes the base model into a new directory.
pub fn base_model(dir: &Path) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    fs::create_dir_all(dir).unwrap();
    for name in [
        "models/llama/config.json",
        "models/llama/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/chat_template.jinja",
    ] {
        let from = golden.join(name);
        fs::copy(&from, dir.join(from.file_name().unwrap())).unwrap();
    }
}
