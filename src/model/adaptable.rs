//! What of a model can carry a low-rank delta.

use super::config::ModelConfig;
use super::names::{EMBEDDING, HEAD, parameter_of};

/// What can carry a delta.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adaptable {
    /// Its path.
    pub path: String,
    /// How many matrices it has: one, or the experts of a mixture.
    pub experts: usize,
    /// Rows of each.
    pub out_features: usize,
    /// Columns of each.
    pub in_features: usize,
}

/// Everything that can carry a delta: the linear layers, routers and the experts' layers, the embedding
/// and the output head.
pub fn adaptable(config: &ModelConfig) -> Vec<Adaptable> {
    let outline = super::causal_lm::outline(config);
    let parameters = (outline.tensors.iter()).filter_map(|(name, shape)| {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        parameter_of(path)?;
        let (experts, out_features, in_features) = match shape[..] {
            [out, input] => (1, out, input),
            [experts, out, input] => (experts, out, input),
            _ => return None,
        };
        Some(Adaptable {
            path: path.to_string(),
            experts,
            out_features,
            in_features,
        })
    });
    let linears = outline.linears.iter().map(|linear| Adaptable {
        path: linear.path.clone(),
        experts: 1,
        out_features: linear.out_features,
        in_features: linear.in_features,
    });
    let ends = [EMBEDDING, HEAD].map(|path| Adaptable {
        path: path.to_string(),
        experts: 1,
        out_features: config.vocab_size,
        in_features: config.hidden_size,
    });
    linears.chain(parameters).chain(ends).collect()
}
