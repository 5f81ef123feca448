//! What AdamW does to the numbers of one tensor: as plain tensor operations, and on the CPU in one pass
//! over them, with the same numbers.

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use super::moments_8bit::Moments8;
use crate::device::to_vec;
use crate::kernels::is_cpu;

/// Numbers that one task takes.
const TASK: usize = 1 << 14;

/// What a step multiplies by, for one tensor:
///
/// ```text
/// m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
/// w ← (decay_before · w - m / (√v / root + ε) · rate) · decay_after
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors {
    /// β₁ and β₂.
    pub betas: [f64; 2],
    /// What the root of the second moment is divided by.
    pub root: f64,
    /// ε
    pub eps: f64,
    /// Size of the step.
    pub rate: f64,
    /// What the weights are multiplied by before it; 1 for none.
    pub decay_before: f64,
    /// The same after it.
    pub decay_after: f64,
}

/// The moments of one tensor.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "a tensor is of that size wherever it is"
)]
pub enum Moments {
    /// In f32, flat, where the tensor is.
    Whole {
        /// Mean of gradients.
        first: Tensor<1>,
        /// Mean of squared gradients.
        second: Tensor<1>,
    },
    /// In 8 bits, in host memory.
    EightBit(Moments8),
}

impl Moments {
    /// Those of `n` numbers before the first step.
    pub fn zeros(n: usize, in_8_bits: bool, device: &Device) -> Self {
        match in_8_bits {
            true => Self::EightBit(Moments8::zeros(n)),
            false => Self::Whole {
                first: Tensor::zeros([n], device),
                second: Tensor::zeros([n], device),
            },
        }
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Whole { first, second } => 4 * (first.dims()[0] + second.dims()[0]),
            Self::EightBit(moments) => moments.bytes(),
        }
    }
}

/// Takes a step; returns the new values. What it is given is changed in place where nobody else has it.
///
/// # Shapes
/// values, gradient and moments `[n]`
pub fn step(
    values: Tensor<1>,
    gradient: Tensor<1>,
    moments: &mut Moments,
    factors: Factors,
) -> Tensor<1> {
    let device = values.device();
    match moments {
        Moments::EightBit(moments) => {
            let (mut values, gradient) = (to_vec(values), to_vec(gradient));
            moments.step(&mut values, &gradient, factors.in_f32());
            on_device(values, &device)
        }
        Moments::Whole { first, second } if is_cpu(&device) => {
            let taken = |moment: &mut Tensor<1>| {
                to_vec(std::mem::replace(moment, Tensor::empty([0], &device)))
            };
            let (mut values, gradient) = (to_vec(values), to_vec(gradient));
            let mut moments = [taken(first), taken(second)];
            fused(&mut values, &gradient, &mut moments, factors.in_f32());
            [*first, *second] = moments.map(|moment| on_device(moment, &device));
            on_device(values, &device)
        }
        Moments::Whole { first, second } => plain(values, gradient, [first, second], factors),
    }
}

fn on_device(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

/// [`step`] as a chain of tensor operations, for every device.
pub fn plain(
    values: Tensor<1>,
    gradient: Tensor<1>,
    [first, second]: [&mut Tensor<1>; 2],
    factors: Factors,
) -> Tensor<1> {
    let [beta1, beta2] = factors.betas;
    let m = first.clone() * beta1 + gradient.clone() * (1.0 - beta1);
    let v = second.clone() * beta2 + gradient.square() * (1.0 - beta2);
    (*first, *second) = (m.clone(), v.clone());
    let scale = v.sqrt() / factors.root + factors.eps;
    let decayed = |values: Tensor<1>, factor: f64| match factor == 1.0 {
        true => values,
        false => values * factor,
    };
    let values = decayed(values, factors.decay_before) - m / scale * factors.rate;
    decayed(values, factors.decay_after)
}

/// The factors as tensors of f32 take them.
#[derive(Debug, Clone, Copy)]
pub(super) struct FactorsF32 {
    betas: [f32; 2],
    rest: [f32; 2],
    root: f32,
    eps: f32,
    rate: f32,
    decay_before: f32,
    decay_after: f32,
}

impl Factors {
    fn in_f32(self) -> FactorsF32 {
        FactorsF32 {
            betas: self.betas.map(|beta| beta as f32),
            rest: self.betas.map(|beta| (1.0 - beta) as f32),
            root: self.root as f32,
            eps: self.eps as f32,
            rate: self.rate as f32,
            decay_before: self.decay_before as f32,
            decay_after: self.decay_after as f32,
        }
    }
}

impl FactorsF32 {
    /// One number, with its moments; each operation is rounded as the tensor operation is.
    #[inline(always)]
    pub(super) fn step(&self, value: &mut f32, gradient: f32, m: &mut f32, v: &mut f32) {
        *m = *m * self.betas[0] + gradient * self.rest[0];
        *v = *v * self.betas[1] + gradient * gradient * self.rest[1];
        let scale = v.sqrt() / self.root + self.eps;
        *value = (*value * self.decay_before - *m / scale * self.rate) * self.decay_after;
    }
}

/// [`plain`] in one pass, in place, by all threads.
fn fused(values: &mut [f32], gradient: &[f32], moments: &mut [Vec<f32>; 2], factors: FactorsF32) {
    let [first, second] = moments;
    let parts = (values.par_chunks_mut(TASK))
        .zip(gradient.par_chunks(TASK))
        .zip(first.par_chunks_mut(TASK))
        .zip(second.par_chunks_mut(TASK));
    parts.for_each(|(((values, gradient), first), second)| {
        pulp::Arch::new().dispatch(Part {
            values,
            gradient,
            first,
            second,
            factors,
        });
    });
}

/// The numbers of one task.
struct Part<'a> {
    values: &'a mut [f32],
    gradient: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    factors: FactorsF32,
}

impl pulp::NullaryFnOnce for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let moments = self.first.iter_mut().zip(self.second);
        let values = self.values.iter_mut().zip(self.gradient);
        for ((value, gradient), (m, v)) in values.zip(moments) {
            self.factors.step(value, *gradient, m, v);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn factors() -> Factors {
        Factors {
            betas: [0.9, 0.999],
            root: (1.0 - 0.999f64.powi(3)).sqrt(),
            eps: 1e-8,
            rate: 2e-3 / (1.0 - 0.9f64.powi(3)),
            decay_before: 1.0 - 2e-3 * 0.1,
            decay_after: 1.0,
        }
    }

    #[test]
    fn one_pass_gives_the_bits_of_the_tensor_operations() {
        let (n, device) = (2 * TASK + 77, Device::flex());
        let stream = Stream::new(1);
        let random = |key: u64, scale: f64| -> Vec<f32> {
            let stream = stream.split(key);
            let values = (0..n as u64).map(|i| (stream.normal(i) * scale) as f32);
            values.collect()
        };
        let after = Factors {
            root: 1.0,
            decay_before: 1.0,
            decay_after: 0.999,
            ..factors()
        };
        for factors in [factors(), after] {
            let tensor = |values: &[f32]| on_device(values.to_vec(), &device);
            let zeros = || tensor(&vec![0.0; n]);
            let mut moments = Moments::zeros(n, false, &device);
            let (mut first, mut second) = (zeros(), zeros());
            let mut got = tensor(&random(0, 0.3));
            let mut want = got.clone();
            for round in 1..4 {
                let gradient = random(round, 10f64.powi(-3 * round as i32));
                got = step(got, tensor(&gradient), &mut moments, factors);
                want = plain(want, tensor(&gradient), [&mut first, &mut second], factors);
                assert_eq!(to_vec(got.clone()), to_vec(want.clone()), "round {round}");
            }
            let Moments::Whole {
                first: m,
                second: v,
            } = moments
            else {
                panic!("in f32")
            };
            assert_eq!(to_vec(m), to_vec(first));
            assert_eq!(to_vec(v), to_vec(second));
        }
    }
}
