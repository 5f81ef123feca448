//! Samples side by side, as a model takes them.

use std::sync::Arc;

use super::{IGNORE_INDEX, Sample};

/// Rows of one forward pass, padded on the right to the longest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// B, rows.
    pub batch: usize,
    /// T, tokens a row.
    pub tokens: usize,
    /// `[B * T]`
    pub input_ids: Vec<i32>,
    /// `[B * T]`; label i belongs to token i, the loss shifts. Pads have [`IGNORE_INDEX`].
    pub labels: Vec<i32>,
    /// `[B * T]`; each segment counts from 0.
    pub position_ids: Vec<usize>,
    /// Where segments begin, from 0 up, with B · T behind the last. Tokens see those before them
    /// in their segment and no others. The pads of a row are a segment of their own.
    pub segment_starts: Arc<[usize]>,
    /// `[B]`, tokens without pads.
    pub lengths: Vec<usize>,
}

/// Puts one sample into each row.
pub fn collate(samples: &[&Sample], pad_id: u32) -> Batch {
    let rows: Vec<_> = samples
        .iter()
        .map(|sample| vec![Segment::whole(sample)])
        .collect();
    collate_rows(&rows, pad_id)
}

/// A sample, or a part of one, in a row.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// `[T]`
    pub input_ids: &'a [u32],
    /// `[T]`
    pub labels: &'a [i32],
}

impl<'a> Segment<'a> {
    /// All of a sample.
    pub fn whole(sample: &'a Sample) -> Self {
        Self {
            input_ids: &sample.input_ids,
            labels: &sample.labels,
        }
    }
}

/// Puts segments one after the other into rows.
pub fn collate_rows(rows: &[Vec<Segment<'_>>], pad_id: u32) -> Batch {
    let length = |row: &Vec<Segment<'_>>| row.iter().map(|s| s.input_ids.len()).sum();
    let lengths: Vec<usize> = rows.iter().map(length).collect();
    let tokens = lengths.iter().copied().max().unwrap_or(0);
    let size = rows.len() * tokens;
    let mut batch = Batch {
        batch: rows.len(),
        tokens,
        input_ids: Vec::with_capacity(size),
        labels: Vec::with_capacity(size),
        position_ids: Vec::with_capacity(size),
        segment_starts: Arc::new([]),
        lengths,
    };
    let mut starts = vec![0];
    for (i, row) in rows.iter().enumerate() {
        for segment in row {
            let ids = segment.input_ids.iter().map(|id| *id as i32);
            batch.input_ids.extend(ids);
            batch.labels.extend_from_slice(segment.labels);
            batch.position_ids.extend(0..segment.input_ids.len());
            begin(&mut starts, batch.input_ids.len());
        }
        let end = (i + 1) * tokens;
        let pads = end - batch.input_ids.len();
        batch.input_ids.resize(end, pad_id as i32);
        batch.labels.resize(end, IGNORE_INDEX);
        batch.position_ids.extend(0..pads);
        begin(&mut starts, end);
    }
    batch.segment_starts = starts.into();
    batch
}

/// Notes where the next segment begins; an empty one is none.
fn begin(starts: &mut Vec<usize>, at: usize) {
    if starts.last() != Some(&at) {
        starts.push(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_rows_are_padded_on_the_right_without_labels() {
        let segment = |ids: &'static [u32], labels: &'static [i32]| Segment {
            input_ids: ids,
            labels,
        };
        let rows = [
            vec![segment(&[1], &[1])],
            vec![segment(&[2, 3], &[2, 3]), segment(&[4], &[4])],
        ];
        let batch = collate_rows(&rows, 9);
        assert_eq!((batch.batch, batch.tokens), (2, 3));
        assert_eq!(batch.input_ids, [1, 9, 9, 2, 3, 4]);
        let x = IGNORE_INDEX;
        assert_eq!(batch.labels, [1, x, x, 2, 3, 4]);
        assert_eq!(batch.position_ids, [0, 0, 1, 0, 1, 0]);
        assert_eq!(batch.segment_starts.as_ref(), [0, 1, 3, 5, 6]);
        assert_eq!(batch.lengths, [1, 3]);
        assert_eq!(collate_rows(&[], 9).segment_starts.as_ref(), [0]);
    }
}
