//! AdamW with decoupled weight decay (arXiv 1711.05101), torch's order of operations.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};

use super::moments::Moments;
use super::moments_8bit;
use super::step::Gradients;
use crate::adapter::linalg::{Matrix, shifted_inverse};
use crate::device::to_vec;
use crate::kernels::AdamwStep;
use crate::model::{CausalLm, names};
use crate::nn::Parameter;
use crate::recipe::TrainPlan;

/// AdamW's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Share of a weight that the learning rate takes away in each step.
    pub weight_decay: f64,
    /// How many times the learning rate of A the B of a delta has (LoRA+, arXiv 2402.12354); vectors
    /// have it too, as in PEFT.
    pub loraplus_lr_ratio: f64,
    /// How many times the learning rate the embedding's delta has.
    pub embedding_lr_ratio: f64,
}

impl AdamWConfig {
    /// The learning rate of a tensor, where `rate` is the schedule's.
    pub fn rate_of(&self, name: &str, shape: &[usize], rate: f64) -> f64 {
        let half = name.strip_prefix(names::EMBEDDING);
        match matches!(half, Some(".lora_a" | ".lora_b")) {
            true => rate * self.embedding_lr_ratio,
            false if name.ends_with(".lora_b") || shape.len() == 1 => rate * self.loraplus_lr_ratio,
            false => rate,
        }
    }

    /// The `steps`-th step of a tensor, in torch's order of operations.
    fn step(self, rate: f64, steps: usize, decays: bool) -> AdamwStep {
        let [correction1, correction2] = self.corrections(steps);
        let decay = if decays { self.weight_decay } else { 0.0 };
        AdamwStep {
            keep: [self.beta1 as f32, self.beta2 as f32],
            share: [(1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32],
            before: (1.0 - rate * decay) as f32,
            divisor: correction2.sqrt() as f32,
            eps: self.eps as f32,
            rate: (rate / correction1) as f32,
            after: 1.0,
        }
    }

    /// The same as Hugging Face's old AdamW has it (see [`AdamW::lora_fa`]).
    fn old_step(self, rate: f64, steps: usize) -> AdamwStep {
        let [correction1, correction2] = self.corrections(steps);
        AdamwStep {
            divisor: 1.0,
            rate: (rate * correction2.sqrt() / correction1) as f32,
            after: (1.0 - rate * self.weight_decay) as f32,
            ..self.step(rate, steps, false)
        }
    }

    /// What the moments still lack, because they start at zero: `1 - βᵗ`.
    fn corrections(self, steps: usize) -> [f64; 2] {
        [self.beta1, self.beta2].map(|beta| 1.0 - beta.powi(steps as i32))
    }
}

impl From<&TrainPlan> for AdamWConfig {
    fn from(plan: &TrainPlan) -> Self {
        Self {
            beta1: plan.adam_beta1,
            beta2: plan.adam_beta2,
            eps: plan.adam_eps,
            weight_decay: plan.weight_decay,
            loraplus_lr_ratio: plan.loraplus_lr_ratio,
            embedding_lr_ratio: match plan.loraplus_lr_ratio == 1.0 {
                true => 1.0,
                false => plan.loraplus_lr_embedding / plan.learning_rate,
            },
        }
    }
}

/// AdamW over the trainable tensors of a model, by name.
#[derive(Debug, Clone)]
pub struct AdamW {
    config: AdamWConfig,
    /// Steps taken so far.
    pub steps: usize,
    /// The moments of each tensor.
    pub moments: BTreeMap<String, Moments>,
    /// What LoRA-FA multiplies the gradient of each B by; `None` for plain AdamW.
    projections: Option<BTreeMap<String, Tensor<2>>>,
    /// Whether the moments of all but small tensors are in 8 bits.
    in_8_bits: bool,
}

impl AdamW {
    /// Before the first step.
    pub fn new(config: AdamWConfig) -> Self {
        Self {
            config,
            steps: 0,
            moments: BTreeMap::new(),
            projections: None,
            in_8_bits: false,
        }
    }

    /// With moments in 8 bits, a quarter of the memory, but for those of small tensors (arXiv 2110.02861).
    /// They are in host memory whatever the device, so that on a GPU they take none of its memory, and
    /// gradients and weights travel at each step.
    pub fn in_8_bits(config: AdamWConfig) -> Self {
        Self {
            in_8_bits: true,
            ..Self::new(config)
        }
    }

    /// Bytes that the moments take.
    pub fn bytes(&self) -> usize {
        self.moments.values().map(Moments::bytes).sum()
    }

    /// LoRA-FA (arXiv 2308.03303), as PEFT has it: A is frozen, and the gradient of B becomes
    /// `g (A Aᵀ + 1e-8)⁻¹ / s²`, which brings the weight's gradient nearest to full fine-tuning's. Its
    /// AdamW is Hugging Face's old one: epsilon is added before the bias is corrected, and weights
    /// decay after the step, all of them.
    pub fn lora_fa(config: AdamWConfig, model: &mut CausalLm) -> Self {
        let mut projections = BTreeMap::new();
        for (path, _, delta) in model.deltas() {
            let Some(delta) = delta else {
                continue;
            };
            let mut a = Parameter::Matrix(&mut delta.lora_a);
            a.set_trainable(false);
            let shape = delta.lora_a.dims();
            let values = to_vec(Parameter::Matrix(&mut delta.lora_a).flat());
            let a = Matrix::from_f32(&values, shape);
            let inverse = shifted_inverse(&a.times(&a.transposed()), 1e-8);
            let inverse = TensorData::new(inverse.to_f32(), [shape[0], shape[0]]);
            let inverse = Tensor::<2>::from_data(inverse, &delta.lora_a.device());
            let projection = inverse / delta.scaling.powi(2);
            projections.insert(format!("{path}.lora_b"), projection);
        }
        Self {
            projections: Some(projections),
            ..Self::new(config)
        }
    }

    /// Moves every trainable tensor that has a gradient. Biases and norms do not decay, as in Hugging
    /// Face's Trainer.
    pub fn step(&mut self, model: &mut CausalLm, mut gradients: Gradients, learning_rate: f64) {
        self.steps += 1;
        let (config, steps) = (self.config, self.steps);
        let (mut moments, in_8_bits) = (std::mem::take(&mut self.moments), self.in_8_bits);
        model.visit_trainable(&mut |name, mut parameter| {
            let Some(mut gradient) = gradients.remove(name) else {
                return;
            };
            let [n] = gradient.dims();
            if let Some(projection) = self.projections.as_ref().and_then(|p| p.get(name)) {
                let [rank, _] = projection.dims();
                let rows = gradient.reshape([n / rank, rank]);
                gradient = rows.matmul(projection.clone()).reshape([n]);
            }
            let moments = (moments.entry(name.to_string())).or_insert_with(|| {
                let small = n < moments_8bit::FEWEST;
                Moments::zeros(n, in_8_bits && !small, &gradient.device())
            });
            let rate = config.rate_of(name, &parameter.shape(), learning_rate);
            let step = match self.projections.is_some() {
                true => config.old_step(rate, steps),
                false => config.step(rate, steps, decays(name, &parameter.shape())),
            };
            parameter.update(|values| moments.step(values, gradient, step));
        });
        self.moments = moments;
    }
}

/// Whether weight decay applies: to matrices, and to the vectors of DoRA and VeRA.
fn decays(name: &str, shape: &[usize]) -> bool {
    let vectors = [".magnitude", ".lambda_b", ".lambda_d"];
    shape.len() > 1 || vectors.iter().any(|end| name.ends_with(end))
}
