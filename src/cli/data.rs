//! `lorafit data`: what a recipe's dataset looks like to the model.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use serde_json::json;

use super::Usage;
use super::args::{DataCommand, DataRecipe, Output, PreviewArgs, StatsArgs};
use super::check::plan;
use super::print::{print, print_while_read, say};
use super::render::Renderer;
use super::style::Style;
use super::{preview_html, preview_text, stats_text, warnings};
use crate::data::preview::{self, PreviewRow, Wanted};
use crate::data::tokenize::ChatTokenizer;
use crate::data::{self, Dataset, source, stats};
use crate::export::write;
use crate::recipe::Plan;
use crate::train::prepare;

/// Shows rows, or counts them.
///
/// # Errors
/// The recipe, the base model's tokenizer or the data are at fault.
pub fn run(command: &DataCommand, output: &Output) -> anyhow::Result<()> {
    match command {
        DataCommand::Preview(args) => preview(args, output),
        DataCommand::Stats(args) => count(args, output),
    }
}

/// A recipe with the tokenizer of its base model.
struct Opened {
    plan: Plan,
    tokenizer: ChatTokenizer,
}

fn open(args: &DataRecipe, renderer: &mut Renderer) -> anyhow::Result<Opened> {
    let plan = plan(&args.recipe, &args.set)?;
    let base = prepare::locate(&plan, &mut |progress| renderer.loading(&progress));
    let (tokenizer, _) = prepare::tokenizer(&plan, &base?).map_err(usage)?;
    Ok(Opened { plan, tokenizer })
}

fn usage(error: impl std::fmt::Display) -> anyhow::Error {
    Usage(error.to_string()).into()
}

impl Opened {
    /// The whole dataset, tokenised: also where the recipe streams it.
    fn dataset(&self, renderer: &mut Renderer) -> anyhow::Result<Dataset> {
        let mut data = self.plan.data.clone();
        data.streaming = false;
        let (seed, tokenizer) = (self.plan.train.seed, &self.tokenizer);
        let dataset = data::load(&data, seed, tokenizer, usize::MAX, &mut |progress| {
            renderer.loading(&progress);
        });
        renderer.finish_bar();
        dataset.map_err(usage)
    }
}

fn preview(args: &PreviewArgs, output: &Output) -> anyhow::Result<()> {
    let mut renderer = Renderer::new(*output);
    let opened = open(&args.recipe, &mut renderer)?;
    let wanted = match args.row {
        Some(number) => Wanted {
            first: number.saturating_sub(1),
            count: 1,
        },
        None => Wanted {
            first: 0,
            count: args.rows,
        },
    };
    let data = &opened.plan.data;
    let sources = source::find(&data.train, data.format, &mut |progress| {
        renderer.download(&progress);
    });
    renderer.finish_bar();
    let sources = sources.map_err(usage)?;
    let rows = if args.packed {
        let dataset = opened.dataset(&mut renderer)?;
        preview::packed(&opened.plan, &sources, &dataset, &opened.tokenizer, wanted)
    } else {
        preview::rows(data, &sources, &opened.tokenizer, wanted)
    };
    let rows = rows.map_err(usage)?;
    if rows.is_empty() {
        let what = if args.packed { "packed row" } else { "row" };
        return Err(usage(format!("there is no {what} {}", wanted.first + 1)));
    }
    match &args.html {
        Some(path) => write_html(path, &rows, &opened, args, output),
        None => show(&rows, args, output),
    }
}

fn write_html(
    path: &Path,
    rows: &[PreviewRow],
    opened: &Opened,
    args: &PreviewArgs,
    output: &Output,
) -> anyhow::Result<()> {
    let template = opened.tokenizer.template();
    let about = preview_html::About {
        recipe: args.recipe.recipe.display().to_string(),
        model: opened.plan.base.model.clone(),
        template: template.map_or("none".to_owned(), |template| template.name().to_owned()),
    };
    let page = preview_html::page(rows, &about);
    write::atomic_bytes(path, page.as_bytes()).context("cannot write the page")?;
    if output.json {
        let event = json!({"event": "preview", "rows": rows.len(), "path": path});
        return print(&format!("{event}\n"));
    }
    if !output.quiet {
        let plural = if rows.len() == 1 { "" } else { "s" };
        say(&format!(
            "wrote {} row{plural} to {}",
            rows.len(),
            path.display()
        ));
    }
    Ok(())
}

fn show(rows: &[PreviewRow], args: &PreviewArgs, output: &Output) -> anyhow::Result<()> {
    let style = Style::detect(std::io::stdout().is_terminal());
    if !output.json {
        print(&preview_text::legend(style))?;
    }
    for row in rows {
        let text = if output.json {
            let mut event = json!({"event": "row"});
            if let (Some(event), serde_json::Value::Object(row)) =
                (event.as_object_mut(), json!(row))
            {
                event.extend(row);
            }
            format!("{event}\n")
        } else if args.tokens {
            format!("\n{}", preview_text::table(row, style))
        } else {
            format!("\n{}", preview_text::row(row, style))
        };
        if !print_while_read(&text)? {
            break;
        }
    }
    Ok(())
}

fn count(args: &StatsArgs, output: &Output) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut renderer = Renderer::new(*output);
    let opened = open(&args.recipe, &mut renderer)?;
    let dataset = opened.dataset(&mut renderer)?;
    let seconds = begin.elapsed().as_secs_f64();
    let stats = stats::stats(&opened.plan, &dataset, seconds);
    for warning in warnings::of_data(&opened.plan.data, &dataset.report) {
        renderer.warn(&warning);
    }
    if output.json {
        let mut event = json!({"event": "stats"});
        if let (Some(event), serde_json::Value::Object(stats)) =
            (event.as_object_mut(), json!(stats))
        {
            event.extend(stats);
        }
        return print(&format!("{event}\n"));
    }
    let style = Style::detect(std::io::stdout().is_terminal());
    print(&stats_text::stats(&stats, style))
}
