//! Everything a run needs to go on as if it had never stopped.
//!
//! `step-N/state.json` holds the counters, `weights.safetensors` what trains,
//! `optimizer.safetensors` the moments; all in f32, bit for bit. The order of the data and every
//! random number are functions of the seed and the step, so no generator state is needed; streamed
//! data have a cursor.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::event::Event;
use super::loss_scale::LossScale;
use super::moments::Moments;
use super::moments_8bit::{BLOCK, Moment8, Moments8};
use super::optimizer::AdamW;
use crate::data::stream::Cursor;
use crate::device::to_vec;
use crate::export::safetensors::{SafetensorsWriter, TensorInfo, f32_bytes};
use crate::export::write::{PartialDir, WriteError, atomic_bytes};
use crate::model::CausalLm;
use crate::model::weights::{Weights, WeightsError};

/// The counters of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// The last step after which the validation split was measured.
    pub evaluated: Option<usize>,
    /// The lowest validation loss so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub evaluations_without_improvement: usize,
    /// Loss of the last step.
    pub loss: Option<f64>,
    /// Whether the run ended early for want of improvement.
    pub stopped_early: bool,
    /// Identifies the samples and the base model.
    pub inputs: String,
    /// Where streamed data stand; the step says it all where they are not streamed.
    #[serde(default)]
    pub cursor: Option<Cursor>,
    /// What losses are multiplied by; `None` where they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

impl Progress {
    /// Before the first step, on the samples and the base of this fingerprint.
    pub fn new(inputs: String) -> Self {
        Self {
            step: 0,
            evaluated: None,
            best: None,
            evaluations_without_improvement: 0,
            loss: None,
            stopped_early: false,
            inputs,
            cursor: None,
            loss_scale: None,
        }
    }

    /// Steps in which weights moved: all but the skipped ones.
    pub fn steps_taken(&self) -> usize {
        self.step
            - self
                .loss_scale
                .map_or(0, |scale| scale.skipped.min(self.step))
    }

    /// Whether a run that stands here has behind it what was recorded; what comes later will
    /// happen again.
    pub fn includes(&self, event: &Event) -> bool {
        match event {
            Event::Done { .. } => false,
            Event::Eval { step, .. }
            | Event::Sample { step, .. }
            | Event::EarlyStop { step, .. }
                if *step == self.step =>
            {
                *step > 0 && self.evaluated == Some(*step)
            }
            // A run that stands at the beginning begins anew.
            event => self.step > 0 && event.step() <= self.step,
        }
    }
}

/// The lowest validation loss of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps done.
    pub step: usize,
    /// Mean token loss.
    pub loss: f64,
}

/// Why a run state cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file is missing or damaged.
    #[error(
        "cannot read run state {path}: {reason}; delete {path} to continue from an earlier one"
    )]
    Damaged {
        /// The state's directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Its tensors cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

const STATE: &str = "state.json";
const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const FIRST: &str = ".first";
const SECOND: &str = ".second";
/// Beside the codes of a moment in 8 bits, its scales.
const ABSMAX: &str = ".absmax";

/// The directory of the state after `step` steps.
pub fn path(states: &Path, step: usize) -> PathBuf {
    states.join(format!("step-{step:06}"))
}

/// The steps that have a state, in order.
pub fn list(states: &Path) -> Vec<usize> {
    let Ok(entries) = fs::read_dir(states) else {
        return Vec::new();
    };
    let mut steps: Vec<usize> = entries
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix("step-")?
                .parse()
                .ok()
        })
        .collect();
    steps.sort_unstable();
    steps
}

/// Saves a state; it appears complete or not at all.
///
/// # Errors
/// The disk is full or cannot be written; earlier states are untouched.
pub fn save(
    states: &Path,
    progress: &Progress,
    model: &mut CausalLm,
    optimizer: &AdamW,
) -> Result<PathBuf, WriteError> {
    let target = path(states, progress.step);
    let dir = PartialDir::create(&target)?;
    let mut weights = BTreeMap::new();
    model.visit_trainable(&mut |name, parameter| {
        let values = Values::Tensor(parameter.flat(), parameter.shape());
        weights.insert(name.to_string(), values);
    });
    write(&dir.path().join(WEIGHTS), &weights)?;
    let mut moments = BTreeMap::new();
    for (name, both) in &optimizer.moments {
        match both {
            Moments::Whole { first, second } => {
                for (suffix, moment) in [(FIRST, first), (SECOND, second)] {
                    let values = Values::Tensor(moment.clone(), moment.dims().to_vec());
                    moments.insert(format!("{name}{suffix}"), values);
                }
            }
            Moments::EightBit(Moments8 { first, second }) => {
                for (suffix, moment) in [(FIRST, first), (SECOND, second)] {
                    let key = format!("{name}{suffix}");
                    moments.insert(format!("{key}{ABSMAX}"), Values::Scales(&moment.absmax));
                    moments.insert(key, Values::Codes(&moment.codes));
                }
            }
        }
    }
    write(&dir.path().join(OPTIMIZER), &moments)?;
    let json = serde_json::to_vec_pretty(progress).unwrap_or_default();
    atomic_bytes(&dir.path().join(STATE), &json)?;
    dir.publish_replacing()?;
    Ok(target)
}

/// What is written under a name.
#[expect(
    clippy::large_enum_variant,
    reason = "a tensor is of that size wherever it is"
)]
enum Values<'a> {
    /// A tensor of f32, flat, and its shape.
    Tensor(Tensor<1>, Vec<usize>),
    /// Codes of a moment in 8 bits.
    Codes(&'a [u8]),
    /// Their scales.
    Scales(&'a [f32]),
}

/// Writes tensors one at a time.
fn write(path: &Path, tensors: &BTreeMap<String, Values>) -> Result<(), WriteError> {
    let info = |(name, values): (&String, &Values)| {
        let (dtype, shape) = match values {
            Values::Tensor(_, shape) => (Dtype::F32, shape.clone()),
            Values::Codes(codes) => (Dtype::U8, vec![codes.len()]),
            Values::Scales(scales) => (Dtype::F32, vec![scales.len()]),
        };
        TensorInfo {
            name: name.clone(),
            dtype,
            shape,
        }
    };
    let infos = tensors.iter().map(info).collect();
    let mut writer = SafetensorsWriter::create(path, &[("format", "pt")], infos)?;
    for name in writer
        .order()
        .iter()
        .map(|t| t.name.clone())
        .collect::<Vec<_>>()
    {
        match tensors.get(&name) {
            Some(Values::Tensor(tensor, _)) => {
                writer.write(&name, &f32_bytes(&to_vec(tensor.clone())))?;
            }
            Some(Values::Codes(codes)) => writer.write(&name, codes)?,
            Some(Values::Scales(scales)) => writer.write(&name, &f32_bytes(scales))?,
            None => {}
        }
    }
    writer.finish()?;
    Ok(())
}

/// Reads the counters of the state after `step` steps.
///
/// # Errors
/// It is missing or damaged.
pub fn progress(states: &Path, step: usize) -> Result<Progress, StateError> {
    let dir = path(states, step);
    let damaged = |reason: String| StateError::Damaged {
        path: dir.clone(),
        reason,
    };
    let text = fs::read_to_string(dir.join(STATE)).map_err(|e| damaged(e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))
}

/// Puts the weights of the state after `step` steps into a model that trains the same tensors.
///
/// # Errors
/// They are missing, damaged, or not those of this model.
pub fn load_weights(states: &Path, step: usize, model: &mut CausalLm) -> Result<(), StateError> {
    let dir = path(states, step);
    let weights = Weights::open(&dir.join(WEIGHTS))?;
    let device = model.device().clone();
    let mut fault = None;
    model.visit_trainable(&mut |name, mut parameter| {
        if fault.is_some() {
            return;
        }
        match read(&weights, name, &parameter.shape(), &device) {
            Ok(values) => parameter.set_flat(values),
            Err(reason) => fault = Some(reason),
        }
    });
    match fault {
        None => Ok(()),
        Some(reason) => Err(StateError::Damaged { path: dir, reason }),
    }
}

/// Puts the moments of a state into an optimizer.
///
/// # Errors
/// They are missing or damaged.
pub fn load_optimizer(
    states: &Path,
    progress: &Progress,
    optimizer: &mut AdamW,
    device: &Device,
) -> Result<(), StateError> {
    let dir = path(states, progress.step);
    let file = Weights::open(&dir.join(OPTIMIZER))?;
    let names: Vec<String> = file
        .names()
        .filter_map(|name| Some(name.strip_suffix(FIRST)?.to_string()))
        .collect();
    optimizer.steps = progress.steps_taken();
    optimizer.moments.clear();
    for name in names {
        let moments = moments(&file, &name, device).map_err(|reason| StateError::Damaged {
            path: dir.clone(),
            reason,
        })?;
        optimizer.moments.insert(name, moments);
    }
    Ok(())
}

fn moments(file: &Weights, name: &str, device: &Device) -> Result<Moments, String> {
    let [first, second] = [FIRST, SECOND].map(|suffix| format!("{name}{suffix}"));
    if file.shape(&format!("{first}{ABSMAX}")).is_some() {
        return Ok(Moments::EightBit(Moments8 {
            first: moment_8bit(file, &first)?,
            second: moment_8bit(file, &second)?,
        }));
    }
    let moment = |key: &str| {
        let shape = file.shape(key).unwrap_or(&[0]).to_vec();
        read(file, key, &shape, device)
    };
    Ok(Moments::Whole {
        first: moment(&first)?,
        second: moment(&second)?,
    })
}

fn moment_8bit(file: &Weights, key: &str) -> Result<Moment8, String> {
    let codes = file.raw(key).map_err(|error| error.to_string())?;
    let scales = format!("{key}{ABSMAX}");
    let absmax = file.read_f32(&scales).map_err(|error| error.to_string())?;
    let codes = codes.unwrap_or_default().to_vec();
    match absmax.len() == codes.len().div_ceil(BLOCK) {
        true => Ok(Moment8 { codes, absmax }),
        false => Err(format!(
            "{scales}: {} scales of {} codes, expected one for {BLOCK}",
            absmax.len(),
            codes.len()
        )),
    }
}

fn read(file: &Weights, name: &str, shape: &[usize], device: &Device) -> Result<Tensor<1>, String> {
    let found = file.shape(name).map(<[usize]>::to_vec);
    if found.as_deref() != Some(shape) {
        return Err(format!("{name}: expected shape {shape:?}, found {found:?}"));
    }
    let values = file.read_f32(name).map_err(|error| error.to_string())?;
    let n = values.len();
    Ok(Tensor::from_data(TensorData::new(values, [n]), device))
}

/// Deletes all states but the last `keep` and that of `best`.
///
/// # Errors
/// A state cannot be removed.
pub fn prune(states: &Path, keep: usize, best: Option<Best>) -> Result<(), WriteError> {
    let steps = list(states);
    let old = steps.len().saturating_sub(keep.max(1));
    for &step in &steps[..old] {
        if best.is_some_and(|best| best.step == step) {
            continue;
        }
        let dir = path(states, step);
        fs::remove_dir_all(&dir).map_err(|source| WriteError::io("remove", &dir, source))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_evaluation_after_the_state_was_saved_will_happen_again() {
        let mut progress = Progress::new(String::new());
        let eval = |step| Event::Eval {
            step,
            loss: 1.0,
            best: true,
        };
        assert!(!progress.includes(&eval(0)));
        progress.step = 4;
        progress.evaluated = Some(2);
        assert!(progress.includes(&eval(2)) && !progress.includes(&eval(4)));
        progress.evaluated = Some(4);
        assert!(progress.includes(&eval(4)) && !progress.includes(&eval(6)));
        assert!(progress.includes(&Event::Interrupted { step: 4 }));
    }
}
