//! [`linear_cross_entropy`](fn@crate::kernels::linear_cross_entropy) on GPUs: labelled rows in chunks, as
//! on the CPU, so that logits `[N, V]` never exist; one cube turns a row of logits into their gradient.

use burn::backend::TensorMetadata;
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::tensor::IndexingUpdateOp;
use burn::tensor::{Shape, TensorData};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::packed::Packed;
use super::product::{Low, Product};
use super::tiles::Side;
use super::{contiguous, cube_sum, cubes, dims, empty, zeros};
use crate::kernels::LogitShape;
use crate::kernels::cross_entropy::{LossAndGradients, PARTS, Parts, labelled_rows};

/// Logits held at once: 64 MiB, so that a chunk of the largest vocabularies still has 64 rows and more; few
/// in unit tests, so that they take several chunks.
const CHUNK_LOGITS: usize = if cfg!(test) { 1 << 13 } else { 16 << 20 };
/// Units that work on one row together.
const UNITS: u32 = 256;
/// Below all logits.
const LEAST: f32 = f32::MIN;

/// What becomes of logits, as in [`LogitShape`].
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Shaping {
    scale: f32,
    /// Not 0 where there is none.
    cap: f32,
}

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Spec {
    has_bias: bool,
    has_cap: bool,
    wants_gradient: bool,
}

/// A logit from a product.
#[cube]
fn logit(
    product: f32,
    bias: &[f32],
    column: usize,
    shaping: &Shaping,
    #[comptime] spec: Spec,
) -> f32 {
    let mut logit = product;
    if comptime!(spec.has_bias) {
        logit += bias[column];
    }
    logit *= shaping.scale;
    if comptime!(spec.has_cap) {
        logit = shaping.cap * (logit / shaping.cap).tanh();
    }
    logit
}

/// The largest value of a cube's units, for each of them.
#[cube]
fn cube_max(value: f32, memory: &mut Shared<[f32]>, #[comptime] units: u32) -> f32 {
    let unit = UNIT_POS_X as usize;
    memory[unit] = value;
    sync_cube();
    let mut half = comptime!((units / 2) as usize).runtime();
    while half > 0 {
        if unit < half {
            let other = memory[unit + half];
            if other > memory[unit] {
                memory[unit] = other;
            }
        }
        sync_cube();
        half /= 2;
    }
    let largest = memory[0];
    // Nobody may overwrite it before all have read it.
    sync_cube();
    largest
}

/// The loss of each row of products, which become its gradient: `(softmax(z) - onehot) dz/dproduct`.
///
/// # Shapes
/// products `[rows, V]`; targets and losses from `first` on
#[cube(launch_unchecked, create_dummy_kernel)]
#[expect(clippy::too_many_arguments, reason = "kernels have no other way")]
pub(crate) fn softmax_kernel(
    products: &mut [f32],
    bias: &[f32],
    targets: &[i32],
    losses: &mut [f32],
    rows: usize,
    v: usize,
    first: usize,
    shaping: &Shaping,
    #[comptime] units: u32,
    #[comptime] spec: Spec,
) {
    let mut memory = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let row = CUBE_POS;
    if row < rows {
        let start = row * v;
        let target = targets[first + row] as usize;
        let wanted = logit(products[start + target], bias, target, shaping, spec);
        // The sum of exponentials, relative to the largest so far.
        let mut largest = f32::new(LEAST);
        let mut sum = 0.0f32;
        let mut i = UNIT_POS_X as usize;
        while i < v {
            let z = logit(products[start + i], bias, i, shaping, spec);
            if z > largest {
                sum = sum * (largest - z).exp() + 1.0f32;
                largest = z;
            } else {
                sum += (z - largest).exp();
            }
            i += comptime!(units as usize);
        }
        let most = cube_max(largest, &mut memory, units);
        let sum = cube_sum(sum * (largest - most).exp(), &mut memory, units);
        if UNIT_POS_X == 0 {
            losses[first + row] = most + sum.ln() - wanted;
        }
        if comptime!(spec.wants_gradient) {
            let mut i = UNIT_POS_X as usize;
            while i < v {
                let z = logit(products[start + i], bias, i, shaping, spec);
                let mut gradient = (z - most).exp() / sum;
                if i == target {
                    gradient -= 1.0f32;
                }
                if comptime!(spec.has_cap) {
                    let t = z / shaping.cap;
                    gradient *= 1.0f32 - t * t;
                }
                products[start + i] = gradient * shaping.scale;
                i += comptime!(units as usize);
            }
        }
    }
}

/// What all chunks share.
struct Sweep {
    hidden: CubeTensor,
    head: Packed,
    low: CubeTensor,
    /// A delta's B, and its rank.
    up: Option<(Packed, usize)>,
    bias: Option<CubeTensor>,
    /// Of the labelled rows.
    targets: CubeTensor,
    losses: CubeTensor,
    shape: LogitShape,
    wants: [bool; PARTS],
}

/// The summed loss and the gradients that are wanted.
pub(super) fn forward(
    parts: Parts<CubeBackend>,
    targets: &[i32],
    shape: LogitShape,
    wants: [bool; PARTS],
) -> LossAndGradients<CubeBackend> {
    let mut gradients: [Option<CubeTensor>; PARTS] = std::array::from_fn(|i| {
        wants[i].then(|| {
            CubeBackend::float_reshape(
                zeros(&parts[i], [parts[i].shape().num_elements()]),
                parts[i].shape(),
            )
        })
    });
    let labelled = labelled_rows(targets);
    let like = parts[0].clone();
    if labelled.is_empty() {
        let loss = zeros(&like, [1]);
        return LossAndGradients { loss, gradients };
    }
    let sweep = Sweep::new(parts, &labelled, targets, shape, wants);
    let v = sweep.head.rows;
    let chunk = (CHUNK_LOGITS / v).clamp(1, labelled.len());
    for (i, rows) in labelled.chunks(chunk).enumerate() {
        sweep.chunk(i * chunk, rows, &mut gradients);
    }
    let loss = CubeBackend::float_sum(sweep.losses);
    LossAndGradients { loss, gradients }
}

impl Sweep {
    fn new(
        parts: Parts<CubeBackend>,
        labelled: &[usize],
        targets: &[i32],
        shape: LogitShape,
        wants: [bool; PARTS],
    ) -> Self {
        let [hidden, weight, low, up, bias] = parts;
        let ([_, d], [_, rank], [biases]) = (dims(&hidden), dims(&up), bias.shape().dims());
        let wanted: Vec<i32> = labelled.iter().map(|&row| targets[row]).collect();
        Self {
            head: Packed::dense(weight, d),
            up: (rank > 0).then(|| (Packed::dense(up, rank), rank)),
            bias: (biases > 0).then(|| contiguous(bias)),
            targets: ints(wanted, &hidden),
            losses: empty(&hidden, [labelled.len()]),
            hidden,
            low,
            shape,
            wants,
        }
    }

    /// The losses of labelled rows from `first` on, and what they add to the gradients.
    fn chunk(&self, first: usize, rows: &[usize], gradients: &mut [Option<CubeTensor>; PARTS]) {
        let (m, v, d) = (rows.len(), self.head.rows, self.head.cols);
        let at = ints(rows.iter().map(|&row| row as i32).collect(), &self.hidden);
        let take = |x: &CubeTensor| contiguous(CubeBackend::float_select(x.clone(), 0, at.clone()));
        let hidden = take(&self.hidden); // [m, D]
        let low = self.up.as_ref().map(|_| take(&self.low)); // [m, R]
        let logits = empty(&hidden, [m, v]);
        let delta = self.up.as_ref().zip(low.as_ref());
        let product = Product {
            low: delta.map(|((up, rank), low)| Low {
                low,
                up,
                up_first: 0,
                rank: *rank,
                scale: 1.0,
            }),
            ..Product::new(&hidden, &self.head, Side::Transposed)
        };
        product.write(&logits, 0, [m, v, d]);
        self.losses(&logits, first);
        // `logits` now holds the gradient of the products.
        let [d_hidden, d_weight, d_low, d_up, d_bias] = gradients;
        // [v, m] [m, width]
        let of_rows = |sum: &CubeTensor, x: &CubeTensor| {
            let width = dims(x)[1];
            let x = Packed::dense(x.clone(), width);
            let product = Product {
                x_transposed: true,
                onto: true,
                ..Product::new(&logits, &x, Side::Plain)
            };
            product.write(sum, 0, [v, width, m]);
        };
        if let Some(sum) = d_weight {
            of_rows(sum, &hidden);
        }
        if let (Some(sum), Some(low)) = (d_up, &low) {
            of_rows(sum, low);
        }
        if let Some(sum) = d_bias.take() {
            let added = CubeBackend::float_sum_dim(logits.clone(), 0);
            let added = CubeBackend::float_reshape(added, Shape::new([v]));
            *d_bias = Some(CubeBackend::float_add(sum, added));
        }
        // [m, v] [v, width], to the rows that were taken
        let put = |all: &mut Option<CubeTensor>, matrix: &Packed| {
            if let Some(sum) = all.take() {
                let product = empty(&logits, [m, matrix.cols]);
                Product::new(&logits, matrix, Side::Plain).write(&product, 0, [m, matrix.cols, v]);
                let add = IndexingUpdateOp::Add;
                let at = at.clone();
                *all = Some(CubeBackend::float_select_assign(sum, 0, at, product, add));
            }
        };
        put(d_hidden, &self.head);
        if let Some((up, _)) = &self.up {
            put(d_low, up);
        }
    }

    /// Losses of a chunk of products, which become their gradient if any is wanted.
    fn losses(&self, products: &CubeTensor, first: usize) {
        let [rows, v] = dims(products);
        let spec = Spec {
            has_bias: self.bias.is_some(),
            has_cap: self.shape.soft_cap.is_some(),
            wants_gradient: self.wants.contains(&true),
        };
        let shaping = ShapingLaunch::new(self.shape.scale, self.shape.soft_cap.unwrap_or(1.0));
        // Without a bias the kernel does not read it.
        let bias = self.bias.as_ref().unwrap_or(&self.hidden).clone();
        let client = products.client.clone();
        // SAFETY: rows and columns end at those of the products, of which there are at most as many as
        // targets and losses from `first` on; targets are below V.
        unsafe {
            softmax_kernel::launch_unchecked(
                &client,
                cubes(rows),
                CubeDim::new_1d(UNITS),
                products.clone().into_buffer_arg(),
                bias.into_buffer_arg(),
                self.targets.clone().into_buffer_arg(),
                self.losses.clone().into_buffer_arg(),
                rows,
                v,
                first,
                shaping,
                UNITS,
                spec,
            );
        }
    }
}

/// Integers on the device of `like`.
fn ints(values: Vec<i32>, like: &CubeTensor) -> CubeTensor {
    let n = values.len();
    CubeBackend::int_from_data(TensorData::new(values, [n]), &like.device)
}

/// With all that may become of logits, or nothing.
#[cfg(feature = "lowering")]
pub(super) fn sample(to: &super::lowering::Target, has: bool) -> impl CubeKernel + 'static {
    let (rows, v) = (128, 128_256);
    let spec = Spec {
        has_bias: has,
        has_cap: has,
        wants_gradient: true,
    };
    softmax_kernel::create_dummy_kernel(
        to.properties.clone(),
        to.target.clone(),
        cubes(rows),
        CubeDim::new_1d(UNITS),
        (to.buffer)(rows * v),
        (to.buffer)(v),
        (to.buffer)(rows),
        (to.buffer)(rows),
        rows,
        v,
        0,
        ShapingLaunch::new(1.0, 30.0),
        UNITS,
        spec,
    )
}
