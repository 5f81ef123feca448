//! Datasets from a Hugging Face hub.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lorafit::hub::{DatasetId, HubOptions, Progress, locate_dataset};

use crate::hub_server::{COMMIT, CONVERTED_COMMIT, Hub, Mood, files};

const PARQUET: &[u8] = b"PAR1 rows PAR1";
const JSONL: &[u8] = b"{\"text\": \"a\"}\n";
const DATASET: &str = "hf://someone/tiny";
const CONVERTED: &str = "refs/convert/parquet";

fn start(held: &[(&str, &[u8])]) -> Hub {
    Hub::start("datasets", held)
}

/// What to ask a hub for: `config`, `split` and `revision` stand in that order.
type Choice<'a> = [Option<&'a str>; 3];

fn locate_with(
    options: &HubOptions,
    path: &str,
    [config, split, revision]: Choice,
) -> Result<Vec<PathBuf>, String> {
    let id = DatasetId::parse(path, config, split, revision).map_err(|error| error.to_string())?;
    locate_dataset(&id, options, &mut |_| {}).map_err(|error| error.to_string())
}

/// The names of the files that are found, below the snapshot.
fn names(hub: &Hub, path: &str, choice: Choice) -> Result<Vec<String>, String> {
    let paths = locate_with(&hub.options(), path, choice)?;
    Ok(paths
        .iter()
        .map(|path| {
            assert!(path.is_file());
            let snapshots = hub.folder().join("snapshots");
            let below = path.strip_prefix(snapshots).unwrap();
            let mut parts = below.components();
            parts.next();
            parts.as_path().to_str().unwrap().replace('\\', "/")
        })
        .collect())
}

fn split(hub: &Hub, split: &str) -> Result<Vec<String>, String> {
    names(hub, DATASET, [None, Some(split), None])
}

fn train(hub: &Hub) -> Result<Vec<String>, String> {
    names(hub, DATASET, [None; 3])
}

/// All files that were downloaded, as the server saw it.
fn downloaded(hub: &Hub) -> Vec<String> {
    let requests = hub.requests();
    let gets = requests.iter().filter(|line| line.starts_with("GET"));
    let files = gets.filter_map(|line| line.split_once("/resolve/"));
    files.map(|(_, file)| file[41..].to_string()).collect()
}

#[test]
fn one_split_is_downloaded_and_nothing_else() {
    let hub = start(&[
        (".gitattributes", b"x"),
        ("README.md", b"# hello"),
        ("data/test-00000-of-00001.parquet", PARQUET),
        ("data/train-00001-of-00002.parquet", PARQUET),
        ("data/train-00000-of-00002.parquet", PARQUET),
        ("data/train-00000-of-00002.pkl", b"pickle"),
        ("data/holdout-00000-of-00001.parquet", PARQUET),
        ("dataset_infos.json", b"{}"),
        ("../escape.parquet", PARQUET),
        ("/etc/train.parquet", PARQUET),
        ("data/..\\train.parquet", PARQUET),
        ("data/../../train.parquet", PARQUET),
    ]);
    let mut events: Vec<Progress> = Vec::new();
    let id = DatasetId::parse(DATASET, None, None, None).unwrap();
    let paths = locate_dataset(&id, &hub.options(), &mut |event| events.push(event)).unwrap();
    let snapshot = hub.folder().join("snapshots").join(COMMIT);
    let expected = [0, 1].map(|n| snapshot.join(format!("data/train-0000{n}-of-00002.parquet")));
    assert_eq!(paths, expected);
    assert_eq!(fs::read(&paths[0]).unwrap(), PARQUET);
    assert_eq!(
        downloaded(&hub),
        [
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet"
        ]
    );
    let last = events.last().unwrap();
    assert_eq!(last.file, "data/train-00001-of-00002.parquet");
    assert_eq!((last.done, last.total), (14, 14));

    assert_eq!(split(&hub, "holdout").unwrap().len(), 1);
    let error = split(&hub, "tets").unwrap_err();
    assert!(
        error.contains(
            "no split `tets` (did you mean `test`?); set `split` to one of train, test, holdout"
        ),
        "{error}"
    );
}

#[test]
fn names_of_files_and_folders_tell_the_split() {
    let cases: &[(&[&str], &str, &[&str])] = &[
        (&["train.jsonl", "test.jsonl"], "train", &["train.jsonl"]),
        (&["my-train_v2.csv", "dev.csv"], "validation", &["dev.csv"]),
        (
            &["train/b.json", "train/a.json", "test.json"],
            "train",
            &["train/a.json", "train/b.json"],
        ),
        (
            &["en/train-00000-of-00001.parquet"],
            "train",
            &["en/train-00000-of-00001.parquet"],
        ),
        (
            &["rows.jsonl.zst", "more.jsonl"],
            "train",
            &["more.jsonl", "rows.jsonl.zst"],
        ),
        (&["constrain.txt.gz"], "train", &["constrain.txt.gz"]),
        (
            &["a.parquet", "a.jsonl", "LICENSE.txt"],
            "train",
            &["a.parquet"],
        ),
        (&["a b.tsv"], "train", &["a b.tsv"]),
        (
            &[".hidden/train.csv", "__pycache__/train.csv", "x.csv"],
            "train",
            &["x.csv"],
        ),
    ];
    let bytes = |name: &str| -> &'static [u8] {
        match name.rsplit('.').next() {
            Some("parquet") => PARQUET,
            Some("zst") => &[0x28, 0xb5, 0x2f, 0xfd, 0],
            Some("gz") => &[0x1f, 0x8b, 0],
            _ => JSONL,
        }
    };
    for (held, wanted, expected) in cases {
        let held: Vec<_> = held.iter().map(|name| (*name, bytes(name))).collect();
        let found = split(&start(&held), wanted).unwrap();
        assert_eq!(found, *expected);
    }
}

#[test]
fn the_card_names_configs_and_splits() {
    let card = b"---\nlicense: mit\nconfigs:\n\
        - config_name: en\n  data_files:\n  - split: train\n    path: [en/b*.jsonl, 'en/*.jsonl']\n  - split: held.out\n    path: en/z.jsonl\n\
        - config_name: fr\n  data_files: fr/*.jsonl\n\
        - config_name: none\n  data_files: nowhere/*.jsonl\n\
        ---\n# Two languages\n";
    let hub = start(&[
        ("README.md", card),
        ("en/a.jsonl", JSONL),
        ("en/b.jsonl", JSONL),
        ("en/z.jsonl", JSONL),
        ("fr/deep/x.jsonl", JSONL),
        ("fr/x.jsonl", JSONL),
    ]);
    let find = |config, split| names(&hub, DATASET, [config, split, None]);
    let english = ["en/b.jsonl", "en/a.jsonl", "en/z.jsonl"];
    assert_eq!(find(Some("en"), None).unwrap(), english);
    let held_out = find(Some("en"), Some("held.out")).unwrap();
    assert_eq!(held_out, ["en/z.jsonl"]);
    assert_eq!(find(Some("fr"), None).unwrap(), ["fr/x.jsonl"]);
    for (config, split, expected) in [
        (
            None,
            None,
            "has several configs; set `config` to one of en, fr, none",
        ),
        (
            Some("enn"),
            None,
            "no config `enn` (did you mean `en`?); it has en, fr, none",
        ),
        (
            Some("fr"),
            Some("test"),
            "(config fr) has no split `test`; set `split` to one of train",
        ),
        (Some("none"), None, "its card names no file that is there"),
    ] {
        let error = find(config, split).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    let default = b"---\nconfigs:\n- config_name: a\n  data_dir: fr\n  default: true\n- config_name: b\n  data_files: x\n---\n";
    hub.repo
        .lock()
        .unwrap()
        .files
        .insert("README.md".into(), default.to_vec());
    fs::remove_dir_all(hub.folder()).unwrap();
    assert_eq!(train(&hub).unwrap(), ["fr/deep/x.jsonl", "fr/x.jsonl"]);

    let broken = b"---\nconfigs: {\n---\n";
    hub.repo
        .lock()
        .unwrap()
        .files
        .insert("README.md".into(), broken.to_vec());
    fs::remove_dir_all(hub.folder()).unwrap();
    let error = train(&hub).unwrap_err();
    assert!(
        error.contains("README.md does not begin with YAML")
            && error.contains("hf://someone/tiny/data/*.parquet"),
        "{error}"
    );
}

#[test]
fn a_path_names_files_itself() {
    let hub = start(&[
        ("README.md", b"---\nconfigs: {\n---\n"),
        ("deep/a/x.jsonl", JSONL),
        ("deep/b/x.jsonl", JSONL),
        ("other.parquet", PARQUET),
        ("model.bin", b"x"),
    ]);
    let find = |path: &str| names(&hub, &format!("{DATASET}/{path}"), [None; 3]);
    assert_eq!(
        find("deep/*/x.jsonl").unwrap(),
        ["deep/a/x.jsonl", "deep/b/x.jsonl"]
    );
    assert_eq!(find("deep/b").unwrap(), ["deep/b/x.jsonl"]);
    assert_eq!(find("**.parquet").unwrap(), ["other.parquet"]);
    for absent in ["*.csv", "model.bin", "README.md"] {
        let error = find(absent).unwrap_err();
        assert!(
            error.contains("names none of its files in parquet, jsonl"),
            "{error}"
        );
    }
    assert!(
        !downloaded(&hub)
            .iter()
            .any(|file| file.contains("README") || file.contains("bin"))
    );
    // A folder can stand in for a config that no card names.
    hub.repo.lock().unwrap().files.remove("README.md");
    let found = names(&hub, DATASET, [Some("deep"), None, None]).unwrap();
    assert_eq!(found, ["deep/a/x.jsonl", "deep/b/x.jsonl"]);
}

#[test]
fn the_cache_serves_what_was_downloaded() {
    let hub = start(&[
        ("README.md", b"# x"),
        ("train/a.jsonl", JSONL),
        ("train/b.jsonl", JSONL),
        ("test/a.jsonl", JSONL),
    ]);
    let expected = ["train/a.jsonl", "train/b.jsonl"];
    assert_eq!(train(&hub).unwrap(), expected);
    hub.requests();
    // Again: the commit is asked for, no file is; a commit needs no hub at all.
    assert_eq!(train(&hub).unwrap(), expected);
    assert_eq!(hub.requests().len(), 1);
    assert_eq!(
        names(&hub, DATASET, [None, None, Some(COMMIT)]).unwrap(),
        expected
    );
    assert!(hub.requests().is_empty());
    hub.set(Mood::Busy);
    assert_eq!(train(&hub).unwrap(), expected);
    assert!(split(&hub, "test").unwrap_err().contains("503"));
    hub.requests();

    let offline = HubOptions {
        offline: true,
        ..hub.options()
    };
    let find = |split, revision| locate_with(&offline, DATASET, [None, split, revision]);
    assert_eq!(find(None, None).unwrap().len(), 2);
    for (split, revision, expected) in [
        (
            Some("test"),
            None,
            "(no test/a.jsonl), and HF_HUB_OFFLINE is set",
        ),
        (Some("dev"), None, "no split `dev`"),
        (None, Some("v2"), "(that revision was never downloaded)"),
    ] {
        let error = find(split, revision).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    // A split that has lost a file is not taken for a smaller one.
    let lost = hub
        .folder()
        .join("snapshots")
        .join(COMMIT)
        .join("train/b.jsonl");
    fs::remove_file(lost).unwrap();
    let error = find(None, None).unwrap_err();
    assert!(error.contains("(no train/b.jsonl)"), "{error}");
    assert!(hub.requests().is_empty());
}

#[test]
fn a_cache_that_others_filled_serves_offline() {
    let hub = start(&[("x", b"")]);
    let write = |name: &str, bytes: &[u8]| {
        let path = hub.folder().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    write("refs/main", COMMIT.as_bytes());
    let shard = |n| format!("snapshots/{COMMIT}/data/train-0000{n}-of-00002.parquet");
    write(&shard(0), PARQUET);
    let offline = HubOptions {
        offline: true,
        ..hub.options()
    };
    let error = locate_with(&offline, DATASET, [None; 3]).unwrap_err();
    assert!(
        error.contains("no data/train-00001-of-00002.parquet"),
        "{error}"
    );
    write(&shard(1), PARQUET);
    assert_eq!(locate_with(&offline, DATASET, [None; 3]).unwrap().len(), 2);
}

#[test]
fn scripts_and_archives_give_way_to_the_converted_branch() {
    let hub = start(&[
        ("README.md", b"# x"),
        ("tiny.py", b"import os"),
        ("rows.zip", b"x"),
    ]);
    let error = train(&hub).unwrap_err();
    assert!(
        error.contains("its script tiny.py would make it, but scripts are never run"),
        "{error}"
    );
    hub.repo.lock().unwrap().converted = Some(files(&[
        ("en/train/0001.parquet", PARQUET),
        ("en/train/0000.parquet", PARQUET),
        ("en/test/0000.parquet", PARQUET),
        ("fr/partial-train/0000.parquet", PARQUET),
    ]));
    let find = |config, split, revision| names(&hub, DATASET, [config, split, revision]);
    let english = ["en/train/0000.parquet", "en/train/0001.parquet"];
    assert_eq!(find(Some("en"), None, None).unwrap(), english);
    assert_eq!(
        find(Some("fr"), Some("train"), None).unwrap(),
        ["fr/partial-train/0000.parquet"]
    );
    assert_eq!(
        find(Some("en"), Some("test"), Some(CONVERTED)).unwrap(),
        ["en/test/0000.parquet"]
    );
    assert!(
        find(None, None, None)
            .unwrap_err()
            .contains("several configs; set `config` to one of en, fr")
    );
    assert!(
        find(Some("de"), None, None)
            .unwrap_err()
            .contains("no config `de`")
    );
    assert!(
        find(Some("fr"), Some("test"), None)
            .unwrap_err()
            .contains("no split `test`")
    );
    // The converted branch is of `main`, not of any commit.
    assert!(find(Some("en"), None, Some(COMMIT)).is_err());
    assert!(
        !downloaded(&hub)
            .iter()
            .any(|file| file.ends_with(".py") || file.ends_with(".zip"))
    );

    let offline = HubOptions {
        offline: true,
        ..hub.options()
    };
    let found = locate_with(&offline, DATASET, [Some("en"), None, None]).unwrap();
    assert!(found[0].starts_with(hub.folder().join("snapshots").join(CONVERTED_COMMIT)));
    fs::remove_dir_all(hub.folder().join("refs/refs")).unwrap();
    let error = locate_with(&offline, DATASET, [Some("en"), None, None]).unwrap_err();
    assert!(
        error.contains("at refs/convert/parquet is not complete in the cache"),
        "{error}"
    );

    // Rows that stand beside a script are read where the hub has not converted them.
    hub.repo.lock().unwrap().converted = None;
    hub.repo
        .lock()
        .unwrap()
        .files
        .insert("train.jsonl".into(), JSONL.to_vec());
    fs::remove_dir_all(hub.folder()).unwrap();
    assert_eq!(train(&hub).unwrap(), ["train.jsonl"]);
    assert_eq!(locate_with(&offline, DATASET, [None; 3]).unwrap().len(), 1);
}

#[test]
fn refusals_speak_of_datasets() {
    let hub = start(&[("train.jsonl", JSONL)]);
    for (mood, expected) in [
        (
            Mood::Refuses("GatedRepo"),
            "/datasets/someone/tiny if it is gated",
        ),
        (
            Mood::Refuses("RepoNotFound"),
            "has no dataset `someone/tiny`, or it is private",
        ),
        (
            Mood::Forbids,
            "the hub refuses the dataset `someone/tiny`: 403 Forbidden",
        ),
        (Mood::Ignorant, "for a private dataset set HF_TOKEN"),
        (Mood::Busy, "503 Service Unavailable; check the network"),
    ] {
        hub.set(mood);
        let error = train(&hub).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    hub.set(Mood::Silent);
    let options = HubOptions {
        patience: Duration::from_millis(300),
        ..hub.options()
    };
    let error = locate_with(&options, DATASET, [None; 3]).unwrap_err();
    assert!(error.contains("nothing arrived for 0.3 s"), "{error}");
    hub.set(Mood::Kind);
    let error = names(&hub, DATASET, [None, None, Some("v9")]).unwrap_err();
    assert!(
        error.contains("has no revision `v9`, or there is no such dataset"),
        "{error}"
    );
    assert!(!Path::new("someone").exists());
}

#[test]
fn files_that_do_not_arrive_whole_are_not_kept() {
    for (name, bytes) in [
        ("train.parquet", PARQUET),
        ("train.jsonl", JSONL),
        ("train.jsonl.gz", &[0x1f, 0x8b, 8, 0, 0, 0]),
    ] {
        let hub = start(&[(name, bytes)]);
        for mood in [Mood::Breaks, Mood::Lies] {
            hub.set(mood);
            let error = train(&hub).unwrap_err();
            assert!(error.contains("someone/tiny"), "{error}");
            hub.set(Mood::Kind);
            let paths = locate_with(&hub.options(), DATASET, [None; 3]).unwrap();
            assert_eq!(fs::read(&paths[0]).unwrap(), bytes);
            fs::remove_dir_all(hub.folder()).unwrap();
        }
    }
}
