//! Where quantised bases are kept, so that a second run need not quantise again.
//!
//! A file is named by a hash of the base's fingerprint, the scheme, the names of the matrices and the version
//! of [`store`](crate::quant::store): what changed has another name. What is found is checked from end
//! to end before it is used ([`QuantStore::open`]), and made anew where it does not hold.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::PathBuf;

use super::causal_lm;
use super::config::ModelConfig;
use super::weights::Weights;
use crate::cache_dir::{CacheDir, Partial};
use crate::quant::store::{QuantStore, StoreWriter, VERSION};
use crate::quant::{QuantMatrix, Scheme};

/// What files are called.
const EXTENSION: &str = "quantized";

/// The directory of quantised bases.
#[derive(Debug)]
pub struct QuantCache(CacheDir);

impl QuantCache {
    /// In the user's cache directory unless another is named, with a limit in GiB; `None` where nothing is kept
    /// or there is no place for it.
    pub fn new(dir: Option<PathBuf>, limit: f64) -> Option<Self> {
        CacheDir::in_gib(dir, limit, EXTENSION).map(Self)
    }

    /// The matrices of a base for one load: those that are kept, or a place to keep them. `in_f32` names what
    /// is not quantised.
    pub fn of_base(
        self,
        weights: &Weights,
        config: &ModelConfig,
        scheme: Scheme,
        in_f32: &dyn Fn(&str) -> bool,
    ) -> Cached {
        let mut hash = blake3::Hasher::new();
        hash.update(format!("{VERSION} {scheme:?} {}", weights.fingerprint()).as_bytes());
        for linear in causal_lm::outline(config).linears {
            let name = format!("{}.weight", linear.path);
            hash.update(format!("\n{name} {}", in_f32(&name)).as_bytes());
        }
        let key = hash.finalize().to_hex()[..32].to_string();
        let state = match QuantStore::open(&self.0.path(&key), &key) {
            Ok(store) => {
                self.0.touch(&key);
                State::Found(store)
            }
            Err(_) => match Pending::begin(&self.0, &key) {
                Ok(pending) => State::Writing(Box::new(pending)),
                Err(error) => State::Failed(error),
            },
        };
        Cached {
            dir: self.0,
            key,
            state: RefCell::new(state),
        }
    }
}

/// The quantised matrices of one base, read from a file or written to one.
pub struct Cached {
    dir: CacheDir,
    key: String,
    state: RefCell<State>,
}

enum State {
    Found(QuantStore),
    Writing(Box<Pending>),
    Failed(io::Error),
}

impl Cached {
    /// A matrix that is kept.
    pub(super) fn get(&self, name: &str, shape: [usize; 2], scheme: Scheme) -> Option<QuantMatrix> {
        match &*self.state.borrow() {
            State::Found(store) => store.get(name, shape, scheme),
            _ => None,
        }
    }

    /// Keeps a matrix. Where that fails, so does all that follows, and [`Cached::finish`] says why.
    pub(super) fn put(&self, name: &str, matrix: &QuantMatrix) {
        let state = &mut *self.state.borrow_mut();
        if let State::Writing(pending) = state
            && let Err(error) = pending.writer.push(name, matrix)
        {
            *state = State::Failed(error);
        }
    }

    /// Whether the matrices were there.
    pub fn is_found(&self) -> bool {
        matches!(&*self.state.borrow(), State::Found(_))
    }

    /// Puts what was written in its place; returns why nothing is kept, if nothing is.
    pub fn finish(self) -> Option<String> {
        let error = match self.state.into_inner() {
            State::Found(_) => return None,
            State::Writing(pending) => pending.finish(&self.dir, &self.key).err()?,
            State::Failed(error) => error,
        };
        Some(format!("{}: {error}", self.dir.dir().display()))
    }
}

/// A file that is being written; nothing is left of it unless it is finished.
struct Pending {
    writer: StoreWriter<BufWriter<File>>,
    partial: Partial,
}

impl Pending {
    fn begin(dir: &CacheDir, key: &str) -> io::Result<Self> {
        let partial = dir.partial(key, "")?;
        let file = BufWriter::with_capacity(1 << 20, File::create(partial.path())?);
        Ok(Self {
            writer: StoreWriter::new(file, key)?,
            partial,
        })
    }

    fn finish(self, dir: &CacheDir, key: &str) -> io::Result<()> {
        let file = self.writer.finish()?;
        file.get_ref().sync_all()?;
        let target = dir.path(key);
        fs::rename(self.partial.path(), &target)?;
        dir.shrink(&target);
        Ok(())
    }
}
