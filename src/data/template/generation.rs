//! `{% generation %}` blocks: where a template says itself what the assistant writes.
//!
//! The engine knows no such tag. Each block is rewritten to a filter block that puts one private
//! character before its text and one behind, both of which occur nowhere in the conversation;
//! after rendering they are taken out again and give exact byte spans.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value as Json};

use super::{Rendered, Request};

/// The filter that a block becomes.
pub(super) const FILTER: &str = "lorafit_generation";
/// The variable that holds the mark before a block.
pub(super) const BEGIN: &str = "lorafit_generation_begin";
/// The variable that holds the mark behind a block.
pub(super) const END: &str = "lorafit_generation_end";

static TAG: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());

/// What [`FILTER`] does.
pub(super) fn mark(text: &str, begin: &str, end: &str) -> String {
    format!("{begin}{text}{end}")
}

/// Rewrites `{% generation %}` blocks to a filter block, which leaves white space as it was, and
/// a scope, because variables set in a generation block are not seen outside.
pub(super) fn rewrite(source: &str) -> (String, bool) {
    let Some(tag) = TAG.as_ref() else {
        return (source.to_owned(), false);
    };
    let rewritten = tag.replace_all(source, |found: &regex::Captures<'_>| {
        let (before, after) = (&found[1], &found[3]);
        match found.get(2) {
            None => format!("{{%{before} filter {FILTER}({BEGIN}, {END}) %}}{{% with {after}%}}"),
            Some(_) => format!("{{%{before} endwith %}}{{% endfilter {after}%}}"),
        }
    });
    let marked = matches!(rewritten, std::borrow::Cow::Owned(_));
    (rewritten.into_owned(), marked)
}

/// Two characters of the last private plane that occur in nothing the template is given.
pub(super) fn unused_marks(request: &Request<'_>) -> (char, char) {
    let mut used = Vec::new();
    for message in request.messages {
        message
            .values()
            .for_each(|value| private_characters(value, &mut used));
    }
    if let Some(tools) = request.tools {
        private_characters(tools, &mut used);
    }
    for value in request.variables.into_iter().flat_map(Map::values) {
        private_characters(value, &mut used);
    }
    let mut free = ('\u{100000}'..='\u{10FFFD}').filter(|c| !used.contains(c));
    match (free.next(), free.next()) {
        (Some(begin), Some(end)) => (begin, end),
        // 65,534 different private characters in one conversation: their spans will not be told.
        _ => ('\u{10FFFE}', '\u{10FFFF}'),
    }
}

fn private_characters(value: &Json, used: &mut Vec<char>) {
    match value {
        Json::String(text) => {
            for c in text.chars().filter(|c| *c >= '\u{100000}') {
                if !used.contains(&c) {
                    used.push(c);
                }
            }
        }
        Json::Array(items) => items.iter().for_each(|item| private_characters(item, used)),
        Json::Object(object) => object
            .values()
            .for_each(|item| private_characters(item, used)),
        _ => {}
    }
}

/// Takes the marks out of a rendering and records where they stood; `None` when they do not pair.
pub(super) fn take(marked: &str, (begin, end): (char, char)) -> Option<Rendered> {
    let mut text = String::with_capacity(marked.len());
    let mut generation = Vec::new();
    let mut open: Option<usize> = None;
    for piece in marked.split_inclusive([begin, end]) {
        if let Some(before) = piece.strip_suffix(begin) {
            text.push_str(before);
            if open.replace(text.len()).is_some() {
                return None;
            }
        } else if let Some(before) = piece.strip_suffix(end) {
            text.push_str(before);
            generation.push(open.take()?..text.len());
        } else {
            text.push_str(piece);
        }
    }
    open.is_none().then_some(Rendered { text, generation })
}

#[cfg(test)]
mod tests {
    use crate::data::template::tests::render;
    use serde_json::json;

    #[test]
    fn generation_blocks_become_spans_and_keep_white_space() {
        let source = "{% for m in messages %}\n  {% generation %}\n  <{{ m.content }}>\n  {% endgeneration %}\n.{% endfor %}";
        let plain = source
            .replace("{% generation %}", "{% if true %}")
            .replace("{% endgeneration %}", "{% endif %}");
        let messages = json!([{"role": "a", "content": "é"}, {"role": "a", "content": "x"}]);
        let marked = render(source, messages.clone()).unwrap();
        assert_eq!(marked.text, render(&plain, messages).unwrap().text);
        let spans: Vec<&str> = marked
            .generation
            .iter()
            .map(|span| &marked.text[span.clone()])
            .collect();
        assert_eq!(spans, ["  <é>\n", "  <x>\n"]);
    }

    #[test]
    fn content_with_private_characters_does_not_disturb_spans() {
        let content = "a\u{100000}b\u{100001}c";
        let marked = render(
            "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
            json!([{"role": "a", "content": content}]),
        )
        .unwrap();
        assert_eq!(marked.text, format!("{content}!"));
        assert_eq!(
            marked.generation.as_slice(),
            std::slice::from_ref(&(0..content.len()))
        );
    }

    #[test]
    fn variables_set_in_a_generation_block_stay_there() {
        let out = render(
            "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
            json!([{}]),
        );
        assert_eq!(out.unwrap().text, "21");
    }
}
