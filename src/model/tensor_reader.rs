//! Layers from a model's files or from random numbers, one tensor at a time.

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::{bf16, f16};

use super::config::ModelConfig;
use super::names::Linear;
use super::pieces::{Layout, Piece, pieces};
use super::storage::{Kept, Storage};
use super::weights::{Dtype, Weights, WeightsError};
use crate::nn::{LoraLinear, Norm, NormKind};
use crate::random::Stream;

/// Where the first value of a tensor comes from.
enum Source<'a> {
    Files {
        weights: &'a Weights,
        storage: Storage,
        /// Names of matrices that are kept in f32 all the same.
        in_f32: &'a dyn Fn(&str) -> bool,
    },
    Random(Stream),
    /// Nothing is read, tensors are empty: for what a configuration calls for.
    Nowhere,
}

/// What a model is made of, without its values.
#[derive(Debug, Default)]
pub(super) struct Outline {
    /// Name in transformers 5's modules, and shape, of every tensor in the model's order.
    pub(super) tensors: Vec<(String, Vec<usize>)>,
    /// Every linear layer but the output head.
    pub(super) linears: Vec<Linear>,
}

/// Builds layers on a device, reading one tensor at a time.
pub(super) struct TensorReader<'a> {
    source: Source<'a>,
    config: ModelConfig,
    device: Device,
    outline: Outline,
    matrices: u64,
}

impl<'a> TensorReader<'a> {
    /// Values from files that were checked against `config`; matrices kept in `storage`, in f32 those
    /// whose names `in_f32` picks.
    pub(super) fn files(
        weights: &'a Weights,
        config: ModelConfig,
        device: &Device,
        storage: Storage,
        in_f32: &'a dyn Fn(&str) -> bool,
    ) -> Self {
        let source = Source::Files {
            weights,
            storage,
            in_f32,
        };
        Self::new(source, config, device)
    }

    /// Fresh values.
    pub(super) fn random(seed: u64, config: ModelConfig, device: &Device) -> Self {
        let stream = Stream::new(seed).split(0xBA5E);
        Self::new(Source::Random(stream), config, device)
    }

    /// No values at all.
    pub(super) fn nowhere(config: ModelConfig) -> Self {
        Self::new(Source::Nowhere, config, &Device::flex())
    }

    fn new(source: Source<'a>, config: ModelConfig, device: &Device) -> Self {
        Self {
            source,
            config,
            device: device.clone(),
            outline: Outline::default(),
            matrices: 0,
        }
    }

    pub(super) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// What was asked for so far.
    pub(super) fn into_outline(self) -> Outline {
        self.outline
    }

    /// A matrix of the file's shape `[rows, cols]`.
    pub(super) fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Read<Tensor<2>> {
        self.weight(name, shape)
    }

    /// A matrix for each expert, `[E, out, in]`.
    pub(super) fn cube(&mut self, name: &str, shape: [usize; 3]) -> Read<Tensor<3>> {
        self.weight(name, shape)
    }

    /// What is drawn normal where there are no files.
    fn weight<const D: usize>(&mut self, name: &str, shape: [usize; D]) -> Read<Tensor<D>> {
        self.matrices += 1;
        let stream = match &self.source {
            Source::Random(stream) => stream,
            Source::Nowhere => return self.tensor(name, shape, 0.0),
            Source::Files {
                weights,
                storage,
                in_f32,
            } => {
                let storage = match in_f32(name) {
                    true => Storage::F32,
                    false => *storage,
                };
                let tensor = matrix(weights, storage, &self.config, name, shape, &self.device)?;
                self.note(name, &shape);
                return Ok(tensor);
            }
        };
        let (stream, std) = (stream.split(self.matrices), self.config.initializer_range);
        self.note(name, &shape);
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n as u64)
            .map(|i| (stream.normal(i) * std) as f32)
            .collect();
        Ok(Tensor::from_data(
            TensorData::new(values, shape),
            &self.device,
        ))
    }

    /// A vector, filled with `fresh` where there are no files.
    pub(super) fn vector(&mut self, name: &str, n: usize, fresh: f32) -> Read<Tensor<1>> {
        self.tensor(name, [n], fresh)
    }

    /// A norm's weight for each head.
    pub(super) fn norm_matrix(&mut self, path: &str, shape: [usize; 2]) -> Read<Tensor<2>> {
        self.tensor(&format!("{path}.weight"), shape, 1.0)
    }

    /// A bias for each expert.
    pub(super) fn bias_matrix(&mut self, name: &str, shape: [usize; 2]) -> Read<Tensor<2>> {
        self.tensor(name, shape, 0.0)
    }

    /// The taps of a convolution, `[channels, K]`.
    pub(super) fn taps(&mut self, name: &str, shape: [usize; 2]) -> Read<Tensor<2>> {
        let spread = 1.0 / (shape[1] as f32).sqrt();
        self.tensor(name, shape, spread)
    }

    /// A norm of the family's kind over `width` columns.
    pub(super) fn norm(&mut self, path: &str, width: usize) -> Read<Norm> {
        let (kind, eps) = (self.config.family.norm, self.config.norm_eps);
        let fresh = match kind {
            NormKind::RmsPlusOne => 0.0,
            _ => 1.0,
        };
        let weight = self.vector(&format!("{path}.weight"), width, fresh)?;
        let bias = match kind {
            NormKind::LayerBias => Some(self.vector(&format!("{path}.bias"), width, 0.0)?),
            _ => None,
        };
        Ok(Norm {
            weight,
            bias,
            eps,
            kind,
        })
    }

    /// A linear layer that can carry an adapter.
    pub(super) fn linear(
        &mut self,
        path: &str,
        [out, input]: [usize; 2],
        bias: bool,
    ) -> Read<LoraLinear> {
        self.outline.linears.push(Linear {
            path: path.to_string(),
            out_features: out,
            in_features: input,
            bias,
        });
        let weight = self.matrix(&format!("{path}.weight"), [out, input])?;
        self.with_bias(path, weight, bias.then_some(out))
    }

    /// The linear layer of a router: no adapter of linear layers counts it, and it is kept in f32, as
    /// little changes which experts it chooses.
    pub(super) fn router(&mut self, path: &str, shape: [usize; 2], bias: bool) -> Read<LoraLinear> {
        let name = format!("{path}.weight");
        let weight = match &self.source {
            Source::Random(_) => self.matrix(&name, shape)?,
            _ => self.tensor(&name, shape, 0.0)?,
        };
        self.with_bias(path, weight, bias.then_some(shape[0]))
    }

    /// `bias` outputs have one.
    fn with_bias(
        &mut self,
        path: &str,
        weight: Tensor<2>,
        bias: Option<usize>,
    ) -> Read<LoraLinear> {
        let bias = bias
            .map(|out| self.vector(&format!("{path}.bias"), out, 0.0))
            .transpose()?;
        Ok(LoraLinear::new(weight, bias))
    }

    fn note(&mut self, name: &str, shape: &[usize]) {
        self.outline
            .tensors
            .push((name.to_string(), shape.to_vec()));
    }

    /// A tensor from the files, `fresh` everywhere where there are none.
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
        fresh: f32,
    ) -> Read<Tensor<D>> {
        self.note(name, &shape);
        let data = match &self.source {
            Source::Nowhere => TensorData::new(Vec::<f32>::new(), [0; D]),
            Source::Random(_) => {
                let n = shape.iter().product();
                TensorData::new(vec![fresh; n], shape)
            }
            Source::Files { weights, .. } => {
                gather::<f32>(weights, &pieces(&self.config, name, &shape), &shape)?
            }
        };
        Ok(Tensor::from_data(data, &self.device))
    }
}

type Read<T> = Result<T, WeightsError>;

/// A matrix of the files in the type in which it is kept.
fn matrix<const D: usize>(
    weights: &Weights,
    storage: Storage,
    config: &ModelConfig,
    name: &str,
    shape: [usize; D],
    device: &Device,
) -> Read<Tensor<D>> {
    let pieces = pieces(config, name, &shape);
    let stored = pieces.iter().map(|piece| weights.dtype(&piece.name));
    let (data, dtype) = match storage.of(stored) {
        Dtype::F16 => (gather::<f16>(weights, &pieces, &shape)?, DType::F16),
        Dtype::BF16 => (gather::<bf16>(weights, &pieces, &shape)?, DType::BF16),
        _ => (gather::<f32>(weights, &pieces, &shape)?, DType::F32),
    };
    Ok(Tensor::from_data(data, (device, dtype)))
}

/// A tensor of the model put together from the tensors of its files.
fn gather<T: Kept>(weights: &Weights, pieces: &[Piece], shape: &[usize]) -> Read<TensorData> {
    let values = match pieces {
        [one] if one.layout == Layout::Whole => weights.read::<T>(&one.name)?,
        _ => {
            let mut values = vec![T::zeroed(); shape.iter().product()];
            for piece in pieces {
                piece.put(&weights.read::<T>(&piece.name)?, &mut values);
            }
            values
        }
    };
    Ok(TensorData::new(values, shape.to_vec()))
}
