//! `lorafit train`: from a recipe to an adapter.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::args::{Output, TrainArgs};
use super::check::{ok, plan, prepared, summary};
use super::render::Renderer;
use super::warnings::Warning;
use super::{Exit, Usage, fits, interrupt};
use crate::data::feed::Feed;
use crate::device;
use crate::model::CausalLm;
use crate::recipe::{Optimizer, Precision};
use crate::train::event::Event;
use crate::train::finish;
use crate::train::loss_scale::LossScale;
use crate::train::memory;
use crate::train::optimizer::{AdamW, AdamWConfig};
use crate::train::prepare::Prepared;
use crate::train::run_dir::{self, Existing, RunDir, RunDirError};
use crate::train::run_state::{self, Progress};
use crate::train::trainer::{Outcome, Trainer};

/// Trains, or continues a run.
///
/// # Errors
/// What went wrong; the last run state is kept.
pub fn run(args: &TrainArgs, output: &Output) -> anyhow::Result<Exit> {
    let mut renderer = Renderer::new(*output);
    let device = device::open(args.recipe.device).map_err(|error| Usage(error.to_string()))?;
    let plan = plan(&args.recipe.recipe, &args.sets())?;
    if !args.dry_run {
        // Before the data are tokenised, which may take a while; it is claimed later.
        run_dir::may_open(&plan.output_dir, existing(args)).map_err(usage)?;
    }
    let prepared = prepared(plan, &mut renderer)?;
    summary(&prepared, &device, &mut renderer);
    let planned = fits::ensure(&prepared, &device, args, &mut renderer)?;
    if args.dry_run {
        ok(&args.recipe.recipe, output)?;
        return Ok(Exit::Done);
    }
    interrupt::listen(output, "stopping after this micro-batch and saving")?;
    renderer.log_every(prepared.plan.train.logging_steps);
    let run = RunDir::open(&prepared.plan, existing(args)).map_err(usage)?;
    let states = run.states();
    let progress = progress(&prepared, &states, args.resume)?;
    let mut model = prepared
        .model(&device.device, &mut |reason| {
            renderer.warn(&Warning::QuantisedNotKept { reason });
        })
        .context("cannot load the base model")?;
    let config = AdamWConfig::from(&prepared.plan.train);
    let mut optimizer = match prepared.plan.train.optimizer {
        Optimizer::Adamw => AdamW::new(config),
        Optimizer::Adamw8bit => AdamW::in_8_bits(config),
        Optimizer::LoraFa => AdamW::lora_fa(config, &mut model),
    };
    if progress.step > 0 {
        run_state::load_weights(&states, progress.step, &mut model)?;
        run_state::load_optimizer(&states, &progress, &mut optimizer, &device.device)?;
    }
    let feed = Feed::new(
        &prepared.plan,
        &prepared.dataset,
        &prepared.tokenizer,
        prepared.vocab_size(),
        progress.cursor.clone(),
    )?;
    let mut trainer = Trainer {
        plan: &prepared.plan,
        total_steps: feed.total_steps(&prepared.plan),
        feed,
        model,
        optimizer,
        metrics: run.metrics(&progress)?,
        progress,
        validation: &prepared.dataset.validation,
        tokenizer: &prepared.tokenizer,
        device: format!("{} ({})", device.spec, device.name),
        planned: Some(planned),
        states: &states,
        interrupted: &interrupt::asked,
        report: &mut |event| renderer.event(event),
    };
    let outcome = trainer.run()?;
    let Trainer {
        mut model,
        progress,
        mut metrics,
        ..
    } = trainer;
    if outcome == Outcome::Interrupted {
        return Ok(Exit::Interrupted);
    }
    let done = Event::Done {
        step: progress.step,
        loss: progress.loss,
        best_eval_loss: progress.best.map(|best| best.loss),
        output: write_results(&prepared, &run, &mut model, &progress)?,
        memory_planned_bytes: Some(planned),
        memory_peak_bytes: memory::peak(&device.device),
    };
    metrics.write(&done)?;
    renderer.event(&done);
    Ok(Exit::Done)
}

fn existing(args: &TrainArgs) -> Existing {
    match (args.resume, args.overwrite) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Overwrite,
        _ => Existing::Refuse,
    }
}

/// A run directory that is taken, or a recipe that is not the run's, is a mistake of use.
fn usage(error: RunDirError) -> anyhow::Error {
    match error {
        RunDirError::Write(_) | RunDirError::Read { .. } => error.into(),
        _ => Usage(error.to_string()).into(),
    }
}

/// Where the run stands: at its last state when it is resumed and has one, else at the beginning.
fn progress(prepared: &Prepared, states: &Path, resume: bool) -> anyhow::Result<Progress> {
    let inputs = prepared.fingerprint();
    let last = run_state::list(states).last().copied();
    let Some(step) = last.filter(|_| resume) else {
        let in_f16 = prepared.plan.train.precision == Precision::F16;
        return Ok(Progress {
            loss_scale: in_f16.then(LossScale::default),
            ..Progress::new(inputs)
        });
    };
    let progress = run_state::progress(states, step)?;
    if progress.inputs != inputs {
        return Err(Usage(format!(
            "the data or the base model is not what the run in {} began with, so it cannot go on exactly; put them back, or start anew with --out or --overwrite",
            prepared.plan.output_dir.display()
        ))
        .into());
    }
    Ok(progress)
}

/// Writes the last weights and, where an earlier step had a lower validation loss, those too.
fn write_results(
    prepared: &Prepared,
    run: &RunDir,
    model: &mut CausalLm,
    progress: &Progress,
) -> anyhow::Result<PathBuf> {
    let (last, best) = match prepared.adapter {
        Some(_) => (run_dir::ADAPTER, run_dir::BEST_ADAPTER),
        None => (run_dir::MODEL, run_dir::BEST_MODEL),
    };
    let last = run.path().join(last);
    let metric = |name: &str, value: Option<f64>| Some((name.into(), format!("{:.4}", value?)));
    let mut metrics: Vec<(String, String)> = vec![("steps".into(), progress.step.to_string())];
    metrics.extend(metric("training loss", progress.loss));
    metrics.extend(metric(
        "lowest validation loss",
        progress.best.map(|best| best.loss),
    ));
    finish::write(prepared, model, metrics, &last).context("cannot write the result")?;
    if let Some(found) = progress
        .best
        .filter(|best| best.step != progress.step && best.step > 0)
    {
        run_state::load_weights(&run.states(), found.step, model)?;
        let mut metrics = vec![("steps".into(), found.step.to_string())];
        metrics.extend(metric("validation loss", Some(found.loss)));
        let dir = run.path().join(best);
        finish::write(prepared, model, metrics, &dir).context("cannot write the best result")?;
    }
    Ok(last)
}
