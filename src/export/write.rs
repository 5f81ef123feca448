//! Writing so that a full disk or a kill never costs what was there before.
//!
//! A file is written beside its place under a temporary name, flushed, synced and renamed, and
//! then the directory is synced. [`PartialDir`] does the same for a whole directory. Temporary
//! names are `.NAME.partial-PID-N`; [`clean_up`] removes those that a killed process left.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Why a file or directory could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The system refused.
    #[error("cannot {action} {}: {source}{}", path.display(), remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path names no file or directory in a directory.
    #[error("cannot write {}: it has no file name; give a path such as DIR/NAME", path.display())]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// Something is there that must not be replaced.
    #[error("{} already exists; remove it or choose another place", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// A tensor's bytes do not fit its place in the file.
    #[error("cannot write tensor {tensor} to {}: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the header announces.
        expected: String,
        /// What came.
        found: String,
    },
}

impl WriteError {
    /// Wraps what the system said about `path`.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// What the user can do about it.
fn remedy(error: &io::Error) -> &'static str {
    use io::ErrorKind::*;
    match error.kind() {
        StorageFull | QuotaExceeded => {
            "; free some space or choose a place on another disk (nothing that was there is lost)"
        }
        FileTooLarge => "; the file system or `ulimit -f` forbids files of this size",
        ReadOnlyFilesystem => "; choose a place on a disk that can be written",
        PermissionDenied => "; choose a place where you may write",
        NotADirectory => "; a part of the path is a file, not a directory",
        NotFound => "; create its directory first",
        _ => "",
    }
}

/// A file that appears in its place only when it is complete.
///
/// Dropped before [`AtomicFile::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Starts a file that will replace `path`.
    ///
    /// # Errors
    /// When the directory is missing or cannot be written.
    pub fn create(path: &Path) -> Result<Self, WriteError> {
        let (temporary, file) = unused_sibling(path, |candidate| {
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(candidate)
        })?;
        // Held until the process ends, however it ends; see `clean_up`. Where the file system
        // knows no locks the file is never taken for abandoned.
        let _ = file.try_lock();
        let file = Some(BufWriter::with_capacity(1 << 20, file));
        Ok(Self {
            path: path.to_owned(),
            temporary,
            file,
        })
    }

    /// Where the file will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// As the system's.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.write_all(bytes)
            .map_err(|e| WriteError::io("write", &self.path, e))
    }

    /// Syncs the file and puts it in its place.
    ///
    /// # Errors
    /// When syncing or renaming fails; the old file is then still there.
    pub fn commit(mut self) -> Result<(), WriteError> {
        let result = self.sync_and_rename();
        if result.is_ok() {
            self.file = None;
        }
        result
    }

    fn sync_and_rename(&mut self) -> Result<(), WriteError> {
        let path = &self.path;
        if let Some(buffered) = &mut self.file {
            buffered
                .flush()
                .map_err(|e| WriteError::io("write", path, e))?;
            buffered
                .get_ref()
                .sync_all()
                .map_err(|e| WriteError::io("sync", path, e))?;
        }
        fs::rename(&self.temporary, path).map_err(|e| WriteError::io("replace", path, e))?;
        sync_dir(parent(path))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), |file| file.flush())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            // Without a flush: it would fail again on a full disk.
            drop(file.into_parts());
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes `path` with `fill`, whole or not at all.
///
/// # Errors
/// What `fill` or the system says; the old file, if any, is then untouched.
pub fn atomic(
    path: &Path,
    fill: impl FnOnce(&mut AtomicFile) -> io::Result<()>,
) -> Result<(), WriteError> {
    let mut file = AtomicFile::create(path)?;
    fill(&mut file).map_err(|e| WriteError::io("write", path, e))?;
    file.commit()
}

/// Writes `bytes` to `path`, whole or not at all.
///
/// # Errors
/// As [`atomic`].
pub fn atomic_bytes(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    atomic(path, |file| file.write_all(bytes))
}

/// Creates a directory and those above it.
///
/// # Errors
/// What the system says.
pub fn create_dir(path: &Path) -> Result<(), WriteError> {
    fs::create_dir_all(path).map_err(|e| WriteError::io("create directory", path, e))
}

/// A directory that appears in its place only when it is complete.
///
/// Dropped before it is published, it is removed with all that was written into it.
#[derive(Debug)]
pub struct PartialDir {
    target: PathBuf,
    path: PathBuf,
    /// Holds the lock that tells [`clean_up`] that somebody is still writing. `None` where
    /// directories cannot be opened (Windows): they are then never cleaned up.
    lock: Option<File>,
    published: bool,
}

impl PartialDir {
    /// Starts a directory that will become `target`; the directories above are created, and what
    /// a killed process left of the same target is cleaned up.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(target: &Path) -> Result<Self, WriteError> {
        create_dir(parent(target))?;
        clean_up_after(parent(target), target.file_name())?;
        let (path, ()) = unused_sibling(target, |candidate| fs::create_dir(candidate))?;
        let lock = File::open(&path).ok();
        if let Some(handle) = &lock {
            let _ = handle.try_lock();
        }
        Ok(Self {
            target: target.to_owned(),
            path,
            lock,
            published: false,
        })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs everything and puts the directory in its place, which must be free or an empty
    /// directory.
    ///
    /// # Errors
    /// [`WriteError::Exists`] when something is there, or what the system says.
    pub fn publish(mut self) -> Result<(), WriteError> {
        if is_taken(&self.target) {
            return Err(WriteError::Exists {
                path: self.target.clone(),
            });
        }
        self.sync_and_rename()
    }

    /// Syncs everything and puts the directory in the place of the one that is there.
    ///
    /// Two renames: a kill between them leaves the old directory under another name, from where
    /// [`clean_up`] takes it back.
    ///
    /// # Errors
    /// What the system says; the old directory is then in its place.
    pub fn publish_replacing(mut self) -> Result<(), WriteError> {
        if !is_taken(&self.target) {
            return self.sync_and_rename();
        }
        sync_tree(&self.path)?;
        let aside = named_sibling(&self.target, REPLACED, 0)?;
        remove_all(&aside)?;
        fs::rename(&self.target, &aside).map_err(|e| WriteError::io("replace", &self.target, e))?;
        let result = self.sync_and_rename();
        match &result {
            Ok(()) => remove_all(&aside)?,
            Err(_) => {
                let _ = fs::rename(&aside, &self.target);
            }
        }
        result
    }

    fn sync_and_rename(&mut self) -> Result<(), WriteError> {
        sync_tree(&self.path)?;
        if cfg!(windows) {
            // An open directory cannot be renamed there, and an empty one not be replaced.
            self.lock = None;
            let _ = fs::remove_dir(&self.target);
        }
        fs::rename(&self.path, &self.target)
            .map_err(|e| WriteError::io("create", &self.target, e))?;
        self.published = true;
        sync_dir(parent(&self.target))
    }
}

impl Drop for PartialDir {
    fn drop(&mut self) {
        if !self.published {
            self.lock = None;
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Whether something other than an empty directory is at `path`.
pub fn is_taken(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => fs::symlink_metadata(path).is_ok(),
    }
}

const PARTIAL: &str = "partial";
const REPLACED: &str = "replaced";

/// Removes from `dir` what killed processes left half-written, and puts back directories that
/// were being replaced; returns the paths removed or put back.
///
/// What a living process is writing is locked and stays. A `dir` that does not exist is clean.
///
/// # Errors
/// What the system says.
pub fn clean_up(dir: &Path) -> Result<Vec<PathBuf>, WriteError> {
    clean_up_after(dir, None)
}

/// [`clean_up`] for what would have become `only`, or for everything.
fn clean_up_after(dir: &Path, only: Option<&OsStr>) -> Result<Vec<PathBuf>, WriteError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(WriteError::io("read directory", dir, error)),
    };
    let mut touched = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| WriteError::io("read directory", dir, e))?;
        let (path, name) = (entry.path(), entry.file_name());
        let left_of = |kind| {
            name_before(&name, kind).filter(|name| only.is_none_or(|only| only == OsStr::new(name)))
        };
        if let Some(target) = left_of(REPLACED).map(|name| dir.join(name)) {
            if is_taken(&target) {
                remove_all(&path)?;
                touched.push(path);
            } else {
                fs::rename(&path, &target).map_err(|e| WriteError::io("restore", &target, e))?;
                touched.push(target);
            }
        } else if left_of(PARTIAL).is_some() && is_abandoned(&path) {
            remove_all(&path)?;
            touched.push(path);
        }
    }
    if !touched.is_empty() {
        sync_dir(dir)?;
    }
    touched.sort();
    Ok(touched)
}

/// `NAME` of `.NAME.KIND-PID-N`.
fn name_before<'a>(file_name: &'a OsStr, kind: &str) -> Option<&'a str> {
    let (name, suffix) = file_name.to_str()?.strip_prefix('.')?.rsplit_once('.')?;
    let (pid, n) = suffix
        .strip_prefix(kind)?
        .strip_prefix('-')?
        .split_once('-')?;
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    (digits(pid) && digits(n)).then_some(name)
}

/// Whether nobody holds the lock.
fn is_abandoned(path: &Path) -> bool {
    let Ok(handle) = File::open(path) else {
        return false;
    };
    match handle.try_lock() {
        Ok(()) => true,
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => false,
    }
}

fn remove_all(path: &Path) -> Result<(), WriteError> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    result.map_err(|e| WriteError::io("remove", path, e))
}

/// The first `.NAME.partial-PID-N` that `make` can make.
fn unused_sibling<T>(
    path: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> Result<(PathBuf, T), WriteError> {
    let mut n = 0;
    loop {
        let candidate = named_sibling(path, PARTIAL, n)?;
        match make(&candidate) {
            Ok(made) => return Ok((candidate, made)),
            // Another thread's, or one left by a process of the same number.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && n < 10_000 => n += 1,
            Err(error) => return Err(WriteError::io("write", path, error)),
        }
    }
}

fn named_sibling(path: &Path, kind: &str, n: usize) -> Result<PathBuf, WriteError> {
    let name = path.file_name().ok_or_else(|| WriteError::NoName {
        path: path.to_owned(),
    })?;
    let mut sibling = OsString::from(".");
    sibling.push(name);
    sibling.push(format!(".{kind}-{}-{n}", std::process::id()));
    Ok(path.with_file_name(sibling))
}

/// The directory of a path; `.` for a bare name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Syncs all files and directories below `dir`, and `dir`.
fn sync_tree(dir: &Path) -> Result<(), WriteError> {
    let entries = fs::read_dir(dir).map_err(|e| WriteError::io("read directory", dir, e))?;
    for entry in entries {
        let path = entry
            .map_err(|e| WriteError::io("read directory", dir, e))?
            .path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            // Windows syncs only what is open for writing.
            let open = OpenOptions::new()
                .read(true)
                .write(cfg!(windows))
                .open(&path);
            open.and_then(|file| file.sync_all())
                .map_err(|e| WriteError::io("sync", &path, e))?;
        }
    }
    sync_dir(dir)
}

/// Makes renames in `dir` last. Windows has no such call.
fn sync_dir(dir: &Path) -> Result<(), WriteError> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    let result = File::open(dir).and_then(|handle| handle.sync_all());
    result.map_err(|e| WriteError::io("sync", dir, e))
}
