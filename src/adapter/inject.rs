//! Puts adapters into a model, and takes them out.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::config::{AdapterConfig, TrainedBias};
use super::peft::{AdapterWeights, LoraPair, Saved};
use super::target::ModuleAdapter;
use super::vera::{self, VeraConfig, VeraWeights};
use crate::device::to_vec;
use crate::kernels::Weight;
use crate::model::{CausalLm, names};
use crate::nn::lora_linear::row_squares;
use crate::nn::{ExpertDelta, Lambdas, LoraDelta, Magnitude, Parameter, TokenRows};
use crate::random::Stream;

/// The first values of adapters.
pub enum Init<'a> {
    /// As the configuration says: at first, A uniform in ±1/√in and B zero (Kaiming uniform with
    /// a = √5).
    Fresh {
        /// Seed of A.
        seed: u64,
    },
    /// Values of an adapter that [`fit_model`](super::peft::fit_model) has checked against the base.
    Loaded(&'a AdapterWeights),
}

/// Gives each listed module a trainable delta, and makes train what the configuration says trains
/// whole; everything else stays frozen.
pub fn inject(
    model: &mut CausalLm,
    config: &AdapterConfig,
    adapters: &[ModuleAdapter],
    init: &Init,
) {
    let device = model.device().clone();
    let by_module: BTreeMap<&str, (usize, &ModuleAdapter)> = adapters
        .iter()
        .enumerate()
        .map(|(i, adapter)| (adapter.module.as_str(), (i, adapter)))
        .collect();
    inject_tokens(model, config, init);
    if let Some(vera) = &config.vera {
        inject_vera(model, (config, vera), &by_module, init);
        train_whole(model, config, &by_module, init);
        return;
    }
    if config.taken_out().is_some() && by_module.contains_key(names::HEAD) {
        // What the head loses the embedding keeps.
        model.untie();
    }
    let mut residuals = BTreeMap::new();
    for (path, weight, delta) in model.deltas() {
        let Some(&(index, adapter)) = by_module.get(path.as_str()) else {
            continue;
        };
        let is_embedding = path == names::EMBEDDING;
        let (rank, scaling) = (adapter.rank, adapter.scaling);
        let start = config.taken_out().filter(|_| !is_embedding).map(|taken| {
            let values = to_vec(Parameter::Matrix(&mut weight.in_f32(&device)).flat());
            taken.first_values(&values, weight.dims(), rank, scaling)
        });
        let pair = match (init, &start) {
            (Init::Fresh { .. }, Some(start)) => start.clone(),
            (Init::Fresh { seed }, None) => {
                let stream = Stream::new(*seed).split(0xA).split(index as u64);
                match is_embedding {
                    true => fresh_embedding(weight.dims(), rank, stream),
                    false => fresh(weight.dims(), rank, config.first_a(rank), stream),
                }
            }
            (Init::Loaded(loaded), _) => match loaded.pairs.get(&path) {
                Some(pair) => pair.clone(),
                None => continue,
            },
        };
        let start = start.map(|start| {
            let matrix =
                |values, shape| Tensor::<2>::from_data(TensorData::new(values, shape), &device);
            (
                matrix(start.a, start.a_shape),
                matrix(start.b, start.b_shape),
            )
        });
        let weight = match &start {
            Some((a, b)) => {
                let rest = weight.in_f32(&device) - b.clone().matmul(a.clone()) * scaling;
                residuals.insert(format!("{path}.weight"), rest.clone());
                rest.into()
            }
            None => weight,
        };
        let mut lora = LoraDelta {
            lora_a: leaf(pair.a, pair.a_shape, &device),
            lora_b: leaf(pair.b, pair.b_shape, &device),
            scaling,
            magnitude: None,
            lambdas: None,
            start,
            dropout: config.lora_dropout,
            module: index as u64,
        };
        if config.use_dora {
            lora.magnitude = Some(match is_embedding {
                true => magnitude(
                    &weight.in_f32(&device).transpose().into(),
                    &lora.transposed(),
                    pair.magnitude,
                ),
                false => magnitude(&weight, &lora, pair.magnitude),
            });
        }
        *delta = Some(lora);
    }
    model.visit(&mut |name, mut parameter| {
        if let Some(mut residual) = residuals.remove(name) {
            parameter.set_flat(Parameter::Matrix(&mut residual).flat());
        }
    });
    inject_experts(model, config, &by_module, init);
    train_whole(model, config, &by_module, init);
}

/// Makes chosen tokens' rows train. A head that is the embedding trains with it, unless it has been
/// asked for other rows.
fn inject_tokens(model: &mut CausalLm, config: &AdapterConfig, init: &Init) {
    let Some(tokens) = &config.trained_tokens else {
        return;
    };
    model.grow(tokens.vocabulary());
    let device = model.device().clone();
    let tied = model.is_tied();
    let width = model.config().hidden_size;
    for (module, table, slot) in model.token_rows() {
        let Some(ids) = tokens.of(module).filter(|ids| !ids.is_empty()) else {
            continue;
        };
        if module == names::HEAD && tied && tokens.of(names::EMBEDDING) == Some(ids) {
            continue;
        }
        let loaded = match init {
            Init::Loaded(loaded) => loaded.token_rows.get(module),
            Init::Fresh { .. } => None,
        };
        let rows = match loaded {
            Some(Saved { values, .. }) => leaf(values.clone(), [ids.len(), width], &device),
            None => {
                let at: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
                let at = TensorData::new(at, [ids.len()]);
                let at = Tensor::<1, Int>::from_data(at, &device);
                let rows = table.select(0, at).cast(DType::F32);
                rows.autodiff().require_grad()
            }
        };
        let ids = ids.to_vec();
        *slot = Some(TokenRows { ids, rows });
    }
}

/// Gives the chosen layers VeRA's deltas, which share their factors.
fn inject_vera(
    model: &mut CausalLm,
    (config, settings): (&AdapterConfig, &VeraConfig),
    adapted: &BTreeMap<&str, (usize, &ModuleAdapter)>,
    init: &Init,
) {
    let device = model.device().clone();
    let layers = names::adaptable(model.config());
    let rank = config.targeting.rank;
    let loaded = match init {
        Init::Loaded(AdapterWeights { vera, .. }) => vera.as_ref(),
        Init::Fresh { .. } => None,
    };
    let shared = match loaded {
        Some(loaded) => loaded.projections(settings, &layers),
        None => {
            let chosen = layers
                .iter()
                .filter(|l| adapted.contains_key(l.path.as_str()));
            vera::projections(settings.projection_prng_key, rank, chosen)
        }
    };
    let frozen = |values, shape| Tensor::<2>::from_data(TensorData::new(values, shape), &device);
    let lora_a: Tensor<2> = frozen(shared.a, shared.a_shape);
    let lora_b: Tensor<2> = frozen(shared.b, shared.b_shape);
    let vector = |values: Vec<f32>| {
        let n = values.len();
        Tensor::<1>::from_data(TensorData::new(values, [n]), &device)
            .autodiff()
            .require_grad()
    };
    for (path, weight, delta) in model.deltas() {
        let Some(&(index, adapter)) = adapted.get(path.as_str()) else {
            continue;
        };
        let [out, in_features] = weight.dims();
        let first = loaded.and_then(|loaded| loaded.lambdas.get(&path).cloned());
        let first = first.unwrap_or_else(|| vera::Lambdas {
            d: vec![settings.d_initial as f32; rank],
            b: vec![0.0; out],
        });
        *delta = Some(LoraDelta {
            lora_a: lora_a.clone(),
            lora_b: lora_b.clone(),
            scaling: adapter.scaling,
            magnitude: None,
            lambdas: Some(Lambdas {
                d: vector(first.d),
                b: vector(first.b),
                in_features,
            }),
            start: None,
            dropout: config.lora_dropout,
            module: index as u64,
        });
    }
}

/// Gives the chosen experts' layers their deltas.
fn inject_experts(
    model: &mut CausalLm,
    config: &AdapterConfig,
    adapted: &BTreeMap<&str, (usize, &ModuleAdapter)>,
    init: &Init,
) {
    let device = model.device().clone();
    for (path, layer) in model.experts() {
        let Some(&(index, adapter)) = adapted.get(path.as_str()) else {
            continue;
        };
        let [experts, out, input] = layer.weight.dims();
        let pair = match init {
            Init::Fresh { seed } => {
                let stream = Stream::new(*seed).split(0xA).split(index as u64);
                let first = config.first_a(adapter.rank);
                fresh([out, input], experts * adapter.rank, first, stream)
            }
            Init::Loaded(loaded) => match loaded.pairs.get(&path) {
                Some(pair) => pair.clone(),
                None => continue,
            },
        };
        layer.lora = Some(ExpertDelta {
            lora_a: leaf(pair.a, pair.a_shape, &device),
            lora_b: leaf(pair.b, pair.b_shape, &device),
            scaling: adapter.scaling,
            dropout: config.lora_dropout,
            module: index as u64,
        });
    }
}

/// A trainable matrix.
fn leaf(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::<2>::from_data(TensorData::new(values, shape), device)
        .autodiff()
        .require_grad()
}

/// How the A of a fresh delta is drawn.
enum FirstA {
    /// Uniform in ±1/√in.
    Kaiming,
    /// Normal with this standard deviation.
    Gaussian(f64),
}

impl AdapterConfig {
    fn first_a(&self, rank: usize) -> FirstA {
        match self.init_lora_weights == "gaussian" {
            true => FirstA::Gaussian(1.0 / rank as f64),
            false => FirstA::Kaiming,
        }
    }
}

/// The first values of a delta.
fn fresh([out, input]: [usize; 2], rank: usize, first: FirstA, stream: Stream) -> LoraPair {
    let bound = 1.0 / (input as f64).sqrt();
    let draw = |i| match first {
        FirstA::Kaiming => (2.0 * stream.uniform(i) - 1.0) * bound,
        FirstA::Gaussian(deviation) => stream.normal(i) * deviation,
    };
    let a = (0..(rank * input) as u64).map(|i| draw(i) as f32).collect();
    LoraPair {
        a,
        a_shape: [rank, input],
        b: vec![0f32; out * rank],
        b_shape: [out, rank],
        magnitude: None,
    }
}

/// The first values of an embedding's delta: B zero and A normal, as in PEFT, whose A and B are this B
/// and A transposed.
fn fresh_embedding([tokens, width]: [usize; 2], rank: usize, stream: Stream) -> LoraPair {
    let a = (0..(rank * width) as u64)
        .map(|i| stream.normal(i) as f32)
        .collect();
    LoraPair {
        a,
        a_shape: [rank, width],
        b: vec![0f32; tokens * rank],
        b_shape: [tokens, rank],
        magnitude: None,
    }
}

/// The magnitudes of a layer: as loaded, else the lengths that the rows have, so that nothing
/// changes at first.
fn magnitude(weight: &Weight, lora: &LoraDelta, loaded: Option<Vec<f32>>) -> Magnitude {
    let squares = row_squares(weight, &lora.lora_a.device());
    let vector = match loaded {
        Some(values) => {
            let n = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [n]), &squares.device())
        }
        None => lora.row_norms(weight, &squares),
    };
    Magnitude {
        vector: vector.autodiff().require_grad(),
        squares,
    }
}

/// Makes biases and whole modules train.
fn train_whole(
    model: &mut CausalLm,
    config: &AdapterConfig,
    adapted: &BTreeMap<&str, (usize, &ModuleAdapter)>,
    init: &Init,
) {
    if config.saves(names::HEAD) || config.saves(names::EMBEDDING) {
        model.untie();
    }
    model.visit(&mut |name, mut parameter| {
        let Some((module, field)) = name.rsplit_once('.') else {
            return;
        };
        let bias = field == "bias"
            && match config.bias {
                TrainedBias::None => false,
                TrainedBias::All => true,
                TrainedBias::LoraOnly => adapted.contains_key(module),
            };
        let whole = matches!(field, "weight" | "bias") && config.saves(module);
        if !bias && !whole {
            return;
        }
        if let Init::Loaded(AdapterWeights { saved, .. }) = init
            && let Some(Saved { values, .. }) = saved.get(name)
        {
            let data = TensorData::new(values.clone(), [values.len()]);
            let device = parameter.flat().device();
            parameter.set_flat(Tensor::from_data(data, &device));
        }
        parameter.set_trainable(true);
    });
}

/// Makes every weight train (`adapter.method: full`).
pub fn train_all(model: &mut CausalLm) {
    model.visit(&mut |_, mut parameter| parameter.set_trainable(true));
}

/// The adapter's current values.
///
/// Of deltas that began with a part of the base, the difference is given: a delta of twice the rank for
/// the base as it was ([`AdapterConfig::as_written`] is the configuration that goes with it).
pub fn extract(model: &mut CausalLm) -> AdapterWeights {
    let mut adapter = AdapterWeights::default();
    for (path, _, delta) in model.deltas() {
        if let Some(lora) = delta {
            if let Some(lambdas) = &mut lora.lambdas {
                let vector = |x: &mut Tensor<1>| to_vec(Parameter::Vector(x).flat());
                let (d, b) = (vector(&mut lambdas.d), vector(&mut lambdas.b));
                let vera = adapter.vera.get_or_insert_with(|| VeraWeights {
                    shared: Some(pair_of(&lora.lora_a, &lora.lora_b)),
                    lambdas: BTreeMap::new(),
                });
                vera.lambdas.insert(path, vera::Lambdas { d, b });
                continue;
            }
            let mut pair = pair_of(&lora.lora_a, &lora.lora_b);
            if let Some((a, b)) = &lora.start {
                pair = pair.minus(&pair_of(a, b));
            }
            pair.magnitude =
                (lora.magnitude.as_mut()).map(|m| to_vec(Parameter::Vector(&mut m.vector).flat()));
            adapter.pairs.insert(path, pair);
        }
    }
    for (path, layer) in model.experts() {
        if let Some(lora) = &layer.lora {
            let pair = pair_of(&lora.lora_a, &lora.lora_b);
            adapter.pairs.insert(path, pair);
        }
    }
    for (module, _, rows) in model.token_rows() {
        if let Some(TokenRows { rows, .. }) = rows {
            let saved = Saved {
                shape: rows.dims().to_vec(),
                values: to_vec(Parameter::Matrix(rows).flat()),
            };
            adapter.token_rows.insert(module.to_owned(), saved);
        }
    }
    model.visit_trainable(&mut |name, parameter| {
        if name.ends_with(".weight") || name.ends_with(".bias") {
            let saved = Saved {
                shape: parameter.shape(),
                values: to_vec(parameter.flat()),
            };
            adapter.saved.insert(name.to_owned(), saved);
        }
    });
    adapter
}

/// The values of two factors.
fn pair_of(a: &Tensor<2>, b: &Tensor<2>) -> LoraPair {
    let values = |x: &Tensor<2>| to_vec(Parameter::Matrix(&mut x.clone()).flat());
    LoraPair {
        a: values(a),
        a_shape: a.dims(),
        b: values(b),
        b_shape: b.dims(),
        magnitude: None,
    }
}
