//! Decides which tokens train, and checks that what trains is what generation needs.
//!
//! A conversation is rendered and tokenised once, as a whole, so the ids are those of transformers'
//! `apply_chat_template`. Assistant turns are byte spans of that rendering: the template's
//! `{% generation %}` blocks where it has them, else the difference between renderings of prefixes
//! of the conversation, each checked against the whole. Byte spans become token spans through the
//! tokenizer's offsets; no text is searched for a turn.

use std::ops::Range;

use serde_json::{Map, Value};

use super::conversation::{Message, Row};
use super::faults::RowError;
use super::template::{ChatTemplate, Rendered, Request};
use super::tokenize::{ChatTokenizer, Encoded, TokenizerError};
use super::{IGNORE_INDEX, Sample, SampleId};

/// What the recipe says about labels.
#[derive(Debug, Clone, Copy)]
pub struct MaskOptions {
    /// Longer samples are cut on the right.
    pub max_seq_len: usize,
    /// Every token trains, not only assistant turns.
    pub train_on_inputs: bool,
}

/// Makes a sample of a row. `None` when truncation cut off all that would train.
///
/// # Errors
/// The row cannot be rendered, or breaks the mask contract: every trained turn ends with a
/// labelled token that generation stops on, there is at most one BOS, labels are not empty.
pub fn sample(
    row: &Row,
    tokenizer: &ChatTokenizer,
    options: MaskOptions,
    source: SampleId,
) -> Result<Option<Sample>, RowError> {
    let (input_ids, labels) = match row {
        Row::Chat(messages) => chat(messages, tokenizer, options)?,
        Row::Completion { prompt, response } => {
            let skip = if options.train_on_inputs {
                0
            } else {
                prompt.len()
            };
            plain(&format!("{prompt}{response}"), skip, tokenizer)?
        }
        Row::Text(text) => plain(text, 0, tokenizer)?,
    };
    check_bos(&input_ids, tokenizer)?;
    if trained(&labels) == 0 {
        return Err(RowError::AllMasked);
    }
    Ok(truncate(input_ids, labels, options.max_seq_len, source))
}

/// How many tokens train: label i is predicted from the tokens before it, so the first never is.
pub fn trained(labels: &[i32]) -> usize {
    let predicted = labels.iter().skip(1);
    predicted.filter(|label| **label != IGNORE_INDEX).count()
}

fn truncate(
    mut input_ids: Vec<u32>,
    mut labels: Vec<i32>,
    max_seq_len: usize,
    source: SampleId,
) -> Option<Sample> {
    let truncated = input_ids.len() > max_seq_len;
    input_ids.truncate(max_seq_len);
    labels.truncate(max_seq_len);
    (trained(&labels) > 0).then_some(Sample {
        input_ids,
        labels,
        source,
        truncated,
    })
}

/// A text with the tokens that the tokenizer adds before it, and EOS behind. Everything from byte
/// `skip` on trains, and all of it where `skip` is 0.
fn plain(
    text: &str,
    skip: usize,
    tokenizer: &ChatTokenizer,
) -> Result<(Vec<u32>, Vec<i32>), RowError> {
    let eos = tokenizer.eos_id().ok_or(RowError::NoEos)?;
    let Encoded { ids, spans } = encode(text, tokenizer)?;
    let first = if skip == 0 {
        0
    } else {
        let after = spans.iter().position(|span| span.end > skip);
        tokenizer.prefix().len() + after.unwrap_or(ids.len())
    };
    let mut input_ids = [tokenizer.prefix(), &ids].concat();
    // A text may end with EOS already.
    if input_ids.last() != Some(&eos) || first >= input_ids.len() {
        input_ids.push(eos);
    }
    let labels = labels_in(&input_ids, std::slice::from_ref(&(first..input_ids.len())));
    Ok((input_ids, labels))
}

fn chat(
    messages: &[Message],
    tokenizer: &ChatTokenizer,
    options: MaskOptions,
) -> Result<(Vec<u32>, Vec<i32>), RowError> {
    let template = tokenizer.template().ok_or(RowError::NoChatTemplate)?;
    let objects: Vec<Map<String, Value>> = messages.iter().map(Message::to_json).collect();
    let rendered = template.render(&request(&objects, false))?;
    let encoded = encode(&rendered.text, tokenizer)?;
    let turns = if options.train_on_inputs {
        std::iter::once(0..encoded.ids.len()).collect()
    } else {
        assistant_turns(&objects, template, &rendered, &encoded, tokenizer)?
    };
    let labels = labels_in(&encoded.ids, &turns);
    Ok((encoded.ids, labels))
}

fn request(messages: &[Map<String, Value>], add_generation_prompt: bool) -> Request<'_> {
    Request {
        messages,
        tools: None,
        variables: None,
        add_generation_prompt,
    }
}

fn encode(text: &str, tokenizer: &ChatTokenizer) -> Result<Encoded, RowError> {
    tokenizer
        .encode_with_spans(text)
        .map_err(|error: TokenizerError| RowError::Tokenizer {
            message: error.to_string(),
        })
}

fn labels_in(ids: &[u32], turns: &[Range<usize>]) -> Vec<i32> {
    let mut labels = vec![IGNORE_INDEX; ids.len()];
    for turn in turns {
        for (label, id) in labels[turn.clone()].iter_mut().zip(&ids[turn.clone()]) {
            // Vocabularies are far smaller than 2³¹.
            *label = i32::try_from(*id).unwrap_or(IGNORE_INDEX);
        }
    }
    labels
}

fn is_assistant(message: &Map<String, Value>) -> bool {
    message.get("role").and_then(Value::as_str) == Some("assistant")
}

/// Token spans of the assistant's turns, each ending with a stop token.
fn assistant_turns(
    messages: &[Map<String, Value>],
    template: &ChatTemplate,
    rendered: &Rendered,
    encoded: &Encoded,
    tokenizer: &ChatTokenizer,
) -> Result<Vec<Range<usize>>, RowError> {
    if !messages.iter().any(is_assistant) {
        return Err(RowError::NoAssistantTurn);
    }
    let context = Turns {
        messages,
        template,
        whole: &rendered.text,
        encoded,
        tokenizer,
    };
    if template.marks_generation() {
        let blocks = rendered.generation.iter().filter(|block| !block.is_empty());
        let turns = blocks.enumerate();
        return turns
            .map(|(turn, span)| context.marked(turn, span))
            .collect();
    }
    let indices = (0..messages.len()).filter(|i| is_assistant(&messages[*i]));
    let turns = indices.enumerate();
    turns.map(|(turn, i)| context.derived(turn, i)).collect()
}

/// A rendered conversation whose assistant turns are wanted.
struct Turns<'a> {
    messages: &'a [Map<String, Value>],
    template: &'a ChatTemplate,
    whole: &'a str,
    encoded: &'a Encoded,
    tokenizer: &'a ChatTokenizer,
}

impl Turns<'_> {
    /// The tokens of a generation block: all of them train, as in transformers.
    fn marked(&self, turn: usize, span: &Range<usize>) -> Result<Range<usize>, RowError> {
        let tokens = token_range(&self.encoded.spans, span);
        match self.last_stop(&tokens) {
            Some(end) if self.is_end(&self.whole[self.encoded.spans[end].end..span.end]) => {
                Ok(tokens)
            }
            _ => Err(self.no_end(turn, &tokens)),
        }
    }

    /// The tokens of message `i` up to its end-of-turn token; what the template puts behind that
    /// (a line break, mostly) does not train.
    ///
    /// With `prompt` the rendering of all messages before it and the beginning of an assistant
    /// turn, and `upto` the rendering up to and with it, the turn is what `upto` has beyond
    /// `prompt`. The whole rendering must agree with `upto` through the end-of-turn token, behind
    /// which `upto` may only have what ends a conversation. Templates that rewrite earlier turns
    /// are found out here.
    fn derived(&self, turn: usize, i: usize) -> Result<Range<usize>, RowError> {
        let inexact = || RowError::InexactSpans {
            template: self.template.name().to_owned(),
            message: i,
        };
        // Templates may refuse what is no whole conversation: no exact span then either.
        let render = |count: usize, add_generation_prompt: bool| {
            let request = request(&self.messages[..count], add_generation_prompt);
            self.template.render_any(&request).map_err(|_| inexact())
        };
        let prompt = render(i, true)?.text;
        let upto = if i + 1 == self.messages.len() {
            self.whole.to_owned()
        } else {
            render(i + 1, false)?.text
        };
        let pairs = self.whole.bytes().zip(upto.bytes());
        let common = pairs.take_while(|(a, b)| a == b).count();
        if common < prompt.len() || !upto.starts_with(&prompt) {
            return Err(inexact());
        }
        let spans = &self.encoded.spans;
        let mut tokens = token_range(spans, &(prompt.len()..common));
        while tokens.end > tokens.start && spans[tokens.end - 1].end > common {
            tokens.end -= 1;
        }
        match self.last_stop(&tokens) {
            Some(end)
                if upto
                    .get(spans[end].end..)
                    .is_some_and(|rest| self.is_end(rest)) =>
            {
                Ok(tokens.start..end + 1)
            }
            _ if common == upto.len() => Err(self.no_end(turn, &tokens)),
            _ => Err(inexact()),
        }
    }

    fn last_stop(&self, tokens: &Range<usize>) -> Option<usize> {
        let stop_ids = self.tokenizer.stop_ids();
        let is_stop = |i: &usize| stop_ids.contains(&self.encoded.ids[*i]);
        tokens.clone().rev().find(is_stop)
    }

    /// Whether a text is nothing but white space and stop tokens.
    fn is_end(&self, text: &str) -> bool {
        if text.trim().is_empty() {
            return true;
        }
        let ids = self.tokenizer.stop_ids().iter();
        let texts: Vec<String> = ids
            .map(|id| self.tokenizer.token_text(*id))
            .filter(|stop| !stop.trim().is_empty())
            .collect();
        let mut rest = text.trim();
        while let Some(behind) = texts
            .iter()
            .find_map(|stop| rest.strip_prefix(stop.as_str()))
        {
            rest = behind.trim_start();
        }
        rest.is_empty()
    }

    fn no_end(&self, turn: usize, tokens: &Range<usize>) -> RowError {
        let text = |id: &u32| format!("`{}`", self.tokenizer.token_text(*id).escape_debug());
        // Not the line break that so many templates put behind the end.
        let ids = &self.encoded.ids[tokens.clone()];
        let is_blank = |id: &&u32| self.tokenizer.token_text(**id).trim().is_empty();
        let last = ids.iter().rev().find(|id| !is_blank(id)).or(ids.last());
        let stop: Vec<String> = self.tokenizer.stop_ids().iter().map(text).collect();
        RowError::NoEndOfTurn {
            template: self.template.name().to_owned(),
            turn: turn + 1,
            found: last.map_or_else(|| "nothing".to_owned(), text),
            stop: if stop.is_empty() {
                "none is known".to_owned()
            } else {
                stop.join(", ")
            },
        }
    }
}

/// The tokens of a byte span as transformers' `char_to_token` finds them: from the first token
/// that touches it (one that straddles its beginning counts) to the first that holds its last
/// character. That is all of them wherever a span ends with a token of its own, such as the
/// end-of-turn token, which is checked where labels are made.
pub fn token_range(tokens: &[Range<usize>], span: &Range<usize>) -> Range<usize> {
    let start = tokens.partition_point(|token| token.end <= span.start);
    let mut end = tokens.partition_point(|token| token.start < span.end);
    while end >= start + 2 && tokens[end - 2] == tokens[end - 1] {
        end -= 1;
    }
    start..end.max(start)
}

fn check_bos(ids: &[u32], tokenizer: &ChatTokenizer) -> Result<(), RowError> {
    match (ids, tokenizer.bos_id()) {
        ([first, second, ..], Some(bos)) if *first == bos && *second == bos => {
            Err(RowError::DoubleBos {
                token: tokenizer.token_text(bos),
            })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_spans_become_the_tokens_that_touch_them() {
        // Four tokens; the last two share one character.
        let tokens = [0..2, 2..5, 5..9, 5..9];
        assert_eq!(token_range(&tokens, &(2..5)), 1..2);
        assert_eq!(token_range(&tokens, &(3..6)), 1..3);
        assert_eq!(token_range(&tokens, &(3..4)), 1..2);
        assert_eq!(token_range(&tokens, &(9..9)), 4..4);
        assert_eq!(token_range(&tokens, &(0..0)), 0..0);
    }

    #[test]
    fn the_first_token_never_trains() {
        assert_eq!(trained(&[5, IGNORE_INDEX, 7]), 1);
        assert_eq!(trained(&[5]), 0);
        assert_eq!(trained(&[]), 0);
    }
}
