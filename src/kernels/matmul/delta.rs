//! Low-rank deltas beside a product in bf16, to f32's accuracy.
//!
//! An f32 is the sum of three numbers in bf16, exactly (unless it is subnormal or nearly so): 24
//! significant bits in three times 8. Of the nine products of the pieces of two, six matter; the others
//! are below 2⁻²⁴ of the whole. As more terms of the sums that are computed anyhow they cost little: a delta of
//! rank 16 adds 96, and neither its result nor x is read or written apart from the base's.

use half::bf16;

use super::super::flex::{Matrix, Store, to_bf16, unset, vectorised};
use super::{Available, Product, Rows, Side, Term, chain, unit};

/// Pieces of one factor, and those of the other that they meet.
const MET: [[usize; 6]; 2] = [[0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 0]];
/// All pieces.
const EACH: [usize; 3] = [0, 1, 2];

/// Whether this is faster than products in f32 apart: not by vectors, whose rate is but twice f32's.
pub(in super::super) fn pays() -> bool {
    unit() == Some(Available::Matrix)
}

/// A product and a low-rank one that is added to it.
pub(in super::super) struct Adapted<'a> {
    /// The factor that narrows, `[R, k]`, or `[k, R]` where it is read plain.
    pub(in super::super) narrow: Matrix<'a>,
    /// The factor that widens, `[n, R]`, or `[R, n]`.
    pub(in super::super) wide: Matrix<'a>,
    /// Of what is kept, and beyond that of what is added.
    pub(in super::super) scales: [f32; 2],
    pub(in super::super) side: Side,
}

impl Adapted<'_> {
    /// `low = scale · x narrow`, and `dst = x matrix + scale · low wide` where that is wanted; the factors
    /// and the matrix transposed or plain.
    ///
    /// # Shapes
    /// x `[m, k]` → low `[m, R]`, dst `[m, n]`; matrix `[n, k]`, or `[k, n]`
    pub(in super::super) fn multiply(
        &self,
        low: &mut [f32],
        x: &[f32],
        dst: Option<(&mut [f32], &[bf16])>,
    ) {
        let (side, [kept, added]) = (self.side, self.scales);
        let (rank, k, narrow, wide) = match side {
            Side::Transposed => (
                self.narrow.rows(),
                self.narrow.cols(),
                below(self.narrow, &EACH),
                beside(self.wide, &MET[1]),
            ),
            Side::Plain => (
                self.narrow.cols(),
                self.narrow.rows(),
                beside(self.narrow, &EACH),
                below(self.wide, &MET[1]),
            ),
        };
        let m = low.len() / rank;
        let [thrice, six] = [EACH.len() * rank, MET[0].len() * rank];
        let (mut pieces, mut met) = (unset(m * thrice), unset(m * six));
        let pieces = Rows::to_write(&mut pieces, [m, thrice], thrice);
        let met = Rows::to_write(&mut met, [m, six], six);
        let low = Rows::to_write(low, [m, rank], rank);
        let x = Rows::new(x, [m, k], k);
        let mut products = vec![Product {
            dst: pieces,
            store: Store::Set,
            terms: vec![Term { x, matrix: &narrow }],
            side,
        }];
        if let Some((dst, matrix)) = dst {
            let n = dst.len() / m.max(1);
            let terms = vec![
                Term { x, matrix },
                Term {
                    x: met,
                    matrix: &wide,
                },
            ];
            products.push(Product {
                dst: Rows::to_write(dst, [m, n], n),
                store: Store::Set,
                terms,
                side,
            });
        }
        // SAFETY: the two products and what comes between write memory of their own.
        unsafe {
            chain(&products, |product, rows| {
                if product > 0 {
                    return;
                }
                for row in rows {
                    let from = pieces.row(row, 0..thrice);
                    let (low, met) = (low.row_mut(row), met.row_mut(row));
                    vectorised(
                        #[inline(always)]
                        || {
                            for (r, low) in low.iter_mut().enumerate() {
                                *low = kept * (from[r] + (from[rank + r] + from[2 * rank + r]));
                                let split = split(added * *low).map(f32::from);
                                for (i, &piece) in MET[0].iter().enumerate() {
                                    met[i * rank + r] = split[piece];
                                }
                            }
                        },
                    );
                }
            });
        }
    }
}

/// Pieces of x side by side: `[n, k]` → `[n, pieces · k]`.
fn beside(x: Matrix, pieces: &[usize]) -> Vec<bf16> {
    let (k, count) = (x.cols(), pieces.len());
    let mut to = vec![bf16::ZERO; x.rows() * k * count];
    if to.is_empty() {
        return to;
    }
    vectorised(
        #[inline(always)]
        || {
            let rows = to.chunks_exact_mut(k * count);
            for (to, from) in rows.zip(x.data().chunks_exact(k)) {
                for (to, &piece) in to.chunks_exact_mut(k).zip(pieces) {
                    for (to, x) in to.iter_mut().zip(from) {
                        *to = split(*x)[piece];
                    }
                }
            }
        },
    );
    to
}

/// Pieces one below the other: `[k, n]` → `[pieces · k, n]`.
fn below(x: Matrix, pieces: &[usize]) -> Vec<bf16> {
    // As those of one long row side by side.
    let whole = Matrix::new(x.data(), 1, x.rows() * x.cols());
    beside(whole, pieces)
}

/// Three numbers whose sum is x.
#[inline(always)]
fn split(x: f32) -> [bf16; 3] {
    let mut left = x;
    std::array::from_fn(|_| {
        let piece = to_bf16(left);
        left -= f32::from_bits(u32::from(piece.to_bits()) << 16);
        piece
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_pieces_are_the_whole() {
        let mut x = 1.234_567_9e-30_f32;
        while x < 1e30 {
            for x in [x, -x] {
                let [a, b, c] = split(x).map(f32::from);
                assert_eq!(a + (b + c), x);
                assert!(b.abs() <= a.abs() / 256.0 && c.abs() <= a.abs() / 65536.0);
            }
            x *= 1.37;
        }
        assert_eq!(split(0.0).map(f32::from), [0.0; 3]);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for x in [f32::NAN, f32::INFINITY, f32::MAX] {
            let sum: f32 = split(x).map(f32::from).into_iter().sum();
            assert!(!sum.is_finite());
        }
    }
}
