//! Ctrl-C: the first asks the command to save and stop, the second stops at once.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Listens for Ctrl-C, SIGTERM and SIGHUP from now on.
///
/// # Errors
/// The system refuses the handler.
pub fn listen() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!(
            "\nstopping after this micro-batch and saving; press Ctrl-C again to quit at once"
        );
    })?;
    Ok(())
}

/// Whether the command was asked to stop.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
