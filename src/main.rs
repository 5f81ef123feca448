//! The `lorafit` binary: parse, run, print the error chain, exit code.

use std::process::ExitCode;

use clap::Parser;
use lorafit::cli::{self, Exit, Usage, args::Cli};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli::run(&cli) {
        Ok(Exit::Done) => ExitCode::SUCCESS,
        Ok(Exit::Interrupted) => ExitCode::from(130),
        Err(error) => {
            cli::render::error(&error, &cli.output);
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}
