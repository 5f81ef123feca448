//! The model writes text, one token at a time, with a KV cache.

pub mod sampling;

pub use sampling::Sampling;

use burn::tensor::Tensor;

use crate::data::conversation::Message;
use crate::data::tokenize::{ChatTokenizer, TokenizerError};
use crate::device::to_vec;
use crate::model::{CausalLm, KvCache, Tokens};

/// The ids of a prompt: through the chat template where there is one, as plain text otherwise.
///
/// # Errors
/// The template refuses, or the tokenizer fails.
pub fn prompt_ids(
    tokenizer: &ChatTokenizer,
    system: Option<&str>,
    prompt: &str,
) -> Result<Vec<u32>, TokenizerError> {
    if !tokenizer.has_template() {
        let system = system.map(|text| format!("{text}\n\n")).unwrap_or_default();
        return tokenizer.encode(&format!("{system}{prompt}"), true);
    }
    let mut messages: Vec<Message> = Vec::new();
    messages.extend(system.map(|text| Message::new("system", text)));
    messages.push(Message::new("user", prompt));
    tokenizer.encode(&tokenizer.render(&messages, true)?, false)
}

/// Continues `prompt` until a stop token, `max_new_tokens`, or the end of the model's positions.
///
/// `on_token` sees each new token but the stop token; `false` ends the text. The result holds the
/// new tokens without the stop token. The model should be [`CausalLm::frozen`].
pub fn generate(
    model: &CausalLm,
    prompt: &[u32],
    stop: &[u32],
    sampling: Sampling,
    on_token: &mut dyn FnMut(u32) -> bool,
) -> Vec<u32> {
    let mut cache = model.cache();
    let mut answer = Vec::new();
    let room = model
        .config()
        .max_position_embeddings
        .saturating_sub(prompt.len());
    let mut input: Vec<i32> = prompt.iter().map(|&id| id as i32).collect();
    while answer.len() < sampling.max_new_tokens.min(room) && !input.is_empty() {
        if cache.is_stale(model, input.len()) {
            cache = model.cache();
            let all = prompt.iter().chain(&answer);
            input = all.map(|&id| id as i32).collect();
        }
        let logits = next_logits(model, &input, &mut cache);
        let token = sampling.pick(&logits, answer.len());
        if stop.contains(&token) {
            break;
        }
        answer.push(token);
        if !on_token(token) {
            break;
        }
        input = vec![token as i32];
    }
    answer
}

/// Feeds ids and returns the scores of the token after them, `[V]`.
fn next_logits(model: &CausalLm, ids: &[i32], cache: &mut KvCache) -> Vec<f32> {
    let tokens = Tokens {
        ids,
        batch: 1,
        positions: None,
        segments: None,
    };
    let hidden: Tensor<2> = model.hidden(tokens, Some(cache), None); // [T, D]
    let last = hidden.narrow(0, ids.len() - 1, 1); // [1, D]
    let logits = model.logits(last); // [1, V]
    let vocabulary = logits.dims()[1];
    to_vec(logits.reshape([vocabulary]))
}
