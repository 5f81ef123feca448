//! One integration binary, so that burn links once.

mod bad_input;
mod cli;
mod data;
mod export;
mod fixture;
mod gguf;
mod golden_lora;
mod golden_models;
#[cfg(feature = "webgpu")]
mod gpu;
mod hub;
mod merge;
mod peft;
mod recipe;
mod reference;
mod resume;
mod run_dir;
mod tokenizer;
mod train;
mod verify;
mod weights;
