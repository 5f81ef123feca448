//! One integration binary, so that burn links once.

mod bad_input;
mod cli;
mod data;
mod export;
mod fixture;
mod gguf;
mod golden;
mod hub;
mod merge;
mod peft;
mod recipe;
mod tokenizer;
mod weights;
