//! Tells a device that ran out of memory from other panics.
//!
//! Backends of GPUs panic with the allocator's words, in the call or where its result is read. A CPU's
//! allocator ends the process instead, and Linux does so before it: there the plan is all that helps.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

/// What allocators say, in lower case: those of cubecl, of wgpu and of drivers.
const WORDS: &[&str] = &[
    "out of device memory",
    "out of memory",
    "outofmemory",
    "out_of_memory",
    "can't allocate buffer",
    "not enough memory",
];

/// The first line of what an allocator said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutOfMemory(pub String);

/// Runs `work`; memory that ran out in it is an answer, and every other panic goes on.
///
/// # Errors
/// Memory ran out.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, OutOfMemory> {
    quiet();
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(|payload| {
        match words(
            payload.downcast_ref::<String>(),
            payload.downcast_ref::<&str>(),
        ) {
            Some(said) => OutOfMemory(said),
            None => panic::resume_unwind(payload),
        }
    })
}

/// Panics for want of memory are not shown from here on: they are reported as errors.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let shown = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let payload = info.payload();
            let said = words(
                payload.downcast_ref::<String>(),
                payload.downcast_ref::<&str>(),
            );
            if said.is_none() {
                shown(info);
            }
        }));
    });
}

fn words(owned: Option<&String>, fixed: Option<&&str>) -> Option<String> {
    let message = owned.map(String::as_str).or(fixed.copied())?;
    let lower = message.to_lowercase();
    let known = WORDS.iter().any(|words| lower.contains(words));
    known.then(|| message.lines().next().unwrap_or_default().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_runs_out_is_an_answer() {
        assert_eq!(caught(|| 3), Ok(3));
        let message = "out of device memory allocating 77 bytes\nbacktrace".to_string();
        let found = caught(|| panic!("{message}"));
        let said = "out of device memory allocating 77 bytes".to_string();
        assert_eq!(found, Err::<(), _>(OutOfMemory(said)));
        let found = caught(|| panic!("Not enough memory left."));
        assert_eq!(
            found,
            Err::<(), _>(OutOfMemory("Not enough memory left.".into()))
        );
    }

    #[test]
    fn other_panics_go_on() {
        let other =
            panic::catch_unwind(|| caught(|| std::panic::resume_unwind(Box::new("a fault"))));
        assert!(other.is_err());
    }
}
