//! A decoder-only language model: embedding, blocks, norm, output head.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::block::Block;
use super::config::ModelConfig;
use super::names;
use super::tensor_reader::TensorReader;
use super::weights::{self, Weights, WeightsError};
use crate::kernels::{self, Segments};
use crate::nn::{Dropout, LayerCache, LoraLinear, Parameter, RmsNorm, Rope, Rows, Visitor};

/// A causal language model on one device, in f32.
#[derive(Debug, Clone)]
pub struct CausalLm {
    config: ModelConfig,
    embed_tokens: Tensor<2>,
    blocks: Vec<Block>,
    norm: RmsNorm,
    /// `None` when the head is the embedding.
    lm_head: Option<Tensor<2>>,
    rope: Rope,
    device: Device,
}

/// Token ids of some rows of equal length, one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// B · T ids.
    pub ids: &'a [i32],
    /// B
    pub batch: usize,
    /// Position of each id; counted from 0 in each segment when `None`.
    pub positions: Option<&'a [usize]>,
    /// Where the segments start that do not see each other, from 0 to B · T inclusive; each row is
    /// one segment when `None`.
    pub segments: Option<&'a Arc<[usize]>>,
}

/// Keys and values of all layers for one sample.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    tokens: usize,
}

impl CausalLm {
    /// Loads a model's weights, converting them to f32 tensor by tensor.
    ///
    /// # Errors
    /// All missing, extra and misshapen tensors together, or the first unreadable one.
    pub fn load(
        weights: &Weights,
        config: ModelConfig,
        device: &Device,
    ) -> Result<Self, WeightsError> {
        weights::check(weights, &config)?;
        Self::build(TensorReader::files(weights, config, device))
    }

    /// Fresh weights: matrices normal with standard deviation `initializer_range`, norms 1,
    /// biases 0, as transformers initialises them.
    pub fn random(config: ModelConfig, seed: u64, device: &Device) -> Result<Self, WeightsError> {
        Self::build(TensorReader::random(seed, config, device))
    }

    fn build(mut reader: TensorReader) -> Result<Self, WeightsError> {
        let config = reader.config().clone();
        let embed_tokens = reader.matrix(
            &format!("{}.weight", names::EMBEDDING),
            [config.vocab_size, config.hidden_size],
        )?;
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| reader.block(layer))
            .collect::<Result<_, _>>()?;
        let norm = reader.norm(names::FINAL_NORM)?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(reader.matrix(
                &format!("{}.weight", names::HEAD),
                [config.vocab_size, config.hidden_size],
            )?)
        };
        Ok(Self {
            embed_tokens,
            blocks,
            norm,
            lm_head,
            rope: Rope::new(config.rope.clone(), config.head_dim),
            device: reader.device().clone(),
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device of the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Embeddings of the ids. `[N, D]`
    pub fn embed(&self, tokens: Tokens) -> Tensor<2> {
        let ids = TensorData::new(tokens.ids.to_vec(), [tokens.ids.len()]);
        let ids = Tensor::<1, Int>::from_data(ids, &self.device);
        self.embed_tokens.clone().select(0, ids)
    }

    /// All blocks and the final norm. `dropout` is `None` outside training; with a `cache`, the
    /// tokens are one segment that follows the cached one.
    ///
    /// # Shapes
    /// x `[N, D]` → `[N, D]`
    pub fn body(
        &self,
        mut x: Tensor<2>,
        tokens: Tokens,
        mut cache: Option<&mut KvCache>,
        dropout: Option<Dropout>,
    ) -> Tensor<2> {
        let past = cache.as_ref().map_or(0, |cache| cache.tokens);
        let rows = self.rows(tokens, past);
        for (i, block) in self.blocks.iter().enumerate() {
            let layer = cache.as_mut().map(|cache| &mut cache.layers[i]);
            x = block.forward(x, &rows, layer, dropout);
        }
        if let Some(cache) = cache {
            cache.tokens += tokens.ids.len();
        }
        self.norm.forward(x)
    }

    /// Positions and segments of the tokens, `past` tokens of each segment being cached.
    fn rows(&self, tokens: Tokens, past: usize) -> Rows {
        let segments = match tokens.segments {
            Some(starts) => Segments::packed(tokens.batch, Arc::clone(starts)),
            None => Segments::uniform(tokens.batch, tokens.ids.len() / tokens.batch.max(1)),
        };
        let (cos, sin) = match tokens.positions {
            Some(positions) => self.rope.tables(positions, &self.device),
            None => self.rope.tables(&segments.positions(past), &self.device),
        };
        Rows { cos, sin, segments }
    }

    /// Output of the final norm for each token. `[N, D]`
    pub fn hidden(
        &self,
        tokens: Tokens,
        cache: Option<&mut KvCache>,
        dropout: Option<Dropout>,
    ) -> Tensor<2> {
        self.body(self.embed(tokens), tokens, cache, dropout)
    }

    /// Scores of the next token after each row.
    ///
    /// # Shapes
    /// hidden `[N, D]` → `[N, V]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        hidden.matmul(self.head().transpose())
    }

    /// Summed cross entropy of the rows whose target is not negative. `[1]`
    pub fn loss_sum(&self, hidden: Tensor<2>, targets: Arc<[i32]>) -> Tensor<1> {
        kernels::linear_cross_entropy(hidden, self.head(), targets)
    }

    /// The output head, `[V, D]`.
    fn head(&self) -> Tensor<2> {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens).clone()
    }

    /// An empty cache for one sample.
    pub fn cache(&self) -> KvCache {
        KvCache {
            layers: vec![LayerCache::default(); self.blocks.len()],
            tokens: 0,
        }
    }

    /// The linear layers that can carry adapters, with their module paths.
    pub fn linears(&mut self) -> Vec<(String, &mut LoraLinear)> {
        let blocks = self.blocks.iter_mut().enumerate();
        blocks
            .flat_map(|(i, block)| {
                let path = names::block(i);
                let linears = block.linears().into_iter();
                linears.map(move |(name, linear)| (format!("{path}.{name}"), linear))
            })
            .collect()
    }

    /// Visits every tensor by its Hugging Face name; an adapter's as `MODULE.lora_a` and `.lora_b`.
    pub fn visit(&mut self, visitor: &mut Visitor) {
        visitor(
            &format!("{}.weight", names::EMBEDDING),
            Parameter::Matrix(&mut self.embed_tokens),
        );
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit(&names::block(i), visitor);
        }
        self.norm.visit(names::FINAL_NORM, visitor);
        if let Some(head) = &mut self.lm_head {
            visitor(&format!("{}.weight", names::HEAD), Parameter::Matrix(head));
        }
    }

    /// Visits the tensors that train.
    pub fn visit_trainable(&mut self, visitor: &mut Visitor) {
        self.visit(&mut |name, parameter| {
            if parameter.is_trainable() {
                visitor(name, parameter);
            }
        });
    }

    /// The same model with nothing to train, for evaluation; shares the weights.
    pub fn frozen(&self) -> Self {
        let mut model = self.clone();
        model.visit(&mut |_, mut parameter| {
            if parameter.is_trainable() {
                parameter.set_trainable(false);
            }
        });
        model
    }
}
