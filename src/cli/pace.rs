//! How fast training goes, from the steps of late.

use std::collections::VecDeque;
use std::time::Duration;

/// Steps that count: enough to smooth long and short rows, few enough to follow a change.
const WINDOW: usize = 20;

/// Tokens and seconds of the last steps.
#[derive(Debug, Default)]
pub struct Pace {
    steps: VecDeque<(usize, f64)>,
}

impl Pace {
    /// Notes a step.
    pub fn step(&mut self, tokens: usize, seconds: f64) {
        self.steps.truncate(WINDOW - 1);
        self.steps.push_front((tokens, seconds));
    }

    /// Tokens in a second.
    pub fn tokens_per_second(&self) -> f64 {
        let tokens: usize = self.steps.iter().map(|(tokens, _)| tokens).sum();
        tokens as f64 / self.seconds().max(f64::MIN_POSITIVE)
    }

    /// How long so many steps take, evaluations not counted.
    pub fn left(&self, steps: usize) -> Duration {
        let mean = self.seconds() / self.steps.len().max(1) as f64;
        Duration::try_from_secs_f64(mean * steps as f64).unwrap_or(Duration::MAX)
    }

    fn seconds(&self) -> f64 {
        self.steps.iter().map(|(_, seconds)| seconds).sum()
    }
}

/// `12s`, `3m20s` or `1h02m`.
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_steps_count() {
        let mut pace = Pace::default();
        assert_eq!(pace.left(3), Duration::ZERO);
        pace.step(100, 50.0);
        for _ in 0..WINDOW {
            pace.step(10, 2.0);
        }
        assert_eq!(pace.tokens_per_second(), 5.0);
        assert_eq!(pace.left(3), Duration::from_secs(6));
    }

    #[test]
    fn times_are_short() {
        let text = |seconds| clock(Duration::from_secs_f64(seconds));
        assert_eq!(text(0.4), "0s");
        assert_eq!(text(59.6), "1m00s");
        assert_eq!(text(200.0), "3m20s");
        assert_eq!(text(3723.0), "1h02m");
        assert!(!clock(Duration::MAX).is_empty());
    }
}
