//! Which rows of a batch see each other, and how attention's work divides over threads.

use std::ops::Range;
use std::sync::Arc;

/// The sequences that the B · T rows of a batch divide into: rows of different segments never see
/// each other, and within one a row sees itself and those before it.
///
/// A packed row of the batch holds several segments; none reaches from one row into the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    batch: usize,
    /// Cumulative starts, from 0 to N inclusive ("cu_seqlens").
    starts: Arc<[usize]>,
}

impl Segments {
    /// One segment of `tokens` for each of `batch` rows.
    pub fn uniform(batch: usize, tokens: usize) -> Self {
        Self {
            batch,
            starts: (0..=batch).map(|row| row * tokens).collect(),
        }
    }

    /// Segments from their cumulative starts, from 0 to B · T inclusive.
    ///
    /// # Panics
    /// If the starts do not rise from 0 to a multiple of `batch`, or a segment lies in two rows.
    pub fn packed(batch: usize, starts: Arc<[usize]>) -> Self {
        let rows = starts.last().copied().unwrap_or_default();
        let tokens = rows / batch.max(1);
        assert!(
            starts.is_sorted()
                && rows == batch * tokens
                && (0..=batch).all(|row| starts.binary_search(&(row * tokens)).is_ok()),
            "{starts:?} does not cut {batch} rows of equal length into segments"
        );
        Self { batch, starts }
    }

    /// B, rows of the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// N = B · T, tokens of all segments.
    pub fn tokens(&self) -> usize {
        self.starts.last().copied().unwrap_or_default()
    }

    /// How many segments there are.
    pub fn count(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether a row of the batch holds several segments.
    pub fn is_packed(&self) -> bool {
        self.count() > self.batch
    }

    /// The rows of each segment.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.starts.windows(2).map(|ends| ends[0]..ends[1])
    }

    /// The position of each row, counted from `past` in each segment. `[N]`
    pub fn positions(&self, past: usize) -> Vec<usize> {
        self.ranges()
            .flat_map(|rows| past..past + rows.len())
            .collect()
    }

    /// The number of each row's segment. `[N]`
    pub fn ids(&self) -> Vec<i32> {
        (0..)
            .zip(self.ranges())
            .flat_map(|(id, rows)| rows.map(move |_| id))
            .collect()
    }

    /// Keys in front of each segment's own (a KV cache), when there are `keys` in all.
    pub(super) fn past(&self, keys: usize) -> usize {
        let cached = keys.checked_sub(self.tokens());
        let past = cached.map_or(0, |cached| cached / self.count().max(1));
        assert_eq!(cached, Some(past * self.count()), "keys of {self:?}");
        assert!(past == 0 || !self.is_packed(), "a cache for packed rows");
        past
    }

    /// Cuts each segment into blocks of at most `size` queries, each of which sees itself and, with
    /// a `window`, at most the `window - 1` keys before it.
    pub(super) fn blocks(
        &self,
        size: usize,
        past: usize,
        window: Option<usize>,
    ) -> impl Iterator<Item = Vec<QueryBlock>> {
        let window = window.unwrap_or(usize::MAX);
        self.ranges().enumerate().map(move |(i, rows)| {
            let key = rows.start + i * past;
            let block = |first: usize| {
                let reach = past + first + 1;
                let skipped = reach.saturating_sub(window);
                QueryBlock {
                    query: rows.start + first,
                    queries: size.min(rows.len() - first),
                    key: key + skipped,
                    reach: reach - skipped,
                    window,
                }
            };
            (0..rows.len()).step_by(size).map(block).collect()
        })
    }
}

/// Successive queries of one segment, and the keys that they see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueryBlock {
    /// Row of the first query.
    pub query: usize,
    /// Number of queries.
    pub queries: usize,
    /// Row of the first key that any query sees: the segment's first, or that of the window.
    pub key: usize,
    /// Keys from there to the first query's own; the own key of each query after it is the next.
    reach: usize,
    /// Keys that a query sees at most.
    window: usize,
}

impl QueryBlock {
    /// Keys that query `i` sees, counted from `key`.
    pub fn visible(&self, i: usize) -> Range<usize> {
        let end = self.reach + i;
        end.saturating_sub(self.window)..end
    }

    /// Keys that one query or another sees.
    pub fn keys(&self) -> usize {
        self.visible(self.queries - 1).end
    }

    /// Time that the block takes, in scores; a block of any size pays for a few calls.
    pub fn cost(&self) -> usize {
        256 + self.queries * self.keys()
    }
}

/// Cuts a list of tasks into runs of about equal cost: about `parts` where no task is too large.
pub(super) fn balanced(costs: impl IntoIterator<Item = usize>, parts: usize) -> Vec<Range<usize>> {
    let costs: Vec<usize> = costs.into_iter().collect();
    let share = costs.iter().sum::<usize>().div_ceil(parts.max(1));
    let (mut runs, mut start, mut cost) = (Vec::new(), 0, 0);
    for (i, next) in costs.iter().enumerate() {
        cost += next;
        if cost >= share || i + 1 == costs.len() {
            runs.push(start..i + 1);
            (start, cost) = (i + 1, 0);
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_ids_follow_the_segments() {
        let segments = Segments::packed(2, [0, 3, 4, 7, 8].into());
        assert_eq!(segments.positions(0), [0, 1, 2, 0, 0, 1, 2, 0]);
        assert_eq!(segments.ids(), [0, 0, 0, 1, 2, 2, 2, 3]);
        assert!(segments.is_packed());
        let uniform = Segments::uniform(2, 2);
        assert_eq!(uniform, Segments::packed(2, [0, 2, 4].into()));
        assert_eq!(uniform.positions(5), [5, 6, 5, 6]);
        assert!(!uniform.is_packed());
    }

    #[test]
    fn segments_that_do_not_fit_the_rows_are_refused() {
        for (batch, starts) in [
            (1, vec![]),
            (1, vec![1, 4]),
            (2, vec![0, 3]),
            (2, vec![0, 3, 4]),
            (1, vec![0, 3, 2, 4]),
            (0, vec![0, 4]),
        ] {
            let made = std::panic::catch_unwind(|| Segments::packed(batch, starts.clone().into()));
            assert!(made.is_err(), "{batch} {starts:?}");
        }
        assert_eq!(Segments::packed(0, [0].into()).tokens(), 0);
    }

    #[test]
    fn blocks_cover_each_segment_and_see_its_past() {
        let segments = Segments::uniform(2, 5);
        let blocks = segments.blocks(4, 3, None).flatten();
        let seen = |b: QueryBlock| (b.query, b.queries, b.key, b.visible(0), b.keys());
        let seen: Vec<_> = blocks.map(seen).collect();
        assert_eq!(
            seen,
            [
                (0, 4, 0, 0..4, 7),
                (4, 1, 0, 0..8, 8),
                (5, 4, 8, 0..4, 7),
                (9, 1, 8, 0..8, 8)
            ]
        );
    }

    #[test]
    fn blocks_start_at_the_first_key_of_their_window() {
        let segments = Segments::packed(1, [0, 3, 13].into());
        let blocks = segments.blocks(4, 0, Some(3)).flatten();
        let seen = |b: QueryBlock| (b.query, b.key, b.visible(0), b.visible(2), b.keys());
        let seen: Vec<_> = blocks.map(seen).collect();
        assert_eq!(
            seen,
            [
                (0, 0, 0..1, 0..3, 3),
                (3, 3, 0..1, 0..3, 4),
                (7, 5, 0..3, 2..5, 6),
                (11, 9, 0..3, 2..5, 4)
            ]
        );
        let cached: Vec<_> = Segments::uniform(2, 1).blocks(4, 6, Some(3)).collect();
        let seen = cached.concat();
        let seen: Vec<_> = seen.iter().map(|b| (b.key, b.visible(0))).collect();
        assert_eq!(seen, [(4, 0..3), (11, 0..3)]);
    }

    #[test]
    fn runs_are_balanced_and_leave_out_nothing() {
        assert_eq!(balanced([1; 6], 3), [0..2, 2..4, 4..6]);
        assert_eq!(balanced([9, 1, 1, 1], 3), [0..1, 1..4]);
        assert_eq!(balanced([1, 1, 9, 1], 2), [0..3, 3..4]);
        assert!(balanced([], 3).is_empty());
    }
}
