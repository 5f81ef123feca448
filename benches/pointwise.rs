//! Kernels that the memory's speed bounds, each beside its reference of plain operations: GB/s forward, and
//! forward and backward together, of what must be read and written at least. The best of several rounds, one
//! JSON line a kernel.
//!
//!     cargo bench --bench pointwise -- --rows 2048 --width 4096 --device cpu

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use clap::Parser;
use lorafit::device::{self, DeviceSpec};
use lorafit::kernels::{self, Activation, AdamwStep, DropMask, RopeLayout};
use lorafit::random::Stream;

#[derive(Parser)]
struct Args {
    /// Rows: tokens
    #[arg(long, default_value_t = 2048)]
    rows: usize,
    /// Columns
    #[arg(long, default_value_t = 4096)]
    width: usize,
    /// Rounds, of which the fastest counts
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Where to compute
    #[arg(long, default_value = "cpu")]
    device: DeviceSpec,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// A function of the same inputs, fused or not.
type Op<'a> = &'a dyn Fn(&[Tensor<2>]) -> Tensor<2>;

/// One size on one device.
struct Bench {
    device: Device,
    shape: [usize; 2],
    rounds: usize,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let bench = Bench {
        device: device::open(args.device)?.device,
        shape: [args.rows, args.width],
        rounds: args.rounds,
    };
    let heads = RopeLayout {
        head_dim: if args.width.is_multiple_of(128) {
            128
        } else {
            args.width
        },
        interleaved: false,
    };
    let weight = bench.random([1, args.width]).reshape([args.width]);
    bench.both(
        "rms_norm",
        &[bench.x()],
        [2, 5],
        &|x| kernels::rms_norm(x[0].clone(), weight.clone(), 1e-5),
        &|x| kernels::rms_norm::reference(x[0].clone(), weight.clone(), 1e-5),
    );
    let angles = bench.random([args.rows, heads.head_dim / 2]);
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    bench.both(
        "rope",
        &[bench.x()],
        [2, 4],
        &|x| kernels::rope(x[0].clone(), cos.clone(), sin.clone(), heads),
        &|x| kernels::rope::reference(x[0].clone(), cos.clone(), sin.clone(), heads),
    );
    for by in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
        bench.both(
            &format!("gated {by:?}"),
            &[bench.x(), bench.x()],
            [3, 8],
            &|x| kernels::gated(x[0].clone(), x[1].clone(), by),
            &|x| kernels::gated::reference(x[0].clone(), x[1].clone(), by),
        );
    }
    let mask = DropMask::new(Stream::new(0), 0.05);
    bench.both(
        "dropout",
        &[bench.x()],
        [2, 4],
        &|x| kernels::dropout(x[0].clone(), mask),
        &|x| kernels::dropout::reference(x[0].clone(), mask),
    );
    bench.adamw();
    Ok(())
}

impl Bench {
    fn random(&self, shape: [usize; 2]) -> Tensor<2> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &self.device)
    }

    fn x(&self) -> Tensor<2> {
        self.random(self.shape)
    }

    fn sync(&self) {
        self.device.sync().expect("the device works");
    }

    /// Prints what `moved` tensors of this size, forward and both ways, take.
    fn both(&self, name: &str, inputs: &[Tensor<2>], moved: [usize; 2], fused: Op, reference: Op) {
        let mut line = serde_json::json!({"kernel": name});
        for (which, op) in [("fused", fused), ("reference", reference)] {
            let seconds = self.seconds(inputs, op);
            let rates = [0, 1].map(|i| self.rate(moved[i], seconds[i]));
            line[which] = serde_json::json!({"forward": rates[0], "both": rates[1]});
        }
        println!("{line}");
    }

    /// GB/s, rounded.
    fn rate(&self, moved: usize, seconds: f64) -> f64 {
        let bytes = 4 * moved * self.shape[0] * self.shape[1];
        (bytes as f64 / seconds / 1e8).round() / 10.0
    }

    /// Forward alone, and forward and backward.
    fn seconds(&self, inputs: &[Tensor<2>], op: Op) -> [f64; 2] {
        let upstream = self.x();
        let mut best = [f64::INFINITY; 3];
        for _ in 0..self.rounds {
            let leaves: Vec<_> = inputs
                .iter()
                .map(|x| x.clone().autodiff().require_grad())
                .collect();
            self.sync();
            let start = Instant::now();
            let y = op(&leaves);
            self.sync();
            best[0] = best[0].min(start.elapsed().as_secs_f64());
            // The upstream gradient comes out of a product, whose own share is measured apart.
            let leaf = y.clone().inner().autodiff().require_grad();
            for (i, y) in [y, leaf].into_iter().enumerate() {
                let loss = (y * upstream.clone()).sum();
                self.sync();
                let start = Instant::now();
                drop(loss.backward());
                self.sync();
                best[i + 1] = best[i + 1].min(start.elapsed().as_secs_f64());
            }
        }
        let [forward, both, apart] = best;
        [forward, forward + both - apart]
    }

    fn adamw(&self) {
        let n = self.shape[0] * self.shape[1];
        let step = AdamwStep {
            keep: [0.9, 0.999],
            share: [0.1, 0.001],
            before: 1.0,
            divisor: 0.1,
            eps: 1e-8,
            rate: 1e-3,
            after: 1.0,
        };
        let mut line = serde_json::json!({"kernel": "adamw"});
        for (which, op) in [
            ("fused", kernels::adamw as fn(_, _, _, _) -> _),
            ("reference", kernels::adamw::reference),
        ] {
            let mut best = f64::INFINITY;
            let mut weight = self.x().reshape([n]);
            let mut moments = [self.x(), self.x().square()].map(|x| x.reshape([n]));
            for _ in 0..self.rounds {
                let grad = self.x().reshape([n]);
                // The model holds the weight, too.
                let held = weight.clone();
                self.sync();
                let start = Instant::now();
                (weight, moments) = op(weight, grad, moments, step);
                self.sync();
                best = best.min(start.elapsed().as_secs_f64());
                drop(held);
            }
            line[which] = serde_json::json!({"step": self.rate(7, best)});
        }
        println!("{line}");
    }
}
