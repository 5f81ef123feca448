//! PiSSA and OLoRA: adapters that begin with a part of the base, which the base loses.

use super::linalg::{Matrix, qr, top_svd};
use super::peft::LoraPair;

/// What an adapter takes out of a weight W `[out, in]` at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakenOut {
    /// `s B A = U_R Σ_R V_Rᵀ`, each factor carrying a root of `Σ_R / s` (PiSSA, arXiv 2404.02948).
    Principal,
    /// `B A = Q_R R_R` of `W = Q R`, of which s times is taken (OLoRA, arXiv 2406.01775).
    FirstColumns,
}

impl TakenOut {
    /// The adapter's first values. The base keeps `W - s B A`.
    ///
    /// # Shapes
    /// weight `[out, in]`, of rank at least `rank`
    pub fn first_values(
        self,
        weight: &[f32],
        shape: [usize; 2],
        rank: usize,
        scaling: f64,
    ) -> LoraPair {
        let weight = Matrix::from_f32(weight, shape);
        let (a, b) = match self {
            Self::Principal => {
                let found = top_svd(&weight, rank);
                let roots: Vec<f64> = found.s.iter().map(|s| (s / scaling).sqrt()).collect();
                let v = found.v.scale_columns(&roots);
                (v.transposed(), found.u.scale_columns(&roots))
            }
            Self::FirstColumns => {
                // Q's first columns are those of the first columns alone.
                let (q, _) = qr(&weight.first_columns(rank));
                (q.transposed().times(&weight), q)
            }
        };
        LoraPair {
            a: a.to_f32(),
            a_shape: [a.rows, a.cols],
            b: b.to_f32(),
            b_shape: [b.rows, b.cols],
            magnitude: None,
        }
    }
}

impl LoraPair {
    /// The delta `B A - B₀ A₀` as one of twice the rank: A over A₀, B beside -B₀.
    pub fn minus(&self, start: &Self) -> Self {
        let ([rank, input], [out, _]) = (self.a_shape, self.b_shape);
        let rows = self.b.chunks_exact(rank).zip(start.b.chunks_exact(rank));
        Self {
            a: [&self.a[..], &start.a].concat(),
            a_shape: [2 * rank, input],
            b: rows
                .flat_map(|(b, start)| b.iter().copied().chain(start.iter().map(|x| -x)))
                .collect(),
            b_shape: [out, 2 * rank],
            magnitude: self.magnitude.clone(),
        }
    }
}
