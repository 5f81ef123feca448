//! `lorafit check`: everything that can be known without training.

use std::path::Path;

use serde::Serialize;

use super::Usage;
use super::args::{CheckArgs, Output};
use super::print::print;
use super::render::{Renderer, count};
use super::warnings::{self, Warning};
use super::{fits, servers};
use crate::adapter::outline::Outline;
use crate::data::contract::Contract;
use crate::data::{DataReport, feed};
use crate::device;
use crate::export::write::is_taken;
use crate::model::weights;
use crate::recipe::{AdapterMethod, Packing, Plan, load};
use crate::train::prepare::{self, AdapterChoice, PrepareError, Prepared};

/// Checks recipe, base model, data, adapters, device and run directory.
///
/// # Errors
/// All faults at once.
pub fn run(args: &CheckArgs, output: &Output) -> anyhow::Result<()> {
    let mut renderer = Renderer::new(*output);
    let device = device::open(args.recipe.device).map_err(|error| Usage(error.to_string()))?;
    let plan = plan(&args.recipe.recipe, &args.recipe.set)?;
    let prepared = prepared(plan, &mut renderer)?;
    summary(&prepared, &device, &mut renderer);
    fits::check(&prepared, &device, args.memory.vram, &mut renderer)?;
    servers::show(&prepared, &mut renderer);
    if is_taken(&prepared.plan.output_dir) {
        let output_dir = prepared.plan.output_dir.clone();
        renderer.warn(&Warning::OutputTaken { output_dir });
    }
    ok(&args.recipe.recipe, output)
}

/// Says that nothing is wrong.
pub(super) fn ok(recipe: &Path, output: &Output) -> anyhow::Result<()> {
    if output.json {
        print(&format!("{}\n", serde_json::json!({"event": "ok"})))
    } else {
        print(&format!("ok: {} can be trained\n", recipe.display()))
    }
}

/// Loads a recipe.
pub(super) fn plan(recipe: &Path, sets: &[String]) -> anyhow::Result<Plan> {
    load::load(recipe, sets).map_err(|faults| Usage(faults.to_string()).into())
}

/// Prepares what a plan names.
pub(super) fn prepared(plan: Plan, renderer: &mut Renderer) -> anyhow::Result<Prepared> {
    let prepared = prepare::prepare(plan, &mut |progress| renderer.loading(&progress));
    renderer.finish_bar();
    prepared.map_err(|error| match error {
        PrepareError::Base(error) if error.may_pass() => error.into(),
        error => Usage(error.to_string()).into(),
    })
}

/// What will be trained.
#[derive(Serialize)]
struct Summary<'a> {
    event: &'static str,
    base: Base<'a>,
    data: &'a DataReport,
    /// Share of the training tokens that train, in `[0, 1]`.
    trained_share: f64,
    rows: Rows,
    /// What the mask contract means here.
    contract: String,
    method: AdapterMethod,
    /// Linear layers that carry an adapter; 0 with `adapter.method: full`.
    adapters: usize,
    trainable_parameters: usize,
    steps: usize,
    steps_per_epoch: usize,
    epochs: f64,
    device: String,
    output_dir: &'a Path,
}

/// The rows of an epoch.
#[derive(Serialize)]
struct Rows {
    packing: Packing,
    /// Rows; 0 where the data are streamed, as for all that follows.
    count: usize,
    /// Share of the tokens of `max_seq_len` that packed rows fill, in `[0, 1]`.
    fill: f64,
    /// Share of padding in the micro-batches, in `[0, 1]`.
    padding: f64,
}

#[derive(Serialize)]
struct Base<'a> {
    path: &'a Path,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    positions: usize,
    parameters: usize,
}

/// Shows what will be trained, and what to know about it.
pub(super) fn summary(prepared: &Prepared, device: &device::Available, renderer: &mut Renderer) {
    let summary = summarise(prepared, format!("{} ({})", device.spec, device.name));
    let event = serde_json::to_value(&summary).unwrap_or_default();
    renderer.facts(&event, &lines(&summary));
    for warning in warnings::of_run(prepared) {
        renderer.warn(&warning);
    }
}

fn summarise(prepared: &Prepared, device: String) -> Summary<'_> {
    let (plan, config, data) = (&prepared.plan, &prepared.config, &prepared.dataset.report);
    let loader = feed::loader(plan, &prepared.dataset.train);
    let steps = loader.total_steps(plan);
    let steps_per_epoch = loader.steps_per_epoch();
    let epoch = loader.epoch(0);
    let contract = Contract::new(&prepared.tokenizer, &plan.data.waive);
    let tensors = weights::expected_tensors(config);
    let parameters = tensors
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>());
    let parameters = parameters.sum();
    Summary {
        event: "plan",
        base: Base {
            path: &prepared.base,
            layers: config.num_hidden_layers,
            hidden_size: config.hidden_size,
            vocab_size: prepared.vocab_size(),
            positions: config.max_position_embeddings,
            parameters,
        },
        data,
        trained_share: data.trained_tokens as f64 / data.tokens.max(1) as f64,
        rows: Rows {
            packing: plan.data.packing,
            count: epoch.rows.len(),
            fill: epoch.fill(plan.data.max_seq_len),
            padding: epoch.padding(),
        },
        contract: contract.describe(&prepared.tokenizer),
        method: plan.adapter.method,
        adapters: prepared.adapter.as_ref().map_or(0, |a| a.modules.len()),
        trainable_parameters: adapter_parameters(prepared).unwrap_or(parameters),
        steps,
        steps_per_epoch,
        epochs: match steps_per_epoch {
            0 => 0.0,
            steps_per_epoch => steps as f64 / steps_per_epoch as f64,
        },
        device,
        output_dir: &plan.output_dir,
    }
}

/// Numbers that train beside a frozen base; `None` where all weights train.
fn adapter_parameters(prepared: &Prepared) -> Option<usize> {
    let AdapterChoice {
        modules, config, ..
    } = prepared.adapter.as_ref()?;
    Some(Outline::new(&prepared.config, config, modules).trained_numbers())
}

fn lines(summary: &Summary) -> Vec<(&'static str, String)> {
    let (base, data) = (&summary.base, summary.data);
    let format = data.format.name();
    let trained = count(summary.trainable_parameters);
    let base_line = format!(
        "{}, {} parameters, {} layers, hidden size {}",
        base.path.display(),
        count(base.parameters),
        base.layers,
        base.hidden_size
    );
    let cached = if data.cached {
        ", tokenised before"
    } else {
        ""
    };
    let data_line = if data.streaming {
        format!(
            "streamed; of the first {} rows ({format}) {} train; {} validation",
            data.rows, data.train_samples, data.validation_samples
        )
    } else {
        format!(
            "{} rows ({format}): {} train, {} validation{cached}",
            data.rows, data.train_samples, data.validation_samples
        )
    };
    let tokens_line = format!(
        "{} in {}, {} of them train ({:.0} %); longest row {}",
        data.tokens,
        if data.streaming { "those" } else { "an epoch" },
        data.trained_tokens,
        100.0 * summary.trained_share,
        data.longest
    );
    let trains_line = match summary.method {
        AdapterMethod::Lora | AdapterMethod::Vera => {
            format!("{trained} parameters in {} adapters", summary.adapters)
        }
        AdapterMethod::Full => format!("all {trained} parameters"),
    };
    let steps_line = match summary.steps_per_epoch {
        0 => format!("{}", summary.steps),
        steps_per_epoch => format!(
            "{}, {steps_per_epoch} an epoch: {:.2} epochs",
            summary.steps, summary.epochs
        ),
    };
    let rows = &summary.rows;
    let rows_line = match rows.packing {
        _ if data.streaming => None,
        Packing::Off => Some(format!(
            "one sample each; {:.1} % of a micro-batch is padding",
            100.0 * rows.padding
        )),
        Packing::On | Packing::Wrap => Some(format!(
            "{} packed, {:.1} % full; {:.1} % of a micro-batch is padding",
            rows.count,
            100.0 * rows.fill,
            100.0 * rows.padding
        )),
    };
    let mut lines = vec![
        ("base", base_line),
        ("data", data_line),
        ("tokens", tokens_line),
    ];
    lines.extend(rows_line.map(|line| ("rows", line)));
    lines.extend([
        ("mask", summary.contract.clone()),
        ("trains", trains_line),
        ("steps", steps_line),
        ("device", summary.device.clone()),
        ("output", summary.output_dir.display().to_string()),
    ]);
    lines
}
