//! Tokens whose rows of the embedding and of the output head train: PEFT's `trainable_token_indices`.

use serde_json::{Map, Value, json};

use crate::model::names;

/// Which tokens train.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrainedTokens {
    /// These rows of the embedding, and of an output head that is the embedding.
    Input(Vec<usize>),
    /// Rows of the modules whose paths end so.
    Modules(Vec<(String, Vec<usize>)>),
}

impl TrainedTokens {
    /// These tokens everywhere, in the form that says it for a model with or without a head of its own.
    pub fn everywhere(ids: Vec<usize>, tied: bool) -> Self {
        match tied {
            true => Self::Input(ids),
            false => Self::Modules(vec![
                ("embed_tokens".to_owned(), ids.clone()),
                (names::HEAD.to_owned(), ids),
            ]),
        }
    }

    /// The tokens whose rows of a module train.
    pub fn of(&self, module: &str) -> Option<&[usize]> {
        match self {
            Self::Input(ids) => (module == names::EMBEDDING).then_some(ids),
            Self::Modules(modules) => {
                let found = modules
                    .iter()
                    .find(|(end, _)| module.ends_with(end.as_str()));
                found.map(|(_, ids)| ids.as_slice())
            }
        }
    }

    /// The vocabulary that holds them all.
    pub fn vocabulary(&self) -> usize {
        let largest = match self {
            Self::Input(ids) => ids.iter().max(),
            Self::Modules(modules) => modules.iter().flat_map(|(_, ids)| ids).max(),
        };
        largest.map_or(0, |id| id + 1)
    }

    /// From PEFT's JSON: a list, or a map of lists.
    pub(super) fn read(value: &Value) -> Option<Self> {
        let list = |value: &Value| -> Option<Vec<usize>> {
            let ids = value.as_array()?.iter();
            let ids: Option<Vec<usize>> = ids.map(|id| Some(id.as_u64()? as usize)).collect();
            // Ids beyond what a table may have, or twice the same, would name no row.
            ids.filter(|ids| {
                let mut seen = std::collections::BTreeSet::new();
                ids.iter().all(|id| *id < MOST_TOKENS && seen.insert(*id))
            })
        };
        match value {
            Value::Object(modules) => {
                let modules = modules
                    .iter()
                    .map(|(end, ids)| Some((end.clone(), list(ids)?)));
                Some(Self::Modules(modules.collect::<Option<_>>()?))
            }
            value => Some(Self::Input(list(value)?)),
        }
    }

    /// As PEFT's JSON.
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Input(ids) => json!(ids),
            Self::Modules(modules) => {
                let modules = modules.iter().map(|(end, ids)| (end.clone(), json!(ids)));
                Value::Object(modules.collect::<Map<_, _>>())
            }
        }
    }
}

/// More tokens than any vocabulary has.
const MOST_TOKENS: usize = 1 << 24;
