//! The scales of NF4's blocks, as they are or quantised once more: *double quantisation*
//! (QLoRA, arXiv 2305.14314, section 3).

pub use super::dynamic::SIGNED as CODEBOOK;
use super::dynamic::nearest_signed;
use super::held::Held;

/// Scales that share one of their own.
pub(super) const GROUP: usize = 256;

/// The largest absolute value of each block.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// In f32.
    Plain(Held<f32>),
    /// In 8 bits.
    Double(DoubleQuantised),
}

/// Scales less their mean, in 8-bit codes: `CODEBOOK[code] · scale + offset`.
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleQuantised {
    /// One a block.
    pub codes: Held<u8>,
    /// One for 256 blocks.
    pub scales: Held<f32>,
    /// The mean of all.
    pub offset: f32,
}

impl Absmax {
    /// The scale of a block.
    pub fn get(&self, block: usize) -> f32 {
        self.view().get(block)
    }

    /// As they are read block by block.
    pub(super) fn view(&self) -> View<'_> {
        match self {
            Self::Plain(values) => View::Plain(values),
            Self::Double(double) => View::Double(&double.codes, &double.scales, double.offset),
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

/// Where scales lie, found out once for many of them.
#[derive(Clone, Copy)]
pub(super) enum View<'a> {
    Plain(&'a [f32]),
    Double(&'a [u8], &'a [f32], f32),
}

impl View<'_> {
    #[inline(always)]
    pub(super) fn get(self, block: usize) -> f32 {
        match self {
            Self::Plain(values) => values[block],
            Self::Double(codes, scales, offset) => {
                CODEBOOK[usize::from(codes[block])] * scales[block / GROUP] + offset
            }
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
            codes.extend(
                group
                    .iter()
                    .map(|x| nearest_signed(&[(x - offset) * factor])[0]),
            );
        }
        Self {
            codes: codes.into(),
            scales: scales.into(),
            offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scales_are_their_mean() {
        let absmax = Absmax::Plain(vec![0.3; 300].into()).quantised();
        assert!((0..300).all(|block| absmax.get(block) == 0.3));
        assert_eq!(absmax.clone().quantised(), absmax);
        assert_eq!(Absmax::Plain(Vec::new().into()).quantised().bytes(), 4);
    }

    #[test]
    fn the_largest_scales_of_a_group_stay_exact_where_above_the_mean() {
        let values: Vec<f32> = (0..600).map(|i| (i % 97) as f32 / 7.0).collect();
        let absmax = Absmax::Plain(values.clone().into()).quantised();
        let worst = (values.iter().enumerate())
            .map(|(i, x)| (absmax.get(i) - x).abs())
            .fold(0f32, f32::max);
        // Half the widest gap between codes, 0.0141 / 2 of the largest distance from the mean.
        assert!(worst < 0.0071 * 7.0, "{worst}");
    }
}
