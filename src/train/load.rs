//! The model of a prepared run: its base loaded, its adapters injected.

use burn::tensor::Device;

use super::choice;
use super::prepare::Prepared;
use crate::adapter::inject::{self, Init};
use crate::kernels::is_fused;
use crate::model::quant_cache::{Cached, QuantCache};
use crate::model::weights::{Weights, WeightsError};
use crate::model::{CausalLm, Keep, Storage};
use crate::recipe::Quantization;

impl Prepared {
    /// Loads the base model onto a device, with its adapters injected or all weights trainable. `not_kept` is
    /// told why its quantised matrices are not kept for the next run, where they should be.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub fn model(
        &self,
        device: &Device,
        not_kept: &mut dyn FnMut(String),
    ) -> Result<CausalLm, WeightsError> {
        let seed = self.plan.train.seed;
        let mut model = match &self.weights {
            Some(weights) => self.load(weights, device, not_kept)?,
            None => CausalLm::random(self.config.clone(), seed, device)?,
        };
        match &self.adapter {
            Some(choice) => {
                let init = match &choice.values {
                    Some(values) => Init::Loaded(values),
                    None => Init::Fresh { seed },
                };
                self.begin_new_tokens(&mut model);
                inject::inject(&mut model, &choice.config, &choice.modules, &init);
            }
            None => inject::train_all(&mut model),
        }
        Ok(model)
    }

    fn load(
        &self,
        weights: &Weights,
        device: &Device,
        not_kept: &mut dyn FnMut(String),
    ) -> Result<CausalLm, WeightsError> {
        let base = &self.plan.base;
        let in_f32 = |name: &str| choice::changes(self.adapter.as_ref(), &self.config, name);
        let cached = base.quantization.scheme().and_then(|scheme| {
            let cache = QuantCache::new(base.cache_dir.clone(), base.cache_limit)?;
            Some(cache.of_base(weights, &self.config, scheme, &in_f32))
        });
        let keep = Keep {
            storage: self.storage(device),
            linears: base.quantization.scheme(),
            gguf_blocks: base.quantization == Quantization::Gguf,
            cached: cached.as_ref(),
            in_f32: &in_f32,
        };
        let model = CausalLm::load_as(weights, self.config.clone(), device, keep)?;
        if let Some(reason) = cached.and_then(Cached::finish) {
            not_kept(reason);
        }
        Ok(model)
    }

    /// How the frozen matrices are kept.
    pub fn storage(&self, device: &Device) -> Storage {
        let adapts = self.adapter.is_some();
        choice::storage(self.plan.train.precision, adapts, is_fused(device))
    }

    /// Gives each new token the mean of the rows of the tokens that it takes the place of.
    fn begin_new_tokens(&self, model: &mut CausalLm) {
        if self.new_tokens.is_empty() {
            return;
        }
        model.grow(self.vocab_size());
        for token in &self.new_tokens {
            model.set_to_mean(token.id as usize, &token.pieces);
        }
    }
}
