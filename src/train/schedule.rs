//! The learning rate of each step: transformers' `get_{constant,linear,cosine}_schedule_with_warmup`.

use crate::recipe::{LrScheduler, TrainPlan};

/// A learning-rate schedule over a known number of steps.
///
/// ```
/// use lorafit::recipe::LrScheduler;
/// use lorafit::train::schedule::Schedule;
///
/// let schedule = Schedule {
///     peak: 2e-4,
///     shape: LrScheduler::Linear,
///     warmup_steps: 2,
///     total_steps: 10,
/// };
/// assert_eq!(schedule.learning_rate(0), 0.0);
/// assert_eq!(schedule.learning_rate(2), 2e-4);
/// assert_eq!(schedule.learning_rate(6), 1e-4);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Peak learning rate.
    pub peak: f64,
    /// Shape after warm-up.
    pub shape: LrScheduler,
    /// Steps of linear warm-up; the first of them has learning rate 0.
    pub warmup_steps: usize,
    /// Steps of the whole run.
    pub total_steps: usize,
}

impl Schedule {
    /// The schedule of a plan whose run takes `total_steps`.
    pub fn new(plan: &TrainPlan, total_steps: usize) -> Self {
        let from_ratio = || (plan.warmup_ratio * total_steps as f64).ceil() as usize;
        Self {
            peak: plan.learning_rate,
            shape: plan.lr_scheduler,
            warmup_steps: plan.warmup_steps.unwrap_or_else(from_ratio),
            total_steps,
        }
    }

    /// The learning rate of step `step`, counted from 0.
    pub fn learning_rate(&self, step: usize) -> f64 {
        let (warmup, total) = (self.warmup_steps, self.total_steps);
        if step < warmup {
            return self.peak * step as f64 / warmup as f64;
        }
        let length = total.saturating_sub(warmup).max(1) as f64;
        let factor = match self.shape {
            LrScheduler::Constant => 1.0,
            LrScheduler::Linear => total.saturating_sub(step) as f64 / length,
            LrScheduler::Cosine => {
                let progress = (step - warmup) as f64 / length;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        };
        self.peak * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(shape: LrScheduler) -> Vec<f64> {
        let schedule = Schedule {
            peak: 1.0,
            shape,
            warmup_steps: 2,
            total_steps: 6,
        };
        (0..7).map(|step| schedule.learning_rate(step)).collect()
    }

    #[test]
    fn shapes_are_transformers() {
        assert_eq!(
            rates(LrScheduler::Constant),
            [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
        );
        assert_eq!(
            rates(LrScheduler::Linear),
            [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
        );
        let cosine = rates(LrScheduler::Cosine);
        assert_eq!(cosine[2], 1.0);
        assert!((cosine[4] - 0.5).abs() < 1e-12);
        assert!(cosine[6].abs() < 1e-12);
    }
}
