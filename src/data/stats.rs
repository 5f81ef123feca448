//! A dataset in numbers.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Dataset, Split, feed};
use crate::recipe::Plan;
use crate::recipe::plan::Packing;

/// What `lorafit data stats` tells.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Stats {
    /// Rows read from all training files.
    pub rows: usize,
    /// Samples to train on.
    pub samples: usize,
    /// Samples held out.
    pub validation_samples: usize,
    /// Tokens of the samples to train on.
    pub tokens: usize,
    /// Those of them that train.
    pub trained_tokens: usize,
    /// Rows that could not be read.
    pub bad_rows: usize,
    /// Rows left out for their length.
    pub dropped: usize,
    /// Rows left out because nothing in them trains.
    pub unlabelled: usize,
    /// Samples cut to `max_seq_len`.
    pub truncated: usize,
    /// Samples whose tokens all equal those of an earlier one.
    pub duplicates: usize,
    /// The format, as named or detected.
    pub format: String,
    /// One entry a source of the recipe.
    pub sources: Vec<SourceStats>,
    /// How long samples are.
    pub lengths: LengthStats,
    /// Tokens a row may have.
    pub max_seq_len: usize,
    /// `off`, `on` or `wrap`.
    pub packing: String,
    /// Rows that an epoch has after packing.
    pub rows_per_epoch: usize,
    /// Real tokens by all places of the batches, in `(0, 1]`.
    pub fill: f64,
    /// Padding by all places of the batches, in `[0, 1)`.
    pub padding_share: f64,
    /// Optimizer steps in an epoch.
    pub steps_per_epoch: usize,
    /// Optimizer steps of the run.
    pub steps: usize,
    /// Whether the tokens came from the cache.
    pub cached: bool,
    /// How long reading took.
    pub seconds: f64,
}

/// One source of a recipe.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct SourceStats {
    /// As the recipe names it.
    pub path: String,
    /// Rows read.
    pub rows: usize,
    /// Samples to train on.
    pub samples: usize,
    /// Tokens of these samples.
    pub tokens: usize,
    /// The recipe's weight.
    pub weight: f64,
    /// The format, as named or detected.
    pub format: String,
}

/// Tokens of samples.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LengthStats {
    /// The shortest.
    pub min: usize,
    /// The mean.
    pub mean: f64,
    /// Half are not longer.
    pub median: usize,
    /// 95 % are not longer.
    pub p95: usize,
    /// 99 % are not longer.
    pub p99: usize,
    /// The longest.
    pub max: usize,
    /// The histogram, from short to long.
    pub bins: Vec<Bin>,
}

/// One bar of the histogram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Bin {
    /// The shortest length that counts.
    pub from: usize,
    /// The longest that counts.
    pub to: usize,
    /// Samples.
    pub count: usize,
}

/// Most bars of the histogram.
const MAX_BINS: usize = 16;

/// Counts a dataset, which took so long to load.
pub fn stats(plan: &Plan, dataset: &Dataset, seconds: f64) -> Stats {
    let report = &dataset.report;
    let loader = feed::loader(plan, &dataset.train);
    let pass = loader.epoch(0);
    let weights = plan.data.train.iter().map(|source| source.weight);
    let sources = report.sources.iter().zip(weights);
    Stats {
        rows: report.rows,
        samples: report.train_samples,
        validation_samples: report.validation_samples,
        tokens: report.tokens,
        trained_tokens: report.trained_tokens,
        bad_rows: report.bad_rows,
        dropped: report.dropped,
        unlabelled: report.unlabelled,
        truncated: report.truncated,
        duplicates: duplicates(&dataset.train),
        format: report.format.name().to_owned(),
        sources: sources
            .map(|(source, weight)| SourceStats {
                path: source.path.clone(),
                rows: source.rows,
                samples: source.samples,
                tokens: source.tokens,
                weight,
                format: source.format.name().to_owned(),
            })
            .collect(),
        lengths: lengths(dataset.train.lengths()),
        max_seq_len: plan.data.max_seq_len,
        packing: match plan.data.packing {
            Packing::Off => "off",
            Packing::On => "on",
            Packing::Wrap => "wrap",
        }
        .to_owned(),
        rows_per_epoch: pass.rows.len(),
        fill: match plan.data.packing {
            Packing::Off => 1.0 - pass.padding(),
            Packing::On | Packing::Wrap => pass.fill(plan.data.max_seq_len),
        },
        padding_share: pass.padding(),
        steps_per_epoch: loader.steps_per_epoch(),
        steps: loader.total_steps(plan),
        cached: report.cached,
        seconds,
    }
}

/// Samples whose tokens and labels an earlier one has.
fn duplicates(split: &Split) -> usize {
    let mut seen = HashSet::with_capacity(split.len());
    let is_seen = |sample: super::Sample| {
        let mut hasher = DefaultHasher::new();
        sample.input_ids.hash(&mut hasher);
        sample.labels.hash(&mut hasher);
        !seen.insert(hasher.finish())
    };
    split.iter().map(is_seen).filter(|is_seen| *is_seen).count()
}

fn lengths(mut lengths: Vec<u32>) -> LengthStats {
    lengths.sort_unstable();
    let at = |share: f64| {
        let last = lengths.len().saturating_sub(1);
        let rank = (share * lengths.len() as f64).ceil() as usize;
        lengths
            .get(rank.saturating_sub(1).min(last))
            .map_or(0, |n| *n as usize)
    };
    let total: f64 = lengths.iter().map(|n| f64::from(*n)).sum();
    LengthStats {
        min: at(0.0),
        mean: total / lengths.len().max(1) as f64,
        median: at(0.5),
        p95: at(0.95),
        p99: at(0.99),
        max: at(1.0),
        bins: bins(&lengths),
    }
}

/// Bars of equal width, a round number, from the shortest to the longest.
fn bins(sorted: &[u32]) -> Vec<Bin> {
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else {
        return Vec::new();
    };
    let (first, last) = (*first as usize, *last as usize);
    let width = round_width((last - first + 1).div_ceil(MAX_BINS));
    let start = first / width * width;
    let edges = (start..=last).step_by(width);
    edges
        .map(|from| {
            let below = |edge: usize| sorted.partition_point(|n| (*n as usize) < edge);
            Bin {
                from,
                to: from + width - 1,
                count: below(from + width) - below(from),
            }
        })
        .collect()
}

/// The next of 1, 2, 5, 10, 20, 50 …
fn round_width(least: usize) -> usize {
    let mut decade = 1;
    loop {
        for factor in [1, 2, 5] {
            if factor * decade >= least {
                return factor * decade;
            }
        }
        decade *= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_once() {
        let stats = lengths((1..=100).chain([1000]).collect());
        assert_eq!(
            (stats.min, stats.median, stats.p95, stats.max),
            (1, 51, 96, 1000)
        );
        let counts: usize = stats.bins.iter().map(|bin| bin.count).sum();
        assert_eq!(counts, 101);
        assert!(stats.bins.len() <= MAX_BINS + 1, "{}", stats.bins.len());
        assert_eq!(
            stats.bins[0],
            Bin {
                from: 0,
                to: 99,
                count: 99
            }
        );
        assert_eq!(lengths(Vec::new()).max, 0);
    }
}
