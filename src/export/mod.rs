//! Adapters and merged models go to disk, atomically.

pub mod merged;
pub mod peft;
pub mod write;
