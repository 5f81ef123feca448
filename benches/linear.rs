//! Frozen linear layers forward and backward, with the weight in f32, bf16, f16, NF4 and int8: GFLOP/s, the best
//! of several rounds, memory for the results included. One JSON line a shape.
//!
//!     cargo bench --bench linear -- --rows 2048 --shapes 576x576,1536x576,2048x2048

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use clap::Parser;
use lorafit::kernels::{self, QuantWeight, Weight};
use lorafit::quant::{QuantMatrix, Scheme};

#[derive(Parser)]
struct Args {
    /// Rows of x: tokens
    #[arg(long, default_value_t = 2048)]
    rows: usize,
    /// Shapes of W, out × in
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "192x576,576x576,1536x576,576x1536,2048x2048,8192x2048,2048x8192"
    )]
    shapes: Vec<String>,
    /// Rounds, of which the fastest counts
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    eprintln!(
        "{} threads, products in bf16: {}",
        rayon::current_num_threads(),
        kernels::has_bf16_products()
    );
    for shape in &args.shapes {
        let (out, input) = shape.split_once('x').ok_or("a shape is OUTxIN")?;
        let shape = [out.parse()?, input.parse()?];
        let mut line = serde_json::json!({"rows": args.rows, "out": shape[0], "in": shape[1]});
        let dense: Tensor<2> = random(shape);
        let values: Vec<f32> = dense
            .to_data()
            .try_into_vec()
            .map_err(|e| format!("{e:?}"))?;
        let quantised = |scheme, in_bf16| {
            let matrix = QuantMatrix::quantise(&values, shape, scheme).expect("finite");
            Weight::Quantised(Arc::new(QuantWeight::new(matrix, in_bf16, &Device::flex())))
        };
        for (name, weight) in [
            ("f32", dense.clone().into()),
            ("bf16", dense.clone().cast(FloatDType::BF16).into()),
            ("f16", dense.clone().cast(FloatDType::F16).into()),
            ("nf4", quantised(Scheme::Nf4, false)),
            ("nf4 in bf16", quantised(Scheme::Nf4, true)),
            ("nf4-double", quantised(Scheme::Nf4Double, false)),
            ("int8", quantised(Scheme::Int8, false)),
        ] {
            let [forward, backward] = rates(&args, shape, &weight);
            line[name] = serde_json::json!({"forward": forward, "backward": backward});
        }
        println!("{line}");
    }
    Ok(())
}

fn random(shape: [usize; 2]) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

/// GFLOP/s forward, and of the gradient of x.
fn rates(args: &Args, [out, input]: [usize; 2], weight: &Weight) -> [f64; 2] {
    let (x, g) = (random([args.rows, input]), random([args.rows, out]));
    let work = 2.0 * (args.rows * out * input) as f64;
    let mut best = [f64::INFINITY; 3];
    for _ in 0..args.rounds {
        let tracked = x.clone().autodiff().require_grad();
        let start = Instant::now();
        let y = kernels::linear(tracked, weight.clone());
        best[0] = best[0].min(start.elapsed().as_secs_f64());
        // The upstream gradient comes out of a product, whose own share is measured apart.
        let leaf = y.clone().inner().autodiff().require_grad();
        for (i, y) in [y, leaf].into_iter().enumerate() {
            let loss = (y * g.clone()).sum();
            let start = Instant::now();
            drop(loss.backward());
            best[i + 1] = best[i + 1].min(start.elapsed().as_secs_f64());
        }
    }
    let [forward, both, apart] = best;
    [forward, both - apart].map(|seconds| (work / seconds / 1e9).round())
}
