//! `lorafit combine`: several adapters become one, without their base.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::json;

use super::args::Output;
use super::merge_args::CombineArgs;
use super::render::Renderer;
use crate::adapter::combine::{Weighted, combine};
use crate::adapter::config::AdapterConfig;
use crate::adapter::peft::read_adapter;
use crate::adapter::target::Matcher;
use crate::export::peft::{ModelCard, write_adapter};
use crate::export::sidecar::{copy_tokenizer, has_tokenizer};

/// Reads, adds, writes.
///
/// # Errors
/// An adapter cannot be read, they have no sum, or the disk fails.
pub fn run(args: &CombineArgs, output: &Output) -> anyhow::Result<()> {
    let mut renderer = Renderer::new(*output);
    let combination = args.combination.combination(|| widest(&args.adapter))?;
    let mut adapters = Vec::new();
    for (dir, weight) in &args.adapter {
        let (config, weights) = read_adapter(dir)?;
        adapters.push(Weighted {
            dir: dir.clone(),
            weight: *weight,
            config,
            weights,
        });
    }
    let (config, weights) = combine(&adapters, combination)?;
    let with_tokenizer = adapters.iter().find(|adapter| has_tokenizer(&adapter.dir));
    let save_tokenizer = |to: &Path| match with_tokenizer {
        Some(adapter) => copy_tokenizer(&adapter.dir, to)
            .map(|_| ())
            .map_err(Into::into),
        None => Ok(()),
    };
    let card = ModelCard::default();
    write_adapter(&args.out, &config, &weights, save_tokenizer, &card)?;
    let (modules, rank) = (weights.modules(), config.targeting.rank);
    let event = json!({
        "event": "combined",
        "output": args.out,
        "adapters": args.adapter.len(),
        "modules": modules,
        "rank": rank,
    });
    let line = format!(
        "{} adapters into {}: rank {rank} on {modules} modules",
        args.adapter.len(),
        args.out.display()
    );
    renderer.result(&event, &[("combined", line)]);
    Ok(())
}

/// The largest rank that any module of the adapters has.
pub(super) fn widest(adapters: &[(PathBuf, f64)]) -> anyhow::Result<usize> {
    let mut widest = 1;
    for (dir, _) in adapters {
        let config = AdapterConfig::load(dir)?;
        Matcher::new(&config.targeting).with_context(|| dir.display().to_string())?;
        let ranks = config.targeting.rank_pattern.iter().map(|(_, rank)| *rank);
        widest = ranks
            .chain([config.targeting.rank, widest])
            .max()
            .unwrap_or(widest);
    }
    Ok(widest)
}
