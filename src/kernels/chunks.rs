//! Segments cut into chunks of one size, for operations that walk through a segment chunk by chunk
//! and take all segments' chunks of the same number at once.

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::Segments;

/// n chunks of C slots: first the first chunk of each segment, then the second of each that has
/// one, and so on. Only the last chunk of a segment may have slots without a row.
#[derive(Debug, Clone)]
pub(super) struct Chunks {
    size: usize,
    steps: Vec<usize>,
    order: Order,
}

/// How rows get into slots.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "one a call, and a tensor's handle is what is large"
)]
enum Order {
    /// All segments have the same length, so that padding and swapping dimensions will do.
    Uniform { segments: usize, tokens: usize },
    /// Segments with more chunks come first, so that those which go on are the first of a step.
    Gathered {
        /// The row in each slot; the segment's first one where there is none. `[n · C]`
        rows: Tensor<1, Int>,
        /// 1 in slots with a row, else 0. `[n, C, 1]`
        filled: Tensor<3>,
        /// The slot of each row. `[N]`
        slots: Tensor<1, Int>,
    },
}

impl Chunks {
    /// Chunks of `size` slots, a power of 2, or of fewer where all segments are shorter.
    pub fn new(segments: &Segments, size: usize, device: &Device) -> Self {
        let lengths = || segments.ranges().map(|rows| rows.len());
        let (longest, shortest) = (lengths().max(), lengths().min());
        let longest = longest.unwrap_or_default();
        let size = size.min(longest.next_power_of_two());
        if shortest == Some(longest) {
            return Self {
                size,
                steps: vec![segments.count(); longest.div_ceil(size)],
                order: Order::Uniform {
                    segments: segments.count(),
                    tokens: longest,
                },
            };
        }
        Self::gathered(segments, size, device)
    }

    fn gathered(segments: &Segments, size: usize, device: &Device) -> Self {
        let mut ranges: Vec<_> = segments.ranges().collect();
        ranges.sort_by_key(|rows| std::cmp::Reverse(rows.len().div_ceil(size)));
        let (mut steps, mut rows, mut filled) = (Vec::new(), Vec::new(), Vec::new());
        let mut slots = vec![0i32; segments.tokens()];
        for first in (0..ranges.first().map_or(0, |longest| longest.len())).step_by(size) {
            let active = ranges.iter().take_while(|rows| rows.len() > first);
            steps.push(active.clone().count());
            for range in active {
                for offset in first..first + size {
                    let row = range.start + offset;
                    let is_filled = range.contains(&row);
                    if is_filled {
                        slots[row] = rows.len() as i32;
                    }
                    // Not another segment's row: not even a NaN may cross.
                    rows.push(if is_filled { row } else { range.start } as i32);
                    filled.push(f32::from(is_filled));
                }
            }
        }
        let n = rows.len() / size;
        let indices = |values: Vec<i32>| {
            let count = values.len();
            Tensor::from_data(TensorData::new(values, [count]), device)
        };
        Self {
            size,
            steps,
            order: Order::Gathered {
                rows: indices(rows),
                filled: Tensor::from_data(TensorData::new(filled, [n, size, 1]), device),
                slots: indices(slots),
            },
        }
    }

    /// How many chunks each step takes; never more than the step before it.
    pub fn steps(&self) -> &[usize] {
        &self.steps
    }

    /// Whether all segments have the same length.
    pub fn is_uniform(&self) -> bool {
        matches!(self.order, Order::Uniform { .. })
    }

    /// Rows into slots; what slots without a row hold is finite where the segment's rows are.
    ///
    /// # Shapes
    /// `[N, W]` → `[n, C, W]`
    pub fn fill(&self, x: Tensor<2>) -> Tensor<3> {
        let (width, c, steps) = (x.dims()[1], self.size, self.steps.len());
        match &self.order {
            Order::Uniform { segments, tokens } => {
                let mut x = x.reshape([*segments, *tokens, width]);
                let missing = steps * c - tokens;
                if missing > 0 {
                    let zeros = Tensor::zeros([*segments, missing, width], &x.device());
                    x = Tensor::cat(vec![x, zeros], 1);
                }
                x.reshape([*segments, steps, c, width])
                    .swap_dims(0, 1)
                    .reshape([segments * steps, c, width])
            }
            Order::Gathered { rows, .. } => {
                let n = self.steps.iter().sum::<usize>();
                x.select(0, rows.clone()).reshape([n, c, width])
            }
        }
    }

    /// Rows into slots, and 0 into those without a row.
    ///
    /// # Shapes
    /// `[N, W]` → `[n, C, W]`
    pub fn fill_zeroed(&self, x: Tensor<2>) -> Tensor<3> {
        let slots = self.fill(x);
        match &self.order {
            Order::Uniform { .. } => slots,
            Order::Gathered { filled, .. } => slots * filled.clone(),
        }
    }

    /// Slots back into rows.
    ///
    /// # Shapes
    /// `[n, C, W]` → `[N, W]`
    pub fn rows(&self, x: Tensor<3>) -> Tensor<2> {
        let ([n, c, width], steps) = (x.dims(), self.steps.len());
        match &self.order {
            Order::Uniform { segments, tokens } => {
                let x = x
                    .reshape([steps, *segments, c, width])
                    .swap_dims(0, 1)
                    .reshape([*segments, steps * c, width]);
                let x = if steps * c > *tokens {
                    x.narrow(1, 0, *tokens)
                } else {
                    x
                };
                x.reshape([segments * tokens, width])
            }
            Order::Gathered { slots, .. } => x.reshape([n * c, width]).select(0, slots.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows numbered from 1, in slots (and 0 elsewhere), and back.
    fn slots_of(segments: &Segments, size: usize) -> (Vec<usize>, Vec<f32>) {
        let device = Device::flex();
        let chunks = Chunks::new(segments, size, &device);
        let n = segments.tokens();
        let numbers: Vec<f32> = (1..=n).map(|i| i as f32).collect();
        let rows = Tensor::<2>::from_data(TensorData::new(numbers.clone(), [n, 1]), &device);
        let slots = chunks.fill_zeroed(rows);
        let back = chunks.rows(slots.clone()).into_data();
        assert_eq!(
            back.try_to_vec::<f32>().expect("f32"),
            numbers,
            "{segments:?}"
        );
        let slots = slots.into_data().try_to_vec().expect("f32");
        (chunks.steps().to_vec(), slots)
    }

    #[test]
    fn equal_segments_take_the_same_steps() {
        let (steps, slots) = slots_of(&Segments::uniform(2, 3), 2);
        assert_eq!(steps, [2, 2]);
        assert_eq!(slots, [1., 2., 4., 5., 3., 0., 6., 0.]);
        let (steps, slots) = slots_of(&Segments::uniform(1, 4), 2);
        assert_eq!(steps, [1, 1]);
        assert_eq!(slots, [1., 2., 3., 4.]);
    }

    #[test]
    fn chunks_are_no_longer_than_needed() {
        assert_eq!(slots_of(&Segments::uniform(2, 1), 64).1, [1., 2.]);
        let (steps, slots) = slots_of(&Segments::uniform(1, 3), 64);
        assert_eq!(steps, [1]);
        assert_eq!(slots, [1., 2., 3., 0.]);
    }

    #[test]
    fn longer_segments_come_first_and_empty_ones_not_at_all() {
        let segments = Segments::packed(1, [0, 1, 1, 6, 9].into());
        let (steps, slots) = slots_of(&segments, 2);
        assert_eq!(steps, [3, 2, 1]);
        let want = [2., 3., 7., 8., 1., 0., 4., 5., 9., 0., 6., 0.];
        assert_eq!(slots, want);
    }
}
