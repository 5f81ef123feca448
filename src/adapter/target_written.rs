//! A choice of modules as PEFT writes it into `adapter_config.json`.

use std::collections::BTreeSet;

use super::target::{ALL_LINEAR, TargetError, Targeting, ends_with, select};
use crate::recipe::plan::TargetModules;

/// From this many names on, PEFT writes the shortest path ends instead of the names
/// (`MIN_TARGET_MODULES_FOR_OPTIMIZATION`).
const SHORTEN_FROM: usize = 20;

/// The choice as PEFT would write it into `adapter_config.json` for this model.
///
/// `all-linear` becomes the module paths; 20 names or more become the shortest path ends that tell
/// them from the other modules.
///
/// # Errors
/// As [`select`].
pub fn as_written(targeting: &Targeting, linear: &[String]) -> Result<Targeting, TargetError> {
    let mut written = targeting.clone();
    if matches!(&targeting.target_modules, TargetModules::Pattern(p) if p.eq_ignore_ascii_case(ALL_LINEAR))
    {
        let chosen = Targeting {
            exclude_modules: None,
            ..targeting.clone()
        };
        let paths = select(&chosen, linear)?
            .into_iter()
            .map(|adapter| adapter.module);
        // The paths are chosen layer by layer already, and PEFT does not filter whole paths.
        written.layers_to_transform = None;
        written.layers_pattern.clear();
        written.target_modules = TargetModules::Names(paths.collect());
    }
    if let TargetModules::Names(names) = &mut written.target_modules {
        names.sort();
        names.dedup();
        if names.len() >= SHORTEN_FROM {
            let short = shortest_ends(names, linear);
            if short.len() < names.len() {
                *names = short;
            }
        }
    }
    Ok(written)
}

/// PEFT's `_find_minimal_target_modules`: path ends that cover `names` and nothing else.
fn shortest_ends(names: &[String], linear: &[String]) -> Vec<String> {
    let others: BTreeSet<&str> = (linear.iter())
        .flat_map(|module| with_ancestors(module))
        .filter(|path| !names.iter().any(|name| ends_with(path, name)))
        .flat_map(ends)
        .collect();
    let mut sorted: Vec<(Vec<&str>, &String)> = names
        .iter()
        .map(|name| (ends(name).collect(), name))
        .collect();
    sorted.sort();
    let mut kept = BTreeSet::new();
    for (ends, name) in sorted {
        for end in ends {
            if kept.contains(end) || others.contains(end) {
                continue;
            }
            let covered = kept.iter().any(|k: &&str| *k != name && ends_with(name, k));
            if !covered {
                kept.insert(end);
                break;
            }
        }
    }
    kept.into_iter().map(str::to_owned).collect()
}

/// A path and the modules that contain it.
fn with_ancestors(path: &str) -> impl Iterator<Item = &str> {
    let dots = path.match_indices('.').map(move |(i, _)| &path[..i]);
    dots.chain([path])
}

/// The ends of a path at dots, shortest first.
fn ends(path: &str) -> impl Iterator<Item = &str> {
    let dots = path.rmatch_indices('.').map(move |(i, _)| &path[i + 1..]);
    dots.chain([path])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::target::tests::{llama, named, paths, regex};

    #[test]
    fn many_names_are_written_as_short_ends() {
        let TargetModules::Names(few) = as_written(&regex(ALL_LINEAR), &llama(2))
            .unwrap()
            .target_modules
        else {
            panic!("names")
        };
        let mut sorted = llama(2)[..6].to_vec();
        sorted.sort();
        assert_eq!(few, sorted);
        let written = as_written(&regex(ALL_LINEAR), &llama(7)).unwrap();
        assert_eq!(written, named(&["q_proj", "up_proj", "v_proj"]));
    }

    #[test]
    fn layers_of_all_linear_survive_writing() {
        for layers in [9, 2] {
            let mut t = regex(ALL_LINEAR);
            t.layers_to_transform = Some((1..layers).collect());
            let linear = llama(10);
            let written = as_written(&t, &linear).unwrap();
            assert_eq!(paths(&written, &linear), paths(&t, &linear));
        }
    }
}
