//! The README's table of what fits, planned from published configurations alone.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use lorafit::memory::{Base, Planner, Platform, advice};
use lorafit::recipe::Plan;
use lorafit::recipe::load::load;

/// Models with the values of their published `config.json`.
const MODELS: [(&str, &str); 5] = [
    ("Llama 3.2 1B", "llama-3.2-1b"),
    ("Llama 3.2 3B", "llama-3.2-3b"),
    ("Llama 3.1 8B", "llama-3.1-8b"),
    ("Qwen3 14B", "qwen3-14b"),
    ("Qwen3 32B", "qwen3-32b"),
];

const GIB: [u64; 5] = [6, 8, 12, 16, 24];

/// What a row trains, and how it says so.
const KINDS: [(&str, &[&str]); 3] = [
    ("LoRA, bf16", &[]),
    ("QLoRA", &["base.quantization=nf4-double"]),
    (
        "QLoRA, offloaded",
        &[
            "base.quantization=nf4-double",
            "train.offload_activations=true",
        ],
    ),
];

/// Where the table stands in the README.
const MARKS: [&str; 2] = [
    "<!-- planned contexts -->\n",
    "<!-- end of planned contexts -->",
];

fn recipe(scratch: &Path, sets: &[&str]) -> Plan {
    let path = scratch.join("recipe.yaml");
    let text = "\
base: {model: config}
data: {train: [rows.jsonl]}
adapter: {rank: 32, alpha: 64}
train: {precision: bf16, micro_batch_size: 1, gradient_checkpointing: block}
";
    fs::write(&path, text).unwrap();
    fs::write(scratch.join("rows.jsonl"), "").unwrap();
    let rows = format!("data.train={}", scratch.join("rows.jsonl").display());
    let mut all = vec![rows];
    all.extend(sets.iter().map(|set| (*set).to_string()));
    load(&path, &all).unwrap_or_else(|faults| panic!("{faults}"))
}

/// The base whose `config.json` is that of a model.
fn base(scratch: &Path, name: &str) -> Base {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/memory_table");
    let dir = scratch.join(name);
    fs::create_dir_all(&dir).unwrap();
    fs::copy(
        configs.join(format!("{name}.json")),
        dir.join("config.json"),
    )
    .unwrap();
    Base::open(&dir).unwrap()
}

/// The longest context, down to a multiple of 64.
fn cell(planner: &Planner, plan: &Plan, gib: u64) -> String {
    let found = advice::largest(planner, plan, gib << 30).unwrap();
    match found.max_seq_len / 64 * 64 {
        0 => "–".to_string(),
        n => n.to_string(),
    }
}

fn table() -> String {
    let scratch = tempfile::tempdir().unwrap();
    let mut text = String::from("| model | trained | 6 GB | 8 GB | 12 GB | 16 GB | 24 GB |\n");
    text += "|---|---|---|---|---|---|---|\n";
    for (title, name) in MODELS {
        let base = base(scratch.path(), name);
        for (kind, sets) in KINDS {
            let plan = recipe(scratch.path(), sets);
            let planner = Planner::of_base(&base, &plan, Platform::gpu());
            let cells = GIB.map(|gib| cell(&planner, &plan, gib));
            writeln!(text, "| {title} | {kind} | {} |", cells.join(" | ")).unwrap();
        }
    }
    text
}

#[test]
fn the_readme_has_the_contexts_that_are_planned() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"));
    let readme = readme.unwrap();
    let (_, rest) = readme.split_once(MARKS[0]).expect("the first mark");
    let (found, _) = rest.split_once(MARKS[1]).expect("the second mark");
    let want = table();
    assert!(
        found.trim() == want.trim(),
        "the README's table should be\n\n{want}"
    );
}

/// What stands beside torchtune's figure.
#[test]
fn the_readme_has_the_plan_of_two_packed_rows() {
    let scratch = tempfile::tempdir().unwrap();
    let base = base(scratch.path(), "llama-3.1-8b");
    let plan = recipe(
        scratch.path(),
        &[
            "base.quantization=nf4-double",
            "data.packing=true",
            "data.max_seq_len=2048",
            "train.micro_batch_size=2",
        ],
    );
    let planner = Planner::of_base(&base, &plan, Platform::gpu());
    let gib = planner.plan(&plan).unwrap().needed() as f64 / f64::from(1 << 30);
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"));
    let want = format!("2 × 2048 packed tokens, planned here at {gib:.1} GiB");
    assert!(
        readme.unwrap().contains(&want),
        "the README should say: {want}"
    );
}

/// Published shapes give the published numbers of parameters.
#[test]
fn the_configurations_are_those_of_the_models() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, millions) in [
        ("llama-3.2-1b", 1_235.8),
        ("llama-3.2-3b", 3_212.7),
        ("llama-3.1-8b", 8_030.3),
        ("qwen3-14b", 14_768.3),
        ("qwen3-32b", 32_762.1),
    ] {
        let dir = scratch.path().join(name);
        base(scratch.path(), name);
        let config = lorafit::model::config::ModelConfig::from_dir(&dir).unwrap();
        let tensors = lorafit::model::names::tensors(&config);
        let n: usize = tensors
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let off = n as f64 / 1e6 - millions;
        assert!(off.abs() < 0.06, "{name}: {n}");
    }
}
