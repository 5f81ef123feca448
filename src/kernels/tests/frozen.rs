//! Products with frozen weights of 16 bits, against sums in f64.
//!
//! The weights themselves are exact in f32, so what can differ is the rounding of the other factor to
//! bf16, by u = 2⁻⁸ of each element at most, and f32's own: `u Σ |x| |w|` element by element, and no
//! more than 2⁻²⁰ of the same sum where the products are f32's.

use burn::tensor::FloatDType;

use super::*;

const DTYPES: [FloatDType; 3] = [FloatDType::F32, FloatDType::F16, FloatDType::BF16];

fn slack(dtype: FloatDType) -> f64 {
    let f32_sums = 2f64.powi(-20);
    match dtype {
        FloatDType::BF16 if has_bf16_products() => 2f64.powi(-8) + f32_sums,
        _ => f32_sums,
    }
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f64> {
    let values: Vec<f32> = in_f32(x).into_data().try_into_vec().expect("f32");
    values.into_iter().map(f64::from).collect()
}

/// Checks `got [m, n] = x [m, k] w [n, k]ᵀ` within the bound.
pub(super) fn assert_product(name: &str, got: Tensor<2>, x: Tensor<2>, w: Tensor<2>, slack: f64) {
    let ([m, k], [n, _]) = (x.dims(), w.dims());
    assert_eq!(got.dims(), [m, n], "{name}");
    let (got, x, w) = (values(got), values(x), values(w));
    for i in 0..m {
        for j in 0..n {
            let terms = (x[i * k..][..k].iter()).zip(&w[j * k..][..k]);
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), (x, w)| {
                (sum + x * w, size + (x * w).abs())
            });
            let off = (got[i * n + j] - sum).abs();
            assert!(
                off <= slack * size,
                "{name}, element ({i}, {j}): off by {off}, allowed {}",
                slack * size
            );
        }
    }
}

/// The output for x and the gradient of x under a given upstream.
pub(super) fn with_gradient(
    x: &Tensor<2>,
    upstream: &Tensor<2>,
    f: impl Fn(Tensor<2>) -> Tensor<2>,
) -> (Tensor<2>, Tensor<2>) {
    let leaf = x.clone().autodiff().require_grad();
    let y = f(leaf.clone());
    let mut grads = (y.clone() * upstream.clone()).sum().backward();
    (y.inner(), leaf.grad_remove(&mut grads).expect("a gradient"))
}

#[test]
fn linear_is_within_its_bound() {
    device();
    // Tiles, blocks of terms and of rows, panels and converted blocks: exact, one less, one more.
    for (n, input, out) in [
        (1, 1, 1),
        (1, 700, 800),
        (3, 2, 47),
        (8, 256, 48),
        (9, 257, 49),
        (7, 31, 433),
        (193, 33, 96),
        (200, 515, 97),
        (385, 64, 400),
        (1100, 65, 40),
        (5, 4200, 3),
    ] {
        for dtype in DTYPES {
            let name = format!("{dtype:?} {n}x{input}x{out}");
            let (x, g) = (random([n, input]), random([n, out]));
            let weight = random::<2>([out, input]).cast(dtype);
            let (y, dx) = with_gradient(&x, &g, |x| linear(x, weight.clone()));
            assert_product(&name, y, x, weight.clone(), slack(dtype));
            let weight = weight.transpose();
            assert_product(&format!("{name}, gradient"), dx, g, weight, slack(dtype));
        }
    }
}

#[test]
fn rounding_is_to_nearest_even() {
    let (one, up) = (1.0, 1.0 + 2f32.powi(-7));
    let halfway = [one + 2f32.powi(-8), up + 2f32.powi(-8)];
    let x = Tensor::<2>::from_data([halfway], &Device::flex()).transpose(); // [2, 1]
    let weight = Tensor::<2>::from_data([[1f32]], &Device::flex()).cast(FloatDType::BF16);
    let got = values(linear(x, weight));
    let want = match has_bf16_products() {
        true => [one, one + 2.0 * 2f32.powi(-7)],
        false => halfway,
    };
    assert_eq!(got, want.map(f64::from));
}

#[test]
fn rows_do_not_depend_on_their_neighbours() {
    device();
    for dtype in DTYPES {
        let (x, weight) = (random::<2>([300, 130]), random::<2>([100, 130]).cast(dtype));
        let all = linear(x.clone(), weight.clone());
        for row in [0, 7, 299] {
            let alone = linear(x.clone().narrow(0, row, 1), weight.clone());
            let off = (alone - all.clone().narrow(0, row, 1)).abs().max();
            // gemm's own small products take another order than its large ones.
            let allowed = if dtype == FloatDType::BF16 && has_bf16_products() {
                0.0
            } else {
                1e-4
            };
            assert!(off.into_scalar::<f32>() <= allowed, "{dtype:?}, row {row}");
        }
    }
}

#[test]
fn experts_take_their_own_rows_of_16_bits() {
    device();
    let (experts, input, out, rank) = (4, 65, 50, 3);
    let offsets: Arc<[usize]> = Arc::from([0, 9, 9, 10, 43]);
    for dtype in DTYPES {
        let weight = random::<3>([experts, out, input]).cast(dtype);
        let (x, g) = (random([43, input]), random([43, out]));
        let (y, dx) = with_gradient(&x, &g, |x| {
            expert_linear(x, weight.clone(), Arc::clone(&offsets))
        });
        for (expert, rows) in linear::filled(&offsets) {
            let part = |x: &Tensor<2>| x.clone().narrow(0, rows.start, rows.len());
            let w = weight.clone().narrow(0, expert, 1).reshape([out, input]);
            let name = format!("{dtype:?}, expert {expert}");
            assert_product(&name, part(&y), part(&x), w.clone(), slack(dtype));
            let name = format!("{name}, gradient");
            assert_product(&name, part(&dx), part(&g), w.transpose(), slack(dtype));
        }
        // The deltas are f32's in any case: only what the base adds may differ.
        let f32_weight = in_f32(weight.clone());
        let factors = |x: &[Tensor<2>]| {
            (
                x[1].clone().reshape([experts, rank, input]),
                x[2].clone().reshape([experts, out, rank]),
            )
        };
        if dtype != FloatDType::F32 && slack(dtype) > 1e-5 {
            continue;
        }
        compare(
            &format!("expert_lora_linear {dtype:?}"),
            &[
                x,
                random([experts * rank, input]),
                random([experts * out, rank]),
            ],
            |x| {
                let rows = Arc::clone(&offsets);
                expert_lora_linear(x[0].clone(), weight.clone(), factors(x), 0.7, rows)
            },
            |x| {
                let low = expert_linear::reference(x[0].clone(), factors(x).0, &offsets);
                let delta = expert_linear::reference(low, factors(x).1, &offsets);
                let base = expert_linear::reference(x[0].clone(), f32_weight.clone(), &offsets);
                base + delta * 0.7
            },
        );
    }
}

/// Checks `got [m, n] = x [m, k] (w + s b a)ᵀ` within `slack · Σ |x| (|w| + s |b| |a|)`.
fn assert_adapted(
    name: &str,
    got: Tensor<2>,
    x: &Tensor<2>,
    [w, a, b]: [&Tensor<2>; 3],
    scaling: f64,
    slack: f64,
) {
    let ([m, k], [n, rank]) = (x.dims(), b.dims());
    let (got, x, w, a, b) = (
        values(got),
        values(x.clone()),
        values(w.clone()),
        values(a.clone()),
        values(b.clone()),
    );
    let both = |j: usize, t: usize| {
        let delta = (0..rank).map(|r| b[j * rank + r] * a[r * k + t]);
        let size = delta.clone().map(f64::abs).sum::<f64>();
        let (sum, w) = (delta.sum::<f64>(), w[j * k + t]);
        (w + scaling * sum, w.abs() + scaling * size)
    };
    let wanted: Vec<_> = (0..n)
        .map(|j| (0..k).map(|t| both(j, t)).collect::<Vec<_>>())
        .collect();
    for i in 0..m {
        for (j, row) in wanted.iter().enumerate() {
            let terms = x[i * k..][..k].iter().zip(row);
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), (x, (value, bound))| {
                (sum + x * value, size + x.abs() * bound)
            });
            let off = (got[i * n + j] - sum).abs();
            assert!(
                off <= slack * size,
                "{name}, element ({i}, {j}): off by {off}, allowed {}",
                slack * size
            );
        }
    }
}

#[test]
fn deltas_are_added_to_bf16_in_f32() {
    device();
    // Few rows and as many as are taken through a chain of products; one group of terms and two.
    for (n, input, out, rank) in [
        (1, 1, 1, 1),
        (37, 64, 50, 8),
        (130, 33, 47, 3),
        (1100, 70, 37, 16),
        (1031, 31, 65, 1),
        (9, 4200, 40, 5),
    ] {
        let weight = random::<2>([out, input]).cast(FloatDType::BF16);
        let (a, b) = (random::<2>([rank, input]), random::<2>([out, rank]));
        let (x, g) = (random::<2>([n, input]), random::<2>([n, out]));
        let small = |x: &Tensor<2>| (x.clone() * 3.0).round();
        // What bf16 holds exactly loses nothing when it is rounded: then all of it is f32's.
        for (x, g, slack, kind) in [
            (x.clone(), g.clone(), slack(FloatDType::BF16), "any"),
            (small(&x), small(&g), 2f64.powi(-19), "exact in bf16"),
        ] {
            let name = format!("{kind} {n}x{input}x{out}, rank {rank}");
            let (y, dx) = with_gradient(&x, &g, |x| {
                lora_linear(x, weight.clone(), a.clone(), b.clone(), 0.7)
            });
            assert_adapted(&name, y, &x, [&weight, &a, &b], 0.7, slack);
            let [weight, a, b] = [&weight, &a, &b].map(|x| x.clone().transpose());
            let name = format!("{name}, gradient");
            assert_adapted(&name, dx, &g, [&weight, &b, &a], 0.7, slack);
        }
    }
}

#[test]
fn cross_entropy_reads_16_bits() {
    device();
    let (n, d, v) = (70, 24, 301);
    let targets: Arc<[i32]> = (0..n as i32).map(|i| (i * 37) % v as i32).collect();
    for dtype in DTYPES {
        let weight = (random::<2>([v, d]) * 0.3).cast(dtype);
        let hidden = random([n, d]);
        let head = |weight| Head {
            weight,
            delta: None,
            bias: None,
            shape: PLAIN,
        };
        let upstream = random([1, 1]);
        let (loss, grad) = with_gradient(&hidden, &upstream, |hidden| {
            linear_cross_entropy(hidden, head(weight.clone()), targets.clone()).reshape([1, 1])
        });
        let f32_weight = in_f32(weight.clone());
        let (want, want_grad) = with_gradient(&hidden, &upstream, |hidden| {
            cross_entropy::reference(hidden, head(f32_weight.clone()), &targets).reshape([1, 1])
        });
        // A logit is off by u Σ |h| |w|, about u · 24 · 0.8 · 0.24 < 5 u; a row's loss by twice that,
        // and mostly by far less. Probabilities are off by as much of themselves, and rounded once more.
        let u = slack(dtype) as f32;
        let off = (loss - want).abs().max().into_scalar::<f32>();
        assert!(off <= 10.0 * u * n as f32, "{dtype:?}: loss off by {off}");
        let size = want_grad.clone().abs().max().into_scalar::<f32>();
        let off = (grad - want_grad).abs().max().into_scalar::<f32>();
        assert!(
            off <= 12.0 * u * size,
            "{dtype:?}: gradient off by {off} of {size}"
        );
    }
}
