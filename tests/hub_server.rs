//! A Hugging Face hub, played by a small HTTP server on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lorafit::hub::HubOptions;
use serde_json::json;

/// The commit of `main`.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The commit of the converted branch.
pub const CONVERTED_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
/// The id of the one repository.
pub const ID: &str = "someone/tiny";

/// How the server behaves.
#[derive(Clone, Copy, PartialEq)]
pub enum Mood {
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

pub type Files = BTreeMap<String, Vec<u8>>;

/// The one repository.
pub struct Repo {
    /// `models` or `datasets`.
    pub kind: &'static str,
    pub files: Files,
    /// Those of the branch that the hub converts to Parquet, if there is one.
    pub converted: Option<Files>,
}

pub struct Hub {
    pub endpoint: String,
    pub repo: Arc<Mutex<Repo>>,
    mood: Arc<Mutex<Mood>>,
    /// `METHOD path` of each request.
    log: Arc<Mutex<Vec<String>>>,
    pub cache: tempfile::TempDir,
}

pub fn files(files: &[(&str, &[u8])]) -> Files {
    files
        .iter()
        .map(|(name, bytes)| (name.to_string(), bytes.to_vec()))
        .collect()
}

impl Hub {
    /// A hub with a model or dataset.
    pub fn start(kind: &'static str, held: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let repo = Repo {
            kind,
            files: files(held),
            converted: None,
        };
        let hub = Self {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            repo: Arc::new(Mutex::new(repo)),
            mood: Arc::new(Mutex::new(Mood::Kind)),
            log: Arc::default(),
            cache: tempfile::tempdir().unwrap(),
        };
        let (repo, mood, log) = (hub.repo.clone(), hub.mood.clone(), hub.log.clone());
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming().flatten() {
                let mood = *mood.lock().unwrap();
                if mood == Mood::Silent {
                    kept.push(stream);
                    continue;
                }
                let _ = answer(stream, &repo.lock().unwrap(), mood, &log);
            }
        });
        hub
    }

    pub fn options(&self) -> HubOptions {
        HubOptions {
            endpoint: Some(self.endpoint.clone()),
            cache_dir: Some(self.cache.path().to_path_buf()),
            token: Some("hf_test".into()),
            offline: false,
            patience: Duration::from_secs(20),
        }
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// The folder of the repository in the cache.
    pub fn folder(&self) -> PathBuf {
        let kind = self.repo.lock().unwrap().kind;
        self.cache.path().join(format!("{kind}--someone--tiny"))
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

fn answer(
    mut stream: TcpStream,
    repo: &Repo,
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

    let reply = reply(method, path, repo, mood);
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

fn reply(method: &str, path: &str, repo: &Repo, mood: Mood) -> Reply {
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
    let kind = repo.kind;
    if let Some(revision) = path.strip_prefix(&format!("/api/{kind}/{ID}/revision/")) {
        let (commit, files) = match (revision, &repo.converted) {
            ("main" | COMMIT, _) => (COMMIT, &repo.files),
            ("refs%2Fconvert%2Fparquet", Some(files)) => (CONVERTED_COMMIT, files),
            _ => return not_found("RevisionNotFound"),
        };
        let sibling = |name| json!({"rfilename": name});
        let siblings: Vec<_> = files.keys().map(sibling).collect();
        let info = json!({"id": ID, "sha": commit, "siblings": siblings}).to_string();
        let headers = "content-type: application/json\r\n";
        return Reply::new("200 OK", headers, info.as_bytes());
    }
    let page = match kind {
        "datasets" => format!("/datasets/{ID}"),
        _ => format!("/{ID}"),
    };
    let at = |commit| {
        let file = path.strip_prefix(&format!("{page}/resolve/{commit}/"))?;
        Some((commit, file.replace("%20", " ")))
    };
    let found = at(COMMIT)
        .map(|(commit, file)| (commit, file, Some(&repo.files)))
        .or_else(|| at(CONVERTED_COMMIT).map(|(c, file)| (c, file, repo.converted.as_ref())));
    let Some((commit, name, Some(files))) = found else {
        return not_found("EntryNotFound");
    };
    let Some(bytes) = files.get(&name) else {
        return not_found("EntryNotFound");
    };
    let etag = name.replace('/', "_");
    let headers = format!("etag: \"etag-of-{etag}-{commit}\"\r\nx-repo-commit: {commit}\r\n");
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
