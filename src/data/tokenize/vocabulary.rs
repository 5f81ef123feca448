//! The tokenizer inside a GGUF file, as the files that Hugging Face would keep it in.
//!
//! GGUF stores the tokens, their types and the merges, but of the pre-tokenizer only a name
//! (`tokenizer.ggml.pre`), which llama.cpp's `llama-vocab.cpp` maps to regular expressions. The
//! table here maps it to the pre-tokenizer of the original `tokenizer.json`, for byte-level BPE
//! of the Llama family.

use serde_json::{Map, Value as Json, json};

use super::tokenizer_files::{TokenizerError, TokenizerFiles};
use crate::quant::gguf::{Metadata, Value};

/// `tokenizer.ggml.token_type` of special tokens (`<|im_end|>`).
const CONTROL: u64 = 3;
/// `tokenizer.ggml.token_type` of added tokens that are not special.
const USER_DEFINED: u64 = 4;

/// How text is split before byte-level BPE.
#[derive(Debug, Clone, Copy)]
enum Split {
    /// GPT-2's regular expression.
    Gpt2,
    /// Each digit alone, then GPT-2's regular expression.
    DigitsThenGpt2,
    /// A regular expression of its own.
    Regex(&'static str),
}

/// One pre-tokenizer that llama.cpp has names for.
#[derive(Debug)]
struct PreTokenizer {
    names: &'static [&'static str],
    split: Split,
    /// Words that are tokens as a whole are not merged up.
    ignore_merges: bool,
    /// Unicode normalisation form C before splitting.
    nfc: bool,
    /// Whether texts begin with BOS where the file does not say.
    add_bos: bool,
}

pub(super) const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PRE_TOKENIZERS: [PreTokenizer; 6] = [
    // `default` is what converters write for plain byte-level BPE without a name of its own.
    PreTokenizer {
        names: &["default", "gpt-2", "mpt", "olmo"],
        split: Split::Gpt2,
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "codeshell"],
        split: Split::DigitsThenGpt2,
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama-v3", "llama3", "falcon3", "pixtral"],
        split: Split::Regex(LLAMA_3),
        ignore_merges: true,
        nfc: false,
        add_bos: true,
    },
    PreTokenizer {
        names: &["smaug-bpe", "dbrx"],
        split: Split::Regex(LLAMA_3),
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2"],
        split: Split::Regex(QWEN_2),
        ignore_merges: false,
        nfc: true,
        add_bos: false,
    },
    PreTokenizer {
        names: &["tekken"],
        split: Split::Regex(TEKKEN),
        ignore_merges: true,
        nfc: false,
        add_bos: true,
    },
];

/// Makes tokenizer files of GGUF metadata.
///
/// # Errors
/// A tokenizer model or pre-tokenizer that is not supported, missing or contradictory entries.
pub(super) fn tokenizer_files(meta: &Metadata) -> Result<TokenizerFiles, TokenizerError> {
    let model = meta.str("tokenizer.ggml.model").unwrap_or("none");
    if model != "gpt2" {
        return Err(TokenizerError::UnsupportedModel {
            found: model.to_owned(),
        });
    }
    let pre = pre_tokenizer(meta.str("tokenizer.ggml.pre").unwrap_or("default"))?;
    let tokens = strings(meta, "tokenizer.ggml.tokens")?;
    let merges = merges(&strings(meta, "tokenizer.ggml.merges")?)?;
    let special = special_tokens(meta, &tokens)?;
    let add_bos = meta
        .bool("tokenizer.ggml.add_bos_token")
        .unwrap_or(pre.add_bos);
    let bos = special
        .get("bos_token")
        .and_then(Json::as_str)
        .filter(|_| add_bos);

    let mut vocab = Map::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        vocab.entry(*token).or_insert_with(|| id.into());
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(meta, &tokens)?,
        "normalizer": if pre.nfc { json!({"type": "NFC"}) } else { Json::Null },
        "pre_tokenizer": pre_tokenizer_json(pre.split),
        "post_processor": post_processor_json(bos, &vocab),
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.ignore_merges, "vocab": vocab, "merges": merges,
        },
    });
    Ok(TokenizerFiles::from_parts(
        &tokenizer,
        special,
        context_length(meta),
        meta.str("tokenizer.chat_template"),
        stop_ids(meta),
    ))
}

fn pre_tokenizer(name: &str) -> Result<&'static PreTokenizer, TokenizerError> {
    let found = PRE_TOKENIZERS.iter().find(|p| p.names.contains(&name));
    found.ok_or_else(|| TokenizerError::UnsupportedPreTokenizer {
        found: name.to_owned(),
        supported: PRE_TOKENIZERS
            .iter()
            .flat_map(|p| p.names)
            .copied()
            .collect::<Vec<_>>()
            .join(", "),
    })
}

fn byte_level(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn pre_tokenizer_json(split: Split) -> Json {
    match split {
        Split::Gpt2 => byte_level(true),
        Split::DigitsThenGpt2 => json!({
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)],
        }),
        Split::Regex(regex) => json!({
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ],
        }),
    }
}

/// Puts `bos` in front of texts, where there is one.
fn post_processor_json(bos: Option<&str>, vocab: &Map<String, Json>) -> Json {
    let Some(bos) = bos else {
        return byte_level(true);
    };
    let token = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    json!({
        "type": "TemplateProcessing",
        "single": [token, text("A")],
        "pair": [token, text("A"), token, text("B")],
        "special_tokens": {bos: {"id": bos, "ids": [vocab.get(bos)], "tokens": [bos]}},
    })
}

fn added_tokens(meta: &Metadata, tokens: &[&str]) -> Result<Vec<Json>, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let Some(types) = meta.array(KEY) else {
        return Ok(Vec::new());
    };
    if types.len() != tokens.len() {
        return Err(TokenizerError::Metadata {
            key: KEY,
            expected: "one entry a token",
        });
    }
    let added = types.iter().zip(tokens).enumerate();
    Ok(added
        .filter_map(|(id, (kind, token))| {
            let kind = integer(kind)?;
            (kind == CONTROL || kind == USER_DEFINED).then(|| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": kind == CONTROL,
                })
            })
        })
        .collect())
}

/// `bos_token` … by name, as in `tokenizer_config.json`.
fn special_tokens(meta: &Metadata, tokens: &[&str]) -> Result<Map<String, Json>, TokenizerError> {
    let mut special = Map::new();
    for (key, name) in [
        ("tokenizer.ggml.bos_token_id", "bos_token"),
        ("tokenizer.ggml.eos_token_id", "eos_token"),
        ("tokenizer.ggml.unknown_token_id", "unk_token"),
        ("tokenizer.ggml.padding_token_id", "pad_token"),
    ] {
        if let Some(id) = meta.usize(key) {
            let token = tokens.get(id).ok_or(TokenizerError::Metadata {
                key,
                expected: "the id of one of its tokens",
            })?;
            special.insert(name.to_owned(), Json::from(*token));
        }
    }
    Ok(special)
}

fn stop_ids(meta: &Metadata) -> Vec<u32> {
    ["eos", "eot", "eom"]
        .iter()
        .filter_map(|name| meta.usize(&format!("tokenizer.ggml.{name}_token_id")))
        .filter_map(|id| u32::try_from(id).ok())
        .collect()
}

fn context_length(meta: &Metadata) -> Option<usize> {
    let architecture = meta.str("general.architecture")?;
    meta.usize(&format!("{architecture}.context_length"))
}

fn strings<'a>(meta: &'a Metadata, key: &'static str) -> Result<Vec<&'a str>, TokenizerError> {
    let wrong = TokenizerError::Metadata {
        key,
        expected: "an array of strings",
    };
    let text = |value: &'a Value| match value {
        Value::String(text) => Some(text.as_str()),
        _ => None,
    };
    let values = meta.array(key).and_then(|a| a.iter().map(text).collect());
    values.ok_or(wrong)
}

/// `"a b"` is the merge of `a` and `b`; the first character belongs to `a` even if it is a space.
fn merges(lines: &[&str]) -> Result<Vec<Json>, TokenizerError> {
    let split = |line: &&str| {
        let (at, _) = line.char_indices().skip(1).find(|(_, c)| *c == ' ')?;
        Some(json!([line[..at], line[at + 1..]]))
    };
    let pairs: Option<Vec<Json>> = lines.iter().map(split).collect();
    pairs.ok_or(TokenizerError::Metadata {
        key: "tokenizer.ggml.merges",
        expected: "two tokens with a space between them in each entry",
    })
}

fn integer(value: &Value) -> Option<u64> {
    match value {
        Value::Unsigned(n) => Some(*n),
        Value::Signed(n) => u64::try_from(*n).ok(),
        _ => None,
    }
}
