//! Tool calls and tool definitions, as OpenAI writes them and as datasets store them.
//!
//! `tool_calls` is a list of `{"function": {"name", "arguments"}}` with further fields, or of bare
//! `{"name", "arguments"}`. OpenAI's API gives `arguments` as JSON in a string; chat templates
//! expect an object, so a string that holds one becomes it. The older `function_call` becomes
//! `tool_calls`, and `functions` become `tools`.

use serde_json::{Map, Value, json};

use super::fields::{Columns, unpacked};
use super::messages::Spot;
use crate::data::faults::RowError;

/// Puts the tool calls of a message into the form that templates expect.
pub(super) fn calls(turn: &mut Map<String, Value>, spot: Spot<'_>) -> Result<(), RowError> {
    const KEY: &str = "tool_calls";
    let is_present = |turn: &Map<String, Value>, name| match turn.get(name) {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    };
    if !is_present(turn, KEY) {
        // Some templates look only whether the key is there.
        turn.shift_remove(KEY);
        if is_present(turn, "function_call") {
            let key = spot.field("function_call");
            let call = turn.shift_remove("function_call").unwrap_or_default();
            let call = checked_function(unpacked(call, || key.clone())?, &key)?;
            turn.insert(KEY.to_owned(), json!([openai_call(call)]));
        }
        return Ok(());
    }
    let Some(value) = turn.get_mut(KEY) else {
        return Ok(());
    };
    let key = spot.field(KEY);
    let calls = match unpacked(value.take(), || key.clone())? {
        Value::Array(calls) => calls,
        other => return Err(RowError::wrong_type(key, "an array of tool calls", &other)),
    };
    let calls = calls.into_iter().enumerate();
    *value = calls
        .map(|(i, call)| checked_call(call, &format!("{key}[{i}]")))
        .collect::<Result<Value, RowError>>()?;
    Ok(())
}

/// Makes tool calls of a content that holds them as JSON, as in ShareGPT's `function_call` turns;
/// other contents are what the assistant says.
pub(super) fn call_in_content(
    turn: &mut Map<String, Value>,
    spot: Spot<'_>,
) -> Result<(), RowError> {
    let Some(Value::String(text)) = turn.get("content") else {
        return Ok(());
    };
    let calls = match serde_json::from_str(text) {
        Ok(Value::Array(calls)) => calls,
        Ok(call @ Value::Object(_)) => vec![call],
        _ => return Ok(()),
    };
    let is_call = |call: &Value| call.get("name").is_some_and(Value::is_string);
    if calls.is_empty() || !calls.iter().all(is_call) {
        return Ok(());
    }
    let key = spot.to_string();
    let calls = calls
        .into_iter()
        .map(|call| checked_function(call, &key).map(openai_call))
        .collect::<Result<Value, RowError>>()?;
    turn.insert("content".to_owned(), Value::from(""));
    turn.insert("tool_calls".to_owned(), calls);
    Ok(())
}

fn openai_call(function: Value) -> Value {
    json!({"type": "function", "function": function})
}

fn checked_call(call: Value, key: &str) -> Result<Value, RowError> {
    let mut call = match unpacked(call, || key.to_owned())? {
        Value::Object(call) => call,
        other => return Err(RowError::wrong_type(key, "an object", &other)),
    };
    if let Some(function) = call.get_mut("function").filter(|f| !f.is_null()) {
        *function = checked_function(function.take(), &format!("{key}.function"))?;
        Ok(Value::Object(call))
    } else if call.contains_key("name") {
        // Templates take `{"name", "arguments"}` as well.
        checked_function(Value::Object(call), key)
    } else {
        Err(RowError::missing(format!("{key}.function")))
    }
}

/// `{"name", "arguments"}`
fn checked_function(function: Value, key: &str) -> Result<Value, RowError> {
    let mut function = match function {
        Value::Object(function) => function,
        other => return Err(RowError::wrong_type(key, "an object", &other)),
    };
    match function.get("name") {
        None => return Err(RowError::missing(format!("{key}.name"))),
        Some(Value::String(name)) if name.is_empty() => {
            return Err(RowError::blank(format!("{key}.name")));
        }
        Some(Value::String(_)) => {}
        Some(other) => {
            return Err(RowError::wrong_type(
                format!("{key}.name"),
                "a string",
                other,
            ));
        }
    }
    if let Some(arguments) = function.get_mut("arguments")
        && let Some(text) = arguments.as_str()
        && let Ok(object @ Value::Object(_)) = serde_json::from_str(text)
    {
        *arguments = object;
    }
    Ok(Value::Object(function))
}

/// Takes a row's tool definitions, if it has any.
pub(super) fn definitions(columns: &mut Columns<'_>) -> Result<Option<Value>, RowError> {
    let name = if columns.has("tools") {
        "tools"
    } else {
        "functions"
    };
    let key = columns.key(name);
    let items = match columns.optional(name) {
        None => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(value) => match unpacked(value, || key.to_owned())? {
            Value::Array(items) => items,
            other => {
                let expected = "an array of tool definitions";
                return Err(RowError::wrong_type(key, expected, &other));
            }
        },
    };
    let read = |(i, item): (usize, Value)| {
        let key = || format!("{key}[{i}]");
        match unpacked(item, key)? {
            item @ Value::Object(_) if name == "functions" => Ok(openai_call(item)),
            item @ Value::Object(_) => Ok(item),
            other => Err(RowError::wrong_type(key(), "an object", &other)),
        }
    };
    let items: Vec<Value> = items
        .into_iter()
        .enumerate()
        .map(read)
        .collect::<Result<_, _>>()?;
    Ok((!items.is_empty()).then_some(Value::Array(items)))
}

#[cfg(test)]
mod tests {
    use super::super::row_format::tests::{read, read_chat};
    use serde_json::{Value, json};

    fn row(turn: Value) -> Value {
        let mut message = json!({"role": "assistant", "content": null});
        let object = message.as_object_mut().unwrap();
        object.extend(turn.as_object().unwrap().clone());
        json!({ "messages": [message] })
    }

    fn calls(turn: Value) -> Value {
        read_chat(row(turn)).messages[0].fields["tool_calls"].clone()
    }

    #[test]
    fn arguments_in_a_string_become_an_object() {
        let call = |arguments: Value| json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
        let want = call(json!({"x": [1]}));
        assert_eq!(calls(json!({"tool_calls": want})), want);
        let text = call(json!("{\"x\": [1]}"));
        assert_eq!(calls(json!({"tool_calls": text})), want);
        assert_eq!(calls(json!({"tool_calls": text.to_string()})), want);
        for kept in [json!("x"), json!(""), json!("[1]"), json!(null)] {
            let kept = call(kept);
            assert_eq!(calls(json!({"tool_calls": kept})), kept);
        }
        let bare = json!([{"name": "f", "arguments": "{}"}]);
        let want = json!([{"name": "f", "arguments": {}}]);
        assert_eq!(calls(json!({"tool_calls": bare})), want);
    }

    #[test]
    fn the_older_forms_become_the_newer() {
        let function = json!({"name": "f", "arguments": "{\"x\": 1}"});
        assert_eq!(
            calls(json!({"function_call": function, "tool_calls": null})),
            json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}])
        );
        let mut row = row(json!({"content": "x", "tool_calls": []}));
        row["functions"] = json!([{"name": "f"}]);
        let chat = read_chat(row);
        assert!(!chat.messages[0].fields.contains_key("tool_calls"));
        assert_eq!(
            chat.tools,
            Some(json!([{"type": "function", "function": {"name": "f"}}]))
        );
    }

    #[test]
    fn definitions_may_be_json_text() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let with = |tools: Value| {
            let mut row = row(json!({"content": "x"}));
            row["tools"] = tools;
            row
        };
        let in_list = json!([tools[0].to_string()]);
        for given in [tools.clone(), json!(tools.to_string()), in_list] {
            assert_eq!(read_chat(with(given)).tools, Some(tools.clone()));
        }
        for none in [json!(null), json!(""), json!([]), json!("[]")] {
            assert_eq!(read_chat(with(none)).tools, None);
        }
        let cases = [
            (
                json!({"f": 1}),
                "`tools` must be an array of tool definitions, found an object",
            ),
            (json!([1]), "`tools[0]` must be an object, found a number"),
            (
                json!("[1"),
                "`tools` is a string that holds no valid JSON: EOF while parsing a list at line 1 column 2; write the list or object as JSON",
            ),
        ];
        for (tools, want) in cases {
            assert_eq!(read(with(tools), true), Err(want.to_owned()));
        }
    }

    #[test]
    fn bad_calls_say_what_is_wrong() {
        let cases = [
            (
                json!([{}]),
                "`messages[0].tool_calls[0].function` is missing",
            ),
            (
                json!([1]),
                "`messages[0].tool_calls[0]` must be an object, found a number",
            ),
            (
                json!({"name": "f"}),
                "`messages[0].tool_calls` must be an array of tool calls, found an object",
            ),
            (
                json!([{"function": {}}]),
                "`messages[0].tool_calls[0].function.name` is missing",
            ),
            (
                json!([{"function": {"name": ""}}]),
                "`messages[0].tool_calls[0].function.name` is empty",
            ),
            (
                json!([{"name": 1}]),
                "`messages[0].tool_calls[0].name` must be a string, found a number",
            ),
        ];
        for (calls, want) in cases {
            assert_eq!(
                read(row(json!({"tool_calls": calls})), true),
                Err(want.to_owned())
            );
        }
        let old = row(json!({"function_call": "f"}));
        assert_eq!(
            read(old, true),
            Err("`messages[0].function_call` must be an object, found a string".to_owned())
        );
    }
}
