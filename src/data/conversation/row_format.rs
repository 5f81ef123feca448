//! Which format a row has, and the row read in it.
//!
//! | format | keys |
//! |---|---|
//! | `preference` | `chosen` and `rejected`, as texts or messages, with or without a `prompt` |
//! | `tokens` | `input_ids`, `labels`, `attention_mask` |
//! | `messages` | `messages` of `role` and `content`, `tools`, `chat_template_kwargs` |
//! | `sharegpt` | `conversations` (or `conversation`) of `from` and `value`, `system`, `tools` |
//! | `alpaca` | `instruction`, `input`, `output` (or `context`, `response`), `system`, `history` |
//! | `prompt_completion` | `prompt` with `completion` or `response`; `question` with `answer`; `query` with `response`; `input` with `output` |
//! | `text` | `text` |
//!
//! The first format of the table whose keys a row has is its format: datasets of preferences often
//! carry `prompt` and `messages` too, and chats a `prompt` or a `text`. Keys that hold null count
//! only where no others tell. Mapped keys count under lorafit's names.
//!
//! `prompt` with `completion` is a text and its continuation, as for TRL; the other pairs of that
//! format are a question and its answer, read as `instruction` and `output` are. Lists and objects
//! may be given as JSON text, save where plain text is as good: in a pair and in preferences.

use serde_json::{Map, Value};

use super::fields::{Columns, Fields};
use super::frame::Frame;
use super::{Row, alpaca, completion, messages, preference, pretokenised};
use crate::data::row_error::{RowError, shown};
use crate::recipe::plan::DataFormat;

/// How many of a row's keys an error shows.
const SHOWN_KEYS: usize = 10;

/// How rows are read.
#[derive(Debug, Clone, Copy)]
pub struct RowOptions<'a> {
    /// The format; `Auto` tells it for each row.
    pub format: DataFormat,
    /// What the dataset calls the fields.
    pub fields: &'a Fields,
    /// Whether the tokenizer has a chat template, so that a question and its answer are a chat.
    pub has_template: bool,
}

/// Tells the format of a row from its keys.
///
/// # Errors
/// No known keys, or a mapped key that is missing.
pub fn detect(object: &Map<String, Value>, fields: &Fields) -> Result<DataFormat, RowError> {
    fields.check(object)?;
    by_keys(&|name| fields.has(object, name))
        .or_else(|| by_keys(&|name| fields.get(object, name).is_some()))
        .ok_or_else(|| {
            let keys = object.keys().take(SHOWN_KEYS);
            let keys: Vec<String> = keys.map(|key| format!("`{}`", shown(key))).collect();
            RowError::UnknownFormat {
                keys: match (keys.is_empty(), object.len() > SHOWN_KEYS) {
                    (true, _) => "none".to_owned(),
                    (false, true) => keys.join(", ") + ", …",
                    (false, false) => keys.join(", "),
                },
            }
        })
}

fn by_keys(has: &dyn Fn(&str) -> bool) -> Option<DataFormat> {
    if has("chosen") && has("rejected") {
        Some(DataFormat::Preference)
    } else if has("input_ids") {
        Some(DataFormat::Tokens)
    } else if has("messages") {
        Some(DataFormat::Messages)
    } else if has("conversations") || has("conversation") {
        Some(DataFormat::Sharegpt)
    } else if has("instruction") {
        Some(DataFormat::Alpaca)
    } else if completion::pair(has).is_some() {
        Some(DataFormat::PromptCompletion)
    } else if has("text") {
        Some(DataFormat::Text)
    } else {
        None
    }
}

/// Checks a row and gives it its form.
///
/// # Errors
/// Missing or mistyped keys, unknown roles, contradictions, what cannot be trained on.
pub fn row(object: Map<String, Value>, options: &RowOptions<'_>) -> Result<Row, RowError> {
    let format = match options.format {
        DataFormat::Auto => detect(&object, options.fields)?,
        named => named,
    };
    let mut columns = Columns::new(object, options.fields)?;
    match format {
        // Told apart above.
        DataFormat::Auto | DataFormat::Messages => chat(&mut columns, "messages"),
        DataFormat::Sharegpt => {
            let is_singular = !columns.has("conversations") && columns.has("conversation");
            let name = if is_singular {
                "conversation"
            } else {
                "conversations"
            };
            chat(&mut columns, name)
        }
        DataFormat::Alpaca => alpaca::row(&mut columns, options.has_template),
        DataFormat::PromptCompletion => completion::row(&mut columns, options.has_template),
        DataFormat::Text => {
            let text = columns.string("text")?;
            if text.is_empty() {
                return Err(RowError::blank(columns.key("text")));
            }
            Ok(Row::Text(text))
        }
        DataFormat::Tokens => pretokenised::row(&mut columns),
        DataFormat::Preference => preference::row(&mut columns, options.has_template),
    }
}

fn chat(columns: &mut Columns<'_>, name: &'static str) -> Result<Row, RowError> {
    let value = columns.required(name)?;
    let messages = messages::list(value, columns.key(name), columns.fields())?;
    let frame = Frame::take(columns)?;
    frame.around(messages).map(Row::Chat)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::conversation::{Conversation, Message};
    use proptest::prelude::*;
    use serde_json::json;

    /// Reads a row in the format that its keys tell.
    pub fn read(value: Value, has_template: bool) -> Result<Row, String> {
        read_as(value, DataFormat::Auto, &[], has_template)
    }

    /// Reads a row in a format, with a mapping of fields.
    pub fn read_as(
        value: Value,
        format: DataFormat,
        fields: &[(&str, &str)],
        has_template: bool,
    ) -> Result<Row, String> {
        let Value::Object(object) = value else {
            panic!("an object")
        };
        let pairs: Vec<(String, String)> = fields
            .iter()
            .map(|(name, key)| ((*name).to_owned(), (*key).to_owned()))
            .collect();
        let options = RowOptions {
            format,
            fields: &Fields::new(&pairs).unwrap(),
            has_template,
        };
        row(object, &options).map_err(|e| e.to_string())
    }

    /// The conversation of a row.
    #[track_caller]
    pub fn read_chat(value: Value) -> Conversation {
        match read(value, true) {
            Ok(Row::Chat(conversation)) => conversation,
            other => panic!("{other:?} is no chat"),
        }
    }

    /// Roles and contents of a conversation, with an asterisk where they train.
    pub fn script(conversation: &Conversation) -> String {
        let line = |message: &Message| {
            let content = match message.fields.get("content") {
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
                None => "-".to_owned(),
            };
            let star = if message.trains { "*" } else { "" };
            format!("{}{star}: {content}", message.role)
        };
        let lines: Vec<String> = conversation.messages.iter().map(line).collect();
        lines.join(" | ")
    }

    fn detected(value: &Value, fields: &[(&str, &str)]) -> Result<DataFormat, String> {
        let pairs: Vec<(String, String)> = fields
            .iter()
            .map(|(name, key)| ((*name).to_owned(), (*key).to_owned()))
            .collect();
        let fields = Fields::new(&pairs).unwrap();
        detect(value.as_object().unwrap(), &fields).map_err(|e| e.to_string())
    }

    #[test]
    fn formats_are_told_from_keys() {
        use DataFormat::{Alpaca, Messages, Preference, PromptCompletion, Sharegpt, Text, Tokens};
        let cases = [
            (json!({"messages": []}), Messages),
            (json!({"messages": null}), Messages),
            (json!({"messages": null, "text": "x"}), Text),
            (
                json!({"text": "x", "prompt": "x", "messages": []}),
                Messages,
            ),
            (json!({"conversations": []}), Sharegpt),
            (json!({"conversation": []}), Sharegpt),
            (json!({"instruction": "x"}), Alpaca),
            (
                json!({"instruction": "x", "input": "y", "output": "z", "text": "t"}),
                Alpaca,
            ),
            (json!({"prompt": "x", "completion": "y"}), PromptCompletion),
            (json!({"prompt": "x", "response": "y"}), PromptCompletion),
            (
                json!({"question": "x", "answer": "y", "text": "t"}),
                PromptCompletion,
            ),
            (json!({"query": "x", "response": "y"}), PromptCompletion),
            (json!({"input": "x", "output": "y"}), PromptCompletion),
            (json!({"text": "x", "label": 1}), Text),
            (json!({"input_ids": [], "text": "x"}), Tokens),
            (
                json!({"prompt": "x", "chosen": [], "rejected": [], "messages": []}),
                Preference,
            ),
            (
                json!({"conversations": [], "chosen": {}, "rejected": {}}),
                Preference,
            ),
            (json!({"chosen": "x", "text": "y"}), Text),
        ];
        for (value, want) in cases {
            assert_eq!(detected(&value, &[]), Ok(want), "{value}");
        }
        let dialog = json!({"dialog": [], "text": "x", "doc": {"body": "y"}});
        assert_eq!(detected(&dialog, &[("messages", "dialog")]), Ok(Messages));
        assert_eq!(detected(&dialog, &[("text", "doc.body")]), Ok(Text));
        assert_eq!(
            detected(&dialog, &[("messages", "dialogue")]),
            Err("`dialogue` is missing".to_owned())
        );
    }

    #[test]
    fn unknown_keys_are_listed_with_what_is_known() {
        assert_eq!(
            detected(&json!({"prompt": "x", "id": 1}), &[]).unwrap_err(),
            "cannot tell the format of this row from its keys (`prompt`, `id`); supported are `messages`, `conversations`, `instruction` with `output`, `prompt` with `completion`, `question` with `answer`, `text`, `input_ids`, and `chosen` with `rejected`; say what the dataset calls them, as in `fields: {messages: dialog}`"
        );
        let error = detected(&json!({}), &[]).unwrap_err();
        assert!(error.contains("from its keys (none)"), "{error}");
        let many: Map<String, Value> = (0..20)
            .map(|i| (format!("{i}{}", "k".repeat(1000)), Value::Null))
            .collect();
        let error = detected(&Value::Object(many), &[]).unwrap_err();
        assert!(error.contains(", …);") && error.len() < 1500, "{error}");
    }

    #[test]
    fn mapped_fields_are_read_and_named_as_the_dataset_has_them() {
        let fields = [
            ("messages", "data.turns"),
            ("role", "who"),
            ("content", "said"),
        ];
        let value = json!({"id": 7, "data": {"turns": [
            {"who": "user", "said": "a", "mood": "calm"},
            {"said": "b", "who": "assistant", "weight": 0},
            {"who": "assistant", "said": "c"},
        ]}});
        let Ok(Row::Chat(chat)) = read_as(value, DataFormat::Auto, &fields, true) else {
            panic!("a chat")
        };
        assert_eq!(script(&chat), "user: a | assistant: b | assistant*: c");
        let seen = Value::Object(chat.messages[0].to_json());
        assert_eq!(
            seen.to_string(),
            r#"{"role":"user","content":"a","mood":"calm"}"#
        );

        let cases = [
            (json!({"data": {}}), "`data.turns` is missing"),
            (
                json!({"data": {"turns": [{"role": "user", "said": "x"}]}}),
                "`data.turns[0].who` is missing",
            ),
            (
                json!({"data": {"turns": [{"who": "user", "content": "x"}]}}),
                "`data.turns[0].said` is missing",
            ),
            (
                json!({"data": {"turns": [{"who": "user", "said": 1}]}}),
                "`data.turns[0].said` must be a string, found a number",
            ),
        ];
        for (value, want) in cases {
            let error = read_as(value, DataFormat::Messages, &fields, true).unwrap_err();
            assert_eq!(error, want);
        }

        let speakers = [("from", "speaker"), ("value", "text")];
        let value = json!({"conversations": [
            {"speaker": "Human", "text": "a"},
            {"speaker": "GPT", "text": "b"},
        ]});
        let Ok(Row::Chat(chat)) = read_as(value, DataFormat::Auto, &speakers, true) else {
            panic!("a chat")
        };
        assert_eq!(script(&chat), "user: a | assistant*: b");
        let text = json!({"doc": {"body": "x"}});
        assert_eq!(
            read_as(text, DataFormat::Auto, &[("text", "doc.body")], true),
            Ok(Row::Text("x".to_owned()))
        );
        let dolly = json!({"q": "a", "context": "b", "reply": "c"});
        let fields = [("instruction", "q"), ("output", "reply")];
        let Ok(Row::Chat(chat)) = read_as(dolly, DataFormat::Auto, &fields, true) else {
            panic!("a chat")
        };
        assert_eq!(script(&chat), "user: a\n\nb | assistant*: c");
    }

    #[test]
    fn a_named_format_needs_its_keys() {
        let cases = [
            (DataFormat::Messages, "`messages` is missing"),
            (DataFormat::Sharegpt, "`conversations` is missing"),
            (DataFormat::Alpaca, "`instruction` is missing"),
            (DataFormat::PromptCompletion, "`prompt` is missing"),
            (DataFormat::Text, "`text` is missing"),
            (DataFormat::Tokens, "`input_ids` is missing"),
            (DataFormat::Preference, "`chosen` is missing"),
        ];
        for (format, want) in cases {
            assert_eq!(
                read_as(json!({"x": 1}), format, &[], true),
                Err(want.to_owned())
            );
        }
        let cases = [
            (
                json!({"text": 1}),
                "`text` must be a string, found a number",
            ),
            (json!({"text": ""}), "`text` is empty"),
        ];
        for (value, want) in cases {
            assert_eq!(read(value, true), Err(want.to_owned()));
        }
    }

    /// Any JSON, of words that mean something here.
    fn json_value() -> impl Strategy<Value = Value> {
        let words = prop::sample::select(vec![
            "",
            "x",
            "é x",
            "user",
            "assistant",
            "human",
            "gpt",
            "function_call",
            "tool",
            "text",
            "[",
            "[1]",
            "[{}]",
            "{\"name\": \"f\"}",
            "[{\"role\": \"user\", \"content\": \"x\"}]",
        ]);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-101_i64..4).prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            words.prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                json_object(inner).prop_map(Value::Object),
            ]
        })
    }

    fn json_object(
        values: impl Strategy<Value = Value>,
    ) -> impl Strategy<Value = Map<String, Value>> {
        let keys = prop::sample::select(vec![
            "messages",
            "conversations",
            "conversation",
            "role",
            "content",
            "from",
            "value",
            "train",
            "weight",
            "tool_calls",
            "function_call",
            "function",
            "name",
            "arguments",
            "reasoning",
            "type",
            "text",
            "instruction",
            "input",
            "output",
            "system",
            "history",
            "prompt",
            "completion",
            "question",
            "answer",
            "chosen",
            "rejected",
            "input_ids",
            "labels",
            "attention_mask",
            "completion_mask",
            "tools",
            "functions",
            "chat_template_kwargs",
            "label",
            "doc",
            "a.b",
        ]);
        prop::collection::vec((keys.prop_map(str::to_owned), values), 0..7)
            .prop_map(|pairs| pairs.into_iter().collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        #[test]
        fn no_row_panics_in_any_format(object in json_object(json_value()), has_template: bool) {
            use DataFormat::{Alpaca, Auto, Messages, Preference, PromptCompletion, Sharegpt, Text, Tokens};
            let mapped = [("text".to_owned(), "doc.text".to_owned()), ("content".to_owned(), "a.b".to_owned())];
            for fields in [Fields::default(), Fields::new(&mapped).unwrap()] {
                for format in [Auto, Messages, Sharegpt, Alpaca, PromptCompletion, Text, Tokens, Preference] {
                    let options = RowOptions { format, fields: &fields, has_template };
                    if let Ok(Row::Chat(chat)) = row(object.clone(), &options) {
                        prop_assert!(!chat.messages.is_empty());
                        for message in &chat.messages {
                            prop_assert!(!message.trains || message.role == "assistant");
                            prop_assert_eq!(message.fields.get("role").unwrap(), &message.role);
                            for flag in ["train", "training", "weight"] {
                                prop_assert!(!message.fields.contains_key(flag));
                            }
                        }
                    }
                }
            }
        }
    }
}
