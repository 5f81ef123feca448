//! What can be wrong with a row.

use super::template::TemplateError;
use crate::recipe::plan::Clause;

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
        "cannot tell the format of this row from its keys ({keys}); supported are `messages`, `conversations`, `instruction` with `output`, `prompt` with `completion`, `question` with `answer`, `text`, `input_ids`, and `chosen` with `rejected`; say what the dataset calls them, as in `fields: {{messages: dialog}}`"
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
    #[error(
        "`{key}` is `{found}`; roles are system, developer, user, assistant and tool, or ShareGPT's human, gpt, function_call and observation"
    )]
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
        "chat template {template} ends assistant turn {turn} with {found}, which is not a labelled token that generation stops on ({stop}); {remedy}"
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
        /// What to do.
        remedy: String,
    },
    /// A token ends turns on which `generation_config.json` does not stop.
    #[error(
        "turns end with {found}, but generation_config.json stops on {named} only, so that served models would not stop; add {id} to its eos_token_id"
    )]
    OtherStopToken {
        /// The text of the token.
        found: String,
        /// Its id.
        id: u32,
        /// The texts of the tokens that are named.
        named: String,
    },
    /// Labels of a tokenised row that end without a stop token.
    #[error(
        "the labels up to token {at} end with {found}, which is not a token that generation stops on, so the end of the turn is never learned; label the end-of-turn token too"
    )]
    RunWithoutEnd {
        /// Index of the last labelled token, from 0.
        at: usize,
        /// Its text.
        found: String,
    },
    /// The padding token is learned.
    #[error(
        "`{token}` is both the padding token and one that trains; set another pad_token in tokenizer_config.json"
    )]
    PadTrains {
        /// The token's text.
        token: String,
    },
    /// Fewer or more generation blocks than turns.
    #[error(
        "chat template {template} has {blocks} `generation` blocks for {turns} assistant turns, so those that do not train cannot be told; give each turn one block, or remove `train` and `weight` from the messages"
    )]
    UnmatchedBlocks {
        /// The template's name.
        template: String,
        /// Blocks in the rendering.
        blocks: usize,
        /// Assistant messages.
        turns: usize,
    },
    /// A pair inside a pair.
    #[error("a side of a preference pair is a pair itself; expected a conversation or a text")]
    NestedPair,
    /// An id that the tokenizer does not have.
    #[error(
        "`input_ids` holds {id}, but the tokenizer has ids up to {} only; tokenise with this model's tokenizer", vocab_size.saturating_sub(1)
    )]
    UnknownId {
        /// The id.
        id: u32,
        /// One more than the largest id.
        vocab_size: usize,
    },
    /// Longer than allowed, with `truncate: fail`.
    #[error(
        "the row has {tokens} tokens, more than data.max_seq_len = {max_seq_len}; raise it, shorten the row, or set data.truncate to right, left or drop"
    )]
    TooLong {
        /// Its length.
        tokens: usize,
        /// The recipe's limit.
        max_seq_len: usize,
    },
    /// No BOS token.
    #[error(
        "the row does not start with `{token}`, which the tokenizer puts before every text; write it in the chat template (`{{{{ bos_token }}}}`)"
    )]
    MissingBos {
        /// The token's text.
        token: String,
    },
    /// A BOS token in the middle.
    #[error(
        "the row has `{token}` again at token {at}: a second beginning; remove it from the text"
    )]
    InnerBos {
        /// The token's text.
        token: String,
        /// Index of the token, from 0.
        at: usize,
    },
    /// Two BOS tokens.
    #[error(
        "the row starts with `{token}` twice: remove it from the text, or from the chat template"
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
    /// A record with other cells than the header.
    #[error(
        "expected {expected} cells as in the header, found {found}; put quotes around cells that hold the delimiter or a line end"
    )]
    CellCount {
        /// Cells of the header.
        expected: usize,
        /// Cells of the row.
        found: usize,
    },
    /// A quoted cell that the file ends in.
    #[error("a quote that opens in this row is not closed")]
    UnclosedQuote,
    /// A value that is none of those allowed.
    #[error("`{key}` is {found}; {allowed}")]
    OutOfRange {
        /// Path of the key in the row.
        key: String,
        /// What was found.
        found: String,
        /// What is allowed, as a clause.
        allowed: &'static str,
    },
    /// Two keys that cannot both hold.
    #[error("`{key}` contradicts {other}; keep one of the two")]
    Contradiction {
        /// Path of the key in the row.
        key: String,
        /// What it contradicts.
        other: String,
    },
    /// A turn that is said to train, but not the assistant's.
    #[error(
        "`{key}`: only turns of the assistant can be chosen to train; remove it (data.train_on_inputs trains every token)"
    )]
    NotTrainable {
        /// Path of the key in the row.
        key: String,
    },
    /// A string that should hold JSON.
    #[error(
        "`{key}` is a string that holds no valid JSON: {message}; write the list or object as JSON"
    )]
    JsonText {
        /// Path of the key in the row.
        key: String,
        /// What the parser says.
        message: String,
    },
    /// Lists that belong together, and are not equally long.
    #[error(
        "`{key}` has {length} items, but `{other}` has {other_length}; they must be equally long"
    )]
    UnequalLengths {
        /// Path of the key in the row.
        key: String,
        /// Its items.
        length: usize,
        /// Path of the other key.
        other: String,
        /// Its items.
        other_length: usize,
    },
    /// A preference between equals.
    #[error(
        "`{chosen}` and `{rejected}` are the same, so neither can be preferred; remove the row"
    )]
    SameAnswers {
        /// Path of the key of the better answer.
        chosen: String,
        /// Path of the key of the worse one.
        rejected: String,
    },
}

impl RowError {
    /// The clause of the mask contract that the row breaks.
    pub fn clause(&self) -> Option<Clause> {
        match self {
            Self::NoEndOfTurn { .. } | Self::RunWithoutEnd { .. } => Some(Clause::EndOfTurn),
            Self::DoubleBos { .. } | Self::MissingBos { .. } | Self::InnerBos { .. } => {
                Some(Clause::Bos)
            }
            Self::PadTrains { .. } => Some(Clause::Pad),
            Self::AllMasked | Self::NoAssistantTurn => Some(Clause::Labels),
            Self::OtherStopToken { .. } => Some(Clause::StopToken),
            _ => None,
        }
    }

    /// Whether leaving the row out may mend it: not where the template, the tokenizer or the
    /// contract is at fault, because other rows share that.
    pub fn may_skip(&self) -> bool {
        let shared = matches!(
            self,
            Self::InexactSpans { .. }
                | Self::UnmatchedBlocks { .. }
                | Self::NoChatTemplate
                | Self::NoEos
                | Self::UnknownId { .. }
                | Self::TooLong { .. }
        );
        !shared && self.clause().is_none()
    }

    pub(super) fn missing(key: impl Into<String>) -> Self {
        Self::Missing { key: key.into() }
    }

    pub(super) fn blank(key: impl Into<String>) -> Self {
        Self::Blank { key: key.into() }
    }

    pub(super) fn wrong_type(
        key: impl Into<String>,
        expected: &'static str,
        found: &serde_json::Value,
    ) -> Self {
        Self::WrongType {
            key: key.into(),
            expected,
            found: type_name(found),
        }
    }
}

/// A text of a row as errors show it: its beginning, where it is long.
pub(super) fn shown(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
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
