//! Puts samples into rows: one each, as many as fit, or cut so that every row is full.

use std::collections::BTreeMap;

/// A sample, or a part of one, in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the sample.
    pub sample: u32,
    /// First token.
    pub from: u32,
    /// One behind the last.
    pub to: u32,
}

impl Piece {
    /// Tokens.
    pub fn tokens(&self) -> usize {
        (self.to - self.from) as usize
    }
}

/// Rows of pieces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    pieces: Vec<Piece>,
    /// Where each row ends in `pieces`.
    ends: Vec<u32>,
}

impl Rows {
    fn from_lists(lists: impl IntoIterator<Item = Vec<Piece>>) -> Self {
        let mut rows = Self::default();
        for list in lists {
            rows.pieces.extend(list);
            rows.ends.push(rows.pieces.len() as u32);
        }
        rows
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The pieces of a row.
    pub fn row(&self, i: usize) -> &[Piece] {
        let start = i.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.pieces[start as usize..self.ends[i] as usize]
    }

    /// Tokens of a row.
    pub fn tokens(&self, i: usize) -> usize {
        self.row(i).iter().map(Piece::tokens).sum()
    }
}

/// One sample a row.
///
/// `order` holds sample indices, `lengths` the tokens of every sample; so in all that follows.
pub fn single(order: &[u32], lengths: &[u32]) -> Rows {
    let whole = |sample: &u32| Piece {
        sample: *sample,
        from: 0,
        to: lengths[*sample as usize],
    };
    Rows {
        pieces: order.iter().map(whole).collect(),
        ends: (1..=order.len() as u32).collect(),
    }
}

/// Best-fit decreasing: the longest first, each into the fullest row that has room for it. No
/// sample is longer than `capacity`. Rows stand in the order of their first samples in `order`.
pub fn best_fit(order: &[u32], lengths: &[u32], capacity: usize) -> Rows {
    let length = |at: u32| lengths[order[at as usize] as usize];
    let mut by_length: Vec<u32> = (0..order.len() as u32).collect();
    by_length.sort_by_key(|at| std::cmp::Reverse(length(*at)));
    let mut rows: Vec<Vec<u32>> = Vec::new();
    let mut with_room: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for at in by_length {
        let tokens = length(at) as usize;
        let fullest = with_room.range_mut(tokens..).next();
        let (row, room) = match fullest {
            Some((&room, waiting)) => {
                let row = waiting.pop();
                if waiting.is_empty() {
                    with_room.remove(&room);
                }
                (row, room)
            }
            None => (None, capacity),
        };
        let row = row.unwrap_or_else(|| {
            rows.push(Vec::new());
            rows.len() as u32 - 1
        });
        rows[row as usize].push(at);
        let left = room.saturating_sub(tokens);
        if left > 0 {
            with_room.entry(left).or_default().push(row);
        }
    }
    for row in &mut rows {
        row.sort_unstable();
    }
    rows.sort_unstable_by_key(|row| row.first().copied());
    let piece = |at: u32| Piece {
        sample: order[at as usize],
        from: 0,
        to: length(at),
    };
    Rows::from_lists(
        rows.into_iter()
            .map(|row| row.into_iter().map(piece).collect()),
    )
}

/// Samples one after the other, cut where a row is full.
///
/// A part that goes on in the next row begins there with the last token before the cut: the first
/// token of a row is never predicted, so without that one label would be lost at each cut.
pub fn wrap(order: &[u32], lengths: &[u32], capacity: usize) -> Rows {
    let mut rows = Vec::new();
    let mut row = Vec::new();
    let mut room = capacity as u32;
    for &sample in order {
        let length = lengths[sample as usize];
        let mut from = 0;
        loop {
            // A single token trains nothing: it had better go on in the next row.
            if room < 2 && length - from > room {
                rows.push(std::mem::take(&mut row));
                room = capacity as u32;
            }
            let to = length.min(from + room);
            row.push(Piece { sample, from, to });
            room -= to - from;
            if to == length {
                break;
            }
            rows.push(std::mem::take(&mut row));
            room = capacity as u32;
            from = to - 1;
        }
    }
    rows.push(row);
    Rows::from_lists(rows.into_iter().filter(|row| !row.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lists(rows: &Rows) -> Vec<Vec<(u32, u32, u32)>> {
        let list = |i| {
            let row = rows.row(i).iter();
            row.map(|p| (p.sample, p.from, p.to)).collect()
        };
        (0..rows.len()).map(list).collect()
    }

    #[test]
    fn the_fullest_row_with_room_takes_the_next() {
        let lengths = [6, 2, 5, 3, 4];
        let rows = best_fit(&[0, 1, 2, 3, 4], &lengths, 10);
        assert_eq!(
            lists(&rows),
            [
                vec![(0, 0, 6), (4, 0, 4)],
                vec![(1, 0, 2), (2, 0, 5), (3, 0, 3)]
            ]
        );
        assert!(best_fit(&[], &lengths, 10).is_empty());
        assert_eq!(best_fit(&[0, 0], &lengths, 6).len(), 2);
    }

    #[test]
    fn wrapped_rows_are_full_and_no_label_is_lost() {
        let rows = wrap(&[0, 1], &[7, 4], 4);
        assert_eq!(
            lists(&rows),
            [vec![(0, 0, 4)], vec![(0, 3, 7)], vec![(1, 0, 4)],]
        );
        let rows = wrap(&[0, 1], &[3, 4], 4);
        assert_eq!(lists(&rows), [vec![(0, 0, 3)], vec![(1, 0, 4)]]);
        let rows = wrap(&[1, 0, 1], &[3, 2], 5);
        assert_eq!(lists(&rows), [vec![(1, 0, 2), (0, 0, 3)], vec![(1, 0, 2)]]);
    }

    #[test]
    fn a_row_for_each() {
        assert_eq!(lists(&single(&[1, 0], &[3, 2])), [[(1, 0, 2)], [(0, 0, 3)]]);
    }
}
