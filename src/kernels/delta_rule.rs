//! The gated delta rule: linear attention that forgets and corrects itself (Gated DeltaNet,
//! arXiv 2412.06464).
//!
//! Each value head keeps a state S, `[Dk, Dv]`, zero where a segment starts. With q and k scaled to
//! unit length, token t does
//!
//! ```text
//! S ← exp(g) S                  forgets, g ≤ 0
//! S ← S + k ⊗ β (v - Sᵀ k)      writes what S does not yet answer to k
//! o = Sᵀ q / √Dk                reads
//! ```
//!
//! Here it runs in chunks of C ≤ 64 tokens (arXiv 2406.06484). What the tokens of a chunk write, U,
//! solves a unit lower triangular system, set up for all chunks at once; only the state walks from
//! chunk to chunk. With G the running sum of g in the chunk:
//!
//! ```text
//! L_ij = β_i exp(G_i - G_j) k_i·k_j                 j < i
//! U = (I + L)⁻¹ (β V - β exp(G) K S)
//! O = (exp(G) Q S + P U) / √Dk                      P_ij = exp(G_i - G_j) q_i·k_j, j ≤ i
//! S ← exp(G_C) S + (exp(G_C - G) K)ᵀ U
//! ```
//!
//! No exponent is ever positive. Every device runs these plain tensor operations, and automatic
//! differentiation gives the backward pass.

use burn::tensor::{Device, Tensor, TensorData};

use super::chunks::Chunks;
use super::{Segments, rms_norm};

/// Most tokens of a chunk, as in transformers.
const CHUNK: usize = 64;

/// Added to the squared length of q and k, as in transformers.
const LENGTH_EPS: f64 = 1e-6;

/// How the columns of q, k and v divide into heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaHeads {
    /// Hk, heads of q and k; divides Hv. Value head h works with key head `h / (Hv / Hk)`.
    pub key_heads: usize,
    /// Hv, heads of v.
    pub value_heads: usize,
    /// Dk, width of a head of q and k.
    pub key_dim: usize,
    /// Dv, width of a head of v.
    pub value_dim: usize,
}

impl DeltaHeads {
    /// Columns of q and of k: Hk · Dk.
    pub fn key_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Columns of v: Hv · Dv.
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }
}

/// What the gated delta rule works on.
#[derive(Debug, Clone)]
pub struct DeltaInputs {
    /// Queries; their length does not count. `[N, Hk · Dk]`
    pub q: Tensor<2>,
    /// Keys; their length does not count. `[N, Hk · Dk]`
    pub k: Tensor<2>,
    /// Values. `[N, Hv · Dv]`
    pub v: Tensor<2>,
    /// g, the logarithm of the share of the state that is kept; not positive. `[N, Hv]`
    pub log_decay: Tensor<2>,
    /// β, the share of a correction that is written, from 0 to 1. `[N, Hv]`
    pub beta: Tensor<2>,
}

/// The gated delta rule over each of the segments.
///
/// # Shapes
/// See [`DeltaInputs`] → `[N, Hv · Dv]`
pub fn delta_rule(inputs: DeltaInputs, heads: DeltaHeads, segments: &Segments) -> Tensor<2> {
    let chunks = Chunks::new(segments, CHUNK, &inputs.q.device());
    let (out, _) = Parts::new(inputs, heads, &chunks).scan(chunks.steps(), None, false);
    to_rows(out, &chunks)
}

/// [`delta_rule`] that goes on from a state and returns the one it ends with, for generation.
///
/// # Shapes
/// state `[B, Hv, Dk, Dv]`, see [`DeltaInputs`] → `[N, Hv · Dv]` and the state
///
/// # Panics
/// If the segments differ in length.
pub fn delta_rule_from(
    state: Option<Tensor<4>>,
    inputs: DeltaInputs,
    heads: DeltaHeads,
    segments: &Segments,
) -> (Tensor<2>, Tensor<4>) {
    let chunks = Chunks::new(segments, CHUNK, &inputs.q.device());
    assert!(chunks.is_uniform(), "a state for {segments:?}");
    let (out, state) = Parts::new(inputs, heads, &chunks).scan(chunks.steps(), state, true);
    (to_rows(out, &chunks), state.expect("asked for"))
}

/// What is known of the n chunks before any state is.
struct Parts {
    /// `(I + L)⁻¹ β V`, what is written where the state is zero. `[n, Hv, C, Dv]`
    fresh: Tensor<4>,
    /// `(I + L)⁻¹ β exp(G) K`, with which the state says what of it not to write. `[n, Hv, C, Dk]`
    known: Tensor<4>,
    /// `exp(G) Q / √Dk`, with which the state is read. `[n, Hv, C, Dk]`
    reads: Tensor<4>,
    /// `P / √Dk`, with which tokens read what those of their chunk write. `[n, Hv, C, C]`
    within: Tensor<4>,
    /// `exp(G_C - G) K`, under which is written. `[n, Hv, C, Dk]`
    writes: Tensor<4>,
    /// `exp(G_C)`, what a chunk keeps of the state. `[n, Hv, 1, 1]`
    kept: Tensor<4>,
}

impl Parts {
    fn new(inputs: DeltaInputs, heads: DeltaHeads, chunks: &Chunks) -> Self {
        let scale = (heads.key_dim as f64).powf(-0.5);
        let per_key_head = |x| into_heads(chunks.fill(x), heads.key_heads);
        let q = per_key_head(of_length(inputs.q, scale, heads)); // [n, Hk, C, Dk]
        let k = per_key_head(of_length(inputs.k, 1.0, heads)); // [n, Hk, C, Dk]
        let v = into_heads(chunks.fill(inputs.v), heads.value_heads); // [n, Hv, C, Dv]
        // Slots without a row neither forget nor write.
        let beta = into_heads(chunks.fill_zeroed(inputs.beta), heads.value_heads); // [n, Hv, C, 1]
        let sums = chunks.fill_zeroed(inputs.log_decay).cumsum(1); // [n, C, Hv]
        let sums = into_heads(sums, heads.value_heads); // [n, Hv, C, 1]

        let c = sums.dims()[2];
        let last = sums.clone().narrow(2, c - 1, 1); // [n, Hv, 1, 1]
        // Finite instead of -inf: some devices turn inf - inf into NaN in the backward pass.
        let hidden = table(c, &sums.device(), |i, j| if j > i { -1e30 } else { 0.0 });
        let decay = (sums.clone() - sums.clone().swap_dims(2, 3) + hidden).exp(); // [n, Hv, C, C]
        let keys = k.clone().swap_dims(2, 3); // [n, Hk, Dk, C]
        let similar = k.clone().matmul(keys.clone()); // [n, Hk, C, C]
        let system = scaled(similar, decay.clone() * beta.clone());
        let inverse = unit_lower_inverse(system); // [n, Hv, C, C]
        let since_start = sums.clone().exp(); // [n, Hv, C, 1]
        let remembered = scaled(k.clone(), beta.clone() * since_start.clone());
        Self {
            fresh: inverse.clone().matmul(v * beta),
            known: inverse.matmul(remembered),
            within: scaled(q.clone().matmul(keys), decay),
            reads: scaled(q, since_start),
            writes: scaled(k, (last.clone() - sums).exp()),
            kept: last.exp(),
        }
    }

    /// Walks through the chunks of all segments side by side.
    ///
    /// # Shapes
    /// state `[S, Hv, Dk, Dv]` → `[n, Hv, C, Dv]` and the last state
    fn scan(
        self,
        steps: &[usize],
        mut state: Option<Tensor<4>>,
        wants_state: bool,
    ) -> (Tensor<4>, Option<Tensor<4>>) {
        let [fresh, known, reads, writes, kept] =
            [self.fresh, self.known, self.reads, self.writes, self.kept]
                .map(|part| cut(part, steps).into_iter());
        let (mut written, mut read) = (Vec::new(), Vec::new());
        let parts = fresh.zip(known).zip(reads).zip(writes).zip(kept);
        for (i, ((((fresh, known), reads), writes), kept)) in parts.enumerate() {
            let (new, old) = match &state {
                Some(state) => (
                    fresh - known.matmul(state.clone()),
                    reads.matmul(state.clone()),
                ),
                None => (fresh.clone(), fresh.zeros_like()),
            }; // [m, Hv, C, Dv]
            // Segments that end here need no state any more.
            let going_on = steps.get(i + 1).or(wants_state.then_some(&steps[i]));
            state = going_on.map(|&m| {
                let added = first(writes, m)
                    .swap_dims(2, 3)
                    .matmul(first(new.clone(), m)); // [m, Hv, Dk, Dv]
                match state.take() {
                    Some(state) => first(state, m) * first(kept, m) + added,
                    None => added,
                }
            });
            written.push(new);
            read.push(old);
        }
        let within = self.within.matmul(Tensor::cat(written, 0));
        (within + Tensor::cat(read, 0), state)
    }
}

/// Scales each head's row of q or k to a length.
///
/// # Shapes
/// `[N, Hk · Dk]` → `[N, Hk · Dk]`
fn of_length(x: Tensor<2>, length: f64, heads: DeltaHeads) -> Tensor<2> {
    let ([n, width], dk) = (x.dims(), heads.key_dim);
    // x / √(Σx² + ε) is a root-mean-square norm whose ε is a mean too.
    let weight = length * (dk as f64).powf(-0.5);
    let weight = Tensor::full([dk], weight, &x.device().inner());
    let x = x.reshape([n * heads.key_heads, dk]);
    rms_norm(x, weight, LENGTH_EPS / dk as f64).reshape([n, width])
}

/// `[n, C, H · d]` → `[n, H, C, d]`
fn into_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [n, c, width] = x.dims();
    x.reshape([n, c, heads, width / heads]).swap_dims(1, 2)
}

/// `[n, Hv, C, Dv]` → `[N, Hv · Dv]`
fn to_rows(x: Tensor<4>, chunks: &Chunks) -> Tensor<2> {
    let [n, heads, c, d] = x.dims();
    chunks.rows(x.swap_dims(1, 2).reshape([n, c, heads * d]))
}

/// What belongs to each key head times the factors of the value heads that work with it.
///
/// # Shapes
/// x `[n, Hk, C, X]`, factors `[n, Hv, C, X or 1]` → `[n, Hv, C, X]`
fn scaled(x: Tensor<4>, factors: Tensor<4>) -> Tensor<4> {
    let ([n, key_heads, c, width], [_, heads, _, columns]) = (x.dims(), factors.dims());
    if heads == key_heads {
        return x * factors;
    }
    let factors = factors.reshape([n, key_heads, heads / key_heads, c, columns]);
    (x.unsqueeze_dim::<5>(2) * factors).reshape([n, heads, c, width])
}

/// A constant of all chunks and heads, `[1, 1, C, C]`.
fn table(c: usize, device: &Device, value: impl Fn(usize, usize) -> f32) -> Tensor<4> {
    let values: Vec<f32> = (0..c * c).map(|i| value(i / c, i % c)).collect();
    Tensor::from_data(TensorData::new(values, [1, 1, c, c]), device)
}

/// `(I + L)⁻¹`, where L is what x has below the diagonal; C is a power of 2.
///
/// The inverses of two diagonal blocks, A and B, give that of the block around them: below the
/// diagonal `-B⁻¹ L A⁻¹`. So blocks of twice the size come out of two products, from 1 up to C.
/// The series of powers of L would take as many products, but its terms grow like binomial
/// coefficients where keys repeat, and f32 loses the sum.
///
/// # Shapes
/// `[n, H, C, C]` → `[n, H, C, C]`
fn unit_lower_inverse(x: Tensor<4>) -> Tensor<4> {
    let c = x.dims()[3];
    let tracked = x.is_autodiff();
    let values = if tracked {
        x.clone().inner()
    } else {
        x.clone()
    };
    let device = values.device();
    let below = |size: usize| {
        // The lower left blocks of those of twice the size.
        let inside = move |i: usize, j: usize| i / size == j / size + 1 && i / size % 2 == 1;
        values.clone() * table(c, &device, move |i, j| f32::from(inside(i, j)))
    };
    let mut inverse = table(c, &device, |i, j| f32::from(i == j)).expand(x.dims());
    let mut size = 1;
    while size < c {
        let corner = if size == 1 {
            below(size)
        } else {
            inverse.clone().matmul(below(size)).matmul(inverse.clone())
        };
        inverse = inverse - corner;
        size *= 2;
    }
    if !tracked {
        return inverse;
    }
    // The same value, and the derivative of an inverse, -X dL X, in place of that of all products.
    let change = (x - values) * table(c, &device, |i, j| f32::from(j < i));
    inverse.clone() - inverse.clone().matmul(change).matmul(inverse)
}

/// Cuts the first dimension into pieces of these sizes.
///
/// Halves are cut again: the backward pass of a cut fills a tensor as large as what was cut, and so
/// takes O(n log n) instead of O(n²).
fn cut(x: Tensor<4>, sizes: &[usize]) -> Vec<Tensor<4>> {
    if sizes.len() <= 1 {
        return vec![x];
    }
    let (left, right) = sizes.split_at(sizes.len() / 2);
    let (middle, n) = (left.iter().sum(), x.dims()[0]);
    let mut pieces = cut(x.clone().narrow(0, 0, middle), left);
    pieces.extend(cut(x.narrow(0, middle, n - middle), right));
    pieces
}

/// The first `m` of the first dimension.
fn first(x: Tensor<4>, m: usize) -> Tensor<4> {
    if x.dims()[0] == m {
        x
    } else {
        x.narrow(0, 0, m)
    }
}
