//! A matrix of a GGUF file as it lies there: in its own blocks, mapped, dequantised some rows at a
//! time. It takes no memory but the pages of the file that the system chooses to keep.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;

use super::blocks::{self, BlockKind};

/// Values that one task dequantises.
const TASK: usize = 1 << 15;

/// Which row of the file is which of the matrix. Blocks run along rows, so that rows may change places
/// without a block being touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RowOrder {
    /// The same.
    #[default]
    AsStored,
    /// The two halves of each head's rows alternate in the file.
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Where row `row` of the matrix lies in the file.
    pub fn stored(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::Interleaved { head_dim } => {
                let (head, row, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + row % half * 2 + row / half
            }
        }
    }
}

/// A matrix `[rows, cols]` in a mapped file.
#[derive(Clone)]
pub struct BlockMatrix {
    map: Arc<Mmap>,
    range: Range<usize>,
    kind: BlockKind,
    cols: usize,
    order: RowOrder,
}

impl BlockMatrix {
    /// The bytes of whole rows.
    pub(super) fn new(
        (map, range): (Arc<Mmap>, Range<usize>),
        kind: BlockKind,
        [rows, cols]: [usize; 2],
        order: RowOrder,
    ) -> Self {
        assert_eq!(kind.bytes_of(&[rows, cols]), Ok(range.len()));
        assert!(range.end <= map.len());
        Self {
            map,
            range,
            kind,
            cols,
            order,
        }
    }

    /// How its values are stored.
    pub fn kind(&self) -> BlockKind {
        self.kind
    }

    /// Its blocks, row after row as the file has them; see [`BlockMatrix::order`].
    pub fn blocks(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// Which of those rows is which of the matrix.
    pub fn order(&self) -> RowOrder {
        self.order
    }

    /// `[rows, cols]`
    pub fn shape(&self) -> [usize; 2] {
        [self.range.len() / self.row_bytes(), self.cols]
    }

    fn row_bytes(&self) -> usize {
        self.cols / self.kind.block_len() * self.kind.block_bytes()
    }

    /// The rows from `row` on, as many as `out` takes, by all threads.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn dequantise(&self, row: usize, out: &mut [f32]) {
        let (bytes, width) = (self.blocks(), self.row_bytes());
        assert!(out.len().is_multiple_of(self.cols), "whole rows");
        if self.order == RowOrder::AsStored {
            let rows = out.len() / self.cols;
            return blocks::dequantise(self.kind, &bytes[row * width..][..rows * width], out);
        }
        let at_once = (TASK / self.cols).max(1);
        let tasks = out.par_chunks_mut(at_once * self.cols).enumerate();
        tasks.for_each(|(task, out)| {
            for (i, out) in out.chunks_exact_mut(self.cols).enumerate() {
                let stored = self.order.stored(row + task * at_once + i);
                blocks::dequantise_here(self.kind, &bytes[stored * width..][..width], out);
            }
        });
    }
}

impl fmt::Debug for BlockMatrix {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("BlockMatrix")
            .field("kind", &self.kind)
            .field("shape", &self.shape())
            .field("order", &self.order)
            .finish_non_exhaustive()
    }
}

impl PartialEq for BlockMatrix {
    fn eq(&self, other: &Self) -> bool {
        (self.kind, self.shape(), self.order) == (other.kind, other.shape(), other.order)
            && self.blocks() == other.blocks()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_llama_cpps_permutation() {
        let order = RowOrder::Interleaved { head_dim: 6 };
        let stored: Vec<usize> = (0..12).map(|row| order.stored(row)).collect();
        // Of (half, pair) it makes (pair, half).
        assert_eq!(stored, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }

    #[test]
    fn rows_are_those_of_the_whole_in_either_order() {
        let (rows, cols, kind) = (12, 64, BlockKind::Q8_0);
        let row = cols / kind.block_len() * kind.block_bytes();
        let mut map = memmap2::MmapMut::map_anon(7 + rows * row).unwrap();
        for (i, byte) in map.iter_mut().enumerate() {
            *byte = (i * 37 % 61) as u8;
        }
        let map = Arc::new(map.make_read_only().unwrap());
        let mut whole = vec![0f32; rows * cols];
        blocks::dequantise(kind, &map[7..], &mut whole);
        for order in [RowOrder::AsStored, RowOrder::Interleaved { head_dim: 4 }] {
            let bytes = (map.clone(), 7..7 + rows * row);
            let matrix = BlockMatrix::new(bytes, kind, [rows, cols], order);
            assert_eq!(matrix.shape(), [rows, cols]);
            for (first, count) in [(0, 12), (5, 1), (3, 6), (12, 0)] {
                let mut part = vec![f32::NAN; count * cols];
                matrix.dequantise(first, &mut part);
                for (i, part) in part.chunks(cols).enumerate() {
                    let stored = order.stored(first + i);
                    assert_eq!(
                        part,
                        &whole[stored * cols..][..cols],
                        "{order:?} {first} {i}"
                    );
                }
            }
        }
    }
}
