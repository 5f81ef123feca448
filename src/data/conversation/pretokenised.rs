//! `{"input_ids", "labels"?, "attention_mask"?}`: rows that the dataset's author has tokenised.
//!
//! Labels are not shifted: each is the id of its own token, or -100 where it does not train. In
//! their place a row may have a mask of zeros and ones, as TRL writes it.

use serde_json::Value;

use super::Row;
use super::fields::{Columns, unpacked};
use crate::data::IGNORE_INDEX;
use crate::data::row_error::{RowError, shown};

/// Columns of zeros and ones that say which tokens train.
const MASKS: [&str; 3] = ["completion_mask", "assistant_masks", "loss_mask"];

/// Reads a row of this format.
pub(super) fn row(columns: &mut Columns<'_>) -> Result<Row, RowError> {
    let ids_key = columns.key("input_ids");
    let value = columns.required("input_ids")?;
    let input_ids: Vec<u32> = numbers(value, ids_key)?
        .iter()
        .enumerate()
        .map(|(i, value)| {
            let id = value.as_u64().and_then(|id| i32::try_from(id).ok());
            id.map(i32::cast_unsigned).ok_or_else(|| {
                out_of_range(
                    ids_key,
                    i,
                    value,
                    "token ids are whole numbers from 0 to 2147483647",
                )
            })
        })
        .collect::<Result<_, _>>()?;
    if input_ids.is_empty() {
        return Err(RowError::blank(ids_key));
    }
    for (i, bit) in bits(columns, "attention_mask", &input_ids)?
        .iter()
        .flatten()
        .enumerate()
    {
        if !bit {
            let allowed = "only 1 can be trained on; take padding out of the row";
            return Err(out_of_range("attention_mask", i, &Value::from(0), allowed));
        }
    }
    let labels = match labels(columns, &input_ids)? {
        None => mask_labels(columns, &input_ids)?,
        labels => labels,
    };
    Ok(Row::Tokens { input_ids, labels })
}

fn labels(columns: &mut Columns<'_>, input_ids: &[u32]) -> Result<Option<Vec<i32>>, RowError> {
    let Some(value) = columns.optional("labels") else {
        return Ok(None);
    };
    let key = columns.key("labels");
    let values = numbers(value, key)?;
    check_length(key, values.len(), columns, input_ids)?;
    let labels = values
        .iter()
        .zip(input_ids)
        .enumerate()
        .map(|(i, (value, id))| match value.as_i64() {
            Some(label) if label == i64::from(IGNORE_INDEX) => Ok(IGNORE_INDEX),
            Some(label) if label == i64::from(*id) => Ok(id.cast_signed()),
            _ => Err(out_of_range(
                key,
                i,
                value,
                "a label is -100 or the id of its own token, not of the next",
            )),
        });
    labels.collect::<Result<_, _>>().map(Some)
}

/// Labels of the tokens that a mask names.
fn mask_labels(columns: &mut Columns<'_>, input_ids: &[u32]) -> Result<Option<Vec<i32>>, RowError> {
    for name in MASKS {
        if let Some(mask) = bits(columns, name, input_ids)? {
            let label = |(id, trains): (&u32, bool)| {
                if trains {
                    id.cast_signed()
                } else {
                    IGNORE_INDEX
                }
            };
            return Ok(Some(input_ids.iter().zip(mask).map(label).collect()));
        }
    }
    Ok(None)
}

/// A column of zeros and ones, one a token.
fn bits(
    columns: &mut Columns<'_>,
    name: &'static str,
    input_ids: &[u32],
) -> Result<Option<Vec<bool>>, RowError> {
    let Some(value) = columns.optional(name) else {
        return Ok(None);
    };
    let values = numbers(value, name)?;
    check_length(name, values.len(), columns, input_ids)?;
    let bits =
        values
            .iter()
            .enumerate()
            .map(|(i, value)| match (value.as_bool(), value.as_u64()) {
                (Some(bit), _) => Ok(bit),
                (None, Some(0)) => Ok(false),
                (None, Some(1)) => Ok(true),
                _ => Err(out_of_range(name, i, value, "masks are 0 or 1")),
            });
    bits.collect::<Result<_, _>>().map(Some)
}

fn numbers(value: Value, key: &str) -> Result<Vec<Value>, RowError> {
    match unpacked(value, || key.to_owned())? {
        Value::Array(values) => Ok(values),
        other => Err(RowError::wrong_type(key, "an array of numbers", &other)),
    }
}

fn check_length(
    key: &str,
    length: usize,
    columns: &Columns<'_>,
    input_ids: &[u32],
) -> Result<(), RowError> {
    if length == input_ids.len() {
        return Ok(());
    }
    Err(RowError::UnequalLengths {
        key: key.to_owned(),
        length,
        other: columns.key("input_ids").to_owned(),
        other_length: input_ids.len(),
    })
}

fn out_of_range(key: &str, index: usize, found: &Value, allowed: &'static str) -> RowError {
    RowError::OutOfRange {
        key: format!("{key}[{index}]"),
        found: shown(&found.to_string()),
        allowed,
    }
}

#[cfg(test)]
mod tests {
    use super::super::row_format::tests::read;
    use super::*;
    use serde_json::json;

    #[test]
    fn ids_come_with_labels_a_mask_or_neither() {
        let cases = [
            (json!({"input_ids": [1, 2]}), None),
            (json!({"input_ids": "[1, 2]", "labels": null}), None),
            (
                json!({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, true]}),
                Some(vec![-100, 2]),
            ),
            (
                json!({"input_ids": [1, 2], "labels": "[-100,2]", "token_type_ids": [0, 0]}),
                Some(vec![-100, 2]),
            ),
            (
                json!({"input_ids": [1, 2], "completion_mask": [0, 1]}),
                Some(vec![-100, 2]),
            ),
        ];
        for (value, labels) in cases {
            let input_ids = vec![1, 2];
            assert_eq!(read(value, true), Ok(Row::Tokens { input_ids, labels }));
        }
    }

    #[test]
    fn bad_rows_say_what_is_wrong() {
        let ids = "token ids are whole numbers from 0 to 2147483647";
        let label = "a label is -100 or the id of its own token, not of the next";
        let cases = [
            (json!({"input_ids": []}), "`input_ids` is empty".to_owned()),
            (
                json!({"input_ids": "1 2"}),
                "`input_ids` must be an array of numbers, found a string".to_owned(),
            ),
            (
                json!({"input_ids": [1, -1]}),
                format!("`input_ids[1]` is -1; {ids}"),
            ),
            (
                json!({"input_ids": [2_147_483_648_u32]}),
                format!("`input_ids[0]` is 2147483648; {ids}"),
            ),
            (
                json!({"input_ids": [1.5]}),
                format!("`input_ids[0]` is 1.5; {ids}"),
            ),
            (
                json!({"input_ids": [null]}),
                format!("`input_ids[0]` is null; {ids}"),
            ),
            (
                json!({"input_ids": [[1, 2]]}),
                format!("`input_ids[0]` is [1,2]; {ids}"),
            ),
            (
                json!({"input_ids": [1, 2], "labels": [1]}),
                "`labels` has 1 items, but `input_ids` has 2; they must be equally long".to_owned(),
            ),
            (
                json!({"input_ids": [1, 2], "labels": [2, -100]}),
                format!("`labels[0]` is 2; {label}"),
            ),
            (
                json!({"input_ids": [1, 2], "attention_mask": [1, 0]}),
                "`attention_mask[1]` is 0; only 1 can be trained on; take padding out of the row"
                    .to_owned(),
            ),
            (
                json!({"input_ids": [1], "attention_mask": [2]}),
                "`attention_mask[0]` is 2; masks are 0 or 1".to_owned(),
            ),
        ];
        for (value, want) in cases {
            assert_eq!(read(value, true), Err(want));
        }
    }
}
