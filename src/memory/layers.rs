//! Linear layers, norms and activations on a [`Tape`], as `nn/` performs them.

use std::collections::BTreeMap;

use super::kernels::{self as footprint, F32, Platform};
use super::tape::{Back, Op, Tape, Value};
use crate::adapter::config::AdapterConfig;
use crate::adapter::outline::Outline;
use crate::model::config::ModelConfig;
use crate::model::kept::Form;
use crate::model::weights::Dtype;
use crate::nn::NormKind;

/// What a pass through the model depends on.
pub(super) struct Facts<'a> {
    pub config: &'a ModelConfig,
    /// `None` where all weights train.
    pub adapter: Option<&'a AdapterConfig>,
    pub outline: &'a Outline,
    /// How each tensor of the base is kept.
    pub forms: BTreeMap<&'a str, Form>,
    pub platform: Platform,
    /// Whether A of linear layers has no gradient (LoRA-FA).
    pub freezes_a: bool,
}

impl Facts<'_> {
    /// Bytes of the gradient of a tensor that trains.
    pub fn gradient(&self, name: &str) -> Option<u64> {
        let shape = self.outline.trained.get(name)?;
        let frozen = self.freezes_a && name.ends_with(".lora_a");
        let n: u64 = shape.iter().map(|n| *n as u64).product();
        (!frozen).then_some(n * F32)
    }

    /// Bytes of all gradients.
    pub fn gradients(&self) -> u64 {
        let trained = self.outline.trained.keys();
        trained.filter_map(|name| self.gradient(name)).sum()
    }

    pub fn form(&self, name: &str) -> Form {
        let form = self.forms.get(name).copied();
        form.unwrap_or(Form::Dense(Dtype::F32))
    }

    fn dropout(&self) -> bool {
        self.adapter.is_some_and(|config| config.lora_dropout > 0.0)
    }

    fn dora(&self) -> bool {
        self.adapter.is_some_and(|config| config.use_dora)
    }

    /// The rank of VeRA's shared factors.
    fn vera(&self) -> Option<usize> {
        let config = self.adapter.filter(|config| config.vera.is_some())?;
        Some(config.targeting.rank)
    }
}

/// Layers over some rows.
pub(super) struct Tracer<'a> {
    pub tape: Tape,
    pub facts: &'a Facts<'a>,
    /// N, rows that pass through.
    pub rows: usize,
    /// Whether a backward pass follows.
    pub trains: bool,
}

impl<'a> Tracer<'a> {
    pub fn new(facts: &'a Facts<'a>, rows: usize, trains: bool) -> Self {
        Self {
            tape: Tape::default(),
            facts,
            rows,
            trains,
        }
    }

    /// Bytes of all rows of so many columns.
    pub fn floats(&self, width: usize) -> u64 {
        self.rows as u64 * width as u64 * F32
    }

    /// A tensor of the model.
    pub fn parameter(&mut self, name: &str) -> Value {
        let gradient = self.facts.gradient(name).filter(|_| self.trains);
        self.tape
            .parameter(gradient.unwrap_or(0), gradient.is_some())
    }

    /// An element-wise operation that keeps its input, its output, or neither.
    pub fn unary(&mut self, x: Value, width: usize, [input, output]: [bool; 2]) -> Value {
        let op = Op {
            saved: if input { vec![x] } else { Vec::new() },
            saves_output: output,
            ..Op::elementwise(Back::InPlace)
        };
        let bytes = self.floats(width);
        self.tape.push(op, &[x], bytes)
    }

    pub fn add(&mut self, x: Value, y: Value, width: usize) -> Value {
        let bytes = self.floats(width);
        footprint::add(&mut self.tape, [x, y], bytes)
    }

    pub fn mul(&mut self, x: Value, y: Value, width: usize) -> Value {
        let bytes = self.floats(width);
        footprint::mul(&mut self.tape, [x, y], bytes)
    }

    /// A part of the columns of a value.
    pub fn columns(&mut self, x: Value, width: usize) -> Value {
        let bytes = self.floats(width);
        self.tape.view(x, bytes, false)
    }

    /// A copy in another order of rows or columns.
    pub fn copy(&mut self, x: &[Value], width: usize) -> Value {
        let bytes = self.floats(width);
        self.tape.push(Op::new(), x, bytes)
    }

    /// A norm over all `width` columns or over heads of them.
    pub fn norm(&mut self, path: &str, kind: NormKind, x: Value, width: usize) -> Value {
        let weight = self.parameter(&format!("{path}.weight"));
        let bytes = self.floats(width);
        let x = match kind {
            NormKind::Rms | NormKind::RmsPlusOne => x,
            // `x - mean`
            NormKind::Layer | NormKind::LayerBias => {
                let op = Op {
                    workspace: [0, bytes],
                    ..Op::elementwise(Back::Same)
                };
                self.tape.push(op, &[x], bytes)
            }
        };
        let y = footprint::rms_norm(&mut self.tape, x, weight, bytes);
        match kind {
            NormKind::LayerBias => {
                let bias = self.parameter(&format!("{path}.bias"));
                footprint::add(&mut self.tape, [y, bias], bytes)
            }
            _ => y,
        }
    }

    /// The linear layer at `path` with whatever is adapted or trains.
    pub fn linear(&mut self, path: &str, x: Value, [out, input]: [usize; 2]) -> Value {
        let (name, bytes) = (format!("{path}.weight"), self.floats(out));
        let converted = (self.facts.platform).converted([out, input], self.facts.form(&name));
        let rank = self.facts.outline.trained.get(&format!("{path}.lora_a"));
        let rank = rank.map(|shape| shape[0]).or_else(|| {
            let vectors = self.facts.outline.trained.get(&format!("{path}.lambda_d"));
            vectors.and(self.facts.vera())
        });
        let y = match rank {
            Some(rank) => self.adapted(path, x, [out, input], rank, converted),
            None if self.trains && self.facts.gradient(&name).is_some() => {
                let weight = self.parameter(&name);
                footprint::matmul(&mut self.tape, [x, weight], bytes)
            }
            None => footprint::linear(&mut self.tape, x, bytes, converted),
        };
        let bias = format!("{path}.bias");
        match self.facts.forms.contains_key(bias.as_str()) {
            true => {
                let bias = self.parameter(&bias);
                footprint::add(&mut self.tape, [y, bias], bytes)
            }
            false => y,
        }
    }

    /// The factors of the delta at `path`: parameters, or VeRA's shared ones scaled by its vectors.
    fn factors(&mut self, path: &str, [out, input]: [usize; 2], rank: usize) -> [Value; 2] {
        if self.facts.vera().is_none() {
            return [("lora_a", input), ("lora_b", out)]
                .map(|(name, _)| self.parameter(&format!("{path}.{name}")));
        }
        [("lambda_d", rank, input), ("lambda_b", out, rank)].map(|(name, rows, cols)| {
            let vector = self.parameter(&format!("{path}.{name}"));
            let bytes = (rows * cols) as u64 * F32;
            // The gradient of the vector is summed up from one of this size.
            let op = Op {
                workspace: [0, bytes],
                ..Op::new()
            };
            self.tape.push(op, &[vector], bytes)
        })
    }

    fn adapted(
        &mut self,
        path: &str,
        x: Value,
        shape: [usize; 2],
        rank: usize,
        converted: u64,
    ) -> Value {
        let (out, input) = (shape[0], shape[1]);
        let factors = self.factors(path, shape, rank);
        if !(self.trains && self.facts.dropout()) {
            let y = self.delta(x, factors, [out, rank], converted);
            return match self.facts.dora() {
                true => self.gain(path, y, out),
                false => y,
            };
        }
        let dropped = self.floats(input);
        let dropped = footprint::dropout(&mut self.tape, x, dropped);
        let bytes = self.floats(out);
        if self.facts.dora() {
            let plain = self.add(x, dropped, input);
            let plain = footprint::linear(&mut self.tape, plain, bytes, converted);
            let y = self.delta(dropped, factors, [out, rank], converted);
            let y = self.gain(path, y, out);
            return self.add(plain, y, out);
        }
        let low = self.floats(rank);
        let low = footprint::matmul(&mut self.tape, [dropped, factors[0]], low);
        let y = footprint::linear(&mut self.tape, x, bytes, converted);
        let delta = footprint::matmul(&mut self.tape, [low, factors[1]], bytes);
        let delta = self.unary(delta, out, [false; 2]);
        self.add(y, delta, out)
    }

    fn delta(&mut self, x: Value, [a, b]: [Value; 2], [out, rank]: [usize; 2], ws: u64) -> Value {
        let sizes = [self.floats(out), self.floats(rank)];
        footprint::lora_linear(&mut self.tape, [x, a, b], sizes, ws)
    }

    /// DoRA's factor of each column, whose gradient is a sum over all rows.
    fn gain(&mut self, path: &str, y: Value, out: usize) -> Value {
        let gain = self.parameter(&format!("{path}.magnitude"));
        let bytes = self.floats(out);
        let op = Op {
            saved: if self.tape.is_tracked(gain) {
                vec![y]
            } else {
                Vec::new()
            },
            workspace: [0, bytes],
            ..Op::elementwise(Back::InPlace)
        };
        self.tape.push(op, &[y, gain], bytes)
    }

    /// `act(gate) · up`
    pub fn gated(&mut self, gate: Value, up: Value, width: usize) -> Value {
        let bytes = self.floats(width);
        footprint::gated(&mut self.tape, [gate, up], bytes)
    }

    /// An activation.
    pub fn activate(&mut self, x: Value, width: usize) -> Value {
        let bytes = self.floats(width);
        footprint::activate(&mut self.tape, x, bytes)
    }
}
