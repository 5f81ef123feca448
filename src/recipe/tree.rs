//! YAML text as a tree whose nodes can be found again in the text.
//!
//! serde_yaml tells lines only in its errors. So nodes are numbered in reading order, and
//! [`line_of`] reads the text once more and raises an error on reaching the wanted number: the
//! error carries the line. Reading into a tree of our own also keeps repeated keys, which a map
//! would drop, and bounds what aliases expand to.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use serde_json::Value as Json;

/// Nodes plus bytes of text that a recipe may expand to, aliases resolved.
const MAX_EXPANDED: usize = 4 << 20;

/// A YAML value and its place in reading order.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) id: usize,
    pub(super) value: Value,
}

/// A YAML value. Maps keep repeated keys.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Boolean(bool),
    Integer(i128),
    Real(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Node, Node)>),
    Tagged(String),
}

impl Node {
    /// What an empty document stands for.
    pub(super) const NULL: Node = Node {
        id: 0,
        value: Value::Null,
    };

    /// The value as words of an error message: "the text `abc`".
    pub(super) fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Boolean(value) => format!("`{value}`"),
            Value::Integer(value) => format!("`{value}`"),
            Value::Real(value) => format!("`{value}`"),
            Value::Text(value) => format!("the text `{}`", shorten(value)),
            Value::List(items) if items.is_empty() => "an empty list".into(),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a map".into(),
            Value::Tagged(tag) => format!("the YAML tag `!{}`", shorten(tag)),
        }
    }

    /// The value as a key: plain words, whatever was written.
    pub(super) fn key_text(&self) -> String {
        match &self.value {
            Value::Text(text) => shorten(text),
            Value::Boolean(value) => value.to_string(),
            Value::Integer(value) => value.to_string(),
            Value::Real(value) => value.to_string(),
            Value::Null => "null".into(),
            Value::List(_) | Value::Map(_) | Value::Tagged(_) => "?".into(),
        }
    }

    /// The value in JSON. What JSON cannot say becomes null, or a float where it is a number.
    fn into_json(self) -> Json {
        match self.value {
            Value::Null | Value::Tagged(_) => Json::Null,
            Value::Boolean(value) => value.into(),
            Value::Integer(value) => match (i64::try_from(value), u64::try_from(value)) {
                (Ok(value), _) => value.into(),
                (_, Ok(value)) => value.into(),
                _ => (value as f64).into(),
            },
            Value::Real(value) => value.into(),
            Value::Text(value) => value.into(),
            Value::List(items) => items.into_iter().map(Node::into_json).collect(),
            Value::Map(entries) => {
                let entries = entries.into_iter();
                let entries = entries.map(|(key, value)| (key.into_key(), value.into_json()));
                Json::Object(entries.collect())
            }
        }
    }

    /// The value as a key of JSON.
    fn into_key(self) -> String {
        match self.value {
            Value::Text(text) => text,
            _ => self.key_text(),
        }
    }
}

/// YAML of any origin, such as a dataset's card, as JSON; of a repeated key the last value counts.
///
/// # Errors
/// What is wrong with it, in words; also when its aliases expand beyond all use.
pub(crate) fn yaml_to_json(text: &str) -> Result<Json, String> {
    let node = parse(text).map_err(|error| error.message)?;
    Ok(node.map_or(Json::Null, Node::into_json))
}

/// The first 60 characters, on one line.
fn shorten(text: &str) -> String {
    let mut short: String = text
        .chars()
        .take(60)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(60).is_some() {
        short.push('…');
    }
    short
}

/// Text that is not YAML, or not one document.
#[derive(Debug)]
pub(super) struct SyntaxError {
    pub(super) line: Option<usize>,
    pub(super) message: String,
}

/// Reads one YAML document; `None` when there is nothing but comments.
pub(super) fn parse(text: &str) -> Result<Option<Node>, SyntaxError> {
    let mut documents = serde_yaml::Deserializer::from_str(text);
    let Some(document) = documents.next() else {
        return Ok(None);
    };
    let walk = Walk::default();
    let node = Seed(&walk)
        .deserialize(document)
        .map_err(|error| SyntaxError {
            line: error.location().map(|at| at.line()),
            message: error.to_string(),
        })?;
    if documents.next().is_some() {
        return Err(SyntaxError {
            line: None,
            message: "holds more than one YAML document".into(),
        });
    }
    Ok(match node.value {
        Value::Null => None,
        _ => Some(node),
    })
}

/// The line of the node with this number, counted from 1.
pub(super) fn line_of(text: &str, id: usize) -> Option<usize> {
    let document = serde_yaml::Deserializer::from_str(text).next()?;
    let walk = Walk {
        stop: Some(id),
        ..Walk::default()
    };
    let error = Seed(&walk).deserialize(document).err()?;
    error.location().map(|at| at.line())
}

/// Counts nodes on the way through a document.
#[derive(Default)]
struct Walk {
    next: Cell<usize>,
    expanded: Cell<usize>,
    stop: Option<usize>,
}

impl Walk {
    /// The number of the node that begins here. Called by the visitor, not by the seed: only
    /// errors raised inside a visitor get the position of this very node.
    fn begin<E: Error>(&self, bytes: usize) -> Result<usize, E> {
        let id = self.next.get();
        if self.stop == Some(id) {
            return Err(E::custom("found"));
        }
        self.next.set(id + 1);
        self.expanded.set(self.expanded.get() + 1 + bytes);
        if self.expanded.get() > MAX_EXPANDED {
            return Err(E::custom("its aliases expand to more than 4 MiB"));
        }
        Ok(id)
    }
}

#[derive(Clone, Copy)]
struct Seed<'a>(&'a Walk);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Seed<'_> {
    fn scalar<E: Error>(self, value: Value) -> Result<Node, E> {
        let bytes = match &value {
            Value::Text(text) => text.len(),
            _ => 0,
        };
        let id = self.0.begin(bytes)?;
        Ok(Node { id, value })
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        self.scalar(Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Node, E> {
        self.scalar(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Node, E> {
        self.scalar(Value::Boolean(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Node, E> {
        self.scalar(Value::Integer(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Node, E> {
        self.scalar(Value::Integer(value.into()))
    }

    fn visit_i128<E: Error>(self, value: i128) -> Result<Node, E> {
        self.scalar(Value::Integer(value))
    }

    fn visit_u128<E: Error>(self, value: u128) -> Result<Node, E> {
        // No knob goes near 2^127: the nearest float will do for the message.
        self.scalar(i128::try_from(value).map_or(Value::Real(value as f64), Value::Integer))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Node, E> {
        self.scalar(Value::Real(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Node, E> {
        self.scalar(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let id = self.0.begin(0)?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Node {
            id,
            value: Value::List(items),
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let id = self.0.begin(0)?;
        let mut entries = Vec::new();
        while let Some(key) = map.next_key_seed(self)? {
            entries.push((key, map.next_value_seed(self)?));
        }
        Ok(Node {
            id,
            value: Value::Map(entries),
        })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<Node, A::Error> {
        let id = self.0.begin(0)?;
        let (tag, content) = data.variant_seed(PhantomData::<String>)?;
        content.newtype_variant_seed(self)?;
        Ok(Node {
            id,
            value: Value::Tagged(tag),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_found_again_in_the_text() {
        let text = "a: 1\nb:\n  - x\n  - y\n\nc: {d: 2}\n";
        let Some(Node {
            value: Value::Map(entries),
            ..
        }) = parse(text).unwrap()
        else {
            panic!("not a map");
        };
        let lines: Vec<_> = entries
            .iter()
            .map(|(key, _)| line_of(text, key.id))
            .collect();
        assert_eq!(lines, [Some(1), Some(2), Some(6)]);
        let Value::List(items) = &entries[1].1.value else {
            panic!("not a list");
        };
        assert_eq!(line_of(text, items[1].id), Some(4));
    }

    #[test]
    fn aliases_cannot_blow_up() {
        let mut text = format!("a0: &a0 [{}]\n", "x,".repeat(1000));
        for level in 1..8 {
            let previous = format!("*a{},", level - 1).repeat(10);
            text += &format!("a{level}: &a{level} [{previous}]\n");
        }
        let error = parse(&text).unwrap_err();
        assert!(error.message.contains("4 MiB") || error.message.contains("repetition"));
        assert!(parse("&a [*a]").is_err());
    }

    #[test]
    fn yaml_becomes_json() {
        let text =
            "a: [1, -2.5, no, true, ~]\n1: {b: x}\na2: 99999999999999999999\na: 2\nt: !x 1\n";
        let expected = serde_json::json!({"a": 2, "1": {"b": "x"}, "a2": 1e20, "t": null});
        assert_eq!(yaml_to_json(text).unwrap(), expected);
        assert_eq!(yaml_to_json("# nothing\n").unwrap(), Json::Null);
        assert!(yaml_to_json("a: [").is_err());
        assert!(yaml_to_json("---\na: 1\n---\nb: 2\n").is_err());
    }
}
