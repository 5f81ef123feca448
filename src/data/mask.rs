//! Decides which tokens train.
//!
//! A conversation is rendered and tokenised once, as a whole, so the ids are those of transformers'
//! `apply_chat_template`. Assistant turns are byte spans of that rendering: the template's
//! `{% generation %}` blocks where it has them, else the difference between renderings of prefixes
//! of the conversation, each checked against the whole. Byte spans become token spans through the
//! tokenizer's offsets; no text is searched for a turn.

use std::ops::Range;

use serde_json::{Map, Value};

use super::IGNORE_INDEX;
use super::contract::Contract;
use super::conversation::{Conversation, Message, Row};
use super::faults::RowError;
use super::template::{ChatTemplate, Rendered, Request};
use super::tokenize::{ChatTokenizer, Encoded, TokenizerError};
use crate::recipe::named_templates::{self, EndOfTurn};

/// Makes tokens with labels of rows.
#[derive(Debug)]
pub struct Masker<'a> {
    /// The tokenizer with its template.
    pub tokenizer: &'a ChatTokenizer,
    /// Every token trains, not only assistant turns.
    pub train_on_inputs: bool,
    /// What must hold.
    pub contract: Contract,
}

/// A row as tokens, before truncation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masked {
    /// `[T]`
    pub input_ids: Vec<u32>,
    /// `[T]`; the id where it trains, [`IGNORE_INDEX`] where not.
    pub labels: Vec<i32>,
}

impl Masked {
    fn new(ids: Vec<u32>, turns: &[Range<usize>]) -> Self {
        let mut labels = vec![IGNORE_INDEX; ids.len()];
        for turn in turns {
            for (label, id) in labels[turn.clone()].iter_mut().zip(&ids[turn.clone()]) {
                // Vocabularies are far smaller than 2³¹.
                *label = i32::try_from(*id).unwrap_or(IGNORE_INDEX);
            }
        }
        Self {
            input_ids: ids,
            labels,
        }
    }
}

impl Masker<'_> {
    /// The tokens of a row: one sequence, or the chosen and the rejected one of a pair.
    ///
    /// # Errors
    /// The row cannot be rendered, or breaks a clause of the mask contract that is not waived.
    pub fn mask(&self, row: &Row) -> Result<Vec<Masked>, RowError> {
        match row {
            Row::Preference { chosen, rejected } => {
                let mut both = self.mask(chosen)?;
                both.extend(self.mask(rejected)?);
                Ok(both)
            }
            row => Ok(vec![self.one(row)?]),
        }
    }

    fn one(&self, row: &Row) -> Result<Masked, RowError> {
        let masked = match row {
            Row::Chat(conversation) => self.chat(conversation)?,
            Row::Completion { prompt, response } => {
                let skip = if self.train_on_inputs {
                    0
                } else {
                    prompt.len()
                };
                plain(&format!("{prompt}{response}"), skip, self.tokenizer)?
            }
            Row::Text(text) => plain(text, 0, self.tokenizer)?,
            Row::Tokens { input_ids, labels } => self.tokens(input_ids, labels.as_deref())?,
            Row::Preference { .. } => return Err(RowError::NestedPair),
        };
        let Masked { input_ids, labels } = &masked;
        let is_chat = matches!(row, Row::Chat(_));
        let contract = &self.contract;
        contract.check_row(input_ids, labels, is_chat, self.tokenizer)?;
        if trained(labels) == 0 {
            contract.forgive(RowError::AllMasked)?;
        }
        Ok(masked)
    }

    fn tokens(&self, ids: &[u32], labels: Option<&[i32]>) -> Result<Masked, RowError> {
        let masked = match labels {
            Some(labels) => Masked {
                input_ids: ids.to_owned(),
                labels: labels.to_owned(),
            },
            None => Masked::new(ids.to_owned(), std::slice::from_ref(&(0..ids.len()))),
        };
        let vocab_size = self.tokenizer.vocab_size();
        let largest = masked.input_ids.iter().copied().max().unwrap_or(0);
        if largest as usize >= vocab_size {
            return Err(RowError::UnknownId {
                id: largest,
                vocab_size,
            });
        }
        self.contract.check_runs(&masked.labels, self.tokenizer)?;
        Ok(masked)
    }

    fn chat(&self, conversation: &Conversation) -> Result<Masked, RowError> {
        let template = self.tokenizer.template().ok_or(RowError::NoChatTemplate)?;
        let chat = Chat::new(conversation, template, self.tokenizer)?;
        let everything = 0..chat.encoded.ids.len();
        let turns = if self.train_on_inputs {
            vec![everything]
        } else {
            chat.assistant_turns(&self.contract)?
        };
        Ok(Masked::new(chat.encoded.ids, &turns))
    }

    /// The role of each token, for people: that of the message whose rendering it belongs to.
    ///
    /// Messages are told apart by rendering prefixes of the conversation; where the template does
    /// not allow that, everything is `template`.
    pub fn roles(&self, row: &Row, masked: &Masked) -> Vec<&'static str> {
        let count = masked.input_ids.len();
        match row {
            Row::Chat(conversation) => chat_roles(conversation, self.tokenizer, count),
            Row::Completion { .. } => {
                let starts = masked
                    .labels
                    .iter()
                    .position(|label| *label != IGNORE_INDEX);
                let prompt = starts.unwrap_or(count);
                [vec!["prompt"; prompt], vec!["text"; count - prompt]].concat()
            }
            Row::Text(_) | Row::Tokens { .. } | Row::Preference { .. } => vec!["text"; count],
        }
    }
}

/// How many tokens train: label i is predicted from the tokens before it, so the first never is.
pub fn trained(labels: &[i32]) -> usize {
    let predicted = labels.iter().skip(1);
    predicted.filter(|label| **label != IGNORE_INDEX).count()
}

/// A text with the tokens that the tokenizer adds before it, and EOS behind. Everything from byte
/// `skip` on trains, and all of it where `skip` is 0.
fn plain(text: &str, skip: usize, tokenizer: &ChatTokenizer) -> Result<Masked, RowError> {
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
    let trains = first..input_ids.len();
    Ok(Masked::new(input_ids, std::slice::from_ref(&trains)))
}

fn encode(text: &str, tokenizer: &ChatTokenizer) -> Result<Encoded, RowError> {
    tokenizer
        .encode_with_spans(text)
        .map_err(|error: TokenizerError| RowError::Tokenizer {
            message: error.to_string(),
        })
}

/// A conversation, rendered and tokenised, whose assistant turns are wanted.
struct Chat<'a> {
    messages: Vec<Map<String, Value>>,
    conversation: &'a Conversation,
    template: &'a ChatTemplate,
    rendered: Rendered,
    encoded: Encoded,
    tokenizer: &'a ChatTokenizer,
}

impl<'a> Chat<'a> {
    fn new(
        conversation: &'a Conversation,
        template: &'a ChatTemplate,
        tokenizer: &'a ChatTokenizer,
    ) -> Result<Self, RowError> {
        let messages: Vec<_> = conversation.messages.iter().map(Message::to_json).collect();
        let rendered = template.render(&request(conversation, &messages, false))?;
        let encoded = encode(&rendered.text, tokenizer)?;
        Ok(Self {
            messages,
            conversation,
            template,
            rendered,
            encoded,
            tokenizer,
        })
    }

    /// Token spans of the assistant's turns that train, each ending with a stop token.
    fn assistant_turns(&self, contract: &Contract) -> Result<Vec<Range<usize>>, RowError> {
        let messages = self.conversation.messages.iter().enumerate();
        let by_assistant = messages.filter(|(_, message)| message.role == "assistant");
        let turns: Vec<(usize, bool)> = by_assistant.map(|(i, m)| (i, m.trains)).collect();
        if turns.is_empty() {
            contract.forgive(RowError::NoAssistantTurn)?;
        }
        if self.template.marks_generation() {
            return self.marked_turns(&turns, contract);
        }
        let turns = turns.iter().enumerate().filter(|(_, (_, trains))| *trains);
        turns
            .map(|(turn, (i, _))| self.derived(turn, *i, contract))
            .collect()
    }

    /// The generation blocks, one a message where some of them do not train.
    fn marked_turns(
        &self,
        turns: &[(usize, bool)],
        contract: &Contract,
    ) -> Result<Vec<Range<usize>>, RowError> {
        let blocks = &self.rendered.generation;
        let all_train = turns.iter().all(|(_, trains)| *trains);
        if !all_train && blocks.len() != turns.len() {
            return Err(RowError::UnmatchedBlocks {
                template: self.template.name().to_owned(),
                blocks: blocks.len(),
                turns: turns.len(),
            });
        }
        let trains = |block: usize| all_train || turns[block].1;
        let wanted = blocks.iter().enumerate();
        let wanted = wanted.filter(|(i, block)| trains(*i) && !block.is_empty());
        wanted
            .enumerate()
            .map(|(turn, (_, span))| self.marked(turn, span, contract))
            .collect()
    }

    /// The tokens of a generation block: all of them train, as in transformers.
    fn marked(
        &self,
        turn: usize,
        span: &Range<usize>,
        contract: &Contract,
    ) -> Result<Range<usize>, RowError> {
        let tokens = token_range(&self.encoded.spans, span);
        match self.last_stop(&tokens) {
            Some(end)
                if self.is_end(&self.rendered.text[self.encoded.spans[end].end..span.end]) =>
            {
                contract.check_stop(self.encoded.ids[end], self.tokenizer)?;
            }
            _ => contract.forgive(self.no_end(turn, &tokens))?,
        }
        Ok(tokens)
    }

    /// The tokens of message `i` up to its end-of-turn token; what the template puts behind that
    /// (a line break, mostly) does not train.
    ///
    /// With `prompt` the rendering of all messages before it and the beginning of an assistant
    /// turn, and `upto` the rendering up to and with it, the turn is what `upto` has beyond
    /// `prompt`. The whole rendering must agree with `upto` through the end-of-turn token, behind
    /// which `upto` may only have what ends a conversation. Templates that rewrite earlier turns
    /// are found out here.
    fn derived(
        &self,
        turn: usize,
        i: usize,
        contract: &Contract,
    ) -> Result<Range<usize>, RowError> {
        let inexact = || RowError::InexactSpans {
            template: self.template.name().to_owned(),
            message: i,
        };
        // Templates may refuse what is no whole conversation: no exact span then either.
        let prompt = self.prefix(i, true).ok_or_else(inexact)?;
        let whole = &self.rendered.text;
        let upto = if i + 1 == self.messages.len() {
            whole.clone()
        } else {
            self.prefix(i + 1, false).ok_or_else(inexact)?
        };
        let pairs = whole.bytes().zip(upto.bytes());
        let common = pairs.take_while(|(a, b)| a == b).count();
        if common < prompt.len() || !upto.starts_with(&prompt) {
            return Err(inexact());
        }
        let spans = &self.encoded.spans;
        let mut tokens = token_range(spans, &(prompt.len()..common));
        while tokens.end > tokens.start && spans[tokens.end - 1].end > common {
            tokens.end -= 1;
        }
        let behind = |end: usize| upto.get(spans[end].end..);
        match self.last_stop(&tokens) {
            Some(end) if behind(end).is_some_and(|rest| self.is_end(rest)) => {
                contract.check_stop(self.encoded.ids[end], self.tokenizer)?;
                Ok(tokens.start..end + 1)
            }
            _ if common == upto.len() => {
                contract.forgive(self.no_end(turn, &tokens))?;
                Ok(tokens)
            }
            _ => Err(inexact()),
        }
    }

    /// The rendering of the first messages; `None` where the template refuses it.
    fn prefix(&self, count: usize, add_generation_prompt: bool) -> Option<String> {
        let messages = &self.messages[..count];
        let request = request(self.conversation, messages, add_generation_prompt);
        Some(self.template.render_any(&request).ok()?.text)
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
            remedy: self.remedy(),
        }
    }

    /// What to do about a turn without an end.
    fn remedy(&self) -> String {
        let named = named_templates::find(self.template.name());
        if let Some(EndOfTurn::Token(token)) = named.map(|template| template.end_of_turn)
            && self.tokenizer.token_id(token).is_none()
        {
            return format!(
                "`{token}`, which should end it, is no token of this tokenizer: name a template of the model's own family in data.chat_template"
            );
        }
        "end the turn (inside its `generation` block, if any) with one of these, or add the template's end-of-turn token to eos_token_id in generation_config.json".to_owned()
    }
}

fn request<'a>(
    conversation: &'a Conversation,
    messages: &'a [Map<String, Value>],
    add_generation_prompt: bool,
) -> Request<'a> {
    Request {
        messages,
        tools: conversation.tools.as_ref(),
        variables: Some(&conversation.variables),
        add_generation_prompt,
    }
}

/// Roles of a conversation's tokens: message i has what the rendering up to it adds.
fn chat_roles(
    conversation: &Conversation,
    tokenizer: &ChatTokenizer,
    count: usize,
) -> Vec<&'static str> {
    let mut roles = vec!["template"; count];
    let Some(template) = tokenizer.template() else {
        return roles;
    };
    let Ok(chat) = Chat::new(conversation, template, tokenizer) else {
        return roles;
    };
    let mut start = 0;
    for (i, message) in conversation.messages.iter().enumerate() {
        let Some(upto) = chat.prefix(i + 1, false) else {
            continue;
        };
        let pairs = chat.rendered.text.bytes().zip(upto.bytes());
        let end = pairs.take_while(|(a, b)| a == b).count();
        if end > start {
            let tokens = token_range(&chat.encoded.spans, &(start..end));
            let tokens = tokens.start.min(count)..tokens.end.min(count);
            roles[tokens].fill(role_name(&message.role));
            start = end;
        }
    }
    roles
}

fn role_name(role: &str) -> &'static str {
    match role {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => "tool",
        _ => "template",
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
