//! In which type a model's frozen matrices are kept.
//!
//! Those of linear layers, experts, embedding and output head are nearly all of a model. Everything
//! else, norms, biases, routers, convolutions, is in f32, and so is what trains.

use std::collections::BTreeSet;

use half::{bf16, f16};

use super::config::ModelConfig;
use super::quant_cache::Cached;
use super::weights::Dtype;
use super::{causal_lm, names};
use crate::quant::Scheme;

/// How a model's matrices are kept.
#[derive(Clone, Copy)]
pub struct Keep<'a> {
    /// The frozen ones.
    pub storage: Storage,
    /// Those of linear layers, the output head and routers apart: quantised so, if at all, and then
    /// multiplied in bf16 where `storage` would keep them so.
    pub linears: Option<Scheme>,
    /// Whether those keep the blocks that a GGUF file has them in, mapped, instead.
    pub gguf_blocks: bool,
    /// Where quantised matrices are kept between loads, if anywhere.
    pub cached: Option<&'a Cached>,
    /// Names of those that are kept in f32 all the same: what is going to train.
    pub in_f32: &'a dyn Fn(&str) -> bool,
}

impl Default for Keep<'_> {
    /// All in f32.
    fn default() -> Self {
        Self {
            storage: Storage::F32,
            linears: None,
            gguf_blocks: false,
            cached: None,
            in_f32: &|_| false,
        }
    }
}

/// The tensors of a model's files that [`Keep::linears`] quantises.
pub fn quantised_tensors(config: &ModelConfig) -> BTreeSet<String> {
    let linears = causal_lm::outline(config).linears.into_iter();
    linears
        .map(|linear| names::in_files(config.family, &format!("{}.weight", linear.path)))
        .collect()
}

/// The type in which frozen matrices are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Storage {
    /// In f32, whatever the files have.
    #[default]
    F32,
    /// Rounded to IEEE half precision.
    F16,
    /// Rounded to bfloat16.
    Bf16,
    /// Each in its file's type, as long as that is f32, f16 or bf16, else in f32: nothing is rounded.
    AsStored,
}

impl Storage {
    /// The type in which a tensor is kept whose parts are stored so.
    pub(super) fn of(self, mut stored: impl Iterator<Item = Option<Dtype>>) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
            Self::AsStored => match stored.next() {
                Some(Some(first @ (Dtype::F16 | Dtype::BF16)))
                    if stored.all(|dtype| dtype == Some(first)) =>
                {
                    first
                }
                _ => Dtype::F32,
            },
        }
    }
}

/// An element type in which matrices are kept.
pub(super) trait Kept: burn::tensor::Element + bytemuck::Pod {
    /// Its name.
    const DTYPE: Dtype;

    /// Rounded to the nearest.
    fn from_f32(value: f32) -> Self;
}

impl Kept for f32 {
    const DTYPE: Dtype = Dtype::F32;

    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Kept for f16 {
    const DTYPE: Dtype = Dtype::F16;

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Kept for bf16 {
    const DTYPE: Dtype = Dtype::BF16;

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}
