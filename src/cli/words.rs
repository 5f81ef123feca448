//! The words of options that are no knobs of a recipe.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::export::model::SaveDtype;

/// Which weights an adapter is merged into that was trained on a quantised base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BasePrecision {
    /// Those of the base's files.
    Original,
    /// Those that the quantised ones stand for.
    Quantized,
}

impl ValueEnum for BasePrecision {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Original, Self::Quantized]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Self::Original => PossibleValue::new("original")
                .help("the base's own weights, which servers put the adapter on; of a GGUF file, those that its blocks stand for"),
            Self::Quantized => PossibleValue::new("quantized")
                .help("what the quantised weights stand for, on which it was trained; with gguf, the same as original"),
        })
    }
}

impl ValueEnum for SaveDtype {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Bf16, Self::F16, Self::F32]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Self::Bf16 => PossibleValue::new("bf16").help("16 bits, the exponent of f32"),
            Self::F16 => PossibleValue::new("f16").help("16 bits, IEEE half"),
            Self::F32 => PossibleValue::new("f32").help("32 bits"),
        })
    }
}
