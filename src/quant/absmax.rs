//! The scales of NF4's blocks, as they are or quantised once more: *double quantisation*
//! (QLoRA, arXiv 2305.14314, section 3).

/// Scales that share one of their own.
const GROUP: usize = 256;

/// The largest absolute value of each block.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// In f32.
    Plain(Vec<f32>),
    /// In 8 bits.
    Double(DoubleQuantised),
}

/// Scales less their mean, in 8-bit codes: `CODEBOOK[code] · scale + offset`.
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleQuantised {
    /// One a block.
    pub codes: Vec<u8>,
    /// One for 256 blocks.
    pub scales: Vec<f32>,
    /// The mean of all.
    pub offset: f32,
}

/// bitsandbytes' signed "dynamic" code book (arXiv 1511.04561, 2110.02861), ascending: in each decade
/// from 10⁻⁶ to 1 twice as many values as in the one below, half way between points that divide it evenly.
pub static CODEBOOK: [f32; 256] = codebook();

/// Half way between neighbouring codes; a tie takes the lower code.
static MIDPOINTS: [f32; 255] = {
    let mut midpoints = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        midpoints[i] = (CODEBOOK[i] + CODEBOOK[i + 1]) / 2.0;
        i += 1;
    }
    midpoints
};

const fn codebook() -> [f32; 256] {
    const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut codes = [0.0; 256];
    codes[255] = 1.0;
    let (mut decade, mut place) = (0, 1);
    while decade < DECADES.len() {
        let count = 1 << decade;
        let mut i = 0;
        while i < count {
            let mean = (evenly(i, count) + evenly(i + 1, count)) / 2.0;
            codes[127 + place] = DECADES[decade] * mean;
            codes[127 - place] = -codes[127 + place];
            (i, place) = (i + 1, place + 1);
        }
        decade += 1;
    }
    codes
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

impl Absmax {
    /// The scale of a block.
    #[inline(always)]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(values) => values[block],
            Self::Double(double) => {
                let code = CODEBOOK[usize::from(double.codes[block])];
                code * double.scales[block / GROUP] + double.offset
            }
        }
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Plain(values) => 4 * values.len(),
            Self::Double(double) => double.codes.len() + 4 * double.scales.len() + 4,
        }
    }

    /// Bytes that the scales of so many blocks take, in 8 bits or in f32.
    pub(super) fn bytes_of(blocks: usize, double: bool) -> usize {
        match double {
            false => 4 * blocks,
            true => blocks + 4 * blocks.div_ceil(GROUP) + 4,
        }
    }

    /// In 8 bits; as they are if they already are.
    pub(super) fn quantised(self) -> Self {
        match self {
            Self::Plain(values) => Self::Double(DoubleQuantised::from(&values)),
            Self::Double(_) => self,
        }
    }
}

impl DoubleQuantised {
    fn from(values: &[f32]) -> Self {
        let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
        let offset = (sum / values.len().max(1) as f64) as f32;
        let mut codes = Vec::with_capacity(values.len());
        let mut scales = Vec::with_capacity(values.len().div_ceil(GROUP));
        for group in values.chunks(GROUP) {
            let largest = (group.iter()).fold(0f32, |most, x| most.max((x - offset).abs()));
            let reciprocal = 1.0 / largest;
            let (scale, factor) = match reciprocal.is_finite() {
                true => (largest, reciprocal),
                false => (0.0, 0.0),
            };
            scales.push(scale);
            codes.extend(group.iter().map(|x| nearest((x - offset) * factor)));
        }
        Self {
            codes,
            scales,
            offset,
        }
    }
}

/// How many midpoints lie below `x`.
fn nearest(x: f32) -> u8 {
    MIDPOINTS.partition_point(|midpoint| *midpoint < x) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_book_ascends_and_is_nearly_symmetric() {
        assert!(CODEBOOK.is_sorted_by(|a, b| a < b));
        for i in 1..127 {
            assert_eq!(CODEBOOK[127 - i], -CODEBOOK[127 + i]);
        }
        assert_eq!((CODEBOOK[127], CODEBOOK[255]), (0.0, 1.0));
    }

    #[test]
    fn the_code_nearest() {
        for (code, value) in CODEBOOK.iter().enumerate() {
            assert_eq!(usize::from(nearest(*value)), code);
        }
        for (code, midpoint) in MIDPOINTS.iter().enumerate() {
            assert_eq!(usize::from(nearest(*midpoint)), code, "a tie goes down");
            assert_eq!(usize::from(nearest(midpoint.next_up())), code + 1);
        }
    }

    #[test]
    fn equal_scales_are_their_mean() {
        let absmax = Absmax::Plain(vec![0.3; 300]).quantised();
        assert!((0..300).all(|block| absmax.get(block) == 0.3));
        assert_eq!(absmax.clone().quantised(), absmax);
        assert_eq!(Absmax::Plain(Vec::new()).quantised().bytes(), 4);
    }

    #[test]
    fn the_largest_scales_of_a_group_stay_exact_where_above_the_mean() {
        let values: Vec<f32> = (0..600).map(|i| (i % 97) as f32 / 7.0).collect();
        let absmax = Absmax::Plain(values.clone()).quantised();
        let worst = (values.iter().enumerate())
            .map(|(i, x)| (absmax.get(i) - x).abs())
            .fold(0f32, f32::max);
        // Half the widest gap between codes, 0.0141 / 2 of the largest distance from the mean.
        assert!(worst < 0.0071 * 7.0, "{worst}");
    }
}
