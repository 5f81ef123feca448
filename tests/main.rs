//! One integration binary, so that burn links once.

mod data;
mod export;
mod golden;
mod gguf;
mod hub;
mod merge;
mod peft;
mod recipe;
mod weights;
