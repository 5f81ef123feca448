//! What an adapter adds to a model and makes train, without making it.
//!
//! The counterpart of [`inject`](super::inject::inject) for whoever needs sizes alone; a test compares
//! the two on every reference adapter.

use std::collections::BTreeMap;

use super::config::{AdapterConfig, TrainedBias};
use super::target::ModuleAdapter;
use crate::model::config::ModelConfig;
use crate::model::names::{self, Adaptable, EMBEDDING, HEAD};

/// Shapes of what an adapter consists of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outline {
    /// Every tensor that trains, by its name in the model.
    pub trained: BTreeMap<String, Vec<usize>>,
    /// What is added and does not train, by a name of its own.
    pub frozen: BTreeMap<String, Vec<usize>>,
    /// Whether a head that was the embedding becomes a tensor of its own.
    pub unties: bool,
    /// Rows of the embedding.
    pub vocab_size: usize,
}

impl Outline {
    /// Of a model of which all weights train.
    pub fn of_all(model: &ModelConfig) -> Self {
        Self {
            trained: names::tensors(model).into_iter().collect(),
            vocab_size: model.vocab_size,
            ..Self::default()
        }
    }

    /// Of adapters on these modules.
    pub fn new(model: &ModelConfig, config: &AdapterConfig, modules: &[ModuleAdapter]) -> Self {
        let tokens = config.trained_tokens.as_ref();
        let vocab_size = (tokens.map_or(0, |tokens| tokens.vocabulary())).max(model.vocab_size);
        let mut grown = model.clone();
        grown.vocab_size = vocab_size;
        let adapted = |path: &str| modules.iter().find(|adapter| adapter.module == path);
        let loses = config.taken_out().is_some() && adapted(HEAD).is_some();
        let saves = config.saves(HEAD) || config.saves(EMBEDDING);
        let mut outline = Self {
            unties: model.tie_word_embeddings && (loses || saves),
            vocab_size,
            ..Self::default()
        };
        outline.tokens(&grown, config);
        let layers = names::adaptable(&grown).into_iter();
        let layers = layers.filter_map(|layer| Some((adapted(&layer.path)?.rank, layer)));
        match &config.vera {
            Some(_) => outline.vera(config.targeting.rank, layers.map(|(_, layer)| layer)),
            None => layers.for_each(|(rank, layer)| outline.delta(&layer, rank, config)),
        }
        outline.whole(&grown, config, |path| adapted(path).is_some());
        outline
    }

    /// Numbers that train.
    pub fn trained_numbers(&self) -> usize {
        let sizes = self.trained.values();
        sizes.map(|shape| shape.iter().product::<usize>()).sum()
    }

    fn train(&mut self, name: String, shape: &[usize]) {
        self.trained.insert(name, shape.to_vec());
    }

    /// Rows of tokens, as `inject_tokens` has them.
    fn tokens(&mut self, model: &ModelConfig, config: &AdapterConfig) {
        let Some(tokens) = &config.trained_tokens else {
            return;
        };
        let of = |module| tokens.of(module).filter(|ids| !ids.is_empty());
        for module in [EMBEDDING, HEAD] {
            let Some(ids) = of(module) else {
                continue;
            };
            let shared = module == HEAD && model.tie_word_embeddings && of(EMBEDDING) == Some(ids);
            if !shared {
                let shape = [ids.len(), model.hidden_size];
                self.train(format!("{module}.token_rows"), &shape);
            }
        }
    }

    /// A low-rank delta.
    fn delta(&mut self, layer: &Adaptable, rank: usize, config: &AdapterConfig) {
        let Adaptable {
            path,
            experts,
            out_features: out,
            in_features: input,
        } = layer;
        let (a, b) = ([experts * rank, *input], [*out, rank * experts]);
        self.train(format!("{path}.lora_a"), &a);
        self.train(format!("{path}.lora_b"), &b);
        let is_embedding = path == EMBEDDING;
        if config.use_dora {
            let lengths = [if is_embedding { *input } else { *out }];
            self.train(format!("{path}.magnitude"), &lengths);
            self.frozen
                .insert(format!("{path}.squares"), lengths.to_vec());
        }
        if config.taken_out().is_some() && !is_embedding {
            self.frozen.insert(format!("{path}.start_a"), a.to_vec());
            self.frozen.insert(format!("{path}.start_b"), b.to_vec());
        }
    }

    /// Vectors for each layer, and the factors that all of them share.
    fn vera(&mut self, rank: usize, layers: impl Iterator<Item = Adaptable>) {
        let mut widest = [0, 0];
        for layer in layers {
            let (out, input) = (layer.out_features, layer.in_features);
            widest = [widest[0].max(out), widest[1].max(input)];
            self.train(format!("{}.lambda_d", layer.path), &[rank]);
            self.train(format!("{}.lambda_b", layer.path), &[out]);
        }
        let [out, input] = widest;
        self.frozen.insert("vera_a".into(), vec![rank, input]);
        self.frozen.insert("vera_b".into(), vec![out, rank]);
    }

    /// Biases and whole modules.
    fn whole(
        &mut self,
        model: &ModelConfig,
        config: &AdapterConfig,
        adapted: impl Fn(&str) -> bool,
    ) {
        let mut tensors = names::tensors(model);
        if self.unties {
            let table = vec![model.vocab_size, model.hidden_size];
            tensors.push((format!("{HEAD}.weight"), table));
        }
        for (name, shape) in tensors {
            let Some((module, field)) = name.rsplit_once('.') else {
                continue;
            };
            let bias = match config.bias {
                TrainedBias::None => false,
                TrainedBias::All => field == "bias",
                TrainedBias::LoraOnly => field == "bias" && adapted(module),
            };
            if bias || (matches!(field, "weight" | "bias") && config.saves(module)) {
                self.trained.insert(name, shape);
            }
        }
    }
}
