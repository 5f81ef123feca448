//! How the next token is picked from the scores.

use crate::random::Stream;

/// Temperature and nucleus sampling (arXiv 1904.09751).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Longest answer in tokens.
    pub max_new_tokens: usize,
    /// 0 picks the likeliest token.
    pub temperature: f64,
    /// The draw is among the likeliest tokens with this total probability.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// The token number `position` of an answer, from the scores of the whole vocabulary.
    ///
    /// Ties go to the lower id; scores that are not numbers are never picked.
    pub fn pick(&self, logits: &[f32], position: usize) -> u32 {
        let greedy = || {
            let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
            let finite = (0..logits.len()).filter(|&i| !logits[i].is_nan());
            finite.reduce(better).unwrap_or(0) as u32
        };
        if self.temperature <= 0.0 {
            return greedy();
        }
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| !logits[i].is_nan()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let Some(&first) = order.first() else {
            return 0;
        };
        let max = f64::from(logits[first]);
        let weight = |i: usize| ((f64::from(logits[i]) - max) / self.temperature).exp();
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut mass = 0.0;
        let kept = order
            .iter()
            .take_while(|&&i| {
                let before = mass;
                mass += weight(i) / total;
                before < self.top_p
            })
            .count()
            .max(1);
        let kept = &order[..kept];
        let total: f64 = kept.iter().map(|&i| weight(i)).sum();
        let mut left = Stream::new(self.seed).split(0x5A).uniform(position as u64) * total;
        for &i in kept {
            left -= weight(i);
            if left < 0.0 {
                return i as u32;
            }
        }
        kept[kept.len() - 1] as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64) -> Sampling {
        Sampling {
            max_new_tokens: 1,
            temperature,
            top_p,
            seed: 1,
        }
    }

    #[test]
    fn greedy_takes_the_likeliest() {
        assert_eq!(sampling(0.0, 1.0).pick(&[0.0, f32::NAN, 2.0, 2.0], 0), 2);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0f32, 2f32.ln(), f32::NEG_INFINITY];
        let mut counts = [0; 3];
        for position in 0..3000 {
            counts[sampling(1.0, 1.0).pick(&logits, position) as usize] += 1;
        }
        assert!((900..1100).contains(&counts[0]), "{counts:?}");
        assert_eq!(counts[2], 0);
    }

    #[test]
    fn top_p_cuts_the_tail() {
        let logits = [3.0f32, 1.0, 0.0];
        for position in 0..200 {
            assert_eq!(sampling(1.0, 0.5).pick(&logits, position), 0);
        }
    }
}
