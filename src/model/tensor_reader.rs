//! Layers from a model's files or from random numbers, one tensor at a time.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::{bf16, f16};

use super::config::ModelConfig;
use super::names::Linear;
use super::pieces::{Layout, Piece, pieces};
use super::quant_cache::Cached;
use super::storage::{Keep, Kept, Storage};
use super::weights::{Dtype, Weights, WeightsError};
use crate::kernels::{QuantWeight, Weight};
use crate::nn::{LoraLinear, Norm, NormKind};
use crate::quant::{QuantMatrix, Scheme};
use crate::random::Stream;

/// Where the first value of a tensor comes from.
enum Source<'a> {
    Files {
        weights: &'a Weights,
        keep: Keep<'a>,
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
    /// Names of the tensors whose type [`Keep`] decides; the others are in f32.
    pub(super) matrices: BTreeSet<String>,
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
    /// Values from files that were checked against `config`.
    pub(super) fn files(
        weights: &'a Weights,
        config: ModelConfig,
        device: &Device,
        keep: Keep<'a>,
    ) -> Self {
        Self::new(Source::Files { weights, keep }, config, device)
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

    /// Whether frozen matrices are rounded to bf16, and so may be what they are multiplied with.
    pub(super) fn keeps_bf16(&self) -> bool {
        matches!(&self.source, Source::Files { keep, .. } if keep.storage == Storage::Bf16)
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
            Source::Nowhere => {
                self.outline.matrices.insert(name.to_string());
                return self.tensor(name, shape, 0.0);
            }
            Source::Files { weights, keep } => {
                let changes = (keep.in_f32)(name);
                let storage = if changes { Storage::F32 } else { keep.storage };
                let (data, dtype) = matrix(weights, storage, &self.config, name, shape)?;
                self.note(name, &shape);
                let device = &self.device;
                let send = |data| Tensor::from_data(data, (device, dtype));
                return Ok(match changes {
                    true => send(data),
                    // A GPU's memory for what stays as it is lies apart from that for a step, whose pages
                    // are as large as the largest of its blocks.
                    false => device.memory_persistent_allocations(data, send),
                });
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
        let weight = self.linear_weight(&format!("{path}.weight"), [out, input])?;
        self.with_bias(path, weight, bias.then_some(out))
    }

    /// Quantised where linear layers are.
    fn linear_weight(&mut self, name: &str, shape: [usize; 2]) -> Read<Weight> {
        let (weights, keep) = match &self.source {
            Source::Files { weights, keep } if !(keep.in_f32)(name) => (*weights, *keep),
            _ => return Ok(self.matrix(name, shape)?.into()),
        };
        let pieces = pieces(&self.config, name, &shape);
        let matrix = match (keep.linears, &pieces[..]) {
            (Some(scheme), _) => {
                let kept = keep.cached.and_then(|kept| kept.get(name, shape, scheme));
                Some(match kept {
                    Some(matrix) => matrix,
                    None => quantised(weights, &pieces, (name, shape), (scheme, keep.cached))?,
                })
            }
            (None, [one]) if keep.gguf_blocks && one.layout == Layout::Whole => {
                weights.blocks(&one.name)?.map(QuantMatrix::from)
            }
            _ => None,
        };
        let Some(matrix) = matrix else {
            return Ok(self.matrix(name, shape)?.into());
        };
        let stored = pieces.iter().map(|piece| weights.dtype(&piece.name));
        let in_bf16 = keep.storage.of(stored) == Dtype::BF16;
        self.note(name, &shape);
        let weight = QuantWeight::new(matrix, in_bf16, &self.device);
        Ok(Weight::Quantised(Arc::new(weight)))
    }

    /// The linear layer of a router: no adapter of linear layers counts it, and it is kept in f32, as
    /// little changes which experts it chooses.
    pub(super) fn router(&mut self, path: &str, shape: [usize; 2], bias: bool) -> Read<LoraLinear> {
        let name = format!("{path}.weight");
        let weight = match &self.source {
            Source::Random(_) => self.matrix(&name, shape)?,
            _ => self.tensor(&name, shape, 0.0)?,
        };
        self.with_bias(path, weight.into(), bias.then_some(shape[0]))
    }

    /// `bias` outputs have one.
    fn with_bias(&mut self, path: &str, weight: Weight, bias: Option<usize>) -> Read<LoraLinear> {
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
                let values = gather(weights, &pieces(&self.config, name, &shape), &shape)?;
                TensorData::new::<f32, _>(values, shape)
            }
        };
        Ok(Tensor::from_data(data, &self.device))
    }
}

type Read<T> = Result<T, WeightsError>;

/// A matrix of the files, and the type in which it is kept.
fn matrix<const D: usize>(
    weights: &Weights,
    storage: Storage,
    config: &ModelConfig,
    name: &str,
    shape: [usize; D],
) -> Read<(TensorData, DType)> {
    let pieces = pieces(config, name, &shape);
    let stored = pieces.iter().map(|piece| weights.dtype(&piece.name));
    Ok(match storage.of(stored) {
        Dtype::F16 => {
            let values = gather::<f16>(weights, &pieces, &shape)?;
            (TensorData::new(values, shape), DType::F16)
        }
        Dtype::BF16 => {
            let values = gather::<bf16>(weights, &pieces, &shape)?;
            (TensorData::new(values, shape), DType::BF16)
        }
        _ => {
            let values = gather::<f32>(weights, &pieces, &shape)?;
            (TensorData::new(values, shape), DType::F32)
        }
    })
}

/// A matrix of the files, quantised: in f32 in between, for this one alone. It is kept for the next time.
fn quantised(
    weights: &Weights,
    pieces: &[Piece],
    (name, shape): (&str, [usize; 2]),
    (scheme, cached): (Scheme, Option<&Cached>),
) -> Read<QuantMatrix> {
    let values = gather::<f32>(weights, pieces, &shape)?;
    let matrix = QuantMatrix::quantise(&values, shape, scheme);
    let matrix = matrix.map_err(|source| WeightsError::NotFinite {
        path: weights.path().to_path_buf(),
        name: name.to_string(),
        source,
    })?;
    if let Some(cached) = cached {
        cached.put(name, &matrix);
    }
    Ok(matrix)
}

/// The values of a tensor put together from the tensors of its files.
fn gather<T: Kept>(weights: &Weights, pieces: &[Piece], shape: &[usize]) -> Read<Vec<T>> {
    if let [one] = pieces
        && one.layout == Layout::Whole
    {
        return weights.read::<T>(&one.name);
    }
    let mut values = vec![T::zeroed(); shape.iter().product()];
    for piece in pieces {
        piece.put(&weights.read::<T>(&piece.name)?, &mut values);
    }
    Ok(values)
}
