//! What each kernel keeps for the backward pass and needs while it runs, beside its inputs, its outputs
//! and their gradients: the table that the plan is made from. The figures are those of `kernels/`.

use super::tape::{Back, Op, Tape, Value};
use crate::kernels;
use crate::model::kept::Form;

/// Bytes of an f32.
pub(super) const F32: u64 = 4;
/// Elements that are converted to f32 at once before they are multiplied (`kernels/frozen.rs`).
const CONVERTED: u64 = 1 << 18;
/// The fewest rows of them, and those where they become bf16.
const CONVERTED_ROWS: [u64; 2] = [128, 512];
/// Queries whose scores are in memory at once, for each thread (`kernels/attention`).
const QUERIES: u64 = 64;
/// Logits in memory at once, on a CPU and on a GPU (`cross_entropy.rs` in `kernels/` and `kernels/cube/`).
const LOGITS: [u64; 2] = [24 << 20, 16 << 20];
/// What a thread copies the factors of products into: gemm's packed blocks, or those of `matmul`.
const PACKED: u64 = 4 << 20;

/// The kernels that a GPU may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    RmsNorm,
    Rope,
    Attention,
    Linear,
    CrossEntropy,
}

/// Those that GPUs have. What is missing here runs as plain operations there, which keep more.
const ON_GPU: &[Kernel] = &[
    Kernel::RmsNorm,
    Kernel::Rope,
    Kernel::Attention,
    Kernel::Linear,
    Kernel::CrossEntropy,
];

/// What the kernels run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Platform {
    /// Whether tensors are in the host's memory.
    pub on_cpu: bool,
    /// Threads that compute, each with memory of its own.
    pub threads: usize,
    /// Whether bf16 is multiplied as it is.
    pub bf16_products: bool,
}

impl Platform {
    /// This machine's processor.
    pub fn cpu() -> Self {
        Self {
            on_cpu: true,
            threads: rayon::current_num_threads(),
            bf16_products: kernels::has_bf16_products(),
        }
    }

    /// Some GPU.
    pub fn gpu() -> Self {
        Self {
            on_cpu: false,
            threads: 0,
            bf16_products: false,
        }
    }

    /// Whether products read matrices of 16 bits as they are.
    pub fn reads_16_bits(self) -> bool {
        self.is_fused(Kernel::Linear)
    }

    pub(super) fn is_fused(self, kernel: Kernel) -> bool {
        self.on_cpu || ON_GPU.contains(&kernel)
    }

    /// What products need whichever they are.
    pub(super) fn packed(self) -> u64 {
        self.threads as u64 * PACKED
    }

    /// What a product with a matrix needs in which it is kept in another form than it is multiplied in.
    pub(super) fn converted(self, [rows, cols]: [usize; 2], form: Form) -> u64 {
        let (rows, cols) = (rows as u64, cols as u64);
        let height = |fewest: u64| (CONVERTED / cols.max(1)).max(fewest).min(rows);
        match form {
            Form::Dense(crate::model::weights::Dtype::F32) => 0,
            // A GPU's kernel widens tile by tile, plain products take all of it in f32.
            _ if !self.on_cpu && self.is_fused(Kernel::Linear) => 0,
            _ if !self.on_cpu => rows * cols * F32,
            Form::Dense(crate::model::weights::Dtype::BF16) if self.bf16_products => 0,
            Form::Quantised(_) | Form::Blocks if self.bf16_products => {
                height(CONVERTED_ROWS[1]) * cols * 2
            }
            _ => height(CONVERTED_ROWS[0]) * cols * F32,
        }
    }

    /// Scores of attention over segments of `longest` tokens, forward and backward.
    pub(super) fn scores(self, longest: usize, window: Option<usize>) -> [u64; 2] {
        let longest = longest as u64;
        let seen = window.map_or(longest, |window| longest.min(window as u64 + QUERIES));
        let block = self.threads as u64 * QUERIES * seen * F32;
        [block, 2 * block]
    }

    /// Rows of logits in memory at once.
    pub(super) fn logit_rows(self, vocabulary: usize, rows: usize) -> u64 {
        let logits = LOGITS[usize::from(!self.on_cpu)];
        match self.is_fused(Kernel::CrossEntropy) {
            true => (logits / vocabulary.max(1) as u64).clamp(1, rows.max(1) as u64),
            false => rows as u64,
        }
    }
}

/// `x / rms(x) · w`: keeps its input.
pub(super) fn rms_norm(tape: &mut Tape, x: Value, weight: Value, bytes: u64) -> Value {
    let op = Op {
        saved: vec![x],
        workspace: [tape.copies(&[x]), tape.copies(&[x])],
        ..Op::new()
    };
    tape.push(op, &[x, weight], bytes)
}

/// Rotation: keeps nothing but the angles, which all layers share.
pub(super) fn rope(tape: &mut Tape, x: Value, bytes: u64) -> Value {
    let op = Op {
        workspace: [tape.copies(&[x]), 0],
        ..Op::new()
    };
    tape.push(op, &[x], bytes)
}

/// `act(gate) · up`: keeps both.
pub(super) fn gated(tape: &mut Tape, [gate, up]: [Value; 2], bytes: u64) -> Value {
    let copies = tape.copies(&[gate, up]);
    let op = Op {
        saved: vec![gate, up],
        workspace: [copies, copies],
        ..Op::new()
    };
    tape.push(op, &[gate, up], bytes)
}

/// An activation, or gpt-oss's gate of pairs: keeps its input.
pub(super) fn activate(tape: &mut Tape, x: Value, bytes: u64) -> Value {
    let copies = tape.copies(&[x]);
    let op = Op {
        saved: vec![x],
        workspace: [copies, copies],
        ..Op::new()
    };
    tape.push(op, &[x], bytes)
}

/// Dropout: keeps nothing, since the mask is drawn again.
pub(super) fn dropout(tape: &mut Tape, x: Value, bytes: u64) -> Value {
    let op = Op {
        workspace: [tape.copies(&[x]), 0],
        ..Op::new()
    };
    tape.push(op, &[x], bytes)
}

/// What attention works on, in bytes.
pub(super) struct AttentionBytes {
    /// The output.
    pub out: u64,
    /// The log-sum-exp of each row.
    pub lse: u64,
    /// All scores, where they are held.
    pub scores: u64,
    /// Scores of the blocks in work.
    pub workspace: [u64; 2],
}

/// Attention: keeps queries, keys, values, the output and the log-sum-exp. Plain operations keep the
/// scores, the masked scores and the probabilities instead of the last.
pub(super) fn attention(
    tape: &mut Tape,
    platform: Platform,
    qkv: [Value; 3],
    bytes: &AttentionBytes,
) -> Value {
    let fused = platform.is_fused(Kernel::Attention);
    let copies = tape.copies(&qkv);
    let [forward, backward] = bytes.workspace;
    let op = Op {
        saved: qkv.to_vec(),
        saves_output: true,
        kept: if fused { bytes.lse } else { 3 * bytes.scores },
        workspace: [forward + copies, backward + copies],
        ..Op::new()
    };
    tape.push(op, &qkv, bytes.out)
}

/// A frozen matrix: keeps nothing.
pub(super) fn linear(tape: &mut Tape, x: Value, bytes: u64, converted: u64) -> Value {
    let copies = tape.copies(&[x]);
    let op = Op {
        workspace: [converted + copies, converted],
        ..Op::new()
    };
    tape.push(op, &[x], bytes)
}

/// A frozen matrix with a delta: keeps its input and `x Aᵀ`, which is `low` bytes.
pub(super) fn lora_linear(
    tape: &mut Tape,
    [x, a, b]: [Value; 3],
    [out, low]: [u64; 2],
    converted: u64,
) -> Value {
    let copies = tape.copies(&[x]);
    let op = Op {
        saved: vec![x],
        kept: low,
        workspace: [converted + copies, converted.max(low) + copies],
        ..Op::new()
    };
    tape.push(op, &[x, a, b], out)
}

/// A product of two values or parameters: each is kept if the other has a gradient.
pub(super) fn matmul(tape: &mut Tape, [x, w]: [Value; 2], bytes: u64) -> Value {
    let saved = [(x, w), (w, x)];
    let saved = (saved.into_iter()).filter(|(_, other)| tape.is_tracked(*other));
    let op = Op {
        saved: saved.map(|(value, _)| value).collect(),
        ..Op::new()
    };
    tape.push(op, &[x, w], bytes)
}

/// A product element by element, of values of the same size or with one that is spread over the other.
pub(super) fn mul(tape: &mut Tape, [x, y]: [Value; 2], bytes: u64) -> Value {
    let saved = [(x, y), (y, x)];
    let saved = (saved.into_iter()).filter(|(_, other)| tape.is_tracked(*other));
    let op = Op {
        saved: saved.map(|(value, _)| value).collect(),
        ..Op::elementwise(Back::InPlace)
    };
    tape.push(op, &[x, y], bytes)
}

/// A sum: keeps nothing, and its gradient is that of both.
pub(super) fn add(tape: &mut Tape, [x, y]: [Value; 2], bytes: u64) -> Value {
    tape.push(Op::elementwise(Back::Same), &[x, y], bytes)
}
