//! The small files beside the weights: configuration, tokenizer, chat template, licence.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::write::WriteError;

/// Files that hold a vocabulary; a directory with one of them has a tokenizer of its own.
const VOCABULARIES: [&str; 4] = [
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
];

/// The other files of a tokenizer.
const TOKENIZER_PARTS: [&str; 6] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// What the name of a licence file starts with, in capitals.
const LICENCES: [&str; 5] = ["LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY"];

/// Whether `dir` has a tokenizer.
pub fn has_tokenizer(dir: &Path) -> bool {
    VOCABULARIES.iter().any(|name| dir.join(name).is_file())
}

/// Copies the files of a tokenizer, the chat template among them.
///
/// # Errors
/// When one cannot be read or written.
pub fn copy_tokenizer(from: &Path, to: &Path) -> Result<Vec<PathBuf>, WriteError> {
    let names = VOCABULARIES.iter().chain(&TOKENIZER_PARTS);
    copy(from, to, names.map(|name| (*name).to_owned()))
}

/// Where a model's small files are: the model's directory, or that of its one weight file.
pub fn directory(model: &Path) -> &Path {
    match model.parent() {
        Some(parent) if model.is_file() => parent,
        _ => model,
    }
}

/// A model directory's `config.json` as it is.
///
/// # Errors
/// It cannot be read, or is not JSON.
pub fn read_config(dir: &Path) -> Result<Value, WriteError> {
    let path = dir.join("config.json");
    let text = fs::read_to_string(&path).map_err(|e| WriteError::io("read", &path, e))?;
    serde_json::from_str(&text).map_err(|e| WriteError::io("read", &path, e.into()))
}

/// Copies `generation_config.json` and licence files.
///
/// # Errors
/// When one cannot be read or written.
pub fn copy_notices(from: &Path, to: &Path) -> Result<Vec<PathBuf>, WriteError> {
    let mut names = vec!["generation_config.json".to_owned()];
    let entries = fs::read_dir(from).map_err(|e| WriteError::io("read directory", from, e))?;
    for entry in entries.flatten() {
        if let Ok(name) = entry.file_name().into_string() {
            let capitals = name.to_ascii_uppercase();
            if LICENCES.iter().any(|licence| capitals.starts_with(licence)) {
                names.push(name);
            }
        }
    }
    names.sort();
    copy(from, to, names.into_iter())
}

/// Copies those of the files that are there. The copies are synced with their directory.
fn copy(
    from: &Path,
    to: &Path,
    names: impl Iterator<Item = String>,
) -> Result<Vec<PathBuf>, WriteError> {
    let mut copied = Vec::new();
    for name in names {
        let (source, target) = (from.join(&name), to.join(&name));
        if source.is_file() {
            // Read and written, not `fs::copy`: a read-only file of the hub's cache would stay so.
            let bytes = fs::read(&source).map_err(|e| WriteError::io("read", &source, e))?;
            fs::write(&target, bytes).map_err(|e| WriteError::io("write", &target, e))?;
            copied.push(target);
        }
    }
    Ok(copied)
}
