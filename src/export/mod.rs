//! Adapters and merged models go to disk, atomically.
//!
//! [`mod@write`] makes files and directories appear whole or not at all, [`safetensors`] streams
//! tensors into one, [`peft`] writes an adapter as PEFT does, [`model`] a model as Hugging Face
//! does with the files of [`sidecar`], and [`merged`] makes one of base and adapter. [`servers`] says
//! which servers load an adapter.

pub mod merged;
mod merger;
pub mod model;
pub mod peft;
pub mod safetensors;
mod server_rules;
pub mod servers;
pub mod sidecar;
pub mod verify;
pub mod write;
