//! The turns of a conversation, from the roles of its tokens.
//!
//! What a template writes between two messages ends one turn and begins the next:
//! `<|im_end|>⏎` is the user's, `<|im_start|>assistant⏎` the assistant's.

use std::ops::Range;

use crate::data::preview::PreviewToken;

/// The role of what the template writes.
const TEMPLATE: &str = "template";

/// The role of what fills a row up.
pub const PADDING: &str = "padding";

/// Tokens that stand together: one message with what the template writes around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Whose turn it is.
    pub role: &'static str,
    /// The sample of a packed row.
    pub segment: usize,
    /// Its tokens.
    pub tokens: Range<usize>,
}

/// Splits a row into turns; together they are the row.
pub fn turns(tokens: &[PreviewToken]) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::new();
    let mut start = 0;
    while start < tokens.len() {
        let end = run_end(tokens, start);
        let (role, segment) = (tokens[start].role, tokens[start].segment);
        match turns.last_mut().filter(|turn| turn.segment == segment) {
            Some(before) if role == TEMPLATE => {
                let ended = tokens[start - 1].special;
                let cut = start + closing(&tokens[start..end], ended);
                before.tokens.end = cut;
                if cut < end {
                    turns.push(new(TEMPLATE, segment, cut..end));
                }
            }
            // A template's header waits for the message that it belongs to.
            Some(before) if before.role == TEMPLATE => {
                before.role = role;
                before.tokens.end = end;
            }
            Some(before) if before.role == role => before.tokens.end = end,
            _ => turns.push(new(role, segment, start..end)),
        }
        start = end;
    }
    join_tails(&mut turns);
    turns
}

fn new(role: &'static str, segment: usize, tokens: Range<usize>) -> Turn {
    Turn {
        role,
        segment,
        tokens,
    }
}

/// Where the tokens of one role and one segment end.
fn run_end(tokens: &[PreviewToken], start: usize) -> usize {
    let first = &tokens[start];
    let other = |t: &PreviewToken| t.role != first.role || t.segment != first.segment;
    let length = tokens[start..].iter().position(other);
    length.map_or(tokens.len(), |length| start + length)
}

/// How many tokens, of those a template writes after a message, still belong to that message: up
/// to the special token that opens the next turn, or else up to the line's end. A message that is
/// not `ended` by a special token of its own has the first one.
fn closing(tokens: &[PreviewToken], ended: bool) -> usize {
    let mut specials = tokens.iter().enumerate().filter(|(_, t)| t.special);
    let end = if ended { None } else { specials.next() };
    if let Some((opening, _)) = specials.next() {
        return opening;
    }
    let from = end.map_or(0, |(end, _)| end + 1);
    let line_end = tokens[from..].iter().position(|t| t.text.contains('\n'));
    line_end.map_or(from, |length| from + length + 1)
}

/// A header that no message follows ends the turn before; alone it is the template's.
fn join_tails(turns: &mut Vec<Turn>) {
    turns.dedup_by(|turn, before| {
        let is_tail = turn.role == TEMPLATE && turn.segment == before.segment;
        if is_tail {
            before.tokens.end = turn.tokens.end;
        }
        is_tail
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `*` marks special tokens; `t:` template, `u:` user, `a:` assistant; a digit before is the segment.
    fn row(tokens: &[&str]) -> Vec<PreviewToken> {
        let token = |(position, token): (usize, &&str)| {
            let (head, text) = token.split_once(':').unwrap();
            let role = match &head[head.len() - 1..] {
                "t" => TEMPLATE,
                "u" => "user",
                _ => "assistant",
            };
            PreviewToken {
                id: 0,
                text: text.trim_start_matches('*').to_owned(),
                special: text.starts_with('*'),
                trained: false,
                role,
                position,
                segment: head[..head.len() - 1].parse().unwrap_or(0),
            }
        };
        tokens.iter().enumerate().map(token).collect()
    }

    /// The turns' roles and texts.
    fn texts(tokens: &[&str]) -> Vec<String> {
        let tokens = row(tokens);
        let text = |turn: &Turn| {
            let texts = tokens[turn.tokens.clone()].iter().map(|t| &*t.text);
            format!("{}: {}", turn.role, texts.collect::<String>())
        };
        turns(&tokens).iter().map(text).collect()
    }

    #[test]
    fn chatml() {
        let row = [
            "t:*<s>",
            "t:user",
            "t:\n",
            "u:Hi",
            "t:*<e>",
            "t:\n",
            "t:*<s>",
            "t:assistant",
            "t:\n",
            "a:Yes",
            "a:*<e>",
            "t:\n",
        ];
        let expected = [
            "user: <s>user\nHi<e>\n",
            "assistant: <s>assistant\nYes<e>\n",
        ];
        assert_eq!(texts(&row), expected);
    }

    #[test]
    fn an_end_that_trains_is_the_assistants() {
        let row = [
            "a:Yes", "a:*<e>", "t:\n", "t:*<s>", "t:user", "t:\n", "u:Hi",
        ];
        assert_eq!(texts(&row), ["assistant: Yes<e>\n", "user: <s>user\nHi"]);
        let row = [
            "a:Yes", "a:*<eot>", "t:*<h>", "t:user", "t:*</h>", "t:\n\n", "u:Hi",
        ];
        assert_eq!(
            texts(&row),
            ["assistant: Yes<eot>", "user: <h>user</h>\n\nHi"]
        );
    }

    #[test]
    fn the_same_role_twice() {
        let row = ["u:one", "t:*<e>", "t:*<s>", "u:two"];
        assert_eq!(texts(&row), ["user: one<e>", "user: <s>two"]);
    }

    #[test]
    fn templates_of_plain_text() {
        let row = ["t:### Q\n", "u:Why?", "t:\n\n", "t:### A:\n", "a:So."];
        assert_eq!(
            texts(&row),
            ["user: ### Q\nWhy?\n\n", "assistant: ### A:\nSo."]
        );
        let row = ["t:[INST]", "u:Why?", "t:*[/INST]", "a:So.", "a:*</s>"];
        assert_eq!(
            texts(&row),
            ["user: [INST]Why?[/INST]", "assistant: So.</s>"]
        );
    }

    #[test]
    fn turns_do_not_pass_a_segments_end() {
        let row = ["0a:one", "0t:*<e>", "1t:*<s>", "1a:two", "2t:*<s>"];
        let expected = ["assistant: one<e>", "assistant: <s>two", "template: <s>"];
        assert_eq!(texts(&row), expected);
        assert!(turns(&[]).is_empty());
    }
}
