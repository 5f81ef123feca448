//! NF4 and double quantisation give the reference's codes, scales and values.

use std::path::Path;

use lorafit::quant::absmax::{self, Absmax};
use lorafit::quant::nf4::{self, Nf4};
use safetensors::SafeTensors;

use crate::reference::{Case, Figures, Tensors, reference, run_all};

/// The bits of an f32 tensor, or a byte each of a u8 one.
fn bits(file: &SafeTensors, name: &str) -> Vec<u32> {
    let view = file.tensor(name).expect(name);
    match view.dtype() {
        safetensors::Dtype::U8 => view.data().iter().map(|b| u32::from(*b)).collect(),
        _ => (view.data().as_chunks::<4>().0.iter())
            .map(|b| u32::from_le_bytes(*b))
            .collect(),
    }
}

fn float_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn byte_bits(bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|b| u32::from(*b)).collect()
}

fn dequantised(q: &Nf4) -> Vec<f32> {
    let mut out = vec![f32::NAN; q.len()];
    q.dequantise(0, &mut out);
    out
}

/// How many elements differ in any bit; the sign of a zero is no difference.
fn differing(got: &[u32], want: &[u32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let zero = |x: &u32| x << 1 == 0;
    let differ = |(a, b): &(&u32, &u32)| a != b && !(zero(a) && zero(b));
    got.iter().zip(want).filter(differ).count() as f64
}

fn nf4_case(case: &Path) -> Case {
    let tensors = Tensors::open(case);
    let file = tensors.file();
    let weight: Vec<f32> = bits(&file, "weight")
        .into_iter()
        .map(f32::from_bits)
        .collect();
    let plain = Nf4::quantise(&weight).expect("finite weights");
    let double = plain.clone().with_quantised_absmax();
    let mut figures = Figures::default();
    let mut check = |name: &'static str, got: Vec<u32>| {
        figures.check(name, name, differing(&got, &bits(&file, name)), 0.0);
    };
    check("nf4_codebook", float_bits(&nf4::CODEBOOK));
    check("dynamic_codebook", float_bits(&absmax::CODEBOOK));
    check("packed", byte_bits(plain.packed()));
    check("dequantised", float_bits(&dequantised(&plain)));
    check("double_dequantised", float_bits(&dequantised(&double)));
    let Absmax::Plain(scales) = plain.absmax() else {
        panic!("not quantised yet")
    };
    check("absmax", float_bits(scales));
    let Absmax::Double(quantised) = double.absmax() else {
        panic!("quantised")
    };
    check("absmax_scale", float_bits(&quantised.scales));
    check("absmax_offset", float_bits(&[quantised.offset]));
    let each: Vec<f32> = (0..scales.len()).map(|i| double.absmax().get(i)).collect();
    check("absmax_dequantised", float_bits(&each));
    // Where the scale is 0 the codes mean nothing.
    if quantised.scales.iter().all(|scale| *scale != 0.0) {
        check("absmax_codes", byte_bits(&quantised.codes));
    }
    figures.verdict()
}

#[test]
fn nf4_equals_bitsandbytes() {
    run_all(&reference().join("quant/nf4"), nf4_case);
}
