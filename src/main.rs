//! The `lorafit` binary: parse, run, print the error chain, exit code.

use std::process::ExitCode;

use clap::Parser;
use lorafit::cli::{self, Exit, args::Cli};
use lorafit::train::heap::Counting;

#[global_allocator]
static HEAP: Counting = Counting;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli::run(&cli) {
        Ok(Exit::Done) => ExitCode::SUCCESS,
        Ok(Exit::Interrupted) => ExitCode::from(cli::INTERRUPTED),
        Err(error) => {
            cli::render::error(&error, &cli.output);
            ExitCode::from(cli::exit_code(&error))
        }
    }
}
