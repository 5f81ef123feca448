//! How kernels read a packed matrix, and the kernels that only do that: all of it in f32, or some rows.

use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::{DType, TensorMetadata};
use burn::tensor::IntDType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::packed::{Kind, Packed, SCALE_GROUP, TABLE};
use super::{UNITS, contiguous, cubes, dims, empty};
use crate::quant::nf4;

/// Where what is in the words.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Layout {
    pub(super) cols: usize,
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
            let first = block_scale(words, block, layout, kind);
            let mut other = first;
            if last > block {
                other = block_scale(words, last, layout, kind);
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
fn block_scale(words: &[u32], block: usize, layout: &Layout, #[comptime] kind: Kind) -> f32 {
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

/// Rows of a matrix in f32: those that `chosen` names, or all, in order.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(crate) fn rows_kernel(
    words: &[u32],
    chosen: &[i32],
    y: &mut [f32],
    count: usize,
    layout: &Layout,
    #[comptime] all: bool,
    #[comptime] kind: Kind,
) {
    let table = table(words, kind);
    sync_cube();
    let quads = layout.cols.div_ceil(4);
    let (place, col) = (ABSOLUTE_POS / quads, ABSOLUTE_POS % quads * 4);
    if place < count {
        let mut row = place;
        if comptime!(!all) {
            row = chosen[place] as usize;
        }
        let mut numbers = Array::<f32>::new(4usize);
        quad(words, &table, row, col, layout, &mut numbers, kind);
        #[unroll]
        for i in 0..4usize {
            if col + i < layout.cols {
                y[place * layout.cols + col + i] = numbers[i];
            }
        }
    }
}

/// All of a matrix in f32.
pub(super) fn widened(matrix: &Packed) -> CubeTensor {
    read(matrix, None, matrix.rows)
}

/// Rows of a table in f32.
///
/// # Shapes
/// table `[V, D]`, ids `[N]` below V → `[N, D]`
pub(super) fn rows_of(table: CubeTensor, ids: CubeTensor) -> CubeTensor {
    let [_, cols] = dims(&table);
    let [count] = ids.shape().dims();
    let ids = match ids.dtype() {
        DType::I32 => ids,
        _ => CubeBackend::int_cast(ids, IntDType::I32),
    };
    read(&Packed::dense(table, cols), Some(contiguous(ids)), count)
}

/// A tensor of 16 bits in f32.
pub(super) fn in_f32(x: CubeTensor) -> CubeTensor {
    let shape = x.shape();
    let cols = shape.iter().last().copied().unwrap_or(1);
    let widened = widened(&Packed::dense(x, cols));
    CubeBackend::float_reshape(widened, shape)
}

fn read(matrix: &Packed, chosen: Option<CubeTensor>, count: usize) -> CubeTensor {
    let y = empty(&matrix.words, [count, matrix.cols]);
    let quads = count * matrix.cols.div_ceil(4);
    if quads == 0 {
        return y;
    }
    let client = y.client.clone();
    let all = chosen.is_none();
    // Where all are read, nothing is chosen from.
    let chosen = chosen.map_or_else(|| matrix.argument(), CubeTensor::into_buffer_arg);
    // SAFETY: places end at `count`, the rows of y; rows that are chosen are the matrix's.
    unsafe {
        rows_kernel::launch_unchecked(
            &client,
            cubes(quads.div_ceil(UNITS as usize)),
            CubeDim::new_1d(UNITS),
            matrix.argument(),
            chosen,
            y.clone().into_buffer_arg(),
            count,
            matrix.layout(),
            all,
            matrix.kind,
        );
    }
    y
}
