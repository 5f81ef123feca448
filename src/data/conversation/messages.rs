//! Messages of a conversation, as OpenAI and Hugging Face write them (`role`, `content`) or
//! ShareGPT (`from`, `value`), told apart turn by turn.
//!
//! Roles get their common names: `human` is `user`; `gpt`, `model` and the names of some chat
//! services are `assistant`; `function`, `observation` and `function_response` are `tool`, since
//! templates know that name and pass over the others in silence. `developer` stays. Content is a
//! string, a list of text parts (kept, for templates that take lists), or null in an assistant's
//! turn that calls tools or reasons. All other fields of a message reach the template as they are.
//!
//! An assistant's turn trains unless `train` (or `training`) is false or OpenAI's `weight` is 0;
//! these never reach the template.

use std::fmt;

use serde_json::{Map, Value};

use super::fields::{Fields, unpacked};
use super::{Message, tools};
use crate::data::row_error::{RowError, shown};

/// What roles are called in datasets, and what in templates.
const ROLES: [(&str, &str); 16] = [
    ("user", "user"),
    ("assistant", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("human", "user"),
    ("gpt", "assistant"),
    ("developer", "developer"),
    ("function", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
    (FUNCTION_CALL, "assistant"),
    ("model", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("ai", "assistant"),
];

/// ShareGPT's role of a turn whose value is a tool call as JSON.
const FUNCTION_CALL: &str = "function_call";

/// Fields that say whether a turn trains.
const FLAGS: [&str; 3] = ["train", "training", "weight"];

/// Fields that hold an assistant's reasoning.
const REASONING: [&str; 3] = ["reasoning", "reasoning_content", "thinking"];

/// Where a message stands in a row, for errors.
#[derive(Clone, Copy)]
pub(super) struct Spot<'a> {
    /// The row's key.
    pub key: &'a str,
    /// The place in the list, where it is one.
    pub index: Option<usize>,
}

impl Spot<'_> {
    /// The path of one of the message's fields.
    pub fn field(&self, name: &str) -> String {
        format!("{self}.{name}")
    }
}

impl fmt::Display for Spot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index {
            Some(index) => write!(f, "{}[{index}]", self.key),
            None => f.write_str(self.key),
        }
    }
}

/// Reads a list of messages, at least one.
pub(super) fn list(value: Value, key: &str, fields: &Fields) -> Result<Vec<Message>, RowError> {
    let items = match unpacked(value, || key.to_owned())? {
        Value::Array(items) => items,
        other => return Err(RowError::wrong_type(key, "an array of messages", &other)),
    };
    if items.is_empty() {
        return Err(RowError::blank(key));
    }
    let read = |(index, item)| {
        let index = Some(index);
        message(item, Spot { key, index }, fields)
    };
    items.into_iter().enumerate().map(read).collect()
}

/// Reads one message.
pub(super) fn message(value: Value, spot: Spot<'_>, fields: &Fields) -> Result<Message, RowError> {
    let mut turn = match value {
        Value::Object(turn) => turn,
        other => return Err(RowError::wrong_type(spot.to_string(), "an object", &other)),
    };
    let named = |names: [&'static str; 2], turn: &Map<String, Value>| {
        let not_null = names.into_iter().find(|name| fields.has(turn, name));
        not_null.or_else(|| {
            names
                .into_iter()
                .find(|name| fields.get(turn, name).is_some())
        })
    };
    let content_name = named(["content", "value"], &turn);
    let role_name = named(["role", "from"], &turn);
    // A turn with neither is spoken of in the dialect of its other half.
    let missing_role = if content_name == Some("value") {
        "from"
    } else {
        "role"
    };
    let missing_content = if role_name == Some("from") {
        "value"
    } else {
        "content"
    };
    let role_key = || spot.field(fields.key(role_name.unwrap_or(missing_role)));
    let content_key = || spot.field(fields.key(content_name.unwrap_or(missing_content)));
    for (name, to) in [(role_name, "role"), (content_name, "content")] {
        match name {
            Some(name) => fields.rename(&mut turn, name, to),
            // Where another key is to be read, this one is not what was asked for.
            None => drop(turn.shift_remove(to)),
        }
    }
    let (said, role) = known_role(turn.get("role"), role_key)?;
    turn.insert("role".to_owned(), Value::from(role));
    if said == FUNCTION_CALL {
        tools::call_in_content(&mut turn, spot)?;
    }
    tools::calls(&mut turn, spot)?;
    let trains = trains(&mut turn, role, spot)?;
    check_content(&turn, role, spot, content_key)?;
    Ok(Message {
        role: role.to_owned(),
        fields: turn,
        trains,
    })
}

/// A role's name in [`ROLES`] and in templates.
fn known_role(
    value: Option<&Value>,
    key: impl Fn() -> String,
) -> Result<(&'static str, &'static str), RowError> {
    let found = match value {
        None => return Err(RowError::missing(key())),
        Some(Value::String(found)) => found,
        Some(other) => return Err(RowError::wrong_type(key(), "a string", other)),
    };
    let known = ROLES
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(found));
    known.copied().ok_or_else(|| RowError::UnknownRole {
        key: key(),
        found: shown(found),
    })
}

/// Takes the flags out of a message and reads them.
fn trains(turn: &mut Map<String, Value>, role: &str, spot: Spot<'_>) -> Result<bool, RowError> {
    let mut said: Option<(bool, &str)> = None;
    for name in FLAGS {
        let Some(flag) = turn.shift_remove(name) else {
            continue;
        };
        let flag = match (&flag, name) {
            (Value::Null, _) => continue,
            (Value::Number(number), "weight") => match number.as_f64() {
                Some(0.0) => false,
                Some(1.0) => true,
                _ => {
                    return Err(RowError::OutOfRange {
                        key: spot.field(name),
                        found: number.to_string(),
                        allowed: "weights are 0 or 1",
                    });
                }
            },
            (other, "weight") => {
                return Err(RowError::wrong_type(spot.field(name), "0 or 1", other));
            }
            (Value::Bool(flag), _) => *flag,
            (other, _) => {
                return Err(RowError::wrong_type(
                    spot.field(name),
                    "true or false",
                    other,
                ));
            }
        };
        match said {
            Some((before, other)) if before != flag => {
                return Err(RowError::Contradiction {
                    key: spot.field(name),
                    other: format!("`{}`", spot.field(other)),
                });
            }
            _ => said = Some((flag, name)),
        }
    }
    match said {
        Some((true, name)) if role != "assistant" => Err(RowError::NotTrainable {
            key: spot.field(name),
        }),
        _ => Ok(role == "assistant" && said.is_none_or(|(flag, _)| flag)),
    }
}

fn check_content(
    turn: &Map<String, Value>,
    role: &str,
    spot: Spot<'_>,
    key: impl Fn() -> String,
) -> Result<(), RowError> {
    let mut says_more = turn.get("tool_calls").is_some_and(|calls| !calls.is_null());
    for name in REASONING {
        match turn.get(name) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => says_more |= !text.is_empty(),
            Some(other) => return Err(RowError::wrong_type(spot.field(name), "a string", other)),
        }
    }
    let may_lack = role == "assistant" && says_more;
    match turn.get("content") {
        Some(Value::String(_)) => Ok(()),
        None | Some(Value::Null) if may_lack => Ok(()),
        None => Err(RowError::missing(key())),
        Some(Value::Array(parts)) if !parts.is_empty() => {
            let mut parts = parts.iter().enumerate();
            parts.try_for_each(|(i, part)| check_part(part, || format!("{}[{i}]", key())))
        }
        Some(Value::Array(_)) if may_lack => Ok(()),
        Some(Value::Array(_)) => Err(RowError::blank(key())),
        Some(other) => Err(RowError::wrong_type(key(), "a string", other)),
    }
}

/// `{"type": "text", "text": …}`
fn check_part(part: &Value, key: impl Fn() -> String) -> Result<(), RowError> {
    let Value::Object(part) = part else {
        return Err(RowError::wrong_type(key(), "an object", part));
    };
    let inner = |name: &str| format!("{}.{name}", key());
    let string = |name: &str| match part.get(name) {
        None => Err(RowError::missing(inner(name))),
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(RowError::wrong_type(inner(name), "a string", other)),
    };
    match string("type")? {
        "text" => string("text").map(|_| ()),
        kind if ["image", "audio", "video"]
            .iter()
            .any(|media| kind.contains(media)) =>
        {
            Err(RowError::Unsupported {
                key: key(),
                feature: "images, audio and video are",
            })
        }
        _ => Err(RowError::Unsupported {
            key: key(),
            feature: "parts of content other than text are",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::row_format::tests::{read, read_chat, script};
    use super::*;
    use serde_json::json;

    #[test]
    fn bad_rows_say_what_is_wrong() {
        let cases = [
            (json!([]), "`messages` is empty"),
            (json!("[]"), "`messages` is empty"),
            (
                json!("x"),
                "`messages` must be an array of messages, found a string",
            ),
            (
                json!(null),
                "`messages` must be an array of messages, found null",
            ),
            (
                json!([1]),
                "`messages[0]` must be an object, found a number",
            ),
            (json!([{"content": "x"}]), "`messages[0].role` is missing"),
            (json!([{"value": "x"}]), "`messages[0].from` is missing"),
            (json!([{"from": "gpt"}]), "`messages[0].value` is missing"),
            (
                json!([{"role": "user"}]),
                "`messages[0].content` is missing",
            ),
            (
                json!([{"role": "bot", "content": "x"}]),
                "`messages[0].role` is `bot`; roles are system, developer, user, assistant and tool, or ShareGPT's human, gpt, function_call and observation",
            ),
            (
                json!([{"role": null, "content": "x"}]),
                "`messages[0].role` must be a string, found null",
            ),
            (
                json!([{"role": "user", "content": null}]),
                "`messages[0].content` must be a string, found null",
            ),
            (
                json!([{"role": "user", "content": null, "reasoning": "hm"}]),
                "`messages[0].content` must be a string, found null",
            ),
            (
                json!([{"role": "assistant", "content": null}]),
                "`messages[0].content` must be a string, found null",
            ),
            (
                json!([{"role": "assistant", "content": "x", "thinking": [1]}]),
                "`messages[0].thinking` must be a string, found an array",
            ),
            (
                json!([{"role": "user", "content": []}]),
                "`messages[0].content` is empty",
            ),
            (
                json!([{"role": "user", "content": ["x"]}]),
                "`messages[0].content[0]` must be an object, found a string",
            ),
            (
                json!([{"role": "user", "content": [{"type": "text"}]}]),
                "`messages[0].content[0].text` is missing",
            ),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}]),
                "`messages[0].content[1]`: images, audio and video are not supported yet; remove the row or the key",
            ),
            (
                json!([{"role": "user", "content": [{"type": "refusal"}]}]),
                "`messages[0].content[0]`: parts of content other than text are not supported yet; remove the row or the key",
            ),
        ];
        for (messages, want) in cases {
            assert_eq!(
                read(json!({ "messages": messages }), true),
                Err(want.to_owned())
            );
        }
    }

    #[test]
    fn flags_choose_the_turns_that_train_and_stay_out_of_templates() {
        let assistant = |flags: Value| {
            let mut turn = json!({"role": "assistant", "content": "x"});
            let object = turn.as_object_mut().unwrap();
            object.extend(flags.as_object().unwrap().clone());
            json!({ "messages": [turn] })
        };
        let cases = [
            (json!({}), true),
            (json!({"train": null, "weight": null}), true),
            (json!({"train": true}), true),
            (json!({"train": false}), false),
            (json!({"training": false}), false),
            (json!({"weight": 1}), true),
            (json!({"weight": 0}), false),
            (json!({"weight": 0.0, "train": false}), false),
        ];
        for (flags, want) in cases {
            let message = read_chat(assistant(flags.clone())).messages.remove(0);
            assert_eq!(message.trains, want, "{flags}");
            let keys: Vec<&str> = message.fields.keys().map(String::as_str).collect();
            assert_eq!(keys, ["role", "content"], "{flags}");
        }
        let cases = [
            (
                json!({"weight": 0.5}),
                "`messages[0].weight` is 0.5; weights are 0 or 1",
            ),
            (
                json!({"weight": true}),
                "`messages[0].weight` must be 0 or 1, found a boolean",
            ),
            (
                json!({"train": 1}),
                "`messages[0].train` must be true or false, found a number",
            ),
            (
                json!({"train": true, "weight": 0}),
                "`messages[0].weight` contradicts `messages[0].train`; keep one of the two",
            ),
            (
                json!({"role": "user", "train": true}),
                "`messages[0].train`: only turns of the assistant can be chosen to train; remove it (data.train_on_inputs trains every token)",
            ),
        ];
        for (flags, want) in cases {
            assert_eq!(read(assistant(flags), true), Err(want.to_owned()));
        }
        let user = json!({"messages": [{"role": "user", "content": "x", "train": false}]});
        assert_eq!(script(&read_chat(user)), "user: x");
    }

    #[test]
    fn further_fields_reach_the_template_in_their_order() {
        let value = json!({"messages": [
            {"content": "x", "weight": 0, "name": "n", "role": "assistant", "z": 1},
        ]});
        let messages = read_chat(value).messages;
        let keys: Vec<String> = messages[0].to_json().keys().cloned().collect();
        assert_eq!(keys, ["content", "name", "role", "z"]);
    }

    #[test]
    fn sharegpt_turns_become_messages() {
        let value = json!({
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b", "weight": 0},
                {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
                {"from": "observation", "value": "1"},
                {"from": "function_call", "value": "no call"},
                {"role": "user", "content": "c"},
            ],
            "system": "s",
            "tools": "[{\"name\": \"f\"}]",
        });
        let chat = read_chat(value);
        assert_eq!(
            script(&chat),
            "system: s | user: a | assistant: b | assistant*:  | tool: 1 | assistant*: no call | user: c"
        );
        assert_eq!(
            Value::Object(chat.messages[3].to_json()).to_string(),
            r#"{"role":"assistant","content":"","tool_calls":[{"type":"function","function":{"name":"f","arguments":{"x":1}}}]}"#
        );
        assert_eq!(chat.tools, Some(json!([{"name": "f"}])));
        for from in ["gpt", "assistant", "model", "chatgpt", "bing", "bard"] {
            let value = json!({"conversation": [{"from": from, "value": "x"}]});
            assert_eq!(script(&read_chat(value)), "assistant*: x");
        }
        let error = read(json!({"conversation": [{"from": "x", "value": ""}]}), true);
        assert!(
            error
                .unwrap_err()
                .starts_with("`conversation[0].from` is `x`; roles are")
        );
    }

    #[test]
    fn reasoning_parts_and_variables_reach_the_template() {
        let messages = json!([
            {"role": "developer", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": null, "reasoning_content": "hm"},
        ]);
        let variables = json!({"enable_thinking": true});
        let want = read_chat(json!({"messages": messages, "chat_template_kwargs": variables}));
        assert_eq!(Value::Object(want.messages[0].to_json()), messages[0]);
        assert_eq!(Value::Object(want.messages[1].to_json()), messages[1]);
        assert_eq!(Value::Object(want.variables.clone()), variables);
        // As a CSV has it.
        let text = json!({
            "messages": messages.to_string(), "chat_template_kwargs": variables.to_string(),
        });
        assert_eq!(read_chat(text), want);
        let error = read(
            json!({"messages": messages, "chat_template_kwargs": [1]}),
            true,
        );
        assert_eq!(
            error.unwrap_err(),
            "`chat_template_kwargs` must be an object, found an array"
        );
    }
}
