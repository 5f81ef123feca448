//! One integration binary, so that burn links once.

mod data;
mod export;
mod gguf;
mod golden;
mod hub;
mod merge;
mod peft;
mod recipe;
mod tokenizer;
mod weights;
