//! `lorafit completions`: the completion script of a shell.

use clap::CommandFactory;

use super::args::{Cli, CompletionsArgs};

/// Prints the script.
pub fn run(args: &CompletionsArgs) {
    clap_complete::generate(
        args.shell,
        &mut Cli::command(),
        "lorafit",
        &mut std::io::stdout(),
    );
}
