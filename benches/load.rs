//! Loading a model of random weights: time, and what it takes of memory beyond the mapped file.
//!
//! Writes a model of Llama 3.2 1B's shape in bf16 first (2.3 GiB; `--dir` keeps it). Prints one JSON
//! line; the peak is the highest resident memory of the process without the pages of mapped files,
//! sampled each millisecond, beside the kernel's own high-water mark with them.
//!
//! With `--cache`, quantised matrices are kept there, and the second run maps them.
//!
//!     cargo bench --bench load -- --storage as-stored
//!     cargo bench --bench load -- --dir model --quantization nf4 --cache kept

mod random_model;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use lorafit::model::quant_cache::{Cached, QuantCache};
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Keep, Storage};
use lorafit::recipe::Quantization;
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// Where the model is, or is written
    #[arg(long)]
    dir: Option<PathBuf>,
    /// How its matrices are kept
    #[arg(long, value_enum, default_value = "as-stored")]
    storage: Kept,
    /// How its linear layers are quantised: none, nf4, nf4-double or int8
    #[arg(long, default_value = "none", value_parser = quantization)]
    quantization: Quantization,
    /// Where quantised matrices are kept
    #[arg(long)]
    cache: Option<PathBuf>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kept {
    F32,
    F16,
    Bf16,
    AsStored,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let scratch = tempfile::tempdir()?;
    let dir = args.dir.as_deref().unwrap_or(scratch.path());
    let file = dir.join("model.safetensors");
    if !file.exists() {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("config.json"), llama_1b().to_string())?;
        random_model::write(dir)?;
    }
    let bytes = fs::metadata(&file)?.len();
    let storage = match args.storage {
        Kept::F32 => Storage::F32,
        Kept::F16 => Storage::F16,
        Kept::Bf16 => Storage::Bf16,
        Kept::AsStored => Storage::AsStored,
    };
    let before = status("RssAnon").unwrap_or(0);
    let (done, peak) = (AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    let model = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                peak.fetch_max(status("RssAnon").unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let keep = Keep {
            storage,
            linears: args.quantization.scheme(),
            gguf_blocks: args.quantization == Quantization::Gguf,
            ..Keep::default()
        };
        let model = load(dir, keep, args.cache.clone());
        done.store(true, Ordering::Relaxed);
        model
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let peak = peak.into_inner().max(status("RssAnon").unwrap_or(0)) - before;
    println!(
        "{}",
        json!({
            "storage": format!("{:?}", args.storage), "quantization": args.quantization, "cached": args.cache, "file_bytes": bytes, "seconds": seconds,
            "peak_beyond_mapped_bytes": peak, "of_file": peak as f64 / bytes as f64,
            "vm_hwm_bytes": status("VmHWM"), "layers": model.config().num_hidden_layers,
        })
    );
    Ok(())
}

fn quantization(word: &str) -> Result<Quantization, serde_json::Error> {
    serde_json::from_value(word.into())
}

fn load(dir: &Path, keep: Keep, cache: Option<PathBuf>) -> Result<CausalLm, String> {
    let weights = Weights::open(dir).map_err(|error| error.to_string())?;
    let config = weights.config().map_err(|error| error.to_string())?;
    let device = Device::flex();
    let cached = cache.zip(keep.linears).and_then(|(dir, scheme)| {
        let cache = QuantCache::new(Some(dir), 100.0)?;
        Some(cache.of_base(&weights, &config, scheme, keep.in_f32))
    });
    let keep = Keep {
        cached: cached.as_ref(),
        ..keep
    };
    let model = CausalLm::load_as(&weights, config, &device, keep);
    let model = model.map_err(|error| error.to_string())?;
    match cached.and_then(Cached::finish) {
        Some(reason) => Err(reason),
        None => Ok(model),
    }
}

/// A line of `/proc/self/status`, in bytes; `None` where there is no such file.
fn status(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// The configuration of Llama 3.2 1B.
fn llama_1b() -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": true, "initializer_range": 0.02,
        "attention_bias": false, "mlp_bias": false, "bos_token_id": 128000, "eos_token_id": 128001,
    })
}
