//! `lorafit merge`: base + adapter become one model, read back and compared.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::args::Output;
use super::combine::widest;
use super::merge_args::MergeArgs;
use super::render::{Renderer, bytes};
use super::warnings::Warning;
use super::words::BasePrecision;
use super::{Exit, Usage, interrupt};
use crate::device::{self, DeviceKind, DeviceSpec};
use crate::export::merged::{self, MergeJob, MergeReport, Rounding};
use crate::export::verify::{self, Comparison, Distance, Merged};
use crate::export::write;
use crate::hub;
use crate::model::weights::{Weights, WeightsError};
use crate::recipe::{AdapterMethod, Quantization};
use crate::train::run_dir::{self, RunDir};

/// Where merged models are compared: they need to fit in main memory only.
const CPU: DeviceSpec = DeviceSpec {
    kind: DeviceKind::Cpu,
    index: None,
};

/// What to merge and where to.
struct Request {
    base: String,
    revision: String,
    adapters: Vec<(PathBuf, f64)>,
    /// How the base was quantised in training.
    quantization: Quantization,
    out: PathBuf,
}

/// Merges, verifies, publishes.
///
/// # Errors
/// An input cannot be used, the disk fails, or the merged model is not base + adapter.
pub fn run(args: &MergeArgs, output: &Output) -> anyhow::Result<Exit> {
    let mut renderer = Renderer::new(*output);
    let request = request(args)?;
    let base = hub::locate(&request.base, &request.revision, &mut |p| {
        renderer.download(&p)
    })?;
    renderer.finish_bar();
    if request.quantization == Quantization::Gguf && Weights::open(&base)?.gguf().is_none() {
        let path = base.clone();
        return Err(Usage(WeightsError::NotGguf { path }.to_string()).into());
    }
    let trained_on = request.quantization.scheme();
    let into = trained_on.filter(|_| args.base_precision == BasePrecision::Quantized);
    let job = MergeJob {
        base: &base,
        adapters: request.adapters.clone(),
        combination: args.combination.combination(|| widest(&request.adapters))?,
        subtract: args.subtract,
        force: args.force,
        quantised: into,
        out: &request.out,
        dtype: args.dtype,
        shard_size: args.shard_size,
    };
    // A kill leaves a directory beside `out` that the next merge removes.
    let parent = request.out.parent().unwrap_or(Path::new(""));
    write::clean_up(if parent == Path::new("") {
        Path::new(".")
    } else {
        parent
    })?;
    interrupt::listen(output, "stopping once the weights are written")?;
    let prepared = merged::prepare(&job, &mut |p| renderer.merging(&p))?;
    renderer.finish_bar();
    let comparison = match args.no_verify || interrupt::asked() {
        true => None,
        false => {
            renderer.note("comparing the merged model with base + adapter");
            let device = device::open(CPU)?.device;
            let merged = Merged {
                base: &base,
                adapter: prepared.adapter(),
                merged: prepared.path(),
                trained_on,
                into,
            };
            Some(verify::verify(&merged, &device)?)
        }
    };
    if interrupt::asked() {
        renderer.note("interrupted; nothing was written");
        return Ok(Exit::Interrupted);
    }
    let report = prepared.publish()?;
    show(&report, comparison.as_ref(), &request, &mut renderer);
    Ok(Exit::Done)
}

/// Shows what was written and how well it compares.
fn show(
    report: &MergeReport,
    verified: Option<&Comparison>,
    request: &Request,
    renderer: &mut Renderer,
) {
    let out = &request.out;
    if !report.unchanged.is_empty() {
        renderer.warn(&Warning::LostInRounding {
            unchanged: report.unchanged.clone(),
            modules: report.modules.len(),
        });
    }
    let written = &report.written;
    let event = json!({
        "event": "merged",
        "output": out,
        "modules": report.modules.len(),
        "unchanged_modules": report.unchanged,
        "tensors": written.tensors,
        "bytes": written.bytes,
        "files": written.shards,
        "delta_norm": report.delta_norm,
        "max_abs_delta": report.max_abs_delta,
        "rounding": report.rounding,
        "verified": verified,
    });
    let from_trained = verified.and_then(|c| c.from_trained).map(|from| {
        let told =
            |d: Distance| format!("KL {:.2e} nats ({:.2e} in a logit)", d.kl, d.max_difference);
        format!(
            "the original base is off by {}; the quantized one by {}",
            told(from.original),
            told(from.quantized)
        )
    });
    let verified = match verified {
        Some(c) => format!(
            "against base + adapter on {} tokens: largest logit difference {:.2e}, KL {:.2e} nats (base alone {:.2e})",
            c.positions, c.max_difference, c.kl, c.kl_of_base
        ),
        None => "no (--no-verify)".to_string(),
    };
    let mut lines = vec![
        (
            "merged",
            format!("{} modules into {}", report.modules.len(), out.display()),
        ),
        (
            "written",
            format!(
                "{} tensors, {} in {} file(s)",
                written.tensors,
                bytes(written.bytes),
                written.shards
            ),
        ),
        (
            "delta",
            format!(
                "norm {:.4}, largest element {:.3e}",
                report.delta_norm, report.max_abs_delta
            ),
        ),
        ("rounding", rounding(report)),
        ("verified", verified),
    ];
    if let Some(from_trained) = from_trained {
        lines.push(("as trained", from_trained));
    }
    if request.quantization == Quantization::Gguf {
        let text = "the weights of the base's GGUF blocks, of which --base-precision original and quantized are the same";
        lines.push(("as trained", text.to_owned()));
    }
    renderer.result(&event, &lines);
}

/// What the written number format lost of the merged weights.
fn rounding(report: &MergeReport) -> String {
    let Rounding { max_abs, norm } = report.rounding;
    match norm == 0.0 {
        true => "nothing lost".to_string(),
        false => format!(
            "norm {norm:.4}, {:.1} % of the delta's; largest element {max_abs:.3e}",
            100.0 * norm / report.delta_norm
        ),
    }
}

fn request(args: &MergeArgs) -> anyhow::Result<Request> {
    let usage = |text: String| anyhow::Error::from(Usage(text));
    let Some(run) = &args.run_dir else {
        let missing =
            || usage("merge needs a run directory, or --base, --adapter and --out".into());
        return Ok(Request {
            base: args.base.clone().ok_or_else(missing)?,
            revision: args.revision.clone(),
            adapters: match args.adapter.is_empty() {
                true => return Err(missing()),
                false => args.adapter.clone(),
            },
            quantization: args.quantization,
            out: args.out.clone().ok_or_else(missing)?,
        });
    };
    let plan = RunDir::recipe_of(run).map_err(|error| usage(error.to_string()))?;
    if plan.adapter.method == AdapterMethod::Full {
        return Err(usage(format!(
            "{} trained all weights, so there is nothing to merge: its model is in {}",
            run.display(),
            run.join(run_dir::MODEL).display()
        )));
    }
    let adapter = run.join(run_dir::ADAPTER);
    if !adapter.is_dir() {
        return Err(usage(format!(
            "{} has no adapter yet; finish the run with `lorafit train RECIPE --resume --out {}`",
            run.display(),
            run.display()
        )));
    }
    Ok(Request {
        base: plan.base.model,
        revision: plan.base.revision,
        adapters: vec![(adapter, 1.0)],
        quantization: plan.base.quantization,
        out: args
            .out
            .clone()
            .unwrap_or_else(|| run.join(run_dir::MERGED)),
    })
}
