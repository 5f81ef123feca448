//! Decides which tokens train, and checks that what trains is what generation needs.
//!
//! A conversation is rendered and tokenised once, as a whole, so the ids are those of transformers'
//! `apply_chat_template`. Assistant turns are byte spans of that rendering: the template's
//! `{% generation %}` blocks where it has them, else the difference between renderings of prefixes
//! of the conversation, each checked against the whole. Byte spans become token spans through the
//! tokenizer's offsets; nothing is searched for in text or ids.

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
    let marked = template.marks_generation();
    let spans = if marked {
        rendered.generation.clone()
    } else {
        spans_by_prefixes(messages, template, &rendered.text)?
    };
    let mut turns = Vec::with_capacity(spans.len());
    for (i, span) in spans.iter().enumerate() {
        let tokens = token_range(&encoded.spans, span);
        if tokens.is_empty() && marked {
            continue;
        }
        let end = end_of_turn(&rendered.text, encoded, &tokens, span.end, tokenizer);
        let end = end.ok_or_else(|| no_end(template, i, encoded, &tokens, tokenizer))?;
        // A generation block says itself what trains, as in transformers; elsewhere what follows
        // the end-of-turn token (a line break, mostly) belongs to the template.
        let end = if marked { tokens.end } else { end + 1 };
        turns.push(tokens.start..end);
    }
    Ok(turns)
}

/// The byte span of each assistant message with what the template puts behind it.
///
/// With `p` the rendering of all messages before it and the beginning of an assistant turn, and
/// `u` the rendering up to and with it, the span is what `u` has beyond `p`. Both must be
/// beginnings of the whole rendering; templates that rewrite earlier turns are found out here.
fn spans_by_prefixes(
    messages: &[Map<String, Value>],
    template: &ChatTemplate,
    whole: &str,
) -> Result<Vec<Range<usize>>, RowError> {
    let mut spans = Vec::new();
    for (i, _) in messages.iter().enumerate().filter(|(_, m)| is_assistant(m)) {
        let inexact = || RowError::InexactSpans {
            template: template.name().to_owned(),
            message: i,
        };
        // Templates may refuse what is no whole conversation: no exact span then either.
        let prompt = template.render_any(&request(&messages[..i], true));
        let prompt = prompt.map_err(|_| inexact())?.text;
        let upto = if i + 1 == messages.len() {
            whole.to_owned()
        } else {
            let upto = template.render_any(&request(&messages[..=i], false));
            upto.map_err(|_| inexact())?.text
        };
        if !upto.starts_with(&prompt) || !whole.starts_with(&upto) {
            return Err(inexact());
        }
        spans.push(prompt.len()..upto.len());
    }
    Ok(spans)
}

/// The tokens that have bytes in `span`. One that straddles its beginning counts, as with
/// transformers' `char_to_token`.
fn token_range(tokens: &[Range<usize>], span: &Range<usize>) -> Range<usize> {
    let start = tokens.partition_point(|token| token.end <= span.start);
    let end = tokens.partition_point(|token| token.start < span.end);
    start..end.max(start)
}

/// The last stop token of the turn, if only white space follows it there.
fn end_of_turn(
    text: &str,
    encoded: &Encoded,
    tokens: &Range<usize>,
    span_end: usize,
    tokenizer: &ChatTokenizer,
) -> Option<usize> {
    let is_stop = |i: &usize| tokenizer.stop_ids().contains(&encoded.ids[*i]);
    let end = tokens.clone().rev().find(is_stop)?;
    let behind = text.get(encoded.spans[end].end..span_end)?;
    behind.trim().is_empty().then_some(end)
}

fn no_end(
    template: &ChatTemplate,
    turn: usize,
    encoded: &Encoded,
    tokens: &Range<usize>,
    tokenizer: &ChatTokenizer,
) -> RowError {
    let text = |id: &u32| format!("`{}`", tokenizer.token_text(*id).escape_debug());
    // Not the line break that so many templates put behind the end.
    let ids = &encoded.ids[tokens.clone()];
    let is_blank = |id: &&u32| tokenizer.token_text(**id).trim().is_empty();
    let last = ids.iter().rev().find(|id| !is_blank(id)).or(ids.last());
    let stop: Vec<String> = tokenizer.stop_ids().iter().map(text).collect();
    RowError::NoEndOfTurn {
        template: template.name().to_owned(),
        turn: turn + 1,
        found: last.map_or_else(|| "nothing".to_owned(), text),
        stop: if stop.is_empty() {
            "none is known".to_owned()
        } else {
            stop.join(", ")
        },
    }
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
        assert_eq!(token_range(&tokens, &(3..6)), 1..4);
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
