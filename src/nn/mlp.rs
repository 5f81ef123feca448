//! The feed-forward layer.

use burn::tensor::Tensor;

use super::{Dropout, LoraLinear, Visitor};
use crate::kernels::{self, Activation};

/// A feed-forward layer.
#[derive(Debug, Clone)]
pub struct Mlp {
    /// What widens the row.
    pub input: MlpInput,
    /// `[D, F]`
    pub down: LoraLinear,
    /// Its name: `down_proj`, `fc2` or `c_proj`.
    pub down_name: &'static str,
    /// The activation.
    pub activation: Activation,
}

/// The layers that widen a row, with their names.
#[derive(Debug, Clone)]
pub enum MlpInput {
    /// `act(gate_proj(x)) · up_proj(x)`, each `[F, D]`.
    Gated(Box<[LoraLinear; 2]>),
    /// The same with the rows of both in `gate_up_proj`, `[2F, D]`.
    Fused(Box<LoraLinear>),
    /// `act(up(x))`, `[F, D]`: `fc1` or `c_fc`.
    Plain(&'static str, Box<LoraLinear>),
}

impl Mlp {
    /// # Shapes
    /// `[N, D]` → `[N, D]`
    pub fn forward(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let wide = match &self.input {
            MlpInput::Gated(layers) => {
                let [gate, up] = &**layers;
                let gate = gate.forward(x.clone(), dropout); // [N, F]
                kernels::gated(gate, up.forward(x, dropout), self.activation)
            }
            MlpInput::Fused(gate_up) => {
                let y = gate_up.forward(x, dropout); // [N, 2F]
                let width = y.dims()[1] / 2;
                let gate = y.clone().narrow(1, 0, width);
                kernels::gated(gate, y.narrow(1, width, width), self.activation)
            }
            MlpInput::Plain(_, up) => kernels::activate(up.forward(x, dropout), self.activation),
        };
        self.down.forward(wide, dropout)
    }

    /// The linear layers with their names.
    pub fn linears(&mut self) -> Vec<(&'static str, &mut LoraLinear)> {
        let mut linears: Vec<(&'static str, &mut LoraLinear)> = match &mut self.input {
            MlpInput::Gated(layers) => ["gate_proj", "up_proj"]
                .into_iter()
                .zip(layers.iter_mut())
                .collect(),
            MlpInput::Fused(gate_up) => vec![("gate_up_proj", gate_up)],
            MlpInput::Plain(name, up) => vec![(name, up)],
        };
        linears.push((self.down_name, &mut self.down));
        linears
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        for (name, linear) in self.linears() {
            linear.visit(&format!("{path}.{name}"), visitor);
        }
    }
}
