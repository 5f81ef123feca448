//! One transformer block, of every family.

use burn::tensor::Tensor;

use super::families::BlockNorms;
use crate::nn::{
    Attention, DeltaNet, Dropout, ExpertLinear, LatentAttention, LayerCache, LoraLinear, Mlp, Moe,
    Norm, Rows, Visitor,
};

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`, with the differences of the families.
#[derive(Debug, Clone)]
pub struct Block {
    /// Before attention.
    pub before_mixer: Option<Norm>,
    /// Mixes tokens.
    pub mixer: TokenMixer,
    /// After attention.
    pub after_mixer: Option<Norm>,
    /// Before the feed-forward layer.
    pub before_mlp: Option<Norm>,
    /// Works on each token alone.
    pub mlp: FeedForward,
    /// After the feed-forward layer.
    pub after_mlp: Option<Norm>,
    /// Whether the feed-forward layer works on attention's input, not on its output.
    pub parallel: bool,
    /// What the layers add to the residual stream is multiplied by this.
    pub residual_multiplier: f64,
    /// The norms' names.
    pub norms: BlockNorms,
}

/// What mixes tokens.
#[derive(Debug, Clone)]
pub enum TokenMixer {
    /// Softmax attention.
    Attention(Box<Attention>),
    /// Softmax attention over latents.
    Latent(Box<LatentAttention>),
    /// Linear attention.
    Linear(Box<DeltaNet>),
}

/// What works on each token alone.
#[derive(Debug, Clone)]
pub enum FeedForward {
    /// One layer.
    Dense(Box<Mlp>),
    /// A mixture of experts.
    Sparse(Box<Moe>),
}

impl Block {
    /// # Shapes
    /// x `[N, D]` → `[N, D]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        rows: &Rows,
        cache: Option<&mut LayerCache>,
        dropout: Option<Dropout>,
    ) -> Tensor<2> {
        let (x, input) = self.mix(x, rows, cache, dropout);
        let y = match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(input, dropout),
            FeedForward::Sparse(moe) => moe.forward(input, dropout),
        };
        self.add(x, through(&self.after_mlp, y))
    }

    /// The residual stream after attention, and the feed-forward layer's input.
    fn mix(
        &self,
        x: Tensor<2>,
        rows: &Rows,
        cache: Option<&mut LayerCache>,
        dropout: Option<Dropout>,
    ) -> (Tensor<2>, Tensor<2>) {
        let normed = through(&self.before_mixer, x.clone());
        let mixed = self.mixer.forward(normed.clone(), rows, cache, dropout);
        let x = self.add(x, through(&self.after_mixer, mixed));
        let input = match self.parallel {
            true => normed,
            false => through(&self.before_mlp, x.clone()),
        };
        (x, input)
    }

    /// What the router of a sparse block says of each row, `[N, E]`; `None` for a dense block.
    pub fn router_logits(&self, x: Tensor<2>, rows: &Rows) -> Option<Tensor<2>> {
        let FeedForward::Sparse(moe) = &self.mlp else {
            return None;
        };
        let (_, input) = self.mix(x, rows, None, None);
        Some(moe.router.logits(input, None))
    }

    fn add(&self, x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        match self.residual_multiplier == 1.0 {
            true => x + y,
            false => x + y * self.residual_multiplier,
        }
    }

    /// The linear layers but for the experts' with their paths below the block, in Hugging Face's
    /// order.
    pub fn linears(&mut self) -> Vec<(String, &mut LoraLinear)> {
        let (name, mixer) = match &mut self.mixer {
            TokenMixer::Attention(attention) => ("self_attn", attention.linears()),
            TokenMixer::Latent(attention) => ("self_attn", attention.linears()),
            TokenMixer::Linear(attention) => ("linear_attn", attention.linears()),
        };
        let mixer = mixer.into_iter().map(|(n, l)| (format!("{name}.{n}"), l));
        let mlp: Vec<(String, &mut LoraLinear)> = match &mut self.mlp {
            FeedForward::Dense(mlp) => (mlp.linears().into_iter())
                .map(|(n, l)| (n.to_string(), l))
                .collect(),
            FeedForward::Sparse(moe) => moe.linears(),
        };
        mixer
            .chain(mlp.into_iter().map(|(n, l)| (format!("mlp.{n}"), l)))
            .collect()
    }

    /// The experts' layers with their paths below the block; none in a dense block.
    pub fn experts(&mut self) -> Vec<(String, &mut ExpertLinear)> {
        match &mut self.mlp {
            FeedForward::Dense(_) => Vec::new(),
            FeedForward::Sparse(moe) => (moe.experts().into_iter())
                .map(|(n, l)| (format!("mlp.{n}"), l))
                .collect(),
        }
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        let names = self.norms;
        visit_norm(&mut self.before_mixer, names.before_mixer, path, visitor);
        match &mut self.mixer {
            TokenMixer::Attention(layer) => layer.visit(&format!("{path}.self_attn"), visitor),
            TokenMixer::Latent(layer) => layer.visit(&format!("{path}.self_attn"), visitor),
            TokenMixer::Linear(layer) => layer.visit(&format!("{path}.linear_attn"), visitor),
        }
        visit_norm(&mut self.after_mixer, names.after_mixer, path, visitor);
        visit_norm(&mut self.before_mlp, names.before_mlp, path, visitor);
        match &mut self.mlp {
            FeedForward::Dense(layer) => layer.visit(&format!("{path}.mlp"), visitor),
            FeedForward::Sparse(layer) => layer.visit(&format!("{path}.mlp"), visitor),
        }
        visit_norm(&mut self.after_mlp, names.after_mlp, path, visitor);
    }
}

impl TokenMixer {
    fn forward(
        &self,
        x: Tensor<2>,
        rows: &Rows,
        cache: Option<&mut LayerCache>,
        dropout: Option<Dropout>,
    ) -> Tensor<2> {
        match self {
            Self::Attention(layer) => layer.forward(x, rows, cache, dropout),
            Self::Latent(layer) => layer.forward(x, rows, cache, dropout),
            Self::Linear(layer) => {
                let cache = cache.map(LayerCache::delta);
                layer.forward(x, &rows.segments, cache, dropout)
            }
        }
    }
}

fn through(norm: &Option<Norm>, x: Tensor<2>) -> Tensor<2> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}

fn visit_norm(
    norm: &mut Option<Norm>,
    name: Option<&'static str>,
    path: &str,
    visitor: &mut Visitor,
) {
    if let (Some(norm), Some(name)) = (norm, name) {
        norm.visit(&format!("{path}.{name}"), visitor);
    }
}
