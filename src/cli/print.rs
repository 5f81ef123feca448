//! Writing to the terminal, to files and to pipes, also to pipes that nobody reads any more.
//!
//! `println!` and `eprintln!` panic where the reader has gone, as in `lorafit schema | head -1`.

use std::io::{self, ErrorKind, Write};

use anyhow::Context;

/// Prints to standard output; a reader that stopped listening is no failure.
///
/// # Errors
/// Standard output cannot be written: a full disk, for one.
pub fn print(text: &str) -> anyhow::Result<()> {
    print_while_read(text).map(|_| ())
}

/// Prints to standard output; `false` where the reader stopped listening.
///
/// # Errors
/// Standard output cannot be written.
pub fn print_while_read(text: &str) -> anyhow::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}

/// Prints a line to standard error. Where that fails there is nobody left to tell.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}
