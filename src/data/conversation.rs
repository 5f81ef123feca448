//! Dataset rows in one form: a conversation, a prompt with its response, or plain text.

use serde_json::{Map, Value};

use super::faults::{RowError, type_name};
use crate::recipe::plan::DataFormat;

/// Roles that a message may have.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What was said.
    pub content: String,
    /// The whole message as it stands in the dataset, for templates that read further fields;
    /// empty for messages that are not from a dataset.
    pub fields: Map<String, Value>,
}

impl Message {
    /// A message with role and content only.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            fields: Map::new(),
        }
    }

    /// The message as a chat template sees it.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut object = self.fields.clone();
        object.insert("role".to_owned(), Value::from(self.role.as_str()));
        object.insert("content".to_owned(), Value::from(self.content.as_str()));
        object
    }
}

/// A row that can be tokenised.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// Rendered with the chat template; assistant turns train.
    Chat(Vec<Message>),
    /// The response trains; for models without a chat template.
    Completion {
        /// Text that is given.
        prompt: String,
        /// Text that is learned.
        response: String,
    },
    /// All of it trains.
    Text(String),
}

/// Tells the format of a dataset from the keys of its first row.
///
/// # Errors
/// No known key.
pub fn detect(row: &Map<String, Value>) -> Result<DataFormat, RowError> {
    if row.contains_key("messages") {
        Ok(DataFormat::Messages)
    } else if row.contains_key("instruction") {
        Ok(DataFormat::Alpaca)
    } else if row.contains_key("text") {
        Ok(DataFormat::Text)
    } else {
        let keys: Vec<String> = row.keys().take(10).map(|key| format!("`{key}`")).collect();
        Err(RowError::UnknownFormat {
            keys: if keys.is_empty() {
                "none".to_owned()
            } else {
                keys.join(", ")
            },
        })
    }
}

/// Checks a row and gives it its form. Alpaca rows become conversations where the tokenizer has a
/// chat template (`has_template`), else the prompt of the Alpaca project with its response.
///
/// # Errors
/// Missing or mistyped keys, unknown roles, features that are not there yet.
pub fn row(
    mut object: Map<String, Value>,
    format: DataFormat,
    has_template: bool,
) -> Result<Row, RowError> {
    match format {
        DataFormat::Auto => {
            let format = detect(&object)?;
            row(object, format, has_template)
        }
        DataFormat::Messages => {
            if object.get("tools").is_some_and(is_present) {
                return Err(unsupported("tools", "tool definitions are"));
            }
            messages(object.remove("messages")).map(Row::Chat)
        }
        DataFormat::Alpaca => alpaca(&object, has_template),
        DataFormat::Text => {
            let text = required_string(&object, "text")?;
            if text.is_empty() {
                return Err(blank("text"));
            }
            Ok(Row::Text(text.to_owned()))
        }
    }
}

/// Neither null nor an empty array or object.
fn is_present(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(object) => !object.is_empty(),
        _ => true,
    }
}

fn messages(value: Option<Value>) -> Result<Vec<Message>, RowError> {
    let items = match value {
        None => return Err(missing("messages")),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("messages", "an array of messages", &other)),
    };
    if items.is_empty() {
        return Err(blank("messages"));
    }
    items
        .into_iter()
        .enumerate()
        .map(|(i, item)| message(item, i))
        .collect()
}

fn message(value: Value, index: usize) -> Result<Message, RowError> {
    let path = |key: &str| format!("messages[{index}].{key}");
    let fields = match value {
        Value::Object(fields) => fields,
        other => {
            return Err(wrong_type(
                &format!("messages[{index}]"),
                "an object",
                &other,
            ));
        }
    };
    let role = match fields.get("role") {
        None => return Err(missing(&path("role"))),
        Some(Value::String(role)) => role.clone(),
        Some(other) => return Err(wrong_type(&path("role"), "a string", other)),
    };
    if !ROLES.contains(&role.as_str()) {
        return Err(RowError::UnknownRole {
            key: path("role"),
            found: role,
        });
    }
    if fields.get("tool_calls").is_some_and(is_present) {
        return Err(unsupported(&path("tool_calls"), "tool calls are"));
    }
    // These would change which turns train; silence would train the wrong ones.
    if fields.get("train") == Some(&Value::Bool(false)) {
        return Err(unsupported(&path("train"), "turns that do not train are"));
    }
    if fields
        .get("weight")
        .is_some_and(|w| w.as_f64() != Some(1.0))
    {
        return Err(unsupported(&path("weight"), "weights of turns are"));
    }
    let content = match fields.get("content") {
        None => return Err(missing(&path("content"))),
        Some(Value::String(content)) => content.clone(),
        Some(other) => return Err(wrong_type(&path("content"), "a string", other)),
    };
    Ok(Message {
        role,
        content,
        fields,
    })
}

/// `{"instruction", "input"?, "output"}`.
fn alpaca(object: &Map<String, Value>, has_template: bool) -> Result<Row, RowError> {
    let instruction = required_string(object, "instruction")?;
    let output = required_string(object, "output")?;
    let input = match object.get("input") {
        None | Some(Value::Null) => "",
        Some(Value::String(input)) => input,
        Some(other) => return Err(wrong_type("input", "a string", other)),
    };
    if instruction.is_empty() {
        return Err(blank("instruction"));
    }
    if has_template {
        let prompt = if input.is_empty() {
            instruction.to_owned()
        } else {
            format!("{instruction}\n\n{input}")
        };
        return Ok(Row::Chat(vec![
            Message::new("user", prompt),
            Message::new("assistant", output),
        ]));
    }
    Ok(Row::Completion {
        prompt: alpaca_prompt(instruction, input),
        response: output.to_owned(),
    })
}

/// The prompt that the Stanford Alpaca models were trained with.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. \
             Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    }
}

fn required_string<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a str, RowError> {
    match object.get(key) {
        None => Err(missing(key)),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong_type(key, "a string", other)),
    }
}

fn missing(key: &str) -> RowError {
    RowError::Missing {
        key: key.to_owned(),
    }
}

fn blank(key: &str) -> RowError {
    RowError::Blank {
        key: key.to_owned(),
    }
}

fn wrong_type(key: &str, expected: &'static str, found: &Value) -> RowError {
    RowError::WrongType {
        key: key.to_owned(),
        expected,
        found: type_name(found),
    }
}

fn unsupported(key: &str, feature: &'static str) -> RowError {
    RowError::Unsupported {
        key: key.to_owned(),
        feature,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value, has_template: bool) -> Result<Row, String> {
        let Value::Object(object) = value else {
            panic!("an object")
        };
        row(object, DataFormat::Auto, has_template).map_err(|e| e.to_string())
    }

    #[test]
    fn alpaca_becomes_a_chat_or_the_classic_prompt() {
        let value = json!({"instruction": "Add.", "input": "1 2", "output": "3"});
        assert_eq!(
            read(value.clone(), true).unwrap(),
            Row::Chat(vec![
                Message::new("user", "Add.\n\n1 2"),
                Message::new("assistant", "3")
            ])
        );
        let Row::Completion { prompt, response } = read(value, false).unwrap() else {
            panic!("a completion")
        };
        assert!(
            prompt.ends_with("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"),
            "{prompt}"
        );
        assert_eq!(response, "3");
    }

    #[test]
    fn bad_rows_say_what_is_wrong() {
        let cases = [
            (json!({"messages": []}), "`messages` is empty"),
            (
                json!({"messages": "x"}),
                "`messages` must be an array of messages, found a string",
            ),
            (
                json!({"messages": [{"content": "x"}]}),
                "`messages[0].role` is missing",
            ),
            (
                json!({"messages": [{"role": "bot", "content": "x"}]}),
                "`messages[0].role` is `bot`; roles are system, user, assistant and tool",
            ),
            (
                json!({"messages": [{"role": "user", "content": null}]}),
                "`messages[0].content` must be a string, found null",
            ),
            (
                json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}),
                "`messages[0].tool_calls`: tool calls are not supported yet; remove the row or the key",
            ),
            (json!({"instruction": "x"}), "`output` is missing"),
            (
                json!({"text": 1}),
                "`text` must be a string, found a number",
            ),
            (json!({"text": ""}), "`text` is empty"),
            (
                json!({"prompt": "x"}),
                "cannot tell the format of this row from its keys (`prompt`); supported are `messages`, `instruction` with `output`, and `text`",
            ),
        ];
        for (value, want) in cases {
            assert_eq!(read(value, true).unwrap_err(), want);
        }
    }

    #[test]
    fn further_fields_reach_the_template_in_their_order() {
        let value = json!({"messages": [{"content": "x", "name": "n", "role": "user"}]});
        let Row::Chat(messages) = read(value, true).unwrap() else {
            panic!("a chat")
        };
        let keys: Vec<String> = messages[0].to_json().keys().cloned().collect();
        assert_eq!(keys, ["content", "name", "role"]);
    }
}
