//! A base model's configuration and weights become a causal language model.
//!
//! [`hub`] finds the files, [`config`] reads `config.json` or GGUF metadata, [`weights`] reads
//! tensors, [`names`] holds every rename.

pub mod config;
mod config_check;
mod config_json;
mod config_write;
pub mod gguf;
pub mod hub;
mod hub_download;
mod hub_error;
pub mod names;
mod shard;
pub mod weights;
