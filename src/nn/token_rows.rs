//! Rows of a table of tokens that train while the others are frozen.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::kernels;

/// Some tokens' rows of an embedding or an output head, which stand in place of the table's own.
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// The tokens, each once.
    pub ids: Vec<usize>,
    /// Their rows, `[n, D]`.
    pub rows: Tensor<2>,
}

impl TokenRows {
    /// Looked-up rows with those of the trained tokens in place of the table's. As in torch, the padding
    /// token's gets no gradient.
    ///
    /// # Shapes
    /// looked up `[N, D]` for N ids → `[N, D]`
    pub fn replace(&self, looked_up: Tensor<2>, ids: &[i32], pad: Option<i32>) -> Tensor<2> {
        let slot = |id: &i32| {
            self.ids
                .iter()
                .position(|own| *own as i64 == i64::from(*id))
        };
        let slots: Vec<Option<usize>> = ids.iter().map(slot).collect();
        if slots.iter().all(Option::is_none) {
            return looked_up;
        }
        let device = looked_up.device();
        let n = slots.len();
        let at = slots
            .iter()
            .map(|slot| slot.unwrap_or(0) as i32)
            .collect::<Vec<_>>();
        let at = Tensor::<1, Int>::from_data(TensorData::new(at, [n]), &device);
        let rows = self.rows.clone().select(0, at);
        let chosen = |is: &dyn Fn(usize) -> bool| {
            let mask: Vec<f32> = (0..n).map(|i| f32::from(is(i))).collect();
            Tensor::<2>::from_data(TensorData::new(mask, [n, 1]), &device)
        };
        let is_pad = |i: usize| Some(ids[i]) == pad;
        let others = looked_up * chosen(&|i| slots[i].is_none());
        let replaced = others + rows.clone() * chosen(&|i| slots[i].is_some() && !is_pad(i));
        match (0..n).any(|i| slots[i].is_some() && is_pad(i)) {
            true => replaced + rows.detach() * chosen(&|i| slots[i].is_some() && is_pad(i)),
            false => replaced,
        }
    }

    /// What the trained rows add to the products of hidden states with the table, as a delta: its input
    /// for each hidden state, `[N, n]`, and its B, `[V, n]`.
    ///
    /// # Shapes
    /// hidden `[N, D]`, table `[V, D]`
    pub fn delta(&self, hidden: Tensor<2>, table: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let (n, [tokens, _]) = (self.ids.len(), table.dims());
        let device: Device = hidden.device();
        let ids: Vec<i32> = self.ids.iter().map(|id| *id as i32).collect();
        let at = Tensor::<1, Int>::from_data(TensorData::new(ids, [n]), &device);
        let change = self.rows.clone() - kernels::rows_of(table.clone(), at);
        let mut chosen = vec![0f32; tokens * n];
        for (i, id) in self.ids.iter().enumerate() {
            chosen[id * n + i] = 1.0;
        }
        let chosen = Tensor::<2>::from_data(TensorData::new(chosen, [tokens, n]), &device);
        (hidden.matmul(change.transpose()), chosen)
    }
}
