//! Adapters and merged models go to disk, atomically.
//!
//! [`write`] makes files and directories appear whole or not at all, [`safetensors`] streams
//! tensors into one, [`peft`] writes an adapter as PEFT does, [`merged`] a model as Hugging Face
//! does.

pub mod merged;
pub mod peft;
pub mod safetensors;
pub mod write;
