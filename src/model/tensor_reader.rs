//! Layers from a model's files or from random numbers, one tensor at a time.

use burn::tensor::{Device, Tensor, TensorData};

use super::block::Block;
use super::config::ModelConfig;
use super::names::{self, Linear};
use super::weights::{Weights, WeightsError};
use crate::nn::{Attention, LoraLinear, Mlp, RmsNorm};
use crate::random::Stream;

/// Where the first value of a tensor comes from.
enum Source<'a> {
    Files(&'a Weights),
    Random(Stream),
}

/// Builds layers on a device, converting one tensor at a time to f32.
pub(super) struct TensorReader<'a> {
    source: Source<'a>,
    config: ModelConfig,
    device: Device,
    linears: std::vec::IntoIter<Linear>,
    matrices: u64,
}

impl<'a> TensorReader<'a> {
    /// Values from files that were checked against `config`.
    pub(super) fn files(weights: &'a Weights, config: ModelConfig, device: &Device) -> Self {
        Self::new(Source::Files(weights), config, device)
    }

    /// Fresh values.
    pub(super) fn random(seed: u64, config: ModelConfig, device: &Device) -> Self {
        let stream = Stream::new(seed).split(0xBA5E);
        Self::new(Source::Random(stream), config, device)
    }

    fn new(source: Source<'a>, config: ModelConfig, device: &Device) -> Self {
        Self {
            source,
            linears: names::linears(&config).into_iter(),
            config,
            device: device.clone(),
            matrices: 0,
        }
    }

    pub(super) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// A matrix of the file's shape `[rows, cols]`.
    pub(super) fn matrix(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
    ) -> Result<Tensor<2>, WeightsError> {
        self.matrices += 1;
        let values = match &self.source {
            Source::Files(weights) => weights.read_f32(name)?,
            Source::Random(stream) => {
                let (stream, std) = (stream.split(self.matrices), self.config.initializer_range);
                (0..(rows * cols) as u64)
                    .map(|i| (stream.normal(i) * std) as f32)
                    .collect()
            }
        };
        Ok(Tensor::from_data(
            TensorData::new(values, [rows, cols]),
            &self.device,
        ))
    }

    /// A vector, filled with `fresh` where there are no files.
    fn vector(&self, name: &str, n: usize, fresh: f32) -> Result<Tensor<1>, WeightsError> {
        let values = match &self.source {
            Source::Files(weights) => weights.read_f32(name)?,
            Source::Random(_) => vec![fresh; n],
        };
        Ok(Tensor::from_data(
            TensorData::new(values, [n]),
            &self.device,
        ))
    }

    pub(super) fn norm(&self, path: &str) -> Result<RmsNorm, WeightsError> {
        let weight = self.vector(&format!("{path}.weight"), self.config.hidden_size, 1.0)?;
        Ok(RmsNorm {
            weight,
            eps: self.config.rms_norm_eps,
        })
    }

    /// The next linear layer of the model's order.
    fn linear(&mut self) -> Result<LoraLinear, WeightsError> {
        let spec = self
            .linears
            .next()
            .expect("names::linears has every layer that a block asks for");
        let shape = [spec.out_features, spec.in_features];
        let weight = self.matrix(&format!("{}.weight", spec.path), shape)?;
        let bias = if spec.bias {
            Some(self.vector(&format!("{}.bias", spec.path), spec.out_features, 0.0)?)
        } else {
            None
        };
        Ok(LoraLinear::new(weight, bias))
    }

    pub(super) fn block(&mut self, layer: usize) -> Result<Block, WeightsError> {
        let path = names::block(layer);
        Ok(Block {
            input_layernorm: self.norm(&format!("{path}.input_layernorm"))?,
            self_attn: Attention {
                q_proj: self.linear()?,
                k_proj: self.linear()?,
                v_proj: self.linear()?,
                o_proj: self.linear()?,
                heads: self.config.num_attention_heads,
                kv_heads: self.config.num_key_value_heads,
                head_dim: self.config.head_dim,
            },
            post_attention_layernorm: self.norm(&format!("{path}.post_attention_layernorm"))?,
            mlp: Mlp {
                gate_proj: self.linear()?,
                up_proj: self.linear()?,
                down_proj: self.linear()?,
            },
        })
    }
}
