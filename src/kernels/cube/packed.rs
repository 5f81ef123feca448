//! A matrix in device memory as the kernels read it: dense or quantised, in 32-bit words, as not every
//! device has the types of fewer bits.

use burn::backend::{Backend, DType, TensorMetadata};
use burn::tensor::{Bytes, Device, Tensor};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::prelude::*;

use super::{UNITS, contiguous, cubes, empty};
use crate::quant::absmax::{self, Absmax};
use crate::quant::int8::Int8;
use crate::quant::matrix::Values;
use crate::quant::nf4::{self, Nf4};
use crate::quant::{QuantMatrix, nf4::CODEBOOK};

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
const TABLE: usize = CODEBOOK.len();
/// Words of the code book of quantised scales.
const SCALE_TABLE: usize = 256;
/// Scales that share one of their own.
const SCALE_GROUP: usize = 256;

impl Kind {
    /// Where the codes begin.
    const fn codes_at(self) -> usize {
        match self {
            Self::Nf4 => TABLE,
            Self::Nf4Double => TABLE + SCALE_TABLE,
            _ => 0,
        }
    }

    /// Whether numbers are looked up.
    const fn has_table(self) -> bool {
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
    words: CubeTensor,
    pub(super) kind: Kind,
    pub(super) rows: usize,
    pub(super) cols: usize,
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
        Self {
            words: contiguous(tensor),
            kind,
            rows,
            cols,
        }
    }

    /// Sends a quantised matrix to a device; `None` where it is of a kind that no kernel reads, or the
    /// device is the processor.
    pub(in crate::kernels) fn send(matrix: &QuantMatrix, device: &Device) -> Option<Self> {
        let device = cube_device(device)?;
        let [rows, cols] = matrix.shape();
        let (kind, words) = match matrix.values() {
            Values::Nf4(values) => nf4_words(values, [rows, cols]),
            Values::Int8(values) => (Kind::Int8, int8_words(values, cols)),
        };
        let client = device.client();
        let shape = [words.len()].into();
        let handle = client.create(Bytes::from_elems(words));
        let words = CubeTensor::new_contiguous(client, device, shape, handle, DType::U32);
        Some(Self {
            words,
            kind,
            rows,
            cols,
        })
    }

    /// `[rows, cols]`
    pub(in crate::kernels) fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// All of it in f32.
    pub(in crate::kernels) fn in_f32(&self) -> Tensor<2> {
        Tensor::from_primitive::<CubeBackend>(self.widened())
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
        let row_words = self.cols.div_ceil(self.kind.in_a_word());
        let scales_at = self.kind.codes_at() + self.rows * row_words;
        let blocks = (self.rows * self.cols).div_ceil(nf4::BLOCK) + 1;
        let groups_at = scales_at + blocks.div_ceil(4);
        LayoutLaunch::new(
            self.rows,
            self.cols,
            row_words,
            scales_at,
            groups_at,
            groups_at + blocks.div_ceil(SCALE_GROUP),
        )
    }

    /// See [`Packed::in_f32`].
    pub(super) fn widened(&self) -> CubeTensor {
        let y = empty(&self.words, [self.rows, self.cols]);
        let quads = self.rows * self.cols.div_ceil(4);
        if quads == 0 {
            return y;
        }
        let client = y.client.clone();
        // SAFETY: quads end at the matrix's last, and their numbers are those of y.
        unsafe {
            widen_kernel::launch_unchecked(
                &client,
                cubes(quads.div_ceil(UNITS as usize)),
                CubeDim::new_1d(UNITS),
                self.argument(),
                y.clone().into_buffer_arg(),
                self.layout(),
                self.kind,
            );
        }
        y
    }
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
            let mut codes = double.codes.clone();
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

/// Where what is in the words.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Layout {
    rows: usize,
    cols: usize,
    /// Words of a row, where rows are padded.
    row_words: usize,
    scales_at: usize,
    /// Of scales' scales.
    groups_at: usize,
    /// Of what is added to all scales.
    offset_at: usize,
}

/// Places for NF4's code book, filled where it is needed, for [`quad`]; a barrier is up to the caller.
#[cube]
pub(super) fn table(words: &[u32], #[comptime] kind: Kind) -> Shared<[f32]> {
    let mut table = Shared::<[f32]>::new_slice(comptime!(TABLE));
    if comptime!(kind.has_table()) {
        let unit = UNIT_POS_X as usize;
        if unit < comptime!(TABLE) {
            table[unit] = f32::reinterpret(words[unit]);
        }
    }
    table
}

/// The numbers of a row from a column on that is a multiple of four; those past the row's end are not
/// defined, but nothing is read past the buffer's.
#[cube]
pub(super) fn quad(
    words: &[u32],
    table: &Shared<[f32]>,
    row: usize,
    col: usize,
    layout: &Layout,
    numbers: &mut Array<f32>,
    #[comptime] kind: Kind,
) {
    match comptime!(kind) {
        Kind::F32 => {
            let start = row * layout.cols + col;
            #[unroll]
            for i in 0..4usize {
                if col + i < layout.cols {
                    numbers[i] = f32::reinterpret(words[start + i]);
                }
            }
        }
        Kind::F16 => {
            let start = row * layout.cols + col;
            #[unroll]
            for i in 0..4usize {
                if col + i < layout.cols {
                    numbers[i] = f16_number(half(words, start + i));
                }
            }
        }
        Kind::Bf16 => {
            let start = row * layout.cols + col;
            #[unroll]
            for i in 0..4usize {
                if col + i < layout.cols {
                    numbers[i] = f32::reinterpret(half(words, start + i) << 16u32);
                }
            }
        }
        Kind::Nf4 | Kind::Nf4Double => {
            let word = words[comptime!(kind.codes_at()) + row * layout.row_words + col / 8];
            let codes = word >> ((col % 8) as u32 * 4u32);
            let start = row * layout.cols + col;
            // Of two blocks at most, as they are longer than four numbers.
            let block = start / comptime!(nf4::BLOCK);
            let last = (start + 3) / comptime!(nf4::BLOCK);
            let first = scale(words, block, layout, kind);
            let mut other = first;
            if last > block {
                other = scale(words, last, layout, kind);
            }
            #[unroll]
            for i in 0..4usize {
                let code = (codes >> comptime!(4 * i as u32)) & 15u32;
                let mut scale = first;
                if (start + i) / comptime!(nf4::BLOCK) > block {
                    scale = other;
                }
                numbers[i] = table[code as usize] * scale;
            }
        }
        Kind::Int8 => {
            let word = words[row * layout.row_words + col / 4];
            let scale = f32::reinterpret(words[layout.scales_at + row]);
            #[unroll]
            for i in 0..4usize {
                let code = i32::reinterpret(word << comptime!(24 - 8 * i as u32)) >> 24i32;
                // First by 1 / 127, so that ±127 gives ± the scale itself.
                numbers[i] = f32::cast_from(code) * (1.0f32 / 127.0f32) * scale;
            }
        }
    }
}

/// A number of 16 bits.
#[cube]
fn half(words: &[u32], at: usize) -> u32 {
    (words[at / 2] >> ((at % 2) as u32 * 16u32)) & 0xffffu32
}

/// The number that an f16's bits stand for, if it is finite.
#[cube]
fn f16_number(bits: u32) -> f32 {
    let magnitude = bits & 0x7fffu32;
    // Below 2^-14 the bits count 2^-24s; as an f32's they would be flushed to zero.
    let small = f32::cast_from(magnitude) * 5.960_464_5e-8f32;
    // The exponent of f32 is larger by 112 for the same power of two.
    let normal = f32::reinterpret((magnitude << 13u32) + (112u32 << 23u32));
    let mut number = normal;
    if magnitude < 1024u32 {
        number = small;
    }
    if bits > 0x7fffu32 {
        number = -number;
    }
    number
}

/// The scale of a block of NF4.
#[cube]
fn scale(words: &[u32], block: usize, layout: &Layout, #[comptime] kind: Kind) -> f32 {
    match comptime!(kind) {
        Kind::Nf4Double => {
            let codes = words[layout.scales_at + block / 4];
            let code = (codes >> ((block % 4) as u32 * 8u32)) & 255u32;
            let code = f32::reinterpret(words[comptime!(TABLE) + code as usize]);
            let group = words[layout.groups_at + block / comptime!(SCALE_GROUP)];
            code * f32::reinterpret(group) + f32::reinterpret(words[layout.offset_at])
        }
        _ => f32::reinterpret(words[layout.scales_at + block]),
    }
}

/// The whole matrix in f32.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn widen_kernel(
    words: &[u32],
    y: &mut [f32],
    layout: &Layout,
    #[comptime] kind: Kind,
) {
    let table = table(words, kind);
    sync_cube();
    let quads = layout.cols.div_ceil(4);
    let (row, col) = (ABSOLUTE_POS / quads, ABSOLUTE_POS % quads * 4);
    if row < layout.rows {
        let mut numbers = Array::<f32>::new(4usize);
        quad(words, &table, row, col, layout, &mut numbers, kind);
        #[unroll]
        for i in 0..4usize {
            if col + i < layout.cols {
                y[row * layout.cols + col + i] = numbers[i];
            }
        }
    }
}
