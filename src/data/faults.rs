//! What can be wrong with a dataset, in words that name file, line and remedy.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::template::TemplateError;

/// How many bad rows an error shows.
const SHOWN_ROWS: usize = 10;

/// Why a dataset cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file that cannot be opened or read.
    #[error("cannot read dataset {path}: {source}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A JSON array that is cut off.
    #[error("{path}:{line}: the JSON array that starts here is not closed; is the file complete?", path = path.display())]
    UnclosedArray {
        /// The file.
        path: PathBuf,
        /// Line of the opening bracket.
        line: usize,
    },
    /// Files without a single row.
    #[error("dataset {files} is empty: expected one JSON object a line, found none", files = list(files))]
    Empty {
        /// The files.
        files: Vec<PathBuf>,
    },
    /// Rows that cannot be trained on.
    #[error("{0}")]
    BadRows(BadRows),
    /// `max_seq_len` beyond what the model can place.
    #[error(
        "data.max_seq_len is {max_seq_len}, but the model has positions for {position_limit} tokens only; set data.max_seq_len to {position_limit} or less"
    )]
    LongerThanModel {
        /// The recipe's limit.
        max_seq_len: usize,
        /// The model's limit.
        position_limit: usize,
    },
    /// Truncation left nothing to train on.
    #[error(
        "no {split} row is left: data.max_seq_len = {max_seq_len} cuts off every trained token of all {dropped} rows; raise it"
    )]
    NothingLeft {
        /// `training` or `validation`.
        split: &'static str,
        /// Rows that lost all their labels.
        dropped: usize,
        /// The recipe's limit.
        max_seq_len: usize,
    },
    /// Too few rows to hold some out.
    #[error(
        "data.validation_fraction needs at least 2 rows to split, found {rows}; set it to 0 or add rows"
    )]
    TooFewToSplit {
        /// Rows that can train.
        rows: usize,
    },
}

/// Rows that cannot be trained on: their number, and the first of them.
#[derive(Debug, Default)]
pub struct BadRows {
    /// How many.
    pub count: usize,
    /// The first ones, in the order of the files.
    pub shown: Vec<RowFault>,
}

impl BadRows {
    /// Adds one.
    pub fn push(&mut self, fault: RowFault) {
        self.count += 1;
        if self.shown.len() < SHOWN_ROWS {
            self.shown.push(fault);
        }
    }
}

impl fmt::Display for BadRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.count, self.shown.as_slice()) {
            (1, [only]) => write!(f, "{only}"),
            (count, shown) => {
                write!(f, "{count} rows cannot be trained on")?;
                if shown.len() < count {
                    write!(f, ", the first {}", shown.len())?;
                }
                f.write_str(":")?;
                shown.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
            }
        }
    }
}

/// One bad row and where it is.
#[derive(Debug)]
pub struct RowFault {
    /// The file.
    pub file: Arc<Path>,
    /// Line of the row's beginning, from 1.
    pub line: usize,
    /// What is wrong.
    pub reason: RowError,
}

impl fmt::Display for RowFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, reason) = (self.file.display(), &self.reason);
        match reason {
            // The line inside the row matters where a row spans several.
            RowError::Json { line, column, .. } => {
                write!(f, "{file}:{}:{column}: {reason}", self.line + line - 1)
            }
            _ => write!(f, "{file}:{}: {reason}", self.line),
        }
    }
}

/// What is wrong with one row.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// Bytes that are no text.
    #[error("not UTF-8 text (first wrong byte at {offset} of the row); save the file as UTF-8")]
    NotUtf8 {
        /// Byte of the row, from 0.
        offset: usize,
    },
    /// Text that is no JSON.
    #[error("not valid JSON: {message}")]
    Json {
        /// Line inside the row, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser says.
        message: String,
    },
    /// JSON that is no object.
    #[error("a row must be a JSON object, found {found}")]
    NotAnObject {
        /// The JSON type.
        found: &'static str,
    },
    /// Keys that tell no format.
    #[error(
        "cannot tell the format of this row from its keys ({keys}); supported are `messages`, `instruction` with `output`, and `text`"
    )]
    UnknownFormat {
        /// The keys of the row.
        keys: String,
    },
    /// A key that must be there.
    #[error("`{key}` is missing")]
    Missing {
        /// Path of the key in the row.
        key: String,
    },
    /// A value of the wrong type.
    #[error("`{key}` must be {expected}, found {found}")]
    WrongType {
        /// Path of the key in the row.
        key: String,
        /// What it must be.
        expected: &'static str,
        /// The JSON type found.
        found: &'static str,
    },
    /// A value that must hold something.
    #[error("`{key}` is empty")]
    Blank {
        /// Path of the key in the row.
        key: String,
    },
    /// A role that no chat template knows.
    #[error("`{key}` is `{found}`; roles are system, user, assistant and tool")]
    UnknownRole {
        /// Path of the key in the row.
        key: String,
        /// What was found.
        found: String,
    },
    /// A feature that would change what trains, and is not there yet.
    #[error("`{key}`: {feature} not supported yet; remove the row or the key")]
    Unsupported {
        /// Path of the key in the row.
        key: String,
        /// Subject and verb.
        feature: &'static str,
    },
    /// Nothing to learn from.
    #[error(
        "all labels are masked: the conversation has no assistant turn; add one, or set data.train_on_inputs"
    )]
    NoAssistantTurn,
    /// Nothing to learn from.
    #[error("all labels are masked: no token of the row would train")]
    AllMasked,
    /// A chat row for a model without a chat template.
    #[error(
        "the tokenizer has no chat template to render `messages` with; name a Jinja file in data.chat_template"
    )]
    NoChatTemplate,
    /// The template failed.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer failed.
    #[error("the tokenizer fails on this row: {message}")]
    Tokenizer {
        /// What it says.
        message: String,
    },
    /// Assistant spans that cannot be told exactly.
    #[error(
        "chat template {template} renders message {message} differently in the whole conversation than at its end, so the tokens of assistant turns cannot be told exactly; mark them with `generation` blocks in a template of your own (data.chat_template), or set data.train_on_inputs"
    )]
    InexactSpans {
        /// The template's name.
        template: String,
        /// Index of the assistant message.
        message: usize,
    },
    /// A turn that generation would never end.
    #[error(
        "chat template {template} ends assistant turn {turn} with {found}, which is not a labelled token that generation stops on ({stop}); end the turn (inside its `generation` block, if any) with one of these, or add the template's end-of-turn token to eos_token_id in generation_config.json"
    )]
    NoEndOfTurn {
        /// The template's name.
        template: String,
        /// Number of the turn, from 1.
        turn: usize,
        /// The text of the last token of the turn.
        found: String,
        /// The texts of the stop tokens.
        stop: String,
    },
    /// Two BOS tokens.
    #[error(
        "the row starts with {token} twice: remove it from the text, or from the chat template"
    )]
    DoubleBos {
        /// The token's text.
        token: String,
    },
    /// A text row needs an end.
    #[error(
        "the tokenizer names no end-of-sequence token, so the end of a row cannot be learned; set eos_token in tokenizer_config.json"
    )]
    NoEos,
}

/// The JSON type of a value, for errors.
pub(super) fn type_name(value: &serde_json::Value) -> &'static str {
    match value {
        serde_json::Value::Null => "null",
        serde_json::Value::Bool(_) => "a boolean",
        serde_json::Value::Number(_) => "a number",
        serde_json::Value::String(_) => "a string",
        serde_json::Value::Array(_) => "an array",
        serde_json::Value::Object(_) => "an object",
    }
}

fn list(files: &[PathBuf]) -> String {
    let names: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
    names.join(", ")
}
