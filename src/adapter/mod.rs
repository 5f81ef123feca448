//! Low-rank deltas: which modules carry them, how PEFT stores them, how they merge.

pub mod merge;
pub mod peft;
pub mod target;
