//! How events look: a progress bar on a terminal, plain lines elsewhere, JSON for scripts.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::args::Output;
use crate::export::merged::MergeProgress;
use crate::model::hub;
use crate::train::Event;

/// Shows what a command does. Progress goes to standard error, JSON to standard output.
pub struct Renderer {
    output: Output,
    bar: Option<ProgressBar>,
    total_steps: usize,
}

impl Renderer {
    /// For one command.
    pub fn new(output: Output) -> Self {
        Self {
            output,
            bar: None,
            total_steps: 0,
        }
    }

    /// Shows an event of a run.
    pub fn event(&mut self, event: &Event) {
        if self.output.json {
            println!("{}", serde_json::to_string(event).unwrap_or_default());
            return;
        }
        match event {
            Event::Start {
                step,
                total_steps,
                trainable_parameters,
                parameters,
                device,
                ..
            } => {
                self.total_steps = *total_steps;
                self.line(&format!(
                    "training {} of {} parameters on {device}",
                    count(*trainable_parameters),
                    count(*parameters)
                ));
                if *step > 0 {
                    self.line(&format!("resuming after step {step}"));
                }
                self.open_bar(*total_steps, *step);
            }
            Event::Step {
                step,
                loss,
                learning_rate,
                grad_norm,
                tokens_per_second,
                memory_bytes,
                seconds,
                ..
            } => {
                let memory = memory_bytes
                    .map(|b| format!("  mem {}", bytes(b)))
                    .unwrap_or_default();
                let numbers = format!(
                    "loss {loss:.4}  lr {learning_rate:.2e}  grad {grad_norm:.3}  {tokens_per_second:.0} tok/s{memory}"
                );
                if let Some(bar) = &self.bar {
                    bar.set_position(*step as u64);
                    bar.set_message(numbers);
                } else {
                    let left = self.total_steps.saturating_sub(*step) as f64 * seconds;
                    let left = indicatif::HumanDuration(Duration::from_secs_f64(left));
                    self.line(&format!(
                        "step {step}/{}  {numbers}  {left:#} left",
                        self.total_steps
                    ));
                }
            }
            Event::Eval { step, loss, best } => {
                let mark = if *best { "  (best)" } else { "" };
                self.line(&format!(
                    "step {step}: validation loss {loss:.4}, perplexity {:.2}{mark}",
                    loss.exp()
                ));
            }
            Event::Sample { step, prompt, text } => {
                self.line(&format!("step {step}: {prompt:?} → {text}"));
            }
            Event::Saved { step, path } => {
                self.line(&format!("step {step}: saved {}", path.display()));
            }
            Event::EarlyStop { step, best_step } => self.line(&format!(
                "step {step}: no improvement since step {best_step}, stopping early"
            )),
            Event::Interrupted { step } => {
                self.finish_bar();
                self.line(&format!(
                    "interrupted after step {step}; continue with --resume"
                ));
            }
            Event::Done {
                step, loss, output, ..
            } => {
                self.finish_bar();
                let loss = loss
                    .map(|loss| format!(", loss {loss:.4}"))
                    .unwrap_or_default();
                self.line(&format!(
                    "done after {step} steps{loss}: {}",
                    output.display()
                ));
            }
        }
    }

    /// Shows how far a download is.
    pub fn download(&mut self, _progress: &hub::Progress) {}

    /// Shows how far a merge is.
    pub fn merging(&mut self, progress: &MergeProgress) {
        if self.bar.is_none() {
            self.open_bar(progress.total as usize, 0);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(progress.done);
            bar.set_message(progress.tensor.to_string());
        }
    }

    /// Lines of name and value.
    pub fn facts(&mut self, facts: &[(&str, String)]) {
        if self.output.json {
            let map: serde_json::Map<String, serde_json::Value> = facts
                .iter()
                .map(|(name, value)| ((*name).to_string(), value.clone().into()))
                .collect();
            println!("{}", serde_json::json!({"event": "facts", "facts": map}));
            return;
        }
        for (name, value) in facts {
            self.line(&format!("{name:>10}  {value}"));
        }
    }

    /// Removes the bar.
    pub fn finish_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        if self.output.quiet || self.output.json {
            return;
        }
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    fn open_bar(&mut self, length: usize, position: usize) {
        if self.output.quiet || self.output.json || !std::io::stderr().is_terminal() {
            return;
        }
        let bar = ProgressBar::new(length as u64).with_position(position as u64);
        let style = "{bar:24} {pos}/{len}  {msg}  {eta} left";
        bar.set_style(
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.enable_steady_tick(Duration::from_millis(500));
        self.bar = Some(bar);
    }
}

/// Prints an error and its causes.
pub fn error(error: &anyhow::Error, output: &Output) {
    if output.json {
        let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
        println!(
            "{}",
            serde_json::json!({"event": "error", "message": chain.join(": ")})
        );
    }
    eprintln!("error: {error:#}");
}

/// `12345678` as `12.3M`.
fn count(n: usize) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.1}K", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", n as f64 / 1e6),
        _ => format!("{:.2}B", n as f64 / 1e9),
    }
}

/// Bytes in binary units.
pub fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}
