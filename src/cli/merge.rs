//! `lorafit merge`: base + adapter become one model, read back and compared.

use std::path::{Path, PathBuf};

use super::args::{MergeArgs, MergeDtype, Output};
use super::render::{Renderer, bytes};
use super::{Usage, interrupt};
use crate::device::{self, DeviceKind, DeviceSpec};
use crate::export::merged::{self, MergeJob};
use crate::export::model::SaveDtype;
use crate::export::verify;
use crate::model::hub;
use crate::recipe::AdapterMethod;
use crate::train::run_dir::{self, RunDir};

/// What to merge and where to.
struct Request {
    base: String,
    revision: String,
    adapter: PathBuf,
    out: PathBuf,
}

/// Merges, verifies, publishes.
///
/// # Errors
/// An input cannot be used, the disk fails, or the merged model is not base + adapter.
pub fn run(args: &MergeArgs, output: &Output) -> anyhow::Result<()> {
    let mut renderer = Renderer::new(*output);
    let request = request(args)?;
    let base = hub::locate(&request.base, &request.revision, &mut |p| {
        renderer.download(&p)
    })?;
    let job = MergeJob {
        base: &base,
        adapter: &request.adapter,
        out: &request.out,
        dtype: args.dtype.map(|dtype| match dtype {
            MergeDtype::Bf16 => SaveDtype::Bf16,
            MergeDtype::F16 => SaveDtype::F16,
            MergeDtype::F32 => SaveDtype::F32,
        }),
        shard_size: args.shard_size,
    };
    // A kill leaves a directory beside `out` that the next merge removes.
    if let Some(parent) = request.out.parent() {
        crate::export::write::clean_up(if parent == Path::new("") {
            Path::new(".")
        } else {
            parent
        })?;
    }
    interrupt::listen()?;
    let prepared = merged::prepare(&job, &mut |p| renderer.merging(&p))?;
    renderer.finish_bar();
    if interrupt::asked() {
        anyhow::bail!("interrupted; nothing was written");
    }
    let comparison = if args.no_verify {
        None
    } else {
        let cpu = DeviceSpec {
            kind: DeviceKind::Cpu,
            index: None,
        };
        let device = device::open(cpu)?.device;
        Some(verify::verify(
            &base,
            &request.adapter,
            prepared.path(),
            &device,
        )?)
    };
    let report = prepared.publish()?;
    let mut facts = vec![
        (
            "merged",
            format!(
                "{} modules into {}",
                report.modules.len(),
                request.out.display()
            ),
        ),
        (
            "written",
            format!(
                "{} tensors, {} in {} file(s)",
                report.written.tensors,
                bytes(report.written.bytes),
                report.written.shards
            ),
        ),
        (
            "delta",
            format!(
                "norm {:.4}, largest element {:.3e}",
                report.delta_norm, report.max_abs_delta
            ),
        ),
    ];
    if !report.unchanged.is_empty() {
        facts.push(("lost in rounding", report.unchanged.join(", ")));
    }
    facts.push(("verified", match comparison {
        Some(c) => format!("against base + adapter on {} tokens: largest logit difference {:.2e}, KL {:.2e} nats (base alone {:.2e})",
            c.positions, c.max_difference, c.kl, c.kl_of_base),
        None => "no (--no-verify)".to_string(),
    }));
    renderer.facts(&facts);
    Ok(())
}

fn request(args: &MergeArgs) -> anyhow::Result<Request> {
    let usage = |text: String| anyhow::Error::from(Usage(text));
    let Some(run) = &args.run_dir else {
        let missing =
            || usage("merge needs a run directory, or --base, --adapter and --out".into());
        return Ok(Request {
            base: args.base.clone().ok_or_else(missing)?,
            revision: args.revision.clone(),
            adapter: args.adapter.clone().ok_or_else(missing)?,
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
        adapter,
        out: args.out.clone().unwrap_or_else(|| run.join("merged")),
    })
}
