//! Low-rank deltas: [`target`] chooses the modules that carry them, [`inject`] puts them into a
//! model, [`peft`] reads and writes them as PEFT does, [`merge`] adds them to the base.

pub mod inject;
pub mod merge;
pub mod peft;
pub mod target;
