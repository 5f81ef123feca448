//! Walks through a [`Tape`] as burn does, and finds what it holds when it holds most.

use std::collections::BTreeMap;

use super::bytes::{Bytes, Kind};
use super::tape::{Back, Op, Pass, Recorded, Storage, Tape, Value};

impl Tape {
    /// Runs all operations forward and, from `output`, backward; what is made on the way counts as `kind`.
    ///
    /// The gradient that the backward pass starts from is `output`'s size and counted.
    pub fn run(&self, output: Value, kind: Kind) -> Pass {
        let mut run = Run::new(self, kind);
        run.forward(output);
        let forward = run.peak;
        run.let_go(output);
        let saved = run.live;
        run.peak = run.live;
        if self.is_tracked(output) {
            run.backward(output);
        }
        Pass {
            forward,
            saved,
            backward: run.peak,
        }
    }
}

/// A run of a tape.
struct Run<'a> {
    tape: &'a Tape,
    kind: Kind,
    live: Bytes,
    peak: Bytes,
    /// Of each storage: whether a handle is left, and how many operations saved it.
    held: Vec<bool>,
    saves: Vec<usize>,
    gradients: Gradients,
}

/// The gradients of a backward pass.
#[derive(Default)]
struct Gradients {
    of: BTreeMap<Value, usize>,
    buffers: Vec<Buffer>,
}

#[derive(Debug, Clone, Copy)]
struct Buffer {
    bytes: u64,
    users: usize,
    kind: Kind,
}

impl<'a> Run<'a> {
    fn new(tape: &'a Tape, kind: Kind) -> Self {
        Self {
            tape,
            kind,
            live: Bytes::default(),
            peak: Bytes::default(),
            held: vec![false; tape.storages.len()],
            saves: vec![0; tape.storages.len()],
            gradients: Gradients::default(),
        }
    }

    fn take(&mut self, kind: Kind, bytes: u64) {
        self.live[kind] += bytes;
        self.peak = self.peak.larger(self.live);
    }

    fn give(&mut self, kind: Kind, bytes: u64) {
        self.live[kind] -= bytes;
    }

    fn storage(&self, value: Value) -> usize {
        self.tape.nodes[value.0].storage
    }

    /// Frees the memory of a value once nobody needs it.
    fn let_go(&mut self, value: Value) {
        let storage = self.storage(value);
        let Storage { bytes, outside } = self.tape.storages[storage];
        if self.held[storage] && !outside {
            self.held[storage] = false;
            if self.saves[storage] == 0 {
                self.give(self.kind, bytes);
            }
        }
    }

    fn forward(&mut self, output: Value) {
        let mut last = vec![0; self.tape.storages.len()];
        for (i, recorded) in self.tape.ops.iter().enumerate() {
            for value in recorded.parents.iter().chain([&recorded.out]) {
                last[self.storage(*value)] = i;
            }
        }
        last[self.storage(output)] = usize::MAX;
        for (i, Recorded { op, parents, out }) in self.tape.ops.iter().enumerate() {
            let tracked = self.tape.is_tracked(*out);
            if tracked {
                for saved in &op.saved {
                    let storage = self.storage(*saved);
                    self.saves[storage] += 1;
                }
            }
            self.make(op, parents, *out, |storage| last[storage] == i);
            self.take(self.kind, op.kept);
            self.take(Kind::Workspace, op.workspace[0]);
            self.give(Kind::Workspace, op.workspace[0]);
            if tracked && op.saves_output {
                let storage = self.storage(*out);
                self.saves[storage] += 1;
            }
            if !tracked {
                self.give(self.kind, op.kept);
            }
            for value in parents.iter().chain([out]) {
                if last[self.storage(*value)] == i {
                    self.let_go(*value);
                }
            }
        }
    }

    /// The memory of an output: new, or that of an input which is used for the `last` time.
    fn make(&mut self, op: &Op, parents: &[Value], out: Value, last: impl Fn(usize) -> bool) {
        let (to, storages) = (self.storage(out), &self.tape.storages);
        let bytes = storages[to].bytes;
        if self.held[to] || storages[to].outside {
            return; // a view
        }
        let free = parents
            .iter()
            .map(|parent| self.storage(*parent))
            .find(|&from| {
                let Storage { bytes: of, outside } = storages[from];
                op.reuses
                    && of == bytes
                    && !outside
                    && self.held[from]
                    && self.saves[from] == 0
                    && last(from)
            });
        self.held[to] = true;
        match free {
            Some(from) => self.held[from] = false,
            None => self.take(self.kind, bytes),
        }
    }

    fn backward(&mut self, output: Value) {
        // `(output · gradient).sum()`: output and gradient, then the ones that the way back starts from
        // and the gradient, and then their product alone.
        let first = self.tape.nodes[output.0].grad;
        self.take(self.kind, 2 * first);
        self.give(self.kind, first);
        self.gradients.buffers.push(Buffer {
            bytes: first,
            users: 1,
            kind: self.kind,
        });
        self.gradients.of.insert(output, 0);
        for op in self.order(output) {
            self.step(&self.tape.ops[op]);
        }
    }

    /// The operations below `output`, deepest first; of equal depth, in the order of burn's search.
    fn order(&self, output: Value) -> Vec<usize> {
        let mut found = Vec::new();
        let mut seen = vec![false; self.tape.nodes.len()];
        let mut open = vec![output];
        while let Some(value) = open.pop() {
            if std::mem::replace(&mut seen[value.0], true) {
                continue;
            }
            if let Some(op) = self.tape.nodes[value.0].op
                && self.tape.is_tracked(value)
            {
                found.push(op);
                open.extend(&self.tape.ops[op].parents);
            }
        }
        let depth = |op: &usize| self.tape.nodes[self.tape.ops[*op].out.0].depth;
        found.sort_by_key(|op| std::cmp::Reverse(depth(op)));
        found
    }

    fn step(&mut self, Recorded { op, parents, out }: &Recorded) {
        let Some(gradient) = self.gradients.of.remove(out) else {
            return;
        };
        self.take(Kind::Workspace, op.workspace[1]);
        let tracked: Vec<Value> = (parents.iter().copied())
            .filter(|parent| self.tape.is_tracked(*parent))
            .collect();
        for (i, parent) in tracked.iter().enumerate() {
            let Buffer { bytes, users, .. } = self.gradients.buffers[gradient];
            let own = self.tape.nodes[parent.0].grad;
            let passes_on = match op.back {
                Back::Same => true,
                Back::InPlace => i + 1 == tracked.len() && users == 1 && bytes == own,
                Back::Fresh | Back::Kept => false,
            };
            if op.back == Back::Kept {
                self.give(self.kind, own);
            }
            let buffer = match passes_on {
                true => {
                    self.gradients.buffers[gradient].users += 1;
                    gradient
                }
                false => self.buffer(*parent, own),
            };
            self.register(*parent, buffer);
        }
        self.give(Kind::Workspace, op.workspace[1]);
        if op.back != Back::Kept {
            self.give(self.kind, op.kept);
        }
        for saved in op.saved.iter().chain(op.saves_output.then_some(out)) {
            let storage = self.storage(*saved);
            let Storage { bytes, outside } = self.tape.storages[storage];
            self.saves[storage] -= 1;
            if self.saves[storage] == 0 && !self.held[storage] && !outside {
                self.give(self.kind, bytes);
            }
        }
        self.release(gradient);
    }

    /// A new gradient; that of what trains is counted apart.
    fn buffer(&mut self, of: Value, bytes: u64) -> usize {
        let kind = match self.tape.nodes[of.0].trains {
            true => Kind::Gradients,
            false => self.kind,
        };
        self.take(kind, bytes);
        self.gradients.buffers.push(Buffer {
            bytes,
            users: 1,
            kind,
        });
        self.gradients.buffers.len() - 1
    }

    /// Adds a gradient to what is there, in the memory of whichever has no other user.
    fn register(&mut self, value: Value, buffer: usize) {
        let Some(old) = self.gradients.of.get(&value).copied() else {
            self.gradients.of.insert(value, buffer);
            return;
        };
        let [new, before] = [buffer, old].map(|b| self.gradients.buffers[b]);
        let sum = match (new.users, before.users) {
            (1, _) => buffer,
            (_, 1) => old,
            _ => self.buffer(value, new.bytes),
        };
        for other in [old, buffer] {
            if other != sum {
                self.release(other);
            }
        }
        self.gradients.of.insert(value, sum);
    }

    fn release(&mut self, buffer: usize) {
        let Buffer { bytes, users, kind } = &mut self.gradients.buffers[buffer];
        *users -= 1;
        if *users == 0 {
            let (bytes, kind) = (*bytes, *kind);
            self.give(kind, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: u64 = 100;

    fn activations(bytes: u64) -> Bytes {
        Bytes::of(Kind::Activations, bytes)
    }

    #[test]
    fn an_element_wise_chain_needs_one_buffer() {
        let mut tape = Tape::default();
        let x = tape.outside(N, false);
        let a = tape.push(Op::elementwise(Back::InPlace), &[x], N);
        let b = tape.push(Op::elementwise(Back::InPlace), &[a], N);
        let pass = tape.run(b, Kind::Activations);
        assert_eq!(pass.forward, activations(N));
        assert_eq!(pass.saved, activations(0));
    }

    #[test]
    fn what_is_saved_stays_until_its_operation_is_done() {
        let mut tape = Tape::default();
        let x = tape.outside(N, true);
        let a = tape.push(Op::new(), &[x], N);
        let saves_a = Op {
            saved: vec![a],
            kept: 7,
            ..Op::new()
        };
        let b = tape.push(saves_a, &[a], N);
        let c = tape.push(Op::elementwise(Back::InPlace), &[b], N);
        let pass = tape.run(c, Kind::Activations);
        assert_eq!(pass.forward, activations(2 * N + 7));
        assert_eq!(pass.saved, activations(N + 7));
        // a and what was kept, the gradient of b, and that of a.
        assert_eq!(pass.backward, activations(3 * N + 7));
    }

    #[test]
    fn gradients_of_what_trains_are_told_apart_and_stay() {
        let mut tape = Tape::default();
        let x = tape.outside(N, false);
        let w = tape.parameter(40, true);
        let y = tape.push(
            Op {
                saved: vec![x],
                ..Op::new()
            },
            &[x, w],
            N,
        );
        let pass = tape.run(y, Kind::Activations);
        assert_eq!(pass.saved, activations(0), "x is counted outside");
        assert_eq!(pass.backward.total(), 2 * N, "at the start");
        let z = tape.push(Op::elementwise(Back::Same), &[y], N);
        let w2 = tape.parameter(900, true);
        let z = tape.push(Op::new(), &[z, w2], N);
        let pass = tape.run(z, Kind::Activations);
        assert_eq!(pass.backward[Kind::Gradients], 900);
    }

    #[test]
    fn views_share_memory_and_a_part_has_a_gradient_of_the_whole() {
        let mut tape = Tape::default();
        let x = tape.outside(N, true);
        let a = tape.push(Op::new(), &[x], N);
        let part = tape.view(a, N / 2, false);
        let y = tape.push(Op::new(), &[part], N / 2);
        let pass = tape.run(y, Kind::Activations);
        assert_eq!(pass.forward, activations(N + N / 2));
        assert_eq!(pass.backward, activations(2 * N));
    }
}
