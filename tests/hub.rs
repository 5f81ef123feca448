//! Base models from a Hugging Face hub.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lorafit::hub::{HubOptions, Progress, locate_with};
use lorafit::model::weights::Weights;

use crate::hub_server::{COMMIT, Hub, ID as MODEL, Mood};
use crate::reference::own;

fn start(files: &[(&str, &[u8])]) -> Hub {
    Hub::start("models", files)
}

fn locate(hub: &Hub) -> Result<PathBuf, String> {
    locate_at(hub, "main")
}

fn locate_at(hub: &Hub, revision: &str) -> Result<PathBuf, String> {
    locate_with(MODEL, revision, &hub.options(), &mut |_| {}).map_err(|error| error.to_string())
}

/// The files of a golden model, with pickles and others that nobody should ask for.
fn llama_hub() -> Hub {
    let dir = own().join("models/llama");
    let config = fs::read(dir.join("config.json")).unwrap();
    let weights = fs::read(dir.join("model.safetensors")).unwrap();
    start(&[
        ("config.json", &config),
        ("generation_config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"{}"),
        ("special_tokens_map.json", b"{}"),
        ("chat_template.jinja", b"{{ messages }}"),
        ("model.safetensors", &weights),
        ("consolidated.safetensors", &weights),
        ("pytorch_model.bin", b"pickle"),
        ("tokenizer.bin", b"pickle"),
        ("README.md", b"# hello"),
        ("modeling.py", b"import os"),
        ("onnx/model.onnx", b"onnx"),
        ("../escape.safetensors", b"x"),
    ])
}

#[test]
fn only_what_is_read_is_downloaded() {
    let hub = llama_hub();
    let mut events: Vec<Progress> = Vec::new();
    let dir = locate_with(MODEL, "main", &hub.options(), &mut |event| {
        events.push(event)
    })
    .unwrap();
    let mut names: Vec<String> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    assert!(Weights::open(&dir).unwrap().config().is_ok());
    let requests = hub.requests();
    assert!(
        !requests
            .iter()
            .any(|path| path.contains(".bin") || path.contains("escape"))
    );

    let size = fs::metadata(dir.join("model.safetensors")).unwrap().len();
    let weights: Vec<_> = events
        .iter()
        .filter(|event| event.file == "model.safetensors")
        .collect();
    assert!(weights.is_sorted_by_key(|event| event.done));
    let last = weights.last().unwrap();
    assert_eq!((last.done, last.total), (size, size));
}

#[test]
fn the_cache_serves_what_was_downloaded() {
    let hub = llama_hub();
    let dir = locate(&hub).unwrap();
    hub.requests();
    // Again: the commit is asked for, no file is.
    assert_eq!(locate(&hub).unwrap(), dir);
    assert_eq!(hub.requests().len(), 1);
    // A commit that is there needs no hub; neither does HF_HUB_OFFLINE.
    assert_eq!(locate_at(&hub, COMMIT).unwrap(), dir);
    let offline = HubOptions {
        offline: true,
        ..hub.options()
    };
    assert_eq!(
        locate_with(MODEL, "main", &offline, &mut |_| {}).unwrap(),
        dir
    );
    assert!(hub.requests().is_empty());
    // A hub that is down does not matter either.
    hub.set(Mood::Busy);
    assert_eq!(locate(&hub).unwrap(), dir);

    fs::remove_file(dir.join("model.safetensors")).unwrap();
    let error = locate_with(MODEL, "main", &offline, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("no weights"), "{error}");
    let error = locate_with(MODEL, "v2", &offline, &mut |_| {}).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("HF_HUB_OFFLINE is set; unset it"),
        "{error}"
    );
}

#[test]
fn shards_are_those_of_the_index() {
    let dir = own().join("models/qwen2");
    let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name() != "expected.safetensors")
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    files.push(("model-99999-of-99999.safetensors".into(), b"x".to_vec()));
    let listed: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (&n[..], &b[..])).collect();
    let hub = start(&listed);
    let found = locate(&hub).unwrap();
    assert!(Weights::open(&found).unwrap().names().count() > 10);
    assert!(!found.join("model-99999-of-99999.safetensors").exists());

    let shard = files
        .iter()
        .find(|(name, _)| name.starts_with("model-00001"))
        .unwrap();
    fs::remove_file(found.join(&shard.0)).unwrap();
    let offline = HubOptions {
        offline: true,
        ..hub.options()
    };
    let error = locate_with(MODEL, "main", &offline, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains(&shard.0), "{error}");
    hub.repo.lock().unwrap().files.remove(&shard.0);
    let error = locate(&hub).unwrap_err();
    assert!(error.contains("its index names model-00001"), "{error}");
}

#[test]
fn a_lone_gguf_is_taken_and_a_choice_is_left_to_the_user() {
    let gguf = fs::read(own().join("quant/gguf/llama.gguf")).unwrap();
    let hub = start(&[("README.md", b"#"), ("tiny.Q8_0.gguf", &gguf)]);
    let path = locate(&hub).unwrap();
    assert!(path.ends_with("tiny.Q8_0.gguf"), "{path:?}");
    assert!(Weights::open(&path).unwrap().config().is_ok());
    hub.set(Mood::Busy);
    assert_eq!(locate(&hub).unwrap(), path);

    let hub = start(&[("a.gguf", b"x"), ("b.gguf", b"x")]);
    let error = locate(&hub).unwrap_err();
    assert!(
        error.contains("several GGUF files") && error.contains("a.gguf, b.gguf"),
        "{error}"
    );

    let hub = start(&[("config.json", b"{}"), ("pytorch_model.bin", b"x")]);
    let error = locate(&hub).unwrap_err();
    assert!(
        error.contains("only pickles (pytorch_model.bin)"),
        "{error}"
    );
    assert_eq!(hub.requests().len(), 1);

    let hub = start(&[("README.md", b"x")]);
    assert!(
        locate(&hub)
            .unwrap_err()
            .contains("expected model.safetensors")
    );
    let hub = start(&[("model.safetensors", b"x")]);
    assert!(locate(&hub).unwrap_err().contains("no config.json"));
}

#[test]
fn refusals_say_what_to_do() {
    let hub = llama_hub();
    for (mood, expected) in [
        (
            Mood::Refuses("GatedRepo"),
            "you may not; accept its terms on",
        ),
        (
            Mood::Refuses("RepoNotFound"),
            "has no model `someone/tiny`, or it is private",
        ),
        (Mood::Forbids, "403 Forbidden; accept its terms"),
        (Mood::Ignorant, "has no model `someone/tiny`"),
        (Mood::Busy, "503 Service Unavailable; check the network"),
    ] {
        hub.set(mood);
        let error = locate(&hub).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    hub.set(Mood::Kind);
    let error = locate_at(&hub, "v9").unwrap_err();
    assert!(error.contains("has no revision `v9`"), "{error}");
}

#[test]
fn no_network_is_an_error_in_good_time() {
    let hub = llama_hub();
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let options = HubOptions {
        endpoint: Some(format!("http://{closed}")),
        ..hub.options()
    };
    let start = Instant::now();
    let error = locate_with(MODEL, "main", &options, &mut |_| {}).unwrap_err();
    assert!(
        error.to_string().contains("give the path of a local copy"),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(15));

    hub.set(Mood::Silent);
    let options = HubOptions {
        patience: Duration::from_millis(300),
        ..hub.options()
    };
    let start = Instant::now();
    let error = locate_with(MODEL, "main", &options, &mut |_| {}).unwrap_err();
    assert!(
        error.to_string().contains("nothing arrived for 0.3 s"),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(5));

    let options = HubOptions {
        endpoint: Some("not a url".into()),
        ..hub.options()
    };
    assert!(locate_with(MODEL, "main", &options, &mut |_| {}).is_err());
}

#[test]
fn files_that_do_not_arrive_whole_are_not_kept() {
    let hub = llama_hub();
    for mood in [Mood::Breaks, Mood::Lies] {
        hub.set(mood);
        let error = locate(&hub).unwrap_err();
        assert!(error.contains(MODEL), "{error}");
        hub.set(Mood::Kind);
        let dir = locate(&hub).unwrap();
        assert!(Weights::open(&dir).unwrap().config().is_ok());
        fs::remove_dir_all(hub.folder()).unwrap();
    }
}

#[test]
fn paths_are_never_looked_up() {
    let hub = llama_hub();
    let locate = |model: &str| {
        locate_with(model, "main", &hub.options(), &mut |_| {}).map_err(|error| error.to_string())
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert_eq!(locate(path).unwrap(), dir.path());
    let gguf = dir.path().join("m.gguf");
    fs::write(&gguf, "x").unwrap();
    assert_eq!(locate(gguf.to_str().unwrap()).unwrap(), gguf);
    let pickle = dir.path().join("m.bin");
    fs::write(&pickle, "x").unwrap();
    assert!(
        locate(pickle.to_str().unwrap())
            .unwrap_err()
            .contains("not a model")
    );
    for absent in [
        "./nowhere",
        "nowhere",
        "a/b/c",
        "~/models/x",
        "a/b.gguf",
        "/nowhere/at",
    ] {
        let error = locate(absent).unwrap_err();
        assert!(error.contains("no such directory or .gguf file"), "{error}");
    }
    assert!(!Path::new("nowhere").exists());
    assert!(hub.requests().is_empty());
}
