//! Which tensors are alive when: a piece of the model's forward and backward pass, run on sizes alone.
//!
//! A [`Tape`] records operations as the model performs them. [`Tape::run`] then walks through them as
//! burn does: a value is freed after its last use unless an operation saved it for the way back; an
//! element-wise operation writes into an input that nobody needs any more; the backward pass takes the
//! operations by falling depth, and frees what each saved as soon as it is done. Arithmetic is not
//! known here, shapes are not either: only bytes.

use super::bytes::Bytes;

/// A tensor on a [`Tape`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Value(pub usize);

/// How the gradients of an operation's inputs come to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Back {
    /// In new memory.
    Fresh,
    /// In the memory of the output's gradient, where that is free and of the same size.
    InPlace,
    /// They are the output's gradient.
    Same,
    /// They were made in the forward pass, and are what the operation kept.
    Kept,
}

/// An operation, beside its inputs.
#[derive(Debug, Clone)]
pub(super) struct Op {
    /// Inputs that the backward pass needs.
    pub saved: Vec<Value>,
    /// Whether it needs the output.
    pub saves_output: bool,
    /// Bytes that the operation makes beside its output and keeps for the backward pass.
    pub kept: u64,
    /// Bytes it needs while it runs forward, and backward.
    pub workspace: [u64; 2],
    /// How gradients come to be.
    pub back: Back,
    /// Whether the output may take the memory of an input.
    pub reuses: bool,
}

impl Op {
    /// One that keeps nothing and makes its gradients in new memory.
    pub fn new() -> Self {
        Self {
            saved: Vec::new(),
            saves_output: false,
            kept: 0,
            workspace: [0; 2],
            back: Back::Fresh,
            reuses: false,
        }
    }

    /// One that works element by element.
    pub fn elementwise(back: Back) -> Self {
        Self {
            back,
            reuses: true,
            ..Self::new()
        }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    /// Which memory it lies in; views share it.
    pub storage: usize,
    /// Bytes of its gradient.
    pub grad: u64,
    tracked: bool,
    /// Whether it belongs to the model.
    pub trains: bool,
    /// Whether it is a part of another value.
    part: bool,
    pub depth: usize,
    /// The operation that made it; leaves have none.
    pub op: Option<usize>,
}

#[derive(Debug)]
pub(super) struct Recorded {
    pub op: Op,
    pub parents: Vec<Value>,
    pub out: Value,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Storage {
    pub bytes: u64,
    /// Counted by whoever runs the tape, and never freed here.
    pub outside: bool,
}

/// Operations in order.
#[derive(Debug, Default)]
pub(super) struct Tape {
    pub nodes: Vec<Node>,
    pub ops: Vec<Recorded>,
    pub storages: Vec<Storage>,
}

/// What a run of a tape holds when it holds most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Pass {
    /// In the forward pass.
    pub forward: Bytes,
    /// Between the passes, without the output.
    pub saved: Bytes,
    /// In the backward pass: what is saved, and gradients.
    pub backward: Bytes,
}

impl Tape {
    /// A value from outside, which the caller counts, with a gradient where it is `tracked`.
    pub fn outside(&mut self, bytes: u64, tracked: bool) -> Value {
        self.leaf(bytes, tracked)
    }

    /// A tensor of the model, which the caller counts, with a gradient of so many bytes if it trains.
    pub fn parameter(&mut self, bytes: u64, trains: bool) -> Value {
        let value = self.leaf(bytes, trains);
        self.nodes[value.0].trains = trains;
        value
    }

    /// A constant that is made on the way.
    pub fn constant(&mut self, bytes: u64) -> Value {
        self.push(Op::new(), &[], bytes)
    }

    fn leaf(&mut self, grad: u64, tracked: bool) -> Value {
        self.storages.push(Storage {
            bytes: 0,
            outside: true,
        });
        self.nodes.push(Node {
            storage: self.storages.len() - 1,
            grad,
            tracked,
            trains: false,
            part: false,
            depth: 0,
            op: None,
        });
        Value(self.nodes.len() - 1)
    }

    /// Records an operation with an output of so many bytes.
    pub fn push(&mut self, op: Op, parents: &[Value], bytes: u64) -> Value {
        self.storages.push(Storage {
            bytes,
            outside: false,
        });
        self.record(op, parents, self.storages.len() - 1, bytes)
    }

    /// Records a view of `of`: the same memory, `bytes` of it. With `whole`, its gradient is that of the
    /// view; otherwise, zeros of the whole around it.
    pub fn view(&mut self, of: Value, bytes: u64, whole: bool) -> Value {
        let back = if whole { Back::Same } else { Back::Fresh };
        let op = Op { back, ..Op::new() };
        let view = self.record(op, &[of], self.nodes[of.0].storage, bytes);
        self.nodes[view.0].part = !whole || self.nodes[of.0].part;
        view
    }

    /// Keeps a value alive up to here.
    pub fn hold(&mut self, value: Value) {
        let out = self.push(Op::new(), &[value], 0);
        // Nothing goes back through it.
        self.nodes[out.0].tracked = false;
    }

    /// Bytes of those values that are parts of others: kernels copy them together before they read them.
    pub fn copies(&self, values: &[Value]) -> u64 {
        let parts = values.iter().map(|value| &self.nodes[value.0]);
        parts.filter(|node| node.part).map(|node| node.grad).sum()
    }

    /// Bytes of a value's gradient.
    pub fn gradient(&self, value: Value) -> u64 {
        self.nodes[value.0].grad
    }

    /// Whether a value has a gradient.
    pub fn is_tracked(&self, value: Value) -> bool {
        self.nodes[value.0].tracked
    }

    fn record(&mut self, op: Op, parents: &[Value], storage: usize, bytes: u64) -> Value {
        let inputs = parents.iter().map(|parent| &self.nodes[parent.0]);
        let depth = inputs.clone().map(|node| node.depth + 1).max();
        let tracked = inputs.clone().any(|node| node.tracked);
        let out = Value(self.nodes.len());
        self.nodes.push(Node {
            storage,
            grad: bytes,
            tracked,
            trains: false,
            part: false,
            depth: depth.unwrap_or(0),
            op: Some(self.ops.len()),
        });
        self.ops.push(Recorded {
            op,
            parents: parents.to_vec(),
            out,
        });
        out
    }
}
