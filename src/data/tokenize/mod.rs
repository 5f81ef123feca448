//! A tokenizer with its chat template: conversations to text, text to ids and back.
//!
//! Its files are read in `tokenizer_files`, or made from GGUF in `vocabulary`; `byte_level` is a
//! short way to the same ids.

mod byte_level;
pub mod new_tokens;
mod tokenizer_files;
mod vocabulary;
mod word_cache;

use std::collections::BTreeSet;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

use self::byte_level::ByteLevelBpe;
pub use self::tokenizer_files::TokenizerError;
use self::tokenizer_files::{AddedEntry, TokenizerFiles};
use super::conversation::Message;
use super::template::{ChatTemplate, Request};
use crate::quant::gguf::{GgufFile, Metadata};

/// Token ids with the bytes of the text that each stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte range of each token. Tokens that share a character all have its whole range.
    pub spans: Vec<Range<usize>>,
}

/// A tokenizer as transformers' `AutoTokenizer` loads it, with the model's chat template.
#[derive(Debug)]
pub struct ChatTokenizer {
    /// Without its post-processor, which would cut spaces off the offsets: what it adds is kept
    /// in `prefix` and `suffix`.
    tokenizer: Tokenizer,
    short_way: Option<ByteLevelBpe>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    template: Option<ChatTemplate>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: u32,
    stop_ids: Vec<u32>,
    generation_ids: Vec<u32>,
    vocab_size: usize,
    files: Vec<(String, Vec<u8>)>,
}

impl ChatTokenizer {
    /// Reads the tokenizer of a model directory or a `.gguf` file. `template_override` is a Jinja
    /// file that replaces the model's own chat template.
    ///
    /// # Errors
    /// See [`TokenizerError`].
    pub fn open(path: &Path, template_override: Option<&Path>) -> Result<Self, TokenizerError> {
        if path.extension().is_some_and(|ext| ext == "gguf") {
            Self::from_gguf(&GgufFile::open(path)?.metadata, template_override)
        } else {
            Self::from_dir(path, template_override)
        }
    }

    /// Reads the tokenizer of a model directory.
    ///
    /// # Errors
    /// See [`TokenizerError`].
    pub fn from_dir(dir: &Path, template_override: Option<&Path>) -> Result<Self, TokenizerError> {
        Self::assemble(
            TokenizerFiles::read(dir)?,
            template_override,
            &dir.join("tokenizer.json").display().to_string(),
        )
    }

    /// Makes the tokenizer that GGUF metadata describe.
    ///
    /// # Errors
    /// See [`TokenizerError`].
    pub fn from_gguf(
        meta: &Metadata,
        template_override: Option<&Path>,
    ) -> Result<Self, TokenizerError> {
        Self::assemble(
            vocabulary::tokenizer_files(meta)?,
            template_override,
            "tokenizer.ggml",
        )
    }

    fn assemble(
        mut files: TokenizerFiles,
        template_override: Option<&Path>,
        origin: &str,
    ) -> Result<Self, TokenizerError> {
        if let Some(path) = template_override {
            files.replace_template(path)?;
        }
        let invalid = |message: String| TokenizerError::Invalid {
            file: origin.to_owned(),
            message,
        };
        let mut tokenizer = Tokenizer::from_bytes(files.file("tokenizer.json").unwrap_or_default())
            .map_err(|e| invalid(e.to_string()))?;
        // transformers applies neither unless it is asked to.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| invalid(e.to_string()))?;
        add_missing_tokens(&mut tokenizer, &files).map_err(invalid)?;
        let (prefix, suffix) = added_around(&tokenizer).map_err(invalid)?;
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);

        let id = |name: &str| {
            let token = files.named.get(name)?.as_str()?;
            tokenizer.token_to_id(token)
        };
        let (bos, eos, unk) = (id("bos_token"), id("eos_token"), id("unk_token"));
        let eos = eos.or(files.stop_ids.first().copied());
        let mut stop_ids: Vec<u32> = eos.into_iter().chain(files.stop_ids).collect();
        let mut seen = std::collections::HashSet::new();
        stop_ids.retain(|id| seen.insert(*id));
        let vocab_size = tokenizer.get_vocab(true).into_values().max();
        let vocab_size = vocab_size.map_or(0, |id| id as usize + 1);
        // A token on which generation stops is learned, so it must not pad, whatever is configured:
        // many models name theirs for both.
        let is_free = |id: &u32| !stop_ids.contains(id);
        let pad = id("pad_token").filter(is_free).or(unk.filter(is_free));
        let pad = pad.or_else(|| no_text(&tokenizer).find(is_free));
        let last_free = || (0..vocab_size as u32).rev().find(is_free);
        let pad = pad.or_else(last_free).unwrap_or(0);
        let template = files.template.map(|t| {
            let name = t.name;
            ChatTemplate::new(name, t.source, files.named)
        });
        Ok(Self {
            prefix,
            suffix,
            template: template.transpose()?,
            bos,
            eos,
            pad,
            stop_ids,
            generation_ids: files.generation_ids,
            vocab_size,
            files: files.files,
            short_way: ByteLevelBpe::of(&tokenizer),
            tokenizer,
        })
    }

    /// Renders a conversation with the chat template, as `apply_chat_template(tokenize=False)`.
    ///
    /// # Errors
    /// No template, or the template fails or refuses.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TokenizerError> {
        let template = self.template.as_ref();
        let template = template.ok_or(TokenizerError::NoChatTemplate)?;
        let messages: Vec<Map<String, Value>> = messages.iter().map(Message::to_json).collect();
        let rendered = template.render(&Request {
            messages: &messages,
            tools: None,
            variables: None,
            add_generation_prompt,
        })?;
        Ok(rendered.text)
    }

    /// Text to ids. `add_special_tokens` puts around it what the tokenizer adds to plain texts
    /// (often BOS); rendered conversations have everything they need.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.tokenizer.encode_fast(text, false);
        let encoding = encoding.map_err(|e| TokenizerError::Coding(e.to_string()))?;
        if !add_special_tokens {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok([&self.prefix, encoding.get_ids(), &self.suffix].concat())
    }

    /// Text to ids and the bytes that each stands for; nothing is added.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode_with_spans(&self, text: &str) -> Result<Encoded, TokenizerError> {
        let short_way = self.short_way.as_ref();
        if let Some(encoded) = short_way.and_then(|way| way.encode(&self.tokenizer, text)) {
            return Ok(encoded);
        }
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|e| TokenizerError::Coding(e.to_string()))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            spans: encoding.get_offsets().iter().map(|(s, e)| *s..*e).collect(),
        })
    }

    /// Ids to text.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(ids, skip_special_tokens);
        text.map_err(|e| TokenizerError::Coding(e.to_string()))
    }

    /// The text that each id adds; where several make up one character, the first has it and the
    /// others have none.
    pub fn token_texts(&self, ids: &[u32]) -> Vec<String> {
        let mut stream = self.tokenizer.decode_stream(false);
        let mut texts = vec![String::new(); ids.len()];
        let mut first = 0;
        for (i, id) in ids.iter().enumerate() {
            match stream.step(*id) {
                Ok(Some(text)) => {
                    texts[first] = text;
                    first = i + 1;
                }
                Ok(None) => {}
                Err(_) => {
                    // Bytes that are no text go on being none: each token for itself.
                    texts[i] = self.token_text(*id);
                    first = i + 1;
                    stream = self.tokenizer.decode_stream(false);
                }
            }
        }
        for i in first..ids.len() {
            texts[i] = self.token_text(ids[i]);
        }
        texts
    }

    /// The text of one token, special ones included.
    pub fn token_text(&self, id: u32) -> String {
        self.decode(&[id], false)
            .unwrap_or_else(|_| format!("token {id}"))
    }

    /// What the tokenizer puts before plain texts.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Ids on which generation stops: eos of the tokenizer, `generation_config.json` and `config.json`.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Ids on which generation stops as `generation_config.json` has it; none where it has none.
    pub fn generation_ids(&self) -> &[u32] {
        &self.generation_ids
    }

    /// The id of a token by its text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The special tokens, in order: control tokens, not text.
    pub fn special_ids(&self) -> BTreeSet<u32> {
        special_ids(&self.tokenizer)
    }

    /// The end-of-sequence token.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// The beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that fills up short rows of a batch; generation never stops on it.
    pub fn pad_id(&self) -> u32 {
        self.pad
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether conversations can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The chat template.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Names and contents of the files that make this tokenizer load in transformers.
    pub fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }

    /// Writes [`Self::files`] into a directory, each atomically, and returns their paths.
    ///
    /// # Errors
    /// A file cannot be written; files already there stay whole.
    pub fn save(&self, dir: &Path) -> Result<Vec<PathBuf>, TokenizerError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| TokenizerError::Io { path, source }
        };
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let mut written = Vec::with_capacity(self.files.len());
        for (name, content) in &self.files {
            let path = dir.join(name);
            write_atomically(&path, content).map_err(io(&path))?;
            written.push(path);
        }
        Ok(written)
    }
}

/// A sibling file that takes the place of `path` once it is whole.
fn write_atomically(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = std::fs::File::create(&partial).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written
}

/// Tokens that no text is made of: special ones, the last first, then a byte that UTF-8 never has, as
/// SentencePiece and byte-level BPE write it.
fn no_text(tokenizer: &Tokenizer) -> impl Iterator<Item = u32> {
    let special = special_ids(tokenizer).into_iter().rev();
    let byte = ["<0xFF>", "ÿ"].map(|token| tokenizer.token_to_id(token));
    special.chain(byte.into_iter().flatten())
}

fn special_ids(tokenizer: &Tokenizer) -> BTreeSet<u32> {
    let added = tokenizer.get_added_tokens_decoder().into_iter();
    let special = added.filter(|(_, token)| token.special);
    special.map(|(id, _)| id).collect()
}

/// Adds the tokens that stand in `tokenizer_config.json` alone, as transformers does.
fn add_missing_tokens(tokenizer: &mut Tokenizer, files: &TokenizerFiles) -> Result<(), String> {
    let flag = |token: &Map<String, Value>, key: &str| token.get(key) == Some(&Value::Bool(true));
    for AddedEntry { id, token } in &files.added {
        let content = token.get("content").and_then(Value::as_str);
        let content = content.ok_or_else(|| {
            format!("added_tokens_decoder.{id} in tokenizer_config.json has no content")
        })?;
        if is_added(tokenizer, content) {
            continue;
        }
        let added = AddedToken::from(content, flag(token, "special"))
            .lstrip(flag(token, "lstrip"))
            .rstrip(flag(token, "rstrip"))
            .single_word(flag(token, "single_word"))
            .normalized(flag(token, "normalized"));
        tokenizer.add_tokens([added]).map_err(|e| e.to_string())?;
        let got = tokenizer.token_to_id(content);
        if got != Some(*id) {
            let got = got.map_or("none".to_owned(), |id| id.to_string());
            return Err(format!(
                "token `{content}` has id {id} in tokenizer_config.json, but {got} here; the two files do not belong together"
            ));
        }
    }
    // Named tokens are special even where tokenizer.json lists them as ordinary ones. Those
    // unknown to it would get ids beyond the model's embedding and are left out.
    let named: Vec<AddedToken> = files
        .named
        .values()
        .filter_map(Value::as_str)
        .filter(|token| tokenizer.token_to_id(token).is_some() && !is_added(tokenizer, token))
        .map(|token| AddedToken::from(token, true))
        .collect();
    tokenizer
        .add_special_tokens(named)
        .map(|_| ())
        .map_err(|e| e.to_string())
}

fn is_added(tokenizer: &Tokenizer, content: &str) -> bool {
    tokenizer
        .get_added_vocabulary()
        .get_vocab()
        .contains_key(content)
}

/// What the post-processor puts before and behind a text.
fn added_around(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let encoding = tokenizer.encode("a", true).map_err(|e| e.to_string())?;
    let (ids, added) = (encoding.get_ids(), encoding.get_special_tokens_mask());
    let before = added.iter().take_while(|m| **m == 1).count();
    let behind = added.iter().rev().take_while(|m| **m == 1).count();
    let behind = behind.min(ids.len() - before);
    Ok((ids[..before].to_vec(), ids[ids.len() - behind..].to_vec()))
}
