//! Which keys each query sees, and which queries see each key: always a range of rows.

use std::ops::Range;

use crate::kernels::Segments;

/// For each query the rows of the keys that it sees, then for each key the rows of the queries that
/// see it. Starts and ends never fall from one row to the next, so a tile of rows sees what lies
/// between the start of its first row and the end of its last.
///
/// # Shapes
/// `[N + S, 2]`
pub(super) fn spans(segments: &Segments, keys: usize, window: Option<usize>) -> Vec<u32> {
    let past = segments.past(keys);
    let window = window.unwrap_or(usize::MAX);
    let mut queries: Vec<Range<usize>> = Vec::with_capacity(segments.tokens());
    for (i, rows) in segments.ranges().enumerate() {
        let start = rows.start + i * past;
        queries.extend(rows.map(|row| {
            let end = row + (i + 1) * past + 1;
            start.max(end.saturating_sub(window))..end
        }));
    }
    let flat = |range: Range<usize>| [range.start as u32, range.end as u32];
    let mut spans: Vec<u32> = queries.iter().cloned().flat_map(flat).collect();
    let mut seen = 0..0;
    spans.extend((0..keys).flat_map(|key| {
        while seen.start < queries.len() && queries[seen.start].end <= key {
            seen.start += 1;
        }
        while seen.end < queries.len() && queries[seen.end].start <= key {
            seen.end += 1;
        }
        flat(seen.clone())
    }));
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(segments: &Segments, keys: usize, window: Option<usize>) -> Vec<(u32, u32)> {
        let spans = spans(segments, keys, window);
        spans.chunks(2).map(|span| (span[0], span[1])).collect()
    }

    #[test]
    fn packed_rows_see_their_segment() {
        let segments = Segments::packed(1, [0, 2, 2, 5].into());
        let queries = [(0, 1), (0, 2), (2, 3), (2, 4), (2, 5)];
        let keys = [(0, 2), (1, 2), (2, 5), (3, 5), (4, 5)];
        assert_eq!(pairs(&segments, 5, None), [queries, keys].concat());
    }

    #[test]
    fn a_window_and_a_cache_shift_what_is_seen() {
        let segments = Segments::uniform(2, 2);
        let queries = [(2, 4), (3, 5), (7, 9), (8, 10)];
        let keys = [
            // Nobody sees what the window has left behind.
            (0, 0),
            (0, 0),
            (0, 1),
            (0, 2),
            (1, 2),
            (2, 2),
            (2, 2),
            (2, 3),
            (2, 4),
            (3, 4),
        ];
        let seen = pairs(&segments, 10, Some(2));
        assert_eq!(seen, [&queries[..], &keys[..]].concat());
    }
}
