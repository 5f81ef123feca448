//! Counter-based random numbers: the n-th draw of a stream depends on the stream's key and n alone.
//!
//! So a run that resumes, recomputes a block or splits its work between threads draws the same
//! numbers, and no generator state needs saving. The mixer is SplitMix64 (Steele et al. 2014,
//! <https://doi.org/10.1145/2714064.2660195>), whose output function is stable for ever here.

/// A stream of random numbers, addressed by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { key: mix(seed) }
    }

    /// A stream of its own for each `index`, independent of this one.
    pub fn split(self, index: u64) -> Self {
        Self {
            key: mix(self.key ^ mix(index.wrapping_add(GOLDEN_GAMMA))),
        }
    }

    /// 64 random bits.
    #[inline(always)]
    pub fn bits(self, index: u64) -> u64 {
        finalize(self.start().wrapping_add(index.wrapping_mul(GOLDEN_GAMMA)))
    }

    /// What is finalized for the first draw; each draw after it adds [`GOLDEN_GAMMA`].
    #[inline(always)]
    pub(crate) fn start(self) -> u64 {
        self.key.wrapping_add(GOLDEN_GAMMA)
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(self, index: u64) -> f64 {
        (self.bits(index) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box–Muller).
    pub fn normal(self, index: u64) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(2 * index)).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform(2 * index + 1)).cos()
    }
}

/// SplitMix64's increment, 2⁶⁴ / golden ratio.
pub(crate) const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// SplitMix64's next output after state `x`.
fn mix(x: u64) -> u64 {
    finalize(x.wrapping_add(GOLDEN_GAMMA))
}

/// The factors of SplitMix64's finalizer.
pub(crate) const FACTORS: [u64; 2] = [0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB];

/// SplitMix64's finalizer, a bijection that scatters close numbers.
#[inline(always)]
pub(crate) fn finalize(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(FACTORS[0]);
    let z = (z ^ (z >> 27)).wrapping_mul(FACTORS[1]);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_uniform_and_normal() {
        let stream = Stream::new(3).split(5);
        let n = 20_000;
        let mean = (0..n).map(|i| stream.uniform(i)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let variance = (0..n).map(|i| stream.normal(i).powi(2)).sum::<f64>() / n as f64;
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
    }

    #[test]
    fn streams_differ() {
        let base = Stream::new(1);
        assert_ne!(base.split(0).bits(0), base.split(1).bits(0));
        assert_ne!(base.bits(0), base.bits(1));
        assert_ne!(Stream::new(2).bits(0), base.bits(0));
    }
}
