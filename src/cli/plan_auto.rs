//! `lorafit plan --auto`: writes the recipe that fits.

use std::path::Path;

use anyhow::Context;
use serde_json::json;

use super::Usage;
use super::args::{Output, RecipeArgs};
use super::init::write_new;
use super::print::{print, say};
use crate::memory::advice::{self, Change};
use crate::recipe::{Plan, edit, load};

/// Writes the recipe with `--set`s and changes in it, and says what was changed.
///
/// # Errors
/// The file exists or cannot be written, or the recipe's layout is one that knobs cannot be set in.
pub fn write(
    recipe: &RecipeArgs,
    out: &Path,
    changes: &[Change],
    output: &Output,
) -> anyhow::Result<()> {
    let path = &recipe.recipe;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let sets: Vec<String> = (recipe.set.iter().cloned())
        .chain(advice::arguments(changes))
        .collect();
    let edited = edited(&text, &sets);
    let wanted = load::load(path, &sets).map_err(|faults| Usage(faults.to_string()))?;
    let by_hand = || {
        Usage(format!(
            "{} is not laid out one knob a line, so that it cannot be changed here; give these with --set: {}",
            path.display(),
            sets.join(" ")
        ))
    };
    let edited = edited.ok_or_else(by_hand)?;
    write_new(out, &edited, "-o other.yaml")?;
    // What was written must be what was planned.
    let written = load::load(out, &[]).ok();
    if written.is_none_or(|written| !is_same(&written, &wanted)) {
        let _ = std::fs::remove_file(out);
        return Err(by_hand().into());
    }
    if output.json {
        return print(&format!(
            "{}\n",
            json!({"event": "recipe", "path": out, "changes": changes})
        ));
    }
    if !output.quiet {
        say(&told(out, changes));
    }
    Ok(())
}

fn edited(text: &str, sets: &[String]) -> Option<String> {
    let mut text = text.to_owned();
    for set in sets {
        let (key, value) = set.split_once('=')?;
        text = edit::set(&text, key.trim(), value)?;
    }
    Some(text)
}

/// The same but for where the results go, whose default is the file's name.
fn is_same(written: &Plan, wanted: &Plan) -> bool {
    let mut written = written.clone();
    written.output_dir.clone_from(&wanted.output_dir);
    written == *wanted
}

fn told(out: &Path, changes: &[Change]) -> String {
    let mut text = format!("wrote {}", out.display());
    if changes.is_empty() {
        text += ", which is as it was: it fits";
    }
    for change in changes {
        text += &format!("\n  {change}  costs {}", change.price);
    }
    text
}
