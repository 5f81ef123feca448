//! The matrix of a linear layer, dense or in fewer bits.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
#[cfg(feature = "gpu")]
use burn_cubecl::tensor::CubeTensor;

#[cfg(feature = "gpu")]
use super::cube::Packed;
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
    /// Frozen. Kernels dequantise parts of it that fit their cache, plain operations all of it at each
    /// use.
    Quantised(Arc<QuantWeight>),
}

/// A quantised matrix, in the memory of the device that multiplies it.
#[derive(Debug, Clone)]
pub struct QuantWeight {
    pub(super) values: Place,
    /// Whether it may be multiplied in bf16, both factors rounded, where the device can.
    pub in_bf16: bool,
}

/// Where a quantised matrix is.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// In host memory: that of the CPU, and on GPUs that of what no kernel reads there.
    Host(QuantMatrix),
    /// In a GPU's memory.
    #[cfg(feature = "gpu")]
    Device(Box<Packed>),
}

impl QuantWeight {
    /// For the kernels of a device. What a GPU can multiply as it is goes into its memory and leaves the
    /// host's; GGUF's blocks stay, and are dequantised and sent at each use.
    pub fn new(matrix: QuantMatrix, in_bf16: bool, device: &Device) -> Self {
        #[cfg(feature = "gpu")]
        if let Some(packed) = Packed::send(&matrix, in_bf16, device) {
            let values = Place::Device(Box::new(packed));
            return Self { values, in_bf16 };
        }
        #[cfg(not(feature = "gpu"))]
        let _ = device;
        let values = Place::Host(matrix);
        Self { values, in_bf16 }
    }

    /// `[out, in]`
    pub fn shape(&self) -> [usize; 2] {
        match &self.values {
            Place::Host(matrix) => matrix.shape(),
            #[cfg(feature = "gpu")]
            Place::Device(packed) => packed.shape(),
        }
    }

    /// Bytes that it takes of the memory where it is; none where it lies in a mapped file.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Place::Host(matrix) => matrix.bytes(),
            #[cfg(feature = "gpu")]
            Place::Device(packed) => packed.bytes(),
        }
    }

    /// For the CPU's kernels.
    ///
    /// # Panics
    /// When it is in a GPU's memory.
    pub(super) fn on_host(&self) -> &QuantMatrix {
        match &self.values {
            Place::Host(matrix) => matrix,
            #[cfg(feature = "gpu")]
            Place::Device(_) => unreachable!("the CPU multiplies weights that were loaded for it"),
        }
    }

    /// For the kernels of a GPU, where `like` is. What is not there is dequantised and sent.
    #[cfg(feature = "gpu")]
    pub(super) fn on_device(&self, like: &CubeTensor) -> Packed {
        match &self.values {
            Place::Host(matrix) => Packed::dequantised(matrix, self.in_bf16, like),
            Place::Device(packed) => Packed::clone(packed),
        }
    }

    /// All of it in f32, on a device.
    fn in_f32(&self, device: &Device) -> Tensor<2> {
        match &self.values {
            Place::Host(matrix) => {
                let data = TensorData::new(matrix.dequantised(), matrix.shape());
                Tensor::from_data(data, &device.clone().inner())
            }
            #[cfg(feature = "gpu")]
            Place::Device(packed) => packed.in_f32(),
        }
    }
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
            Self::Quantised(weight) => weight.shape(),
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
            Self::Quantised(weight) => weight.in_f32(device),
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
