//! Python's methods of strings, lists and dicts that the engine's own compatibility lacks.
//!
//! Not covered: `encode`, `expandtabs`, `translate`, and start and end positions of searches.

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

/// Calls a method that the engine does not know: those below, else the engine's compatibility.
///
/// # Errors
/// No such method, wrong arguments, or no fuel left for what it makes.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let found = match (value.kind(), value.as_str()) {
        (_, Some(text)) => match method {
            "ljust" | "rjust" | "center" | "zfill" => Some(pad(state, text, method, args)?),
            "format" => {
                charge_format(state, text)?;
                None
            }
            _ => string(text, method, args)?,
        },
        (ValueKind::Seq, _) if method == "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            Some(at.map(Value::from).ok_or_else(not_found)?)
        }
        (ValueKind::Map, _) if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    match found {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// What Python raises as `ValueError`.
fn not_found() -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        "what `index` looks for is not there",
    )
}

fn string(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let result = match method {
        "index" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = text.find(wanted).ok_or_else(not_found)?;
            Value::from(text[..at].chars().count())
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = match method {
                "partition" => text.split_once(separator),
                _ => text.rsplit_once(separator),
            };
            let (before, between, after) = match (parts, method) {
                (Some((before, after)), _) => (before, separator, after),
                (None, "partition") => (text, "", ""),
                (None, _) => ("", "", text),
            };
            [before, between, after]
                .into_iter()
                .map(Value::from)
                .collect()
        }
        "rsplit" => {
            let (separator, limit): (&str, Option<i64>) = from_args(args)?;
            // A negative limit is none, as in Python.
            let pieces =
                usize::try_from(limit.unwrap_or(-1)).map_or(usize::MAX, |n| n.saturating_add(1));
            let mut parts: Vec<&str> = text.rsplitn(pieces, separator).collect();
            parts.reverse();
            parts.into_iter().map(Value::from).collect()
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase())
        }
        "isdecimal" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(char::is_numeric))
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// `ljust`, `rjust`, `center` and `zfill`.
fn pad(state: &State, text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<char>) = from_args(args)?;
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    state.consume_fuel(missing as u64)?;
    let fill = fill.unwrap_or(' ');
    let filled = |count: usize, with: char| with.to_string().repeat(count);
    Ok(Value::from(match method {
        "ljust" => format!("{text}{}", filled(missing, fill)),
        "rjust" => format!("{}{text}", filled(missing, fill)),
        "zfill" => {
            let digits = text.trim_start_matches(['+', '-']);
            let sign = &text[..(text.len() - digits.len()).min(1)];
            format!("{sign}{}{}", filled(missing, '0'), &text[sign.len()..])
        }
        _ => {
            // As CPython: the odd one goes left where the width is odd.
            let left = missing / 2 + (missing & width & 1);
            format!(
                "{}{text}{}",
                filled(left, fill),
                filled(missing - left, fill)
            )
        }
    }))
}

/// Pays for the widths and precisions in a format string, which the engine allocates unasked.
fn charge_format(state: &State, text: &str) -> Result<(), Error> {
    for field in text.split('{').skip(1) {
        let field = field.split('}').next().unwrap_or_default();
        for digits in field.split(|c: char| !c.is_ascii_digit()) {
            state.consume_fuel(match digits.len() {
                0..=9 => digits.parse().unwrap_or(0),
                _ => u64::MAX,
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::data::template::TemplateError;
    use crate::data::template::tests::render;
    use serde_json::json;

    #[test]
    fn methods_give_what_python_gives() {
        for (source, want) in [
            ("'héllo'.index('l')", "2"),
            ("'a-b-c'.rsplit('-', 1)", "['a-b', 'c']"),
            ("'a-b-c'.rsplit('-')", "['a', 'b', 'c']"),
            ("'a-b-c'.partition('-')|join('|')", "a|-|b-c"),
            ("'a-b-c'.rpartition('-')|join('|')", "a-b|-|c"),
            ("'abc'.rpartition('-')|join('|')", "||abc"),
            (
                "'a.txt'.removesuffix('.txt') ~ 'x-a'.removeprefix('x-')",
                "aa",
            ),
            ("'-7'.zfill(4) ~ 'a'.zfill(3)", "-00700a"),
            ("'a'.ljust(3) ~ '|' ~ 'a'.rjust(3, '.')", "a  |..a"),
            ("'a'.center(4, '.') ~ 'ab'.center(5, '.')", ".a....ab."),
            ("['a', 'b'].index('b')", "1"),
            ("{'a': 1}.copy()", "{'a': 1}"),
            ("'{:>3}|{}'.format('a', 1)", "  a|1"),
        ] {
            let text = render(&format!("{{{{ {source} }}}}"), json!([{}])).map(|r| r.text);
            assert_eq!(text.unwrap(), want, "{source}");
        }
        assert!(render("{{ 'a'.index('b') }}", json!([{}])).is_err());
    }

    #[test]
    fn widths_are_paid_for() {
        for source in [
            "'a'.ljust(1000000000000)",
            "'a'.zfill(1000000000000)",
            "'{:1000000000000}'.format('a')",
            "'{:.1000000000000f}'.format(1.0)",
            "'{:99999999999999999999999}'.format(1)",
        ] {
            let result = render(&format!("{{{{ {source} }}}}"), json!([{}]));
            assert!(
                matches!(result, Err(TemplateError::Exhausted { .. })),
                "{source}"
            );
        }
    }
}
