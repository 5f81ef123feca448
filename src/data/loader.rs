//! Placeholder.
/// A padded batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// B
    pub batch: usize,
    /// T
    pub tokens: usize,
    /// `[B * T]`
    pub input_ids: Vec<i32>,
    /// `[B * T]`
    pub labels: Vec<i32>,
    /// Lengths.
    pub lengths: Vec<usize>,
}
