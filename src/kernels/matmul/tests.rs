use super::*;

/// Each unit that the processor has, used here or not, against sums in f64.
#[test]
fn units_multiply() {
    for [m, n, k] in [[1, 1, 1], [33, 70, 45], [600, 49, 700], [40, 800, 4200]] {
        let value = |i: usize| (i * 7919 % 257) as f32 / 64.0 - 2.0;
        let x: Vec<f32> = (0..m * k).map(value).collect();
        let matrix: Vec<bf16> = (0..n * k).map(|i| bf16::from_f32(value(3 * i))).collect();
        for side in [Side::Transposed, Side::Plain] {
            for store in [Store::Set, Store::Add] {
                let shape = ([m, n, k], side, store);
                if has_vector_bf16() {
                    check::<PairFma>(&x, &matrix, shape);
                }
                if has_vector_bf16() && amx::is_available() {
                    check::<Amx>(&x, &matrix, shape);
                }
            }
        }
    }
    if !has_vector_bf16() {
        eprintln!("skipped: this processor has no products in bf16");
    }
}

fn check<U: Unit>(x: &[f32], matrix: &[bf16], ([m, n, k], side, store): ([usize; 3], Side, Store)) {
    let stride = n + 3;
    let mut dst = vec![1f32; m * stride];
    let product = Product {
        dst: Rows::to_write(&mut dst, [m, n], stride),
        store,
        terms: vec![Term {
            x: Rows::new(x, [m, k], k),
            matrix,
        }],
        side,
    };
    // SAFETY: the caller found the unit; there is but one product.
    unsafe { chain_with::<U>(&[product], |_, _| ()) };
    let step = (m * n / 2000).max(1);
    for at in (0..m * n).step_by(step) {
        let (i, j) = (at / n, at % n);
        let terms = (0..k).map(|t| {
            let w = match side {
                Side::Transposed => matrix[j * k + t],
                Side::Plain => matrix[t * n + j],
            };
            f64::from(bf16::from_f32(x[i * k + t])) * f64::from(w)
        });
        let size: f64 = terms.clone().map(f64::abs).sum();
        let start = if store == Store::Add { 1.0 } else { 0.0 };
        let off = (f64::from(dst[i * stride + j]) - terms.sum::<f64>() - start).abs();
        assert!(
            off <= 1e-6 * (size + 1.0),
            "[{m}, {n}, {k}] {side:?}, ({i}, {j}): off by {off}"
        );
    }
    // What lies between rows is not touched.
    let between = dst.chunks(stride).flat_map(|row| &row[n..]);
    assert!(between.into_iter().all(|&value| value == 1.0));
}
