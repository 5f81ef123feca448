//! bitsandbytes' "dynamic" 8-bit codes (arXiv 1511.04561, 2110.02861): in each decade from 10⁻⁶ to 1 twice as
//! many values as in the one below, half way between points that divide it evenly. Codes stand for a
//! fraction of the largest absolute value of their block.

/// The code book of numbers with a sign, ascending.
pub static SIGNED: [f32; 256] = signed();
/// That of numbers without one, which has twice as many values in each decade, ascending.
pub static UNSIGNED: [f32; 256] = unsigned();

static SIGNED_MIDPOINTS: [f32; 255] = midpoints(&SIGNED);
static UNSIGNED_MIDPOINTS: [f32; 255] = midpoints(&UNSIGNED);

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

/// Half way between neighbouring codes; a tie takes the lower code.
const fn midpoints(codes: &[f32; 256]) -> [f32; 255] {
    let mut midpoints = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        midpoints[i] = (codes[i] + codes[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
}

/// The code of [`SIGNED`] nearest to `x`.
#[inline(always)]
pub fn nearest_signed(x: f32) -> u8 {
    nearest(&SIGNED_MIDPOINTS, x)
}

/// The code of [`UNSIGNED`] nearest to `x`.
#[inline(always)]
pub fn nearest_unsigned(x: f32) -> u8 {
    nearest(&UNSIGNED_MIDPOINTS, x)
}

/// How many midpoints lie below `x`, by halves and without branches.
#[inline(always)]
fn nearest(midpoints: &[f32; 255], x: f32) -> u8 {
    let (mut below, mut half) = (0, 128);
    while half > 0 {
        // `below + half` is 255 at most, so that the midpoint before it exists.
        below += half * usize::from(midpoints[below + half - 1] < x);
        half /= 2;
    }
    below as u8
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
        type Nearest = fn(f32) -> u8;
        let books: [(_, _, Nearest); 2] = [
            (&SIGNED, &SIGNED_MIDPOINTS, nearest_signed),
            (&UNSIGNED, &UNSIGNED_MIDPOINTS, nearest_unsigned),
        ];
        for (book, midpoints, nearest) in books {
            for (code, value) in book.iter().enumerate() {
                assert_eq!(usize::from(nearest(*value)), code);
            }
            for (code, midpoint) in midpoints.iter().enumerate() {
                assert_eq!(usize::from(nearest(*midpoint)), code, "a tie goes down");
                assert_eq!(usize::from(nearest(midpoint.next_up())), code + 1);
            }
            assert_eq!((nearest(-2.0), nearest(2.0)), (0, 255));
        }
    }
}
