//! `lorafit completions`: the completion script of a shell.

use clap::CommandFactory;

use super::args::{Cli, CompletionsArgs};
use super::print::print;

/// Prints the script.
///
/// # Errors
/// Standard output cannot be written.
pub fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    // Into memory first: clap_complete panics where a pipe is closed.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "lorafit", &mut script);
    print(&String::from_utf8_lossy(&script))
}
