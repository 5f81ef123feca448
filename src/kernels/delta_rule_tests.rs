//! The gated delta rule in chunks against the same rule token by token.

use burn::tensor::{Tensor, TensorData, activation};

use super::Segments;
use super::delta_rule::{DeltaHeads, DeltaInputs, delta_rule, delta_rule_from};
use super::tests::attention::{PACKINGS, packed};
use super::tests::{assert_close, compare, device, random};

const HEADS: DeltaHeads = DeltaHeads {
    key_heads: 2,
    value_heads: 4,
    key_dim: 8,
    value_dim: 12,
};

const ONE_HEAD: DeltaHeads = DeltaHeads {
    key_heads: 1,
    value_heads: 1,
    key_dim: 16,
    value_dim: 16,
};

/// Around the size of a chunk, and several chunks.
const LENGTHS: [usize; 6] = [1, 5, 63, 64, 65, 150];

/// q, k, v and what decay and beta come from, of `n` rows.
fn random_rows(heads: DeltaHeads, n: usize) -> [Tensor<2>; 5] {
    [
        random([n, heads.key_width()]),
        random([n, heads.key_width()]),
        random([n, heads.value_width()]),
        random([n, heads.value_heads]) - 2.0,
        random([n, heads.value_heads]),
    ]
}

/// Decays and betas as in a model: decays from nearly none to some, betas from 0 to 1.
fn inputs(x: &[Tensor<2>]) -> DeltaInputs {
    DeltaInputs {
        q: x[0].clone(),
        k: x[1].clone(),
        v: x[2].clone(),
        log_decay: -activation::softplus(x[3].clone(), 1.0),
        beta: activation::sigmoid(x[4].clone()),
    }
}

/// Some rows of each input.
fn part(x: &[Tensor<2>], start: usize, length: usize) -> Vec<Tensor<2>> {
    x.iter()
        .map(|x| x.clone().narrow(0, start, length))
        .collect()
}

fn values(x: &Tensor<2>) -> Vec<f64> {
    let values = x.to_data().try_to_vec::<f32>().expect("f32");
    values.into_iter().map(f64::from).collect()
}

/// One segment in f64, as the rule is written; output and state.
fn by_definition(inputs: &DeltaInputs, heads: DeltaHeads) -> (Tensor<2>, Tensor<4>) {
    let DeltaHeads {
        key_heads,
        value_heads,
        key_dim: dk,
        value_dim: dv,
    } = heads;
    let n = inputs.q.dims()[0];
    let unit = |x: &Tensor<2>| -> Vec<f64> {
        let rows = values(x);
        rows.chunks(dk)
            .flat_map(|row| {
                let length = (row.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                row.iter().map(move |x| x / length)
            })
            .collect()
    };
    let (q, k, v) = (unit(&inputs.q), unit(&inputs.k), values(&inputs.v));
    let (g, beta) = (values(&inputs.log_decay), values(&inputs.beta));
    let mut state = vec![0f64; value_heads * dk * dv];
    let mut out = vec![0f64; n * value_heads * dv];
    for t in 0..n {
        for h in 0..value_heads {
            let s = &mut state[h * dk * dv..][..dk * dv];
            let key_row = (t * key_heads + h / (value_heads / key_heads)) * dk;
            let (q, k) = (&q[key_row..][..dk], &k[key_row..][..dk]);
            let gate = t * value_heads + h;
            s.iter_mut().for_each(|s| *s *= g[gate].exp());
            for j in 0..dv {
                let known: f64 = (0..dk).map(|i| s[i * dv + j] * k[i]).sum();
                let written = (v[gate * dv + j] - known) * beta[gate];
                (0..dk).for_each(|i| s[i * dv + j] += k[i] * written);
                let read: f64 = (0..dk).map(|i| s[i * dv + j] * q[i]).sum();
                out[gate * dv + j] = read / (dk as f64).sqrt();
            }
        }
    }
    let device = inputs.q.device();
    let single = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
    (
        Tensor::from_data(
            TensorData::new(single(out), [n, heads.value_width()]),
            &device,
        ),
        Tensor::from_data(
            TensorData::new(single(state), [1, value_heads, dk, dv]),
            &device,
        ),
    )
}

/// One segment token by token in tensor operations, so that it has gradients.
fn token_by_token(inputs: DeltaInputs, heads: DeltaHeads) -> Tensor<2> {
    let [n, _] = inputs.q.dims();
    let DeltaHeads {
        key_heads,
        value_heads: h,
        key_dim: dk,
        value_dim: dv,
    } = heads;
    // [N, Hk·Dk] → [N, Hv, Dk, 1] of unit length
    let unit = |x: Tensor<2>| -> Tensor<4> {
        let x: Tensor<3> = x.reshape([n, key_heads, dk]);
        let x = x.clone() / (x.square().sum_dim(2) + 1e-6).sqrt();
        x.reshape([n, key_heads, 1, dk])
            .repeat_dim(2, h / key_heads)
            .reshape([n, h, dk, 1])
    };
    let (q, k) = (unit(inputs.q) * (dk as f64).powf(-0.5), unit(inputs.k));
    let v: Tensor<4> = inputs.v.reshape([n, h, 1, dv]);
    let kept: Tensor<4> = inputs.log_decay.exp().reshape([n, h, 1, 1]);
    let beta: Tensor<4> = inputs.beta.reshape([n, h, 1, 1]);
    let mut state = Tensor::<4>::zeros([1, h, dk, dv], &q.device());
    let rows = (0..n).map(|t| {
        let at = |x: &Tensor<4>| x.clone().narrow(0, t, 1);
        state = state.clone() * at(&kept);
        let known = (state.clone() * at(&k)).sum_dim(2); // [1, Hv, 1, Dv]
        state = state.clone() + at(&k) * (at(&v) - known) * at(&beta);
        (state.clone() * at(&q)).sum_dim(2).reshape([1, h * dv])
    });
    Tensor::cat(rows.collect(), 0)
}

#[test]
fn chunks_equal_the_rule_token_by_token() {
    device();
    for heads in [HEADS, ONE_HEAD] {
        for n in LENGTHS {
            let inputs = inputs(&random_rows(heads, n));
            let segments = Segments::uniform(1, n);
            let (want, want_state) = by_definition(&inputs, heads);
            let got = delta_rule(inputs.clone(), heads, &segments);
            assert_close(&format!("{n} tokens"), got, want.clone());
            let (got, state) = delta_rule_from(None, inputs, heads, &segments);
            assert_close(&format!("{n} tokens with a state"), got, want);
            assert_close(&format!("state after {n} tokens"), state, want_state);
        }
    }
}

#[test]
fn gradients_equal_those_of_the_rule_token_by_token() {
    device();
    for heads in [HEADS, ONE_HEAD] {
        for n in LENGTHS {
            compare(
                &format!("{n} tokens"),
                &random_rows(heads, n),
                |x| delta_rule(inputs(x), heads, &Segments::uniform(1, n)),
                |x| token_by_token(inputs(x), heads),
            );
        }
    }
}

/// A text that repeats a token, a head that forgets nothing and writes all: terms of the series of
/// powers of L would reach 10¹⁷ here, where the inverse itself stays below 1.
#[test]
fn repeated_keys_lose_no_accuracy() {
    device();
    let n = 150;
    let mut rows = random_rows(HEADS, n);
    rows[1] = random([1, HEADS.key_width()]).repeat_dim(0, n) + rows[1].clone() * 0.01;
    rows[3] = rows[3].zeros_like() - 12.0;
    rows[4] = rows[4].zeros_like() + 8.0;
    let segments = Segments::uniform(1, n);
    let (want, _) = by_definition(&inputs(&rows), HEADS);
    let got = delta_rule(inputs(&rows), HEADS, &segments);
    assert_close("repeated keys", got, want);
    compare(
        "repeated keys",
        &rows,
        |x| delta_rule(inputs(x), HEADS, &segments),
        |x| token_by_token(inputs(x), HEADS),
    );
}

/// Sums of decays reach -10⁴ in a chunk, far below what `exp` can invert.
#[test]
fn strong_decay_gives_finite_numbers() {
    device();
    let n = 130;
    let mut rows = random_rows(HEADS, n);
    rows[3] = rows[3].clone() * 20.0 + 100.0;
    compare(
        "strong decay",
        &rows,
        |x| delta_rule(inputs(x), HEADS, &Segments::uniform(1, n)),
        |x| token_by_token(inputs(x), HEADS),
    );
}

#[test]
fn segments_give_what_each_gives_alone() {
    device();
    let uniform = [(1, 3, 64), (1, 2, 70), (1, 4, 1), (3, 2, 150)];
    let uniform = uniform.map(|(batch, rows, n)| packed(batch, &vec![n; batch * rows]));
    let uneven = PACKINGS.map(|(batch, lengths)| packed(batch, lengths));
    for segments in uniform.into_iter().chain(uneven) {
        let rows = random_rows(HEADS, segments.tokens());
        compare(
            &format!("{segments:?}"),
            &rows,
            |x| delta_rule(inputs(x), HEADS, &segments),
            |x| {
                let alone = segments
                    .ranges()
                    .filter(|rows| !rows.is_empty())
                    .map(|rows| {
                        let one = inputs(&part(x, rows.start, rows.len()));
                        delta_rule(one, HEADS, &Segments::uniform(1, rows.len()))
                    });
                Tensor::cat(alone.collect(), 0)
            },
        );
    }
}

#[test]
fn a_state_goes_on_where_it_ended() {
    device();
    let (batch, n) = (2, 140);
    let rows = random_rows(HEADS, batch * n);
    let (want, want_state) =
        delta_rule_from(None, inputs(&rows), HEADS, &Segments::uniform(batch, n));
    let mut state = None;
    let (mut outs, mut past) = (Vec::new(), 0);
    for length in [70, 1, 1, 65, 3] {
        let next: Vec<Tensor<2>> = (rows.iter())
            .map(|x| {
                let width = x.dims()[1];
                let x: Tensor<3> = x.clone().reshape([batch, n, width]);
                x.narrow(1, past, length).reshape([batch * length, width])
            })
            .collect();
        let segments = Segments::uniform(batch, length);
        let (out, next_state) = delta_rule_from(state, inputs(&next), HEADS, &segments);
        outs.push(out.reshape([batch, length, HEADS.value_width()]));
        state = Some(next_state);
        past += length;
    }
    let got: Tensor<3> = Tensor::cat(outs, 1);
    assert_close("output", got.reshape(want.dims()), want);
    assert_close("state", state.expect("a state"), want_state);
}
