//! Bytes, told apart by what they hold.

use std::ops::{Add, AddAssign, Index, IndexMut, SubAssign};

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// What memory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The base model's tensors as they are kept.
    Base,
    /// What training adds to the base: deltas, trained copies, rows of tokens.
    Adapters,
    /// The moments of the optimizer.
    Optimizer,
    /// Gradients of what trains.
    Gradients,
    /// What lies between the forward and the backward pass, and the gradients of that.
    Activations,
    /// Logits, and the gradients that the loss computes along with them.
    Logits,
    /// What a kernel or a copy needs while it runs.
    Workspace,
    /// What the process holds besides: tokenizer, samples.
    Process,
}

impl Kind {
    /// All of them, in the order of a table.
    pub const ALL: [Self; 8] = [
        Self::Base,
        Self::Adapters,
        Self::Optimizer,
        Self::Gradients,
        Self::Activations,
        Self::Logits,
        Self::Workspace,
        Self::Process,
    ];

    /// The name in tables and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Adapters => "adapters",
            Self::Optimizer => "optimizer",
            Self::Gradients => "gradients",
            Self::Activations => "activations",
            Self::Logits => "logits",
            Self::Workspace => "workspace",
            Self::Process => "process",
        }
    }
}

/// Bytes of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes([u64; Kind::ALL.len()]);

impl Bytes {
    /// So many of one kind.
    pub fn of(kind: Kind, bytes: u64) -> Self {
        let mut all = Self::default();
        all[kind] = bytes;
        all
    }

    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The one with the larger total.
    pub fn larger(self, other: Self) -> Self {
        match other.total() > self.total() {
            true => other,
            false => self,
        }
    }
}

impl Index<Kind> for Bytes {
    type Output = u64;

    fn index(&self, kind: Kind) -> &u64 {
        &self.0[kind as usize]
    }
}

impl IndexMut<Kind> for Bytes {
    fn index_mut(&mut self, kind: Kind) -> &mut u64 {
        &mut self.0[kind as usize]
    }
}

impl Add for Bytes {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a += b;
        }
    }
}

impl SubAssign for Bytes {
    fn sub_assign(&mut self, other: Self) {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a = a.saturating_sub(b);
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(Kind::ALL.len() + 1))?;
        for kind in Kind::ALL {
            map.serialize_entry(kind.name(), &self[kind])?;
        }
        map.serialize_entry("total", &self.total())?;
        map.end()
    }
}
