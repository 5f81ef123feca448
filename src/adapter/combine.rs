//! Several adapters as one: sums of deltas, as PEFT's `add_weighted_adapter` forms them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::config::AdapterConfig;
use super::linalg::{Matrix, Svd, qr, svd};
use super::peft::{AdapterWeights, LoraPair, PeftError, matcher};
use super::target::Targeting;
use crate::model::names;
use crate::recipe::plan::{TargetModules, TrainedBias};

/// An adapter that has been read, with its weight in the sum.
#[derive(Debug, Clone)]
pub struct Weighted {
    /// Its directory, for messages.
    pub dir: PathBuf,
    /// What its deltas are multiplied by.
    pub weight: f64,
    /// Its configuration.
    pub config: AdapterConfig,
    /// Its tensors.
    pub weights: AdapterWeights,
}

/// How deltas `Δᵢ = sᵢ Bᵢ Aᵢ` with weights wᵢ become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// `Σ wᵢ Δᵢ` exactly: all A over one another, all B beside one another; the ranks add up.
    Cat,
    /// `(Σ √(wᵢ sᵢ) Bᵢ) (Σ √(wᵢ sᵢ) Aᵢ)`, of the adapters' own rank; not their sum, for each B meets each
    /// A.
    Linear,
    /// The nearest delta to `Σ wᵢ Δᵢ` of this rank.
    Svd {
        /// Rank of the result.
        rank: usize,
    },
}

/// Why adapters cannot be combined.
#[derive(Debug, thiserror::Error)]
pub enum CombineError {
    /// An adapter that is no sum's summand.
    #[error("{}: {cause}", dir.display())]
    Kind {
        /// The adapter.
        dir: PathBuf,
        /// What stands in the way, and what to do.
        cause: &'static str,
    },
    /// Two adapters that trained the same tensor whole.
    #[error(
        "{name} was trained whole by {} and by {}; two such tensors have no sum: merge one adapter only",
        .dirs[0].display(), .dirs[1].display()
    )]
    Twice {
        /// The tensor.
        name: String,
        /// Both adapters.
        dirs: [PathBuf; 2],
    },
    /// Ranks that differ, which `linear` cannot add.
    #[error(
        "{module}: ranks {} and {} cannot be added by `linear`; use cat or svd", .ranks[0], .ranks[1]
    )]
    Ranks {
        /// The module.
        module: String,
        /// Two ranks.
        ranks: [usize; 2],
    },
    /// Deltas of one module that differ in shape.
    #[error("{module}: the adapters have shapes {:?} and {:?}, so they belong to different bases", .shapes[0], .shapes[1])]
    Shapes {
        /// The module.
        module: String,
        /// `[out, in]` of two of them.
        shapes: [[usize; 2]; 2],
    },
    /// An adapter's configuration cannot be used.
    #[error(transparent)]
    Adapter(#[from] PeftError),
}

/// One adapter that stands for all, whose deltas have scaling 1.
///
/// # Errors
/// [`CombineError`].
pub fn combine(
    adapters: &[Weighted],
    combination: Combination,
) -> Result<(AdapterConfig, AdapterWeights), CombineError> {
    let mut summands: BTreeMap<&str, Vec<Summand>> = BTreeMap::new();
    let mut saved = BTreeMap::new();
    let mut owners: BTreeMap<&str, &Path> = BTreeMap::new();
    for adapter in adapters {
        check(adapter, combination)?;
        let matcher = matcher(&adapter.config, &adapter.dir)?;
        for (module, pair) in &adapter.weights.pairs {
            let found = matcher.adapter(module);
            let summand = Summand {
                pair,
                factor: adapter.weight * found.scaling,
                experts: pair.a_shape[0] / found.rank.max(1),
            };
            summands.entry(module).or_default().push(summand);
        }
        for (name, tensor) in &adapter.weights.saved {
            if let Some(first) = owners.insert(name, &adapter.dir) {
                return Err(CombineError::Twice {
                    name: name.clone(),
                    dirs: [first.to_owned(), adapter.dir.clone()],
                });
            }
            saved.insert(name.clone(), tensor.clone());
        }
    }
    let with_rows: Vec<&Weighted> = (adapters.iter())
        .filter(|adapter| !adapter.weights.token_rows.is_empty())
        .collect();
    if let [first, second, ..] = with_rows[..] {
        return Err(CombineError::Twice {
            name: "trainable_token_indices".to_owned(),
            dirs: [first.dir.clone(), second.dir.clone()],
        });
    }
    let token_rows =
        (with_rows.first()).map_or_else(BTreeMap::new, |a| a.weights.token_rows.clone());
    let mut pairs = BTreeMap::new();
    for (module, summands) in &summands {
        same_shapes(module, summands)?;
        let pair = match combination {
            Combination::Cat => cat(summands),
            Combination::Linear => linear(module, summands)?,
            Combination::Svd { rank } => truncated(summands, rank),
        };
        pairs.insert((*module).to_owned(), pair);
    }
    let config = config(adapters, &pairs, &summands);
    let pairs = pairs.into_iter().map(|(module, pair)| {
        let experts = summands[module.as_str()][0].experts;
        let pair = padded(pair, config.targeting.rank, experts);
        (module, pair)
    });
    let bases: BTreeSet<_> = adapters.iter().map(|a| &a.weights.base).collect();
    let weights = AdapterWeights {
        pairs: pairs.collect(),
        saved,
        token_rows,
        vera: None,
        base: match Vec::from_iter(bases).as_slice() {
            [Some(base)] => Some(base.clone()),
            _ => None,
        },
    };
    Ok((config, weights))
}

/// One adapter's delta of a module.
struct Summand<'a> {
    pair: &'a LoraPair,
    /// wᵢ sᵢ
    factor: f64,
    /// Experts whose deltas lie in the pair together.
    experts: usize,
}

fn check(adapter: &Weighted, combination: Combination) -> Result<(), CombineError> {
    let parameter = |path: &String| names::parameter_of(path).is_some_and(|p| p == *path);
    let has_experts = adapter.weights.pairs.keys().any(parameter);
    let cause = if adapter.weights.vera.is_some() {
        "a VeRA adapter alone is not enough to say what its deltas are; merge it into its base first"
    } else if adapter.config.use_dora {
        "DoRA rescales the whole weight, so that it has no sum with others; merge it into its base alone"
    } else if adapter.config.taken_out().is_some() {
        "its deltas depend on the base (PiSSA or OLoRA); save it as a plain LoRA first \
         (PEFT's path_initial_model_for_weight_conversion)"
    } else if has_experts && combination != Combination::Cat {
        "adapters on experts can be added by `cat` only"
    } else if adapter.weight != 1.0
        && !(adapter.weights.saved.is_empty() && adapter.weights.token_rows.is_empty())
    {
        "it trained tensors whole, which have no weight; give it the weight 1"
    } else {
        return Ok(());
    };
    Err(CombineError::Kind {
        dir: adapter.dir.clone(),
        cause,
    })
}

fn same_shapes(module: &str, summands: &[Summand]) -> Result<(), CombineError> {
    let shape = |summand: &Summand| [summand.pair.b_shape[0], summand.pair.a_shape[1]];
    let first = shape(&summands[0]);
    match summands.iter().map(shape).find(|other| *other != first) {
        None => Ok(()),
        Some(other) => Err(CombineError::Shapes {
            module: module.to_owned(),
            shapes: [first, other],
        }),
    }
}

/// A over A, expert by expert, with the factors in A; B beside B.
fn cat(summands: &[Summand]) -> LoraPair {
    let first = &summands[0];
    let ([_, input], [out, _]) = (first.pair.a_shape, first.pair.b_shape);
    let experts = first.experts;
    let mut a = Vec::new();
    for expert in 0..experts {
        for summand in summands {
            let rows = summand.pair.a.len() / experts;
            let rows = &summand.pair.a[expert * rows..][..rows];
            a.extend(rows.iter().map(|x| (f64::from(*x) * summand.factor) as f32));
        }
    }
    let mut b = Vec::new();
    for row in 0..out {
        for summand in summands {
            let width = summand.pair.b_shape[1];
            b.extend_from_slice(&summand.pair.b[row * width..][..width]);
        }
    }
    let rank = a.len() / input.max(1);
    LoraPair {
        a,
        a_shape: [rank, input],
        b,
        b_shape: [out, rank],
        magnitude: None,
    }
}

fn linear(module: &str, summands: &[Summand]) -> Result<LoraPair, CombineError> {
    let mut sum = summands[0].pair.clone();
    sum.a.fill(0.0);
    sum.b.fill(0.0);
    for Summand { pair, factor, .. } in summands {
        if pair.a_shape != sum.a_shape {
            return Err(CombineError::Ranks {
                module: module.to_owned(),
                ranks: [sum.a_shape[0], pair.a_shape[0]],
            });
        }
        let root = factor.abs().sqrt();
        let add = |sum: &mut [f32], values: &[f32], factor: f64| {
            for (sum, x) in sum.iter_mut().zip(values) {
                *sum += (f64::from(*x) * factor) as f32;
            }
        };
        add(&mut sum.a, &pair.a, root.copysign(*factor));
        add(&mut sum.b, &pair.b, root);
    }
    Ok(sum)
}

/// The nearest delta of this rank (Eckart and Young 1936). The sum is never formed: QR of both factors
/// leaves a small matrix to decompose.
fn truncated(summands: &[Summand], rank: usize) -> LoraPair {
    let whole = cat(summands);
    let (a, b) = (
        Matrix::from_f32(&whole.a, whole.a_shape),
        Matrix::from_f32(&whole.b, whole.b_shape),
    );
    let ((qb, rb), (qa, ra)) = (qr(&b), qr(&a.transposed()));
    let Svd { u, s, v } = svd(&rb.times(&ra.transposed()));
    let rank = rank.min(s.len());
    let b = qb.times(&u.first_columns(rank).scale_columns(&s[..rank]));
    let a = qa.times(&v.first_columns(rank)).transposed();
    LoraPair {
        a: a.to_f32(),
        a_shape: [a.rows, a.cols],
        b: b.to_f32(),
        b_shape: [b.rows, b.cols],
        magnitude: None,
    }
}

/// The same delta with rank `rank` for each expert, what is missing being zero.
fn padded(pair: LoraPair, rank: usize, experts: usize) -> LoraPair {
    let ([rows, input], [out, columns]) = (pair.a_shape, pair.b_shape);
    let own = rows / experts.max(1);
    if own == rank {
        return pair;
    }
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for expert in pair.a.chunks_exact(own * input) {
        a.extend_from_slice(expert);
        a.resize(a.len() + (rank - own) * input, 0.0);
    }
    for row in pair.b.chunks_exact(columns) {
        b.extend_from_slice(row);
        b.resize(b.len() + (rank - own) * experts, 0.0);
    }
    LoraPair {
        a,
        a_shape: [rank * experts, input],
        b,
        b_shape: [out, rank * experts],
        magnitude: None,
    }
}

/// The first adapter's configuration with one rank for all modules, which are named in full.
fn config(
    adapters: &[Weighted],
    pairs: &BTreeMap<String, LoraPair>,
    summands: &BTreeMap<&str, Vec<Summand>>,
) -> AdapterConfig {
    let first = &adapters[0].config;
    let ranks = (pairs.iter())
        .map(|(module, pair)| pair.a_shape[0] / summands[module.as_str()][0].experts.max(1));
    let rank = ranks.max().unwrap_or(1);
    let (parameters, modules): (Vec<String>, Vec<String>) =
        (pairs.keys().cloned()).partition(|path| names::parameter_of(path).is_some());
    let to_save: BTreeSet<String> = (adapters.iter())
        .flat_map(|adapter| adapter.config.modules_to_save.clone())
        .collect();
    let biases = adapters.iter().map(|adapter| adapter.config.bias);
    AdapterConfig {
        targeting: Targeting {
            target_parameters: (parameters.iter())
                .filter_map(|path| names::parameter_of(path))
                .collect(),
            rank,
            alpha: rank as f64,
            ..Targeting::of_names(modules)
        },
        lora_dropout: 0.0,
        modules_to_save: to_save.into_iter().collect(),
        bias: (biases.into_iter())
            .find(|bias| *bias != TrainedBias::None)
            .unwrap_or_default(),
        init_lora_weights: serde_json::Value::Bool(true),
        trained_tokens: adapters
            .iter()
            .find_map(|a| a.config.trained_tokens.clone()),
        ..first.clone()
    }
}

impl Targeting {
    /// These modules and no others.
    fn of_names(modules: Vec<String>) -> Self {
        Self {
            target_modules: TargetModules::Names(modules),
            ..Self::all_linear(1, 1.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    const SHAPE: [usize; 2] = [7, 5];

    fn adapter(seed: u64, rank: usize, weight: f64) -> Weighted {
        let stream = Stream::new(seed);
        let values = |n: usize, at: u64| {
            (0..n)
                .map(|i| stream.normal(at + i as u64) as f32)
                .collect()
        };
        let pair = LoraPair {
            a: values(rank * SHAPE[1], 0),
            a_shape: [rank, SHAPE[1]],
            b: values(SHAPE[0] * rank, 1000),
            b_shape: [SHAPE[0], rank],
            magnitude: None,
        };
        let targeting = Targeting {
            rank,
            alpha: 3.0,
            ..Targeting::of_names(vec!["m".to_owned()])
        };
        Weighted {
            dir: PathBuf::from(format!("adapter{seed}")),
            weight,
            config: AdapterConfig::new("base", None, targeting, 0.1),
            weights: AdapterWeights {
                pairs: [("m".to_owned(), pair)].into(),
                ..AdapterWeights::default()
            },
        }
    }

    fn product(pair: &LoraPair, factor: f64) -> Vec<f64> {
        let a = Matrix::from_f32(&pair.a, pair.a_shape);
        let b = Matrix::from_f32(&pair.b, pair.b_shape);
        b.times(&a).data.iter().map(|x| x * factor).collect()
    }

    fn sum(adapters: &[Weighted]) -> Vec<f64> {
        let mut sum = vec![0.0; SHAPE[0] * SHAPE[1]];
        for adapter in adapters {
            let pair = &adapter.weights.pairs["m"];
            let factor = adapter.weight * 3.0 / pair.a_shape[0] as f64;
            let delta = product(pair, factor);
            sum.iter_mut().zip(delta).for_each(|(s, x)| *s += x);
        }
        sum
    }

    fn combined(adapters: &[Weighted], how: Combination) -> (AdapterConfig, LoraPair) {
        let (config, weights) = combine(adapters, how).unwrap();
        let pair = weights.pairs["m"].clone();
        assert_eq!(pair.a_shape[0], config.targeting.rank);
        assert_eq!(config.targeting.alpha, config.targeting.rank as f64);
        (config, pair)
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn cat_and_a_full_svd_are_the_sum() {
        let adapters = [adapter(1, 2, 0.5), adapter(2, 3, -1.5)];
        let want = sum(&adapters);
        for how in [Combination::Cat, Combination::Svd { rank: 5 }] {
            let (config, pair) = combined(&adapters, how);
            assert_eq!(config.targeting.rank, 5);
            assert!(distance(&product(&pair, 1.0), &want) < 1e-5, "{how:?}");
        }
    }

    #[test]
    fn a_lower_rank_is_the_nearest() {
        let adapters = [adapter(1, 2, 0.5), adapter(2, 3, 1.5)];
        let want = sum(&adapters);
        let whole = svd(&Matrix {
            data: want.clone(),
            rows: SHAPE[0],
            cols: SHAPE[1],
        });
        let (_, pair) = combined(&adapters, Combination::Svd { rank: 2 });
        let lost = product(&pair, 1.0)
            .iter()
            .zip(&want)
            .map(|(a, b)| (a - b).powi(2))
            .sum::<f64>();
        let least = whole.s[2..].iter().map(|s| s * s).sum::<f64>();
        assert!(
            (lost - least).abs() < 1e-5 * (1.0 + least),
            "{lost} {least}"
        );
    }

    #[test]
    fn linear_is_pefts_and_needs_one_rank() {
        let one = [adapter(1, 2, -2.0)];
        let (_, pair) = combined(&one, Combination::Linear);
        assert!(distance(&product(&pair, 1.0), &sum(&one)) < 1e-5);
        let error = combine(
            &[adapter(1, 2, 1.0), adapter(2, 3, 1.0)],
            Combination::Linear,
        );
        assert!(error.unwrap_err().to_string().contains("ranks 2 and 3"));
    }

    #[test]
    fn what_has_no_sum_is_refused() {
        let mut dora = adapter(1, 2, 1.0);
        dora.config.use_dora = true;
        let error = combine(&[dora, adapter(2, 2, 1.0)], Combination::Cat).unwrap_err();
        assert!(error.to_string().starts_with("adapter1: DoRA"), "{error}");
    }

    #[test]
    fn experts_keep_their_order() {
        // Two experts with ranks 1 and 2: rows of A by expert, columns of B by rank.
        let pair = |rank: usize, at: f32| LoraPair {
            a: (0..2 * rank).map(|i| at + i as f32).collect(),
            a_shape: [2 * rank, 1],
            b: (0..2 * rank).map(|i| 10.0 * (at + i as f32)).collect(),
            b_shape: [1, 2 * rank],
            magnitude: None,
        };
        let (one, two) = (pair(1, 1.0), pair(2, 5.0));
        let summand = |pair| Summand {
            pair,
            factor: 1.0,
            experts: 2,
        };
        let whole = cat(&[summand(&one), summand(&two)]);
        assert_eq!(whole.a, [1.0, 5.0, 6.0, 2.0, 7.0, 8.0]);
        assert_eq!(whole.b, [10.0, 20.0, 50.0, 60.0, 70.0, 80.0]);
        let padded = padded(one, 2, 2);
        assert_eq!(padded.a, [1.0, 0.0, 2.0, 0.0]);
        assert_eq!(padded.b, [10.0, 20.0, 0.0, 0.0]);
    }
}
