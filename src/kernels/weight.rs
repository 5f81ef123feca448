//! The matrix of a linear layer, dense or in fewer bits.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

use super::in_f32;
use crate::quant::QuantMatrix;

/// W, `[out, in]`.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "a tensor is of that size wherever it is"
)]
pub enum Weight {
    /// f32, or bf16 or f16 where it is frozen.
    Dense(Tensor<2>),
    /// Frozen, in host memory whatever the device. The CPU's kernels dequantise blocks of it that fit
    /// the cache; plain operations, which other devices have, all of it at each use.
    Quantised(Arc<QuantWeight>),
}

/// A quantised matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantWeight {
    /// Its values.
    pub matrix: QuantMatrix,
    /// Whether the CPU may multiply it in bf16, both factors rounded, where it can.
    pub in_bf16: bool,
}

/// What a fused operation takes beside a weight's tensor, which is empty where this is the weight.
pub type Quantised = Option<Arc<QuantWeight>>;

impl From<Tensor<2>> for Weight {
    fn from(weight: Tensor<2>) -> Self {
        Self::Dense(weight)
    }
}

impl Weight {
    /// `[out, in]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Quantised(weight) => weight.matrix.shape(),
        }
    }

    /// Whether it belongs to the backend that tracks, as all that trains does.
    pub fn is_autodiff(&self) -> bool {
        match self {
            Self::Dense(weight) => weight.is_autodiff(),
            Self::Quantised(_) => false,
        }
    }

    /// All of it in f32; a copy unless it is that already.
    pub fn in_f32(&self, device: &Device) -> Tensor<2> {
        match self {
            Self::Dense(weight) => in_f32(weight.clone()),
            Self::Quantised(weight) => {
                let matrix = &weight.matrix;
                let data = TensorData::new(matrix.dequantised(), matrix.shape());
                Tensor::from_data(data, &device.clone().inner())
            }
        }
    }

    /// As fused operations take it.
    pub(super) fn into_parts(self, device: &Device) -> (Tensor<2>, Quantised) {
        match self {
            Self::Dense(weight) => (weight, None),
            Self::Quantised(weight) => {
                let none = Tensor::empty([0, 0], &device.clone().inner());
                (none, Some(weight))
            }
        }
    }
}
