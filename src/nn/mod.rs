//! Layers: parameters plus the [`kernels`](crate::kernels) that use them.
//!
//! Rows of all samples lie one after the other: activations are `[N, width]` with N = B · T.

pub mod attention;
pub mod dropout;
pub mod lora_linear;
pub mod mlp;
pub mod parameter;
pub mod rms_norm;
pub mod rope;

pub use attention::{Attention, LayerCache, Rows};
pub use dropout::Dropout;
pub use lora_linear::{LoraDelta, LoraLinear};
pub use mlp::Mlp;
pub use parameter::{Parameter, Visitor};
pub use rms_norm::RmsNorm;
pub use rope::Rope;
