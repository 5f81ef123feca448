//! Dynamic loss scaling, as torch's `GradScaler` does it (arXiv 1710.03740): the loss is multiplied by a
//! power of two before the backward pass, so that small gradients do not vanish in half precision, and the
//! gradients are divided by it after.
//!
//! Where something overflows the step is skipped: no weight and no moment moves, the scale is halved, and
//! training goes on with the next step's data. After 2000 steps without that it is doubled. The learning
//! rate follows the steps of the run, skipped ones counted, so that a schedule ends where it should.
//!
//! A power of two changes no bit of a gradient that neither overflows nor vanishes: where all sums are in
//! f32, as on the CPU, a run with scaling is the run without it.

use serde::{Deserialize, Serialize};

/// Where it begins.
const FIRST: f64 = 65536.0;
/// Steps without overflow after which it doubles.
const GROWTH_INTERVAL: usize = 2000;
/// Below it gradients overflow by themselves, which no scale mends.
const LEAST: f64 = 1.0;
/// Above it the scale itself would overflow before long.
const MOST: f64 = 1.329_227_995_784_916e36; // 2¹²⁰

/// The scale of a run, and what it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// What losses are multiplied by.
    pub scale: f64,
    /// Steps since it changed.
    pub steady: usize,
    /// Steps skipped so far.
    pub skipped: usize,
}

impl Default for LossScale {
    fn default() -> Self {
        Self {
            scale: FIRST,
            steady: 0,
            skipped: 0,
        }
    }
}

impl LossScale {
    /// After a step whose gradients were finite, or not.
    pub fn update(&mut self, finite: bool) {
        if !finite {
            self.scale /= 2.0;
            self.steady = 0;
            self.skipped += 1;
            return;
        }
        self.steady += 1;
        if self.steady == GROWTH_INTERVAL {
            self.scale = (self.scale * 2.0).min(MOST);
            self.steady = 0;
        }
    }

    /// Whether it has fallen so far that it is not to blame for what overflows.
    pub fn is_exhausted(&self) -> bool {
        self.scale < LEAST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_halved_at_an_overflow_and_doubled_after_2000_steps_without_one() {
        let mut scale = LossScale::default();
        assert_eq!(scale.scale, 65536.0);
        for _ in 0..1999 {
            scale.update(true);
        }
        scale.update(false);
        assert_eq!((scale.scale, scale.steady, scale.skipped), (32768.0, 0, 1));
        for _ in 0..1999 {
            scale.update(true);
        }
        assert_eq!(scale.scale, 32768.0);
        scale.update(true);
        assert_eq!((scale.scale, scale.steady, scale.skipped), (65536.0, 0, 1));
        for skipped in 2..=17 {
            scale.update(false);
            assert!(!scale.is_exhausted(), "{skipped}");
        }
        assert_eq!(scale.scale, 1.0);
        scale.update(false);
        assert!(scale.is_exhausted());
    }

    #[test]
    fn it_never_overflows_itself() {
        let mut scale = LossScale {
            scale: MOST,
            ..LossScale::default()
        };
        for _ in 0..2 * GROWTH_INTERVAL {
            scale.update(true);
        }
        assert_eq!(scale.scale, 2f64.powi(120));
    }
}
