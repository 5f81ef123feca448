//! The commands; the only place that prints.

pub mod args;
pub mod init;
pub mod schema;
