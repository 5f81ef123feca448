//! What a row says about a conversation beside its messages: a `system` prompt, `tools`, and
//! `chat_template_kwargs`, further variables of the chat template.

use serde_json::{Map, Value};

use super::fields::{Columns, unpacked};
use super::tools;
use super::{Conversation, Message};
use crate::data::faults::RowError;

/// What a row says about a conversation beside its messages.
#[derive(Debug, Clone)]
pub(super) struct Frame<'a> {
    /// The system prompt, empty where there is none.
    pub system: String,
    system_key: &'a str,
    /// Tool definitions.
    pub tools: Option<Value>,
    variables: Map<String, Value>,
}

impl<'a> Frame<'a> {
    /// Takes it out of a row.
    pub fn take(columns: &mut Columns<'a>) -> Result<Self, RowError> {
        Ok(Self {
            system: columns.optional_string("system")?,
            system_key: columns.key("system"),
            tools: tools::definitions(columns)?,
            variables: variables(columns)?,
        })
    }

    /// Whether it says something that only a chat can hold.
    pub fn is_chat(&self) -> bool {
        !self.system.is_empty() || self.tools.is_some()
    }

    /// The conversation of some messages; the system prompt comes first.
    pub fn around(&self, mut messages: Vec<Message>) -> Result<Conversation, RowError> {
        if !self.system.is_empty() {
            let system = Message::new("system", self.system.as_str());
            match messages.first() {
                Some(first) if first.role != "system" => messages.insert(0, system),
                // Some datasets say it twice.
                Some(first) if first.fields.get("content") == system.fields.get("content") => {}
                Some(_) => {
                    return Err(RowError::Contradiction {
                        key: self.system_key.to_owned(),
                        other: "the system message of the conversation".to_owned(),
                    });
                }
                None => messages.push(system),
            }
        }
        Ok(Conversation {
            messages,
            tools: self.tools.clone(),
            variables: self.variables.clone(),
        })
    }
}

fn variables(columns: &mut Columns<'_>) -> Result<Map<String, Value>, RowError> {
    const KEY: &str = "chat_template_kwargs";
    match columns.optional(KEY) {
        None => Ok(Map::new()),
        Some(value) => match unpacked(value, || KEY.to_owned())? {
            Value::Object(variables) => Ok(variables),
            other => Err(RowError::wrong_type(KEY, "an object", &other)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::row_format::tests::{read, read_chat, script};
    use super::*;
    use serde_json::json;

    #[test]
    fn a_system_prompt_beside_the_messages_comes_first_and_once() {
        let with = |messages: Value| json!({"system": "s", "messages": messages});
        let user = json!([{"role": "user", "content": "a"}]);
        assert_eq!(script(&read_chat(with(user))), "system: s | user: a");
        let same = json!([{"role": "system", "content": "s"}]);
        assert_eq!(script(&read_chat(with(same))), "system: s");
        let other = json!([{"role": "system", "content": "t"}]);
        assert_eq!(
            read(with(other), true).unwrap_err(),
            "`system` contradicts the system message of the conversation; keep one of the two"
        );
    }
}
