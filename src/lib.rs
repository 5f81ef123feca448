//! lorafit fine-tunes open-weight language models with LoRA on one consumer GPU or on a CPU.
//!
//! # Follow a batch
//!
//! The modules below stand in the order in which data passes through them:
//!
//! 1. [`recipe`]: a YAML recipe becomes a [`recipe::Plan`], every knob resolved once.
//! 2. [`hub`]: base models and datasets that are not on this machine are downloaded.
//! 3. [`data`]: dataset rows become conversations, rendered text, then token ids with labels,
//!    and at last padded batches.
//! 4. [`quant`]: the GGUF container and its block formats, read and dequantised.
//! 5. [`kernels`]: the tensor operations that matter, each with its plain reference and backward.
//! 6. [`nn`]: layers made of those operations.
//! 7. [`model`]: a base model's configuration and weights become a causal language model.
//! 8. [`adapter`]: low-rank deltas are injected into it, loaded, and merged.
//! 9. [`train`]: batches become losses, gradients, optimizer steps and run states.
//! 10. [`memory`]: what all of this will take, before it begins.
//! 11. [`infer`]: the model writes text, with a KV cache.
//! 12. [`export`]: adapters and merged models go to disk, atomically.
//! 13. [`cli`]: the commands; the only place that prints.
#![warn(missing_docs)]

pub mod recipe;

pub mod hub;

pub mod data;

pub mod quant;

mod cache_dir;
pub mod device;
pub mod kernels;
pub mod nn;
pub mod random;

pub mod model;

pub mod adapter;

pub mod train;

pub mod memory;

pub mod infer;

pub mod export;

pub mod cli;
