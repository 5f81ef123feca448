//! What a run leaves behind, and the rules about not losing it.
//!
//! ```text
//! RUN/recipe.yaml      the resolved recipe
//! RUN/metrics.jsonl    one event a line
//! RUN/states/step-N/   run states
//! RUN/adapter/         the adapter (or RUN/model/ with adapter.method: full)
//! RUN/run.lock         held by the process that trains
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use super::Event;
use super::run_state::Progress;
use crate::export::write::{self, WriteError};
use crate::recipe::faults::Faults;
use crate::recipe::plan::OnBadRow;
use crate::recipe::{GradientCheckpointing, Plan, load, resolve};

/// A run directory that this process holds.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Dropped with the run, which releases it.
    _lock: File,
}

/// What to do with a run directory that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Refuse.
    Refuse,
    /// Continue the run in it.
    Resume,
    /// Delete the run in it.
    Overwrite,
}

/// Why a run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Something is there.
    #[error(
        "{0} already holds a run; continue it with --resume, replace it with --overwrite, or name another directory with --out"
    )]
    Taken(PathBuf),
    /// Something is there that no run wrote.
    #[error(
        "{0} is not empty and holds no run (no recipe.yaml); name another directory with --out"
    )]
    NotARun(PathBuf),
    /// Another process trains in it.
    #[error(
        "another process is training in {0}; wait for it, or name another directory with --out"
    )]
    Locked(PathBuf),
    /// The recipe differs from the one that the run began with.
    #[error(
        "{path} was begun with another recipe, and going on would not give what either describes; changed: {}; use the recipe it began with, or start anew with --out or --overwrite",
        .changed.join(", ")
    )]
    RecipeChanged {
        /// The run's recipe.
        path: PathBuf,
        /// `key: before → now`.
        changed: Vec<String>,
    },
    /// The run's recipe cannot be read.
    #[error("the run's own recipe cannot be read:\n{0}")]
    Recipe(Faults),
    /// A write failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A read failed.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// Names of everything a run writes.
const RECIPE: &str = "recipe.yaml";
const METRICS: &str = "metrics.jsonl";
const STATES: &str = "states";
const LOCK: &str = "run.lock";
/// Directories of results.
pub const ADAPTER: &str = "adapter";
/// The adapter of the lowest validation loss, when that is not the last.
pub const BEST_ADAPTER: &str = "adapter-best";
/// Base and adapter as one model, where `lorafit merge RUN` puts it.
pub const MERGED: &str = "merged";
/// The model of `adapter.method: full`.
pub const MODEL: &str = "model";
/// The model of the lowest validation loss, when that is not the last.
pub const BEST_MODEL: &str = "model-best";

/// Whether the directory can be claimed, without claiming it.
///
/// # Errors
/// It holds something and `existing` does not allow for it.
pub fn may_open(path: &Path, existing: Existing) -> Result<(), RunDirError> {
    let has_run = path.join(RECIPE).exists();
    if !write::is_taken(path) {
        return Ok(());
    }
    match existing {
        Existing::Refuse if has_run => Err(RunDirError::Taken(path.to_owned())),
        _ if !has_run && !only_ours(path) => Err(RunDirError::NotARun(path.to_owned())),
        _ => Ok(()),
    }
}

impl RunDir {
    /// Claims the directory for this process and writes the recipe into it.
    ///
    /// # Errors
    /// It holds something and `existing` does not allow for it, another process has it, the
    /// recipe differs from the run's, or it cannot be written.
    pub fn open(plan: &Plan, existing: Existing) -> Result<Self, RunDirError> {
        let path = plan.output_dir.clone();
        may_open(&path, existing)?;
        let has_run = path.join(RECIPE).exists();
        write::create_dir(&path)?;
        let lock = lock(&path)?;
        if existing == Existing::Overwrite {
            clear(&path)?;
        }
        let run = Self { path, _lock: lock };
        write::clean_up(&run.path)?;
        write::clean_up(&run.states())?;
        if existing == Existing::Resume && has_run {
            run.same_recipe(plan)?;
        }
        write::atomic_bytes(&run.path.join(RECIPE), resolve::to_yaml(plan).as_bytes())?;
        Ok(run)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where run states lie.
    pub fn states(&self) -> PathBuf {
        self.path.join(STATES)
    }

    /// The resolved recipe of the run in a directory.
    ///
    /// # Errors
    /// It is missing or was damaged.
    pub fn recipe_of(run: &Path) -> Result<Plan, RunDirError> {
        load::load(&run.join(RECIPE), &[]).map_err(RunDirError::Recipe)
    }

    /// Refuses a recipe that would change the numbers of the run.
    fn same_recipe(&self, plan: &Plan) -> Result<(), RunDirError> {
        let path = self.path.join(RECIPE);
        let begun = Self::recipe_of(&self.path)?;
        let (before, now) = (comparable(&begun), comparable(plan));
        let mut changed = Vec::new();
        differences("", &before, &now, &mut changed);
        if changed.is_empty() {
            Ok(())
        } else {
            Err(RunDirError::RecipeChanged { path, changed })
        }
    }

    /// Opens `metrics.jsonl`, keeping what lies behind a run that continues from `progress`.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub fn metrics(&self, progress: &Progress) -> Result<Metrics, RunDirError> {
        let path = self.path.join(METRICS);
        let mut kept = Vec::new();
        if let Ok(file) = File::open(&path) {
            // As bytes: a kill may have cut a line short within a character.
            for line in BufReader::new(file).split(b'\n') {
                let line = line.map_err(|source| RunDirError::Read {
                    path: path.clone(),
                    source,
                })?;
                let event = serde_json::from_slice::<Event>(&line);
                if event.is_ok_and(|event| progress.includes(&event)) {
                    kept.extend_from_slice(&line);
                    kept.push(b'\n');
                }
            }
        }
        write::atomic_bytes(&path, &kept)?;
        let file = fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(|source| WriteError::io("open", &path, source))?;
        Ok(Metrics { path, file })
    }
}

/// The open `metrics.jsonl`.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Appends one event.
    ///
    /// # Errors
    /// The disk is full or gone.
    pub fn write(&mut self, event: &Event) -> Result<(), WriteError> {
        let mut line = serde_json::to_vec(event).unwrap_or_default();
        line.push(b'\n');
        (self.file.write_all(&line))
            .map_err(|source| WriteError::io("append to", &self.path, source))
    }

    /// Makes what was appended outlast a power cut, as the state that follows it does.
    ///
    /// # Errors
    /// The disk is full or gone.
    pub fn sync(&self) -> Result<(), WriteError> {
        (self.file.sync_data()).map_err(|source| WriteError::io("sync", &self.path, source))
    }
}

fn lock(path: &Path) -> Result<File, RunDirError> {
    let name = path.join(LOCK);
    let file = File::create(&name).map_err(|source| WriteError::io("create", &name, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(RunDirError::Locked(path.to_path_buf())),
        Err(TryLockError::Error(source)) => Err(WriteError::io("lock", &name, source).into()),
    }
}

/// Whether a directory without recipe holds nothing but what a run killed at its start leaves.
fn only_ours(path: &Path) -> bool {
    let Ok(entries) = fs::read_dir(path) else {
        return false;
    };
    entries.flatten().all(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name == LOCK || name.starts_with(&format!(".{RECIPE}."))
    })
}

/// Deletes what a run wrote, and nothing else.
fn clear(path: &Path) -> Result<(), RunDirError> {
    for name in [ADAPTER, BEST_ADAPTER, MODEL, BEST_MODEL, MERGED, STATES] {
        let path = path.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(WriteError::io("remove", &path, error).into());
            }
            _ => {}
        }
    }
    for name in [METRICS, RECIPE] {
        let path = path.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(WriteError::io("remove", &path, error).into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// A plan without the knobs that do not change what is computed.
fn comparable(plan: &Plan) -> serde_json::Value {
    let mut plan = plan.clone();
    plan.output_dir = PathBuf::new();
    plan.train.logging_steps = 0;
    plan.train.save_steps = 0;
    plan.train.save_total_limit = 0;
    plan.train.gradient_checkpointing = GradientCheckpointing::Auto;
    plan.train.offload_activations = false;
    plan.sample.prompts.clear();
    plan.sample.max_new_tokens = 0;
    plan.sample.temperature = 0.0;
    plan.sample.top_p = 0.0;
    plan.base.cache_dir = None;
    plan.base.cache_limit = 0.0;
    plan.data.cache_dir = None;
    plan.data.cache_limit = 0.0;
    if plan.data.streaming {
        // A row that stopped the run may be left out from there on.
        plan.data.on_bad_row = OnBadRow::Fail;
        plan.data.waive.clear();
    }
    serde_json::to_value(plan).unwrap_or_default()
}

fn differences(
    key: &str,
    before: &serde_json::Value,
    now: &serde_json::Value,
    changed: &mut Vec<String>,
) {
    match (before.as_object(), now.as_object()) {
        (Some(before), Some(now)) => {
            for (name, value) in now {
                let key = if key.is_empty() {
                    name.clone()
                } else {
                    format!("{key}.{name}")
                };
                let old = before.get(name).unwrap_or(&serde_json::Value::Null);
                differences(&key, old, value, changed);
            }
        }
        _ if before != now => changed.push(format!("{key}: {before} → {now}")),
        _ => {}
    }
}
