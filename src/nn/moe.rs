//! A mixture of experts (arXiv 1701.06538): a router sends each token to a few feed-forward layers,
//! and only those see it.
//!
//! Rows are sorted by expert, so that each expert's rows are one product ([`kernels::expert_linear()`]).
//! Which experts are chosen is read back to the host; what they are weighted by stays on the device
//! and is differentiated.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData, activation};

use super::{Dropout, ExpertLinear, LoraLinear, Mlp, Parameter, Visitor};
use crate::device::to_vec;
use crate::kernels::{self, Activation, ClampedGate};

/// A feed-forward layer of several experts.
#[derive(Debug, Clone)]
pub struct Moe {
    /// Chooses the experts of each token.
    pub router: Router,
    /// `[E, 2F, D]`: for each expert the rows of its gate and of its up projection.
    pub gate_up: ExpertLinear,
    /// `[E, D, F]`
    pub down: ExpertLinear,
    /// What stands between them.
    pub gate: ExpertGate,
    /// An expert that sees every token.
    pub shared: Option<SharedExpert>,
}

/// How `gate_up`'s output becomes `down`'s input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ExpertGate {
    /// `act(gate) · up`, gate and up in halves.
    Halves(Activation),
    /// gpt-oss: gate and up take turns, both are clamped, and `gate · σ(α gate) · (up + 1)`.
    Clamped(ClampedGate),
}

/// An expert that sees every token.
#[derive(Debug, Clone)]
pub struct SharedExpert {
    /// `shared_expert` or `shared_experts`.
    pub name: &'static str,
    /// The expert.
    pub mlp: Mlp,
    /// `shared_expert_gate` `[1, D]`: its output is multiplied by the sigmoid of this (Qwen).
    pub gate: Option<LoraLinear>,
}

/// Chooses experts and their weights.
#[derive(Debug, Clone)]
pub struct Router {
    /// `[E, D]`
    pub gate: LoraLinear,
    /// Its name: `gate` or `router`.
    pub name: &'static str,
    /// How logits become a choice.
    pub rule: RouterRule,
    /// k, experts of a token.
    pub top_k: usize,
    /// `e_score_correction_bias` `[E]`, added to the scores for the choice alone (DeepSeek-V3).
    pub correction: Option<Tensor<1>>,
}

/// How a router's logits become experts and weights, in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouterRule {
    /// The softmax over all experts; the k largest, which may be made to sum to 1.
    Softmax {
        /// Whether they sum to 1.
        normalise: bool,
    },
    /// The k largest logits, and the softmax over them (gpt-oss).
    TopSoftmax,
    /// Sigmoids; the best groups of experts first, then the k best in them (arXiv 2412.19437).
    Sigmoid {
        /// Groups of experts.
        groups: usize,
        /// Groups that are kept.
        kept: usize,
        /// Whether the weights sum to 1 before they are scaled.
        normalise: bool,
        /// What the weights are multiplied by.
        scale: f32,
    },
}

/// The experts of each token.
struct Routes {
    /// k experts for each token, one token after the other.
    experts: Vec<usize>,
    /// `[N, k]`
    weights: Tensor<2>,
}

/// Rows sorted by expert.
struct Sorted {
    /// Token of each sorted row.
    tokens: Vec<i32>,
    /// Expert of each sorted row.
    experts: Vec<i32>,
    /// Sorted row of each token's choices.
    places: Vec<i32>,
    /// Where each expert's rows start; one more at the end.
    offsets: Arc<[usize]>,
}

impl Sorted {
    fn new(chosen: &[usize], top_k: usize, experts: usize) -> Self {
        let mut offsets = vec![0; experts + 1];
        for &expert in chosen {
            offsets[expert + 1] += 1;
        }
        for i in 0..experts {
            offsets[i + 1] += offsets[i];
        }
        let mut next = offsets.clone();
        let mut sorted = Self {
            tokens: vec![0; chosen.len()],
            experts: vec![0; chosen.len()],
            places: Vec::with_capacity(chosen.len()),
            offsets: offsets.into(),
        };
        for (i, &expert) in chosen.iter().enumerate() {
            let place = next[expert];
            next[expert] += 1;
            sorted.tokens[place] = (i / top_k) as i32;
            sorted.experts[place] = expert as i32;
            sorted.places.push(place as i32);
        }
        sorted
    }
}

impl Moe {
    /// # Shapes
    /// `[N, D]` → `[N, D]`
    pub fn forward(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let [n, d] = x.dims();
        let k = self.router.top_k;
        let routes = self.router.route(x.clone(), dropout);
        let sorted = Sorted::new(&routes.experts, k, self.gate_up.experts());
        let device = x.device().inner();
        let ints = |values: &[i32]| {
            let data = TensorData::new(values.to_vec(), [values.len()]);
            Tensor::<1, Int>::from_data(data, &device)
        };
        let experts = ints(&sorted.experts);
        let rows = x.clone().select(0, ints(&sorted.tokens)); // [N·k, D]
        let wide = self
            .gate_up
            .forward(rows, &sorted.offsets, &experts, dropout);
        let y = (self.down).forward(self.gate.apply(wide), &sorted.offsets, &experts, dropout);
        let y = y.select(0, ints(&sorted.places)).reshape([n, k, d]);
        let y = (y * routes.weights.reshape([n, k, 1]))
            .sum_dim(1)
            .reshape([n, d]);
        match &self.shared {
            Some(shared) => y + shared.forward(x, dropout),
            None => y,
        }
    }

    /// The linear layers, but for the experts', with their names.
    pub fn linears(&mut self) -> Vec<(String, &mut LoraLinear)> {
        let mut linears = vec![(self.router.name.to_string(), &mut self.router.gate)];
        if let Some(shared) = &mut self.shared {
            let name = shared.name;
            let inner = shared.mlp.linears().into_iter();
            linears.extend(inner.map(|(part, linear)| (format!("{name}.{part}"), linear)));
            if let Some(gate) = &mut shared.gate {
                linears.push(("shared_expert_gate".to_string(), gate));
            }
        }
        linears
    }

    /// The experts' layers with their names, as transformers 5 names its parameters.
    pub fn experts(&mut self) -> [(&'static str, &mut ExpertLinear); 2] {
        [
            ("experts.gate_up_proj", &mut self.gate_up),
            ("experts.down_proj", &mut self.down),
        ]
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        for (name, linear) in self.linears() {
            linear.visit(&format!("{path}.{name}"), visitor);
        }
        if let Some(correction) = &mut self.router.correction {
            let name = format!("{path}.{}.e_score_correction_bias", self.router.name);
            visitor(&name, Parameter::Vector(correction));
        }
        for (name, experts) in self.experts() {
            experts.visit(&format!("{path}.{name}"), visitor);
        }
    }
}

impl ExpertGate {
    fn apply(self, wide: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Halves(activation) => {
                let half = wide.dims()[1] / 2;
                let gate = wide.clone().narrow(1, 0, half);
                kernels::gated(gate, wide.narrow(1, half, half), activation)
            }
            Self::Clamped(gate) => kernels::clamped_gate(wide, gate),
        }
    }
}

impl SharedExpert {
    fn forward(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let y = self.mlp.forward(x.clone(), dropout);
        match &self.gate {
            Some(gate) => y * activation::sigmoid(gate.forward(x, dropout)), // [N, D] · [N, 1]
            None => y,
        }
    }
}

impl Router {
    /// The scores of each expert before softmax or sigmoid.
    ///
    /// # Shapes
    /// `[N, D]` → `[N, E]`
    pub fn logits(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        self.gate.forward(x, dropout)
    }

    fn route(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Routes {
        let logits = self.logits(x, dropout); // [N, E]
        let [n, experts] = logits.dims();
        let scores = match self.rule {
            RouterRule::Softmax { .. } => activation::softmax(logits, 1),
            RouterRule::TopSoftmax => logits,
            RouterRule::Sigmoid { .. } => activation::sigmoid(logits),
        };
        let mut choice = host(scores.clone());
        if let Some(correction) = &self.correction {
            let correction = host(correction.clone().unsqueeze());
            for row in choice.chunks_exact_mut(experts) {
                for (score, add) in row.iter_mut().zip(&correction) {
                    *score += add;
                }
            }
        }
        let chosen: Vec<usize> = choice
            .chunks_exact_mut(experts)
            .flat_map(|row| {
                if let RouterRule::Sigmoid { groups, kept, .. } = self.rule {
                    keep_groups(row, groups, kept);
                }
                largest(row, self.top_k)
            })
            .collect();
        let indices: Vec<i32> = chosen.iter().map(|&expert| expert as i32).collect();
        let indices = Tensor::<2, Int>::from_data(
            TensorData::new(indices, [n, self.top_k]),
            &scores.device().inner(),
        );
        let picked = scores.gather(1, indices); // [N, k]
        let weights = match self.rule {
            RouterRule::Softmax { normalise: false } => picked,
            RouterRule::Softmax { normalise: true } => picked.clone() / picked.sum_dim(1),
            RouterRule::TopSoftmax => activation::softmax(picked, 1),
            RouterRule::Sigmoid {
                normalise, scale, ..
            } => {
                let sum_to_one = match normalise {
                    true => picked.clone() / (picked.sum_dim(1) + 1e-20),
                    false => picked,
                };
                sum_to_one * scale
            }
        };
        Routes {
            experts: chosen,
            weights,
        }
    }
}

fn host(x: Tensor<2>) -> Vec<f32> {
    let mut x = x;
    to_vec(Parameter::Matrix(&mut x).flat())
}

/// Rules out the experts outside of the `kept` best groups; a group is worth its two best scores.
fn keep_groups(row: &mut [f32], groups: usize, kept: usize) {
    let size = row.len() / groups;
    let worth: Vec<f32> = row
        .chunks_exact(size)
        .map(|group| largest(group, 2).into_iter().map(|i| group[i]).sum())
        .collect();
    let best = largest(&worth, kept);
    for (group, scores) in row.chunks_exact_mut(size).enumerate() {
        if !best.contains(&group) {
            scores.fill(f32::NEG_INFINITY);
        }
    }
}

/// Places of the `k` largest values, largest first; the first of equals. Not-a-number counts as
/// least, so that a broken row stays in range.
fn largest(values: &[f32], k: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    let key = |i: usize| match values[i].is_nan() {
        true => f32::NEG_INFINITY,
        false => values[i],
    };
    places.sort_by(|&i, &j| key(j).total_cmp(&key(i)).then(i.cmp(&j)));
    places.truncate(k);
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_find_back() {
        let sorted = Sorted::new(&[2, 0, 0, 2, 2, 3], 2, 5);
        assert_eq!(*sorted.offsets, [0, 2, 2, 5, 6, 6]);
        assert_eq!(sorted.experts, [0, 0, 2, 2, 2, 3]);
        assert_eq!(sorted.tokens, [0, 1, 0, 1, 2, 2]);
        assert_eq!(sorted.places, [2, 0, 1, 3, 4, 5]);
    }

    #[test]
    fn the_best_groups_are_kept() {
        let mut row = [0.9, 0.1, 0.6, 0.5, 0.2, 0.3];
        keep_groups(&mut row, 3, 1);
        let out = f32::NEG_INFINITY;
        assert_eq!(row, [out, out, 0.6, 0.5, out, out]);
        assert_eq!(largest(&[1.0, f32::NAN, 3.0, 3.0], 3), [2, 3, 0]);
    }
}
