//! A count of the heap's large blocks: what tensors, samples and tables take on a CPU.
//!
//! The binary installs [`Counting`] as its allocator. Blocks below [`LARGE`] are passed through
//! uncounted, so that the many small ones cost nothing. Unlike the process's resident set, the count
//! leaves out files that are mapped, which the system takes back when it needs room, and tells the
//! highest point between two looks.
//!
//! Blocks of [`KEPT`] bytes or more are kept when they are freed, for the next of their size: a training
//! step asks for the same ones again and again, and the system would map, clear and unmap them each time
//! (a tenth of a step). What is in use and what is kept never come to more than the most that was in use.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// The smallest block that counts.
pub const LARGE: usize = 16 << 10;

/// The smallest block that is kept.
pub const KEPT: usize = 1 << 20;
/// Most blocks that are kept.
const SLOTS: usize = 256;

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

/// Blocks that nobody uses, oldest first.
struct Spare {
    blocks: [(usize, Option<Layout>); SLOTS],
    count: usize,
    bytes: usize,
}

static SPARE: Mutex<Spare> = Mutex::new(Spare {
    blocks: [(0, None); SLOTS],
    count: 0,
    bytes: 0,
});

impl Spare {
    /// The newest block of a layout.
    fn take(&mut self, layout: Layout) -> Option<*mut u8> {
        let blocks = &self.blocks[..self.count];
        let found = blocks.iter().rposition(|block| block.1 == Some(layout))?;
        Some(self.remove(found).0)
    }

    fn remove(&mut self, at: usize) -> (*mut u8, Layout) {
        let (block, layout) = self.blocks[at];
        self.blocks.copy_within(at + 1..self.count, at);
        self.count -= 1;
        let layout = layout.expect("slots below the count are filled");
        self.bytes -= layout.size();
        (std::ptr::with_exposed_provenance_mut(block), layout)
    }

    fn add(&mut self, block: *mut u8, layout: Layout) {
        self.blocks[self.count] = (block.expose_provenance(), Some(layout));
        self.count += 1;
        self.bytes += layout.size();
    }

    /// Gives the oldest back until `more` bytes in use and what is kept are no more than was ever in use.
    fn make_room(&mut self, more: usize) {
        let fits = |bytes: usize| LIVE.load(Relaxed) + more + bytes <= PEAK.load(Relaxed);
        while self.count > 0 && (self.count == SLOTS || !fits(self.bytes)) {
            let (block, layout) = self.remove(0);
            // SAFETY: it came from the system with this layout, and nobody uses it.
            unsafe { System.dealloc(block, layout) };
        }
    }
}

/// A kept block, or the system's.
///
/// # Safety
/// As [`GlobalAlloc::alloc`].
unsafe fn large(layout: Layout, zeroed: bool) -> *mut u8 {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(block) = spare.take(layout) {
        drop(spare);
        if zeroed {
            // SAFETY: the block has this size.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        return block;
    }
    spare.make_room(layout.size());
    drop(spare);
    // SAFETY: by this function's contract.
    let block = unsafe { from_system(layout, zeroed) };
    if !block.is_null() {
        return block;
    }
    // Whatever is kept may be what is missing.
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    spare.make_room(usize::MAX / 4);
    // SAFETY: as above.
    unsafe { from_system(layout, zeroed) }
}

/// # Safety
/// As [`GlobalAlloc::alloc`].
unsafe fn from_system(layout: Layout, zeroed: bool) -> *mut u8 {
    // SAFETY: by this function's contract.
    unsafe {
        match zeroed {
            true => System.alloc_zeroed(layout),
            false => System.alloc(layout),
        }
    }
}

/// # Safety
/// As [`GlobalAlloc::alloc`].
unsafe fn counted(layout: Layout, zeroed: bool) -> *mut u8 {
    // SAFETY: by this function's contract.
    let block = unsafe {
        match layout.size() >= KEPT {
            true => large(layout, zeroed),
            false => from_system(layout, zeroed),
        }
    };
    if !block.is_null() {
        grown(layout.size());
    }
    block
}

// SAFETY: every block is the system's, with the layout that it was asked for; neither counting nor
// keeping allocates, and neither panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's contract.
        unsafe { counted(layout, false) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's contract.
        unsafe { counted(layout, true) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if layout.size() < KEPT {
            // SAFETY: by the caller's contract.
            unsafe { System.dealloc(block, layout) };
            return shrunk(layout.size());
        }
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        shrunk(layout.size());
        spare.make_room(layout.size());
        spare.add(block, layout);
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: by the caller's contract. What grows by moving pages need not be copied.
        let moved = unsafe { System.realloc(block, layout, size) };
        if !moved.is_null() {
            shrunk(layout.size());
            grown(size);
        }
        moved
    }
}
