//! `{"prompt", "completion"}`: a text and its continuation, or messages and those that follow.
//!
//! As strings, `prompt` and `completion` are joined as they are, without a chat template, as TRL
//! does; the completion trains. Beside a `system` prompt or `tools` they are a chat. Other pairs of
//! names (`question` and `answer` …) are a question and its answer, which is read as `instruction`
//! and `output` are. As messages, those of the completion train where they are the assistant's.

use serde_json::Value;

use super::alpaca::Question;
use super::fields::{Columns, Fields};
use super::frame::Frame;
use super::messages::{self, Spot};
use super::{Message, Row};
use crate::data::faults::RowError;

/// Names of a prompt and what follows it, in the order in which they are looked for.
const PAIRS: [(&str, &str); 5] = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
];

/// The first pair of names of which a row has both.
pub(super) fn pair(has: &dyn Fn(&str) -> bool) -> Option<(&'static str, &'static str)> {
    PAIRS
        .into_iter()
        .find(|(prompt, completion)| has(prompt) && has(completion))
}

/// Reads a row of this format.
pub(super) fn row(columns: &mut Columns<'_>, has_template: bool) -> Result<Row, RowError> {
    let names = pair(&|name| columns.has(name)).unwrap_or(PAIRS[0]);
    if let Some(Value::Bool(_)) = columns.optional("label") {
        // Bad completions would be learned like good ones.
        return Err(RowError::Unsupported {
            key: "label".to_owned(),
            feature: "completions labelled as good or bad are",
        });
    }
    let frame = Frame::take(columns)?;
    let prompt = columns.required(names.0)?;
    let completion = columns.required(names.1)?;
    let (prompt, completion) = match (prompt, completion) {
        (Value::String(prompt), Value::String(completion)) => (prompt, completion),
        (prompt, completion) => {
            let fields = columns.fields();
            let mut messages = turns(prompt, "user", columns.key(names.0), fields)?;
            for message in &mut messages {
                message.trains = false;
            }
            let key = columns.key(names.1);
            messages.extend(turns(completion, "assistant", key, fields)?);
            return frame.around(messages).map(Row::Chat);
        }
    };
    if names == PAIRS[0] && !frame.is_chat() {
        return Ok(Row::Completion {
            prompt,
            response: completion,
        });
    }
    let question = Question::new(prompt, columns.key(names.0))?;
    question.answered(completion, &frame, has_template)
}

/// Messages from a list of them, a single one, or a string that is the content of one by `role`.
pub(super) fn turns(
    value: Value,
    role: &str,
    key: &str,
    fields: &Fields,
) -> Result<Vec<Message>, RowError> {
    match value {
        Value::String(text) => Ok(vec![Message::new(role, text)]),
        Value::Array(_) => messages::list(value, key, fields),
        Value::Object(_) => {
            let spot = Spot { key, index: None };
            Ok(vec![messages::message(value, spot, fields)?])
        }
        other => Err(RowError::wrong_type(
            key,
            "a string or an array of messages",
            &other,
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::row_format::tests::{read, read_as, read_chat, script};
    use super::*;
    use crate::recipe::plan::DataFormat;
    use serde_json::json;

    #[test]
    fn a_prompt_with_its_completion_is_text_as_it_stands() {
        for has_template in [true, false] {
            let value = json!({"prompt": "[{\"a\":", "completion": " 1}]"});
            assert_eq!(
                read(value, has_template),
                Ok(Row::Completion {
                    prompt: "[{\"a\":".to_owned(),
                    response: " 1}]".to_owned()
                })
            );
        }
        let value = json!({"prompt": "a", "completion": "b", "system": "s"});
        assert_eq!(
            script(&read_chat(value)),
            "system: s | user: a | assistant*: b"
        );
        let fields = [("prompt", "question"), ("completion", "answer")];
        let value = json!({"question": "a", "answer": "b"});
        assert!(matches!(
            read_as(value, DataFormat::Auto, &fields, true),
            Ok(Row::Completion { .. })
        ));
    }

    #[test]
    fn a_question_with_its_answer_is_a_chat_where_there_is_a_template() {
        for (prompt, completion) in &PAIRS[1..] {
            let value = json!({*prompt: "a", *completion: "b"});
            assert_eq!(script(&read_chat(value.clone())), "user: a | assistant*: b");
            let Ok(Row::Completion { prompt, response }) = read(value, false) else {
                panic!("a completion")
            };
            assert!(prompt.ends_with("### Instruction:\na\n\n### Response:\n"));
            assert_eq!(response, "b");
        }
    }

    #[test]
    fn of_messages_only_those_of_the_completion_train() {
        let value = json!({
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "completion": [{"role": "assistant", "content": "d"}],
        });
        let want = "user: a | assistant: b | user: c | assistant*: d";
        assert_eq!(script(&read_chat(value)), want);
        let mixed = json!({"prompt": "a", "completion": {"from": "gpt", "value": "b"}});
        assert_eq!(script(&read_chat(mixed)), "user: a | assistant*: b");
    }

    #[test]
    fn bad_rows_say_what_is_wrong() {
        let cases = [
            (
                json!({"prompt": "x", "completion": 1}),
                "`completion` must be a string or an array of messages, found a number",
            ),
            (
                json!({"prompt": [], "completion": "x"}),
                "`prompt` is empty",
            ),
            (
                json!({"prompt": [{"role": "user"}], "completion": []}),
                "`prompt[0].content` is missing",
            ),
            (
                json!({"prompt": "x", "completion": {"role": "user"}}),
                "`completion.content` is missing",
            ),
            (
                json!({"question": "", "answer": "x"}),
                "`question` is empty",
            ),
            (
                json!({"prompt": "x", "completion": "y", "label": false}),
                "`label`: completions labelled as good or bad are not supported yet; remove the row or the key",
            ),
        ];
        for (value, want) in cases {
            assert_eq!(read(value, true), Err(want.to_owned()));
        }
    }
}
