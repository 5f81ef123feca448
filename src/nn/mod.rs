//! Layers: parameters plus the [`kernels`](crate::kernels) that use them.
//!
//! Rows of all samples lie one after the other: activations are `[N, width]` with N = B · T.

pub mod attention;
pub mod delta_net;
pub mod dropout;
pub mod expert_linear;
pub mod latent_attention;
pub mod lora_linear;
pub mod mlp;
pub mod moe;
pub mod norm;
pub mod parameter;
pub mod rope;
pub mod token_rows;

pub use attention::{Attention, LayerCache, Projections, Rows};
pub use delta_net::DeltaNet;
pub use dropout::Dropout;
pub use expert_linear::{ExpertDelta, ExpertLinear};
pub use latent_attention::{LatentAttention, LatentQuery};
pub use lora_linear::{Lambdas, LoraDelta, LoraLinear, Magnitude};
pub use mlp::{Mlp, MlpInput};
pub use moe::{ExpertGate, Moe, Router, RouterRule, SharedExpert};
pub use norm::{HeadNorm, Norm, NormKind};
pub use parameter::{Parameter, Visitor};
pub use rope::Rope;
pub use token_rows::TokenRows;
