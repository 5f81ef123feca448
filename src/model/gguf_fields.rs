//! Metadata of a GGUF file, read by type.

use super::config::ConfigError;
use crate::quant::gguf::GgufFile;

/// The metadata read by type.
pub(super) struct Fields<'a> {
    pub(super) file: &'a GgufFile,
}

impl Fields<'_> {
    /// What to say of a key, or a tensor, that will not do.
    pub(super) fn error(&self, key: &str, expected: &str, found: &str) -> ConfigError {
        ConfigError::Value {
            path: self.file.path().to_path_buf(),
            key: key.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    fn found(&self, key: &str) -> String {
        match self.file.metadata.0.get(key) {
            Some(value) => format!("{value:?}").chars().take(60).collect(),
            None => "nothing".into(),
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        match (
            self.file.metadata.usize(key),
            self.file.metadata.0.contains_key(key),
        ) {
            (None, true) => Err(self.error(key, "a whole number", &self.found(key))),
            (size, _) => Ok(size),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match (
            self.file.metadata.f64(key),
            self.file.metadata.0.contains_key(key),
        ) {
            (None, true) => Err(self.error(key, "a number", &self.found(key))),
            (number, _) => Ok(number),
        }
    }

    /// A size that must be there.
    pub(super) fn required(&self, key: &str) -> Result<usize, ConfigError> {
        self.size(key)?
            .ok_or_else(|| self.error(key, "a whole number", "nothing"))
    }

    /// A number that must be there.
    pub(super) fn required_number(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?
            .ok_or_else(|| self.error(key, "a number", "nothing"))
    }

    /// A token's id; what is none counts as absent.
    pub(super) fn token(&self, key: &str) -> Option<u32> {
        u32::try_from(self.file.metadata.usize(key)?).ok()
    }
}
