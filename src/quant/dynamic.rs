//! bitsandbytes' "dynamic" 8-bit codes (arXiv 1511.04561, 2110.02861): in each decade from 10⁻⁶ to 1 twice as
//! many values as in the one below, half way between points that divide it evenly. Codes stand for a
//! fraction of the largest absolute value of their block.

/// The code book of numbers with a sign, ascending.
pub static SIGNED: [f32; 256] = signed();
/// That of numbers without one, which has twice as many values in each decade, ascending.
pub static UNSIGNED: [f32; 256] = unsigned();

/// Half way between neighbouring codes, and no end; a tie takes the lower code.
static SIGNED_MIDPOINTS: [f32; 256] = midpoints(&SIGNED);
static UNSIGNED_MIDPOINTS: [f32; 256] = midpoints(&UNSIGNED);

const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

const fn signed() -> [f32; 256] {
    let mut codes = [0.0; 256];
    codes[255] = 1.0;
    let (mut decade, mut place) = (0, 1);
    while decade < DECADES.len() {
        let count = 1 << decade;
        let mut i = 0;
        while i < count {
            codes[127 + place] = DECADES[decade] * mean(i, count);
            codes[127 - place] = -codes[127 + place];
            (i, place) = (i + 1, place + 1);
        }
        decade += 1;
    }
    codes
}

const fn unsigned() -> [f32; 256] {
    let mut codes = [0.0; 256];
    codes[255] = 1.0;
    let (mut decade, mut place) = (0, 1);
    while decade < DECADES.len() {
        let count = 2 << decade;
        let mut i = 0;
        while i < count {
            codes[place] = DECADES[decade] * mean(i, count);
            (i, place) = (i + 1, place + 1);
        }
        decade += 1;
    }
    codes
}

/// Half way between neighbours of the points that divide 0.1 to 1.
const fn mean(i: usize, count: usize) -> f32 {
    (evenly(i, count) + evenly(i + 1, count)) / 2.0
}

/// Point `i` of `count + 1` that divide 0.1 to 1 evenly, as torch's `linspace` rounds it: counted from
/// the nearer end, and once, after the sum.
const fn evenly(i: usize, count: usize) -> f32 {
    const START: f32 = 0.1;
    let step = ((1.0 - START) / count as f32) as f64;
    let exact = match i < count.div_ceil(2) {
        true => START as f64 + step * i as f64,
        false => 1.0 - step * (count - i) as f64,
    };
    exact as f32
}

const fn midpoints(codes: &[f32; 256]) -> [f32; 256] {
    let mut midpoints = [f32::INFINITY; 256];
    let mut i = 0;
    while i < 255 {
        midpoints[i] = (codes[i] + codes[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
}

/// The code of [`SIGNED`] nearest to each number.
#[inline(always)]
pub fn nearest_signed<const N: usize>(values: &[f32; N]) -> [u8; N] {
    nearest(&SIGNED_MIDPOINTS, values)
}

/// The code of [`UNSIGNED`] nearest to each number.
#[inline(always)]
pub fn nearest_unsigned<const N: usize>(values: &[f32; N]) -> [u8; N] {
    nearest(&UNSIGNED_MIDPOINTS, values)
}

/// How many midpoints lie below each number: by halves, for all numbers before the next half and without
/// branches or checks, so that it becomes vector code.
#[inline(always)]
fn nearest<const N: usize>(midpoints: &[f32; 256], values: &[f32; N]) -> [u8; N] {
    let mut below = [0u32; N];
    for half in [128, 64, 32, 16, 8, 4, 2, 1] {
        for (below, x) in below.iter_mut().zip(values) {
            let middle = midpoints[(*below + half - 1) as usize & 255];
            *below += half * u32::from(middle < *x);
        }
    }
    below.map(|below| below as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_books_ascend_and_the_signed_one_is_nearly_symmetric() {
        for book in [&SIGNED, &UNSIGNED] {
            assert!(book.is_sorted_by(|a, b| a < b));
            assert_eq!(book[255], 1.0);
        }
        for i in 1..127 {
            assert_eq!(SIGNED[127 - i], -SIGNED[127 + i]);
        }
        assert_eq!((SIGNED[127], UNSIGNED[0]), (0.0, 0.0));
    }

    #[test]
    fn the_code_nearest() {
        type Nearest = fn(&[f32; 1]) -> [u8; 1];
        let books: [(_, _, Nearest); 2] = [
            (&SIGNED, &SIGNED_MIDPOINTS, nearest_signed),
            (&UNSIGNED, &UNSIGNED_MIDPOINTS, nearest_unsigned),
        ];
        for (book, midpoints, nearest) in books {
            let nearest = |x: f32| usize::from(nearest(&[x])[0]);
            for (code, value) in book.iter().enumerate() {
                assert_eq!(nearest(*value), code);
            }
            for (code, midpoint) in midpoints[..255].iter().enumerate() {
                assert_eq!(nearest(*midpoint), code, "a tie goes down");
                assert_eq!(nearest(midpoint.next_up()), code + 1);
            }
            assert_eq!((nearest(-2.0), nearest(2.0)), (0, 255));
        }
    }
}
