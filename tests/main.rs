//! One integration binary, so that burn links once.

mod data;
mod export;
mod gguf;
mod hub;
mod recipe;
mod tokenizer;
mod weights;
