//! `lorafit plan`: how much memory a recipe needs, and what would make it fit.

use serde_json::{Value, json};

use super::Usage;
use super::args::{Output, PlanArgs};
use super::print::print;
use super::render::{Renderer, bytes};
use crate::device;
use crate::kernels::is_cpu;
use crate::memory::advice::{self, Change, Largest, Offer};
use crate::memory::{Base, Kind, MemoryPlan, Phase, Planner, Platform, room};
use crate::recipe::{Plan, load};
use crate::train::prepare;

/// Everything there is to say.
struct Planned {
    device: String,
    plan: MemoryPlan,
    room: Option<u64>,
    largest: Option<Largest>,
    offers: Vec<Offer>,
}

/// Plans, and with `--auto` writes a recipe that fits.
///
/// # Errors
/// The recipe or the base cannot be used, or nothing makes it fit.
pub fn run(args: &PlanArgs, output: &Output) -> anyhow::Result<()> {
    let mut renderer = Renderer::new(*output);
    let sets = &args.recipe.set;
    let plan = super::check::plan(&args.recipe.recipe, sets)?;
    let device = device::open(args.recipe.device).map_err(|error| Usage(error.to_string()))?;
    let path = prepare::locate(&plan, &mut |progress| renderer.loading(&progress))?;
    renderer.finish_bar();
    let base = Base::open(&path).map_err(|error| Usage(error.to_string()))?;
    let platform = platform(&device.device);
    let planner = Planner::of_base(&base, &plan, platform);
    let planned = planner.plan(&plan).map_err(|f| Usage(f.join("\n")))?;
    let room = args.memory.vram.or_else(|| room::of(&device.device));
    let reload = |more: &[String]| {
        let all: Vec<String> = sets.iter().chain(more).cloned().collect();
        load::load(&args.recipe.recipe, &all).ok()
    };
    let largest = match room {
        Some(room) => advice::largest(&planner, &plan, room).ok(),
        None => None,
    };
    let found = Planned {
        device: device.spec.to_string(),
        offers: advice::offers(&planner, (&plan, planned.needed()), room, &reload),
        plan: planned,
        room,
        largest,
    };
    if let (true, Some(out)) = (args.auto, &args.out) {
        let chosen = chosen(&planner, (&plan, &found), &reload)?;
        return super::plan_auto::write(&args.recipe, out, &chosen, output);
    }
    match output.json {
        true => print(&format!("{}\n", event(&found))),
        false => print(&text(&found, &plan)),
    }
}

/// The changes that make it fit; none where it does.
fn chosen(
    planner: &Planner,
    (plan, found): (&Plan, &Planned),
    reload: advice::Reload,
) -> anyhow::Result<Vec<Change>> {
    let Some(room) = found.room else {
        return Err(Usage(format!(
            "what {} has is not known, so that nothing can be made to fit it; give it with --vram 8GiB",
            found.device
        ))
        .into());
    };
    let none = || {
        Usage(format!(
            "no change of its knobs makes this recipe fit into {}: take a smaller base model or another device",
            bytes(room)
        ))
    };
    Ok(advice::enough(planner, plan, room, reload).ok_or_else(none)?)
}

/// What a device's kernels are like.
pub(super) fn platform(device: &burn::tensor::Device) -> Platform {
    match is_cpu(device) {
        true => Platform::cpu(),
        false => Platform::gpu(),
    }
}

/// The plan for scripts.
fn event(found: &Planned) -> Value {
    let peak = found.plan.peak();
    json!({
        "event": "memory_plan",
        "device": found.device,
        "phases": found.plan.phases,
        "peak_phase": peak.phase,
        "needed_bytes": peak.bytes.total(),
        "host_bytes": found.plan.on_host,
        "available_bytes": found.room,
        "fits": found.room.map(|room| peak.bytes.total() <= room),
        "largest": found.largest,
        "offers": found.offers,
    })
}

/// The plan for people.
fn text(found: &Planned, plan: &Plan) -> String {
    let mut text = format!("{}\n", table(&found.plan));
    text += &format!("{}\n", verdict(&found.plan, found.room, &found.device));
    if found.plan.on_host > 0 {
        text += &format!(
            "beside it, {} of the host's memory for the inputs of blocks\n",
            bytes(found.plan.on_host)
        );
    }
    if let Some(largest) = &found.largest {
        text += &format!(
            "longest context that fits: {} tokens (micro_batch_size {}); largest micro-batch: {} \
             (max_seq_len {})\n",
            largest.max_seq_len,
            plan.train.micro_batch_size,
            largest.micro_batch_size,
            plan.data.max_seq_len
        );
    }
    if !found.offers.is_empty() {
        text += &format!("\nwhat a knob buys\n{}", offers(&found.offers));
    }
    text
}

/// Phases × kinds; kinds that nothing takes are left out.
fn table(plan: &MemoryPlan) -> String {
    let used = |kind: &Kind| plan.phases.iter().any(|phase| phase.bytes[*kind] > 0);
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(used).collect();
    let peak = plan.peak();
    let mut rows = vec![vec![String::new()]];
    rows[0].extend(kinds.iter().map(|kind| kind.name().to_string()));
    rows[0].push("total".to_string());
    for found in &plan.phases {
        let mut row = vec![found.phase.name().to_string()];
        row.extend(kinds.iter().map(|kind| size(found.bytes[*kind])));
        row.push(size(found.bytes.total()));
        row.push(match found.phase {
            Phase::Merge => "`lorafit merge`, in main memory".to_string(),
            phase if phase == peak.phase => "peak".to_string(),
            _ => String::new(),
        });
        rows.push(row);
    }
    aligned(&rows, kinds.len() + 2)
}

/// Whether it fits, in a line.
pub(super) fn verdict(plan: &MemoryPlan, room: Option<u64>, device: &str) -> String {
    let peak = plan.peak();
    let (needed, phase) = (bytes(peak.bytes.total()), peak.phase.name());
    match room {
        Some(room) if peak.bytes.total() <= room => {
            format!(
                "fits: {needed} at its peak ({phase}), of {} that {device} has",
                bytes(room)
            )
        }
        Some(room) => format!(
            "does not fit: {needed} at its peak ({phase}), and {device} has {}",
            bytes(room)
        ),
        None => format!(
            "{needed} at its peak ({phase}); what {device} has is not known: give it with --vram 8GiB"
        ),
    }
}

/// Single changes, one a line.
pub(super) fn offers(offers: &[Offer]) -> String {
    let rows: Vec<Vec<String>> = (offers.iter())
        .map(|offer| {
            let fits = match offer.fits {
                Some(true) => "fits",
                Some(false) => "not enough",
                None => "",
            };
            vec![
                format!("  {}", offer.change),
                format!("-{}", size(offer.saves)),
                size(offer.needed),
                fits.to_string(),
                format!("costs {}", offer.change.price),
            ]
        })
        .collect();
    aligned(&rows, 3)
}

/// Columns: the first to the left, the next up to `numbers` to the right, the others to the left.
fn aligned(rows: &[Vec<String>], numbers: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|i| {
            rows.iter()
                .filter_map(|row| Some(row.get(i)?.chars().count()))
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells = row
            .iter()
            .enumerate()
            .map(|(i, cell)| match (1..numbers).contains(&i) {
                true => format!("{cell:>0$}", widths[i]),
                false => format!("{cell:<0$}", widths[i]),
            });
        let line = cells.collect::<Vec<_>>().join("  ");
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// `-` for nothing.
fn size(n: u64) -> String {
    match n {
        0 => "-".to_string(),
        n => bytes(n),
    }
}
