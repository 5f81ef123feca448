//! Dropout on an adapter's input, from counter-based random numbers.

use burn::tensor::Tensor;

use crate::kernels::{self, DropMask};
use crate::random::Stream;

/// The random numbers of one forward pass; the same key draws the same mask again, which resume
/// and recompute rely on.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    stream: Stream,
}

impl Dropout {
    /// The masks of one micro-batch.
    pub fn new(seed: u64, step: usize, micro_batch: usize) -> Self {
        let stream = Stream::new(seed)
            .split(0xD0)
            .split(step as u64)
            .split(micro_batch as u64);
        Self { stream }
    }

    /// Zeroes each element with probability `p` and scales the others by `1 / (1 - p)`.
    ///
    /// `module` tells apart the layers of a model.
    pub fn apply(self, x: Tensor<2>, p: f64, module: u64) -> Tensor<2> {
        kernels::dropout(x, DropMask::new(self.stream.split(module), p))
    }
}
