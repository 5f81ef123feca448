//! Embedding, output head and loss on a [`Tape`](super::tape::Tape), as `model/causal_lm.rs` has them.

use super::bytes::{Bytes, Kind};
use super::kernels::{self as footprint, F32, Kernel};
use super::layers::{Facts, Tracer};
use super::tape::{Back, Op, Pass, Value};
use crate::model::names::{EMBEDDING, HEAD};

/// The final norm, the output head and the loss of `rows`, which are counted outside.
pub(super) fn loss(facts: &Facts, rows: usize, (trains, reaches): (bool, bool)) -> Pass {
    let (config, d) = (facts.config, facts.config.hidden_size);
    let mut tracer = Tracer::new(facts, rows, trains);
    let bytes = tracer.floats(d);
    let x = tracer.tape.outside(bytes, trains && reaches);
    let family = config.family;
    let hidden = tracer.norm(family.final_norm, family.norm, x, d);
    let loss = match facts.gradient(&format!("{HEAD}.magnitude")) {
        Some(_) => tracer.whole_logits(hidden),
        None => tracer.fused_loss(hidden),
    };
    tracer.tape.run(loss, Kind::Logits)
}

/// What the embedding of `rows` needs beside its output: forward, and backward if it trains.
pub(super) fn embedding(facts: &Facts, rows: usize) -> [Bytes; 2] {
    let (d, v) = (facts.config.hidden_size, facts.outline.vocab_size);
    let gradient = |name: &str| facts.gradient(&format!("{EMBEDDING}.{name}"));
    let wide = (rows * d) as u64 * F32;
    // Rows in the table's own type, and a second tensor for what is added.
    let mut forward = wide;
    let mut backward = Bytes::default();
    if let Some(table) = gradient("weight") {
        backward += Bytes::of(Kind::Gradients, table);
        backward += Bytes::of(Kind::Activations, 2 * wide);
    }
    if let (Some(a), Some(b)) = (gradient("lora_a"), gradient("lora_b")) {
        let rank = b / (v as u64 * F32).max(1);
        let low = rows as u64 * rank * F32;
        forward += low + wide;
        backward += Bytes::of(Kind::Gradients, a + b);
        backward += Bytes::of(Kind::Activations, 2 * wide + 2 * low);
    }
    if gradient("magnitude").is_some() {
        // The lengths of its columns come from the table turned round.
        let turned = (v * d) as u64 * F32;
        forward += turned;
        backward += Bytes::of(Kind::Workspace, turned);
        backward += Bytes::of(Kind::Activations, wide);
    }
    if let Some(own) = gradient("token_rows") {
        forward += 2 * wide;
        backward += Bytes::of(Kind::Gradients, own);
        backward += Bytes::of(Kind::Activations, 3 * wide);
    }
    [Bytes::of(Kind::Workspace, forward), backward]
}

impl Tracer<'_> {
    /// The kernel that never holds all logits, and computes gradients as it goes.
    fn fused_loss(&mut self, hidden: Value) -> Value {
        let (config, platform) = (self.facts.config, self.facts.platform);
        let (d, v) = (config.hidden_size, self.facts.outline.vocab_size);
        let name = match config.tie_word_embeddings && !self.facts.outline.unties {
            true => format!("{EMBEDDING}.weight"),
            false => format!("{HEAD}.weight"),
        };
        let weight = self.parameter(&name);
        let mut parts = vec![hidden, weight];
        let mut rank = 0;
        for delta in self.head_deltas(hidden) {
            rank += delta.rank;
            parts.extend([delta.low, delta.up]);
        }
        let tracked = parts.iter().filter(|part| self.tape.is_tracked(**part));
        let kept = match platform.is_fused(Kernel::CrossEntropy) {
            true => tracked.map(|part| self.tape.gradient(*part)).sum(),
            // Logits and their logarithmic softmax.
            false => 2 * self.floats(v),
        };
        let chunk = platform.logit_rows(v, self.rows) * F32;
        let converted = platform.converted([v, d], self.facts.form(&name));
        let op = Op {
            kept,
            workspace: [chunk * (v + d + rank) as u64 + converted, 0],
            back: match platform.is_fused(Kernel::CrossEntropy) {
                true => Back::Kept,
                false => Back::Fresh,
            },
            ..Op::new()
        };
        self.tape.push(op, &parts, F32)
    }

    /// What changes the head beside its own weight.
    fn head_deltas(&mut self, hidden: Value) -> Vec<HeadDelta> {
        let v = self.facts.outline.vocab_size;
        let mut deltas = Vec::new();
        let trained = &self.facts.outline.trained;
        if let Some(shape) = trained.get(&format!("{HEAD}.lora_a")) {
            let rank = shape[0];
            let a = self.parameter(&format!("{HEAD}.lora_a"));
            let up = self.parameter(&format!("{HEAD}.lora_b"));
            let bytes = self.floats(rank);
            let low = footprint::matmul(&mut self.tape, [hidden, a], bytes);
            let low = self.unary(low, rank, [false; 2]);
            deltas.push(HeadDelta { rank, low, up });
        }
        let own = format!("{HEAD}.token_rows");
        let shared = format!("{EMBEDDING}.token_rows");
        let name = match trained.contains_key(&own) {
            true => own,
            false if self.facts.config.tie_word_embeddings => shared,
            false => return deltas,
        };
        if let Some(shape) = trained.get(&name) {
            let rank = shape[0];
            let rows = self.parameter(&name);
            let bytes = self.floats(rank);
            let low = footprint::matmul(&mut self.tape, [hidden, rows], bytes);
            // Which token each of them is, as a matrix.
            let up = self.tape.constant((v * rank) as u64 * F32);
            deltas.push(HeadDelta { rank, low, up });
        }
        deltas
    }

    /// DoRA's head, whose lengths apply to finished logits: all of them are held.
    fn whole_logits(&mut self, hidden: Value) -> Value {
        let (d, v) = (self.facts.config.hidden_size, self.facts.outline.vocab_size);
        let logits = self.linear(HEAD, hidden, [v, d]);
        let softmax = self.unary(logits, v, [false, true]);
        self.tape.push(Op::new(), &[softmax], F32)
    }
}

/// A low-rank change of the head: its input for each row, and its columns.
struct HeadDelta {
    rank: usize,
    low: Value,
    up: Value,
}
