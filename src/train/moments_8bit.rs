//! AdamW's moments in 8 bits (arXiv 2110.02861): blocks of 256 numbers, each a code of the dynamic code
//! book times the largest absolute value of its block.
//!
//! A step dequantises a block, updates moments and weights in f32, and quantises the moments anew, so
//! that what is quantised never enters the step that it comes from. The code books are bitsandbytes'
//! own; it differs in one point: where a first moment below zero rounds to zero, bitsandbytes takes the
//! smallest code below zero, and this the nearest, zero.

use rayon::prelude::*;

use crate::kernels::AdamwStep;
use crate::quant::dynamic::{SIGNED, UNSIGNED, nearest_signed, nearest_unsigned};

/// Numbers that share a scale, as in bitsandbytes from 0.43 on.
pub const BLOCK: usize = 256;
/// Tensors of fewer numbers keep their moments in f32 (bitsandbytes' `min_8bit_size`): they are little,
/// and biases and magnitudes are sensitive.
pub const FEWEST: usize = 4096;
/// Blocks that one task takes.
const TASK: usize = 64;

/// A moment of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Moment8 {
    /// One a number.
    pub codes: Vec<u8>,
    /// The largest absolute value of each block.
    pub absmax: Vec<f32>,
}

/// Both moments of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments8 {
    /// Mean of gradients, in the signed code book.
    pub first: Moment8,
    /// Mean of squared gradients, in the unsigned one.
    pub second: Moment8,
}

impl Moments8 {
    /// Those of `n` numbers before the first step.
    pub fn zeros(n: usize) -> Self {
        let moment = |zero: u8| Moment8 {
            codes: vec![zero; n],
            absmax: vec![0.0; n.div_ceil(BLOCK)],
        };
        Self {
            first: moment(nearest_signed(&[0.0])[0]),
            second: moment(nearest_unsigned(&[0.0])[0]),
        }
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        Self::bytes_of(self.first.codes.len())
    }

    /// Bytes that those of `n` numbers take: a code each, and a scale for each block.
    pub fn bytes_of(n: usize) -> usize {
        2 * (n + size_of::<f32>() * n.div_ceil(BLOCK))
    }

    /// Takes a step, by all threads.
    pub(super) fn step(&mut self, values: &mut [f32], gradient: &[f32], step: AdamwStep) {
        let Self { first, second } = self;
        let width = TASK * BLOCK;
        let parts = (values.par_chunks_mut(width))
            .zip(gradient.par_chunks(width))
            .zip(first.codes.par_chunks_mut(width))
            .zip(second.codes.par_chunks_mut(width))
            .zip(first.absmax.par_chunks_mut(TASK))
            .zip(second.absmax.par_chunks_mut(TASK));
        parts.for_each(
            |(((((values, gradient), first), second), first_max), second_max)| {
                let blocks = (values.chunks_mut(BLOCK))
                    .zip(gradient.chunks(BLOCK))
                    .zip(first.chunks_mut(BLOCK).zip(first_max))
                    .zip(second.chunks_mut(BLOCK).zip(second_max));
                for (((values, gradient), first), second) in blocks {
                    pulp::Arch::new().dispatch(Block {
                        values,
                        gradient,
                        first,
                        second,
                        step,
                    });
                }
            },
        );
    }
}

/// One block: weights, gradient, and the codes and the scale of each moment.
struct Block<'a> {
    values: &'a mut [f32],
    gradient: &'a [f32],
    first: (&'a mut [u8], &'a mut f32),
    second: (&'a mut [u8], &'a mut f32),
    step: AdamwStep,
}

impl pulp::NullaryFnOnce for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let ((m_codes, m_max), (v_codes, v_max)) = (self.first, self.second);
        let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
        decode(m_codes, *m_max, &SIGNED, &mut m);
        decode(v_codes, *v_max, &UNSIGNED, &mut v);
        let values = self.values.iter_mut().zip(self.gradient);
        for ((value, gradient), (m, v)) in values.zip(m.iter_mut().zip(&mut v)) {
            self.step.apply(value, *gradient, m, v);
        }
        *m_max = encode(&mut m, m_codes, nearest_signed);
        *v_max = encode(&mut v, v_codes, nearest_unsigned);
    }
}

#[inline(always)]
fn decode(codes: &[u8], absmax: f32, book: &[f32; 256], out: &mut [f32; BLOCK]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = book[usize::from(*code)] * absmax;
    }
}

/// The codes of a block, which has as many numbers as codes; returns its scale. Where its reciprocal is no
/// number, the block counts as zeros.
#[inline(always)]
fn encode(
    values: &mut [f32; BLOCK],
    codes: &mut [u8],
    nearest: impl Fn(&[f32; BLOCK]) -> [u8; BLOCK],
) -> f32 {
    let absmax = (values[..codes.len()].iter()).fold(0f32, |most, x| most.max(x.abs()));
    let reciprocal = 1.0 / absmax;
    let (absmax, factor) = match reciprocal.is_finite() {
        true => (absmax, reciprocal),
        false => (0.0, 0.0),
    };
    values.iter_mut().for_each(|x| *x *= factor);
    codes.copy_from_slice(&nearest(values)[..codes.len()]);
    absmax
}
