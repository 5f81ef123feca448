//! Every fused kernel against its reference: forward and all gradients, over odd shapes.

use std::sync::Arc;

use burn::tensor::{Device, Distribution, Tensor};

use super::*;
use crate::kernels::attention::Heads;

/// f32 on products of up to 200 terms; the references round in another order.
const TOLERANCE: f32 = 2e-5;

fn device() -> Device {
    let device = Device::flex();
    device.seed(7);
    device
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

fn assert_close<const D: usize>(name: &str, got: Tensor<D>, want: Tensor<D>) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let scale = want.clone().abs().max().into_scalar::<f32>().max(1.0);
    let worst = (got - want).abs().max().into_scalar::<f32>();
    assert!(
        worst <= TOLERANCE * scale,
        "{name}: off by {worst} (scale {scale})"
    );
}

/// Compares output and gradients of two functions of the same inputs, under a random upstream.
fn compare(
    name: &str,
    inputs: &[Tensor<2>],
    fused: impl Fn(&[Tensor<2>]) -> Tensor<2>,
    reference: impl Fn(&[Tensor<2>]) -> Tensor<2>,
) {
    let plain = fused(inputs);
    let upstream: Tensor<2> = random(plain.dims());
    let run = |f: &dyn Fn(&[Tensor<2>]) -> Tensor<2>| {
        let leaves: Vec<Tensor<2>> = inputs
            .iter()
            .map(|x| x.clone().autodiff().require_grad())
            .collect();
        let out = f(&leaves);
        let mut grads = (out.clone() * upstream.clone()).sum().backward();
        let grads: Vec<Tensor<2>> = leaves
            .iter()
            .map(|leaf| leaf.grad_remove(&mut grads).expect("a gradient"))
            .collect();
        (out.inner(), grads)
    };
    let (got, got_grads) = run(&fused);
    let (want, want_grads) = run(&reference);
    assert_close(&format!("{name} untracked"), plain, want.clone());
    assert_close(name, got, want);
    for (i, (got, want)) in got_grads.into_iter().zip(want_grads).enumerate() {
        assert_close(&format!("{name}, gradient {i}"), got, want);
    }
}

#[test]
fn rms_norm_equals_its_reference() {
    device();
    for (n, d) in [(1, 1), (3, 17), (40, 64), (257, 33)] {
        compare(
            &format!("rms_norm {n}x{d}"),
            &[random([n, d]), random([1, d])],
            |x| rms_norm(x[0].clone(), x[1].clone().reshape([d]), 1e-5),
            |x| rms_norm::reference(x[0].clone(), x[1].clone().reshape([d]), 1e-5),
        );
    }
}

#[test]
fn rope_equals_its_reference() {
    device();
    for (n, heads, half) in [(1, 1, 1), (5, 3, 6), (130, 2, 32)] {
        let angles: Tensor<2> = random([n, half]);
        let (cos, sin) = (angles.clone().cos(), angles.sin());
        compare(
            &format!("rope {n}x{heads}x{half}"),
            &[random([n, heads * 2 * half])],
            |x| rope(x[0].clone(), cos.clone(), sin.clone()),
            |x| rope::reference(x[0].clone(), cos.clone(), sin.clone()),
        );
    }
}

#[test]
fn swiglu_equals_its_reference() {
    device();
    for (n, f) in [(1, 1), (7, 33), (150, 129)] {
        compare(
            &format!("swiglu {n}x{f}"),
            &[random([n, f]) * 4.0, random([n, f])],
            |x| swiglu(x[0].clone(), x[1].clone()),
            |x| swiglu::reference(x[0].clone(), x[1].clone()),
        );
    }
}

fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        heads,
        kv_heads,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
    }
}

/// q, k and v of `queries` and `keys` rows.
fn random_rows(heads: Heads, queries: usize, keys: usize) -> [Tensor<2>; 3] {
    let kv_width = heads.kv_heads * heads.head_dim;
    [
        random([queries, heads.heads * heads.head_dim]),
        random([keys, kv_width]),
        random([keys, kv_width]),
    ]
}

/// Compares the fused kernel with the reference.
fn compare_attention(heads: Heads, segments: &Segments, keys: usize) {
    compare(
        &format!("attention {heads:?} {segments:?} {keys} keys"),
        &random_rows(heads, segments.tokens(), keys),
        |x| attention(x[0].clone(), x[1].clone(), x[2].clone(), heads, segments),
        |x| attention::reference(x[0].clone(), x[1].clone(), x[2].clone(), heads, segments),
    );
}

#[test]
fn attention_equals_its_reference() {
    device();
    // (batch, queries, keys, heads, kv heads, head dim)
    for (b, t, s, h, k, d) in [
        (1, 1, 1, 1, 1, 2),
        (2, 5, 5, 4, 2, 12),
        (1, 130, 130, 3, 1, 64),
        (3, 64, 64, 2, 2, 80),
        (1, 1, 70, 4, 2, 16),
        (2, 67, 100, 2, 1, 8),
    ] {
        compare_attention(heads(h, k, d), &Segments::uniform(b, t), b * s);
    }
}

/// Segments of these lengths; the rows of a batch have equal sums.
fn packed(batch: usize, lengths: &[usize]) -> Segments {
    let mut starts = vec![0];
    for length in lengths {
        starts.push(starts[starts.len() - 1] + length);
    }
    Segments::packed(batch, starts.into())
}

/// Batches and lengths of segments around the size of a block, as short as they get, and uneven.
const PACKINGS: [(usize, &[usize]); 6] = [
    (1, &[1, 1, 1]),
    (1, &[63, 1, 64, 65, 2, 129]),
    (1, &[5; 40]),
    (2, &[64, 65, 129]),
    (3, &[131, 2, 129, 128, 2, 1]),
    (2, &[7, 0, 3, 10]),
];

#[test]
fn packed_attention_equals_its_reference() {
    device();
    for (batch, lengths) in PACKINGS {
        let segments = packed(batch, lengths);
        for heads in [heads(6, 3, 16), heads(2, 1, 64), heads(1, 1, 80)] {
            compare_attention(heads, &segments, segments.tokens());
        }
    }
}

/// Both the fused kernel and the reference: what a segment gives, forward and gradients, is what it
/// gives alone.
#[test]
fn packed_segments_never_see_each_other() {
    device();
    let heads = heads(4, 2, 16);
    for (batch, lengths) in PACKINGS {
        let segments = packed(batch, lengths);
        let n = segments.tokens();
        let inputs = random_rows(heads, n, n);
        for packed in [attention, attention::reference] {
            compare(
                &format!("packed {segments:?}, {n} rows"),
                &inputs,
                |x| packed(x[0].clone(), x[1].clone(), x[2].clone(), heads, &segments),
                |x| {
                    let alone = segments
                        .ranges()
                        .filter(|rows| !rows.is_empty())
                        .map(|rows| {
                            let [q, k, v] =
                                [0, 1, 2].map(|i| x[i].clone().narrow(0, rows.start, rows.len()));
                            attention::reference(q, k, v, heads, &Segments::uniform(1, rows.len()))
                        });
                    Tensor::cat(alone.collect(), 0)
                },
            );
        }
    }
}

#[test]
fn lora_linear_equals_its_reference() {
    device();
    for (n, input, out, rank) in [(1, 3, 2, 1), (37, 64, 50, 8), (130, 48, 96, 5)] {
        let weight: Tensor<2> = random([out, input]);
        compare(
            &format!("lora_linear {n}x{input}x{out} rank {rank}"),
            &[
                random([n, input]),
                random([rank, input]),
                random([out, rank]),
            ],
            |x| {
                lora_linear(
                    x[0].clone(),
                    weight.clone(),
                    x[1].clone(),
                    x[2].clone(),
                    0.7,
                )
            },
            |x| {
                let adapter = (x[1].clone(), x[2].clone());
                lora_linear::reference(x[0].clone(), x[0].clone(), weight.clone(), adapter, 0.7)
            },
        );
    }
}

#[test]
fn cross_entropy_equals_its_reference() {
    device();
    for (n, d, v) in [(1, 2, 3), (9, 16, 50), (70, 24, 301)] {
        let targets: Arc<[i32]> = (0..n as i32)
            .map(|i| {
                if i % 4 == 1 {
                    -100
                } else {
                    (i * 37) % v as i32
                }
            })
            .collect();
        compare(
            &format!("cross entropy {n}x{d}x{v}"),
            &[random([n, d]), random([v, d])],
            |x| linear_cross_entropy(x[0].clone(), x[1].clone(), targets.clone()).reshape([1, 1]),
            |x| cross_entropy::reference(x[0].clone(), x[1].clone(), &targets).reshape([1, 1]),
        );
    }
}

#[test]
fn cross_entropy_without_labels_is_zero() {
    let targets: Arc<[i32]> = Arc::from([-100, -100]);
    let hidden = random([2, 4]).autodiff().require_grad();
    let loss = linear_cross_entropy(hidden.clone(), random([5, 4]), targets);
    let mut grads = loss.backward();
    assert_eq!(loss.into_scalar::<f32>(), 0.0);
    let grad = hidden.grad_remove(&mut grads).expect("a gradient");
    assert_eq!(grad.abs().max().into_scalar::<f32>(), 0.0);
}
