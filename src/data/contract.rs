//! The mask contract: what must hold for each row that trains, clause by clause.
//!
//! A broken clause stops the run, because a model trained on such rows fails in ways that are
//! found late: it never stops, or it sees two beginnings. `data.waive` names the clauses that a
//! dataset need not keep.

use std::ops::Range;

use super::IGNORE_INDEX;
use super::faults::RowError;
use super::template::Request;
use super::tokenize::ChatTokenizer;
use crate::recipe::plan::Clause;

/// The clauses as they stand for one tokenizer and its template.
#[derive(Debug)]
pub struct Contract {
    waived: Vec<Clause>,
    /// What conversations begin with.
    chat_bos: BosRule,
    /// What texts begin with.
    text_bos: BosRule,
}

/// What the beginning-of-sequence token must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BosRule {
    /// Stand at the beginning and nowhere else.
    Once(u32),
    /// Not stand at the beginning twice: it may begin turns, or end texts as well.
    NotTwice(u32),
    /// There is none.
    Nothing,
}

impl Contract {
    /// Works out what the clauses mean, by rendering a conversation of two exchanges.
    pub fn new(tokenizer: &ChatTokenizer, waived: &[Clause]) -> Self {
        Self {
            waived: waived.to_owned(),
            chat_bos: chat_bos(tokenizer),
            text_bos: text_bos(tokenizer),
        }
    }

    /// What the clauses mean for this tokenizer and template, in words.
    pub fn describe(&self, tokenizer: &ChatTokenizer) -> String {
        let text = |id: u32| format!("`{}`", tokenizer.token_text(id).escape_debug());
        let stops: Vec<_> = tokenizer.stop_ids().iter().map(|id| text(*id)).collect();
        let bos = match (self.chat_bos, self.text_bos) {
            (BosRule::Once(bos), _) | (_, BosRule::Once(bos)) => {
                format!("each row begins with {} once", text(bos))
            }
            (BosRule::NotTwice(bos), _) => format!("no row begins with {} twice", text(bos)),
            (BosRule::Nothing, _) => "rows have no BOS token".to_owned(),
        };
        let waived: Vec<_> = self.waived.iter().map(|clause| clause.name()).collect();
        let waived = match waived.as_slice() {
            [] => String::new(),
            names => format!("; waived: {}", names.join(", ")),
        };
        format!(
            "each trained turn ends with {}, {bos}, pads are {}{waived}",
            stops.join(" or "),
            text(tokenizer.pad_id()),
        )
    }

    /// Whether a clause need not hold.
    pub fn waives(&self, clause: Clause) -> bool {
        self.waived.contains(&clause)
    }

    /// The fault, unless its clause is waived.
    pub fn forgive(&self, fault: RowError) -> Result<(), RowError> {
        match fault.clause() {
            Some(clause) if self.waives(clause) => Ok(()),
            _ => Err(fault),
        }
    }

    /// The clauses that hold for whole rows: `bos` and `pad`.
    ///
    /// # Errors
    /// A clause that is broken and not waived.
    pub fn check_row(
        &self,
        ids: &[u32],
        labels: &[i32],
        is_chat: bool,
        tokenizer: &ChatTokenizer,
    ) -> Result<(), RowError> {
        let rule = if is_chat {
            self.chat_bos
        } else {
            self.text_bos
        };
        if let Some(fault) = bos_fault(ids, rule, tokenizer) {
            self.forgive(fault)?;
        }
        let pad = tokenizer.pad_id() as i32;
        if labels.iter().skip(1).any(|label| *label == pad) {
            self.forgive(RowError::PadTrains {
                token: tokenizer.token_text(tokenizer.pad_id()),
            })?;
        }
        Ok(())
    }

    /// The clause `stop_token` for the id that ends a trained turn.
    ///
    /// # Errors
    /// `generation_config.json` does not name it, and the clause is not waived.
    pub fn check_stop(&self, id: u32, tokenizer: &ChatTokenizer) -> Result<(), RowError> {
        let named = tokenizer.generation_ids();
        if named.is_empty() || named.contains(&id) {
            return Ok(());
        }
        let text = |id: &u32| format!("`{}`", tokenizer.token_text(*id).escape_debug());
        self.forgive(RowError::OtherStopToken {
            found: text(&id),
            named: named.iter().map(text).collect::<Vec<_>>().join(", "),
            id,
        })
    }

    /// The clauses `end_of_turn` and `stop_token` for rows that came as tokens: each run of labels
    /// is a turn.
    ///
    /// # Errors
    /// A clause that is broken and not waived.
    pub fn check_runs(&self, labels: &[i32], tokenizer: &ChatTokenizer) -> Result<(), RowError> {
        for run in runs(labels) {
            let last = labels[run.end - 1] as u32;
            if tokenizer.stop_ids().contains(&last) {
                self.check_stop(last, tokenizer)?;
            } else {
                let found = tokenizer.token_text(last);
                self.forgive(RowError::RunWithoutEnd {
                    at: run.end - 1,
                    found: format!("`{}`", found.escape_debug()),
                })?;
            }
        }
        Ok(())
    }
}

/// Runs of labels that train, as ranges of tokens.
pub fn runs(labels: &[i32]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, label) in labels.iter().enumerate() {
        if *label == IGNORE_INDEX {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == i => run.end += 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}

fn text_bos(tokenizer: &ChatTokenizer) -> BosRule {
    match tokenizer.bos_id() {
        None => BosRule::Nothing,
        Some(bos) if tokenizer.prefix() == [bos] && !tokenizer.stop_ids().contains(&bos) => {
            BosRule::Once(bos)
        }
        Some(bos) => BosRule::NotTwice(bos),
    }
}

/// A template that writes BOS once writes it once in every row; one that never does although the
/// tokenizer puts it before texts has forgotten it; one that writes it often uses it for turns.
fn chat_bos(tokenizer: &ChatTokenizer) -> BosRule {
    let Some(bos) = tokenizer.bos_id() else {
        return BosRule::Nothing;
    };
    let Some(ids) = probe(tokenizer) else {
        return BosRule::NotTwice(bos);
    };
    let count = ids.iter().filter(|id| **id == bos).count();
    let expected = tokenizer.prefix().contains(&bos);
    match count {
        0 if expected => BosRule::Once(bos),
        1 if ids.first() == Some(&bos) => BosRule::Once(bos),
        _ => BosRule::NotTwice(bos),
    }
}

/// The ids of a conversation of two exchanges; `None` where the template refuses it.
fn probe(tokenizer: &ChatTokenizer) -> Option<Vec<u32>> {
    let message = |role: &str, content: &str| {
        let pairs = [("role", role), ("content", content)];
        pairs
            .map(|(key, text)| (key.to_owned(), text.into()))
            .into_iter()
            .collect()
    };
    let rendered = tokenizer.template()?.render(&Request {
        messages: &[
            message("user", "a"),
            message("assistant", "b"),
            message("user", "c"),
            message("assistant", "d"),
        ],
        tools: None,
        variables: None,
        add_generation_prompt: false,
    });
    tokenizer.encode(&rendered.ok()?.text, false).ok()
}

fn bos_fault(ids: &[u32], rule: BosRule, tokenizer: &ChatTokenizer) -> Option<RowError> {
    let token = |bos| tokenizer.token_text(bos);
    match rule {
        BosRule::Nothing => None,
        BosRule::Once(bos) | BosRule::NotTwice(bos) if ids.starts_with(&[bos, bos]) => {
            Some(RowError::DoubleBos { token: token(bos) })
        }
        BosRule::NotTwice(_) => None,
        BosRule::Once(bos) if ids.first() != Some(&bos) => {
            Some(RowError::MissingBos { token: token(bos) })
        }
        BosRule::Once(bos) => {
            let at = ids.iter().skip(1).position(|id| *id == bos)?;
            Some(RowError::InnerBos {
                token: token(bos),
                at: at + 1,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_fall_into_runs() {
        let x = IGNORE_INDEX;
        assert_eq!(runs(&[x, 1, 2, x, x, 3]), [1..3, 5..6]);
        assert!(runs(&[x, x]).is_empty());
        assert_eq!(runs(&[1]), std::slice::from_ref(&(0..1)));
    }
}
