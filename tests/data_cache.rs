//! The cache of tokenised datasets: never stale, safe with two processes, bounded.

use std::fs;
use std::path::Path;

use lorafit::data::Dataset;
use lorafit::recipe::plan::{Clause, DataPlan, OnBadRow, Packing, Truncate};
use serde_json::json;

use crate::fixture::Workspace;
use crate::rows::{File, PLAIN, chat, file, load, plan, tokenizer, tokenizer_with};

/// A dataset and a cache beside it.
fn cached(rows: &str) -> (File, DataPlan) {
    let file = file("data.jsonl", rows);
    let mut plan = plan(&[&file.path]);
    plan.cache_dir = Some(file.dir.path().join("cache"));
    plan.cache_limit = 1.0;
    (file, plan)
}

fn rows(count: usize) -> String {
    (0..count)
        .map(|i| chat(&[("user", "a"), ("assistant", &format!("{i}"))]))
        .collect()
}

fn samples(dataset: &Dataset) -> Vec<(Vec<u32>, Vec<i32>, String)> {
    let all = dataset.train.iter();
    all.map(|s| (s.input_ids, s.labels, s.source.to_string()))
        .collect()
}

fn stores(dir: &Path) -> usize {
    fs::read_dir(dir.join("cache")).map_or(0, Iterator::count)
}

#[test]
fn a_second_run_finds_what_the_first_made() {
    let tokenizer = tokenizer();
    let bad = json!({"messages": []}).to_string() + "\n";
    let (file, mut plan) = cached(&(rows(20) + &bad));
    plan.on_bad_row = OnBadRow::Skip;
    plan.validation_fraction = 0.25;
    let first = load(&plan, &tokenizer).unwrap();
    let again = load(&plan, &tokenizer).unwrap();
    assert!(!first.report.cached && again.report.cached);
    assert_eq!(samples(&first), samples(&again));
    assert_eq!(first.key, again.key);
    // It says the same of the dataset, too.
    let mut report = again.report.clone();
    report.cached = false;
    assert_eq!(report, first.report);
    assert_eq!(report.bad_rows, 1);
    assert_eq!(stores(file.dir.path()), 1);
}

/// A name, and what it does to a plan.
type Change<'a> = (&'a str, &'a dyn Fn(&mut DataPlan));

#[test]
fn whatever_changes_the_samples_is_tokenised_anew() {
    let golden = tokenizer();
    let (file, plan) = cached(&rows(20));
    let first = load(&plan, &golden).unwrap();
    let changes: [Change; 6] = [
        ("max_seq_len", &|plan| plan.max_seq_len = 999),
        ("truncate", &|plan| plan.truncate = Truncate::Left),
        ("packing: wrap", &|plan| plan.packing = Packing::Wrap),
        ("train_on_inputs", &|plan| plan.train_on_inputs = true),
        ("on_bad_row", &|plan| plan.on_bad_row = OnBadRow::Skip),
        ("waive", &|plan| plan.waive = vec![Clause::Pad]),
    ];
    for (what, change) in changes {
        let mut plan = plan.clone();
        change(&mut plan);
        let dataset = load(&plan, &golden).unwrap();
        assert!(!dataset.report.cached, "{what}");
        assert_ne!(dataset.key, first.key, "{what}");
    }
    let other = load(&plan, &tokenizer_with(PLAIN)).unwrap();
    assert!(!other.report.cached);
    // One byte of the data, with the file's length and time as they were.
    let time = fs::metadata(&file.path).unwrap().modified().unwrap();
    let text = fs::read_to_string(&file.path).unwrap();
    let text = text.replacen("\"content\":\"a\"", "\"content\":\"c\"", 1);
    fs::write(&file.path, text).unwrap();
    fs::File::options()
        .append(true)
        .open(&file.path)
        .unwrap()
        .set_modified(time)
        .unwrap();
    let changed = load(&plan, &golden).unwrap();
    assert!(!changed.report.cached);
    assert_ne!(samples(&changed), samples(&first));
    // What changes nothing but the order of samples is found.
    let mut plan = plan.clone();
    (plan.shuffle, plan.packing, plan.group_by_length) = (false, Packing::On, false);
    assert!(load(&plan, &golden).unwrap().report.cached);
}

#[test]
fn a_damaged_store_is_made_anew() {
    let tokenizer = tokenizer();
    let (file, plan) = cached(&rows(20));
    let first = samples(&load(&plan, &tokenizer).unwrap());
    let store = fs::read_dir(file.dir.path().join("cache")).unwrap().next();
    let path = store.unwrap().unwrap().path();
    let bytes = fs::read(&path).unwrap();
    for damaged in [&bytes[..bytes.len() / 2], &[], b"something else"] {
        // Not in place: somebody may have it mapped.
        fs::remove_file(&path).unwrap();
        fs::write(&path, damaged).unwrap();
        let again = load(&plan, &tokenizer).unwrap();
        assert!(!again.report.cached);
        assert_eq!(samples(&again), first);
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_done_without() {
    let tokenizer = tokenizer();
    let (file, mut plan) = cached(&rows(20));
    plan.cache_dir = Some(file.path.join("below-a-file"));
    let dataset = load(&plan, &tokenizer).unwrap();
    assert_eq!(dataset.train.len(), 20);
    let reason = dataset.report.not_kept.unwrap();
    assert!(reason.contains("below-a-file"), "{reason}");
}

#[test]
fn two_processes_may_tokenise_at_once() {
    let workspace = Workspace::new();
    workspace.write("data.jsonl", &rows(300));
    let args = ["data", "stats", "recipe.yaml", "--json"];
    let started: Vec<_> = (0..4)
        .map(|_| workspace.command(&args).spawn().unwrap())
        .collect();
    for child in started {
        let ran = crate::fixture::Ran::from(&args, child.wait_with_output().unwrap()).exits(0);
        assert_eq!(ran.event("stats")["samples"], 300);
    }
    assert_eq!(workspace.names("cache").len(), 1);
    let ran = workspace.run(&args).exits(0);
    assert_eq!(ran.event("stats")["cached"], true);
}

#[test]
fn the_cache_stays_within_its_limit() {
    let workspace = Workspace::new();
    for round in 0..6 {
        workspace.write("data.jsonl", &rows(400 + round));
        let args = [
            "data",
            "stats",
            "recipe.yaml",
            "--set",
            "data.cache_limit=0.0001",
        ];
        workspace.run(&args).exits(0);
        let names = workspace.names("cache");
        let size = |name: &String| {
            fs::metadata(workspace.path("cache").join(name))
                .unwrap()
                .len()
        };
        let total: u64 = names.iter().map(size).sum();
        assert!(total <= 107_374, "{names:?}: {total} bytes");
        assert!(!names.is_empty());
    }
}
