//! The commands; the only place that prints.
//!
//! [`args`] says what can be typed. Every command is a file of its own. What they print goes through
//! [`render`] (events, progress, warnings, results; [`pace`] tells how long training will take) and
//! [`mod@print`]; [`warnings`] are an enum whose texts carry the remedy, [`words`] those of options. [`interrupt`] is Ctrl-C.

pub mod args;
pub mod check;
pub mod combine;
pub mod completions;
pub mod data;
pub mod devices;
pub mod fits;
pub mod generate;
pub mod init;
pub mod interrupt;
pub mod merge;
pub mod merge_args;
pub mod pace;
pub mod plan;
pub mod plan_auto;
pub mod preview_html;
pub mod preview_text;
pub mod print;
pub mod render;
pub mod schema;
pub mod servers;
pub mod stats_text;
pub mod style;
pub mod train;
pub mod turns;
pub mod visible;
pub mod warnings;
pub mod words;

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

/// The exit code of an interrupted command, as shells have it for Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// The exit code of an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<Usage>() { 2 } else { 1 }
}

/// Runs a command.
///
/// # Errors
/// What went wrong; [`Usage`] when it is the user's command or recipe.
pub fn run(cli: &Cli) -> anyhow::Result<Exit> {
    let done = match &cli.command {
        Command::Train(args) => return train::run(args, &cli.output),
        Command::Merge(args) => return merge::run(args, &cli.output),
        Command::Generate(args) => return generate::run(args, &cli.output),
        Command::Combine(args) => combine::run(args, &cli.output),
        Command::Check(args) => check::run(args, &cli.output),
        Command::Plan(args) => plan::run(args, &cli.output),
        Command::Data(command) => data::run(command, &cli.output),
        Command::Init(args) => init::run(args, &cli.output),
        Command::Schema(args) => schema::run(args),
        Command::Devices => devices::run(&cli.output),
        Command::Completions(args) => completions::run(args),
    };
    done.map(|()| Exit::Done)
}
