//! A count of the heap's large blocks: what tensors, samples and tables take on a CPU.
//!
//! The binary installs [`Counting`] as its allocator. Blocks below [`LARGE`] are passed through
//! uncounted, so that the many small ones cost nothing. Unlike the process's resident set, the count
//! leaves out files that are mapped, which the system takes back when it needs room, and tells the
//! highest point between two looks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// The smallest block that counts.
pub const LARGE: usize = 16 << 10;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static COUNTS: AtomicBool = AtomicBool::new(false);

/// The system's allocator, and a count.
pub struct Counting;

/// Bytes in use in large blocks; `None` where the program has another allocator.
pub fn in_use() -> Option<u64> {
    COUNTS.load(Relaxed).then(|| LIVE.load(Relaxed) as u64)
}

/// The most that was in use so far.
pub fn peak() -> Option<u64> {
    COUNTS.load(Relaxed).then(|| PEAK.load(Relaxed) as u64)
}

fn grown(size: usize) {
    if size < LARGE {
        return;
    }
    COUNTS.store(true, Relaxed);
    let live = LIVE.fetch_add(size, Relaxed) + size;
    if live > PEAK.load(Relaxed) {
        PEAK.fetch_max(live, Relaxed);
    }
}

fn shrunk(size: usize) {
    if size >= LARGE {
        LIVE.fetch_sub(size, Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it is; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's contract.
        let block = unsafe { System.alloc(layout) };
        if !block.is_null() {
            grown(layout.size());
        }
        block
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's contract.
        let block = unsafe { System.alloc_zeroed(layout) };
        if !block.is_null() {
            grown(layout.size());
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: by the caller's contract.
        unsafe { System.dealloc(block, layout) };
        shrunk(layout.size());
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: by the caller's contract.
        let moved = unsafe { System.realloc(block, layout, size) };
        if !moved.is_null() {
            shrunk(layout.size());
            grown(size);
        }
        moved
    }
}
