//! One integration binary, so that burn links once.

mod bad_input;
mod cli;
mod data;
mod export;
mod fixture;
mod gguf;
mod golden;
#[cfg(feature = "webgpu")]
mod gpu;
mod hub;
mod merge;
mod peft;
mod recipe;
mod resume;
mod run_dir;
mod tokenizer;
mod train;
mod verify;
mod weights;
