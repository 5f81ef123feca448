//! A decoder-only language model: embedding, blocks, norm, output head.

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::block::Block;
use super::config::{ModelConfig, RopeScaling};
use super::storage::Keep;
use super::tensor_reader::{Outline, TensorReader};
use super::weights::{self, Weights, WeightsError};
use super::{build, names};
use crate::kernels::{self, Head, LogitShape, Segments, Weight};
use crate::nn::{
    Dropout, ExpertLinear, LayerCache, LoraDelta, LoraLinear, Norm, Rope, Rows, TokenRows,
};

/// A causal language model on one device, in f32 but for matrices that [`Keep`] says.
#[derive(Debug, Clone)]
pub struct CausalLm {
    pub(super) config: ModelConfig,
    pub(super) embed_tokens: Tensor<2>,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: Norm,
    /// `None` when the head is the embedding.
    pub(super) lm_head: Option<Tensor<2>>,
    /// Phi's.
    pub(super) head_bias: Option<Tensor<1>>,
    /// The embedding's delta: B has a row for each token, A turns it into an embedding.
    pub(super) embedding_delta: Option<LoraDelta>,
    pub(super) head_delta: Option<LoraDelta>,
    /// Tokens whose rows train; where the head is the embedding, there too.
    pub(super) embedding_rows: Option<TokenRows>,
    pub(super) head_rows: Option<TokenRows>,
    ropes: Vec<Rope>,
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

impl KvCache {
    /// Whether the cached keys are rotated by other frequencies than those of a text `more` tokens
    /// longer: LongRoPE changes them once, where the text outgrows the original context.
    pub fn is_stale(&self, model: &CausalLm, more: usize) -> bool {
        model.config.ropes.iter().any(|rope| match rope.scaling {
            RopeScaling::Long {
                original_max_position_embeddings: original,
                ..
            } => (1..=original).contains(&self.tokens) && self.tokens + more > original,
            _ => false,
        })
    }
}

/// What a configuration calls for.
pub(super) fn outline(config: &ModelConfig) -> Outline {
    let mut reader = TensorReader::nowhere(config.clone());
    // Nothing is read, so nothing can fail.
    let _ = CausalLm::read(&mut reader);
    reader.into_outline()
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
        Self::load_as(weights, config, device, Keep::default())
    }

    /// The same with frozen matrices kept as `keep` says.
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub fn load_as(
        weights: &Weights,
        config: ModelConfig,
        device: &Device,
        keep: Keep,
    ) -> Result<Self, WeightsError> {
        weights::check(weights, &config)?;
        let mut reader = TensorReader::files(weights, config, device, keep);
        Self::read(&mut reader)
    }

    /// Fresh weights: matrices normal with standard deviation `initializer_range`, norms 1,
    /// biases 0, as transformers initialises them.
    pub fn random(config: ModelConfig, seed: u64, device: &Device) -> Result<Self, WeightsError> {
        Self::read(&mut TensorReader::random(seed, config, device))
    }

    fn read(reader: &mut TensorReader) -> Result<Self, WeightsError> {
        let config = reader.config().clone();
        let table = [config.vocab_size, config.hidden_size];
        let embed_tokens = reader.matrix(&format!("{}.weight", names::EMBEDDING), table)?;
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| build::block(reader, layer))
            .collect::<Result<_, _>>()?;
        let norm = reader.norm(config.family.final_norm, config.hidden_size)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(reader.matrix(&format!("{}.weight", names::HEAD), table)?),
        };
        let head_bias = match config.family.head_bias {
            true => {
                let name = format!("{}.bias", names::HEAD);
                Some(reader.vector(&name, config.vocab_size, 0.0)?)
            }
            false => None,
        };
        Ok(Self {
            embed_tokens,
            blocks,
            norm,
            lm_head,
            head_bias,
            embedding_delta: None,
            head_delta: None,
            embedding_rows: None,
            head_rows: None,
            ropes: config.ropes.iter().cloned().map(Rope::new).collect(),
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
        let n = tokens.ids.len();
        let ids = TensorData::new(tokens.ids.to_vec(), [n]);
        let ids = Tensor::<1, Int>::from_data(ids, &self.device);
        let mut embedded = self.look_up(&self.embed_tokens, &ids, tokens.ids);
        if let Some(rows) = &self.embedding_rows {
            let pad = self.config.pad_token_id.map(|id| id as i32);
            embedded = rows.replace(embedded, tokens.ids, pad);
        }
        if let Some(delta) = &self.embedding_delta {
            let low = self.look_up(&delta.lora_b, &ids, tokens.ids); // [N, R]
            embedded = embedded + low.matmul(delta.lora_a.clone()) * delta.scaling;
            if let Some(magnitude) = &delta.magnitude {
                let norms = delta.transposed().row_norms(
                    &self.embed_tokens.clone().transpose().into(),
                    &magnitude.squares,
                );
                embedded = embedded * (magnitude.vector.clone() / norms).unsqueeze();
            }
        }
        match self.config.embedding_multiplier {
            1.0 => embedded,
            factor => embedded * factor,
        }
    }

    /// Rows of a table. As in torch, the padding token's row gets no gradient.
    fn look_up(&self, table: &Tensor<2>, ids: &Tensor<1, Int>, values: &[i32]) -> Tensor<2> {
        let rows = kernels::rows_of(table.clone(), ids.clone());
        let pad = self.config.pad_token_id.map(|id| id as i32);
        if !table.is_require_grad() || !values.iter().any(|&id| Some(id) == pad) {
            return rows;
        }
        let trains: Vec<f32> = (values.iter())
            .map(|&id| f32::from(Some(id) != pad))
            .collect();
        let n = trains.len();
        let trains = Tensor::<2>::from_data(TensorData::new(trains, [n, 1]), &self.device);
        let frozen = rows.clone().detach() * (1.0 - trains.clone());
        rows * trains + frozen
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
        self.normed(x)
    }

    /// The final norm.
    ///
    /// # Shapes
    /// `[N, D]` → `[N, D]`
    pub fn normed(&self, x: Tensor<2>) -> Tensor<2> {
        self.norm.forward(x)
    }

    /// The blocks, from the embedding on.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The blocks, to be changed.
    pub fn blocks_mut(&mut self) -> &mut [Block] {
        &mut self.blocks
    }

    /// What the router of each sparse block says of each token, `[N, E]`, before softmax or sigmoid.
    pub fn router_logits(&self, tokens: Tokens) -> Vec<Tensor<2>> {
        let rows = self.rows(tokens, 0);
        let mut x = self.embed(tokens);
        let mut logits = Vec::new();
        for block in &self.blocks {
            logits.extend(block.router_logits(x.clone(), &rows));
            x = block.forward(x, &rows, None, None);
        }
        logits
    }

    /// Positions and segments of the tokens, `past` tokens of each segment being cached.
    pub fn rows(&self, tokens: Tokens, past: usize) -> Rows {
        let segments = match tokens.segments {
            Some(starts) => Segments::packed(tokens.batch, Arc::clone(starts)),
            None => Segments::uniform(tokens.batch, tokens.ids.len() / tokens.batch.max(1)),
        };
        let counted;
        let positions = match tokens.positions {
            Some(positions) => positions,
            None => {
                counted = segments.positions(past);
                &counted
            }
        };
        let ropes = self.ropes.iter();
        Rows {
            ropes: ropes
                .map(|rope| rope.tables(positions, &self.device))
                .collect(),
            segments,
        }
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
        self.logits_with(hidden, None)
    }

    fn logits_with(&self, hidden: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let head = LoraLinear {
            weight: self.head().into(),
            bias: self.head_bias.clone(),
            lora: self.head_delta.clone(),
        };
        let mut products = head.forward(hidden.clone(), dropout);
        if let Some(rows) = self.head_rows() {
            let (low, up) = rows.delta(hidden, &self.head());
            products = products + low.matmul(up.transpose());
        }
        kernels::shape_logits(products, self.logit_shape())
    }

    /// Summed cross entropy of the rows whose target is not negative. `[1]` `dropout` is `None` outside
    /// training.
    pub fn loss_sum(
        &self,
        hidden: Tensor<2>,
        targets: Arc<[i32]>,
        dropout: Option<Dropout>,
    ) -> Tensor<1> {
        let mut delta = match &self.head_delta {
            // The lengths of rows apply to finished logits.
            Some(delta) if delta.magnitude.is_some() => {
                return kernels::cross_entropy::of_labelled(hidden, &targets, |hidden| {
                    self.logits_with(hidden, dropout)
                });
            }
            Some(delta) => Some((delta.low(hidden.clone(), dropout), delta.factors().1)),
            None => None,
        };
        if let Some(rows) = self.head_rows() {
            let (low, up) = rows.delta(hidden.clone(), &self.head());
            delta = Some(match delta {
                Some((l, u)) => (Tensor::cat(vec![l, low], 1), Tensor::cat(vec![u, up], 1)),
                None => (low, up),
            });
        }
        let head = Head {
            weight: self.head(),
            delta,
            bias: self.head_bias.clone(),
            shape: self.logit_shape(),
        };
        kernels::linear_cross_entropy(hidden, head, targets)
    }

    fn logit_shape(&self) -> LogitShape {
        LogitShape {
            scale: self.config.logit_scale as f32,
            soft_cap: self.config.logit_soft_cap.map(|cap| cap as f32),
        }
    }

    /// The output head, `[V, D]`.
    fn head(&self) -> Tensor<2> {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens).clone()
    }

    /// The trained rows that the output head uses.
    fn head_rows(&self) -> Option<&TokenRows> {
        let shared = self.embedding_rows.as_ref();
        let shared = shared.filter(|_| self.lm_head.is_none());
        self.head_rows.as_ref().or(shared)
    }

    /// The trained rows of the embedding and of the output head, with the tables that they belong to.
    pub fn token_rows(&mut self) -> [(&'static str, Tensor<2>, &mut Option<TokenRows>); 2] {
        let head = self.head();
        let table = self.embed_tokens.clone();
        [
            (names::EMBEDDING, table, &mut self.embedding_rows),
            (names::HEAD, head, &mut self.head_rows),
        ]
    }

    /// Whether the output head is the embedding.
    pub fn is_tied(&self) -> bool {
        self.lm_head.is_none()
    }

    /// Gives a token the mean of other tokens' rows, in the embedding and in the output head.
    pub fn set_to_mean(&mut self, id: usize, of: &[u32]) {
        let at: Vec<i32> = of.iter().map(|id| *id as i32).collect();
        let at = TensorData::new(at, [of.len()]);
        let at = Tensor::<1, Int>::from_data(at, &Device::flex());
        let tables = [Some(&mut self.embed_tokens), self.lm_head.as_mut()];
        for table in tables.into_iter().flatten() {
            *table = on_host(table, |table| {
                let rows = table.clone().select(0, at.clone()).cast(DType::F32);
                let mean = rows.mean_dim(0).cast(table.dtype());
                let width = table.dims()[1];
                table.slice_assign([id..id + 1, 0..width], mean)
            });
        }
    }

    /// Makes room for a larger vocabulary; the new rows are zero. Smaller ones change nothing.
    pub fn grow(&mut self, vocab_size: usize) {
        let Some(more) = vocab_size.checked_sub(self.config.vocab_size) else {
            return;
        };
        if more == 0 {
            return;
        }
        let device = self.device.clone();
        let tables = [Some(&mut self.embed_tokens), self.lm_head.as_mut()];
        for table in tables.into_iter().flatten() {
            *table = on_host(table, |table| {
                let (shape, device) = ([more, table.dims()[1]], table.device());
                let new = Tensor::<2>::zeros(shape, &device).cast(table.dtype());
                Tensor::cat(vec![table, new], 0)
            });
        }
        self.head_bias = (self.head_bias.as_ref())
            .map(|bias| Tensor::cat(vec![bias.clone(), Tensor::zeros([more], &device)], 0));
        self.config.vocab_size = vocab_size;
    }

    /// An empty cache for one sample.
    pub fn cache(&self) -> KvCache {
        KvCache {
            layers: vec![LayerCache::default(); self.blocks.len()],
            tokens: 0,
        }
    }

    /// Gives a model whose output head is the embedding a head of its own, with the same values.
    pub fn untie(&mut self) {
        if self.lm_head.is_none() {
            self.lm_head = Some(self.embed_tokens.clone());
        }
    }

    /// Every matrix that can carry a delta, with its module's path and the delta: those of the linear
    /// layers, the embedding and the output head.
    pub fn deltas(&mut self) -> Vec<(String, Weight, &mut Option<LoraDelta>)> {
        let head = self.head().into();
        let blocks = self.blocks.iter_mut().enumerate();
        let linears = blocks.flat_map(|(i, block)| {
            let path = names::block(i);
            let linears = block.linears().into_iter();
            linears.map(move |(name, linear)| {
                let weight = linear.weight.clone();
                (format!("{path}.{name}"), weight, &mut linear.lora)
            })
        });
        let (embedding, table) = (&mut self.embedding_delta, self.embed_tokens.clone().into());
        linears
            .chain([
                (names::EMBEDDING.to_string(), table, embedding),
                (names::HEAD.to_string(), head, &mut self.head_delta),
            ])
            .collect()
    }

    /// How many numbers are kept quantised, which [`CausalLm::visit`] passes over.
    pub fn quantised_parameters(&mut self) -> usize {
        let weights = self.deltas().into_iter().map(|(_, weight, _)| weight);
        weights
            .filter(|weight| matches!(weight, Weight::Quantised(_)))
            .map(|weight| weight.dims().iter().product::<usize>())
            .sum()
    }

    /// The experts' layers, with the names of their parameters in transformers 5.
    pub fn experts(&mut self) -> Vec<(String, &mut ExpertLinear)> {
        let blocks = self.blocks.iter_mut().enumerate();
        blocks
            .flat_map(|(i, block)| {
                let path = names::block(i);
                let layers = block.experts().into_iter();
                layers.map(move |(name, layer)| (format!("{path}.{name}"), layer))
            })
            .collect()
    }
}

/// Changes a table in host memory: not every GPU computes in 16 bits.
fn on_host(table: &Tensor<2>, change: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
    let device = table.device();
    change(table.clone().to_device(&Device::flex())).to_device(&device)
}
