//! The allocator of the binary, installed here as it is there. One test: what is in use is the process's.

use lorafit::train::heap::{self, Counting};

#[global_allocator]
static HEAP: Counting = Counting;

const SIZE: usize = (3 << 20) + 64;

#[test]
fn large_blocks_are_counted_used_again_and_come_clean() {
    let before = heap::in_use().unwrap_or(0);
    let block = vec![7u8; SIZE];
    let address = block.as_ptr();
    assert_eq!(heap::in_use(), Some(before + SIZE as u64));
    drop(block);
    assert_eq!(heap::in_use(), Some(before), "what is kept is not in use");

    let again = vec![0u8; SIZE];
    assert_eq!(again.as_ptr(), address, "the block was not kept");
    assert!(again.iter().all(|&byte| byte == 0));

    // It grows and shrinks with what is in it.
    let mut grown = again;
    grown.fill(9);
    grown.resize(2 * SIZE, 1);
    assert!(
        grown[..SIZE].iter().all(|&byte| byte == 9) && grown[SIZE..].iter().all(|&byte| byte == 1)
    );
    grown.truncate(SIZE / 2);
    grown.shrink_to_fit();
    assert!(grown.iter().all(|&byte| byte == 9));
    assert_eq!(heap::in_use(), Some(before + SIZE as u64 / 2));
    drop(grown);

    // From many threads, blocks of a few sizes and of their own content.
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            scope.spawn(move || {
                for round in 0..50usize {
                    let size = SIZE + (round % 3) * 4096;
                    let block = vec![thread; size];
                    std::thread::yield_now();
                    assert!(block.iter().all(|&byte| byte == thread));
                    let clean = vec![0u8; size];
                    assert!(clean.iter().all(|&byte| byte == 0));
                }
            });
        }
    });
    assert_eq!(heap::in_use(), Some(before));
    assert!(heap::peak() >= Some(before + 2 * SIZE as u64));
}
