//! A base model's configuration and weights become a causal language model.
//!
//! [`config`] reads `config.json` or GGUF metadata, [`families`] says what sets the families apart,
//! [`weights`] reads tensors ([`gguf`] those of GGUF files), [`quant_cache`] keeps what was quantised, [`names`] holds every rename and
//! [`pieces`] how tensors lie in files, [`causal_lm`] puts [`block`]s together.

mod adaptable;
pub mod block;
mod build;
pub mod causal_lm;
pub mod config;
mod config_check;
mod config_json;
mod config_rope;
pub mod families;
mod fingerprint;
pub mod gguf;
mod gguf_arch;
mod gguf_fields;
mod gguf_rope;
pub mod kept;
pub mod names;
pub mod pieces;
pub mod quant_cache;
mod shard;
pub mod storage;
mod tensor_reader;
mod visit;
pub mod weights;
mod weights_error;

pub use causal_lm::{CausalLm, KvCache, Tokens};
pub use storage::{Keep, Storage};
