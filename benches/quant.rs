//! Quantising and dequantising a matrix, and dequantising GGUF's blocks: gigabytes of its f32 values a
//! second, and bits a value.
//!
//!     cargo bench --bench quant -- --rows 8192 --cols 4096

use std::time::Instant;

use clap::Parser;
use lorafit::quant::blocks::{BlockKind, dequantise};
use lorafit::quant::{QuantMatrix, Scheme};
use lorafit::random::Stream;
use rayon::prelude::*;

#[derive(Parser)]
struct Args {
    /// Rows of the matrix
    #[arg(long, default_value_t = 8192)]
    rows: usize,
    /// Columns of the matrix
    #[arg(long, default_value_t = 4096)]
    cols: usize,
    /// Repetitions; the fastest counts
    #[arg(long, default_value_t = 7)]
    repeat: usize,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let shape = [args.rows, args.cols];
    let stream = Stream::new(1);
    let values: Vec<f32> = (0..(args.rows * args.cols) as u64)
        .into_par_iter()
        .map(|i| stream.normal(i) as f32)
        .collect();
    let gigabytes = (4 * values.len()) as f64 / 1e9;
    let mut out = vec![0f32; values.len()];
    let copy = fastest(args.repeat, || {
        (out.par_chunks_mut(1 << 15))
            .zip(values.par_chunks(1 << 15))
            .for_each(|(to, from)| to.copy_from_slice(from));
    });
    println!("copy       {:6.1} GB/s of f32", gigabytes / copy);
    for scheme in [Scheme::Nf4, Scheme::Nf4Double, Scheme::Int8] {
        let make = || QuantMatrix::quantise(&values, shape, scheme).expect("finite values");
        let to = fastest(args.repeat, || {
            std::hint::black_box(make());
        });
        let matrix = make();
        let from = fastest(args.repeat, || matrix.dequantise_rows(0, &mut out));
        println!(
            "{:9}  quantise {:6.1} GB/s, dequantise {:6.1} GB/s, {:.3} bits a value, relative error {:.4}",
            format!("{scheme:?}"),
            gigabytes / to,
            gigabytes / from,
            (8 * matrix.bytes()) as f64 / values.len() as f64,
            matrix.relative_error(&values),
        );
    }
    for kind in BlockKind::ALL {
        // Any bytes are blocks; what they stand for does not change the time, but that f16 factors which are
        // not finite would.
        let bytes = vec![0x35u8; values.len() / kind.block_len() * kind.block_bytes()];
        let from = fastest(args.repeat, || dequantise(kind, &bytes, &mut out));
        println!(
            "{:9}  dequantise {:6.1} GB/s, {:.3} bits a value",
            kind.name(),
            gigabytes / from,
            (8 * bytes.len()) as f64 / values.len() as f64,
        );
    }
}

/// Seconds of the fastest repetition.
fn fastest(repeat: usize, mut run: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..repeat {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
