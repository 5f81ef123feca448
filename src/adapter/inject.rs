//! Puts adapters into a model, and takes them out.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};

use super::peft::LoraPair;
use super::target::ModuleAdapter;
use crate::model::CausalLm;
use crate::nn::{LoraDelta, Parameter};
use crate::random::Stream;

/// The first values of adapters.
pub enum Init<'a> {
    /// A uniform in ±1/√in and B zero, as PEFT draws them (Kaiming uniform with a = √5).
    Fresh {
        /// Seed of A.
        seed: u64,
    },
    /// Values of an adapter that [`fit`](super::peft::fit) has checked against the base.
    Loaded(&'a BTreeMap<String, LoraPair>),
}

/// Gives each listed module a trainable delta; everything else stays frozen.
pub fn inject(model: &mut CausalLm, adapters: &[ModuleAdapter], dropout: f64, init: &Init) {
    let device = model.device().clone();
    let by_module: BTreeMap<&str, (usize, &ModuleAdapter)> = adapters
        .iter()
        .enumerate()
        .map(|(i, adapter)| (adapter.module.as_str(), (i, adapter)))
        .collect();
    for (path, linear) in model.linears() {
        let Some(&(index, adapter)) = by_module.get(path.as_str()) else {
            continue;
        };
        let [out, input] = linear.weight.dims();
        let rank = adapter.rank;
        let (a, b) = match init {
            Init::Fresh { seed } => {
                let stream = Stream::new(*seed).split(0xA).split(index as u64);
                let bound = 1.0 / (input as f64).sqrt();
                let a = (0..(rank * input) as u64)
                    .map(|i| ((2.0 * stream.uniform(i) - 1.0) * bound) as f32)
                    .collect();
                (a, vec![0f32; out * rank])
            }
            Init::Loaded(pairs) => match pairs.get(&path) {
                Some(pair) => (pair.a.clone(), pair.b.clone()),
                None => continue,
            },
        };
        let leaf = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values, shape), &device)
                .autodiff()
                .require_grad()
        };
        linear.lora = Some(LoraDelta {
            lora_a: leaf(a, [rank, input]),
            lora_b: leaf(b, [out, rank]),
            scaling: adapter.scaling,
            dropout,
            module: index as u64,
        });
    }
}

/// Makes every weight train (`adapter.method: full`).
pub fn train_all(model: &mut CausalLm) {
    model.visit(&mut |_, mut parameter| parameter.set_trainable(true));
}

/// The adapters' current values by module path, in the model's order.
pub fn extract(model: &mut CausalLm) -> Vec<(String, LoraPair)> {
    let values = |mut tensor: Tensor<2>| {
        let shape = tensor.dims();
        let flat = Parameter::Matrix(&mut tensor).flat();
        (crate::device::to_vec(flat), shape)
    };
    let mut pairs = Vec::new();
    for (path, linear) in model.linears() {
        if let Some(lora) = &linear.lora {
            let (a, a_shape) = values(lora.lora_a.clone());
            let (b, b_shape) = values(lora.lora_b.clone());
            pairs.push((
                path,
                LoraPair {
                    a,
                    a_shape,
                    b,
                    b_shape,
                },
            ));
        }
    }
    pairs
}
