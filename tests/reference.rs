//! A reference set of Hugging Face's numbers: where it is, how its files are read, how far off a
//! number may be, and what is printed of each case.
//!
//! The set is `tests/golden`, or the folder named by `LORAFIT_REFERENCE`, made by the same script
//! with any seeds, shapes and options. Cases are discovered by listing its folders, a folder or a safetensors file each. Each prints one
//! line: passed, failed with the figure, or not supported yet with the reason.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use lorafit::data::batch::Batch;
use lorafit::device::to_vec;
use lorafit::model::config::ConfigError;
use lorafit::model::weights::Weights;
use lorafit::model::{CausalLm, Keep};
use safetensors::SafeTensors;

/// Tolerances of the reference's README, on `|got - want| / max(1, max|want|)`, all in f32.
pub mod tolerance {
    /// Logits and hidden states: another order of sums changes transformers' own by 1.3e-6.
    pub const LOGITS: f64 = 2e-5;
    /// One loss.
    pub const LOSS: f64 = 1e-5;
    /// Gradients and their norms at the first step.
    pub const GRADIENT: f64 = 2e-5;
    /// Losses and norms over a whole run, in which rounding accumulates.
    pub const TRAINING: f64 = 5e-5;
    /// Weights after training: Adam divides small gradients by their own size.
    pub const ADAPTER: f64 = 2e-4;
    /// Logits after training, and of the merged model.
    pub const TRAINED_LOGITS: f64 = 1e-4;
    /// Learning rates are computed in f64 on both sides.
    pub const LEARNING_RATE: f64 = 1e-12;
}

/// What became of a case.
pub enum Verdict {
    Passed(String),
    NotYet(String),
    Failed(String),
}

pub type Case = Result<String, Verdict>;

pub fn not_yet(reason: impl ToString) -> Verdict {
    Verdict::NotYet(reason.to_string())
}

pub fn failed(reason: impl ToString) -> Verdict {
    Verdict::Failed(reason.to_string())
}

/// The project's own set, for tests that name a case.
pub fn own() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The sets that models and adapters are compared with: the one named by the environment, else the
/// project's own and a second one with other shapes and options.
pub fn sets() -> Vec<PathBuf> {
    match std::env::var_os("LORAFIT_REFERENCE") {
        Some(set) => vec![set.into()],
        None => vec![own(), own().with_file_name("golden_other")],
    }
}

/// The set that goldens run on: the one named by the environment, else the project's own.
pub fn reference() -> PathBuf {
    std::env::var_os("LORAFIT_REFERENCE").map_or_else(own, PathBuf::from)
}

/// A file of the set. Another set may leave out whole sections, which a line says then.
pub fn part(name: &str) -> Option<PathBuf> {
    let path = reference().join(name);
    if path.exists() || reference() == own() {
        return Some(path);
    }
    let _ = writeln!(std::io::stderr(), "golden {name}: not in this set");
    None
}

/// Rows of `tokens` tokens, each one segment.
pub fn unpacked(input_ids: Vec<i32>, labels: Vec<i32>, tokens: usize) -> Batch {
    let batch = input_ids.len() / tokens;
    Batch {
        batch,
        tokens,
        input_ids,
        labels,
        position_ids: (0..batch).flat_map(|_| 0..tokens).collect(),
        segment_starts: (0..=batch).map(|row| row * tokens).collect(),
        lengths: vec![tokens; batch],
    }
}

/// Runs every case of a folder, prints a line each, and fails if one failed or none passed; returns
/// the names of those that passed.
pub fn run_all(folder: &Path, run: impl Fn(&Path) -> Case) -> Vec<String> {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.is_dir() || path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    cases.sort();
    let (mut passed, mut failures) = (Vec::new(), Vec::new());
    // Not `println!`, which the test runner swallows when a test passes.
    let mut out = std::io::stderr().lock();
    for case in cases {
        let kind = folder.file_name().expect("a name").to_string_lossy();
        let own_name = case.file_name().expect("a name").to_string_lossy();
        let name = format!("{kind}/{own_name}");
        let verdict = run(&case).map_or_else(|verdict| verdict, Verdict::Passed);
        let line = match verdict {
            Verdict::Passed(figures) => {
                passed.push(own_name.to_string());
                format!("golden {name}: passed ({figures})")
            }
            Verdict::NotYet(reason) => {
                let reason = reason.lines().next().unwrap_or_default().to_string();
                format!("golden {name}: not supported yet: {reason}")
            }
            Verdict::Failed(figures) => {
                failures.push(name.clone());
                format!("golden {name}: FAILED: {figures}")
            }
        };
        writeln!(out, "{line}").expect("stderr");
    }
    assert!(failures.is_empty(), "failed: {failures:?}");
    assert!(
        !passed.is_empty(),
        "no case of {} is supported",
        folder.display()
    );
    passed
}

/// The tensors of a safetensors file, as f64.
pub struct Tensors {
    bytes: Vec<u8>,
}

impl Tensors {
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { bytes }
    }

    pub fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("a safetensors file")
    }

    pub fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.file().tensor(name).expect(name).shape().to_vec()
    }

    pub fn floats(&self, name: &str) -> Vec<f64> {
        let file = self.file();
        let view = file.tensor(name).expect(name);
        let data = view.data();
        match view.dtype() {
            safetensors::Dtype::F32 => data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect(),
            safetensors::Dtype::F64 => (data
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b)))
            .collect(),
            dtype => panic!("{name}: {dtype:?}"),
        }
    }

    pub fn ints(&self, name: &str) -> Vec<i32> {
        let file = self.file();
        let view = file.tensor(name).expect(name);
        let words = view.data().as_chunks::<8>().0.iter();
        words.map(|b| i64::from_le_bytes(*b) as i32).collect()
    }
}

/// `max|got - want| / max(1, max|want|)`
pub fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1f64, |m, x| m.max(x.abs()));
    let worst = (got.iter().zip(want)).fold(0f64, |m, (g, w)| {
        let off = (f64::from(*g) - w).abs();
        if off > m || off.is_nan() { off } else { m }
    });
    worst / scale
}

/// The largest distance of each kind of number, and whether all are within their tolerance.
#[derive(Default)]
pub struct Figures {
    worst: BTreeMap<&'static str, f64>,
    faults: Vec<String>,
}

impl Figures {
    pub fn check(&mut self, kind: &'static str, name: &str, off: f64, tolerance: f64) {
        let worst = self.worst.entry(kind).or_insert(0.0);
        *worst = worst.max(off);
        if off > tolerance || off.is_nan() {
            self.faults
                .push(format!("{name} off by {off:.2e}, allowed {tolerance:.0e}"));
        }
    }

    pub fn verdict(self) -> Case {
        let figures: Vec<String> = (self.worst.iter())
            .map(|(kind, off)| format!("{kind} {off:.1e}"))
            .collect();
        if self.faults.is_empty() {
            Ok(figures.join(", "))
        } else {
            Err(failed(self.faults.join("; ")))
        }
    }
}

pub fn flat(tensor: Tensor<2>) -> Vec<f32> {
    let n = tensor.shape().num_elements();
    to_vec(tensor.reshape([n]))
}

/// The model in a directory; a family or feature that is not there yet is no failure.
pub fn load(dir: &Path) -> Result<CausalLm, Verdict> {
    load_as(dir, Keep::default())
}

/// The same with its matrices kept in some way.
pub fn load_as(dir: &Path, keep: Keep) -> Result<CausalLm, Verdict> {
    let weights = Weights::open(dir).map_err(failed)?;
    let config = weights.config().map_err(|error| match error {
        ConfigError::Architecture { .. } | ConfigError::Unsupported { .. } => not_yet(error),
        _ => failed(error),
    })?;
    CausalLm::load_as(&weights, config, &Device::flex(), keep).map_err(failed)
}

/// A tensor of the test's own device, so that a broken comparison cannot pass unseen.
#[test]
fn the_comparison_sees_a_difference() {
    assert!(distance(&[1.0, 2.0], &[1.0, 2.5]) > 0.1);
    assert!(distance(&[f32::NAN], &[1.0]).is_nan());
    let tensor = Tensor::<2>::from_data(TensorData::new(vec![1f32, 2.0], [1, 2]), &Device::flex());
    assert_eq!(flat(tensor), [1.0, 2.0]);
    assert!(
        !Tensors {
            bytes: vec![2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']
        }
        .has("x")
    );
}
