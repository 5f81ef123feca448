//! `lorafit check`: everything that can be known without training.

use std::path::Path;

use super::Usage;
use super::args::{CheckArgs, Output};
use super::render::Renderer;
use crate::device;
use crate::recipe::{Plan, load};
use crate::train::prepare::{self, Prepared};
use crate::train::trainer;

/// Checks recipe, base model, data, adapters and device.
///
/// # Errors
/// All faults at once.
pub fn run(args: &CheckArgs, output: &Output) -> anyhow::Result<()> {
    let mut renderer = Renderer::new(*output);
    device::open(args.recipe.device).map_err(|error| Usage(error.to_string()))?;
    let prepared = prepared(&args.recipe.recipe, &args.recipe.set, &mut renderer)?;
    summary(&prepared, &mut renderer);
    Ok(())
}

/// Loads a recipe and prepares what it names.
pub(super) fn prepared(
    recipe: &Path,
    sets: &[String],
    renderer: &mut Renderer,
) -> anyhow::Result<Prepared> {
    let plan: Plan = load::load(recipe, sets).map_err(|faults| Usage(faults.to_string()))?;
    let prepared = prepare::prepare(plan, &mut |progress| renderer.download(&progress));
    Ok(prepared.map_err(|error| Usage(error.to_string()))?)
}

/// What will be trained, in a few lines.
pub(super) fn summary(prepared: &Prepared, renderer: &mut Renderer) {
    let report = &prepared.dataset.report;
    let loader = trainer::loader(&prepared.plan, prepared.dataset.train.len());
    let steps = trainer::total_steps(&prepared.plan, &loader);
    renderer.facts(&[
        (
            "base",
            format!(
                "{} ({} layers, hidden {})",
                prepared.base.display(),
                prepared.config.num_hidden_layers,
                prepared.config.hidden_size
            ),
        ),
        (
            "data",
            format!(
                "{} rows ({}), {} train, {} validation",
                report.rows,
                format!("{:?}", report.format).to_lowercase(),
                report.train_samples,
                report.validation_samples
            ),
        ),
        (
            "tokens",
            format!(
                "{} ({} train), longest sample {}, {} truncated, {} dropped",
                report.tokens,
                report.trained_tokens,
                report.longest,
                report.truncated,
                report.dropped
            ),
        ),
        (
            "adapters",
            match &prepared.adapter {
                Some(choice) => format!("{} modules", choice.modules.len()),
                None => "none, all weights train".to_string(),
            },
        ),
        (
            "steps",
            format!("{steps} ({} an epoch)", loader.steps_per_epoch()),
        ),
        ("output", prepared.plan.output_dir.display().to_string()),
    ]);
}
