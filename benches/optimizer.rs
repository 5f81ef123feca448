//! One AdamW step over adapters of a model of 8B's shape on the CPU: in one pass, as the tensor
//! operations that it stands for, and with moments in 8 bits.
//!
//! Prints one JSON line each: milliseconds (the best of `--steps`), GB/s of weights, gradients and moments
//! read and written, and bytes of moments.
//!
//!     cargo bench --bench optimizer

use std::time::Instant;

use burn::tensor::{Device, Tensor};
use clap::Parser;
use lorafit::kernels::AdamwStep;
use lorafit::kernels::adamw::reference;
use lorafit::train::moments::Moments;
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// Steps of each
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Rank of the adapters
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Inputs and outputs of the linear layers of a block of Llama 3 8B, and how many blocks there are.
const LAYERS: [[usize; 2]; 7] = [
    [4096, 4096],
    [4096, 1024],
    [4096, 1024],
    [4096, 4096],
    [4096, 14336],
    [4096, 14336],
    [14336, 4096],
];
const BLOCKS: usize = 32;

const STEP: AdamwStep = AdamwStep {
    keep: [0.9, 0.999],
    share: [0.1, 0.001],
    before: 0.999,
    divisor: 0.05,
    eps: 1e-8,
    rate: 2e-3,
    after: 1.0,
};

fn main() {
    let args = Args::parse();
    let device = Device::flex();
    let sizes: Vec<usize> = (0..BLOCKS)
        .flat_map(|_| LAYERS.iter().flatten())
        .map(|width| width * args.rank)
        .collect();
    for way in ["one pass", "tensor operations", "8 bits"] {
        let random = |n: usize| {
            Tensor::<1>::random([n], burn::tensor::Distribution::Uniform(-1.0, 1.0), &device)
        };
        let mut tensors: Vec<(Tensor<1>, Tensor<1>, Moments)> = (sizes.iter())
            .map(|&n| {
                (
                    random(n),
                    random(n),
                    Moments::zeros(n, way == "8 bits", &device),
                )
            })
            .collect();
        let mut best = f64::INFINITY;
        for _ in 0..args.steps {
            // A step owns its gradients, so that their copy is not its own.
            let gradients: Vec<Tensor<1>> = (tensors.iter())
                .map(|(_, gradient, _)| gradient.clone() + 0.0)
                .collect();
            let start = Instant::now();
            for ((values, _, moments), gradient) in tensors.iter_mut().zip(gradients) {
                let taken = std::mem::replace(values, Tensor::empty([0], &device));
                *values = match (way, &mut *moments) {
                    ("tensor operations", Moments::Whole { first, second }) => {
                        let both = [first.clone(), second.clone()];
                        let (values, both) = reference(taken, gradient, both, STEP);
                        [*first, *second] = both;
                        values
                    }
                    _ => moments.step(taken, gradient, STEP),
                };
            }
            best = best.min(start.elapsed().as_secs_f64());
        }
        let numbers: usize = sizes.iter().sum();
        let moments: usize = tensors.iter().map(|(_, _, moments)| moments.bytes()).sum();
        let moved = (3 * 4 * numbers + 2 * moments) as f64;
        println!(
            "{}",
            json!({
                "way": way, "numbers": numbers, "milliseconds": best * 1e3,
                "gb_per_second": moved / best / 1e9, "moment_bytes": moments,
            })
        );
    }
}
