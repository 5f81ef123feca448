//! One transformer block.

use burn::tensor::Tensor;

use crate::nn::{Attention, Dropout, LayerCache, LoraLinear, Mlp, RmsNorm, Rows, Visitor};

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug, Clone)]
pub struct Block {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Mixes tokens.
    pub self_attn: Attention,
    /// Before the feed-forward layer.
    pub post_attention_layernorm: RmsNorm,
    /// Works on each token alone.
    pub mlp: Mlp,
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
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed, rows, cache, dropout);
        let normed = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(normed, dropout)
    }

    /// The linear layers with their paths below the block, in Hugging Face's order.
    pub fn linears(&mut self) -> Vec<(String, &mut LoraLinear)> {
        let attention = self.self_attn.linears();
        let mlp = self.mlp.linears();
        (attention
            .into_iter()
            .map(|(n, l)| (format!("self_attn.{n}"), l)))
        .chain(mlp.into_iter().map(|(n, l)| (format!("mlp.{n}"), l)))
        .collect()
    }

    /// Visits every tensor under `path`.
    pub fn visit(&mut self, path: &str, visitor: &mut Visitor) {
        self.input_layernorm
            .visit(&format!("{path}.input_layernorm"), visitor);
        self.self_attn.visit(&format!("{path}.self_attn"), visitor);
        self.post_attention_layernorm
            .visit(&format!("{path}.post_attention_layernorm"), visitor);
        self.mlp.visit(&format!("{path}.mlp"), visitor);
    }
}
