//! Adapters on the experts of a mixture, as PEFT 0.21 has them
//! (`peft/utils/transformers_weight_conversion.py`).
//!
//! transformers 5 keeps all experts of a layer in two parameters, so that names of the old layers
//! (`w1`, `gate_proj`, …) and `all-linear` become `target_parameters`. The gate and the up projection
//! share one A then, whose rank and alpha are doubled so that it can hold both. Layers of the same
//! names elsewhere in such a model (a shared expert, a dense block) lose their adapters; the adapter
//! is trained here as PEFT loads it.

use super::peft::LoraPair;
use super::target::{ALL_LINEAR, TargetError, TargetFault, Targeting, ends_with};
use crate::model::config::ModelConfig;
use crate::model::names;
use crate::model::pieces::{Layout, Piece};
use crate::recipe::plan::TargetModules;

/// Old names and what they became.
type Renamed = [(&'static str, &'static str); 4];

const MIXTRAL: Renamed = [
    ("gate", "gate.weight"),
    ("w1", "gate_up_proj"),
    ("w3", "gate_up_proj"),
    ("w2", "down_proj"),
];

const QWEN: Renamed = [
    ("gate", "gate.weight"),
    ("gate_proj", "gate_up_proj"),
    ("up_proj", "gate_up_proj"),
    ("down_proj", "down_proj"),
];

/// The names that PEFT replaces in this family; `None` where it replaces none.
fn renamed(config: &ModelConfig) -> Option<&'static Renamed> {
    match config.family.model_type {
        "mixtral" => Some(&MIXTRAL),
        "qwen3_moe" | "qwen3_next" | "deepseek_v3" => Some(&QWEN),
        _ => None,
    }
}

/// The choice with old names replaced, as PEFT replaces them before it looks for modules.
///
/// # Errors
/// The gate without the up projection, or the other way round; an expression that does not compile.
pub fn converted(targeting: &Targeting, config: &ModelConfig) -> Result<Targeting, TargetError> {
    let Some(renamed) = renamed(config) else {
        return Ok(targeting.clone());
    };
    let named = |names: &[String], old: &str| names.iter().any(|name| ends_with(name, old));
    let names = leaves(targeting, config, renamed)?;
    if !renamed.iter().any(|(old, _)| named(&names, old)) {
        return Ok(targeting.clone());
    }
    let [_, (gate, fused), (up, _), _] = *renamed;
    let fault = |found, missing| TargetError {
        faults: vec![TargetFault::HalfOfExperts { found, missing }],
    };
    let both = match (named(&names, gate), named(&names, up)) {
        (true, false) => return Err(fault(gate, up)),
        (false, true) => return Err(fault(up, gate)),
        (both, _) => both,
    };
    let mut new = targeting.clone();
    for (old, parameter) in renamed {
        if named(&names, old) && !new.target_parameters.iter().any(|name| name == parameter) {
            new.target_parameters.push((*parameter).to_owned());
        }
    }
    new.target_parameters.sort();
    let is_old = |name: &String| renamed.iter().any(|(old, _)| ends_with(name, old));
    let kept = names.into_iter().filter(|name| !is_old(name)).collect();
    new.target_modules = TargetModules::Names(kept);
    if both {
        let pattern = format!(r".*\.{fused}");
        new.rank_pattern.push((pattern.clone(), 2 * new.rank));
        new.alpha_pattern.push((pattern, 2.0 * new.alpha));
    }
    Ok(new)
}

/// The names that a choice stands for: listed ones, or the last parts of what an expression matches.
fn leaves(
    targeting: &Targeting,
    config: &ModelConfig,
    renamed: &Renamed,
) -> Result<Vec<String>, TargetError> {
    let TargetModules::Pattern(pattern) = &targeting.target_modules else {
        let TargetModules::Names(names) = &targeting.target_modules else {
            unreachable!("names or a pattern")
        };
        return Ok(names.clone());
    };
    let all = pattern.eq_ignore_ascii_case(ALL_LINEAR);
    let matcher = super::target::Matcher::new(targeting)?;
    let chosen = |path: &str| all || matcher.selects(path);
    let mut leaves: Vec<String> = (names::linear_modules(config).iter())
        .filter(|path| chosen(path))
        .filter_map(|path| Some(path.rsplit_once('.')?.1.to_owned()))
        .collect();
    for layer in 0..config.num_hidden_layers {
        let block = names::block(layer);
        for (old, _) in renamed {
            let container = match *old {
                "gate" => "mlp",
                _ => "mlp.experts",
            };
            if config.layers[layer].sparse && chosen(&format!("{block}.{container}.{old}")) {
                leaves.push((*old).to_owned());
            }
        }
    }
    leaves.sort();
    leaves.dedup();
    Ok(leaves)
}

/// The deltas that a tensor of the files gets from all experts' delta, one for each of its matrices.
///
/// # Shapes
/// The pair's A `[E · R, in]` (expert by expert) and B `[out, R · E]` (the experts take turns), for a
/// parameter `[E, out, in]`.
pub fn deltas_of(piece: &Piece, pair: &LoraPair, shape: [usize; 3]) -> Vec<LoraPair> {
    let [experts, out, input] = shape;
    let rank = pair.a_shape[0] / experts.max(1);
    // Rows `from .. to` of one expert's delta.
    let delta = |expert: usize, from: usize, to: usize| {
        let rows = (from..to).map(|row| &pair.b[row * rank * experts..][..rank * experts]);
        LoraPair {
            a: pair.a[expert * rank * input..][..rank * input].to_vec(),
            a_shape: [rank, input],
            b: rows
                .flat_map(|row| row.iter().skip(expert).step_by(experts).copied())
                .collect(),
            b_shape: [to - from, rank],
            magnitude: None,
        }
    };
    match piece.layout {
        Layout::Whole => (0..experts).map(|e| delta(e, 0, out)).collect(),
        Layout::Transposed { .. } => (0..experts)
            .map(|e| delta(e, 0, out).transposed())
            .collect(),
        Layout::From(start) => {
            let (expert, from) = (start / (out * input), start / input % out);
            vec![delta(expert, from, from + piece.shape[0])]
        }
    }
}
