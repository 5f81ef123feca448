//! In which order samples come, in which rows they stand, and that a streamed run goes on as it
//! would have.

use std::collections::BTreeMap;

use lorafit::data::batch::Batch;
use lorafit::data::feed::Feed;
use lorafit::data::loader::{Layout, Loader, Share};
use lorafit::data::tokenize::ChatTokenizer;
use lorafit::data::{Dataset, IGNORE_INDEX, SampleId};
use lorafit::recipe::Plan;
use lorafit::recipe::plan::{Clause, Packing, SourcePlan};
use proptest::prelude::*;
use serde_json::json;

use crate::fixture::Workspace;
use crate::rows::{File, chat, file, load, tokenizer_of, trained_ids};

/// Ids of the tokenizer of these tests.
const VOCABULARY: usize = 10_000;

fn layout(micro_batch: usize, accumulation: usize) -> Layout {
    Layout {
        micro_batch,
        accumulation,
        seed: 3,
        shuffle: true,
        packing: Packing::Off,
        max_seq_len: 64,
        group_by_length: false,
    }
}

/// The samples of each micro-batch of a step.
fn step(loader: &Loader, number: usize) -> Vec<Vec<u32>> {
    let (pass, batches) = loader.step(number);
    let samples = |batch: &Vec<u32>| {
        let rows = batch.iter().flat_map(|row| pass.rows.row(*row as usize));
        rows.map(|piece| piece.sample).collect()
    };
    pass.batches[batches].iter().map(samples).collect()
}

#[test]
fn each_epoch_holds_every_sample_once() {
    for (samples, micro_batch, accum) in [(1, 4, 4), (7, 2, 2), (64, 3, 5), (65, 8, 1)] {
        for (grouped, packing) in [
            (false, Packing::Off),
            (true, Packing::Off),
            (true, Packing::On),
        ] {
            let layout = Layout {
                packing,
                group_by_length: grouped,
                ..layout(micro_batch, accum)
            };
            let lengths: Vec<u32> = (0..samples).map(|i| 1 + i * 7 % 64).collect();
            let loader = Loader::plain(lengths.clone(), layout);
            let steps = loader.steps_per_epoch();
            let epoch = |e: usize| -> Vec<u32> {
                let steps = (e * steps..(e + 1) * steps).map(|number| step(&loader, number));
                steps.flatten().flatten().collect()
            };
            let mut orders = vec![epoch(0), epoch(1), epoch(2)];
            // A step asked for anew, in any order, of another loader, is the same.
            assert_eq!(orders[0], epoch(0));
            let other = Loader::plain(lengths, layout);
            assert_eq!(step(&other, 2 * steps), step(&loader, 2 * steps));
            assert!(samples < 7 || orders[0] != orders[1]);
            for order in &mut orders {
                order.sort_unstable();
                assert_eq!(*order, (0..samples).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn the_split_into_micro_batches_does_not_change_a_step() {
    let trained = |micro_batch: usize, accum: usize| -> Vec<u32> {
        let loader = Loader::plain(vec![5; 9], layout(micro_batch, accum));
        let steps = (0..loader.steps_per_epoch()).map(|number| step(&loader, number));
        steps.flatten().flatten().collect()
    };
    assert_eq!(trained(4, 1), trained(1, 4));
    assert_eq!(trained(4, 1), trained(2, 2));
}

#[test]
fn samples_of_like_length_share_micro_batches() {
    let lengths: Vec<u32> = (0..512).map(|i| 1 + i * 37 % 500).collect();
    let padding = |grouped: bool| {
        let layout = Layout {
            group_by_length: grouped,
            ..layout(4, 2)
        };
        let (tokens, slots) = Loader::plain(lengths.clone(), layout).epoch(0).slots();
        1.0 - tokens as f64 / slots as f64
    };
    let (grouped, mixed) = (padding(true), padding(false));
    assert!(grouped < 0.02 && mixed > 0.2, "{grouped} {mixed}");
}

#[test]
fn weights_say_how_often_an_epoch_sees_a_sample() {
    let share = |samples: std::ops::Range<u32>, weight: f64| Share {
        samples: samples.collect(),
        weight,
    };
    let shares = vec![share(0..10, 2.0), share(10..20, 0.3), share(20..24, 1.5)];
    let loader = Loader::new(shares, vec![5; 24], layout(1, 1));
    assert_eq!(loader.steps_per_epoch(), 20 + 3 + 6);
    let mut seen = BTreeMap::new();
    for epoch in 0..10 {
        for row in 0..29 {
            for sample in step(&loader, epoch * 29 + row).concat() {
                *seen.entry(sample).or_insert(0) += 1;
            }
        }
    }
    // Over ten epochs no sample of a source is seen more often than another.
    for (sample, count) in seen {
        let want = [20, 3, 15][usize::from(sample >= 10) + usize::from(sample >= 20)];
        assert_eq!(count, want, "sample {sample}");
    }
}

/// A plan that trains on files.
fn plan(files: &[(&File, f64)]) -> Plan {
    let workspace = Workspace::new();
    let path = |name: &str| workspace.path(name).display().to_string();
    let sets = [
        format!("base.model={}", path("base")),
        format!("data.train=[{}]", path("data.jsonl")),
    ];
    let mut plan = lorafit::recipe::load::load(&workspace.path("recipe.yaml"), &sets).unwrap();
    let source = |(file, weight): &(&File, f64)| SourcePlan {
        weight: *weight,
        ..SourcePlan::new(file.path.display().to_string())
    };
    plan.data.train = files.iter().map(source).collect();
    plan.data.waive = Clause::ALL.to_vec();
    plan.data.cache_limit = 0.0;
    plan
}

/// Rows of tokens, none of which is in another row; the id is its own label or has none.
fn rows_of_tokens(first: u32, lengths: &[usize], masks: u64) -> (File, Vec<u32>) {
    let (mut rows, mut trained, mut id) = (String::new(), Vec::new(), first);
    for (i, length) in lengths.iter().enumerate() {
        let ids: Vec<u32> = (id..id + *length as u32).collect();
        id += *length as u32;
        let is_label = |at: usize| at + 1 == *length || masks >> ((i * 7 + at) % 64) & 1 == 1;
        let labels: Vec<i64> = ids
            .iter()
            .enumerate()
            .map(|(at, id)| if is_label(at) { i64::from(*id) } else { -100 })
            .collect();
        // The first token of a sample is never predicted.
        trained.extend(
            labels[1..]
                .iter()
                .filter_map(|label| u32::try_from(*label).ok()),
        );
        rows += &json!({"input_ids": ids, "labels": labels}).to_string();
        rows.push('\n');
    }
    (file("tokens.jsonl", rows), trained)
}

/// What a batch trains: the labels that its segments predict.
fn predicted(batch: &Batch) -> Vec<u32> {
    let starts = batch.segment_starts.windows(2);
    let labels = starts.flat_map(|ends| &batch.labels[ends[0] + 1..ends[1]]);
    trained_ids(&labels.copied().collect::<Vec<_>>())
}

/// Checks what every batch must be.
fn check_batch(batch: &Batch, max_seq_len: usize) {
    assert_eq!(batch.input_ids.len(), batch.batch * batch.tokens);
    assert!(batch.tokens <= max_seq_len);
    let mut starts: Vec<usize> = (0..=batch.batch).map(|row| row * batch.tokens).collect();
    starts.retain(|start| !batch.segment_starts.contains(start));
    assert!(starts.is_empty(), "a segment goes from row to row");
    for ends in batch.segment_starts.windows(2) {
        let positions = &batch.position_ids[ends[0]..ends[1]];
        assert!(positions.iter().copied().eq(0..positions.len()));
        let ids = &batch.input_ids[ends[0]..ends[1]];
        let is_pad = |id: &i32| *id == ids[0];
        let follows = ids.windows(2).all(|pair| pair[1] == pair[0] + 1);
        assert!(
            follows || ids.iter().all(is_pad),
            "one sample a segment: {ids:?}"
        );
    }
    let labels = batch.labels.iter().zip(&batch.input_ids);
    assert!(
        labels
            .into_iter()
            .all(|(label, id)| *label == IGNORE_INDEX || label == id)
    );
}

fn packings() -> impl Strategy<Value = Packing> {
    prop_oneof![Just(Packing::Off), Just(Packing::On), Just(Packing::Wrap)]
}

fn steps(feed: &mut Feed<'_>, numbers: std::ops::Range<usize>) -> Vec<(Vec<Batch>, Vec<SampleId>)> {
    let step = |number| {
        let step = feed.step(number).unwrap();
        (step.batches, step.rows)
    };
    numbers.map(step).collect()
}

/// The tokenizer and the dataset of a plan.
fn open(plan: &Plan) -> (Dataset, ChatTokenizer) {
    let tokenizer = tokenizer_of(VOCABULARY);
    (load(&plan.data, &tokenizer).unwrap(), tokenizer)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    #[test]
    fn packing_keeps_every_trained_token_exactly_once(
        lengths in prop::collection::vec(2usize..40, 1..60),
        masks in any::<u64>(),
        packing in packings(),
        (micro_batch, accumulation, grouped) in (1usize..5, 1usize..4, any::<bool>()),
    ) {
        let (file, mut want) = rows_of_tokens(1000, &lengths, masks);
        let mut plan = plan(&[(&file, 1.0)]);
        plan.data.max_seq_len = 40;
        plan.data.packing = packing;
        plan.data.group_by_length = grouped;
        plan.train.micro_batch_size = micro_batch;
        plan.train.gradient_accumulation_steps = accumulation;
        let (dataset, tokenizer) = open(&plan);
        let mut feed = Feed::new(&plan, &dataset, &tokenizer, VOCABULARY, None).unwrap();
        let count = feed.steps_per_epoch().unwrap();
        let mut got = Vec::new();
        for (batches, _) in steps(&mut feed, 0..count) {
            prop_assert!((1..=accumulation).contains(&batches.len()));
            for batch in &batches {
                check_batch(batch, 40);
                prop_assert!((1..=micro_batch).contains(&batch.batch));
                got.extend(predicted(batch));
            }
        }
        got.sort_unstable();
        want.sort_unstable();
        prop_assert_eq!(got, want);
    }

    #[test]
    fn a_streamed_run_goes_on_with_the_same_batches(
        first in prop::collection::vec(2usize..30, 1..40),
        second in prop::collection::vec(2usize..30, 1..20),
        weight in prop_oneof![Just(1.0), Just(2.0), 0.3f64..2.0],
        packing in packings(),
        buffer in 1usize..30,
        (micro_batch, accumulation) in (1usize..4, 1usize..4),
    ) {
        let (one, trained) = rows_of_tokens(1000, &first, 7);
        let (other, _) = rows_of_tokens(5000, &second, !0);
        let mut plan = plan(&[(&one, 1.0), (&other, weight)]);
        plan.data.max_seq_len = 30;
        plan.data.packing = packing;
        plan.data.streaming = true;
        plan.data.shuffle_buffer = buffer;
        plan.train.micro_batch_size = micro_batch;
        plan.train.gradient_accumulation_steps = accumulation;
        let (dataset, tokenizer) = open(&plan);
        let feed = |cursor| Feed::new(&plan, &dataset, &tokenizer, VOCABULARY, cursor).unwrap();

        let mut whole = feed(None);
        let (mut batches, mut cursors) = (Vec::new(), Vec::new());
        // Until two passes are over.
        while whole.cursor().unwrap().epoch < 2 {
            cursors.push(whole.cursor());
            batches.extend(steps(&mut whole, batches.len()..batches.len() + 1));
        }
        for (at, cursor) in cursors.into_iter().enumerate().step_by(1 + batches.len() / 6) {
            let end = batches.len().min(at + 8);
            let again = steps(&mut feed(cursor), at..end);
            prop_assert_eq!(&again, &batches[at..end]);
        }
        // The source of weight 1 is seen once in each pass; the last is not over.
        let passes = whole.cursor().unwrap().epoch;
        let mut seen = BTreeMap::new();
        for batch in batches.iter().flat_map(|(batches, _)| batches) {
            check_batch(batch, 30);
            for id in predicted(batch) {
                *seen.entry(id).or_insert(0u64) += 1;
            }
        }
        for id in trained {
            prop_assert!((passes..=passes + 1).contains(&seen[&id]), "{id}: {}", seen[&id]);
        }
    }
}

#[test]
fn a_stream_gives_what_the_whole_dataset_holds() {
    let rows: String = (0..50)
        .map(|i| chat(&[("user", "a"), ("assistant", &"b ".repeat(1 + i % 7))]))
        .collect();
    let file = file("data.jsonl", rows);
    let mut plan = plan(&[(&file, 1.0)]);
    plan.train.micro_batch_size = 1;
    plan.train.gradient_accumulation_steps = 1;
    let all = |plan: &Plan| {
        let (dataset, tokenizer) = open(plan);
        let mut feed = Feed::new(plan, &dataset, &tokenizer, VOCABULARY, None).unwrap();
        let mut batches: Vec<_> = steps(&mut feed, 0..50)
            .into_iter()
            .flat_map(|(batches, _)| batches)
            .map(|batch| (batch.input_ids, batch.labels))
            .collect();
        let order = batches.clone();
        batches.sort();
        (batches, order)
    };
    let (want, _) = all(&plan);
    plan.data.streaming = true;
    plan.data.shuffle_buffer = 20;
    let (got, order) = all(&plan);
    assert_eq!(got, want);
    assert_ne!(got, order, "rows are shuffled");
}
