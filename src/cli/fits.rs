//! Before training: whether the run fits into the device's memory, and what would make it fit.

use serde_json::json;

use super::Usage;
use super::args::TrainArgs;
use super::plan::{offers, platform, verdict};
use super::render::{Renderer, bytes};
use crate::device::Available;
use crate::memory::advice::{self, Change, Offer};
use crate::memory::{MemoryPlan, Planner, room};
use crate::recipe::load;
use crate::train::prepare::Prepared;

/// Plans a run, says so in a line, and refuses what cannot fit; gives the bytes at the peak.
///
/// # Errors
/// It does not fit and `--force` is not given.
pub fn ensure(
    run: &Prepared,
    device: &Available,
    args: &TrainArgs,
    renderer: &mut Renderer,
) -> anyhow::Result<u64> {
    let planner = Planner::of_run(run, platform(&device.device));
    let (plan, room) = shown(&planner, run, (device, args.memory.vram), renderer)?;
    let needed = plan.needed();
    match room {
        Some(room) if needed > room && !args.force => {
            let reload = |more: &[String]| {
                let mut sets = args.sets();
                sets.extend_from_slice(more);
                load::load(&args.recipe.recipe, &sets).ok()
            };
            let found = advice::offers(&planner, (&run.plan, needed), Some(room), &reload);
            let together = match found.iter().any(|offer| offer.fits == Some(true)) {
                true => None,
                false => advice::enough(&planner, &run.plan, room, &reload),
            };
            let place = device.spec.to_string();
            Err(Usage(refusal(&plan, (room, &place), &found, together)).into())
        }
        _ => Ok(needed),
    }
}

/// Says in a line whether a run fits, and refuses nothing.
///
/// # Errors
/// The plan's adapters cannot be chosen.
pub fn check(
    run: &Prepared,
    device: &Available,
    vram: Option<u64>,
    renderer: &mut Renderer,
) -> anyhow::Result<()> {
    let planner = Planner::of_run(run, platform(&device.device));
    shown(&planner, run, (device, vram), renderer)?;
    Ok(())
}

/// The plan of a run and the memory that there is, after one line about both.
fn shown(
    planner: &Planner,
    run: &Prepared,
    (device, vram): (&Available, Option<u64>),
    renderer: &mut Renderer,
) -> Result<(MemoryPlan, Option<u64>), Usage> {
    let plan = planner.plan(&run.plan).map_err(|f| Usage(f.join("\n")))?;
    let room = vram.or_else(|| room::of(&device.device));
    let peak = plan.peak();
    let event = json!({
        "event": "memory",
        "peak_phase": peak.phase,
        "planned_bytes": peak.bytes.total(),
        "host_bytes": plan.on_host,
        "available_bytes": room,
    });
    let line = verdict(&plan, room, &device.spec.to_string());
    renderer.facts(&event, &[("memory", line)]);
    Ok((plan, room))
}

/// What a run that does not fit is told.
fn refusal(
    plan: &MemoryPlan,
    (room, device): (u64, &str),
    found: &[Offer],
    together: Option<Vec<Change>>,
) -> String {
    let peak = plan.peak();
    let mut text = format!(
        "this run does not fit: its phase `{}` needs {}, and {device} has {}\n",
        peak.phase.name(),
        bytes(peak.bytes.total()),
        bytes(room)
    );
    let enough: Vec<Offer> = (found.iter())
        .filter(|offer| offer.fits == Some(true))
        .cloned()
        .collect();
    if !enough.is_empty() {
        text += &format!("each of these makes it fit:\n{}", offers(&enough));
    } else if let Some(changes) = together {
        text += &format!(
            "these together make it fit: {}\n",
            advice::arguments(&changes).join(" ")
        );
    } else {
        text +=
            "no change of its knobs makes it fit: take a smaller base model or another device\n";
    }
    text += "`lorafit plan` shows where the memory goes, and with --auto writes a recipe that fits; \
             --vram says how much there is, --force trains all the same";
    text
}
