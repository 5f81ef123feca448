//! The words of the longest choices.

use super::schema::Kind;

/// Formats of rows; a source may name its own.
pub(super) const FORMAT: Kind = Kind::Choice(&[
    ("auto", "told from the keys of the first row"),
    (
        "messages",
        "`{\"messages\": [{\"role\", \"content\"}, …]}`, as OpenAI has it",
    ),
    (
        "sharegpt",
        "`{\"conversations\": [{\"from\", \"value\"}, …]}`",
    ),
    (
        "alpaca",
        "`{\"instruction\", \"input\", \"output\"}`, `input` may be missing",
    ),
    (
        "prompt_completion",
        "`{\"prompt\", \"completion\"}`, the completion trains",
    ),
    ("text", "`{\"text\"}`, every token trains"),
    ("tokens", "`{\"input_ids\", \"labels\"}`, tokenised already"),
    (
        "preference",
        "`{\"prompt\", \"chosen\", \"rejected\"}`, for preference objectives, which are not there yet",
    ),
]);

/// The clauses of the mask contract.
pub(super) const CLAUSE: Kind = Kind::Choice(&[
    (
        "end_of_turn",
        "each trained turn ends with a labelled token on which generation stops",
    ),
    ("bos", "a row has one BOS token, where the model has one"),
    ("pad", "the padding token carries no label"),
    (
        "labels",
        "each row has something to train; waived, rows without are left out",
    ),
    (
        "stop_token",
        "the token that ends turns is what `generation_config.json` and the tokenizer say",
    ),
]);
