//! Which knobs buy how much memory: single changes, the longest context, the largest micro-batch, and the
//! changes that make a run fit.

use serde::Serialize;

use super::plan::Planner;
use crate::model::config::ModelConfig;
use crate::recipe::{GradientCheckpointing, Plan, Precision, Quantization};

/// Knobs with new values, as `--set` takes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Key and value of each knob.
    pub sets: Vec<(&'static str, String)>,
    /// What is lost by it, or paid.
    pub price: &'static str,
}

/// A change and what it buys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Offer {
    /// The change.
    pub change: Change,
    /// Bytes that the run needs with it.
    pub needed: u64,
    /// Bytes that it saves.
    pub saves: u64,
    /// Whether the run fits then; `None` where it is not known what there is.
    pub fits: Option<bool>,
}

/// A recipe with some knobs set anew; `None` where it does not hold together then.
pub type Reload<'a> = &'a dyn Fn(&[String]) -> Option<Plan>;

/// What fits into so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Largest {
    /// The longest `data.max_seq_len`, of the recipe's micro-batch; 0 where none fits.
    pub max_seq_len: usize,
    /// The largest `train.micro_batch_size`, of the recipe's context; 0 where none fits.
    pub micro_batch_size: usize,
}

impl Change {
    fn new(key: &'static str, value: impl ToString, price: &'static str) -> Self {
        Self {
            sets: vec![(key, value.to_string())],
            price,
        }
    }

    /// As arguments of `--set`.
    pub fn arguments(&self) -> Vec<String> {
        (self.sets.iter())
            .map(|(key, value)| format!("{key}={value}"))
            .collect()
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.arguments().join(" "))
    }
}

/// The single changes that a plan has left, those first that lose least: what costs only time, then bits
/// of the base, and at last what is learned and from how much.
fn changes(plan: &Plan, model: &ModelConfig, on_cpu: bool) -> Vec<Change> {
    let (train, base) = (&plan.train, &plan.base);
    let mut all = Vec::new();
    if train.gradient_checkpointing != GradientCheckpointing::Block {
        let price = "about a third more time";
        all.push(Change::new("train.gradient_checkpointing", "block", price));
    }
    if train.micro_batch_size > 1 {
        let steps = train.micro_batch_size * train.gradient_accumulation_steps;
        let mut change = Change::new("train.micro_batch_size", 1, "time; the same batch");
        let key = "train.gradient_accumulation_steps";
        change.sets.push((key, steps.to_string()));
        all.push(change);
    }
    if !on_cpu && !train.offload_activations {
        let price = "time, and memory of the host";
        let mut change = Change::new("train.offload_activations", true, price);
        if train.gradient_checkpointing == GradientCheckpointing::None {
            change
                .sets
                .push(("train.gradient_checkpointing", "block".into()));
        }
        all.push(change);
    }
    if !matches!(train.precision, Precision::Bf16 | Precision::F16) {
        let price = "bits of the frozen base";
        all.push(Change::new("train.precision", "bf16", price));
    }
    let schemes = match base.quantization {
        Quantization::None => &["int8", "nf4", "nf4-double"][..],
        Quantization::Int8 => &["nf4", "nf4-double"],
        Quantization::Nf4 => &["nf4-double"],
        Quantization::Nf4Double | Quantization::Gguf => &[],
    };
    for scheme in schemes {
        let price = match *scheme {
            "int8" => "a little of the frozen base",
            _ => "some of the frozen base (QLoRA)",
        };
        all.push(Change::new("base.quantization", scheme, price));
    }
    if plan.adapter.rank > 8 {
        let rank = plan.adapter.rank.div_ceil(2);
        all.push(Change::new(
            "adapter.rank",
            rank,
            "what an adapter can hold",
        ));
    }
    let most = plan.data.max_seq_len.min(model.max_position_embeddings);
    if most >= 256 {
        let price = "longer samples are cut";
        all.push(Change::new("data.max_seq_len", most / 2, price));
    }
    all
}

/// What each change by itself would buy; those that save nothing or do not hold are left out.
pub fn offers(
    planner: &Planner,
    (plan, needed): (&Plan, u64),
    room: Option<u64>,
    reload: Reload,
) -> Vec<Offer> {
    let changes = changes(plan, planner.config, planner.platform.on_cpu);
    changes
        .into_iter()
        .filter_map(|change| {
            let with = planner.plan(&reload(&change.arguments())?).ok()?.needed();
            (with < needed).then(|| Offer {
                change,
                needed: with,
                saves: needed - with,
                fits: room.map(|room| with <= room),
            })
        })
        .collect()
}

/// Changes that together make a run fit, taken one after the other as they are offered, and only
/// those without which it would not; `None` where none of them do.
pub fn enough(planner: &Planner, plan: &Plan, room: u64, reload: Reload) -> Option<Vec<Change>> {
    let fits = |changes: &[Change]| {
        let plan = reload(&arguments(changes))?;
        Some(planner.plan(&plan).ok()?.needed() <= room)
    };
    let mut taken: Vec<Change> = Vec::new();
    let mut current = plan.clone();
    while fits(&taken) != Some(true) {
        let (change, next) = next(planner, &current, &taken, reload)?;
        // A later value of the same knob takes the place of the earlier.
        taken.retain(|earlier| earlier.sets != change.sets && !replaces(&change, earlier));
        taken.push(change);
        current = next;
    }
    // What an earlier change bought may not be needed after a later one.
    for i in (0..taken.len()).rev() {
        let mut without = taken.clone();
        without.remove(i);
        if fits(&without) == Some(true) {
            taken = without;
        }
    }
    Some(taken)
}

/// The first change that is left and saves something.
fn next(
    planner: &Planner,
    current: &Plan,
    taken: &[Change],
    reload: Reload,
) -> Option<(Change, Plan)> {
    let needed = planner.plan(current).ok()?.needed();
    let changes = changes(current, planner.config, planner.platform.on_cpu);
    changes.into_iter().find_map(|change| {
        let mut all = arguments(taken);
        all.extend(change.arguments());
        let plan = reload(&all)?;
        let saves = planner.plan(&plan).ok()?.needed() < needed;
        saves.then_some((change, plan))
    })
}

/// Whether a change sets all that another one does.
fn replaces(change: &Change, earlier: &Change) -> bool {
    let keys = |change: &Change| change.sets.iter().map(|(key, _)| *key).collect::<Vec<_>>();
    let new = keys(change);
    keys(earlier).iter().all(|key| new.contains(key))
}

/// All changes as arguments of `--set`.
pub fn arguments(changes: &[Change]) -> Vec<String> {
    changes.iter().flat_map(Change::arguments).collect()
}

/// The longest context and the largest micro-batch that fit into `room`, samples being as long as the
/// context.
///
/// # Errors
/// What is wrong with the plan's adapters.
pub fn largest(planner: &Planner, plan: &Plan, room: u64) -> Result<Largest, Vec<String>> {
    let any_length = Planner {
        longest: None,
        new_tokens: planner.new_tokens.clone(),
        ..*planner
    };
    let outlook = any_length.outlook(plan)?;
    let fits = |change: &dyn Fn(&mut Plan)| {
        let mut plan = plan.clone();
        change(&mut plan);
        outlook.plan(&plan).needed() <= room
    };
    let positions = planner.config.max_position_embeddings;
    Ok(Largest {
        max_seq_len: most(positions, |n| fits(&|plan| plan.data.max_seq_len = n)),
        micro_batch_size: most(1 << 16, |n| fits(&|plan| plan.train.micro_batch_size = n)),
    })
}

/// The largest number up to `limit` that fits; 0 where 1 does not.
fn most(limit: usize, fits: impl Fn(usize) -> bool) -> usize {
    if fits(limit) {
        return limit;
    }
    let (mut good, mut bad) = (0, limit);
    while bad - good > 1 {
        let middle = good.midpoint(bad);
        match fits(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    good
}
