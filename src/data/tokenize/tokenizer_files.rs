//! The files of a Hugging Face tokenizer: `tokenizer.json`, `tokenizer_config.json` (transformers
//! 4 and 5 styles), `special_tokens_map.json`, `chat_template.jinja`, and the stop tokens in
//! `generation_config.json` and `config.json`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::data::template::TemplateError;
use crate::recipe::named_templates;

/// Everything that is copied with a model so that its tokenizer loads elsewhere.
const KEPT_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Tokens with a name of their own, which chat templates see as variables.
pub(super) const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// No tokenizer.json.
    #[error(
        "{dir} has no tokenizer.json; download it with the model, or save it there with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`", dir = dir.display()
    )]
    Missing {
        /// The model's directory.
        dir: PathBuf,
    },
    /// A tokenizer of the older kind only.
    #[error(
        "{dir} has a sentencepiece tokenizer.model but no tokenizer.json, which lorafit needs; convert it with transformers: `AutoTokenizer.from_pretrained(\"…\", use_fast=True).save_pretrained(\"…\")`", dir = dir.display()
    )]
    SentencePieceOnly {
        /// The model's directory.
        dir: PathBuf,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file that does not hold what it should.
    #[error("{file}: {message}")]
    Invalid {
        /// The file.
        file: String,
        /// What is wrong.
        message: String,
    },
    /// A template that does not compile.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A GGUF file with another kind of tokenizer.
    #[error(
        "tokenizer.ggml.model is `{found}`; only `gpt2` (byte-level BPE) is supported: put the model's tokenizer.json and tokenizer_config.json beside the file, the only GGUF in its directory, and name the directory"
    )]
    UnsupportedModel {
        /// What was found.
        found: String,
    },
    /// A GGUF file with another pre-tokenizer.
    #[error("tokenizer.ggml.pre is `{found}`; supported are {supported}")]
    UnsupportedPreTokenizer {
        /// What was found.
        found: String,
        /// All names that are known.
        supported: String,
    },
    /// A GGUF file whose metadata is incomplete.
    #[error("{key} must be {expected}")]
    Metadata {
        /// The metadata key.
        key: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// The GGUF file itself.
    #[error(transparent)]
    Gguf(#[from] crate::quant::gguf::GgufError),
    /// Text that cannot be encoded, or ids that cannot be decoded.
    #[error("the tokenizer fails: {0}")]
    Coding(String),
    /// A rendering was asked for and there is no template.
    #[error("the tokenizer has no chat template; name a Jinja file in data.chat_template")]
    NoChatTemplate,
}

/// A chat template and where it is from.
#[derive(Debug, Clone)]
pub(super) struct TemplateSource {
    pub name: String,
    pub source: String,
}

/// A token of `added_tokens_decoder`.
#[derive(Debug)]
pub(super) struct AddedEntry {
    pub id: u32,
    pub token: Map<String, Value>,
}

/// The files, and what was read from them.
#[derive(Debug)]
pub(super) struct TokenizerFiles {
    /// Name and content of each file that is kept with the model.
    pub files: Vec<(String, Vec<u8>)>,
    /// Special tokens by name, as text.
    pub named: Map<String, Value>,
    /// `added_tokens_decoder`, in the order of the ids.
    pub added: Vec<AddedEntry>,
    /// The chat template.
    pub template: Option<TemplateSource>,
    /// Ids that end generation, apart from the tokenizer's own eos.
    pub stop_ids: Vec<u32>,
    /// Those of them that `generation_config.json` names.
    pub generation_ids: Vec<u32>,
}

impl TokenizerFiles {
    /// Reads the files of a model directory.
    pub fn read(dir: &Path) -> Result<Self, TokenizerError> {
        let mut files = Vec::new();
        for name in KEPT_FILES {
            if let Some(bytes) = read_optional(&dir.join(name))? {
                files.push((name.to_owned(), bytes));
            }
        }
        let has = |name: &str| files.iter().any(|(file, _)| file == name);
        if !has("tokenizer.json") {
            let dir = dir.to_owned();
            return Err(if has("tokenizer.model") {
                TokenizerError::SentencePieceOnly { dir }
            } else {
                TokenizerError::Missing { dir }
            });
        }
        let config = read_object(&dir.join("tokenizer_config.json"))?;
        let map = read_object(&dir.join("special_tokens_map.json"))?;
        let template = match file(&files, "chat_template.jinja") {
            Some(bytes) => Some(TemplateSource {
                name: "chat_template.jinja".to_owned(),
                source: utf8("chat_template.jinja", bytes)?,
            }),
            None => inline_template(&config)?,
        };
        let generation_ids = eos_ids(&read_object(&dir.join("generation_config.json"))?);
        let config_ids = eos_ids(&read_object(&dir.join("config.json"))?);
        let stop_ids = [generation_ids.as_slice(), &config_ids].concat();
        Ok(Self {
            named: named_tokens(&config, &map),
            added: added_tokens(&config)?,
            files,
            template,
            stop_ids,
            generation_ids,
        })
    }

    /// Files for a tokenizer that was never in files.
    pub fn from_parts(
        tokenizer: &Value,
        named: Map<String, Value>,
        model_max_length: Option<usize>,
        template: Option<&str>,
        stop_ids: Vec<u32>,
    ) -> Self {
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        config.extend(named.clone());
        config.extend(model_max_length.map(|n| ("model_max_length".into(), n.into())));
        let special = Value::Object(named.clone());
        let mut files = vec![
            ("tokenizer.json".to_owned(), tokenizer.to_string().into()),
            (
                "tokenizer_config.json".to_owned(),
                pretty(&Value::Object(config)),
            ),
            ("special_tokens_map.json".to_owned(), pretty(&special)),
        ];
        let template = template.map(|source| TemplateSource {
            name: "tokenizer.chat_template".to_owned(),
            source: source.to_owned(),
        });
        files.extend(
            template
                .as_ref()
                .map(|t| ("chat_template.jinja".to_owned(), t.source.clone().into())),
        );
        Self {
            files,
            named,
            added: Vec::new(),
            template,
            stop_ids,
            generation_ids: Vec::new(),
        }
    }

    /// Puts the template that the user chose, by name or as a file, in place of the model's own,
    /// in the files as well.
    pub fn replace_template(&mut self, chosen: &Path) -> Result<(), TokenizerError> {
        let name = chosen.display().to_string();
        let bytes = match named_templates::find(&name) {
            Some(named) => named.source.as_bytes().to_vec(),
            None => std::fs::read(chosen).map_err(|source| TokenizerError::Io {
                path: chosen.to_owned(),
                source,
            })?,
        };
        let source = utf8(&name, &bytes)?;
        self.files.retain(|(file, _)| file != "chat_template.jinja");
        for (file, content) in &mut self.files {
            if file == "tokenizer_config.json" {
                let mut config: Value =
                    serde_json::from_slice(content).map_err(|e| invalid(file, &e))?;
                if let Some(config) = config.as_object_mut() {
                    config.shift_remove("chat_template");
                }
                *content = pretty(&config);
            }
        }
        self.files.push(("chat_template.jinja".to_owned(), bytes));
        self.template = Some(TemplateSource { name, source });
        Ok(())
    }

    /// The content of a file.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        file(&self.files, name)
    }
}

fn file<'a>(files: &'a [(String, Vec<u8>)], name: &str) -> Option<&'a [u8]> {
    let (_, bytes) = files.iter().find(|(file, _)| file == name)?;
    Some(bytes)
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

/// A JSON object in a file; empty where there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>, TokenizerError> {
    match read_optional(path)? {
        None => Ok(Map::new()),
        Some(bytes) => {
            serde_json::from_slice(&bytes).map_err(|e| invalid(&path.display().to_string(), &e))
        }
    }
}

fn invalid(file: &str, message: &dyn std::fmt::Display) -> TokenizerError {
    TokenizerError::Invalid {
        file: file.to_owned(),
        message: message.to_string(),
    }
}

fn utf8(file: &str, bytes: &[u8]) -> Result<String, TokenizerError> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.trim_start_matches('\u{feff}').to_owned()),
        Err(_) => Err(invalid(file, &"not UTF-8 text")),
    }
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// `chat_template` of `tokenizer_config.json`: text, or a list of templates with names.
fn inline_template(config: &Map<String, Value>) -> Result<Option<TemplateSource>, TokenizerError> {
    const FILE: &str = "tokenizer_config.json";
    let template = |source: &str| TemplateSource {
        name: FILE.to_owned(),
        source: source.to_owned(),
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(template(source))),
        Some(Value::Array(list)) => {
            let named: Vec<(&str, &str)> = list
                .iter()
                .filter_map(|entry| Some((entry["name"].as_str()?, entry["template"].as_str()?)))
                .collect();
            let chosen = match named.as_slice() {
                [(_, only)] => Some(only),
                several => several
                    .iter()
                    .find(|(n, _)| *n == "default")
                    .map(|(_, t)| t),
            };
            let names: Vec<&str> = named.iter().map(|(name, _)| *name).collect();
            chosen.map(|source| Some(template(source))).ok_or_else(|| {
                let names = names.join(", ");
                invalid(FILE, &format!("chat_template has several templates ({names}) and none is named `default`; name a Jinja file in data.chat_template"))
            })
        }
        Some(_) => Err(invalid(
            FILE,
            &"chat_template must be text or a list of {name, template}",
        )),
    }
}

/// The text of a token: `"…"` or `{"content": "…"}`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn named_tokens(config: &Map<String, Value>, map: &Map<String, Value>) -> Map<String, Value> {
    let mut named = Map::new();
    for name in NAMED_TOKENS {
        let token = config.get(name).and_then(token_text);
        if let Some(token) = token.or_else(|| map.get(name).and_then(token_text)) {
            named.insert(name.to_owned(), token.into());
        }
    }
    for key in ["additional_special_tokens", "extra_special_tokens"] {
        if let Some(Value::Array(tokens)) = config.get(key).or_else(|| map.get(key)) {
            let tokens: Vec<&str> = tokens.iter().filter_map(token_text).collect();
            named.insert(key.to_owned(), json!(tokens));
        }
    }
    named
}

/// `added_tokens_decoder`, in the order of the ids.
fn added_tokens(config: &Map<String, Value>) -> Result<Vec<AddedEntry>, TokenizerError> {
    let Some(Value::Object(decoder)) = config.get("added_tokens_decoder") else {
        return Ok(Vec::new());
    };
    let mut added = Vec::with_capacity(decoder.len());
    for (id, token) in decoder {
        let entry = id.parse().ok().zip(token.as_object());
        let (id, token) = entry.ok_or_else(|| {
            invalid(
                "tokenizer_config.json",
                &format!("added_tokens_decoder.{id} must be a token id with a token object"),
            )
        })?;
        let token = token.clone();
        added.push(AddedEntry { id, token });
    }
    added.sort_by_key(|entry| entry.id);
    Ok(added)
}

/// `eos_token_id`: one id or several.
fn eos_ids(config: &Map<String, Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}
