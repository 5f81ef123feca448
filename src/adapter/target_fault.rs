//! What can be wrong with a choice of modules, and the names that may have been meant.

use std::collections::BTreeSet;
use std::fmt;

use regex::Regex;

use super::target::{Matcher, ModuleAdapter, Rule, Targeting, ends_with, layer_index};
use crate::model::names;
use crate::recipe::plan::TargetModules;

/// Everything wrong with a choice of modules.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub struct TargetError {
    /// The faults, at least one.
    pub faults: Vec<TargetFault>,
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.faults.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

/// One fault of a choice of modules.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TargetFault {
    /// A regular expression that cannot be used.
    #[error("{key}: cannot use the regular expression {pattern:?}: {cause}{}", regex_remedy(.pattern))]
    Pattern {
        /// The knob.
        key: &'static str,
        /// What stands there.
        pattern: String,
        /// What the regex crate says.
        cause: String,
    },
    /// A listed name that matches no linear layer.
    #[error("{key}: no linear layer is called {name:?}; {nearest}")]
    UnknownName {
        /// The knob.
        key: &'static str,
        /// What stands there.
        name: String,
        /// The names there are.
        nearest: String,
    },
    /// A regular expression that matches no linear layer.
    #[error("{key}: the pattern {pattern:?} matches no {among}; {nearest}")]
    UnusedPattern {
        /// The knob.
        key: &'static str,
        /// What stands there.
        pattern: String,
        /// What it was compared with.
        among: &'static str,
        /// The names there are.
        nearest: String,
    },
    /// A layer that the model does not have.
    #[error("layers_to_transform: no linear layer lies in layer {layer}; expected {expected}")]
    UnknownLayer {
        /// The index.
        layer: usize,
        /// The indices there are.
        expected: String,
    },
    /// A regular expression beside `layers_to_transform` or `layers_pattern`.
    #[error(
        "{key}: cannot be combined with the regular expression in target_modules (nor can it in \
         PEFT); put the layers into the expression or list module names"
    )]
    LayersWithPattern {
        /// The knob.
        key: &'static str,
    },
    /// `layers_pattern` alone.
    #[error("layers_pattern: has no meaning without layers_to_transform; give both or neither")]
    LayersPatternAlone,
    /// Half of two layers that are one in the model.
    #[error(
        "target_modules: {found:?} without {missing:?}; in a model whose experts hold both in one \
         parameter they carry one adapter: give both or neither"
    )]
    HalfOfExperts {
        /// What stands there.
        found: &'static str,
        /// What does not.
        missing: &'static str,
    },
    /// Rank 0.
    #[error("{key}: found rank 0; expected 1 or more")]
    ZeroRank {
        /// The knob, and the pattern where it stands in one.
        key: String,
    },
    /// The knobs are right one by one but leave no module.
    #[error(
        "target_modules, exclude_modules and layers_to_transform together leave no linear layer to \
         adapt; widen target_modules or drop a filter"
    )]
    Nothing,
}

/// What to do about a regular expression that only Python takes.
fn regex_remedy(pattern: &str) -> &'static str {
    let python_only = ["(?=", "(?!", "(?<=", "(?<!", "(?>", "(?P="];
    if python_only.iter().any(|s| pattern.contains(s)) {
        "; look-around, back-references and atomic groups of Python's re are not supported: list the \
         module names instead"
    } else {
        ""
    }
}

/// Names, layers and patterns without effect.
pub(super) fn unused(
    targeting: &Targeting,
    matcher: &Matcher,
    linear: &[String],
    selected: &[ModuleAdapter],
) -> Vec<TargetFault> {
    let mut faults = Vec::new();
    unused_modules(
        "target_modules",
        &targeting.target_modules,
        &matcher.targets,
        linear,
        &mut faults,
    );
    if let (Some(modules), Some(rule)) = (&targeting.exclude_modules, &matcher.excluded) {
        unused_modules("exclude_modules", modules, rule, linear, &mut faults);
    }
    if let Some((kept, regexes)) = &matcher.layers {
        let there: BTreeSet<usize> = linear
            .iter()
            .filter_map(|module| layer_index(regexes, module))
            .collect();
        for &layer in kept.iter().filter(|layer| !there.contains(layer)) {
            faults.push(TargetFault::UnknownLayer {
                layer,
                expected: span(&there),
            });
        }
    }
    for name in &targeting.target_parameters {
        let parameters: Vec<String> = (linear.iter())
            .map(|path| names::parameter_of(path).unwrap_or(format!("{path}.weight")))
            .collect();
        if !parameters.iter().any(|path| ends_with(path, name)) {
            let nearest = nearest(name, &parameters);
            faults.push(TargetFault::UnknownName {
                key: "target_parameters",
                name: name.clone(),
                nearest,
            });
        }
    }
    if selected.is_empty() && faults.is_empty() {
        faults.push(TargetFault::Nothing);
    }
    if selected.is_empty() {
        return faults;
    }
    // Patterns speak of parameters where those are what carries the adapter.
    let paths: Vec<String> = (selected.iter())
        .map(|adapter| names::parameter_of(&adapter.module).unwrap_or(adapter.module.clone()))
        .collect();
    let mut check = |key, pattern: &str, regex: &Regex| {
        if !paths.iter().any(|path| regex.is_match(path)) {
            faults.push(TargetFault::UnusedPattern {
                key,
                pattern: pattern.to_owned(),
                among: "adapted module",
                nearest: nearest(pattern, &paths),
            });
        }
    };
    for ((pattern, _), (regex, _)) in targeting.rank_pattern.iter().zip(&matcher.ranks) {
        check("rank_pattern", pattern, regex);
    }
    for ((pattern, _), (regex, _)) in targeting.alpha_pattern.iter().zip(&matcher.alphas) {
        check("alpha_pattern", pattern, regex);
    }
    faults
}

fn unused_modules(
    key: &'static str,
    modules: &TargetModules,
    rule: &Rule,
    linear: &[String],
    faults: &mut Vec<TargetFault>,
) {
    match modules {
        TargetModules::Names(names) => {
            for name in names {
                if !linear.iter().any(|module| ends_with(module, name)) {
                    let nearest = nearest(name, linear);
                    faults.push(TargetFault::UnknownName {
                        key,
                        name: name.clone(),
                        nearest,
                    });
                }
            }
        }
        TargetModules::Pattern(pattern) => {
            if !linear.iter().any(|module| rule.matches(module)) {
                faults.push(TargetFault::UnusedPattern {
                    key,
                    pattern: pattern.clone(),
                    among: "linear layer",
                    nearest: nearest(pattern, linear),
                });
            }
        }
    }
}

/// "did you mean …" and the names there are: the last parts of the paths, or for a dotted name
/// whole paths.
fn nearest(name: &str, modules: &[String]) -> String {
    let ends: BTreeSet<&str> = modules
        .iter()
        .filter_map(|module| module.rsplit('.').next())
        .collect();
    let closest = if name.contains('.') {
        best(name, modules.iter().map(String::as_str))
    } else {
        best(name, ends.iter().copied())
    };
    let all = ends.into_iter().collect::<Vec<_>>().join(", ");
    match closest {
        Some(closest) => format!("did you mean {closest:?}? the linear layers are {all}"),
        None => format!("the linear layers are {all}"),
    }
}

fn best<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|x, y| x.0.total_cmp(&y.0))
        .map(|(_, candidate)| candidate)
}

fn span(layers: &BTreeSet<usize>) -> String {
    match (layers.first(), layers.last()) {
        (Some(first), Some(last)) => format!("{first} to {last}"),
        _ => "no index: the module paths hold no layer numbers".to_owned(),
    }
}
