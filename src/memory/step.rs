//! The bytes of a training step and of an evaluation beyond what is always there, as `train/` runs them.

use std::collections::BTreeMap;

use super::block::{Rows, block};
use super::bytes::{Bytes, Kind};
use super::ends;
use super::kernels::F32;
use super::layers::Facts;
use super::tape::Pass;
use crate::model::config::LayerConfig;
use crate::model::names;
use crate::train::recompute::Retain;

/// A step and what it needs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StepBytes {
    /// At its peak, on the device.
    pub peak: Bytes,
    /// In the host's memory, where block inputs go there.
    pub on_host: u64,
}

/// The passes through one block.
#[derive(Debug, Clone, Copy, Default)]
struct Passes {
    /// Without a graph.
    plain: Pass,
    /// With one.
    graph: Pass,
    /// Gradients of what trains in it.
    gradients: u64,
}

/// A forward and backward pass over a micro-batch, and the step that follows.
pub(super) fn training(facts: &Facts, rows: Rows, retain: Retain, accumulates: bool) -> StepBytes {
    let config = facts.config;
    let wide = (rows.tokens * config.hidden_size) as u64 * F32;
    let reach = Reach::of(facts);
    let blocks = passes(facts, rows, &reach);
    let all_gradients = facts.gradients();
    let [embedded, embedding_back] = ends::embedding(facts, rows.tokens);
    // What was summed up in the micro-batches before.
    let before = if accumulates { all_gradients } else { 0 };
    let fixed = Bytes::of(Kind::Gradients, before)
        + Bytes::of(Kind::Activations, angles(facts, rows.tokens))
        + Bytes::of(Kind::Workspace, facts.platform.packed());
    let inputs = |count: usize| match retain {
        Retain::InputsOnHost => Bytes::of(Kind::Activations, wide),
        _ => Bytes::of(Kind::Activations, wide * count as u64),
    };
    let x = Bytes::of(Kind::Activations, wide);
    let mut peak = fixed + x + embedded;
    let mut saved = Bytes::default();
    for (number, passes) in blocks.iter().enumerate() {
        let reached = number + 1 - reach.first.min(number + 1);
        let with_graph = retain == Retain::Graphs && number >= reach.first;
        let pass = if with_graph {
            passes.graph
        } else {
            passes.plain
        };
        peak = peak.larger(fixed + saved + inputs(reached.max(1)) + pass.forward);
        if with_graph {
            saved += pass.saved;
        }
    }
    let reached = blocks.len() - reach.first.min(blocks.len());
    let head = ends::loss(facts, rows.tokens, (true, reach.below(blocks.len())));
    let at_head = fixed + saved + inputs(reached) + x;
    peak = peak
        .larger(at_head + head.forward)
        .larger(at_head + head.backward);
    // Gradients of the ends stay, then block by block.
    let mut gathered = Bytes::of(Kind::Gradients, head.backward[Kind::Gradients]);
    for number in (reach.first..blocks.len()).rev() {
        let passes = &blocks[number];
        if retain == Retain::Graphs {
            saved -= passes.graph.saved;
        }
        let here = fixed + gathered + saved + inputs(number - reach.first + 1);
        if retain != Retain::Graphs {
            peak = peak.larger(here + x + passes.graph.forward);
        }
        peak = peak.larger(here + passes.graph.backward);
        gathered += Bytes::of(Kind::Gradients, passes.gradients);
    }
    if reach.embedding {
        peak = peak.larger(fixed + gathered + x + embedding_back);
    }
    let on_host = match retain {
        Retain::InputsOnHost => wide * reached as u64,
        _ => 0,
    };
    StepBytes {
        peak: peak.larger(update(facts, all_gradients)),
        on_host,
    }
}

/// The largest block that a step asks for: activations, logits, or the gradient of a tensor.
pub(super) fn largest_block(facts: &Facts, rows: Rows) -> u64 {
    let (config, tokens) = (facts.config, rows.tokens as u64);
    let heads = config.num_attention_heads * config.head_dim;
    let width = config.hidden_size.max(config.intermediate_size).max(heads) as u64;
    let vocabulary = facts.outline.vocab_size;
    let logits = facts.platform.logit_rows(vocabulary, rows.tokens) * vocabulary as u64 * F32;
    let gradients = facts.outline.trained.keys();
    let gradient = gradients.filter_map(|name| facts.gradient(name)).max();
    (tokens * width * F32)
        .max(logits)
        .max(gradient.unwrap_or(0))
}

/// Clipping and the optimizer: the gradients, and copies of one tensor at a time.
fn update(facts: &Facts, gradients: u64) -> Bytes {
    let sizes = facts.outline.trained.keys();
    let largest = sizes.filter_map(|name| facts.gradient(name)).max();
    Bytes::of(Kind::Gradients, gradients) + Bytes::of(Kind::Workspace, 2 * largest.unwrap_or(0))
}

/// A forward pass over a validation batch, nothing kept.
pub(super) fn evaluation(facts: &Facts, rows: Rows) -> Bytes {
    let wide = (rows.tokens * facts.config.hidden_size) as u64 * F32;
    let fixed = Bytes::of(Kind::Activations, wide + angles(facts, rows.tokens))
        + Bytes::of(Kind::Workspace, facts.platform.packed());
    let [embedded, _] = ends::embedding(facts, rows.tokens);
    let mut peak = fixed + embedded;
    for passes in passes(facts, rows, &Reach::nothing(facts)) {
        peak = peak.larger(fixed + passes.plain.forward);
    }
    peak.larger(fixed + ends::loss(facts, rows.tokens, (false, false)).forward)
}

/// Keys and values of a text, and what writing one more token needs.
pub(super) fn generation(facts: &Facts, tokens: usize) -> Bytes {
    let config = facts.config;
    let keys = config.num_key_value_heads * config.head_dim;
    let all = (2 * config.layers.len() * keys * tokens) as u64 * F32;
    let longest = (keys * tokens) as u64 * F32;
    Bytes::of(Kind::Activations, all)
        + Bytes::of(Kind::Workspace, longest)
        + Bytes::of(Kind::Logits, 2 * facts.outline.vocab_size as u64 * F32)
}

/// Cosines and sines of every position, for each kind of rotation.
fn angles(facts: &Facts, rows: usize) -> u64 {
    let config = facts.config;
    let width = match config.latent {
        Some(latent) => latent.qk_rope_head_dim,
        None => config.head_dim,
    };
    (config.ropes.len() * rows * width) as u64 * F32
}

/// How far gradients reach (`train/recompute.rs`).
struct Reach {
    embedding: bool,
    first: usize,
}

impl Reach {
    fn of(facts: &Facts) -> Self {
        let trained = facts.outline.trained.keys();
        let is_embedding =
            |name: &&String| names::layer_of(name).is_none() && name.starts_with(names::EMBEDDING);
        let embedding = trained.clone().any(|name| is_embedding(&name));
        let first = trained.filter_map(|name| names::layer_of(name)).min();
        Self {
            embedding,
            first: match embedding {
                true => 0,
                false => first.unwrap_or(facts.config.layers.len()),
            },
        }
    }

    fn nothing(facts: &Facts) -> Self {
        Self {
            embedding: false,
            first: facts.config.layers.len(),
        }
    }

    fn below(&self, block: usize) -> bool {
        self.embedding || self.first < block
    }
}

/// The passes through every block; those of blocks that are alike are computed once.
fn passes(facts: &Facts, rows: Rows, reach: &Reach) -> Vec<Passes> {
    let mut known: BTreeMap<Likeness, Passes> = BTreeMap::new();
    (0..facts.config.layers.len())
        .map(|layer| {
            let likeness = Likeness::of(facts, layer, reach);
            *known.entry(likeness).or_insert_with(|| {
                let run = |how: (bool, bool)| {
                    let (tracer, output) = block(facts, rows, layer, how);
                    tracer.tape.run(output, Kind::Activations)
                };
                let trains = layer >= reach.first;
                Passes {
                    plain: run((false, false)),
                    graph: match trains {
                        true => run((true, reach.below(layer))),
                        false => Pass::default(),
                    },
                    gradients: trained_in(facts, layer).map(|(_, bytes)| bytes).sum(),
                }
            })
        })
        .collect()
}

/// What trains in a block, without the block's name.
fn trained_in<'a>(facts: &'a Facts, layer: usize) -> impl Iterator<Item = (&'a str, u64)> {
    let path = format!("{}.", names::block(layer));
    let all = facts.outline.trained.range(path.clone()..);
    let names = all.map_while(move |(name, _)| Some((name, name.strip_prefix(&path)?.len())));
    names.filter_map(|(name, rest)| Some((&name[name.len() - rest..], facts.gradient(name)?)))
}

/// What two blocks have to share for their passes to be alike.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Likeness {
    parts: String,
    trained: Vec<(String, u64)>,
    reached: bool,
    below: bool,
    forms: Vec<String>,
}

impl Likeness {
    fn of(facts: &Facts, layer: usize, reach: &Reach) -> Self {
        let LayerConfig {
            mixer,
            window,
            rope,
            sparse,
        } = facts.config.layers[layer];
        let path = format!("{}.", names::block(layer));
        let forms = facts.forms.range(path.as_str()..);
        let forms =
            forms.map_while(|(name, form)| Some(format!("{} {form:?}", name.strip_prefix(&path)?)));
        Self {
            parts: format!("{mixer:?} {window:?} {rope:?} {sparse}"),
            trained: (trained_in(facts, layer))
                .map(|(name, bytes)| (name.to_string(), bytes))
                .collect(),
            reached: layer >= reach.first,
            below: reach.below(layer),
            forms: forms.collect(),
        }
    }
}
