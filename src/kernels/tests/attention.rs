//! Attention: the plain case and everything that model families add to it, over segments around
//! the size of a block.

use burn::tensor::{Device, Tensor};

use super::{assert_close, compare, device, random};
use crate::kernels::Segments;
use crate::kernels::attention::{self, Heads, attention};

/// The fused kernel, or the reference.
pub(super) type Attention =
    fn(Tensor<2>, Tensor<2>, Tensor<2>, Option<Tensor<1>>, Heads, &Segments) -> Tensor<2>;

pub(super) fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        heads,
        kv_heads,
        head_dim,
        value_dim: head_dim,
        scale: (head_dim as f32).powf(-0.5),
        window: None,
        soft_cap: None,
        in_bf16: false,
    }
}

/// q, k and v of `queries` and `keys` rows.
pub(super) fn random_rows(heads: Heads, queries: usize, keys: usize) -> [Tensor<2>; 3] {
    [
        random([queries, heads.heads * heads.head_dim]),
        random([keys, heads.kv_heads * heads.head_dim]),
        random([keys, heads.kv_heads * heads.value_dim]),
    ]
}

/// Applies `f` to q, k, v and, when there are four tensors, sinks `[1, H]`.
pub(super) fn apply(f: Attention, x: &[Tensor<2>], heads: Heads, segments: &Segments) -> Tensor<2> {
    let sinks = x.get(3).map(|sinks| sinks.clone().reshape([heads.heads]));
    let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
    f(q, k, v, sinks, heads, segments)
}

/// Compares the fused kernel with the reference, with sinks and without.
fn compare_attention(heads: Heads, segments: &Segments, keys: usize) {
    let mut inputs = random_rows(heads, segments.tokens(), keys).to_vec();
    for sinks in [false, true] {
        if sinks {
            inputs.push(random([1, heads.heads]));
        }
        compare(
            &format!("attention {heads:?} {segments:?} {keys} keys, sinks {sinks}"),
            &inputs,
            |x| apply(attention, x, heads, segments),
            |x| apply(attention::reference, x, heads, segments),
        );
    }
}

/// Windows below, at and above the size of a block, and wider than all rows.
const WINDOWS: [Option<usize>; 6] = [None, Some(1), Some(5), Some(64), Some(100), Some(1000)];

/// `heads` with every window, with a soft cap that most scores feel and without.
fn variants(heads: Heads) -> impl Iterator<Item = Heads> {
    let capped = move |soft_cap| {
        WINDOWS.map(|window| Heads {
            window,
            soft_cap,
            ..heads
        })
    };
    [None, Some(1.5)].into_iter().flat_map(capped)
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

#[test]
fn windows_soft_caps_and_sinks_equal_their_reference() {
    device();
    // (batch, queries, keys, heads, kv heads, head dim, value dim)
    for (b, t, s, h, k, d, value_dim) in [
        (1, 1, 1, 2, 1, 64, 64),
        (2, 63, 63, 2, 1, 80, 80),
        (1, 65, 65, 2, 2, 96, 40),
        (1, 130, 130, 4, 2, 24, 16),
        (1, 130, 130, 2, 1, 128, 128),
        (1, 65, 65, 2, 1, 16, 256),
        (1, 1, 130, 4, 2, 16, 16),
        (2, 7, 110, 2, 1, 8, 12),
        (1, 66, 131, 2, 1, 256, 8),
    ] {
        let heads = Heads {
            value_dim,
            ..heads(h, k, d)
        };
        for heads in variants(heads) {
            compare_attention(heads, &Segments::uniform(b, t), b * s);
        }
    }
}

#[test]
fn sinks_that_do_not_train_get_no_gradient() {
    device();
    let (heads, segments) = (heads(4, 2, 16), Segments::uniform(2, 67));
    let sinks: Tensor<1> = random([4]);
    let with_sinks = |f: Attention, x: &[Tensor<2>]| {
        let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
        f(q, k, v, Some(sinks.clone()), heads, &segments)
    };
    compare(
        "frozen sinks",
        &random_rows(heads, 134, 134),
        |x| with_sinks(attention, x),
        |x| with_sinks(attention::reference, x),
    );
}

/// Segments of these lengths; the rows of a batch have equal sums.
pub(in crate::kernels) fn packed(batch: usize, lengths: &[usize]) -> Segments {
    let mut starts = vec![0];
    for length in lengths {
        starts.push(starts[starts.len() - 1] + length);
    }
    Segments::packed(batch, starts.into())
}

/// Batches and lengths of segments around the size of a block, as short as they get, and uneven.
pub(in crate::kernels) const PACKINGS: [(usize, &[usize]); 6] = [
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
        for heads in variants(heads(4, 2, 8)) {
            compare_attention(heads, &segments, segments.tokens());
        }
    }
}

/// Both the fused kernel and the reference: what a segment gives, forward and gradients, is what it
/// gives alone.
#[test]
fn packed_segments_never_see_each_other() {
    device();
    let plain = heads(4, 2, 16);
    let all_options = Heads {
        value_dim: 12,
        window: Some(50),
        soft_cap: Some(1.5),
        ..plain
    };
    for (batch, lengths) in PACKINGS {
        let segments = packed(batch, lengths);
        let n = segments.tokens();
        for heads in [plain, all_options] {
            let mut inputs = random_rows(heads, n, n).to_vec();
            if heads == all_options {
                inputs.push(random([1, heads.heads]));
            }
            let alone = |x: &[Tensor<2>]| {
                let rows = segments.ranges().filter(|rows| !rows.is_empty());
                let alone = rows.map(|rows| {
                    let mut x = x.to_vec();
                    for x in &mut x[..3] {
                        *x = x.clone().narrow(0, rows.start, rows.len());
                    }
                    let segment = Segments::uniform(1, rows.len());
                    apply(attention::reference, &x, heads, &segment)
                });
                Tensor::cat(alone.collect(), 0)
            };
            for packed in [attention as Attention, attention::reference] {
                compare(
                    &format!("packed {segments:?}, {n} rows, {heads:?}"),
                    &inputs,
                    |x| apply(packed, x, heads, &segments),
                    alone,
                );
            }
        }
    }
}

/// Both the fused kernel and the reference: the last queries give with a cache what they give among
/// all, so a window counts from where a query stands.
#[test]
fn a_cache_changes_nothing() {
    device();
    let (all, new) = (130, 7);
    for heads in variants(heads(4, 2, 16)) {
        let [q, k, v] = random_rows(heads, all, all);
        let sinks: Tensor<2> = random([1, heads.heads]);
        let last = q.clone().narrow(0, all - new, new);
        for f in [attention as Attention, attention::reference] {
            let inputs = [q.clone(), k.clone(), v.clone(), sinks.clone()];
            let want = apply(f, &inputs, heads, &Segments::uniform(1, all));
            let inputs = [last.clone(), k.clone(), v.clone(), sinks.clone()];
            let got = apply(f, &inputs, heads, &Segments::uniform(1, new));
            let want = want.narrow(0, all - new, new);
            assert_close(&format!("cache, {heads:?}"), got, want);
        }
    }
}

/// One query that sees three keys of scores 1, 2 and 3, with values 10, 20 and 40.
#[test]
fn options_follow_their_definition() {
    let device = Device::flex();
    let column = |x: &[f32]| Tensor::<1>::from_floats(x, &device).reshape([x.len(), 1]);
    let (q, k) = (column(&[2.0]), column(&[1.0, 2.0, 3.0]));
    let v = column(&[10.0, 20.0, 40.0]);
    let mean = |weights: [f64; 3], sink: f64| {
        let sum: f64 = weights.iter().sum::<f64>() + sink;
        (10.0 * weights[0] + 20.0 * weights[1] + 40.0 * weights[2]) / sum
    };
    let capped = |x: f64| (2.0 * (x / 2.0).tanh()).exp();
    for (window, soft_cap, sink, want) in [
        (None, None, None, mean([1f64, 2.0, 3.0].map(f64::exp), 0.0)),
        (Some(2), None, None, mean([0.0, 1.0, 1f64.exp()], 0.0)),
        (Some(1), None, None, 40.0),
        (Some(1), None, Some(3.0), 20.0),
        (
            None,
            Some(2.0),
            None,
            mean([1.0, 2.0, 3.0].map(capped), 0.0),
        ),
        (
            None,
            Some(2.0),
            Some(4.0),
            mean([1.0, 2.0, 3.0].map(capped), 4f64.exp()),
        ),
    ] {
        let heads = Heads {
            scale: 0.5,
            window,
            soft_cap,
            ..heads(1, 1, 1)
        };
        for f in [attention as Attention, attention::reference] {
            let sink = sink.map(|sink: f32| Tensor::from_floats([sink], &device));
            let segments = Segments::uniform(1, 1);
            let got = f(q.clone(), k.clone(), v.clone(), sink, heads, &segments);
            let want = Tensor::from_floats([[want as f32]], &device);
            assert_close(&format!("{heads:?}"), got, want);
        }
    }
}
