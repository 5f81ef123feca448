//! Values as Python writes them: `str()`, `repr()` and `json.dumps`, which chat templates rely on.
//!
//! Not covered: integers beyond 128 bits, and `repr` escapes of non-printable characters above
//! U+00A0, which stay as they are.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Nested deeper than this, a value is refused rather than written (the stack is finite).
const MAX_DEPTH: usize = 200;

/// Bytes beyond which a value is refused: a list that holds another twice, which holds another
/// twice …, is small in memory and endless when written.
const MAX_TEXT: usize = 64 << 20;

/// Refuses a value that is nested too deeply or gets too long.
fn check_size(out: &str, depth: usize) -> Result<(), Error> {
    let message = if depth > MAX_DEPTH {
        "value is nested too deeply to be written"
    } else if out.len() > MAX_TEXT {
        "value is too large to be written"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::BadSerialization, message))
}

/// `str(value)`.
///
/// # Errors
/// The value is nested too deeply or too large.
pub fn str(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => {
            let mut out = String::new();
            repr(value, &mut out, 0)?;
            Ok(out)
        }
    }
}

/// Appends `repr(value)`.
fn repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    check_size(out, depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Undefined => {}
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => repr_string(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&item, out, depth + 1)?;
            }
            // A tuple of one is told from a value in parentheses by its comma.
            out.push_str(match (tuple, value.len()) {
                (true, Some(1)) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            });
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&key, out, depth + 1)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// Appends a string literal with the quotes that Python would choose.
fn repr_string(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7f..=0xa0).contains(&(c as u32)) => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// An integer, or a float as `float.__repr__` writes it.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
}

/// `repr(float)`: the shortest digits that read back, scientific outside `1e-4 ≤ |x| < 1e16`.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    format!("{x:?}")
}

/// The options of `json.dumps` that Hugging Face's `tojson` filter takes.
#[derive(Debug, Clone)]
pub struct JsonStyle {
    /// Spaces per level, one item a line.
    pub indent: Option<usize>,
    /// Escape everything beyond ASCII.
    pub ensure_ascii: bool,
    /// Order keys by name.
    pub sort_keys: bool,
    /// What stands between items.
    pub item_separator: String,
    /// What stands between key and value.
    pub key_separator: String,
}

/// `json.dumps(value)` in the given style. Order of keys is kept, HTML is not escaped.
pub fn json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_json(value, style, &mut out, 0)?;
    Ok(out)
}

fn write_json(
    value: &Value,
    style: &JsonStyle,
    out: &mut String,
    depth: usize,
) -> Result<(), Error> {
    check_size(out, depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(match number(value).as_str() {
            "nan" => "NaN",
            "inf" => "Infinity",
            "-inf" => "-Infinity",
            text => text,
        }),
        ValueKind::String => json_string(value.as_str().unwrap_or_default(), style, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(('[', ']'), items.len(), style, out, depth, |i, out| {
                write_json(&items[i], style, out, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            write_items(('{', '}'), keys.len(), style, out, depth, |i, out| {
                json_string(&json_key(&keys[i])?, style, out);
                out.push_str(&style.key_separator);
                write_json(&value.get_item(&keys[i])?, style, out, depth + 1)
            })?;
        }
        kind => {
            return Err(Error::new(
                ErrorKind::BadSerialization,
                format!("{kind} value is not JSON serializable"),
            ));
        }
    }
    Ok(())
}

/// Keys that are no strings are written as `json.dumps` converts them.
fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(key.is_true().to_string()),
        _ => str(key),
    }
}

fn write_items(
    (open, close): (char, char),
    count: usize,
    style: &JsonStyle,
    out: &mut String,
    depth: usize,
    mut write_item: impl FnMut(usize, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    for i in 0..count {
        if i > 0 {
            out.push_str(&style.item_separator);
        }
        new_line(out, depth + 1);
        write_item(i, out)?;
    }
    if count > 0 {
        new_line(out, depth);
    }
    out.push(close);
    Ok(())
}

fn json_string(text: &str, style: &JsonStyle, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (style.ensure_ascii && c as u32 > 0x7e) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_does() {
        for (x, want) in [
            (1.5, "1.5"),
            (2.0, "2.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-1.25e-7, "-1.25e-07"),
            (1.5e300, "1.5e+300"),
        ] {
            assert_eq!(float(x), want);
        }
    }

    #[test]
    fn str_of_values() {
        let list = Value::from(vec![
            Value::from(true),
            Value::from(()),
            Value::from("it's"),
            Value::from(1),
        ]);
        assert_eq!(str(&list).unwrap(), "[True, None, \"it's\", 1]");
        let object = Value::from_pairs([("a", Value::from("b"))]);
        assert_eq!(str(&object).unwrap(), "{'a': 'b'}");
        assert_eq!(str(&Value::UNDEFINED).unwrap(), "");
    }

    #[test]
    fn values_that_would_never_end_are_refused() {
        let mut list = Value::from(vec![1]);
        for _ in 0..60 {
            list = Value::from(vec![list.clone(), list]);
        }
        assert!(str(&list).is_err());
        let style = JsonStyle {
            indent: None,
            ensure_ascii: false,
            sort_keys: false,
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
        };
        assert!(json(&list, &style).is_err());
    }
}
