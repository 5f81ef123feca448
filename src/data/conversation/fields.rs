//! What a dataset calls lorafit's fields: the `fields` of a source, and how values are found by them.
//!
//! `fields: {messages: dialog, text: doc.body}` reads `messages` from the row's key `dialog` and
//! `text` from `body` inside the object `doc`. A key that has the dots in its name comes first.
//! `role`, `content`, `from` and `value` are looked up in each turn, all others in the row. A row
//! must have every key that is named, and may write null where a field is optional.

use serde_json::{Map, Value};

use crate::data::faults::{DataError, RowError};
use crate::recipe::suggest::nearest;

/// Fields of a row that can be read from another key.
const ROW_FIELDS: [&str; 14] = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "labels",
    "chosen",
    "rejected",
    "tools",
];

/// Fields of a turn that can be read from another key.
const TURN_FIELDS: [&str; 4] = ["role", "content", "from", "value"];

/// A checked mapping of lorafit's field names to a dataset's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields {
    keys: Vec<(String, String)>,
}

impl Fields {
    /// Checks pairs of lorafit's name and the dataset's.
    ///
    /// # Errors
    /// A name that is none of lorafit's, a key with nothing between its dots.
    pub fn new(pairs: &[(String, String)]) -> Result<Self, DataError> {
        for (name, key) in pairs {
            let known = || ROW_FIELDS.into_iter().chain(TURN_FIELDS);
            if !known().any(|field| field == name) {
                return Err(DataError::UnknownField {
                    name: name.clone(),
                    nearest: nearest(name, known()).map_or_else(
                        || ".".to_owned(),
                        |near| format!("; did you mean `{near}`?"),
                    ),
                    known: known().collect::<Vec<_>>().join(", "),
                });
            }
            if key.split('.').any(str::is_empty) {
                return Err(DataError::EmptyFieldKey {
                    name: name.clone(),
                    key: key.clone(),
                });
            }
        }
        Ok(Self {
            keys: pairs.to_vec(),
        })
    }

    /// What the dataset calls a field; its own name where it is not mapped.
    pub fn key<'a>(&'a self, name: &'a str) -> &'a str {
        let pair = self.keys.iter().find(|(field, _)| field == name);
        pair.map_or(name, |(_, key)| key)
    }

    /// The value of a field in a row or a turn.
    pub(super) fn get<'a>(&self, object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
        let key = self.key(name);
        object.get(key).or_else(|| {
            let (outer, inner) = key.split_once('.')?;
            inner
                .split('.')
                .try_fold(object.get(outer)?, |value, part| value.get(part))
        })
    }

    /// Whether a field is there and not null.
    pub(super) fn has(&self, object: &Map<String, Value>, name: &str) -> bool {
        self.get(object, name).is_some_and(|value| !value.is_null())
    }

    /// Takes the value of a field out of a row or a turn; what is left keeps its order.
    pub(super) fn take(&self, object: &mut Map<String, Value>, name: &str) -> Option<Value> {
        take_path(object, self.key(name))
    }

    /// Gives a field of a turn lorafit's name, in the place where it stands.
    pub(super) fn rename(&self, turn: &mut Map<String, Value>, name: &str, to: &str) {
        let key = self.key(name);
        if key == to {
            return;
        }
        if !turn.contains_key(key) {
            if let Some(value) = take_path(turn, key) {
                turn.insert(to.to_owned(), value);
            }
            return;
        }
        // A key that had the name before is not the one that was asked for.
        turn.shift_remove(to);
        *turn = std::mem::take(turn)
            .into_iter()
            .map(|(old, value)| (if old == key { to.to_owned() } else { old }, value))
            .collect();
    }

    /// Checks that a row has every mapped key that is looked up in rows.
    pub(super) fn check(&self, row: &Map<String, Value>) -> Result<(), RowError> {
        let mut named = self.keys.iter().filter(|(name, _)| {
            // Turns are checked where they are read.
            !TURN_FIELDS.contains(&name.as_str())
        });
        match named.find(|(name, _)| self.get(row, name).is_none()) {
            Some((_, key)) => Err(RowError::missing(key)),
            None => Ok(()),
        }
    }
}

fn take_path(object: &mut Map<String, Value>, key: &str) -> Option<Value> {
    if object.contains_key(key) {
        return object.shift_remove(key);
    }
    let mut inside = object;
    let mut rest = key;
    while let Some((outer, inner)) = rest.split_once('.') {
        inside = inside.get_mut(outer)?.as_object_mut()?;
        rest = inner;
    }
    inside.shift_remove(rest)
}

/// A row whose values are taken by lorafit's names.
pub(super) struct Columns<'a> {
    object: Map<String, Value>,
    fields: &'a Fields,
}

impl<'a> Columns<'a> {
    /// Of a row that has every mapped key.
    pub fn new(object: Map<String, Value>, fields: &'a Fields) -> Result<Self, RowError> {
        fields.check(&object)?;
        Ok(Self { object, fields })
    }

    /// The mapping of the row.
    pub fn fields(&self) -> &'a Fields {
        self.fields
    }

    /// What the row calls a field.
    pub fn key(&self, name: &'a str) -> &'a str {
        self.fields.key(name)
    }

    /// Whether a field is there and not null.
    pub fn has(&self, name: &str) -> bool {
        self.fields.has(&self.object, name)
    }

    /// A value that must be there.
    pub fn required(&mut self, name: &'a str) -> Result<Value, RowError> {
        let value = self.fields.take(&mut self.object, name);
        value.ok_or_else(|| RowError::missing(self.key(name)))
    }

    /// A value that may be null or absent.
    pub fn optional(&mut self, name: &str) -> Option<Value> {
        let value = self.fields.take(&mut self.object, name);
        value.filter(|value| !value.is_null())
    }

    /// A string that must be there.
    pub fn string(&mut self, name: &'a str) -> Result<String, RowError> {
        match self.required(name)? {
            Value::String(text) => Ok(text),
            other => Err(RowError::wrong_type(self.key(name), "a string", &other)),
        }
    }

    /// A string that may be null or absent; empty then.
    pub fn optional_string(&mut self, name: &'a str) -> Result<String, RowError> {
        match self.optional(name) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(RowError::wrong_type(self.key(name), "a string", &other)),
        }
    }
}

/// The list or object that a string holds as JSON, as in CSV and many Parquet files; other values
/// as they are.
pub(super) fn unpacked(value: Value, key: impl FnOnce() -> String) -> Result<Value, RowError> {
    match value {
        Value::String(text) if text.trim_start().starts_with(['[', '{']) => {
            serde_json::from_str(&text).map_err(|error| RowError::JsonText {
                key: key(),
                message: error.to_string(),
            })
        }
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A mapping of these pairs.
    fn fields(pairs: &[(&str, &str)]) -> Result<Fields, DataError> {
        let owned = pairs
            .iter()
            .map(|(name, key)| ((*name).to_owned(), (*key).to_owned()));
        Fields::new(&owned.collect::<Vec<_>>())
    }

    fn object(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(object) => object,
            _ => panic!("an object"),
        }
    }

    #[test]
    fn unknown_names_and_empty_keys_are_refused() {
        let error = |pairs: &[(&str, &str)]| fields(pairs).unwrap_err().to_string();
        let text = error(&[("mesages", "dialog")]);
        assert!(
            text.starts_with(
                "fields: `mesages` is no field of a row; did you mean `messages`? Fields are messages, "
            ),
            "{text}"
        );
        assert!(error(&[("flux", "x")]).starts_with("fields: `flux` is no field of a row. Fields"));
        for key in ["", ".", "doc..body", "doc."] {
            assert_eq!(
                error(&[("text", key)]),
                format!(
                    "fields: `text` is read from `{key}`, which names no key; write a key, or keys of nested objects with dots between them"
                )
            );
        }
    }

    #[test]
    fn values_are_found_in_nested_objects_and_keys_with_dots_come_first() {
        let map = fields(&[("text", "doc.body.en")]).unwrap();
        let mut row = object(json!({"id": 1, "doc": {"body": {"en": "x", "de": "y"}}, "z": 2}));
        assert_eq!(map.get(&row, "text"), Some(&json!("x")));
        assert_eq!(map.take(&mut row, "text"), Some(json!("x")));
        assert_eq!(
            Value::Object(row).to_string(),
            r#"{"id":1,"doc":{"body":{"de":"y"}},"z":2}"#
        );
        let row = object(json!({"doc": {"body": {"en": "x"}}, "doc.body.en": "flat"}));
        assert_eq!(map.get(&row, "text"), Some(&json!("flat")));
        for lacking in [
            json!({}),
            json!({"doc": "x"}),
            json!({"doc": {"body": [1]}}),
        ] {
            let error = map.check(&object(lacking)).unwrap_err();
            assert_eq!(error.to_string(), "`doc.body.en` is missing");
        }
    }

    #[test]
    fn renamed_fields_stay_in_their_place() {
        let map = fields(&[("role", "who"), ("content", "said.text")]).unwrap();
        let mut turn = object(json!({"a": 1, "who": "user", "role": "old", "said": {"text": "x"}}));
        map.rename(&mut turn, "role", "role");
        map.rename(&mut turn, "content", "content");
        assert_eq!(
            Value::Object(turn).to_string(),
            r#"{"a":1,"role":"user","said":{},"content":"x"}"#
        );
    }

    #[test]
    fn only_strings_that_open_a_list_or_an_object_are_parsed() {
        let read = |value| unpacked(value, || "k".to_owned()).map_err(|e| e.to_string());
        assert_eq!(read(json!(" [1]")), Ok(json!([1])));
        assert_eq!(read(json!("x")), Ok(json!("x")));
        assert_eq!(
            read(json!("[{'role': 'user'}]")).unwrap_err(),
            "`k` is a string that holds no valid JSON: key must be a string at line 1 column 3; write the list or object as JSON"
        );
        assert!(read(json!("[".repeat(100_000))).is_err());
    }
}
