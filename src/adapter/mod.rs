//! Low-rank deltas: which modules carry them, how PEFT stores them, how they merge.
//!
//! [`target`] decides which linear layers carry one, [`inject`] puts them into a model, [`config`]
//! is `adapter_config.json`, [`peft`] reads an adapter directory, [`merge`] adds a delta to a weight.

pub mod combine;
pub mod config;
mod config_read;
pub mod experts;
pub mod inject;
pub mod linalg;
pub mod merge;
pub mod outline;
pub mod peft;
mod read;
pub mod residual;
pub mod target;
mod target_fault;
mod target_written;
pub mod tokens;
pub mod vera;
