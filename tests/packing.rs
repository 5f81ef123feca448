//! Packed samples train exactly as they do apart: the same loss, the same gradients.

use burn::tensor::Device;
use lorafit::data::batch::Batch;
use lorafit::data::{IGNORE_INDEX, Sample};
use lorafit::train::step;

use crate::train::{SPLIT_TOLERANCE, assert_equal, batches, gradients, tiny_model, uneven_samples};

/// One batch whose rows hold the samples of these numbers, padded to the longest row.
fn pack(samples: &[Sample], rows: &[&[usize]]) -> Batch {
    let lengths: Vec<usize> = rows
        .iter()
        .map(|row| row.iter().map(|&i| samples[i].input_ids.len()).sum())
        .collect();
    let tokens = *lengths.iter().max().expect("rows");
    let mut batch = Batch {
        batch: rows.len(),
        tokens,
        input_ids: Vec::new(),
        labels: Vec::new(),
        position_ids: Vec::new(),
        segment_starts: [].into(),
        lengths,
    };
    let mut starts = vec![0];
    for (number, row) in rows.iter().enumerate() {
        for sample in row.iter().map(|&i| &samples[i]) {
            let ids = sample.input_ids.iter();
            batch.input_ids.extend(ids.map(|&id| id as i32));
            batch.labels.extend(&sample.labels);
            batch.position_ids.extend(0..sample.input_ids.len());
            starts.push(batch.input_ids.len());
        }
        let pads = (number + 1) * tokens - batch.input_ids.len();
        if pads > 0 {
            batch.input_ids.extend(vec![3; pads]);
            batch.labels.extend(vec![IGNORE_INDEX; pads]);
            batch.position_ids.extend(0..pads);
            starts.push(batch.input_ids.len());
        }
    }
    batch.segment_starts = starts.into();
    batch
}

/// The numbers of the samples in one row of a batch.
type Row = &'static [usize];

/// Packings of the eight samples into the rows of one or two micro-batches.
const PACKINGS: [&[&[Row]]; 4] = [
    &[&[&[0, 1, 2, 3, 4, 5, 6, 7]]],
    &[&[&[7, 4, 1, 2], &[6, 3, 5, 0]]],
    &[&[&[1], &[5, 4, 2], &[3, 7, 0], &[6]]],
    &[&[&[4, 0, 6]], &[&[1, 5], &[2, 3, 7]]],
];

#[test]
fn packing_changes_neither_loss_nor_gradients() {
    let samples = uneven_samples();
    for full in [false, true] {
        let mut model = tiny_model(full, &Device::flex());
        let alone = gradients(&mut model, &batches(&samples, 1));
        for packing in PACKINGS {
            let packed: Vec<Batch> = packing.iter().map(|rows| pack(&samples, rows)).collect();
            let got = gradients(&mut model, &packed);
            assert_equal(
                &alone,
                &got,
                SPLIT_TOLERANCE,
                &format!("{packing:?}, full {full}"),
            );
        }
    }
}

/// Rows without their segments are another task, so the comparison above can fail.
#[test]
fn forgetting_the_segments_changes_the_loss() {
    let samples = uneven_samples();
    let mut model = tiny_model(false, &Device::flex());
    let batch = pack(&samples, &[&[7, 4, 1, 2], &[6, 3, 5, 0]]);
    let packed = gradients(&mut model, std::slice::from_ref(&batch));
    let mixed = Batch {
        segment_starts: [0, batch.tokens, 2 * batch.tokens].into(),
        ..batch
    };
    let mixed = gradients(&mut model, &[mixed]);
    let off = (mixed.loss / packed.loss - 1.0).abs();
    assert!(off > 100.0 * SPLIT_TOLERANCE, "{off:.1e}");
}

#[test]
fn the_last_token_of_a_segment_predicts_nothing() {
    let mut batch = pack(&uneven_samples(), &[&[4, 0], &[4, 4]]);
    batch.labels = (0..14).collect();
    let last = IGNORE_INDEX;
    assert_eq!(
        *step::targets(&batch),
        [1, last, 3, 4, 5, 6, last, 8, last, 10, last, 12, 13, last]
    );
}
