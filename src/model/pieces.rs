//! How the tensors of a model lie in its files.
//!
//! Modules are named as in transformers 5. Its files keep older names, and the experts of a mixture
//! one by one: a tensor of the model is put together from *pieces*, tensors of the files.

use burn::tensor::Tensor;

use super::config::ModelConfig;
use super::families::ExpertFiles;
use super::names;
use crate::device::to_vec;

/// A tensor of the files that is a tensor of the model, or part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its name in the files.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// Where it belongs.
    pub layout: Layout,
}

/// Where a piece's elements belong in the tensor of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// They are the tensor.
    Whole,
    /// They are the elements from this one on.
    From(usize),
    /// They are the tensor `[E, out, in]` as `[E, in, out]`.
    Transposed {
        /// out
        out: usize,
        /// in
        input: usize,
    },
}

impl Piece {
    fn whole(name: String, shape: &[usize]) -> Self {
        Self {
            name,
            shape: shape.to_vec(),
            layout: Layout::Whole,
        }
    }

    /// Copies the piece's elements to their places in the tensor.
    pub fn put<T: Copy>(&self, piece: &[T], tensor: &mut [T]) {
        match self.layout {
            Layout::Whole => tensor.copy_from_slice(piece),
            Layout::From(start) => tensor[start..start + piece.len()].copy_from_slice(piece),
            Layout::Transposed { out, input } => transpose(piece, tensor, [input, out]),
        }
    }

    /// The piece's elements out of the tensor's, which lie in one dimension: the reverse of
    /// [`Piece::put`].
    pub fn take(&self, tensor: Tensor<1>) -> Vec<f32> {
        match self.layout {
            Layout::Whole => to_vec(tensor),
            Layout::From(start) => to_vec(tensor.narrow(0, start, self.shape.iter().product())),
            Layout::Transposed { out, input } => {
                let tensor = to_vec(tensor);
                let mut piece = vec![0f32; tensor.len()];
                transpose(&tensor, &mut piece, [out, input]);
                piece
            }
        }
    }
}

/// `[…, rows, cols]` becomes `[…, cols, rows]`.
fn transpose<T: Copy>(from: &[T], to: &mut [T], [rows, cols]: [usize; 2]) {
    let matrix = (rows * cols).max(1);
    for (from, to) in from.chunks_exact(matrix).zip(to.chunks_exact_mut(matrix)) {
        for (i, element) in from.iter().enumerate() {
            to[(i % cols) * rows + i / cols] = *element;
        }
    }
}

/// The tensors of the files that make up a tensor of the model, named as in transformers 5.
pub fn pieces(config: &ModelConfig, name: &str, shape: &[usize]) -> Vec<Piece> {
    let file = names::in_files(config.family, name);
    let (Some((experts, part)), &[count, out, input]) = (file.rsplit_once('.'), shape) else {
        return vec![single(file, shape)];
    };
    match config.family.expert_files {
        ExpertFiles::Transposed => vec![Piece {
            name: file,
            shape: vec![count, input, out],
            layout: Layout::Transposed { out, input },
        }],
        ExpertFiles::Each { gate, up, down } => {
            let rows: &[(&str, usize)] = match part {
                "gate_up_proj" => &[(gate, 0), (up, out / 2)],
                _ => &[(down, 0)],
            };
            let height = out / rows.len();
            (0..count)
                .flat_map(|expert| {
                    rows.iter().map(move |(name, row)| Piece {
                        name: format!("{experts}.{expert}.{name}.weight"),
                        shape: vec![height, input],
                        layout: Layout::From((expert * out + row) * input),
                    })
                })
                .collect()
        }
    }
}

/// A tensor that is one in the files too; those of convolutions have a dimension more there.
fn single(name: String, shape: &[usize]) -> Piece {
    match (shape, name.ends_with("conv1d.weight")) {
        (&[channels, taps], true) => Piece::whole(name, &[channels, 1, taps]),
        _ => Piece::whole(name, shape),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn a_transposed_piece_goes_there_and_back() {
        let piece = Piece {
            name: String::new(),
            shape: vec![1, 3, 2],
            layout: Layout::Transposed { out: 2, input: 3 },
        };
        let tensor = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0]; // [1, 2, 3]
        let stored = piece.take(Tensor::from_data(tensor, &Device::flex()));
        assert_eq!(stored, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let mut back = [0f32; 6];
        piece.put(&stored, &mut back);
        assert_eq!(back, tensor);
    }
}
