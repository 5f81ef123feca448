//! `{"prompt"?, "chosen", "rejected"}`: two answers to one prompt, of which the first is better.
//!
//! The prompt is `prompt`, `conversations` (or `conversation`), `instruction` with `input` and
//! `history`, `question` or `query`; `messages` where the answers are no whole conversations. An
//! answer is a text, a message or a list of messages. What comes of them:
//!
//! - Two texts with a `prompt` text are completions, as in TRL, a chat beside `system` or `tools`;
//!   with another prompt they answer it as an `output` answers an `instruction`.
//! - Two texts without a prompt are whole texts, whose prompt is what they begin with in common, up
//!   to the last white space.
//! - Messages that begin with the system's or the user's are whole conversations, as in UltraFeedback
//!   and TRL; a prompt text beside them repeats what is in them. Others follow the prompt.
//!
//! What both conversations begin with in common does not train.

use serde_json::Value;

use super::alpaca::Question;
use super::completion::turns;
use super::fields::Columns;
use super::frame::Frame;
use super::messages;
use super::{Message, Row};
use crate::data::faults::RowError;

const CHOSEN: &str = "chosen";
const REJECTED: &str = "rejected";

/// Keys of prompts that are conversations.
const DIALOGS: [&str; 3] = ["conversations", "conversation", "messages"];

/// Keys of prompts that are questions.
const QUESTIONS: [&str; 2] = ["question", "query"];

/// One of the two answers.
enum Answer {
    Text(String),
    /// At least one.
    Messages(Vec<Message>),
}

impl Answer {
    fn take(columns: &mut Columns<'_>, name: &'static str) -> Result<Self, RowError> {
        match columns.required(name)? {
            Value::String(text) => Ok(Self::Text(text)),
            value => {
                turns(value, "assistant", columns.key(name), columns.fields()).map(Self::Messages)
            }
        }
    }

    fn is_text(&self) -> bool {
        matches!(self, Self::Text(_))
    }

    fn into_messages(self) -> Vec<Message> {
        match self {
            Self::Text(text) => vec![Message::new("assistant", text)],
            Self::Messages(messages) => messages,
        }
    }

    /// Whether it holds the prompt too.
    fn is_whole(&self) -> bool {
        match self {
            Self::Text(_) => false,
            Self::Messages(messages) => messages
                .first()
                .is_some_and(|first| !["assistant", "tool"].contains(&first.role.as_str())),
        }
    }
}

/// What is answered.
enum Prompt {
    None,
    /// Continued as it is.
    Text(String),
    Question(Question),
    Messages(Vec<Message>),
}

impl Prompt {
    fn take(columns: &mut Columns<'_>, is_in_answers: bool) -> Result<Self, RowError> {
        if columns.has("prompt") {
            return Ok(match columns.required("prompt")? {
                Value::String(text) => Self::Text(text),
                value => Self::Messages(turns(
                    value,
                    "user",
                    columns.key("prompt"),
                    columns.fields(),
                )?),
            });
        }
        let dialogs = DIALOGS.into_iter();
        // UltraFeedback's `messages` are those of the chosen answer.
        let mut dialogs = dialogs.filter(|name| !(is_in_answers && *name == "messages"));
        if let Some(name) = dialogs.find(|name| columns.has(name)) {
            let value = columns.required(name)?;
            return messages::list(value, columns.key(name), columns.fields()).map(Self::Messages);
        }
        if columns.has("instruction") {
            return Question::take(columns).map(Self::Question);
        }
        match QUESTIONS.into_iter().find(|name| columns.has(name)) {
            Some(name) => Question::new(columns.string(name)?, name).map(Self::Question),
            None => Ok(Self::None),
        }
    }

    /// The conversation of this prompt and an answer of messages.
    fn followed_by(&self, answer: Vec<Message>, is_whole: bool) -> Vec<Message> {
        let mut messages = match self {
            Self::None => return answer,
            Self::Text(_) | Self::Question(_) if is_whole => return answer,
            Self::Text(text) => vec![Message::new("user", text.as_str())],
            Self::Question(question) => question.messages(),
            Self::Messages(messages) if in_common(messages, &answer) == messages.len() => {
                return answer;
            }
            Self::Messages(messages) => messages.clone(),
        };
        messages.extend(answer);
        messages
    }
}

/// Reads a row of this format.
pub(super) fn row(columns: &mut Columns<'_>, has_template: bool) -> Result<Row, RowError> {
    let mut chosen = Answer::take(columns, CHOSEN)?;
    let mut rejected = Answer::take(columns, REJECTED)?;
    if chosen.is_text() != rejected.is_text() {
        chosen = Answer::Messages(chosen.into_messages());
        rejected = Answer::Messages(rejected.into_messages());
    }
    let is_whole = chosen.is_whole() && rejected.is_whole();
    let prompt = Prompt::take(columns, is_whole)?;
    let frame = Frame::take(columns)?;
    let (mut chosen, mut rejected) = match (&prompt, chosen, rejected) {
        (Prompt::None, Answer::Text(chosen), Answer::Text(rejected)) => {
            whole_texts(&chosen, &rejected)
        }
        (prompt, chosen, rejected) => (
            answered(prompt, chosen, &frame, has_template)?,
            answered(prompt, rejected, &frame, has_template)?,
        ),
    };
    if reads_as(&chosen, &rejected) {
        return Err(RowError::SameAnswers {
            chosen: columns.key(CHOSEN).to_owned(),
            rejected: columns.key(REJECTED).to_owned(),
        });
    }
    untrain_common(&mut chosen, &mut rejected);
    Ok(Row::Preference {
        chosen: Box::new(chosen),
        rejected: Box::new(rejected),
    })
}

fn answered(
    prompt: &Prompt,
    answer: Answer,
    frame: &Frame<'_>,
    has_template: bool,
) -> Result<Row, RowError> {
    let is_whole = answer.is_whole();
    match (prompt, answer) {
        (Prompt::Text(text), Answer::Text(answer)) if !frame.is_chat() => Ok(Row::Completion {
            prompt: text.clone(),
            response: answer,
        }),
        (Prompt::Text(text), Answer::Text(answer)) => {
            Question::new(text.clone(), "prompt")?.answered(answer, frame, has_template)
        }
        (Prompt::Question(question), Answer::Text(answer)) => {
            question.answered(answer, frame, has_template)
        }
        (prompt, answer) => {
            let answer = answer.into_messages();
            frame
                .around(prompt.followed_by(answer, is_whole))
                .map(Row::Chat)
        }
    }
}

/// Splits two texts into the prompt that they have in common and what follows it. A cut inside a
/// word, or behind the space before one, would give other tokens than generation sees.
fn whole_texts(chosen: &str, rejected: &str) -> (Row, Row) {
    let pairs = chosen.char_indices().zip(rejected.chars());
    let common = pairs
        .take_while(|((_, a), b)| a == b)
        .last()
        .map_or(0, |((at, c), _)| at + c.len_utf8());
    let prompt = chosen[..common]
        .rfind(char::is_whitespace)
        .map_or("", |end| &chosen[..end]);
    let split = |text: &str| Row::Completion {
        prompt: prompt.to_owned(),
        response: text[prompt.len()..].to_owned(),
    };
    (split(chosen), split(rejected))
}

fn in_common(a: &[Message], b: &[Message]) -> usize {
    let pairs = a.iter().zip(b);
    pairs.take_while(|(a, b)| a.reads_as(b)).count()
}

/// Whether two rows have the same text.
fn reads_as(a: &Row, b: &Row) -> bool {
    match (a, b) {
        (Row::Chat(a), Row::Chat(b)) => {
            let (a, b) = (&a.messages, &b.messages);
            a.len() == b.len() && in_common(a, b) == a.len()
        }
        (a, b) => a == b,
    }
}

fn untrain_common(chosen: &mut Row, rejected: &mut Row) {
    let (Row::Chat(chosen), Row::Chat(rejected)) = (chosen, rejected) else {
        return;
    };
    let (a, b) = (&chosen.messages, &rejected.messages);
    // Where one goes on from the end of the other, the answer is the last message of the shorter.
    let shortest = a.len().min(b.len());
    let common = in_common(a, b).min(shortest.saturating_sub(1));
    for conversation in [chosen, rejected] {
        for message in &mut conversation.messages[..common] {
            message.trains = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::row_format::tests::{read, read_as, script};
    use super::*;
    use crate::recipe::plan::DataFormat;
    use serde_json::json;

    /// Both sides of a pair: scripts of conversations, or prompt and response.
    #[track_caller]
    fn sides(row: Result<Row, String>) -> [String; 2] {
        let side = |row: &Row| match row {
            Row::Chat(chat) => script(chat),
            Row::Completion { prompt, response } => format!("{prompt:?} {response:?}"),
            other => panic!("{other:?} is no answer"),
        };
        match row {
            Ok(Row::Preference { chosen, rejected }) => [side(&chosen), side(&rejected)],
            other => panic!("{other:?} is no preference"),
        }
    }

    #[test]
    fn texts_are_completions_or_answers_to_a_question() {
        let cases = [
            (
                json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
                ["\"a\" \"b\"", "\"a\" \"c\""],
            ),
            (
                json!({"prompt": "a", "chosen": "b", "rejected": "c", "system": "s"}),
                [
                    "system: s | user: a | assistant*: b",
                    "system: s | user: a | assistant*: c",
                ],
            ),
            (
                json!({"system": "", "question": "a", "chosen": "b", "rejected": "c"}),
                ["user: a | assistant*: b", "user: a | assistant*: c"],
            ),
            (
                json!({
                    "instruction": "a", "input": "b", "history": [["x", "y"]],
                    "chosen": "c", "rejected": "d",
                }),
                [
                    "user: x | assistant: y | user: a\n\nb | assistant*: c",
                    "user: x | assistant: y | user: a\n\nb | assistant*: d",
                ],
            ),
            // Without a prompt, it is what both begin with, in whole words.
            (
                json!({
                    "chosen": "\n\nHuman: é?\n\nAssistant: It is.",
                    "rejected": "\n\nHuman: é?\n\nAssistant: I can",
                }),
                [
                    "\"\\n\\nHuman: é?\\n\\nAssistant:\" \" It is.\"",
                    "\"\\n\\nHuman: é?\\n\\nAssistant:\" \" I can\"",
                ],
            ),
            (
                json!({"chosen": "éa", "rejected": "éb"}),
                ["\"\" \"éa\"", "\"\" \"éb\""],
            ),
        ];
        for (value, want) in cases {
            assert_eq!(sides(read(value, true)), want);
        }
        let value = json!({"question": "a", "chosen": "b", "rejected": "c"});
        let [chosen, _] = sides(read(value, false));
        assert!(chosen.contains("### Instruction:\\na\\n"), "{chosen}");
    }

    #[test]
    fn messages_follow_the_prompt_or_hold_it() {
        let user = json!({"role": "user", "content": "a"});
        let said = |content: &str| json!({"role": "assistant", "content": content});
        let want = ["user: a | assistant*: b", "user: a | assistant*: c"];
        let (b, c) = (said("b"), said("c"));
        let cases = [
            // TRL, with the prompt apart and inside.
            json!({"prompt": [user], "chosen": [b], "rejected": [c]}),
            json!({"chosen": [user, b], "rejected": [user, c]}),
            json!({"prompt": [user], "chosen": [user, b], "rejected": [user, c]}),
            // UltraFeedback.
            json!({
                "prompt": "a", "messages": [user, b], "chosen": [user, b], "rejected": [user, c],
            }),
            json!({"messages": [user, b], "chosen": [user, b], "rejected": [user, c]}),
            // LLaMA-Factory.
            json!({
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            }),
            json!({"prompt": "a", "chosen": [b], "rejected": [c]}),
            json!({"prompt": [user], "chosen": "b", "rejected": "c"}),
            json!({"messages": [user], "chosen": "b", "rejected": "c"}),
            json!({"prompt": "a", "chosen": "b", "rejected": [c]}),
        ];
        for value in cases {
            assert_eq!(sides(read(value.clone(), true)), want, "{value}");
        }
    }

    #[test]
    fn what_both_begin_with_does_not_train() {
        let turns = |contents: &[&str]| {
            let roles = ["user", "assistant"].into_iter().cycle();
            let turns = contents.iter().zip(roles);
            turns
                .map(|(content, role)| json!({"role": role, "content": content}))
                .collect::<Value>()
        };
        let value = json!({
            "chosen": turns(&["a", "b", "c", "d", "e", "f"]),
            "rejected": turns(&["a", "b", "c", "x"]),
        });
        assert_eq!(
            sides(read(value, true)),
            [
                "user: a | assistant: b | user: c | assistant*: d | user: e | assistant*: f",
                "user: a | assistant: b | user: c | assistant*: x"
            ]
        );
        let value = json!({
            "chosen": turns(&["a", "b"]), "rejected": turns(&["a", "b", "c", "d"]),
        });
        assert_eq!(
            sides(read(value, true)),
            [
                "user: a | assistant*: b",
                "user: a | assistant*: b | user: c | assistant*: d"
            ]
        );
    }

    #[test]
    fn system_and_tools_are_of_both_sides_and_fields_are_mapped() {
        let value = json!({
            "sys": "s", "tools": [{"name": "f"}], "q": "a", "good": "b", "bad": {"text": "c"},
        });
        let fields = [
            ("system", "sys"),
            ("prompt", "q"),
            ("chosen", "good"),
            ("rejected", "bad.text"),
        ];
        let row = read_as(value, DataFormat::Auto, &fields, true);
        let Ok(Row::Preference { rejected, .. }) = &row else {
            panic!("{row:?} is no preference")
        };
        assert!(matches!(rejected.as_ref(), Row::Chat(chat) if chat.tools.is_some()));
        assert_eq!(
            sides(row),
            [
                "system: s | user: a | assistant*: b",
                "system: s | user: a | assistant*: c"
            ]
        );
    }

    #[test]
    fn bad_rows_say_what_is_wrong() {
        let same =
            "`chosen` and `rejected` are the same, so neither can be preferred; remove the row";
        let cases = [
            (json!({"chosen": "x", "rejected": "x"}), same),
            (
                json!({
                    "prompt": "a",
                    "chosen": [{"role": "assistant", "content": "x"}],
                    "rejected": [{"from": "gpt", "value": "x"}],
                }),
                same,
            ),
            (
                json!({"chosen": "x", "rejected": 1}),
                "`rejected` must be a string or an array of messages, found a number",
            ),
            (
                json!({"prompt": "x", "chosen": [{"role": "user"}], "rejected": "x"}),
                "`chosen[0].content` is missing",
            ),
            (
                json!({"question": 1, "chosen": "x", "rejected": "y"}),
                "`question` must be a string, found a number",
            ),
        ];
        for (value, want) in cases {
            assert_eq!(read(value, true), Err(want.to_owned()));
        }
    }
}
