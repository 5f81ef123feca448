//! Every tensor of a model by its name, and copies of a model that train nothing.

use super::{CausalLm, names};
use crate::nn::{Parameter, Visitor};

impl CausalLm {
    /// Visits every tensor by its Hugging Face name, but for quantised matrices; an adapter's as `MODULE.lora_a` and `.lora_b`.
    pub fn visit(&mut self, visitor: &mut Visitor) {
        self.visit_embedding(visitor);
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit(&names::block(i), visitor);
        }
        self.visit_head(visitor);
    }

    /// Visits the tensors outside of the blocks.
    pub fn visit_ends(&mut self, visitor: &mut Visitor) {
        self.visit_embedding(visitor);
        self.visit_head(visitor);
    }

    /// Visits the tensors of the embedding.
    pub fn visit_embedding(&mut self, visitor: &mut Visitor) {
        visitor(
            &format!("{}.weight", names::EMBEDDING),
            Parameter::Matrix(&mut self.embed_tokens),
        );
        if let Some(delta) = &mut self.embedding_delta {
            delta.visit(names::EMBEDDING, visitor);
        }
        if let Some(rows) = &mut self.embedding_rows {
            let name = format!("{}.token_rows", names::EMBEDDING);
            visitor(&name, Parameter::Matrix(&mut rows.rows));
        }
    }

    fn visit_head(&mut self, visitor: &mut Visitor) {
        self.norm.visit(self.config.family.final_norm, visitor);
        if let Some(head) = &mut self.lm_head {
            visitor(&format!("{}.weight", names::HEAD), Parameter::Matrix(head));
        }
        if let Some(bias) = &mut self.head_bias {
            visitor(&format!("{}.bias", names::HEAD), Parameter::Vector(bias));
        }
        if let Some(delta) = &mut self.head_delta {
            delta.visit(names::HEAD, visitor);
        }
        if let Some(rows) = &mut self.head_rows {
            let name = format!("{}.token_rows", names::HEAD);
            visitor(&name, Parameter::Matrix(&mut rows.rows));
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

    /// The same model with nothing to train, computed as if it trained: its tensors belong to the
    /// backend that tracks, which computes some operations in another way, though it tracks none.
    pub fn untracked(&self) -> Self {
        let mut model = self.clone();
        model.visit(&mut |_, mut parameter| {
            if parameter.is_trainable() {
                parameter.untrack();
            }
        });
        model
    }
}
