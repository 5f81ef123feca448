//! Datasets in scratch folders, tokenisers for them, and what came out of them.

use std::fs;
use std::path::{Path, PathBuf};

use lorafit::data::tokenize::ChatTokenizer;
use lorafit::data::{DataError, Dataset, IGNORE_INDEX, Sample, load as load_dataset};
use lorafit::recipe::plan::{DataFormat, DataPlan, OnBadRow, Packing, SourcePlan, Truncate};
use serde_json::json;

use crate::reference::own;
use crate::weights::Random;

/// Positions of the model that the datasets are for.
pub const POSITIONS: usize = 4096;

/// ChatML as most models have it: spans must be derived.
pub const PLAIN: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The golden tokenizer.
pub fn tokenizer() -> ChatTokenizer {
    ChatTokenizer::from_dir(&own().join("tokenizer"), None).unwrap()
}

/// The golden tokenizer with another template.
pub fn tokenizer_with(template: &str) -> ChatTokenizer {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("test.jinja");
    fs::write(&path, template).unwrap();
    ChatTokenizer::from_dir(&own().join("tokenizer"), Some(&path)).unwrap()
}

/// The golden tokenizer with so many ids in all.
pub fn tokenizer_of(ids: usize) -> ChatTokenizer {
    let (dir, golden) = (tempfile::tempdir().unwrap(), own().join("tokenizer"));
    let text = fs::read_to_string(golden.join("tokenizer.json")).unwrap();
    let mut file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let words = file["model"]["vocab"].as_object_mut().unwrap();
    for id in words.len()..ids {
        words.insert(format!("word {id}"), json!(id));
    }
    fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    for name in ["tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(golden.join(name), dir.path().join(name)).unwrap();
    }
    ChatTokenizer::from_dir(dir.path(), None).unwrap()
}

/// The defaults of a recipe, but that nothing is kept.
pub fn plan(train: &[&Path]) -> DataPlan {
    let sources = train.iter().map(|path| path.display().to_string());
    DataPlan {
        train: sources.map(SourcePlan::new).collect(),
        format: DataFormat::Auto,
        validation: Vec::new(),
        validation_fraction: 0.0,
        max_seq_len: POSITIONS,
        truncate: Truncate::Right,
        packing: Packing::Off,
        group_by_length: true,
        train_on_inputs: false,
        chat_template: None,
        shuffle: true,
        streaming: false,
        shuffle_buffer: 10_000,
        on_bad_row: OnBadRow::Fail,
        waive: Vec::new(),
        cache_dir: None,
        cache_limit: 0.0,
    }
}

/// A dataset file in a folder of its own.
pub struct File {
    pub dir: tempfile::TempDir,
    pub path: PathBuf,
}

/// Writes one.
pub fn file(name: &str, content: impl AsRef<[u8]>) -> File {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    File { dir, path }
}

/// Loads what a plan says.
pub fn load(plan: &DataPlan, tokenizer: &ChatTokenizer) -> Result<Dataset, DataError> {
    load_dataset(plan, 0, tokenizer, POSITIONS, &mut |_| {})
}

/// Loads rows of JSON.
pub fn load_text(
    content: impl AsRef<[u8]>,
    tokenizer: &ChatTokenizer,
) -> Result<Dataset, DataError> {
    let file = file("data.jsonl", content);
    load(&plan(&[&file.path]), tokenizer)
}

/// The error of a dataset, with its folder taken out.
pub fn error_of(content: impl AsRef<[u8]>, tokenizer: &ChatTokenizer) -> String {
    let file = file("data.jsonl", content);
    let error = load(&plan(&[&file.path]), tokenizer).unwrap_err();
    error
        .to_string()
        .replace(&file.path.display().to_string(), "data.jsonl")
}

/// The text of the tokens that train.
pub fn trained_text(sample: &Sample, tokenizer: &ChatTokenizer) -> String {
    tokenizer
        .decode(&trained_ids(&sample.labels), false)
        .unwrap()
}

/// The labels that train.
pub fn trained_ids(labels: &[i32]) -> Vec<u32> {
    let trained = labels.iter().filter(|label| **label != IGNORE_INDEX);
    trained.map(|label| *label as u32).collect()
}

/// A row of messages.
pub fn chat(turns: &[(&str, &str)]) -> String {
    let messages: Vec<_> = turns
        .iter()
        .map(|(role, content)| json!({"role": role, "content": content}))
        .collect();
    json!({ "messages": messages }).to_string() + "\n"
}

/// A conversation of random roles and contents, special tokens and odd characters among them.
pub fn random_chat(random: &mut Random) -> Vec<(&'static str, String)> {
    const PIECES: [&str; 12] = [
        "a",
        " the",
        "\n",
        "<|im_end|>",
        "<|im_start|>",
        "é",
        "👩\u{200d}🚀",
        "\u{100000}",
        "  ",
        "{{ x }}",
        "12",
        "\"",
    ];
    let mut turns = Vec::new();
    for _ in 0..1 + random.below(5) {
        let role = ["system", "user", "assistant", "tool"][random.below(4)];
        let content = (0..random.below(6))
            .map(|_| PIECES[random.below(12)])
            .collect();
        turns.push((role, content));
    }
    turns.push(("assistant", PIECES[random.below(12)].to_owned()));
    turns
}
