//! The order of rows: a small random generator of our own, so that a seed means the same order in
//! every version of lorafit and on every machine.
//!
//! Numbers come from SplitMix64 (Steele, Lea, Flood 2014, the generator of Java's
//! `SplittableRandom`); bounded numbers from the high half of a 128-bit product with rejection
//! (Lemire 2019), so that every order is equally likely.

use crate::random::{GOLDEN_GAMMA, finalize};

/// The stream that splits off validation rows; epochs count from 0 and never reach it, nor any of
/// those below.
pub(super) const SPLIT_STREAM: u64 = u64::MAX;
/// Streams that order the rows of packed samples, combined with the epoch.
pub(super) const PIECE_STREAM: u64 = 1 << 63;
/// Streams that order micro-batches of like length, combined with epoch and window.
pub(super) const GROUP_STREAM: u64 = 1 << 62;
/// Streams that choose among the samples of a source, combined with its number.
pub(super) const WEIGHT_STREAM: u64 = 1 << 61;

/// A random permutation of `0..count`, determined by seed and stream (the epoch).
pub fn permutation(count: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut random = SplitMix64::new(finalize(seed) ^ finalize(stream.wrapping_add(GOLDEN_GAMMA)));
    let mut order: Vec<usize> = (0..count).collect();
    for i in (1..count).rev() {
        order.swap(i, random.below(i + 1));
    }
    order
}

pub(super) struct SplitMix64(u64);

impl SplitMix64 {
    pub(super) fn new(state: u64) -> Self {
        Self(state)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN_GAMMA);
        finalize(self.0)
    }

    /// A number in `0..bound`, `bound > 0`.
    fn below(&mut self, bound: usize) -> usize {
        let bound = bound as u64;
        let rejected = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= rejected {
                return (product >> 64) as usize;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_gives_its_published_numbers() {
        let mut random = SplitMix64::new(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn orders_never_change_between_versions() {
        assert_eq!(permutation(8, 42, 0), [5, 1, 2, 7, 4, 3, 0, 6]);
        assert_eq!(permutation(8, 42, 1), [2, 6, 4, 1, 7, 0, 5, 3]);
        assert!(permutation(0, 1, 1).is_empty());
    }

    #[test]
    fn every_order_is_about_as_likely() {
        let mut counts = [0; 6];
        for seed in 0..6000 {
            let order = permutation(3, seed, 0);
            counts[order[0] * 2 + usize::from(order[1] > order[2])] += 1;
        }
        assert!(counts.iter().all(|n| (850..1150).contains(n)), "{counts:?}");
    }
}
