//! The nearest valid name of a mistyped one.

use super::schema::{KNOBS, SECTIONS};

/// The candidate nearest to `name`, if one is near enough to have been meant.
pub(crate) fn nearest<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let length = name.chars().count();
    if length > 64 {
        return None;
    }
    let normal = |text: &str| text.to_lowercase().replace(['-', '.', ' '], "_");
    let wanted = normal(name);
    candidates
        .into_iter()
        .map(|candidate| {
            let distance = strsim::damerau_levenshtein(&wanted, &normal(candidate));
            (distance, candidate)
        })
        .filter(|(distance, candidate)| *distance <= candidate.len().max(length).div_ceil(4))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The key that was meant by an unknown one, given as section (empty at the top) and name.
pub(super) fn key(section: &str, name: &str) -> Option<&'static str> {
    let leaf = name.rsplit('.').next().unwrap_or(name);
    let named = |wanted: &str| {
        KNOBS
            .iter()
            .find(|knob| knob.split().1 == wanted || knob.aliases.contains(&wanted))
    };
    let known_elsewhere = || {
        let mut matching = KNOBS.iter().filter(|knob| knob.elsewhere.contains(&leaf));
        let first = matching.clone().next();
        matching.find(|knob| knob.split().0 == section).or(first)
    };
    let inside = KNOBS.iter().filter(|knob| knob.split().0 == section);
    let near_here = || {
        let sections = SECTIONS
            .iter()
            .map(|(name, _)| *name)
            .filter(|_| section.is_empty());
        let name = nearest(leaf, inside.map(|knob| knob.split().1).chain(sections))?;
        match section.is_empty() {
            true => Some(name),
            false => KNOBS
                .iter()
                .map(|knob| knob.key)
                .find(|key| *key == format!("{section}.{name}")),
        }
    };
    let near_anywhere = || {
        let name = nearest(leaf, KNOBS.iter().map(|knob| knob.split().1))?;
        named(name).map(|knob| knob.key)
    };
    named(leaf)
        .or_else(known_elsewhere)
        .map(|knob| knob.key)
        .or_else(near_here)
        .or_else(near_anywhere)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_is_found() {
        assert_eq!(key("train", "learning_rte"), Some("train.learning_rate"));
        assert_eq!(key("adapter", "learning_rate"), Some("train.learning_rate"));
        assert_eq!(key("", "lora_alpha"), Some("adapter.alpha"));
        assert_eq!(key("adapter", "type"), Some("adapter.method"));
        assert_eq!(key("data", "type"), Some("data.format"));
        assert_eq!(key("", "trian"), Some("train"));
        assert_eq!(key("train", "Learning-Rate"), Some("train.learning_rate"));
        assert_eq!(key("train", "optimizer.lr"), Some("train.learning_rate"));
        assert_eq!(key("train", "flux_capacitor"), None);
    }
}
