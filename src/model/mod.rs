//! A base model's configuration and weights become a causal language model.
//!
//! [`config`] reads `config.json` or GGUF metadata, [`weights`] reads
//! tensors ([`gguf`] those of GGUF files), [`names`] holds every rename, [`causal_lm`] puts
//! [`block`]s together.

pub mod block;
pub mod causal_lm;
pub mod config;
mod config_check;
mod config_json;
mod config_write;
pub mod gguf;
pub mod names;
mod shard;
mod tensor_reader;
pub mod weights;

pub use causal_lm::{CausalLm, KvCache, Tokens};
