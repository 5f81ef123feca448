//! A sample of every GPU kernel, for `scripts/lowering`, which compiles them for devices that are not
//! at hand.

use std::sync::Arc;

use cubecl::ir::{DeviceProperties, TargetProperties};
use cubecl::prelude::*;

use super::{activation, adamw, attention, clamped_gate, dropout, linear_samples, rms_norm, rope};

/// A device that kernels are compiled for.
#[derive(Clone)]
pub struct Target {
    /// What the device can do.
    pub properties: Arc<DeviceProperties>,
    /// How its matrix units lay out their operands.
    pub target: Arc<TargetProperties>,
    /// A buffer of so many f32 elements; nothing is launched, so it need not exist.
    pub buffer: fn(usize) -> BufferArg,
}

/// A kernel that can be compiled.
pub struct Sample {
    /// What it is and for which sizes; part of file names.
    pub name: String,
    /// It.
    pub kernel: Box<dyn CubeKernel>,
    /// Whether it multiplies matrices in bf16 or f16, and so should use tensor cores.
    pub on_tensor_cores: bool,
}

impl Sample {
    /// One without tensor cores.
    pub(super) fn plain(name: &str, kernel: impl CubeKernel + 'static) -> Self {
        Self {
            name: name.to_string(),
            kernel: Box::new(kernel),
            on_tensor_cores: false,
        }
    }
}

/// One or more samples of each kernel.
pub fn samples(target: &Target) -> Vec<Sample> {
    let samples = [
        activation::samples(target),
        adamw::samples(target),
        attention::samples(target),
        clamped_gate::samples(target),
        dropout::samples(target),
        linear_samples::samples(target),
        rms_norm::samples(target),
        rope::samples(target),
    ];
    samples.into_iter().flatten().collect()
}
