//! What AdamW remembers of one tensor, whole or in 8 bits, and a step with it.

use burn::tensor::{Device, Tensor, TensorData};

use super::moments_8bit::Moments8;
use crate::device::to_vec;
use crate::kernels::{AdamwStep, adamw};

/// The moments of one tensor.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "a tensor is of that size wherever it is"
)]
pub enum Moments {
    /// In f32, flat, where the tensor is.
    Whole {
        /// Mean of gradients.
        first: Tensor<1>,
        /// Mean of squared gradients.
        second: Tensor<1>,
    },
    /// In 8 bits, in host memory.
    EightBit(Moments8),
}

impl Moments {
    /// Those of `n` numbers before the first step.
    pub fn zeros(n: usize, in_8_bits: bool, device: &Device) -> Self {
        match in_8_bits {
            true => Self::EightBit(Moments8::zeros(n)),
            false => Self::Whole {
                first: Tensor::zeros([n], device),
                second: Tensor::zeros([n], device),
            },
        }
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Whole { first, second } => 4 * (first.dims()[0] + second.dims()[0]),
            Self::EightBit(moments) => moments.bytes(),
        }
    }

    /// Takes a step; returns the new values. What it is given is changed in place where nobody else has
    /// it.
    ///
    /// # Shapes
    /// values, gradient and moments `[n]`
    pub fn step(&mut self, values: Tensor<1>, gradient: Tensor<1>, step: AdamwStep) -> Tensor<1> {
        let device = values.device();
        match self {
            Self::EightBit(moments) => {
                let (mut values, gradient) = (to_vec(values), to_vec(gradient));
                moments.step(&mut values, &gradient, step);
                let n = values.len();
                Tensor::from_data(TensorData::new(values, [n]), &device)
            }
            Self::Whole { first, second } => {
                let taken = [&mut *first, &mut *second]
                    .map(|moment| std::mem::replace(moment, Tensor::empty([0], &device)));
                let (values, moments) = adamw(values, gradient, taken, step);
                [*first, *second] = moments;
                values
            }
        }
    }
}
