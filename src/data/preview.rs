//! Rows as a preview shows them: every token, with what it is there for and whether it trains.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::contract::Contract;
use super::conversation::Row;
use super::faults::{DataError, RowError, RowFault};
use super::mask::{Masked, Masker, trained};
use super::pack::Piece;
use super::pipeline::{Chunk, Pipeline, Source, SourceReader};
use super::reader::Record;
use super::tokenize::ChatTokenizer;
use super::{Dataset, IGNORE_INDEX, Sample, SampleId, feed};
use crate::recipe::Plan;
use crate::recipe::plan::{Clause, DataPlan};

/// Which rows are wanted, counted from 0 over all sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The first.
    pub first: usize,
    /// How many.
    pub count: usize,
}

/// One row of the dataset, or one side of a preference pair.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PreviewRow {
    /// From 1.
    pub number: usize,
    /// The file and the place in it: `data/train.jsonl:17`.
    pub source: String,
    /// `chosen` or `rejected`, in preference pairs.
    pub side: Option<&'static str>,
    /// All tokens of the row.
    pub tokens: Vec<PreviewToken>,
    /// What to know about the row: truncated, faults against the mask contract.
    pub notes: Vec<String>,
}

/// One token of a row.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PreviewToken {
    /// Its number in the vocabulary.
    pub id: u32,
    /// The text it stands for; empty where it shares a character with the token before.
    pub text: String,
    /// Whether it is one of the tokenizer's special tokens.
    pub special: bool,
    /// Whether it is a label.
    pub trained: bool,
    /// Whose it is: `system`, `user`, `assistant`, `tool`, `template`, `text`, `prompt` or `padding`.
    pub role: &'static str,
    /// Its position as the model sees it, from 0.
    pub position: usize,
    /// The sample of a packed row that it belongs to, from 0.
    pub segment: usize,
}

/// Rows of the sources as the model will see them, one by one, faults included: a row that cannot
/// be read has no tokens and a note that says why.
///
/// # Errors
/// A file cannot be read.
pub fn rows(
    plan: &DataPlan,
    sources: &[Source],
    tokenizer: &ChatTokenizer,
    wanted: Wanted,
) -> Result<Vec<PreviewRow>, DataError> {
    let viewer = Viewer::new(plan, tokenizer);
    let mut shown = Vec::new();
    let (mut number, last) = (0, wanted.first.saturating_add(wanted.count));
    for source in sources {
        let mut reader = SourceReader::new(source);
        if number < wanted.first {
            number += reader.skip((wanted.first - number) as u64)? as usize;
        }
        while number < last {
            let Some(chunk) = reader.next_chunk()? else {
                break;
            };
            for record in chunk.records.iter().take(last - number) {
                number += 1;
                shown.extend(viewer.row(source, &chunk, record, number));
            }
        }
    }
    Ok(shown)
}

struct Viewer<'a> {
    pipeline: Pipeline<'a>,
    /// Shows the tokens of rows that break a clause.
    forgiving: Masker<'a>,
}

impl<'a> Viewer<'a> {
    fn new(plan: &DataPlan, tokenizer: &'a ChatTokenizer) -> Self {
        Self {
            pipeline: Pipeline::new(plan, tokenizer),
            forgiving: Masker {
                tokenizer,
                train_on_inputs: plan.train_on_inputs,
                contract: Contract::new(tokenizer, &Clause::ALL),
            },
        }
    }

    /// The roles of the tokens of some rows, read anew: the store does not keep them.
    fn roles(
        &self,
        sources: &[Source],
        mut missing: HashSet<SampleId>,
    ) -> Result<HashMap<SampleId, Vec<&'static str>>, DataError> {
        let mut found = HashMap::new();
        for source in sources {
            let mut reader = SourceReader::new(source);
            while !missing.is_empty()
                && let Some(chunk) = reader.next_chunk()?
            {
                for record in &chunk.records {
                    let id = SampleId {
                        file: Arc::clone(&source.files[chunk.file]),
                        place: record.place,
                    };
                    if !missing.remove(&id) {
                        continue;
                    }
                    let row = self.row(source, &chunk, record, 0).into_iter().next();
                    let tokens = row.into_iter().flat_map(|row| row.tokens);
                    found.insert(id, tokens.map(|token| token.role).collect());
                }
            }
        }
        Ok(found)
    }

    /// A row, or both sides of a pair.
    fn row(
        &self,
        source: &Source,
        chunk: &Chunk,
        record: &Record,
        number: usize,
    ) -> Vec<PreviewRow> {
        let file = &source.files[chunk.file];
        let id = SampleId {
            file: Arc::clone(file),
            place: record.place,
        };
        let empty = |notes| PreviewRow {
            number,
            source: id.to_string(),
            side: None,
            tokens: Vec::new(),
            notes,
        };
        let note = |reason: RowError| {
            let (file, place) = (Arc::clone(file), record.place);
            RowFault {
                file,
                place,
                reason,
            }
            .to_string()
        };
        let parsed = self.pipeline.parse(record, source, chunk.format);
        let row = match parsed {
            Ok(row) => row,
            Err(reason) => return vec![empty(vec![note(reason)])],
        };
        let sides: Vec<(Option<&'static str>, Row)> = match row {
            Row::Preference { chosen, rejected } => {
                vec![(Some("chosen"), *chosen), (Some("rejected"), *rejected)]
            }
            row => vec![(None, row)],
        };
        let shown = sides.into_iter().map(|(side, row)| {
            let mut notes = Vec::new();
            let masked = match self.pipeline.masker.mask(&row) {
                Ok(masked) => Ok(masked),
                Err(reason) => {
                    notes.push(note(reason));
                    self.forgiving.mask(&row)
                }
            };
            let Some(masked) = masked.ok().and_then(|list| list.into_iter().next()) else {
                return PreviewRow {
                    side,
                    ..empty(notes)
                };
            };
            let roles = self.pipeline.masker.roles(&row, &masked);
            let (tokens, cut) = self.cut(masked, roles, &id);
            notes.extend(cut);
            PreviewRow {
                side,
                tokens,
                ..empty(notes)
            }
        });
        shown.collect()
    }

    /// The tokens that are left after truncation, with a note where some are not.
    fn cut(
        &self,
        masked: Masked,
        roles: Vec<&'static str>,
        id: &SampleId,
    ) -> (Vec<PreviewToken>, Option<String>) {
        let tokenizer = self.pipeline.masker.tokenizer;
        let whole = masked.input_ids.len();
        match self.pipeline.cut(masked.clone(), id) {
            Ok(Some(sample)) => {
                // What is cut off on the left is missing from the roles as well.
                let kept = sample.input_ids.len();
                let from_left = sample.truncated && sample.input_ids != masked.input_ids[..kept];
                let roles = match from_left {
                    true => roles[whole - kept..].to_vec(),
                    false => roles[..kept].to_vec(),
                };
                let note = sample
                    .truncated
                    .then(|| format!("cut from {whole} to {kept} tokens"));
                (
                    tokens(tokenizer, &sample.input_ids, &sample.labels, &roles, 0),
                    note,
                )
            }
            left_out => {
                let note = match left_out {
                    Err(reason) => Some(reason.to_string()),
                    // Where nothing trains at all, that is said already.
                    Ok(_) => (trained(&masked.labels) > 0).then(|| {
                        format!("left out: {whole} tokens, and nothing to train within the limit")
                    }),
                };
                let (ids, labels) = (&masked.input_ids, &masked.labels);
                (tokens(tokenizer, ids, labels, &roles, 0), note)
            }
        }
    }
}

fn tokens(
    tokenizer: &ChatTokenizer,
    ids: &[u32],
    labels: &[i32],
    roles: &[&'static str],
    segment: usize,
) -> Vec<PreviewToken> {
    let (texts, special) = (tokenizer.token_texts(ids), tokenizer.special_ids());
    let all = ids.iter().zip(labels).zip(texts).zip(roles).enumerate();
    all.map(|(position, (((id, label), text), role))| PreviewToken {
        id: *id,
        text,
        special: special.contains(id),
        // The first token of a segment is predicted from nothing.
        trained: *label != IGNORE_INDEX && position > 0,
        role,
        position,
        segment,
    })
    .collect()
}

/// Rows of the first epoch as they are packed, in the order in which they train.
///
/// # Errors
/// A file cannot be read.
pub fn packed(
    plan: &Plan,
    sources: &[Source],
    dataset: &Dataset,
    tokenizer: &ChatTokenizer,
    wanted: Wanted,
) -> Result<Vec<PreviewRow>, DataError> {
    let pass = feed::loader(plan, &dataset.train).epoch(0);
    let order = pass.batches.iter().flatten().enumerate();
    let order = order.skip(wanted.first).take(wanted.count);
    let rows: Vec<(usize, Vec<(&Piece, Sample)>)> = order
        .map(|(number, row)| {
            let pieces = pass.rows.row(*row as usize).iter();
            let with_sample = |piece: &'_ Piece| dataset.train.get(piece.sample as usize);
            (
                number + 1,
                pieces.map(|piece| (piece, with_sample(piece))).collect(),
            )
        })
        .collect();
    let ids = rows.iter().flat_map(|(_, pieces)| pieces);
    let ids = ids.map(|(_, sample)| sample.source.clone()).collect();
    let roles = Viewer::new(&plan.data, tokenizer).roles(sources, ids)?;
    let row = |(number, pieces): &(usize, Vec<(&Piece, Sample)>)| {
        let (mut all, mut names) = (Vec::new(), Vec::new());
        for (segment, (piece, sample)) in pieces.iter().enumerate() {
            let range = piece.from as usize..piece.to as usize;
            let (ids, labels) = (
                &sample.input_ids[range.clone()],
                &sample.labels[range.clone()],
            );
            let roles = roles.get(&sample.source).and_then(|roles| roles.get(range));
            let unknown = vec!["text"; ids.len()];
            let roles = roles.unwrap_or(&unknown);
            all.extend(tokens(tokenizer, ids, labels, roles, segment));
            names.push(sample.source.to_string());
        }
        PreviewRow {
            number: *number,
            source: names.join(", "),
            side: None,
            tokens: all,
            notes: Vec::new(),
        }
    };
    Ok(rows.iter().map(row).collect())
}
