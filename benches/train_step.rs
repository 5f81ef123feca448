//! Whole training steps: LoRA on all linear layers, random tokens, every token labelled, AdamW.
//!
//! Prints one JSON line: tokens per second (median of the steps after the first) and peak resident
//! memory. To compare with a peer, run both in turn on the same machine and quote ratios:
//!
//!     cargo bench --bench train_step -- --base MODEL --batch 4 --seq 512 --steps 6 --rank 16

mod random_model;

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use lorafit::adapter::config::AdapterConfig;
use lorafit::adapter::inject::{self, Init};
use lorafit::adapter::target::{self, Targeting};
use lorafit::data::batch::Batch;
use lorafit::device::{self, DeviceSpec};
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Keep, Storage, names};
use lorafit::random::Stream;
use lorafit::recipe::Quantization;
use lorafit::train::heap::Counting;
use lorafit::train::optimizer::{AdamW, AdamWConfig};
use lorafit::train::recompute::Retain;
use lorafit::train::{memory, step};

/// As in the binary.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Parser)]
struct Args {
    /// A model directory or a .gguf file
    #[arg(long, default_value = "examples/quickstart-base")]
    base: PathBuf,
    /// Samples in a step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens in a sample
    #[arg(long, default_value_t = 512)]
    seq: usize,
    /// Steps; the first is not counted
    #[arg(long, default_value_t = 6)]
    steps: usize,
    /// Rank of the adapters
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// How the base's matrices are kept: f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Draw the weights at random: BASE needs only a config.json
    #[arg(long)]
    random: bool,
    /// How linear layers are kept: none, nf4, nf4-double or int8
    #[arg(long, default_value = "none", value_parser = quantization)]
    quantization: Quantization,
    /// What is computed again on the way back
    #[arg(long, default_value = "none", value_parser = ["none", "block", "block-on-host"])]
    recompute: String,
    /// Where to compute
    #[arg(long, default_value = "cpu")]
    device: DeviceSpec,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let device = device::open(args.device)?;
    let mut model = load(&args, &device.device)?;
    let vocabulary = model.config().vocab_size;
    let mut optimizer = AdamW::new(AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        loraplus_lr_ratio: 1.0,
        embedding_lr_ratio: 1.0,
    });
    let retain = match args.recompute.as_str() {
        "block" => Retain::Inputs,
        "block-on-host" => Retain::InputsOnHost,
        _ => Retain::Graphs,
    };
    let mut rates = Vec::new();
    for number in 0..args.steps {
        let batch = random_batch(&args, number, vocabulary);
        let start = Instant::now();
        let mut result =
            step::gradients(&mut model, &[batch], None, retain, &|| false).ok_or("interrupted")?;
        step::clip(&mut result.gradients, 1.0);
        optimizer.step(&mut model, result.gradients, 2e-4);
        device.device.sync().map_err(|error| format!("{error:?}"))?;
        let rate = (args.batch * args.seq) as f64 / start.elapsed().as_secs_f64();
        eprintln!("step {number}: loss {:.4}, {rate:.1} tokens/s", result.loss);
        rates.push(rate);
    }
    let mut counted = rates[1.min(rates.len() - 1)..].to_vec();
    counted.sort_by(f64::total_cmp);
    let gib = memory::peak_resident().map(|bytes| bytes as f64 / f64::from(1 << 30));
    println!(
        "{}",
        serde_json::json!({
            "lorafit": env!("CARGO_PKG_VERSION"), "dtype": args.dtype, "device": device.spec.to_string(),
            "batch": args.batch, "seq": args.seq, "rank": args.rank, "recompute": args.recompute,
            "tokens_per_second": counted[counted.len() / 2], "peak_rss_gib": gib,
        })
    );
    Ok(())
}

fn quantization(word: &str) -> Result<Quantization, serde_json::Error> {
    serde_json::from_value(word.into())
}

/// The base with a fresh adapter on every linear layer.
fn load(
    args: &Args,
    device: &burn::tensor::Device,
) -> Result<CausalLm, Box<dyn std::error::Error>> {
    let storage = match args.dtype.as_str() {
        "f32" => Storage::F32,
        "bf16" => Storage::Bf16,
        "f16" => Storage::F16,
        other => return Err(format!("no dtype {other}").into()),
    };
    let scratch = tempfile::tempdir()?;
    let base = match args.random {
        true => {
            std::fs::copy(
                args.base.join("config.json"),
                scratch.path().join("config.json"),
            )?;
            random_model::write(scratch.path())?;
            scratch.path()
        }
        false => &args.base,
    };
    let weights = Weights::open(base)?;
    let keep = Keep {
        storage,
        linears: args.quantization.scheme(),
        gguf_blocks: args.quantization == Quantization::Gguf,
        ..Keep::default()
    };
    let mut model = CausalLm::load_as(&weights, weights.config()?, device, keep)?;
    let targeting = Targeting::all_linear(args.rank, 2.0 * args.rank as f64);
    let modules = target::select(&targeting, &names::linear_modules(model.config()))?;
    let config = AdapterConfig::new("base", None, targeting, 0.0);
    inject::inject(&mut model, &config, &modules, &Init::Fresh { seed: 0 });
    Ok(model)
}

fn random_batch(args: &Args, number: usize, vocabulary: usize) -> Batch {
    let stream = Stream::new(0).split(number as u64);
    let ids: Vec<i32> = (0..(args.batch * args.seq) as u64)
        .map(|i| (stream.bits(i) % vocabulary as u64) as i32)
        .collect();
    Batch {
        batch: args.batch,
        tokens: args.seq,
        labels: ids.clone(),
        input_ids: ids,
        position_ids: (0..args.batch).flat_map(|_| 0..args.seq).collect(),
        segment_starts: (0..=args.batch).map(|row| row * args.seq).collect(),
        lengths: vec![args.seq; args.batch],
    }
}
