//! What a user should know but what stops nothing; each text says what to do about it.

use std::path::PathBuf;

use serde::Serialize;

use crate::data::DataReport;
use crate::recipe::plan::{DataPlan, Truncate};
use crate::train::prepare::Prepared;

/// A warning. Serialised as an object with the key `kind`.
#[derive(Debug, Clone, PartialEq, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Warning {
    /// Samples were cut.
    #[error(
        "{count} of {rows} rows are longer than data.max_seq_len = {max_seq_len} tokens and were cut on the {side}; raise it (more memory), shorten the rows, or see data.truncate"
    )]
    Truncated {
        /// How many.
        count: usize,
        /// Of how many.
        rows: usize,
        /// The limit.
        max_seq_len: usize,
        /// `right` or `left`.
        side: Truncate,
    },
    /// Rows were left out.
    #[error(
        "{count} of {rows} rows were left out: they are longer than data.max_seq_len = {max_seq_len}, and {reason}; raise it (more memory), or shorten the rows"
    )]
    Dropped {
        /// How many.
        count: usize,
        /// Of how many.
        rows: usize,
        /// The limit.
        max_seq_len: usize,
        /// What became of them, or would.
        reason: &'static str,
    },
    /// Rows that cannot be read were left out.
    #[error(
        "{count} of {rows} rows cannot be read and were left out (data.on_bad_row: skip){}:{}",
        of_shown(*count, shown.len()),
        lines(shown)
    )]
    BadRows {
        /// How many.
        count: usize,
        /// Of how many.
        rows: usize,
        /// The first of them, and why.
        shown: Vec<String>,
    },
    /// Rows without labels were left out.
    #[error(
        "{count} of {rows} rows have nothing to train and were left out (data.waive: [labels])"
    )]
    Unlabelled {
        /// How many.
        count: usize,
        /// Of how many.
        rows: usize,
    },
    /// The tokenised dataset is not kept.
    #[error(
        "the tokenised dataset is held in memory and not kept for the next run: {reason}; make room there, or name another directory in data.cache_dir"
    )]
    NotKept {
        /// What went wrong where.
        reason: String,
    },
    /// The quantised base is not kept.
    #[error(
        "the quantised base is not kept for the next run, which will quantise it again: {reason}; make room there, name another directory in base.cache_dir, or set base.cache_limit: 0"
    )]
    QuantisedNotKept {
        /// What went wrong where.
        reason: String,
    },
    /// Prompts are given as they are.
    #[error(
        "the tokenizer has no chat template, so prompts are given to the model as plain text; {remedy}"
    )]
    PlainPrompts {
        /// What to do.
        remedy: &'static str,
    },
    /// Nothing ends an answer.
    #[error(
        "the tokenizer names no end-of-sequence token, so an answer ends only after {max_new_tokens} tokens; set eos_token in tokenizer_config.json"
    )]
    NoStopToken {
        /// Where it ends.
        max_new_tokens: usize,
    },
    /// The run directory holds something.
    #[error(
        "{} is not empty, so `lorafit train` will refuse it; continue the run in it with --resume, replace it with --overwrite, or name another with --out",
        output_dir.display()
    )]
    OutputTaken {
        /// The run directory.
        output_dir: PathBuf,
    },
    /// Modules whose delta is smaller than the steps of the number format.
    #[error(
        "{} of {modules} modules equal the base's, their delta is lost in rounding ({}); merge with --dtype f32",
        unchanged.len(),
        unchanged.join(", ")
    )]
    LostInRounding {
        /// Their paths.
        unchanged: Vec<String>,
        /// Modules that carry an adapter.
        modules: usize,
    },
}

fn of_shown(count: usize, shown: usize) -> String {
    if shown < count {
        format!(", the first {shown}")
    } else {
        String::new()
    }
}

fn lines(shown: &[String]) -> String {
    shown.iter().map(|line| format!("\n    {line}")).collect()
}

/// What to know about a dataset.
pub fn of_data(plan: &DataPlan, report: &DataReport) -> Vec<Warning> {
    let (rows, max_seq_len) = (report.rows, plan.max_seq_len);
    let mut warnings = Vec::new();
    if report.truncated > 0 {
        warnings.push(Warning::Truncated {
            count: report.truncated,
            rows,
            max_seq_len,
            side: plan.truncate,
        });
    }
    if report.dropped > 0 {
        warnings.push(Warning::Dropped {
            count: report.dropped,
            rows,
            max_seq_len,
            reason: match plan.truncate {
                Truncate::Drop => "data.truncate is drop",
                _ => "cutting them there leaves nothing to train",
            },
        });
    }
    if report.bad_rows > 0 {
        warnings.push(Warning::BadRows {
            count: report.bad_rows,
            rows,
            shown: report.bad_rows_shown.clone(),
        });
    }
    if report.unlabelled > 0 {
        let count = report.unlabelled;
        warnings.push(Warning::Unlabelled { count, rows });
    }
    warnings.extend(
        report
            .not_kept
            .clone()
            .map(|reason| Warning::NotKept { reason }),
    );
    warnings
}

/// What to know about data and prompts before a run.
pub fn of_run(prepared: &Prepared) -> Vec<Warning> {
    let (plan, report) = (&prepared.plan, &prepared.dataset.report);
    let mut warnings = of_data(&plan.data, report);
    if plan.sample.prompts.is_empty() {
        return warnings;
    }
    if !prepared.tokenizer.has_template() {
        let remedy =
            "name a template in data.chat_template, or write sample.prompts as texts to go on from";
        warnings.push(Warning::PlainPrompts { remedy });
    }
    if prepared.tokenizer.stop_ids().is_empty() {
        let max_new_tokens = plan.sample.max_new_tokens;
        warnings.push(Warning::NoStopToken { max_new_tokens });
    }
    warnings
}
