//! Models from a Hugging Face hub, played by a small HTTP server on this machine.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lorafit::model::hub::{HubOptions, Progress, locate_with};
use lorafit::model::weights::Weights;
use serde_json::json;

use crate::reference::own;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const MODEL: &str = "someone/tiny";

/// How the server behaves.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Kind,
    /// 401 with this `X-Error-Code`.
    Refuses(&'static str),
    /// 403.
    Forbids,
    /// 404 for the model.
    Ignorant,
    /// 503.
    Busy,
    /// Accepts connections and says nothing.
    Silent,
    /// Sends half of each file and hangs up.
    Breaks,
    /// Answers GET with an error page of the file's length or more.
    Lies,
}

struct Hub {
    endpoint: String,
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    mood: Arc<Mutex<Mood>>,
    /// `METHOD path` of each request.
    log: Arc<Mutex<Vec<String>>>,
    cache: tempfile::TempDir,
}

impl Hub {
    fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let files = files
            .iter()
            .map(|(name, bytes)| (name.to_string(), bytes.to_vec()))
            .collect();
        let hub = Self {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            files: Arc::new(Mutex::new(files)),
            mood: Arc::new(Mutex::new(Mood::Kind)),
            log: Arc::default(),
            cache: tempfile::tempdir().unwrap(),
        };
        let (files, mood, log) = (hub.files.clone(), hub.mood.clone(), hub.log.clone());
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming().flatten() {
                let mood = *mood.lock().unwrap();
                if mood == Mood::Silent {
                    kept.push(stream);
                    continue;
                }
                let _ = answer(stream, &files.lock().unwrap(), mood, &log);
            }
        });
        hub
    }

    fn options(&self) -> HubOptions {
        HubOptions {
            endpoint: Some(self.endpoint.clone()),
            cache_dir: Some(self.cache.path().to_path_buf()),
            token: Some("hf_test".into()),
            offline: false,
            patience: Duration::from_secs(20),
        }
    }

    fn locate(&self) -> Result<std::path::PathBuf, String> {
        self.locate_at("main")
    }

    fn locate_at(&self, revision: &str) -> Result<std::path::PathBuf, String> {
        locate_with(MODEL, revision, &self.options(), &mut |_| {})
            .map_err(|error| error.to_string())
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    mood: Mood,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut authorized = false;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        authorized |= line
            .to_lowercase()
            .starts_with("authorization: bearer hf_test");
    }
    let mut words = request.split_whitespace();
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    log.lock().unwrap().push(format!("{method} {path}"));
    assert!(authorized, "the token is sent");

    let reply = reply(method, path, files, mood);
    let length = reply.announced.unwrap_or(reply.body.len());
    let (status, headers) = (reply.status, reply.headers);
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    if method != "HEAD" {
        stream.write_all(&reply.body)?;
    }
    stream.flush()
}

struct Reply {
    status: &'static str,
    headers: String,
    body: Vec<u8>,
    /// `Content-Length`, where it is not the body's.
    announced: Option<usize>,
}

impl Reply {
    fn new(status: &'static str, headers: &str, body: &[u8]) -> Self {
        Self {
            status,
            headers: headers.into(),
            body: body.into(),
            announced: None,
        }
    }
}

fn reply(method: &str, path: &str, files: &BTreeMap<String, Vec<u8>>, mood: Mood) -> Reply {
    let not_found = |code| {
        let headers = format!("x-error-code: {code}\r\n");
        Reply::new("404 Not Found", &headers, b"")
    };
    match mood {
        Mood::Refuses(code) => {
            let headers = format!("x-error-code: {code}\r\nx-error-message: you may not\r\n");
            return Reply::new("401 Unauthorized", &headers, b"");
        }
        Mood::Forbids => return Reply::new("403 Forbidden", "", b""),
        Mood::Ignorant => return not_found("RepoNotFound"),
        Mood::Busy => return Reply::new("503 Service Unavailable", "", b""),
        _ => {}
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{MODEL}/revision/")) {
        if !["main", COMMIT].contains(&revision) {
            return not_found("RevisionNotFound");
        }
        let sibling = |name| json!({"rfilename": name});
        let siblings: Vec<_> = files.keys().map(sibling).collect();
        let info = json!({"id": MODEL, "sha": COMMIT, "siblings": siblings}).to_string();
        return Reply::new(
            "200 OK",
            "content-type: application/json\r\n",
            info.as_bytes(),
        );
    }
    let file = path.strip_prefix(&format!("/{MODEL}/resolve/{COMMIT}/"));
    let Some((name, bytes)) = file.and_then(|file| files.get_key_value(file)) else {
        return not_found("EntryNotFound");
    };
    let headers = format!("etag: \"etag-of-{name}\"\r\nx-repo-commit: {COMMIT}\r\n");
    match mood {
        Mood::Breaks => Reply {
            announced: Some(bytes.len()),
            ..Reply::new("200 OK", &headers, &bytes[..bytes.len() / 2])
        },
        Mood::Lies if method == "GET" => {
            let page = vec![b'<'; bytes.len()];
            Reply::new("500 Internal Server Error", &headers, &page)
        }
        _ => Reply::new("200 OK", &headers, bytes),
    }
}

/// The files of a golden model, with pickles and others that nobody should ask for.
fn llama_hub() -> Hub {
    let dir = own().join("models/llama");
    let config = fs::read(dir.join("config.json")).unwrap();
    let weights = fs::read(dir.join("model.safetensors")).unwrap();
    Hub::start(&[
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
    let dir = hub.locate().unwrap();
    hub.requests();
    // Again: the commit is asked for, no file is.
    assert_eq!(hub.locate().unwrap(), dir);
    assert_eq!(hub.requests().len(), 1);
    // A commit that is there needs no hub; neither does HF_HUB_OFFLINE.
    assert_eq!(hub.locate_at(COMMIT).unwrap(), dir);
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
    assert_eq!(hub.locate().unwrap(), dir);

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
    let hub = Hub::start(&listed);
    let found = hub.locate().unwrap();
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
    hub.files.lock().unwrap().remove(&shard.0);
    let error = hub.locate().unwrap_err();
    assert!(error.contains("its index names model-00001"), "{error}");
}

#[test]
fn a_lone_gguf_is_taken_and_a_choice_is_left_to_the_user() {
    let gguf = fs::read(own().join("quant/gguf/llama.gguf")).unwrap();
    let hub = Hub::start(&[("README.md", b"#"), ("tiny.Q8_0.gguf", &gguf)]);
    let path = hub.locate().unwrap();
    assert!(path.ends_with("tiny.Q8_0.gguf"), "{path:?}");
    assert!(Weights::open(&path).unwrap().config().is_ok());
    hub.set(Mood::Busy);
    assert_eq!(hub.locate().unwrap(), path);

    let hub = Hub::start(&[("a.gguf", b"x"), ("b.gguf", b"x")]);
    let error = hub.locate().unwrap_err();
    assert!(
        error.contains("several GGUF files") && error.contains("a.gguf, b.gguf"),
        "{error}"
    );

    let hub = Hub::start(&[("config.json", b"{}"), ("pytorch_model.bin", b"x")]);
    let error = hub.locate().unwrap_err();
    assert!(
        error.contains("only pickles (pytorch_model.bin)"),
        "{error}"
    );
    assert_eq!(hub.requests().len(), 1);

    let hub = Hub::start(&[("README.md", b"x")]);
    assert!(
        hub.locate()
            .unwrap_err()
            .contains("expected model.safetensors")
    );
    let hub = Hub::start(&[("model.safetensors", b"x")]);
    assert!(hub.locate().unwrap_err().contains("no config.json"));
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
        let error = hub.locate().unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    hub.set(Mood::Kind);
    let error = hub.locate_at("v9").unwrap_err();
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
        let error = hub.locate().unwrap_err();
        assert!(error.contains(MODEL), "{error}");
        hub.set(Mood::Kind);
        let dir = hub.locate().unwrap();
        assert!(Weights::open(&dir).unwrap().config().is_ok());
        fs::remove_dir_all(hub.cache.path().join("models--someone--tiny")).unwrap();
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
