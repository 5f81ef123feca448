//! `{"instruction", "input"?, "output", "system"?, "history"?}`: a question and its answer.
//!
//! Such rows become conversations where the tokenizer has a chat template, else the prompt of the
//! Stanford Alpaca project with its response. `history` is LLaMA-Factory's: a list of earlier
//! pairs of question and answer. `context` and `response` stand for `input` and `output` where
//! these are absent.

use serde_json::Value;

use super::fields::{Columns, unpacked};
use super::frame::Frame;
use super::{Message, Row};
use crate::data::faults::RowError;

/// What the prompt of the Alpaca project begins with, for instructions without and with an input.
const PREAMBLES: [&str; 2] = [
    "Below is an instruction that describes a task. \
     Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context. \
     Write a response that appropriately completes the request.",
];

/// A question, with what was said before it.
#[derive(Debug)]
pub(super) struct Question {
    instruction: String,
    input: String,
    history: Vec<Message>,
}

impl Question {
    /// A question that stands alone; `key` is the row's.
    pub fn new(instruction: String, key: &str) -> Result<Self, RowError> {
        if instruction.is_empty() {
            return Err(RowError::blank(key));
        }
        Ok(Self {
            instruction,
            input: String::new(),
            history: Vec::new(),
        })
    }

    /// Takes `instruction`, with its input and history, out of a row.
    pub fn take(columns: &mut Columns<'_>) -> Result<Self, RowError> {
        let instruction = columns.string("instruction")?;
        let name = if !columns.has("input") && columns.has("context") {
            "context"
        } else {
            "input"
        };
        let input = columns.optional_string(name)?;
        let history = history(columns)?;
        Ok(Self {
            input,
            history,
            ..Self::new(instruction, columns.key("instruction"))?
        })
    }

    /// The messages up to the answer.
    pub fn messages(&self) -> Vec<Message> {
        let mut messages = self.history.clone();
        let question = if self.input.is_empty() {
            self.instruction.clone()
        } else {
            format!("{}\n\n{}", self.instruction, self.input)
        };
        messages.push(Message::new("user", question));
        messages
    }

    /// The row of this question with an answer. A history or tools need a chat template, so
    /// without one such a row is a chat that cannot be rendered.
    pub fn answered(
        &self,
        answer: String,
        frame: &Frame<'_>,
        has_template: bool,
    ) -> Result<Row, RowError> {
        if has_template || !self.history.is_empty() || frame.tools.is_some() {
            let mut messages = self.messages();
            messages.push(Message::new("assistant", answer));
            return frame.around(messages).map(Row::Chat);
        }
        Ok(Row::Completion {
            prompt: self.classic_prompt(&frame.system),
            response: answer,
        })
    }

    /// The prompt that the Stanford Alpaca models were trained with; a system prompt replaces its
    /// first lines.
    fn classic_prompt(&self, system: &str) -> String {
        let Self {
            instruction, input, ..
        } = self;
        let preamble = match (system, input.as_str()) {
            ("", "") => PREAMBLES[0],
            ("", _) => PREAMBLES[1],
            (system, _) => system,
        };
        let input = if input.is_empty() {
            String::new()
        } else {
            format!("### Input:\n{input}\n\n")
        };
        format!("{preamble}\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n")
    }
}

/// Reads a row of this format.
pub(super) fn row(columns: &mut Columns<'_>, has_template: bool) -> Result<Row, RowError> {
    let output = if !columns.has("output") && columns.has("response") {
        "response"
    } else {
        "output"
    };
    // The instruction is named first where both are missing.
    if !columns.has("instruction") {
        columns.string("instruction")?;
    }
    let answer = columns.string(output)?;
    let question = Question::take(columns)?;
    let frame = Frame::take(columns)?;
    question.answered(answer, &frame, has_template)
}

fn history(columns: &mut Columns<'_>) -> Result<Vec<Message>, RowError> {
    const KEY: &str = "history";
    const PAIR: &str = "a pair of strings, a question and its answer";
    let pairs = match columns.optional(KEY) {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Vec::new()),
        Some(value) => match unpacked(value, || KEY.to_owned())? {
            Value::Array(pairs) => pairs,
            other => return Err(RowError::wrong_type(KEY, "an array of pairs", &other)),
        },
    };
    let mut messages = Vec::with_capacity(2 * pairs.len());
    for (i, pair) in pairs.iter().enumerate() {
        let Some([question, answer]) = pair.as_array().map(Vec::as_slice) else {
            return Err(RowError::wrong_type(format!("{KEY}[{i}]"), PAIR, pair));
        };
        for (role, text) in [("user", question), ("assistant", answer)] {
            let Some(text) = text.as_str() else {
                return Err(RowError::wrong_type(format!("{KEY}[{i}]"), PAIR, text));
            };
            messages.push(Message::new(role, text));
        }
    }
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use super::super::row_format::tests::{read, read_chat, script};
    use super::*;
    use serde_json::json;

    #[test]
    fn alpaca_becomes_a_chat_or_the_classic_prompt() {
        let value = json!({"instruction": "Add.", "input": "1 2", "output": "3"});
        assert_eq!(
            read(value.clone(), true).unwrap(),
            Row::Chat(
                vec![
                    Message::new("user", "Add.\n\n1 2"),
                    Message::new("assistant", "3")
                ]
                .into()
            )
        );
        let prompt = |value| match read(value, false) {
            Ok(Row::Completion { prompt, response }) => {
                assert_eq!(response, "3");
                prompt
            }
            other => panic!("{other:?} is no completion"),
        };
        assert_eq!(
            prompt(value),
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n\
             ### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
        );
        assert_eq!(
            prompt(json!({"instruction": "Add.", "input": null, "output": "3"})),
            "Below is an instruction that describes a task. \
             Write a response that appropriately completes the request.\n\n\
             ### Instruction:\nAdd.\n\n### Response:\n"
        );
        assert_eq!(
            prompt(json!({"instruction": "Add.", "system": "Be brief.", "output": "3"})),
            "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\n"
        );
    }

    #[test]
    fn a_history_comes_before_the_question() {
        let value = json!({
            "instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]],
        });
        let want = "system: s | user: a | assistant*: b | user: c | assistant*: d";
        assert_eq!(script(&read_chat(value.clone())), want);
        // What the classic prompt cannot say is left to the chat template to miss.
        assert!(matches!(read(value, false), Ok(Row::Chat(_))));
        let text = json!({"instruction": "c", "output": "d", "history": "[[\"a\", \"b\"]]"});
        assert_eq!(
            script(&read_chat(text)),
            "user: a | assistant*: b | user: c | assistant*: d"
        );
    }

    #[test]
    fn dollys_names_are_known() {
        let value = json!({"instruction": "a", "context": "b", "response": "c", "category": "x"});
        assert_eq!(script(&read_chat(value)), "user: a\n\nb | assistant*: c");
    }

    #[test]
    fn bad_rows_say_what_is_wrong() {
        let cases = [
            (json!({"instruction": "x"}), "`output` is missing"),
            (
                json!({"instruction": 1, "output": "x"}),
                "`instruction` must be a string, found a number",
            ),
            (
                json!({"instruction": "", "output": "x"}),
                "`instruction` is empty",
            ),
            (
                json!({"instruction": "x", "output": null}),
                "`output` must be a string, found null",
            ),
            (
                json!({"instruction": "x", "output": "y", "input": 1}),
                "`input` must be a string, found a number",
            ),
            (
                json!({"instruction": "x", "output": "y", "history": {}}),
                "`history` must be an array of pairs, found an object",
            ),
            (
                json!({"instruction": "x", "output": "y", "history": [["a"]]}),
                "`history[0]` must be a pair of strings, a question and its answer, found an array",
            ),
        ];
        for (value, want) in cases {
            assert_eq!(read(value, true), Err(want.to_owned()));
        }
    }
}
