//! A matrix in device memory as the kernels read it: dense or quantised, in 32-bit words, as not every
//! device has the types of fewer bits.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{DType, TensorMetadata};
use burn::tensor::{Bytes, Device, FloatDType, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::prelude::*;

use super::contiguous;
use super::unpack::LayoutLaunch;
use crate::quant::QuantMatrix;
use crate::quant::absmax::{self, Absmax};
use crate::quant::int8::Int8;
use crate::quant::matrix::Values;
use crate::quant::nf4::{self, CODEBOOK, Nf4};

/// What the words stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// A number each.
    F32,
    /// Two numbers each, the first in the lower half.
    F16,
    /// Likewise.
    Bf16,
    /// The code book; eight codes a word, the first lowest, rows padded to whole words; a scale for each
    /// block, and one more.
    Nf4,
    /// As `Nf4`, but after the code book stands that of the scales, which are four codes a word; then
    /// their own scales and what is added to all.
    Nf4Double,
    /// Four codes a word, the first lowest, rows padded to whole words; a scale for each row.
    Int8,
}

/// Words of NF4's code book.
pub(super) const TABLE: usize = CODEBOOK.len();
/// Words of the code book of quantised scales.
const SCALE_TABLE: usize = 256;
/// Scales that share one of their own.
pub(super) const SCALE_GROUP: usize = 256;

impl Kind {
    /// Where the codes begin.
    pub(super) const fn codes_at(self) -> usize {
        match self {
            Self::Nf4 => TABLE,
            Self::Nf4Double => TABLE + SCALE_TABLE,
            _ => 0,
        }
    }

    /// Whether numbers are looked up.
    pub(super) const fn has_table(self) -> bool {
        matches!(self, Self::Nf4 | Self::Nf4Double)
    }

    /// Numbers in a word.
    const fn in_a_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::Nf4 | Self::Nf4Double => 8,
            Self::Int8 => 4,
        }
    }
}

/// A matrix `[rows, cols]` in device memory.
#[derive(Debug, Clone)]
pub struct Packed {
    pub(super) words: CubeTensor,
    pub(super) kind: Kind,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Whether it may be multiplied in bf16, both factors rounded.
    pub(super) in_bf16: bool,
}

impl Packed {
    /// A dense tensor as a matrix of `cols` columns, whatever its shape; a copy if it has gaps.
    pub(super) fn dense(tensor: CubeTensor, cols: usize) -> Self {
        let kind = match tensor.dtype() {
            DType::F32 => Kind::F32,
            DType::F16 => Kind::F16,
            DType::BF16 => Kind::Bf16,
            other => unreachable!("weights are floats of 16 or 32 bits, not {other:?}"),
        };
        let rows = tensor.shape().num_elements() / cols.max(1);
        if kind != Kind::F32 && !tensor.is_contiguous() {
            return Self::dense(without_gaps(tensor), cols);
        }
        Self {
            words: contiguous(tensor),
            kind,
            rows,
            cols,
            in_bf16: kind == Kind::Bf16,
        }
    }

    /// A quantised matrix in f32 on the device of `like`.
    pub(in crate::kernels) fn dequantised(
        matrix: &QuantMatrix,
        in_bf16: bool,
        like: &CubeTensor,
    ) -> Self {
        let [rows, cols] = matrix.shape();
        let values = TensorData::new(matrix.dequantised(), [rows * cols]);
        let values = CubeBackend::float_from_data(values, &like.device);
        Self {
            in_bf16,
            ..Self::dense(values, cols)
        }
    }

    /// Sends a quantised matrix to a device; `None` where it is of a kind that no kernel reads, or the
    /// device is the processor.
    pub(in crate::kernels) fn send(
        matrix: &QuantMatrix,
        in_bf16: bool,
        device: &Device,
    ) -> Option<Self> {
        let device = cube_device(device)?;
        let [rows, cols] = matrix.shape();
        let (kind, words) = match matrix.values() {
            Values::Nf4(values) => nf4_words(values, [rows, cols]),
            Values::Int8(values) => (Kind::Int8, int8_words(values, cols)),
            Values::Blocks(_) => return None,
        };
        let client = device.client();
        let shape = [words.len()].into();
        // As it stays as long as the model, apart from a step's blocks.
        let handle = client
            .memory_persistent_allocation(words, |words| client.create(Bytes::from_elems(words)));
        let words = CubeTensor::new_contiguous(client, device, shape, handle, DType::U32);
        Some(Self {
            words,
            kind,
            rows,
            cols,
            in_bf16,
        })
    }

    /// `[rows, cols]`
    pub(in crate::kernels) fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Bytes that it takes.
    pub(in crate::kernels) fn bytes(&self) -> usize {
        self.words.meta.num_elements() * self.words.elem_size()
    }

    /// All of it in f32.
    pub(in crate::kernels) fn in_f32(&self) -> Tensor<2> {
        Tensor::from_primitive::<CubeBackend>(super::unpack::widened(self))
    }

    /// The buffer, for a kernel.
    pub(super) fn argument(&self) -> BufferArg {
        let words = self.words.clone();
        let elements = words.shape().num_elements();
        let length = match self.kind {
            Kind::F16 | Kind::Bf16 => elements.div_ceil(2),
            _ => elements,
        };
        // SAFETY: the memory of a tensor of 16 bits holds whole words, as devices align it.
        unsafe { BufferArg::from_raw_parts(words.handle, length) }
    }

    /// Where what is, for a kernel.
    pub(super) fn layout(&self) -> LayoutLaunch {
        Self::layout_of(self.kind, self.rows, self.cols)
    }

    /// Of any matrix.
    pub(super) fn layout_of(kind: Kind, rows: usize, cols: usize) -> LayoutLaunch {
        let row_words = cols.div_ceil(kind.in_a_word());
        let scales_at = kind.codes_at() + rows * row_words;
        let blocks = (rows * cols).div_ceil(nf4::BLOCK) + 1;
        let groups_at = scales_at + blocks.div_ceil(4);
        let offset_at = groups_at + blocks.div_ceil(SCALE_GROUP);
        LayoutLaunch::new(cols, row_words, scales_at, groups_at, offset_at)
    }
}

/// A matrix of 16 bits that is another's transpose, in f32 and contiguous: burn's own copy would need
/// the type.
fn without_gaps(tensor: CubeTensor) -> CubeTensor {
    let own = CubeBackend::float_swap_dims(tensor, 0, 1);
    let own = match own.is_contiguous() {
        true => super::unpack::in_f32(own),
        false => CubeBackend::float_cast(own, FloatDType::F32),
    };
    contiguous(CubeBackend::float_swap_dims(own, 0, 1))
}

/// The device as the GPU backend knows it; `None` for the processor.
fn cube_device(device: &Device) -> Option<CubeDevice> {
    let one = Tensor::<1>::empty([1], &device.clone().inner());
    let one = one.try_into_primitive::<CubeBackend>().ok()?;
    Some(one.device())
}

fn nf4_words(values: &Nf4, [rows, cols]: [usize; 2]) -> (Kind, Vec<u32>) {
    let mut words: Vec<u32> = CODEBOOK.iter().map(|x| x.to_bits()).collect();
    if let Absmax::Double(_) = values.absmax() {
        words.extend(absmax::CODEBOOK.iter().map(|x| x.to_bits()));
    }
    let packed = values.packed();
    let code = |i: usize| u32::from(packed[i / 2] >> (4 * (1 - i % 2)) & 15);
    for row in 0..rows {
        for start in (row * cols..(row + 1) * cols).step_by(8) {
            let end = (start + 8).min((row + 1) * cols);
            let word = match (start % 2, end - start) {
                // Whole bytes, in which the first code is the higher.
                (0, 8) => {
                    let bytes = packed[start / 2..start / 2 + 4].try_into();
                    let word = u32::from_le_bytes(bytes.expect("four bytes"));
                    (word >> 4 & 0x0f0f_0f0f) | (word << 4 & 0xf0f0_f0f0)
                }
                _ => (start..end).fold(0, |word, i| word | code(i) << (4 * (i - start))),
            };
            words.push(word);
        }
    }
    let kind = match values.absmax() {
        Absmax::Plain(scales) => {
            words.extend(scales.iter().map(|x| x.to_bits()));
            // For the last quad of numbers, which may reach past the last block.
            words.push(0);
            Kind::Nf4
        }
        Absmax::Double(double) => {
            let mut codes = double.codes.to_vec();
            codes.push(0);
            words.extend(codes.chunks(4).map(little_endian));
            words.extend(double.scales.iter().map(|x| x.to_bits()));
            let groups = codes.len().div_ceil(SCALE_GROUP);
            words.resize(words.len() + groups - double.scales.len(), 0);
            words.push(double.offset.to_bits());
            Kind::Nf4Double
        }
    };
    (kind, words)
}

fn int8_words(values: &Int8, cols: usize) -> Vec<u32> {
    let rows = values.codes().chunks(cols.max(1));
    let words = rows.flat_map(|row| {
        let words = row.chunks(4);
        words.map(|codes| little_endian(bytemuck::cast_slice(codes)))
    });
    let scales = values.absmax().iter().map(|x| x.to_bits());
    words.chain(scales).collect()
}

/// A word of up to four bytes, the first lowest.
fn little_endian(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    word[..bytes.len()].copy_from_slice(bytes);
    u32::from_le_bytes(word)
}
