//! Tokenising a chat dataset: cold, then from the cache, each in a process of its own.
//!
//! Prints one JSON line a measurement: tokens per second, peak memory, and a sha256 of the samples
//! that `scripts/hf_chat_map.py` computes too. With `--python`, runs that script in between, with
//! the same file, template and limit:
//!
//!     python3 scripts/make_bench_tokenizer.py --out /tmp/bench-model
//!     python3 scripts/make_chat_dataset.py --rows 200000 --seed 1 --out /tmp/chat.jsonl
//!     cargo bench --bench data -- --data /tmp/chat.jsonl --model /tmp/bench-model --python python3

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use lorafit::data::tokenize::ChatTokenizer;
use lorafit::data::{self, Dataset};
use lorafit::recipe::plan::{DataFormat, DataPlan, OnBadRow, Packing, SourcePlan, Truncate};
use serde_json::json;
use sha2::{Digest, Sha256};

#[derive(Parser)]
struct Args {
    /// A file of conversations
    #[arg(long, default_value = "datasets/devils_dictionary.jsonl")]
    data: PathBuf,
    /// A folder with a tokenizer and its chat template
    #[arg(long, default_value = "examples/quickstart-base")]
    model: PathBuf,
    /// Tokens that rows are cut to
    #[arg(long, default_value_t = 2048)]
    max_seq_len: usize,
    /// How often everything is measured
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// A Python with `scripts/requirements-bench.txt`, to measure Hugging Face's `datasets` too
    #[arg(long)]
    python: Option<PathBuf>,
    /// Where the cache is made and removed
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Measure once with the cache in this folder (used by the benchmark itself)
    #[arg(long, hide = true)]
    cache: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

type Anyhow<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Anyhow<()> {
    let args = Args::parse();
    if let Some(cache) = &args.cache {
        return measure(&args, cache);
    }
    let scratch = args.scratch.clone().unwrap_or_else(std::env::temp_dir);
    for _ in 0..args.rounds {
        let cache = scratch.join(format!("lorafit-bench-data-{}", std::process::id()));
        let again = || -> Anyhow<()> {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(std::env::args_os().skip(1));
            run(command.arg("--cache").arg(&cache))
        };
        let measured = again().and_then(|()| again());
        std::fs::remove_dir_all(&cache)?;
        measured?;
        if let Some(python) = &args.python {
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/hf_chat_map.py");
            let mut command = Command::new(python);
            command.arg(script).arg("--batched");
            command.arg("--data").arg(&args.data);
            command.arg("--model").arg(&args.model);
            command
                .arg("--max-seq-len")
                .arg(args.max_seq_len.to_string());
            run(&mut command)?;
        }
    }
    Ok(())
}

/// Runs a command that prints what it measures.
fn run(command: &mut Command) -> Anyhow<()> {
    let status = command.status()?;
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    Ok(())
}

/// Loads the dataset, as `lorafit train` would.
fn measure(args: &Args, cache: &Path) -> Anyhow<()> {
    let memory = PeakMemory::watch();
    let plan = DataPlan {
        train: vec![SourcePlan::new(args.data.display().to_string())],
        format: DataFormat::Auto,
        validation: Vec::new(),
        validation_fraction: 0.0,
        max_seq_len: args.max_seq_len,
        truncate: Truncate::Right,
        packing: Packing::Off,
        group_by_length: true,
        train_on_inputs: false,
        chat_template: None,
        shuffle: true,
        streaming: false,
        shuffle_buffer: 1,
        on_bad_row: OnBadRow::Fail,
        waive: Vec::new(),
        cache_dir: Some(cache.to_owned()),
        cache_limit: 1e6,
    };
    let begin = Instant::now();
    let tokenizer = ChatTokenizer::open(&args.model, None)?;
    let dataset = data::load(&plan, 0, &tokenizer, usize::MAX, &mut |_| {})?;
    let seconds = begin.elapsed().as_secs_f64();
    let peak = memory.peak();
    let report = &dataset.report;
    let line = json!({
        "kind": if report.cached { "cached" } else { "cold" },
        "rows": report.rows,
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "seconds": (seconds * 1e3).round() / 1e3,
        "tokens_per_second": (report.tokens as f64 / seconds).round(),
        "threads": rayon::current_num_threads(),
        "peak_rss_bytes": peak.all,
        "peak_anonymous_bytes": peak.anonymous,
        "sha256": sha256(&dataset),
    });
    println!("{line}");
    Ok(())
}

/// Of all samples in order: their length, ids and labels, 32 bits each, little-endian.
fn sha256(dataset: &Dataset) -> String {
    let mut hasher = Sha256::new();
    let mut bytes = Vec::new();
    for sample in dataset.train.iter() {
        bytes.clear();
        bytes.extend((sample.input_ids.len() as u32).to_le_bytes());
        bytes.extend(sample.input_ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(sample.labels.iter().flat_map(|label| label.to_le_bytes()));
        hasher.update(&bytes);
    }
    let hex = hasher.finalize();
    hex.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The most that this process holds, looked at ten times a second (Linux).
struct PeakMemory;

/// Resident bytes: all, and without the pages of mapped files.
struct Peak {
    all: u64,
    anonymous: u64,
}

static ALL: AtomicU64 = AtomicU64::new(0);
static ANONYMOUS: AtomicU64 = AtomicU64::new(0);
static ENDED: AtomicBool = AtomicBool::new(false);

impl PeakMemory {
    fn watch() -> Self {
        std::thread::spawn(|| {
            while !ENDED.load(Ordering::Relaxed) {
                look();
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Self
    }

    fn peak(self) -> Peak {
        ENDED.store(true, Ordering::Relaxed);
        look();
        Peak {
            all: ALL.load(Ordering::Relaxed),
            anonymous: ANONYMOUS.load(Ordering::Relaxed),
        }
    }
}

fn look() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace()
            .next()?
            .parse()
            .ok()
            .map(|kib: u64| kib * 1024)
    };
    for (key, slot) in [("VmRSS:", &ALL), ("RssAnon:", &ANONYMOUS)] {
        slot.fetch_max(bytes(key).unwrap_or(0), Ordering::Relaxed);
    }
}
