//! How events look: a progress bar on a terminal, plain lines elsewhere, JSON for scripts.
//!
//! For people everything goes to standard error. With `--json` each event is one object a line on
//! standard output instead. `--quiet` leaves results and errors.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::args::Output;
use super::exit_code;
use super::pace::{Pace, clock};
use super::print::{print, say};
use super::warnings::Warning;
use crate::data;
use crate::export::merged::MergeProgress;
use crate::hub;
use crate::train::Event;

/// The bar of a training run; on two lines, so that nothing is cut off at 80 columns.
const STEPS: &str = "{bar:40} {pos}/{len}  {prefix}\n{wide_msg}";

/// The bar of a download or a merge.
const BYTES: &str = "{bar:20} {bytes}/{total_bytes}  {wide_msg}";

/// Between two lines that say how far tokenising is.
const QUIET: Duration = Duration::from_secs(5);

/// Shows what a command does.
pub struct Renderer {
    output: Output,
    bar: Option<ProgressBar>,
    training: Training,
    /// The file that is downloading.
    file: Option<String>,
    merging: bool,
    /// When to tell next how far tokenising is.
    next_count: Option<Instant>,
    /// Whether standard output failed, which is said once.
    broken: bool,
}

/// What is known of a training run.
#[derive(Default)]
struct Training {
    logging_steps: usize,
    total_steps: usize,
    first_step: usize,
    pace: Pace,
    /// The line of the last step, when it was not its turn to be printed.
    held_back: Option<String>,
}

impl Renderer {
    /// For one command.
    pub fn new(output: Output) -> Self {
        Self {
            output,
            bar: None,
            training: Training::default(),
            file: None,
            merging: false,
            next_count: None,
            broken: false,
        }
    }

    /// Without a terminal, prints every so many steps only, besides the first and the last.
    pub fn log_every(&mut self, steps: usize) {
        self.training.logging_steps = steps;
    }

    /// Shows an event of a run.
    pub fn event(&mut self, event: &Event) {
        if self.output.json {
            let is_result = matches!(event, Event::Done { .. } | Event::Interrupted { .. });
            if is_result || !self.output.quiet {
                self.json(&json!(event));
            }
            return;
        }
        if matches!(event, Event::Done { .. }) {
            self.finish_bar();
        }
        if !matches!(event, Event::Step { .. } | Event::Saved { .. })
            && let Some(line) = self.training.held_back.take()
        {
            self.line(&line);
        }
        match event {
            Event::Start {
                step, total_steps, ..
            } => {
                self.line(&describe(event));
                self.training.first_step = step + 1;
                self.training.total_steps = *total_steps;
                self.open_bar(STEPS, *total_steps as u64, *step as u64);
            }
            Event::Step { .. } => self.step(event),
            _ => self.line(&describe(event)),
        }
        if matches!(event, Event::Interrupted { .. }) {
            self.finish_bar();
        }
    }

    fn step(&mut self, event: &Event) {
        let Event::Step {
            step,
            loss,
            learning_rate,
            grad_norm,
            tokens,
            memory_bytes,
            seconds,
            ..
        } = event
        else {
            return;
        };
        let training = &mut self.training;
        training.pace.step(*tokens, *seconds);
        let left = training.total_steps.saturating_sub(*step);
        let memory = memory_bytes.map_or(String::new(), |n| format!("  mem {}", bytes(n)));
        let numbers = format!(
            "loss {loss:.4}  lr {learning_rate:.2e}  grad {grad_norm:.3}  {:.0} tok/s{memory}",
            training.pace.tokens_per_second(),
        );
        let time = format!("{} left", clock(training.pace.left(left)));
        if let Some(bar) = &self.bar {
            bar.set_position(*step as u64);
            bar.set_prefix(time);
            bar.set_message(numbers);
            return;
        }
        let line = format!("step {step}/{}  {numbers}  {time}", training.total_steps);
        let due = step.is_multiple_of(training.logging_steps.max(1));
        if due || left == 0 || *step == training.first_step {
            training.held_back = None;
            self.line(&line);
        } else {
            training.held_back = Some(line);
        }
    }

    /// Shows the work before training.
    pub fn loading(&mut self, progress: &data::Progress) {
        match progress {
            data::Progress::Download(progress) => self.download(progress),
            data::Progress::Tokenise { rows, tokens } => self.tokenising(*rows, *tokens),
        }
    }

    /// Shows how far tokenising is, where it takes a while.
    fn tokenising(&mut self, rows: usize, tokens: usize) {
        let now = Instant::now();
        let next = self.next_count.get_or_insert(now + QUIET);
        if now < *next {
            return;
        }
        *next = now + QUIET;
        self.line(&format!(
            "tokenising: {} rows, {} tokens so far",
            count(rows),
            count(tokens)
        ));
    }

    /// Shows how far a download is.
    pub fn download(&mut self, progress: &hub::Progress) {
        let hub::Progress { file, done, total } = progress;
        let is_new = self.file.as_ref() != Some(file);
        if is_new {
            self.finish_bar();
            self.file = Some(file.clone());
        }
        let is_done = *total > 0 && done >= total;
        if self.output.json && (is_new || is_done) && !self.output.quiet {
            self.json(&json!({"event": "download", "file": file, "done": done, "total": total}));
        }
        if is_new {
            self.open_bar(BYTES, *total, *done);
        }
        if let Some(bar) = &self.bar {
            bar.set_length((*total).max(*done));
            bar.set_position(*done);
            bar.set_message(file.clone());
        } else if is_new && !is_done {
            let size = match total {
                0 => String::new(),
                total => format!(" ({})", bytes(*total)),
            };
            self.line(&format!("downloading {file}{size}"));
        }
        if is_done {
            self.finish_bar();
            self.line(&format!("downloaded {file} ({})", bytes(*total)));
        }
    }

    /// Shows how far a merge is.
    pub fn merging(&mut self, progress: &MergeProgress) {
        if !self.merging {
            self.merging = true;
            self.note(&format!("merging {} of weights", bytes(progress.total)));
            self.open_bar(BYTES, progress.total, progress.done);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(progress.done);
            bar.set_message(progress.tensor.to_string());
        }
    }

    /// Shows a warning.
    pub fn warn(&mut self, warning: &Warning) {
        if self.output.quiet {
            return;
        }
        if self.output.json {
            let mut event = json!({"event": "warning", "message": warning.to_string()});
            if let (Value::Object(event), Value::Object(fields)) = (&mut event, json!(warning)) {
                event.extend(fields);
            }
            self.json(&event);
        } else {
            self.line(&format!("warning: {warning}"));
        }
    }

    /// Shows what is going on, for people alone.
    pub fn note(&mut self, text: &str) {
        self.line(text);
    }

    /// Shows facts on the way to a result: an event for scripts, lines of name and value for people.
    pub fn facts(&mut self, event: &Value, lines: &[(&str, String)]) {
        if self.output.quiet {
            return;
        }
        self.result(event, lines);
    }

    /// Shows a result; as [`Self::facts`], but for scripts also with `--quiet`.
    pub fn result(&mut self, event: &Value, lines: &[(&str, String)]) {
        if self.output.json {
            self.json(event);
        }
        for (name, value) in lines {
            self.line(&format!("{name:>10}  {value}"));
        }
    }

    /// Removes the bar.
    pub fn finish_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn json(&mut self, event: &Value) {
        if let Err(error) = print(&format!("{event}\n"))
            && !std::mem::replace(&mut self.broken, true)
        {
            say(&format!("warning: {error:#}; events are lost"));
        }
    }

    fn line(&self, text: &str) {
        if self.output.quiet || self.output.json {
            return;
        }
        match &self.bar {
            Some(bar) => bar.println(text),
            None => say(text),
        }
    }

    /// Opens a bar where standard error is a terminal.
    fn open_bar(&mut self, style: &str, length: u64, position: u64) {
        if self.output.quiet || self.output.json {
            return;
        }
        let bar = ProgressBar::new(length).with_position(position);
        if bar.is_hidden() {
            return;
        }
        let style = ProgressStyle::with_template(style);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(500));
        self.bar = Some(bar);
    }
}

/// The line of an event.
fn describe(event: &Event) -> String {
    match event {
        Event::Start {
            step,
            total_steps,
            trainable_parameters,
            parameters,
            device,
            ..
        } => {
            let resuming = match step {
                0 => String::new(),
                step => format!(", resuming after step {step}"),
            };
            format!(
                "training {} of {} parameters for {total_steps} steps on {device}{resuming}",
                count(*trainable_parameters),
                count(*parameters)
            )
        }
        Event::Step { step, loss, .. } => format!("step {step}  loss {loss:.4}"),
        Event::Overflow {
            step,
            loss_scale,
            skipped,
        } => format!(
            "step {step}: gradients overflowed, so the step is skipped and the loss scale falls to {loss_scale} ({skipped} skipped so far)"
        ),
        Event::Eval { step, loss, best } => format!(
            "step {step}: validation loss {loss:.4}, perplexity {:.2}{}",
            loss.exp(),
            if *best { "  (best)" } else { "" }
        ),
        Event::Sample { step, prompt, text } => {
            format!("step {step}: {prompt} → {}", text.replace('\n', "\n    "))
        }
        Event::Skipped { step, rows, shown } => format!(
            "step {step}: left out {rows} rows that cannot be read:\n    {}",
            shown.join("\n    ")
        ),
        Event::Saved { step, path } => format!("step {step}: saved {}", path.display()),
        Event::EarlyStop { step, best_step } => {
            format!("step {step}: no improvement since step {best_step}, stopping early")
        }
        Event::Interrupted { step } => {
            format!("interrupted after step {step}; continue with --resume")
        }
        Event::Done {
            step,
            loss,
            output,
            memory_planned_bytes,
            memory_peak_bytes,
            ..
        } => {
            let loss = loss.map_or(String::new(), |loss| format!(", loss {loss:.4}"));
            let memory = match (memory_planned_bytes, memory_peak_bytes) {
                (Some(planned), Some(peak)) => format!(
                    "memory: planned {}, measured peak {}\n",
                    bytes(*planned),
                    bytes(*peak)
                ),
                _ => String::new(),
            };
            format!(
                "{memory}done after {step} steps{loss}: {}",
                output.display()
            )
        }
    }
}

/// Prints an error and its causes: for people always, for scripts with `--json` too.
pub fn error(error: &anyhow::Error, output: &Output) {
    let message = format!("{error:#}");
    if output.json {
        let code = exit_code(error);
        let event = json!({"event": "error", "message": message, "exit_code": code});
        // What went wrong is said below; a closed pipe besides is not worth a word.
        let _ = print(&format!("{event}\n"));
    }
    say(&error_text(&message));
}

/// `error: ` before the first line, and the others in line with it.
fn error_text(message: &str) -> String {
    format!("error: {}", message.replace('\n', "\n       "))
}

/// `12345678` as `12.3M`.
pub fn count(n: usize) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_stand_in_line() {
        assert_eq!(
            error_text("a.yaml:1: one\na.yaml:2: two"),
            "error: a.yaml:1: one\n       a.yaml:2: two"
        );
    }

    #[test]
    fn events_are_lines() {
        let line = describe(&Event::Sample {
            step: 3,
            prompt: "Define Year.".into(),
            text: "One\ntwo".into(),
        });
        assert_eq!(line, "step 3: Define Year. → One\n    two");
        let line = describe(&Event::Eval {
            step: 25,
            loss: 0.0,
            best: true,
        });
        assert_eq!(
            line,
            "step 25: validation loss 0.0000, perplexity 1.00  (best)"
        );
        assert_eq!(count(3_542_208), "3.5M");
        assert_eq!(count(12), "12");
    }
}
