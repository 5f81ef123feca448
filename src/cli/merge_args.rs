//! What can be typed behind `merge` and `combine`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::Usage;
use super::args::{default_of, parse_bytes, value_of};
use super::words::BasePrecision;
use crate::adapter::combine::Combination;
use crate::export::model::SaveDtype;
use crate::recipe::Quantization;

/// `lorafit merge`
#[derive(Debug, Clone, Args)]
#[command(
    override_usage = "lorafit merge [OPTIONS] <RUN_DIR>\n       \
        lorafit merge [OPTIONS] --base <MODEL> --adapter <DIR> --out <DIR>",
    after_help = "Example:\n  lorafit merge runs/recipe\n  \
        lorafit merge --base HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/recipe/adapter --out merged"
)]
pub struct MergeArgs {
    /// A run directory, which knows its base and its adapter
    #[arg(value_name = "RUN_DIR", conflicts_with_all = ["base", "adapter"])]
    pub run_dir: Option<PathBuf>,
    /// The base model: directory, .gguf file or Hugging Face id
    #[arg(
        long,
        value_name = "MODEL",
        required_unless_present = "run_dir",
        requires = "adapter"
    )]
    pub base: Option<String>,
    /// Branch, tag or commit of a Hugging Face id
    #[arg(long, default_value = default_of("base.revision"), conflicts_with = "run_dir")]
    pub revision: String,
    /// An adapter in PEFT's layout, and what its deltas are multiplied by. May be repeated
    #[arg(
        long,
        value_name = "DIR[=WEIGHT]",
        value_parser = parse_weighted,
        required_unless_present = "run_dir",
        requires = "base"
    )]
    pub adapter: Vec<(PathBuf, f64)>,
    /// How several adapters become one
    #[command(flatten)]
    pub combination: CombinationArgs,
    /// Take the adapters out of a model that they were merged into
    #[arg(long)]
    pub subtract: bool,
    /// Merge into another base than the adapter was trained on, or a second time
    #[arg(long)]
    pub force: bool,
    /// Where the merged model goes [default: RUN_DIR/merged]
    #[arg(long, value_name = "DIR", required_unless_present = "run_dir")]
    pub out: Option<PathBuf>,
    /// How the base was quantised in training; a run directory knows
    #[arg(
        long,
        value_name = "HOW",
        default_value = default_of("base.quantization"),
        value_parser = value_of::<Quantization>("base.quantization"),
        conflicts_with = "run_dir"
    )]
    pub quantization: Quantization,
    /// What the adapter is merged into where the base was quantised; the error of each is told
    #[arg(long, default_value = "original")]
    pub base_precision: BasePrecision,
    /// Number format of the merged weights [default: that of the base]
    #[arg(long)]
    pub dtype: Option<SaveDtype>,
    /// Largest weight file: bytes, or with a unit such as 500MB, 5GB, 1GiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_bytes)]
    pub shard_size: u64,
    /// Do not compare the merged model with base and adapter
    #[arg(long)]
    pub no_verify: bool,
}

/// How several adapters become one.
#[derive(Debug, Clone, Args)]
pub struct CombinationArgs {
    /// How adapters are added
    #[arg(long, value_enum, default_value = "cat")]
    pub combination: CombinationKind,
    /// Rank of the sum, for `svd` [default: the largest of the adapters]
    #[arg(long, value_name = "RANK", value_parser = clap::value_parser!(u16).range(1..))]
    pub rank: Option<u16>,
}

/// Names of [`Combination`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CombinationKind {
    /// The exact sum, whose rank is that of all together
    Cat,
    /// PEFT's `linear`: sums of A and of B, of equal rank; not the sum of the deltas
    Linear,
    /// The nearest to the sum of a lower rank
    Svd,
}

/// `lorafit combine`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  lorafit combine --adapter style=0.7 --adapter facts=0.5 --combination svd --rank 16 --out both"
)]
pub struct CombineArgs {
    /// An adapter in PEFT's layout, and what its deltas are multiplied by. May be repeated
    #[arg(long, value_name = "DIR[=WEIGHT]", value_parser = parse_weighted, required = true)]
    pub adapter: Vec<(PathBuf, f64)>,
    /// How they become one
    #[command(flatten)]
    pub combination: CombinationArgs,
    /// The new adapter's directory
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// A path and a weight behind the last `=`, 1 where none stands there.
fn parse_weighted(text: &str) -> Result<(PathBuf, f64), String> {
    let whole = Path::new(text);
    match text.rsplit_once('=') {
        Some((path, weight)) if !whole.exists() => match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() && !path.is_empty() => Ok((path.into(), weight)),
            _ => Err(format!(
                "expected DIR or DIR=WEIGHT, found weight {weight:?}"
            )),
        },
        _ => Ok((whole.into(), 1.0)),
    }
}

impl CombinationArgs {
    /// What was asked for; `svd` has the rank of the widest adapter, which `widest` finds out.
    ///
    /// # Errors
    /// A rank for a combination that has none, or the adapters cannot be read.
    pub fn combination(
        &self,
        widest: impl FnOnce() -> anyhow::Result<usize>,
    ) -> anyhow::Result<Combination> {
        Ok(match (self.combination, self.rank) {
            (CombinationKind::Svd, Some(rank)) => Combination::Svd { rank: rank.into() },
            (CombinationKind::Svd, None) => Combination::Svd { rank: widest()? },
            (_, Some(_)) => {
                let text = "--rank: only --combination svd has a rank of its own; the others' follows from \
                            the adapters";
                return Err(Usage(text.to_owned()).into());
            }
            (CombinationKind::Cat, None) => Combination::Cat,
            (CombinationKind::Linear, None) => Combination::Linear,
        })
    }
}
