//! A short way through byte-level BPE: the same ids as `tokenizers`, several times faster.
//!
//! `tokenizers` keeps, for every byte of a text, where it came from, through each step of the
//! pipeline. For byte-level BPE none of that is needed: text is cut at added tokens, then into
//! words by a regular expression; a word's tokens depend on the word alone, so they are cached; and
//! as tokens stand for consecutive bytes, their lengths give their spans. Words that are not in
//! the cache go through the crate's own model.
//!
//! Only pipelines that are known to be equal are taken; for any other, and for texts that
//! normalisation would change, there is no short way and the caller asks `tokenizers`.

use std::sync::{Mutex, PoisonError};

use regex::Regex;
use serde_json::{Value, json};
use tokenizers::{Model, ModelWrapper, NormalizedString, Normalizer, Tokenizer};

use super::Encoded;
use super::vocabulary::{LLAMA_3, QWEN_2, TEKKEN};
use super::word_cache::WordCache;

/// GPT-2's pattern without its two last alternatives, `\s+(?!\S)|\s+`.
const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+";
/// The same where each digit stands alone.
const DIGITS_THEN_GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+";
/// How each pattern ends: the `regex` crate has no look-ahead, so [`Words::end`] does it.
const SPACES: &str = r"|\s+(?!\S)|\s+";

/// The short way of one tokenizer.
#[derive(Debug)]
pub(super) struct ByteLevelBpe {
    /// Patterns of added tokens, those that are sought first in front.
    added: Vec<Regex>,
    words: Words,
    /// Texts must be in Unicode normalisation form C.
    nfc: bool,
    /// The number of bytes that each token of the model stands for, by id.
    lengths: Vec<u32>,
    /// Which bytes the model has tokens for: SmolLM2's, for one, lacks some control characters.
    known: [bool; 256],
    /// Caches that no thread uses at the moment.
    caches: Mutex<Vec<WordCache>>,
}

/// How text between added tokens is cut into words.
#[derive(Debug)]
struct Words {
    /// Anchored: every text begins with some word.
    pattern: Regex,
    /// Letters, with one space before them or none, are a word whatever their case.
    letters: bool,
    /// Digits are cut out first, so that a text ends before each.
    digits_alone: bool,
    /// White space up to a line's end is a word of its own, by an alternative before the last two.
    line_ends: bool,
}

impl ByteLevelBpe {
    /// The short way of `tokenizer`, if it has one. Its post-processor is not looked at.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
        let nfc = normalizer == json!({"type": "NFC"});
        if !nfc && !normalizer.is_null() {
            return None;
        }
        Some(Self {
            added: added_tokens(tokenizer, nfc)?,
            words: Words::of(&serde_json::to_value(tokenizer.get_pre_tokenizer()?).ok()?)?,
            nfc,
            lengths: lengths(tokenizer.get_model())?,
            known: std::array::from_fn(|byte| {
                let mapped = byte_char(u8::try_from(byte).unwrap_or_default());
                let model = tokenizer.get_model();
                model.token_to_id(mapped.encode_utf8(&mut [0; 4])).is_some()
            }),
            caches: Mutex::default(),
        })
    }

    /// Ids and spans of a text, as `tokenizer` gives them, of which this was made; `None` where
    /// only `tokenizer` can tell.
    pub(super) fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Option<Encoded> {
        if self.nfc && !is_nfc(tokenizer, text) {
            return None;
        }
        let mut cache = self.lock().pop().unwrap_or_default();
        let mut encoder = Encoder {
            way: self,
            tokenizer,
            text,
            cache: &mut cache,
            encoded: Encoded {
                ids: Vec::with_capacity(text.len() / 3),
                spans: Vec::with_capacity(text.len() / 3),
            },
        };
        let done = encoder.between_added(&self.added, 0, text.len());
        let encoded = encoder.encoded;
        self.lock().push(cache);
        done.map(|()| encoded)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<WordCache>> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The work on one text.
struct Encoder<'a> {
    way: &'a ByteLevelBpe,
    tokenizer: &'a Tokenizer,
    text: &'a str,
    cache: &'a mut WordCache,
    encoded: Encoded,
}

impl Encoder<'_> {
    /// Encodes a part of the text that may hold added tokens of these kinds.
    fn between_added(&mut self, kinds: &[Regex], start: usize, end: usize) -> Option<()> {
        let Some((kind, later)) = kinds.split_first() else {
            return self.words(start, end);
        };
        let text = self.text;
        let mut at = start;
        for found in kind.find_iter(&text[start..end]) {
            self.between_added(later, at, start + found.start())?;
            at = start + found.end();
            self.encoded
                .ids
                .push(self.tokenizer.token_to_id(found.as_str())?);
            self.encoded.spans.push(start + found.start()..at);
        }
        self.between_added(later, at, end)
    }

    fn words(&mut self, start: usize, end: usize) -> Option<()> {
        let way = self.way;
        let piece = &self.text[start..end];
        let mut at = 0;
        while at < piece.len() {
            let next = match way.words.plain(piece, at) {
                Some(next) => next,
                None => {
                    let found = way.words.pattern.find(&piece[at..])?;
                    way.words.end(piece, at..at + found.end())
                }
            };
            self.word(start + at, start + next)?;
            at = next;
        }
        Some(())
    }

    fn word(&mut self, start: usize, end: usize) -> Option<()> {
        let text = self.text;
        let word = &text[start..end];
        let model = self.tokenizer.get_model();
        let known = &self.way.known;
        let ids = self.cache.get(word, || {
            // The crate leaves out other bytes or puts an unknown token there.
            if !word.bytes().all(|byte| known[usize::from(byte)]) {
                return None;
            }
            let mapped: String = word.bytes().map(byte_char).collect();
            let tokens = model.tokenize(&mapped).ok()?;
            Some(tokens.iter().map(|token| token.id).collect())
        })?;
        let mut at = start;
        for id in ids {
            let next = at + *self.way.lengths.get(*id as usize)? as usize;
            self.encoded.ids.push(*id);
            // Tokens that share a character all have its whole range, as in `tokenizers`.
            let span = text.floor_char_boundary(at)..text.ceil_char_boundary(next);
            self.encoded.spans.push(span);
            at = next;
        }
        (at == end).then_some(())
    }
}

impl Words {
    /// Recognises a pre-tokenizer of `tokenizer.json`.
    fn of(pre_tokenizer: &Value) -> Option<Self> {
        // `trim_offsets` is of no effect in a pre-tokenizer.
        let is_byte_level = |value: &Value, use_regex: bool| {
            value["type"] == "ByteLevel"
                && value["add_prefix_space"] == false
                && value["use_regex"] == use_regex
        };
        let words = |start: &str, digits_alone, line_ends| {
            Some(Self {
                pattern: Regex::new(&format!(r"^(?:{start}|\s+)")).ok()?,
                letters: !TEKKEN.starts_with(start),
                digits_alone,
                line_ends,
            })
        };
        if is_byte_level(pre_tokenizer, true) {
            return words(GPT_2, false, false);
        }
        let [first, second] = pre_tokenizer["pretokenizers"].as_array()?.as_slice() else {
            return None;
        };
        if *first == json!({"type": "Digits", "individual_digits": true})
            && is_byte_level(second, true)
        {
            return words(DIGITS_THEN_GPT_2, true, false);
        }
        let regex = first["pattern"]["Regex"].as_str()?;
        let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let known = [LLAMA_3, QWEN_2, TEKKEN].contains(&regex);
        if !known || *first != split || !is_byte_level(second, false) {
            return None;
        }
        words(regex.strip_suffix(SPACES)?, false, true)
    }

    /// Where a word ends that is nothing but ASCII letters, with a space before them or without,
    /// and has ASCII behind it: no pattern needs to be asked.
    fn plain(&self, piece: &str, at: usize) -> Option<usize> {
        let bytes = &piece.as_bytes()[at..];
        let space = usize::from(bytes.first() == Some(&b' '));
        let letters = bytes[space..].iter();
        let count = letters.take_while(|b| b.is_ascii_alphabetic()).count();
        let end = space + count;
        let behind = bytes.get(end).is_none_or(u8::is_ascii);
        (self.letters && count > 0 && behind).then_some(at + end)
    }

    /// Where a word ends that the pattern found: of white space before other text, `\s+(?!\S)`
    /// takes all but the last character.
    fn end(&self, piece: &str, found: std::ops::Range<usize>) -> usize {
        let word = &piece[found.clone()];
        let Some(last) = word.chars().next_back().filter(|c| c.is_whitespace()) else {
            return found.end;
        };
        let is_line_end = self.line_ends && matches!(last, '\n' | '\r');
        let next = piece[found.end..].chars().next();
        let goes_on = next.is_some_and(|c| !(self.digits_alone && c.is_numeric()));
        let is_run = word.len() > last.len_utf8() && word.chars().all(char::is_whitespace);
        if is_run && goes_on && !is_line_end {
            found.end - last.len_utf8()
        } else {
            found.end
        }
    }
}

/// Patterns that find added tokens: the longest of those that begin at a place, and first those
/// that are sought before normalisation. `None` if some want more than to be found.
fn added_tokens(tokenizer: &Tokenizer, nfc: bool) -> Option<Vec<Regex>> {
    let mut kinds = [Vec::new(), Vec::new()];
    for token in tokenizer.get_added_tokens_decoder().into_values() {
        // The crate normalises the token too, which leaves ASCII as it is.
        let changes = nfc && token.normalized && !token.content.is_ascii();
        if token.single_word || token.lstrip || token.rstrip || changes || token.content.is_empty()
        {
            return None;
        }
        kinds[usize::from(token.normalized)].push(token.content);
    }
    let patterns = kinds.into_iter().filter(|kind| !kind.is_empty());
    patterns
        .map(|mut kind| {
            kind.sort_by_key(|content| std::cmp::Reverse(content.len()));
            let escaped: Vec<String> = kind.iter().map(|content| regex::escape(content)).collect();
            Regex::new(&escaped.join("|")).ok()
        })
        .collect()
}

/// Bytes of each token of a byte-level BPE model.
fn lengths(model: &ModelWrapper) -> Option<Vec<u32>> {
    let ModelWrapper::BPE(bpe) = model else {
        return None;
    };
    let is_plain = bpe.dropout.is_none_or(|dropout| dropout == 0.0)
        && bpe
            .continuing_subword_prefix
            .as_deref()
            .is_none_or(str::is_empty)
        && bpe.end_of_word_suffix.as_deref().is_none_or(str::is_empty)
        && !bpe.byte_fallback;
    if !is_plain {
        return None;
    }
    let vocab = bpe.get_vocab();
    let largest = vocab.values().max().copied()?;
    // Ids are dense but for a few; a file with wild ones is not worth the memory.
    if largest as usize > vocab.len() * 4 {
        return None;
    }
    let mut lengths = vec![0; largest as usize + 1];
    for (token, id) in vocab {
        // One character a byte.
        lengths[id as usize] = u32::try_from(token.chars().count()).ok()?;
    }
    Some(lengths)
}

/// The character that stands for a byte in byte-level vocabularies: itself where it is printable
/// in Latin-1, else one from U+0100 on.
fn byte_char(byte: u8) -> char {
    let shifted = match byte {
        0..=0x20 => u32::from(byte),
        0x7F..=0xA0 => u32::from(byte) - 0x7F + 0x21,
        0xAD => 0x43,
        _ => return char::from(byte),
    };
    char::from_u32(0x100 + shifted).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn is_nfc(tokenizer: &Tokenizer, text: &str) -> bool {
    // Characters that are in form C next to any other: most texts have no others.
    let is_inert = |c: char| {
        matches!(c, '\0'..='\u{2FF}' | '\u{400}'..='\u{482}' | '\u{2010}'..='\u{2027}'
            | '\u{3041}'..='\u{3096}' | '\u{30A1}'..='\u{30FA}' | '\u{4E00}'..='\u{9FFF}'
            | '\u{AC00}'..='\u{D7A3}' | '\u{FF01}'..='\u{FF5E}' | '\u{1F300}'..='\u{1FAFF}')
    };
    if text.chars().all(is_inert) {
        return true;
    }
    let mut normalized = NormalizedString::from(text);
    let normalizer = tokenizer.get_normalizer();
    normalizer.is_some_and(|n| n.normalize(&mut normalized).is_ok()) && normalized.get() == text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A tokenizer of all bytes and a few merges, with two kinds of added tokens.
    fn tokenizer(pre_tokenizer: &Value, normalizer: &Value) -> Tokenizer {
        let mut vocab: Vec<String> = (0..=u8::MAX).map(|b| byte_char(b).to_string()).collect();
        let pairs = [
            "t h",
            "th e",
            "Ġ the",
            "Ġ Ġ",
            "ĠĠ ĠĠ",
            "Ċ Ċ",
            "Ã ©",
            "ð Ł",
            "' s",
            "1 2",
            "a Ġ",
        ];
        vocab.extend(pairs.iter().map(|pair| pair.replace(' ', "")));
        let ids: serde_json::Map<String, Value> = vocab
            .into_iter()
            .zip(0..)
            .map(|(t, id)| (t, Value::from(id)))
            .collect();
        let added = |id: usize, content: &str, normalized: bool| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": normalized, "special": !normalized})
        };
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": null,
            "added_tokens": [added(300, "<|e|>", false), added(301, "<|e|><|e|>", false),
                added(302, "<t>", true), added(303, "|>the", true), added(304, "<é>", false)],
            "model": {"type": "BPE", "vocab": ids, "merges": pairs},
        });
        Tokenizer::from_bytes(file.to_string()).unwrap()
    }

    fn pre_tokenizers() -> Vec<Value> {
        let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let split = |regex: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                byte_level(false)]})
        };
        let digits = json!({"type": "Digits", "individual_digits": true});
        vec![
            byte_level(true),
            json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}),
            split(LLAMA_3),
            split(QWEN_2),
            split(TEKKEN),
        ]
    }

    fn assert_same(tokenizer: &Tokenizer, way: &ByteLevelBpe, text: &str) {
        let slow = tokenizer.encode(text, false).unwrap();
        let Some(fast) = way.encode(tokenizer, text) else {
            assert!(way.nfc, "{text:?} has no short way");
            return;
        };
        assert_eq!(fast.ids, slow.get_ids(), "{text:?}");
        let spans: Vec<(usize, usize)> = fast.spans.iter().map(|s| (s.start, s.end)).collect();
        assert_eq!(spans, slow.get_offsets(), "{text:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Random texts, thick with what the patterns treat each in its own way.
        #[test]
        fn the_short_way_gives_what_tokenizers_gives(
            parts in prop::collection::vec(
                prop_oneof![
                    4 => "[ \\t\\r\\n\u{a0}\u{2003}\u{3000}\u{85}]{1,5}",
                    3 => "(the|'s|'S|'ll|'ſ|a|12|１２|½|Ⅳ|é|e\u{301}|\u{301}|ß|Ǆ|ǅ|ʰ|猿|가|🙂|👩‍💻|्|/|!=|\\.\\.\\.|_)",
                    1 => "(<\\|e\\|>|<\\|e\\|><\\|e\\|>|<t>|\\|>the|<é>|<\\|e)",
                    1 => any::<char>().prop_map(String::from),
                    1 => "[a-zA-Z]{60,70}",
                ],
                0..24,
            ),
        ) {
            let text = parts.concat();
            for pre_tokenizer in pre_tokenizers() {
                for normalizer in [Value::Null, json!({"type": "NFC"})] {
                    let tokenizer = tokenizer(&pre_tokenizer, &normalizer);
                    let way = ByteLevelBpe::of(&tokenizer).unwrap();
                    assert_same(&tokenizer, &way, &text);
                    // Once more, from the cache.
                    assert_same(&tokenizer, &way, &text);
                }
            }
        }
    }

    #[test]
    fn texts_in_form_c_take_the_short_way_and_others_do_not() {
        let tokenizer = tokenizer(&pre_tokenizers()[3], &json!({"type": "NFC"}));
        let way = ByteLevelBpe::of(&tokenizer).unwrap();
        assert!(
            way.encode(&tokenizer, "naïve 猿も木 가는 말 सत्य 🙂")
                .is_some()
        );
        assert!(way.encode(&tokenizer, "nai\u{308}ve").is_none());
    }

    #[test]
    fn bytes_that_the_vocabulary_lacks_have_no_short_way() {
        let whole = tokenizer(&pre_tokenizers()[0], &Value::Null);
        let mut file: Value = serde_json::from_str(&whole.to_string(false).unwrap()).unwrap();
        let vocab = file["model"]["vocab"].as_object_mut().unwrap();
        vocab.remove(&byte_char(4).to_string()).unwrap();
        let tokenizer = Tokenizer::from_bytes(file.to_string()).unwrap();
        let way = ByteLevelBpe::of(&tokenizer).unwrap();
        assert_same(&tokenizer, &way, "the end<|e|>");
        assert!(way.encode(&tokenizer, "the\u{4} end").is_none());
    }

    #[test]
    fn unknown_pipelines_have_no_short_way() {
        let prefix = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        assert!(ByteLevelBpe::of(&tokenizer(&prefix, &Value::Null)).is_none());
        let lower = json!({"type": "Lowercase"});
        assert!(ByteLevelBpe::of(&tokenizer(&pre_tokenizers()[0], &lower)).is_none());
        let mut other = pre_tokenizers()[2].clone();
        other["pretokenizers"][0]["pattern"]["Regex"] = json!(r"\w+|\s+(?!\S)|\s+");
        assert!(ByteLevelBpe::of(&tokenizer(&other, &Value::Null)).is_none());
    }
}
