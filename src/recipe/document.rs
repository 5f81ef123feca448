//! Knobs written out for people: the templates of `lorafit init` and the reference page.

use super::schema::{Initial, KNOBS, Kind, Knob, SECTIONS};

/// A recipe to start from.
struct Template {
    name: &'static str,
    about: &'static str,
    /// Knobs that are set, in YAML; the others stand beside them as comments.
    values: &'static [(&'static str, &'static str)],
}

const TEMPLATES: &[Template] = &[
    Template {
        name: "lora",
        about: "LoRA on a chat model: small adapters train, the base model stays as it is.",
        values: &[
            ("base.model", "HuggingFaceTB/SmolLM2-135M-Instruct"),
            ("data.train", "data/train.jsonl"),
            ("data.validation_fraction", "0.05"),
            ("adapter.rank", "16"),
            ("adapter.alpha", "32"),
            ("train.gradient_accumulation_steps", "8"),
            ("train.learning_rate", "2e-4"),
            ("train.num_epochs", "3"),
            ("train.eval_steps", "50"),
            ("train.save_steps", "50"),
            ("sample.prompts", "[\"Who are you?\"]"),
        ],
    },
    Template {
        name: "full",
        about: "All weights of a small model train; needs far more memory than LoRA.",
        values: &[
            ("base.model", "HuggingFaceTB/SmolLM2-135M-Instruct"),
            ("data.train", "data/train.jsonl"),
            ("data.validation_fraction", "0.05"),
            ("adapter.method", "full"),
            ("train.learning_rate", "2e-5"),
            ("train.num_epochs", "1"),
            ("train.eval_steps", "50"),
            ("train.save_steps", "200"),
        ],
    },
    Template {
        name: "pretrain",
        about: "A small model from random weights: its directory needs `config.json` and a tokenizer.",
        values: &[
            ("base.model", "my-model"),
            ("base.init", "random"),
            ("data.train", "data/corpus.jsonl"),
            ("data.format", "text"),
            ("data.validation_fraction", "0.01"),
            ("adapter.method", "full"),
            ("train.micro_batch_size", "16"),
            ("train.gradient_accumulation_steps", "1"),
            ("train.learning_rate", "1e-3"),
            ("train.weight_decay", "0.1"),
            ("train.logging_steps", "10"),
            ("train.eval_steps", "500"),
            ("train.save_steps", "500"),
        ],
    },
];

/// Width of the comment lines of a template.
const WIDTH: usize = 96;

/// The names of the templates; the first is the one to offer unasked.
pub fn template_names() -> Vec<&'static str> {
    TEMPLATES.iter().map(|template| template.name).collect()
}

/// A recipe to start from, every knob explained; `None` when there is no such template.
///
/// Knobs that the template leaves at their default stand as `#name: default`, ready to be
/// uncommented.
pub fn commented_template(name: &str) -> Option<String> {
    let template = TEMPLATES.iter().find(|template| template.name == name)?;
    let mut text = comment("", template.about);
    text += &comment(
        "",
        "Lines that begin with `#name:` show defaults. Paths start from the directory in which \
         lorafit runs.",
    );
    for (section, about) in SECTIONS {
        text += &format!("\n{}{section}:\n", comment("", about));
        for knob in KNOBS.iter().filter(|knob| knob.split().0 == *section) {
            text += &entry(template, knob, "  ");
        }
    }
    for knob in KNOBS.iter().filter(|knob| knob.split().0.is_empty()) {
        text += &format!("\n{}", entry(template, knob, ""));
    }
    Some(text)
}

/// One knob of a template: its comment, and its value or default.
fn entry(template: &Template, knob: &Knob, indent: &str) -> String {
    let (_, name) = knob.split();
    let given = template.values.iter().find(|(key, _)| *key == knob.key);
    let line = match (given, knob.default_text()) {
        (Some((_, value)), _) => format!("{name}: {value}"),
        (None, default) => format!("#{name}: {}", default.unwrap_or_default()),
    };
    format!("{}{indent}{line}\n", comment(indent, &explain(knob)))
}

/// What a knob does and what it may be.
fn explain(knob: &Knob) -> String {
    let mut text = knob.describe();
    match knob.kind {
        Kind::Integer(..) | Kind::Real(..) => {
            text += &format!(" Takes {}.", knob.kind.expected());
        }
        _ => {}
    }
    match knob.default {
        Initial::Required => text += " Required.",
        Initial::Yaml(_) | Initial::RunsRecipeName => {
            text += &format!(" Default: {}.", knob.default_text().unwrap_or_default());
        }
    }
    text
}

/// Text as comment lines.
fn comment(indent: &str, text: &str) -> String {
    let mut lines = String::new();
    let mut line = format!("{indent}#");
    for word in text.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines += &line;
            lines.push('\n');
            line = format!("{indent}#");
        }
        line.push(' ');
        line += word;
    }
    lines + &line + "\n"
}

const INTRODUCTION: &str = "\
# Recipes

A recipe is a YAML file that says what to train, on what, and how:

```console
$ lorafit init                        # writes a commented recipe.yaml to start from
$ lorafit check recipe.yaml           # says what is wrong with it, without training
$ lorafit train recipe.yaml --set train.max_steps=100
```

Every knob below can stand in the file or come from `--set key=value`, which wins over the file.
A key that is not listed here is an error, and so is a value out of range or a pair of knobs that
contradict each other; all that is wrong is reported at once. `null` is the same as leaving a knob
out. Paths start from the directory in which lorafit runs. For completion in an editor,
`lorafit schema > recipe.schema.json` and begin the recipe with
`# yaml-language-server: $schema=recipe.schema.json`.

This page is written by `lorafit schema --markdown`.
";

/// The reference page of all knobs, in Markdown.
pub fn reference_markdown() -> String {
    let mut text = INTRODUCTION.to_owned();
    for (section, about) in SECTIONS {
        text += &format!("\n## {section}\n\n{about}\n\n{}", table(section));
    }
    text += &format!("\n## At the top\n\n{}", table(""));
    text
}

fn table(section: &str) -> String {
    let mut text = "| knob | takes | default | effect |\n|---|---|---|---|\n".to_owned();
    for knob in KNOBS.iter().filter(|knob| knob.split().0 == section) {
        let mut names = format!("`{}`", knob.key);
        for alias in knob.alias_keys() {
            names += &format!(" (or `{alias}`)");
        }
        let default = match knob.default_text() {
            Some(default) => format!("`{default}`"),
            None => "required".into(),
        };
        let cells = [names, knob.kind.expected(), default, knob.describe()];
        let cells = cells.map(|cell| cell.replace('|', "\\|"));
        text += &format!("| {} |\n", cells.join(" | "));
    }
    text
}
