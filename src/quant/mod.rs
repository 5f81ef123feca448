//! The GGUF container and its block formats.

pub mod blocks;
pub mod gguf;
mod gguf_parse;
