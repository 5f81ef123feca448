//! Tokens that a recipe adds to a tokenizer.

use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

use super::byte_level::ByteLevelBpe;
use super::{ChatTokenizer, TokenizerError};

/// A token that was added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewToken {
    /// Its id.
    pub id: u32,
    /// What its text was before: the tokens that it takes the place of.
    pub pieces: Vec<u32>,
}

impl ChatTokenizer {
    /// Adds texts as tokens of their own, with the ids behind all others, and to the files that are
    /// written; texts that are tokens already are left as they are and not returned.
    ///
    /// # Errors
    /// An empty text, or a `tokenizer.json` that cannot take them.
    pub fn add_tokens(&mut self, texts: &[String]) -> Result<Vec<NewToken>, TokenizerError> {
        let fault = |message: String| TokenizerError::Invalid {
            file: "adapter.new_tokens".to_owned(),
            message,
        };
        let mut new = Vec::new();
        let mut entries = Vec::new();
        for text in texts {
            if text.trim().is_empty() {
                return Err(fault("a token has no text; remove it".to_owned()));
            }
            if self.token_id(text).is_some() {
                continue;
            }
            let pieces = self.encode(text, false)?;
            let token = AddedToken::from(text.as_str(), false).normalized(false);
            let added = self.tokenizer.add_tokens([token]);
            added.map_err(|error| fault(error.to_string()))?;
            let Some(id) = self.token_id(text) else {
                return Err(fault(format!("{text:?} cannot be a token")));
            };
            self.vocab_size = self.vocab_size.max(id as usize + 1);
            entries.push(json!({
                "id": id,
                "content": text,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": false,
            }));
            new.push(NewToken { id, pieces });
        }
        if !new.is_empty() {
            self.short_way = ByteLevelBpe::of(&self.tokenizer);
            self.write_entries(entries, texts).map_err(fault)?;
        }
        Ok(new)
    }

    /// Puts the entries into `tokenizer.json`, and makes sure that it gives the same ids when read.
    fn write_entries(&mut self, entries: Vec<Value>, texts: &[String]) -> Result<(), String> {
        let file = self
            .files
            .iter_mut()
            .find(|(name, _)| name == "tokenizer.json");
        let (_, bytes) = file.ok_or("the model has no tokenizer.json")?;
        let mut json: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        match json.get_mut("added_tokens") {
            Some(Value::Array(list)) => list.extend(entries),
            _ => json["added_tokens"] = Value::Array(entries),
        }
        *bytes = format!("{json:#}").into_bytes();
        let read = Tokenizer::from_bytes(&*bytes).map_err(|error| error.to_string())?;
        let moved = texts
            .iter()
            .find(|text| read.token_to_id(text) != self.tokenizer.token_to_id(text));
        match moved {
            None => Ok(()),
            Some(text) => Err(format!(
                "{text:?} would have another id in tokenizer.json, which lacks tokens that \
                 tokenizer_config.json has; save the tokenizer anew with transformers first"
            )),
        }
    }
}
