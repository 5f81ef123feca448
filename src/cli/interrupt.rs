//! Ctrl-C: the first asks the command to stop in good order, the second stops it at once.

use std::sync::atomic::{AtomicBool, Ordering};

use super::INTERRUPTED;
use super::args::Output;
use super::print::say;

static ASKED: AtomicBool = AtomicBool::new(false);

/// Listens for Ctrl-C, SIGTERM and SIGHUP from now on; the first one is answered with `message`.
///
/// # Errors
/// The system refuses the handler.
pub fn listen(output: &Output, message: &'static str) -> anyhow::Result<()> {
    let silent = output.json || output.quiet;
    ctrlc::set_handler(move || {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(INTERRUPTED.into());
        }
        if !silent {
            // The terminal has just shown ^C, maybe in the middle of a line.
            say(&format!("\n{message}; press Ctrl-C again to quit at once"));
        }
    })?;
    Ok(())
}

/// Whether the command was asked to stop.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
