//! [`attention`](fn@crate::kernels::attention) on GPUs: FlashAttention-2 (arXiv 2307.08691), forward
//! and backward, in f32.
//!
//! A cube works on a tile of the scores, rows against blocks of columns, which it computes again
//! wherever they are needed, so that no `[T, T]` matrix is ever held. What a row sees is a range of
//! columns, computed on the host ([`spans`](spans::spans)): segments, window, causality and cache
//! all at once; a tile takes the columns between the first that its first row sees and the last that
//! its last row sees, and never looks at others. Pieces that all passes share stand in `product` (of
//! tiles) and `scores` (what becomes of them in between).
//!
//! Where a model's products may be in bf16 ([`Heads::in_bf16`]) and the device's tensor cores take it,
//! `fragments` stands in for `product`: the same tiles, rounded to bf16 on their way into shared memory,
//! sums in f32.

mod backward;
mod forward;
mod fragments;
#[cfg(feature = "lowering")]
mod lowering;
mod memory;
mod product;
mod results;
mod scores;
mod spans;
mod tile;

use burn::backend::ops::IntTensorOps;
use burn::tensor::TensorData;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::FloatKind;
use cubecl::prelude::*;

#[cfg(feature = "lowering")]
pub(super) use self::lowering::samples;
use self::spans::spans;
use self::tile::Tile;
use super::{UNITS, contiguous, cubes, dims, empty};
use crate::kernels::Segments;
use crate::kernels::attention::{Heads, Saved};

const F32: ElemType = ElemType::Float(FloatKind::F32);
const BF16: ElemType = ElemType::Float(FloatKind::BF16);

/// Output, and the log-sum-exp of each query's scores and sink, `[H, N]`.
pub(super) fn forward(
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    sinks: CubeTensor,
    heads: Heads,
    segments: &Segments,
) -> (CubeTensor, CubeTensor) {
    let ([n, _], [keys, _]) = (dims(&q), dims(&k));
    assert_eq!(n, segments.tokens(), "queries of {segments:?}");
    let [q, k, v] = [q, k, v].map(contiguous);
    let out = empty(&q, [n, heads.out_width()]);
    let lse = empty(&q, [heads.heads, n]);
    if n == 0 {
        return (out, lse);
    }
    let has_sinks = sinks.meta.shape()[0] > 0;
    // A buffer that is not read stands for no sinks: empty ones cannot be bound.
    let sinks = if has_sinks {
        contiguous(sinks)
    } else {
        empty(&q, [1])
    };
    let spans = upload(&q, segments, keys, &heads);
    let client = q.client.clone();
    let (tile, element) = tile_for(&client, &heads, (n, heads.heads));
    // SAFETY: rows end at n or, by the spans, at the number of keys, and heads and vectors at theirs;
    // `visible`, `stage_rows` and `write_rows` keep to that. There is a span for each query and key.
    unsafe {
        forward::forward_kernel::launch_unchecked(
            &client,
            tile.cube_count(n, heads.heads),
            tile.cube_dim(),
            tile.vector,
            q.into_buffer_arg(),
            k.into_buffer_arg(),
            v.into_buffer_arg(),
            sinks.into_buffer_arg(),
            spans.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            lse.clone().into_buffer_arg(),
            n,
            heads.heads,
            heads.kv_heads,
            heads.scale,
            heads.soft_cap.unwrap_or(1.0),
            tile,
            has_sinks,
            element,
        );
    }
    (out, lse)
}

/// Gradients of q, k, v and, when wanted, of the sinks.
pub(super) fn backward(
    saved: Saved<CubeBackend>,
    grad: CubeTensor,
    wants_sinks: bool,
) -> ([CubeTensor; 3], Option<CubeTensor>) {
    let (heads, segments) = (saved.heads, saved.segments);
    let [q, k, v, grad] = [saved.q, saved.k, saved.v, grad].map(contiguous);
    let ([n, _], [keys, _]) = (dims(&q), dims(&k));
    let gradients = [&q, &k, &v].map(|x| empty(x, dims(x)));
    if n == 0 {
        return (gradients, wants_sinks.then(|| empty(&q, [heads.heads])));
    }
    let stats = stats(saved.out, grad.clone(), saved.lse, &heads);
    let d_sinks = wants_sinks.then(|| sink_gradients(stats.clone(), saved.sinks, n));
    let pass = Pass {
        spans: upload(&q, &segments, keys, &heads),
        q,
        k,
        v,
        grad,
        stats,
        heads,
    };
    let [dq, dk, dv] = &gradients;
    pass.queries(dq.clone(), n);
    pass.keys(dk.clone(), dv.clone(), (n, keys));
    (gradients, d_sinks)
}

/// What both backward kernels read.
struct Pass {
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    grad: CubeTensor,
    stats: CubeTensor,
    spans: CubeTensor,
    heads: Heads,
}

impl Pass {
    fn queries(&self, dq: CubeTensor, n: usize) {
        let (client, heads) = (self.q.client.clone(), &self.heads);
        let (tile, element) = tile_for(&client, heads, (n, heads.heads));
        // SAFETY: as in `forward`; stats have a place for each row of each head.
        unsafe {
            backward::queries_kernel::launch_unchecked(
                &client,
                tile.cube_count(n, heads.heads),
                tile.cube_dim(),
                tile.vector,
                self.q.clone().into_buffer_arg(),
                self.k.clone().into_buffer_arg(),
                self.v.clone().into_buffer_arg(),
                self.grad.clone().into_buffer_arg(),
                self.stats.clone().into_buffer_arg(),
                self.spans.clone().into_buffer_arg(),
                dq.into_buffer_arg(),
                n,
                heads.heads,
                heads.kv_heads,
                heads.scale,
                heads.soft_cap.unwrap_or(1.0),
                tile,
                element,
            );
        }
    }

    fn keys(&self, dk: CubeTensor, dv: CubeTensor, (n, keys): (usize, usize)) {
        let (client, heads) = (self.q.client.clone(), &self.heads);
        let (tile, element) = tile_for(&client, heads, (keys, heads.kv_heads));
        // SAFETY: as above, with keys for rows and queries for columns.
        unsafe {
            backward::keys_kernel::launch_unchecked(
                &client,
                tile.cube_count(keys, heads.kv_heads),
                tile.cube_dim(),
                tile.vector,
                self.q.clone().into_buffer_arg(),
                self.k.clone().into_buffer_arg(),
                self.v.clone().into_buffer_arg(),
                self.grad.clone().into_buffer_arg(),
                self.stats.clone().into_buffer_arg(),
                self.spans.clone().into_buffer_arg(),
                dk.into_buffer_arg(),
                dv.into_buffer_arg(),
                n,
                keys,
                heads.heads,
                heads.kv_heads,
                heads.scale,
                heads.soft_cap.unwrap_or(1.0),
                tile,
                element,
            );
        }
    }
}

/// The tile for so many rows in each of so many heads, and what is multiplied.
fn tile_for(client: &Client, heads: &Heads, rows: (usize, usize)) -> (Tile, ElemType) {
    let properties = client.properties();
    let side = fragment(properties, heads);
    let tile = Tile::new(&properties.hardware, heads, rows, side);
    (tile, if side > 0 { BF16 } else { F32 })
}

/// Rows and columns of the bf16 fragments that a device's tensor cores multiply, 0 if they do not, or
/// the heads do not fit them or must not be rounded.
fn fragment(properties: &DeviceProperties, heads: &Heads) -> usize {
    let hardware = &properties.hardware;
    let fits = |dim: usize| dim.is_multiple_of(16) && dim <= tile::WIDEST_IN_FRAGMENTS;
    let is_possible = heads.in_bf16
        && fits(heads.head_dim)
        && fits(heads.value_dim)
        && hardware.plane_size_min == hardware.plane_size_max
        && hardware.max_units_per_cube >= 256
        && hardware.max_shared_memory_size >= tile::FRAGMENT_TILE_BYTES;
    let has = |side: u32| {
        let configs = &mut properties.features.matmul.cmma.iter();
        configs.any(|config| {
            (config.a_type, config.b_type, config.cd_type) == (BF16, BF16, F32)
                && [config.m, config.n, config.k] == [side; 3]
        })
    };
    match [16, 8].into_iter().find(|side| has(*side)) {
        Some(side) if is_possible => side as usize,
        _ => 0,
    }
}

/// Log-sum-exp and `Σ o g` of each row, `[2, H, N]`.
fn stats(out: CubeTensor, grad: CubeTensor, lse: CubeTensor, heads: &Heads) -> CubeTensor {
    let [n, _] = dims(&grad);
    let stats = empty(&grad, [2, heads.heads, n]);
    let client = stats.client.clone();
    let vector = if heads.value_dim.is_multiple_of(4) {
        4
    } else {
        1
    };
    let units = UNITS as usize;
    // SAFETY: items end at N · H and vectors at Dv, the sizes of out, grad, lse and stats.
    unsafe {
        backward::stats_kernel::launch_unchecked(
            &client,
            cubes((n * heads.heads).div_ceil(units / backward::LANES)),
            CubeDim::new_1d(UNITS),
            vector,
            contiguous(out).into_buffer_arg(),
            grad.into_buffer_arg(),
            contiguous(lse).into_buffer_arg(),
            stats.clone().into_buffer_arg(),
            n,
            heads.heads,
            heads.value_dim / vector,
            units,
        );
    }
    stats
}

fn sink_gradients(stats: CubeTensor, sinks: CubeTensor, n: usize) -> CubeTensor {
    let heads = sinks.meta.shape()[0];
    let d_sinks = empty(&stats, [heads]);
    let client = stats.client.clone();
    // SAFETY: heads end at the number of cubes, rows at n, as stats and sinks do.
    unsafe {
        backward::sinks_kernel::launch_unchecked(
            &client,
            CubeCount::Static(heads as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            stats.into_buffer_arg(),
            contiguous(sinks).into_buffer_arg(),
            d_sinks.clone().into_buffer_arg(),
            n,
            heads,
            UNITS,
        );
    }
    d_sinks
}

/// The spans of all rows, on the device of `like`.
fn upload(like: &CubeTensor, segments: &Segments, keys: usize, heads: &Heads) -> CubeTensor {
    let spans = spans(segments, keys, heads.window);
    let len = spans.len();
    CubeBackend::int_from_data(TensorData::new(spans, [len]), &like.device)
}
