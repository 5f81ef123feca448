//! AdamW with decoupled weight decay (arXiv 1711.05101), torch's order of operations.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use super::step::Gradients;
use crate::model::{CausalLm, names};
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
    /// First and second moments of each tensor, flat, in f32.
    pub moments: BTreeMap<String, Moments>,
}

/// The moments of one tensor.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Mean of gradients.
    pub first: Tensor<1>,
    /// Mean of squared gradients.
    pub second: Tensor<1>,
}

impl AdamW {
    /// Before the first step.
    pub fn new(config: AdamWConfig) -> Self {
        Self {
            config,
            steps: 0,
            moments: BTreeMap::new(),
        }
    }

    /// Moves every trainable tensor that has a gradient. Biases and norms do not decay, as in Hugging
    /// Face's Trainer.
    pub fn step(&mut self, model: &mut CausalLm, mut gradients: Gradients, learning_rate: f64) {
        self.steps += 1;
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
            ..
        } = self.config;
        let config = self.config;
        let correction1 = 1.0 - beta1.powi(self.steps as i32);
        let correction2 = 1.0 - beta2.powi(self.steps as i32);
        let moments = &mut self.moments;
        model.visit_trainable(&mut |name, mut parameter| {
            let Some(gradient) = gradients.remove(name) else {
                return;
            };
            let (first, second) = match moments.remove(name) {
                Some(Moments { first, second }) => (first, second),
                None => (gradient.zeros_like(), gradient.zeros_like()),
            };
            let first = first * beta1 + gradient.clone() * (1.0 - beta1);
            let second = second * beta2 + gradient.square() * (1.0 - beta2);
            let learning_rate = config.rate_of(name, &parameter.shape(), learning_rate);
            let mut values = parameter.flat();
            if weight_decay != 0.0 && decays(name, &parameter.shape()) {
                values = values * (1.0 - learning_rate * weight_decay);
            }
            let scale = second.clone().sqrt() / correction2.sqrt() + eps;
            let update = first.clone() / scale * (learning_rate / correction1);
            parameter.set_flat(values - update);
            moments.insert(name.to_string(), Moments { first, second });
        });
    }
}

/// Whether weight decay applies: to matrices, and to the vectors of DoRA and VeRA.
fn decays(name: &str, shape: &[usize]) -> bool {
    let vectors = [".magnitude", ".lambda_b", ".lambda_d"];
    shape.len() > 1 || vectors.iter().any(|end| name.ends_with(end))
}
