//! Sets knobs in the text of a recipe and leaves everything else as it stands, comments too.
//!
//! Knows recipes whose knobs stand one a line, as `lorafit init` writes them. It is no YAML parser: who
//! uses it loads the result and compares.

use super::schema;

/// The text with a knob set to a value in YAML: in its line, in the place of the commented default of a
/// template, or in a new line of its section. `None` where there is no such knob.
pub fn set(text: &str, key: &str, value: &str) -> Option<String> {
    let knob = schema::find(key)?;
    let (section, name) = knob.split();
    let names: Vec<&str> = std::iter::once(name)
        .chain(knob.aliases.iter().copied())
        .collect();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if section.is_empty() {
        put(&mut lines, 0, ("", &names), value);
        return Some(joined(&lines));
    }
    let Some(header) = lines.iter().position(|line| names_key(line, section)) else {
        if lines.last().is_some_and(|line| !line.trim().is_empty()) {
            lines.push(String::new());
        }
        lines.extend([format!("{section}:"), format!("  {name}: {value}")]);
        return Some(joined(&lines));
    };
    let body = |line: &&String| line.trim().is_empty() || line.starts_with([' ', '#']);
    let length = lines[header + 1..].iter().take_while(body).count();
    let mut inside: Vec<String> = lines.drain(header + 1..header + 1 + length).collect();
    let first = (inside.iter()).find(|line| !line.trim().is_empty() && !is_comment(line));
    let indent = first.map_or("  ", |line| &line[..line.len() - line.trim_start().len()]);
    let indent = indent.to_owned();
    put(&mut inside, 0, (&indent, &names), value);
    let rest = lines.split_off(header + 1);
    lines.extend(inside);
    lines.extend(rest);
    Some(joined(&lines))
}

fn joined(lines: &[String]) -> String {
    lines.join("\n") + "\n"
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with('#')
}

/// Whether a line gives the value of this key.
fn names_key(line: &str, key: &str) -> bool {
    let rest = line.strip_prefix(key).map(str::trim_start);
    rest.is_some_and(|rest| rest.starts_with(':'))
}

/// Sets a knob in lines of one indentation; a new one stands at line `start`.
fn put(lines: &mut Vec<String>, start: usize, (indent, names): (&str, &[&str]), value: &str) {
    let is = |line: &str, mark: &str| {
        let own = line
            .strip_prefix(indent)
            .and_then(|line| line.strip_prefix(mark));
        own.is_some_and(|line| names.iter().any(|name| names_key(line, name)))
    };
    let new = format!("{indent}{}: {value}", names[0]);
    if let Some(at) = lines.iter().position(|line| is(line, "")) {
        let key = lines[at].split(':').next().unwrap_or_default().to_owned();
        let comment = lines[at]
            .find(" #")
            .map_or("", |from| lines[at][from..].trim_end());
        let set = format!("{key}: {value}");
        lines[at] = match comment {
            "" => set,
            comment => format!("{set} {}", comment.trim_start()),
        };
    } else if let Some(at) = lines.iter().position(|line| is(line, "#")) {
        lines[at] = new;
    } else {
        lines.insert(start, new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: &str = "\
# mine
base:
  model: base  # the small one

train:
    # comment
    micro_batch_size: 4   # as much as fits
    #gradient_checkpointing: auto
output_dir: runs/a
";

    #[test]
    fn a_line_is_changed_and_its_comment_stays() {
        let text = set(RECIPE, "train.micro_batch_size", "1").unwrap();
        let want = RECIPE.replace("size: 4   # as", "size: 1 # as");
        assert_eq!(text, want);
    }

    #[test]
    fn a_template_s_default_is_uncommented() {
        let text = set(RECIPE, "train.gradient_checkpointing", "block").unwrap();
        let want = RECIPE.replace(
            "#gradient_checkpointing: auto",
            "gradient_checkpointing: block",
        );
        assert_eq!(text, want);
    }

    #[test]
    fn what_is_missing_is_added_where_it_belongs() {
        let text = set(RECIPE, "base.quantization", "nf4").unwrap();
        let want = RECIPE.replace("base:\n", "base:\n  quantization: nf4\n");
        assert_eq!(text, want);
        let text = set(RECIPE, "adapter.rank", "8").unwrap();
        assert_eq!(text, format!("{RECIPE}\nadapter:\n  rank: 8\n"));
        let text = set(RECIPE, "output_dir", "runs/b").unwrap();
        assert_eq!(text, RECIPE.replace("runs/a", "runs/b"));
        assert_eq!(set(RECIPE, "train.nothing", "1"), None);
    }
}
