//! Weights in fewer bits: those that lorafit quantises itself (NF4, int8), and the GGUF container
//! with its block formats, whose matrices can also be kept as the file has them.

pub mod absmax;
pub mod blocks;
pub mod dynamic;
pub mod gguf;
mod gguf_parse;
pub mod held;
pub mod int8;
mod k_blocks;
pub mod matrix;
pub mod nf4;
mod nf4_decode;
pub mod store;
pub mod stored;

pub use matrix::{QuantMatrix, Scheme};

/// A number that cannot be quantised.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("element {index} is {value}; only finite numbers can be quantised")]
pub struct NotFinite {
    /// Where it is.
    pub index: usize,
    /// What it is.
    pub value: f32,
}

impl NotFinite {
    /// Of values one of which is not finite.
    fn first_of(values: &[f32]) -> Self {
        let index = values.iter().position(|x| !x.is_finite()).unwrap_or(0);
        Self {
            index,
            value: values[index],
        }
    }
}
