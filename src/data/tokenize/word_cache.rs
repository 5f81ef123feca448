//! Tokens of recent words.
//!
//! A word has one slot, which the next word of that slot takes: look-up time and memory are bounded
//! whatever the words are. A slot is one cache line, so that a look-up waits for memory once.

/// Slots are numbered by so many bits: 8 MiB a thread.
const BITS: u32 = 17;
/// Longer words, and those of more tokens, hardly come twice.
const LONGEST: usize = 30;
const MOST_TOKENS: usize = 8;

/// Bytes of a word, with zeros behind them.
type Padded = [u8; LONGEST];

#[derive(Debug, Clone, Default)]
#[repr(align(64))]
struct Slot {
    /// Bytes of the word; 0 where there is none yet.
    length: u8,
    count: u8,
    word: Padded,
    ids: [u32; MOST_TOKENS],
}

/// Tokens of recent words.
#[derive(Debug)]
pub(super) struct WordCache {
    slots: Vec<Slot>,
    /// Tokens of the last word that has no slot.
    other: Vec<u32>,
}

impl Default for WordCache {
    fn default() -> Self {
        Self {
            slots: vec![Slot::default(); 1 << BITS],
            other: Vec::new(),
        }
    }
}

impl WordCache {
    /// The tokens of a word that is not empty, made where they are not known; `None` where they
    /// cannot be made.
    pub(super) fn get(
        &mut self,
        word: &str,
        make: impl FnOnce() -> Option<Vec<u32>>,
    ) -> Option<&[u32]> {
        if word.len() > LONGEST {
            self.other = make()?;
            return Some(&self.other);
        }
        let mut padded = Padded::default();
        padded[..word.len()].copy_from_slice(word.as_bytes());
        let length = word.len() as u8;
        let slot = &mut self.slots[number(&padded, length)];
        if slot.length != length || slot.word != padded {
            let ids = make()?;
            if ids.len() > MOST_TOKENS {
                self.other = ids;
                return Some(&self.other);
            }
            *slot = Slot {
                length,
                count: ids.len() as u8,
                word: padded,
                ids: [0; MOST_TOKENS],
            };
            slot.ids[..ids.len()].copy_from_slice(&ids);
        }
        Some(&slot.ids[..usize::from(slot.count)])
    }
}

/// Multiplicative hashing; words that are made to collide cost no more than a missing cache.
fn number(word: &Padded, length: u8) -> usize {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut hash = u64::from(length);
    let (blocks, rest) = word.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    for block in blocks.iter().chain([&last]) {
        hash = (hash.rotate_left(5) ^ u64::from_le_bytes(*block)).wrapping_mul(GOLDEN);
    }
    (hash >> (u64::BITS - BITS)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_made_once_and_never_mixed_up() {
        let mut cache = WordCache::default();
        let words: Vec<String> = (0..2_000).map(|i| format!("w{}", i * 7919)).collect();
        for _ in 0..2 {
            for (i, word) in words.iter().enumerate() {
                let ids = cache.get(word, || Some(vec![i as u32; 1 + i % 10]));
                assert_eq!(ids.unwrap(), vec![i as u32; 1 + i % 10]);
            }
        }
        assert_eq!(cache.get("w0", || panic!("it is known")).unwrap(), [0]);
        // Zeros are bytes of words like any other.
        cache.get("w0\0", || Some(vec![5])).unwrap();
        assert_eq!(cache.get("w0", || Some(vec![0])).unwrap(), [0]);
        let long = "x".repeat(LONGEST + 1);
        assert_eq!(cache.get(&long, || Some(vec![1])).unwrap(), [1]);
        assert_eq!(cache.get(&long, || Some(vec![2])).unwrap(), [2]);
        assert_eq!(cache.get("y", || None), None);
    }
}
