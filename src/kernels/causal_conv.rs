//! Causal convolution over the tokens of each segment, every channel for itself.

use burn::tensor::{Tensor, TensorData};

use super::Segments;

/// `y_t = Σ_i w_i x_{t - (K - 1) + i}`, where tokens before a segment's first count as 0.
///
/// Computed as `w_K x + back(w_{K-1} x + back(…))`, where `back` moves rows one token on, so that
/// one mask of first tokens serves all taps.
///
/// # Shapes
/// x `[N, W]`, weight `[W, K]` → `[N, W]`
pub fn causal_conv(x: Tensor<2>, weight: Tensor<2>, segments: &Segments) -> Tensor<2> {
    let taps = weight.transpose(); // [K, W]
    let follows = (segments.count() > 1).then(|| {
        let values: Vec<f32> = (segments.positions(0).iter())
            .map(|&position| f32::from(position > 0))
            .collect();
        let shape = [values.len(), 1];
        Tensor::<2>::from_data(TensorData::new(values, shape), &x.device())
    });
    let tap = |i| x.clone() * taps.clone().narrow(0, i, 1);
    (1..taps.dims()[0]).fold(tap(0), |sum, i| {
        let moved = one_token_on(sum);
        let moved = match &follows {
            Some(follows) => moved * follows.clone(),
            None => moved,
        };
        moved + tap(i)
    })
}

/// Row t becomes row t + 1, and row 0 is 0.
fn one_token_on(x: Tensor<2>) -> Tensor<2> {
    let [n, width] = x.dims();
    let first = Tensor::zeros([1, width], &x.device());
    if n == 1 {
        return first;
    }
    Tensor::cat(vec![first, x.narrow(0, 0, n - 1)], 0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::attention::packed;
    use super::super::tests::{assert_close, random};
    use super::*;

    /// The sum as it is written.
    fn by_definition(x: &[f32], w: &[f32], width: usize, segments: &Segments) -> Vec<f32> {
        let taps = w.len() / width;
        let mut y = vec![0f32; x.len()];
        for rows in segments.ranges() {
            for t in rows.clone() {
                for channel in 0..width {
                    y[t * width + channel] = (0..taps)
                        .filter(|i| t + i + 1 >= rows.start + taps)
                        .map(|i| w[channel * taps + i] * x[(t + i + 1 - taps) * width + channel])
                        .sum();
                }
            }
        }
        y
    }

    #[test]
    fn each_segment_is_convolved_from_its_first_token() {
        let width = 3;
        for taps in [1, 2, 4] {
            for segments in [
                Segments::uniform(1, 1),
                Segments::uniform(1, 9),
                Segments::uniform(3, 4),
                packed(2, &[1, 7, 0, 2, 6]),
            ] {
                let n = segments.tokens();
                let (x, w) = (random([n, width]), random([width, taps]));
                let values = |x: &Tensor<2>| x.to_data().try_to_vec::<f32>().expect("f32");
                let want = by_definition(&values(&x), &values(&w), width, &segments);
                let want = Tensor::from_data(TensorData::new(want, [n, width]), &x.device());
                let got = causal_conv(x, w, &segments);
                assert_close(&format!("{taps} taps, {segments:?}"), got, want);
            }
        }
    }
}
