//! Attention on a GPU against the reference on the CPU. Each combination of head sizes, soft cap and
//! sinks is a set of shaders to compile: few of them, over many shapes where they are the same.

use burn::tensor::Device;

use super::attention::{apply, heads, packed, random_rows};
use super::gpu::{compare_on, gpu_or_skip};
use super::{device, random};
use crate::kernels::Segments;
use crate::kernels::attention::{self, Heads, attention};

/// Compares output and gradients of q, k, v and, if there are any, sinks.
fn compare(gpu: &Device, heads: Heads, segments: &Segments, keys: usize, sinks: bool) {
    let mut inputs = random_rows(heads, segments.tokens(), keys).to_vec();
    if sinks {
        inputs.push(random([1, heads.heads]));
    }
    compare_on(
        gpu,
        &format!("attention {heads:?} {segments:?} {keys} keys, sinks {sinks}"),
        &inputs,
        |x| apply(attention, x, heads, segments),
        |x| apply(attention::reference, x, heads, segments),
    );
}

/// Sizes of heads that models have, and some that none has, with groups of 1, 3 and 4.
#[test]
fn heads_of_all_sizes_on_a_gpu() {
    let Some(gpu) = gpu_or_skip() else { return };
    device();
    // (batch, tokens, heads, kv heads, head dim, value dim)
    for (b, t, h, k, d, value_dim) in [
        (1, 65, 4, 1, 64, 64),
        (1, 33, 2, 2, 80, 80),
        (1, 40, 4, 1, 96, 96),
        (2, 35, 3, 1, 128, 128),
        (1, 34, 2, 1, 256, 256),
        (1, 67, 3, 1, 24, 40),
        (2, 37, 2, 2, 5, 3),
    ] {
        let heads = Heads {
            value_dim,
            ..heads(h, k, d)
        };
        compare(&gpu, heads, &Segments::uniform(b, t), b * t, false);
    }
}

/// Everything that models add, on segments and windows around the size of a tile, with a cache, and
/// with a single token.
#[test]
fn options_and_segments_on_a_gpu() {
    let Some(gpu) = gpu_or_skip() else { return };
    device();
    let plain = heads(6, 2, 64);
    let all = |window| Heads {
        window,
        soft_cap: Some(1.5),
        ..plain
    };
    let lengths: &[usize] = &[31, 1, 32, 33, 2, 0, 64, 5, 5, 5, 100];
    for segments in [
        packed(1, lengths),
        packed(2, &[7, 0, 3, 10]),
        Segments::uniform(1, 1),
    ] {
        compare(&gpu, plain, &segments, segments.tokens(), false);
        for window in [None, Some(1), Some(40)] {
            compare(&gpu, all(window), &segments, segments.tokens(), true);
        }
    }
    for (b, t, s, window) in [
        (1, 1, 130, None),
        (2, 7, 110, Some(40)),
        (1, 66, 131, Some(70)),
    ] {
        compare(&gpu, all(window), &Segments::uniform(b, t), b * s, true);
    }
}

/// Enough rows and heads for the tiles that large devices take.
#[test]
fn large_tiles_on_a_gpu() {
    let Some(gpu) = gpu_or_skip() else { return };
    device();
    let segments = packed(1, &[300, 3, 64, 193]);
    for heads in [heads(16, 16, 64), heads(16, 4, 128)] {
        compare(&gpu, heads, &segments, segments.tokens(), false);
    }
}
