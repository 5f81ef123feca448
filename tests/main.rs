//! One integration binary, so that burn links once.

mod data;
mod export;
mod hub;
mod peft;
mod recipe;
mod weights;
