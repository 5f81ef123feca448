//! Chat templates: Jinja as Hugging Face runs it, with exact spans of what the assistant wrote.
//!
//! The environment is that of transformers' `chat_template_utils.py`: `trim_blocks`,
//! `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now` (in UTC here), `tojson` that
//! keeps key order and escapes neither HTML nor non-ASCII, Python's string methods, undefined
//! variables that are falsy and print as nothing, and `{% generation %}` blocks.
//!
//! Not covered: `'…' % values`, `varargs` and `kwargs` of macros, `safe` strings that escape what is
//! added to them, and filters for web pages (`urlize`, `striptags` …). Loops over `none` are empty
//! here where Python fails.
//!
//! `generation` finds what the assistant wrote; `python` and `python_methods` are the Python that
//! templates expect.
//!
//! A template comes with a model from the internet, so it runs on a budget of work and memory and
//! with bounded recursion: it can fail but neither hang nor fill the memory.

mod generation;
mod python;
mod python_methods;

use std::ops::Range;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value as Json};

/// Name of the one template in its environment.
const TEMPLATE: &str = "chat";

/// Instructions (or 64-byte pieces of data) that one rendering may cost: about a second.
const FUEL: u64 = 20_000_000;

/// Most spaces a level that `tojson` indents by; templates use 2 or 4.
const MAX_INDENT: usize = 64;

/// Names under which messages carry reasoning; transformers fills one from the other.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Why a chat template gave no text.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template does not parse.
    #[error("chat template {name}, line {line}: {message}")]
    Syntax {
        /// File that holds the template.
        name: String,
        /// Line in the template.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// The template called `raise_exception`.
    #[error("chat template {name} refuses the conversation: {message}")]
    Refused {
        /// File that holds the template.
        name: String,
        /// The template's own words.
        message: String,
    },
    /// Evaluation failed.
    #[error("chat template {name}, line {line}, cannot render the conversation: {message}")]
    Failed {
        /// File that holds the template.
        name: String,
        /// Line in the template.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// The template did not end within its budget.
    #[error(
        "chat template {name} was stopped: it did more work than any chat template needs; look for an endless loop in it"
    )]
    Exhausted {
        /// File that holds the template.
        name: String,
    },
    /// No messages.
    #[error("cannot apply chat template to an empty conversation: provide at least one message")]
    EmptyConversation,
    /// `{% generation %}` blocks whose text did not arrive whole in the rendering.
    #[error(
        "chat template {name}: `generation` blocks are nested, or their text is cut apart before it is written; assistant spans cannot be told"
    )]
    BrokenGeneration {
        /// File that holds the template.
        name: String,
    },
}

/// What a template renders.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The messages as JSON objects.
    pub messages: &'a [Map<String, Json>],
    /// Tool definitions, an array.
    pub tools: Option<&'a Json>,
    /// Further variables; they replace the tokenizer's own (`bos_token` …).
    pub variables: Option<&'a Map<String, Json>>,
    /// End with the beginning of an assistant turn.
    pub add_generation_prompt: bool,
}

/// Rendered text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text that is tokenised.
    pub text: String,
    /// Byte spans of `{% generation %}` blocks, in order; none where the template has no such blocks.
    pub generation: Vec<Range<usize>>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    name: String,
    source: String,
    variables: Map<String, Json>,
    marks_generation: bool,
}

impl ChatTemplate {
    /// Compiles `source`; `name` says in errors where it is from; `variables` (`bos_token` …) are
    /// visible in every rendering.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`].
    pub fn new(
        name: impl Into<String>,
        source: impl Into<String>,
        variables: Map<String, Json>,
    ) -> Result<Self, TemplateError> {
        let (name, source) = (name.into(), source.into());
        // Jinja reads every kind of line end as `\n`.
        let unix = source.replace("\r\n", "\n").replace('\r', "\n");
        let (rewritten, marks_generation) = generation::rewrite(&unix);
        let syntax_error = |error: minijinja::Error| TemplateError::Syntax {
            name: name.clone(),
            line: error.line().unwrap_or(1),
            message: describe(&error),
        };
        let mut environment = environment().map_err(&syntax_error)?;
        environment
            .add_template_owned(TEMPLATE, rewritten)
            .map_err(&syntax_error)?;
        Ok(Self {
            environment,
            name,
            source,
            variables,
            marks_generation,
        })
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The file that holds the template.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the template marks what the assistant writes with `{% generation %}`.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Renders a conversation as `apply_chat_template` does.
    ///
    /// # Errors
    /// No messages, a refusal of the template, or a failure in it.
    pub fn render(&self, request: &Request<'_>) -> Result<Rendered, TemplateError> {
        if request.messages.is_empty() {
            return Err(TemplateError::EmptyConversation);
        }
        self.render_any(request)
    }

    /// Renders a conversation that may be empty, as the prefix of a longer one.
    pub(super) fn render_any(&self, request: &Request<'_>) -> Result<Rendered, TemplateError> {
        let marks = self
            .marks_generation
            .then(|| generation::unused_marks(request));
        let context = self.context(request, marks);
        let text = self
            .environment
            .get_template(TEMPLATE)
            .and_then(|template| template.render(context))
            .map_err(|error| self.failure(&error))?;
        match marks {
            Some(marks) => {
                generation::take(&text, marks).ok_or_else(|| TemplateError::BrokenGeneration {
                    name: self.name.clone(),
                })
            }
            None => Ok(Rendered {
                text,
                generation: Vec::new(),
            }),
        }
    }

    fn context(&self, request: &Request<'_>, marks: Option<(char, char)>) -> Value {
        let messages: Value = request.messages.iter().map(message_value).collect();
        let mut variables = self.variables.clone();
        for (key, value) in request.variables.into_iter().flatten() {
            variables.insert(key.clone(), value.clone());
        }
        let mut pairs: Vec<(&str, Value)> = variables
            .iter()
            .map(|(key, value)| (key.as_str(), value_of(value)))
            .collect();
        pairs.push(("messages", messages));
        pairs.push(("tools", request.tools.map_or(Value::from(()), value_of)));
        pairs.push(("documents", Value::from(())));
        pairs.push((
            "add_generation_prompt",
            Value::from(request.add_generation_prompt),
        ));
        if let Some((begin, end)) = marks {
            pairs.push((generation::BEGIN, Value::from(begin.to_string())));
            pairs.push((generation::END, Value::from(end.to_string())));
        }
        Value::from_pairs(pairs)
    }

    fn failure(&self, error: &minijinja::Error) -> TemplateError {
        let name = self.name.clone();
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(inner) = cause {
            if let Some(Refusal(message)) = inner.downcast_ref::<Refusal>() {
                let message = message.clone();
                return TemplateError::Refused { name, message };
            }
            cause = inner.source();
        }
        match error.kind() {
            ErrorKind::OutOfFuel => TemplateError::Exhausted { name },
            _ => TemplateError::Failed {
                name,
                line: error.line().unwrap_or(1),
                message: describe(error),
            },
        }
    }
}

/// What `raise_exception` raises.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

/// The kind and detail of an engine error, without the location that is reported apart.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// An environment with what Hugging Face's has.
fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_unknown_method_callback(python_methods::call);
    env.set_fuel(Some(FUEL));
    env.set_formatter(|out, _, value| match value.as_str() {
        Some(text) => out.write_str(text).map_err(Into::into),
        None => out.write_str(&python::str(value)?).map_err(Into::into),
    });
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| python::str(value));
    env.add_filter(generation::FILTER, generation::mark);
    // Python cannot iterate over None, and templates ask before they take a length.
    env.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    // In Jinja whatever has a length and items by index or key, strings and dicts included.
    env.add_test("sequence", |value: &Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | String | Map | Undefined)
    });
    env.add_function("cycler", minijinja_contrib::globals::cycler);
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    env.add_function(
        "raise_exception",
        |message: String| -> Result<Value, minijinja::Error> {
            let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
            Err(error.with_source(Refusal(message)))
        },
    );
    env.add_function(
        "strftime_now",
        |state: &minijinja::State<'_, '_>, format: &str| {
            let format = Kwargs::from_iter([("format", Value::from(format))]);
            minijinja_contrib::filters::datetimeformat(
                state,
                minijinja_contrib::globals::now(),
                format,
            )
        },
    );
    Ok(env)
}

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(
    value: &Value,
    positional: Rest<Value>,
    kwargs: Kwargs,
) -> Result<String, minijinja::Error> {
    let option = |index: usize, name: &str| -> Result<Option<Value>, minijinja::Error> {
        let given = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|value| !value.is_none()))
    };
    let indent = match option(1, "indent")? {
        Some(indent) => Some(usize::try_from(indent)?),
        None => None,
    };
    if indent.is_some_and(|spaces| spaces > MAX_INDENT) {
        let message = format!("tojson indents by at most {MAX_INDENT} spaces");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
    }
    let separators = option(2, "separators")?;
    let separator = |index: usize, default: &str| -> Result<String, minijinja::Error> {
        match &separators {
            Some(pair) => Ok(pair.get_item_by_index(index)?.to_string()),
            None => Ok(default.to_owned()),
        }
    };
    let style = python::JsonStyle {
        indent,
        ensure_ascii: option(0, "ensure_ascii")?.is_some_and(|v| v.is_true()),
        sort_keys: option(3, "sort_keys")?.is_some_and(|v| v.is_true()),
        item_separator: separator(0, if indent.is_some() { "," } else { ", " })?,
        key_separator: separator(1, ": ")?,
    };
    kwargs.assert_all_used()?;
    python::json(value, &style)
}

/// A message as the template sees it: nulls dropped (some APIs write `"content": null`, which
/// templates print), reasoning under each of its names. Both as transformers 5 does.
fn message_value(message: &Map<String, Json>) -> Value {
    let present = || message.iter().filter(|(_, value)| !value.is_null());
    let reasoning = REASONING_FIELDS
        .iter()
        .find_map(|key| message.get(*key).filter(|value| !value.is_null()));
    let mut pairs: Vec<(&str, Value)> = Vec::with_capacity(message.len() + 2);
    if let Some(reasoning) = reasoning {
        if message.get("thinking").is_none_or(Json::is_null) {
            pairs.push(("thinking", value_of(reasoning)));
        }
        pairs.extend(
            present()
                .filter(|(key, _)| *key != "reasoning_content")
                .map(|(key, value)| (key.as_str(), value_of(value))),
        );
        pairs.push(("reasoning_content", value_of(reasoning)));
    } else {
        pairs.extend(present().map(|(key, value)| (key.as_str(), value_of(value))));
    }
    Value::from_pairs(pairs)
}

/// JSON as a template value.
fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value_of).collect(),
        Json::Object(object) => Value::from_pairs(
            object
                .iter()
                .map(|(key, value)| (key.as_str(), value_of(value))),
        ),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    /// Renders messages with a template given as text.
    pub fn render(source: &str, messages: Json) -> Result<Rendered, TemplateError> {
        let messages: Vec<Map<String, Json>> =
            serde_json::from_value(messages).expect("a list of objects");
        ChatTemplate::new("test", source, Map::new())?.render(&Request {
            messages: &messages,
            tools: None,
            variables: None,
            add_generation_prompt: false,
        })
    }

    #[test]
    fn refusals_carry_the_words_of_the_template() {
        let error = render("{{ raise_exception('Roles must alternate') }}", json!([{}]));
        assert!(
            matches!(error, Err(TemplateError::Refused { message, .. }) if message == "Roles must alternate")
        );
    }

    #[test]
    fn an_endless_template_is_stopped() {
        let source =
            "{% for a in range(90000) %}{% for b in range(90000) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(matches!(
            render(source, json!([{}])),
            Err(TemplateError::Exhausted { .. })
        ));
        let macros = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
        assert!(render(macros, json!([{}])).is_err());
    }

    #[test]
    fn json_and_booleans_look_like_python() {
        let messages = json!([{"z": 1, "a": [true, null, "<é>"], "f": 1e-7}]);
        let cases = [
            (
                "{{ messages[0]|tojson }}",
                "{\"z\": 1, \"a\": [true, null, \"<é>\"], \"f\": 1e-07}",
            ),
            (
                "{{ messages[0].a|tojson(indent=2) }}",
                "[\n  true,\n  null,\n  \"<é>\"\n]",
            ),
            (
                "{{ {'b': 1, 'a': {}}|tojson(sort_keys=true, separators=(',', ':')) }}",
                "{\"a\":{},\"b\":1}",
            ),
            ("{{ messages[0].a }}", "[True, None, '<é>']"),
            (
                "{{ true }} {{ none }} {{ missing }}|{{ 'x' if missing }}",
                "True None |",
            ),
            ("{{ strftime_now('%%')|length }}", "1"),
        ];
        for (source, want) in cases {
            assert_eq!(
                render(source, messages.clone()).unwrap().text,
                want,
                "{source}"
            );
        }
    }
}
