//! The commands; the only place that prints.
//!
//! [`args`] says what can be typed, [`render`] how events look; every other file is one command.

pub mod args;
pub mod check;
pub mod completions;
pub mod devices;
pub mod generate;
pub mod init;
pub mod interrupt;
pub mod merge;
pub mod render;
pub mod schema;
pub mod train;

use args::{Cli, Command};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0
    Done,
    /// 130, after the run state was saved.
    Interrupted,
}

/// A mistake in what was typed or in a recipe, which exits with 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Runs a command.
///
/// # Errors
/// What went wrong; [`Usage`] when it is the user's command or recipe.
pub fn run(cli: &Cli) -> anyhow::Result<Exit> {
    match &cli.command {
        Command::Train(args) => return train::run(args, &cli.output),
        Command::Merge(args) => merge::run(args, &cli.output)?,
        Command::Check(args) => check::run(args, &cli.output)?,
        Command::Generate(args) => return generate::run(args, &cli.output),
        Command::Init(args) => init::run(args, &cli.output)?,
        Command::Schema(args) => schema::run(args)?,
        Command::Devices => devices::run(&cli.output)?,
        Command::Completions(args) => completions::run(args),
    }
    Ok(Exit::Done)
}
