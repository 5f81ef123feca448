//! Finds a base model: a local directory or GGUF file, or a Hugging Face id.
//!
//! Only configuration, tokenizer, safetensors and GGUF files are ever asked for; pickles never.

use std::fs;
use std::path::{Path, PathBuf};

use super::download::{Remote, download};
use super::{
    HubError, HubOptions, Progress, Repo, RepoKind, check_revision, client, is_commit, is_id_part,
};
use crate::model::weights::{INDEX, SINGLE, read_index};

/// The directory or GGUF file of `model`: a local path, or a Hugging Face id at `revision`,
/// downloaded as the environment says.
///
/// # Errors
/// When there is no such model, it has no safetensors or GGUF, or it cannot be downloaded.
pub fn locate(
    model: &str,
    revision: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, HubError> {
    locate_with(model, revision, &HubOptions::from_env(), progress)
}

/// [`locate`] with explicit options.
///
/// # Errors
/// As [`locate`].
pub fn locate_with(
    model: &str,
    revision: &str,
    options: &HubOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, HubError> {
    let path = Path::new(model);
    if path.exists() {
        return local(path);
    }
    let repo = parse(model, revision)?;
    let client = client(options).map_err(|error| repo.explain(error, "the hub"))?;
    let cache = client.cache_dir();
    let commit = repo.cached_commit(cache);
    let cached = cached(commit.map(|commit| repo.snapshot(cache, &commit)));
    if options.offline || is_commit(revision) {
        match cached {
            Ok(found) => return Ok(found),
            Err(missing) if options.offline => return Err(repo.offline(cache, missing)),
            Err(_) => {}
        }
    }
    let job_repo = repo.clone();
    let job = move |remote: &Remote| fetch_model(remote, &job_repo);
    match download(&repo, client, options.patience, progress, job) {
        // The hub is away, but what it gave before is whole.
        Err(HubError::Unreachable { .. }) if cached.is_ok() => Ok(cached.unwrap_or_default()),
        result => result,
    }
}

/// A path that exists: a directory or a GGUF file.
fn local(path: &Path) -> Result<PathBuf, HubError> {
    match path.is_dir() || is_gguf(path) {
        true => Ok(path.to_path_buf()),
        false => Err(HubError::NotAModel {
            path: path.to_path_buf(),
        }),
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "gguf")
}

/// Splits `owner/name`; anything else was meant as a path.
fn parse(model: &str, revision: &str) -> Result<Repo, HubError> {
    let parts = model
        .split_once('/')
        .filter(|(owner, name)| is_id_part(owner) && is_id_part(name) && !name.ends_with(".gguf"));
    let Some((owner, name)) = parts else {
        return Err(HubError::NoSuchPath {
            model: model.to_string(),
        });
    };
    check_revision(revision)?;
    Ok(Repo {
        kind: RepoKind::Model,
        owner: owner.to_string(),
        name: name.to_string(),
        revision: revision.to_string(),
    })
}

/// The model in a snapshot, or what it lacks.
fn cached(snapshot: Option<PathBuf>) -> Result<PathBuf, String> {
    let Some(dir) = snapshot else {
        return Err("that revision was never downloaded".into());
    };
    let has = |file: &str| dir.join(file).is_file();
    if !has(SINGLE) && !has(INDEX) {
        let files = fs::read_dir(&dir).map_err(|error| error.to_string())?;
        let paths = files.flatten().map(|entry| entry.path());
        let mut ggufs = paths.filter(|path| is_gguf(path));
        return match (ggufs.next(), ggufs.next()) {
            (Some(file), None) if file.is_file() => Ok(file),
            _ => Err("no weights".into()),
        };
    }
    if !has("config.json") {
        return Err("no config.json".into());
    }
    if !has(SINGLE) {
        let index = read_index(&dir.join(INDEX)).map_err(|error| error.to_string())?;
        if let Some(shard) = index.values().find(|shard| !has(shard)) {
            return Err(format!("no {shard}"));
        }
    }
    Ok(dir)
}

/// Downloads the files that are read; returns the directory, or the one GGUF file.
fn fetch_model(remote: &Remote, repo: &Repo) -> Result<PathBuf, HubError> {
    let (commit, files) = remote.files(repo)?;
    // Only files at the top are read.
    let files: Vec<String> = files
        .into_iter()
        .filter(|file| !file.contains('/'))
        .collect();
    let found = fetch_files(remote, repo, &files, &commit)?;
    remote.keep_reference(repo, &commit)?;
    Ok(found)
}

fn fetch_files(
    remote: &Remote,
    repo: &Repo,
    files: &[String],
    commit: &str,
) -> Result<PathBuf, HubError> {
    let has = |wanted: &str| files.iter().any(|file| file == wanted);
    let fetch = |file: &str| remote.fetch(repo, file, commit);
    if !has(SINGLE) && !has(INDEX) {
        return fetch(only_gguf(repo, files)?);
    }
    if !has("config.json") {
        return Err(repo.no_weights("there is no config.json beside them".into()));
    }
    for file in files.iter().filter(|file| is_companion(file)) {
        fetch(file)?;
    }
    let weights = match has(SINGLE) {
        true => fetch(SINGLE)?,
        false => {
            let index = fetch(INDEX)?;
            let mut shards: Vec<String> = read_index(&index)?.into_values().collect();
            shards.sort();
            shards.dedup();
            if let Some(absent) = shards.iter().find(|shard| !has(shard)) {
                let what = format!("its index names {absent}, which is not there");
                return Err(repo.no_weights(what));
            }
            for shard in &shards {
                fetch(shard)?;
            }
            index
        }
    };
    Ok(weights.parent().unwrap_or(&weights).to_path_buf())
}

/// The one GGUF file of a model without safetensors.
fn only_gguf<'a>(repo: &Repo, files: &'a [String]) -> Result<&'a str, HubError> {
    let with = |extensions: &[&str]| -> Vec<&'a str> {
        let wanted = |file: &&str| extensions.iter().any(|extension| file.ends_with(extension));
        files.iter().map(String::as_str).filter(wanted).collect()
    };
    match with(&[".gguf"]).as_slice() {
        [one] => Ok(one),
        [] => match with(&[".bin", ".pt", ".pth"]).first() {
            Some(pickle) => Err(repo.no_weights(format!(
                "there are only pickles ({pickle}), which can run code; use a model with safetensors, \
                 or convert a copy with save_pretrained on a machine you trust"
            ))),
            None => Err(repo.no_weights(format!("expected {SINGLE}, {INDEX} or a .gguf file"))),
        },
        several => Err(repo.no_weights(format!(
            "there are several GGUF files; download one and give its path: {}",
            several.join(", ")
        ))),
    }
}

/// Whether a file beside the weights is read: configuration, tokenizer, chat template.
fn is_companion(file: &str) -> bool {
    matches!(
        file,
        "config.json"
            | "generation_config.json"
            | "special_tokens_map.json"
            | "chat_template.jinja"
    ) || file.starts_with("tokenizer")
        && [".json", ".model", ".jinja", ".txt"]
            .iter()
            .any(|extension| file.ends_with(extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths_are_told_apart() {
        assert!(parse("HuggingFaceTB/SmolLM2-135M", "main").is_ok());
        assert!(parse("a/b", "refs/pr/1").is_ok());
        for path in [
            "./a/b", "../b", "/a/b", "~/b", "a", "a/b/c", "", "a/", "/", "a/b.gguf", "a\\b", "a/..",
        ] {
            let error = parse(path, "main").unwrap_err();
            assert!(matches!(error, HubError::NoSuchPath { .. }), "{path}");
        }
        let error = parse("a/b", "../c").unwrap_err();
        assert!(matches!(error, HubError::BadRevision { .. }));
    }

    #[test]
    fn pickles_are_never_companions() {
        for file in [
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "config.json",
        ] {
            assert!(is_companion(file), "{file}");
        }
        for file in [
            "pytorch_model.bin",
            "tokenizer.bin",
            "tokenizer.pkl",
            "modeling.py",
        ] {
            assert!(!is_companion(file), "{file}");
        }
    }
}
