//! The training loop.

use std::path::Path;
use std::time::Instant;

use super::event::Event;
use super::optimizer::AdamW;
use super::out_of_memory::{OutOfMemory, caught};
use super::recompute::Retain;
use super::run_dir::Metrics;
use super::run_state::{self, Best, Progress};
use super::schedule::Schedule;
use super::step::StepGradients;
use super::{memory, step};
use crate::data::feed::{self, Feed};
use crate::data::tokenize::ChatTokenizer;
use crate::data::{DataError, SampleId, Split};
use crate::export::write::WriteError;
use crate::infer::{self, Sampling};
use crate::model::CausalLm;
use crate::recipe::Plan;

/// Everything one run works with.
pub struct Trainer<'a> {
    /// How to train, and what to write meanwhile.
    pub plan: &'a Plan,
    /// The model, with its trainable tensors marked.
    pub model: CausalLm,
    /// Moves the weights.
    pub optimizer: AdamW,
    /// Where the run stands.
    pub progress: Progress,
    /// Gives training samples.
    pub feed: Feed<'a>,
    /// Validation samples.
    pub validation: &'a Split,
    /// Steps of the whole run.
    pub total_steps: usize,
    /// For samples of text.
    pub tokenizer: &'a ChatTokenizer,
    /// The name of the device.
    pub device: String,
    /// Bytes that the run was planned to need, where it was.
    pub planned: Option<u64>,
    /// Where run states go.
    pub states: &'a Path,
    /// Where events are recorded.
    pub metrics: Metrics,
    /// Whether somebody asked the run to stop.
    pub interrupted: &'a dyn Fn() -> bool,
    /// Told of each event.
    pub report: &'a mut dyn FnMut(&Event),
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done, or it stopped early.
    Complete,
    /// It was asked to stop, and saved its state.
    Interrupted,
}

/// What is left of a run whose last step was saved.
const SAVED: &str = "the run is saved up to there";
/// What is left of one whose last step was not.
const EARLIER: &str = "the last run state is kept";

/// Why a run broke off.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The loss or the gradients are not numbers any more.
    #[error(
        "step {step}: the {what} is {value}, so training cannot go on; rows in this step: {rows}; the last run state is kept: lower train.learning_rate, raise train.warmup_steps, or look at these rows"
    )]
    NotFinite {
        /// Steps done before it.
        step: usize,
        /// Loss or gradient norm.
        what: &'static str,
        /// NaN or infinite.
        value: f64,
        /// Where the samples of the step came from.
        rows: String,
    },
    /// A state or the metrics could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Streamed rows could not be read or trained on.
    #[error(
        "after step {step}: {error}\nthe run is saved up to there; mend it and go on with --resume (data.on_bad_row and data.waive may be changed)"
    )]
    Data {
        /// Steps done before it.
        step: usize,
        /// What is wrong.
        error: DataError,
    },
    /// The device has no more memory.
    #[error(
        "step {step}: the device ran out of memory: {cause}{}; {kept}; go on with less by --resume (train.gradient_checkpointing: block, train.offload_activations and a smaller train.micro_batch_size change no numbers), or see what `lorafit plan` offers",
        against_plan(*planned, *in_use)
    )]
    OutOfMemory {
        /// Steps done before it.
        step: usize,
        /// What the allocator said.
        cause: String,
        /// Bytes that were planned.
        planned: Option<u64>,
        /// Bytes that were in use before the step.
        in_use: Option<u64>,
        /// What is left of the run.
        kept: &'static str,
    },
    /// A sample of text could not be made.
    #[error("cannot write a sample: {0}")]
    Sample(#[from] crate::data::tokenize::TokenizerError),
}

/// What was planned and what was there, in words.
fn against_plan(planned: Option<u64>, in_use: Option<u64>) -> String {
    let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
    let planned = planned.map(|bytes| format!("{} were planned at the peak", mib(bytes)));
    let in_use = in_use.map(|bytes| format!("{} were in use before the step", mib(bytes)));
    let parts: Vec<String> = [planned, in_use].into_iter().flatten().collect();
    match parts.is_empty() {
        true => String::new(),
        false => format!(" ({})", parts.join(", ")),
    }
}

impl Trainer<'_> {
    /// Trains until the end of the plan, an early stop or an interruption.
    ///
    /// # Errors
    /// The loss is not finite, or the disk fails.
    pub fn run(&mut self) -> Result<Outcome, TrainError> {
        let total_steps = self.total_steps;
        let schedule = Schedule::new(&self.plan.train, total_steps);
        self.prune()?; // a kill may have come between saving and this
        self.start()?;
        let mut saved = self.progress.clone();
        loop {
            let last = self.progress.step >= total_steps || self.progress.stopped_early;
            if self.evaluation_due(last) && !self.evaluate()? {
                return self.interrupt(&mut saved);
            }
            let last = last || self.stop_early()?;
            // A state saved before this step's evaluation is saved again with its outcome.
            if last || self.save_due() || saved.step == self.progress.step {
                self.save(&mut saved)?;
            }
            if last {
                return Ok(Outcome::Complete);
            }
            if (self.interrupted)() {
                return self.interrupt(&mut saved);
            }
            match self.step(&schedule) {
                Ok(true) => {}
                Ok(false) => return self.interrupt(&mut saved),
                Err(error) => {
                    // The steps before it are not to blame for a row that is read too late.
                    if matches!(error, TrainError::Data { .. }) {
                        self.save(&mut saved)?;
                    }
                    if matches!(error, TrainError::OutOfMemory { kept: SAVED, .. }) {
                        return Err(self.rescue(error, &mut saved));
                    }
                    return Err(error);
                }
            }
        }
    }

    /// One optimizer step; `false` when interrupted before it was complete.
    fn step(&mut self, schedule: &Schedule) -> Result<bool, TrainError> {
        let begin = Instant::now();
        let number = self.progress.step;
        let data = self.feed.step(number);
        let data = data.map_err(|error| TrainError::Data {
            step: number,
            error,
        })?;
        self.report_skipped()?;
        let dropout = step::DropoutSeed {
            seed: self.plan.train.seed,
            step: number,
        };
        let longest = data.batches.iter().map(|batch| batch.input_ids.len()).max();
        let retain = Retain::choose(
            &self.plan.train,
            self.model.config(),
            longest.unwrap_or(0),
            self.model.device(),
        );
        let scale = self.progress.loss_scale.map(|scaling| scaling.scale);
        let in_use = memory::in_use(self.model.device());
        let found = caught(|| {
            let (model, batches) = (&mut self.model, &data.batches);
            let how = (retain, scale.unwrap_or(1.0));
            step::scaled_gradients(model, batches, Some(dropout), how, self.interrupted)
        });
        // Nothing of the model has changed yet, so that the last step can be saved.
        let found = found.map_err(|out| self.out_of_memory(out, in_use, SAVED))?;
        let Some(mut result) = found else {
            return Ok(false);
        };
        if self.overflows(&mut result) {
            return self.skip(&data.rows);
        }
        self.finite("loss", result.loss, &data.rows)?;
        let grad_norm = step::clip(&mut result.gradients, self.plan.train.max_grad_norm);
        self.finite("gradient norm", grad_norm, &data.rows)?;
        let learning_rate = schedule.learning_rate(number);
        let moved = caught(|| {
            let (model, optimizer) = (&mut self.model, &mut self.optimizer);
            optimizer.step(model, result.gradients, learning_rate);
        });
        moved.map_err(|out| self.out_of_memory(out, in_use, EARLIER))?;
        self.progress.step += 1;
        self.progress.loss = Some(result.loss);
        self.progress.cursor = self.feed.cursor();
        let seconds = begin.elapsed().as_secs_f64();
        let lengths = data.batches.iter().flat_map(|batch| &batch.lengths);
        let tokens: usize = lengths.sum();
        let slots: usize = data.batches.iter().map(|b| b.input_ids.len()).sum();
        self.emit(Event::Step {
            step: self.progress.step,
            epoch: self.feed.epoch(self.progress.step),
            loss: result.loss,
            learning_rate,
            grad_norm,
            loss_scale: scale,
            tokens,
            trained_tokens: result.label_tokens,
            padding: 1.0 - tokens as f64 / slots.max(1) as f64,
            tokens_per_second: tokens as f64 / seconds,
            memory_bytes: memory::in_use(self.model.device()),
            memory_peak_bytes: memory::peak(self.model.device()),
            seconds,
        })?;
        Ok(true)
    }

    /// Takes the scale off the gradients, where there is one; whether one of them is not finite.
    fn overflows(&mut self, result: &mut StepGradients) -> bool {
        let Some(scaling) = &mut self.progress.loss_scale else {
            return false;
        };
        let finite = step::unscale(&mut result.gradients, scaling.scale);
        scaling.update(finite);
        !finite
    }

    /// Goes on without this step.
    fn skip(&mut self, rows: &[SampleId]) -> Result<bool, TrainError> {
        let scaling = self.progress.loss_scale.unwrap_or_default();
        if scaling.is_exhausted() {
            self.finite("gradient, whatever the loss scale,", f64::NAN, rows)?;
        }
        self.progress.step += 1;
        self.progress.cursor = self.feed.cursor();
        self.emit(Event::Overflow {
            step: self.progress.step,
            loss_scale: scaling.scale,
            skipped: scaling.skipped,
        })?;
        Ok(true)
    }

    /// Measures the validation split and writes samples; `false` when interrupted.
    ///
    /// All of it counts or nothing: what was interrupted is done anew by the run that continues.
    fn evaluate(&mut self) -> Result<bool, TrainError> {
        let step = self.progress.step;
        let mut progress = self.progress.clone();
        let mut events = Vec::new();
        if !self.validation.is_empty() {
            let Some(loss) = self.validation_loss()? else {
                return Ok(false);
            };
            let best = progress.best.is_none_or(|best| loss < best.loss);
            if best {
                progress.best = Some(Best { step, loss });
                progress.evaluations_without_improvement = 0;
            } else {
                progress.evaluations_without_improvement += 1;
            }
            events.push(Event::Eval { step, loss, best });
        }
        let Some(samples) = self.samples()? else {
            return Ok(false);
        };
        events.extend(samples);
        progress.evaluated = Some(step);
        self.progress = progress;
        events.into_iter().try_for_each(|event| self.emit(event))?;
        Ok(true)
    }

    /// Mean token loss of the validation split; `None` when interrupted.
    fn validation_loss(&self) -> Result<Option<f64>, TrainError> {
        let vocab_size = self.model.config().vocab_size;
        let batches = feed::once(self.plan, self.validation, self.tokenizer, vocab_size);
        let Some((loss, _)) = step::evaluate(&self.model, batches, self.interrupted) else {
            return Ok(None);
        };
        if loss.is_finite() {
            return Ok(Some(loss));
        }
        Err(TrainError::NotFinite {
            step: self.progress.step,
            what: "validation loss",
            value: loss,
            rows: "the validation rows".to_string(),
        })
    }

    /// Whether the evaluations have stopped improving.
    fn stop_early(&mut self) -> Result<bool, TrainError> {
        let (Some(patience), Some(best)) =
            (self.plan.train.early_stopping_patience, self.progress.best)
        else {
            return Ok(false);
        };
        let stop = self.progress.evaluations_without_improvement >= patience.max(1);
        if stop && !self.progress.stopped_early {
            self.progress.stopped_early = true;
            self.emit(Event::EarlyStop {
                step: self.progress.step,
                best_step: best.step,
            })?;
        }
        Ok(stop)
    }

    /// Generates an answer to each fixed prompt; `None` when interrupted.
    fn samples(&self) -> Result<Option<Vec<Event>>, TrainError> {
        let model = self.model.frozen();
        let sampling = Sampling {
            max_new_tokens: self.plan.sample.max_new_tokens,
            temperature: self.plan.sample.temperature,
            top_p: self.plan.sample.top_p,
            seed: self.plan.train.seed,
        };
        let mut samples = Vec::new();
        for prompt in &self.plan.sample.prompts {
            let ids = infer::prompt_ids(self.tokenizer, None, prompt)?;
            let stop = self.tokenizer.stop_ids();
            let go_on = &mut |_| !(self.interrupted)();
            let answer = infer::generate(&model, &ids, stop, sampling, go_on);
            if (self.interrupted)() {
                return Ok(None);
            }
            samples.push(Event::Sample {
                step: self.progress.step,
                prompt: prompt.clone(),
                text: self.tokenizer.decode(&answer, true)?,
            });
        }
        Ok(Some(samples))
    }

    /// Saves where the run stands, unless that is saved or the beginning, which the recipe
    /// describes.
    fn save(&mut self, saved: &mut Progress) -> Result<(), TrainError> {
        if self.progress.step == 0 || self.progress == *saved {
            return Ok(());
        }
        self.metrics.sync()?;
        let path = run_state::save(
            self.states,
            &self.progress,
            &mut self.model,
            &self.optimizer,
        )?;
        self.prune()?;
        *saved = self.progress.clone();
        self.emit(Event::Saved {
            step: self.progress.step,
            path,
        })
    }

    /// Deletes the run states that the plan does not keep.
    fn prune(&self) -> Result<(), WriteError> {
        let keep = self.plan.train.save_total_limit;
        run_state::prune(self.states, keep, self.progress.best)
    }

    /// Saves, so that `--resume` goes on from the last complete step.
    fn interrupt(&mut self, saved: &mut Progress) -> Result<Outcome, TrainError> {
        self.save(saved)?;
        self.emit(Event::Interrupted {
            step: self.progress.step,
        })?;
        Ok(Outcome::Interrupted)
    }

    /// Before the first step, after every `eval_steps`, and at the end; once each.
    fn evaluation_due(&self, last: bool) -> bool {
        let step = self.progress.step;
        self.progress.evaluated != Some(step)
            && (last || step == 0 || every(self.plan.train.eval_steps, step))
    }

    /// After every `save_steps`, and when the validation loss is the lowest so far.
    fn save_due(&self) -> bool {
        let step = self.progress.step;
        every(self.plan.train.save_steps, step)
            || self.progress.best.is_some_and(|best| best.step == step)
    }

    /// Tells of rows that a stream left out on the way.
    fn report_skipped(&mut self) -> Result<(), TrainError> {
        let skipped = self.feed.take_skipped();
        if skipped.count == 0 {
            return Ok(());
        }
        self.emit(Event::Skipped {
            step: self.progress.step,
            rows: skipped.count,
            shown: skipped.shown.iter().map(ToString::to_string).collect(),
        })
    }

    fn start(&mut self) -> Result<(), TrainError> {
        let (mut trainable, mut all) = (0, self.model.quantised_parameters());
        self.model.visit(&mut |_, parameter| {
            let n: usize = parameter.shape().iter().product();
            all += n;
            if parameter.is_trainable() {
                trainable += n;
            }
        });
        self.emit(Event::Start {
            step: self.progress.step,
            total_steps: self.total_steps,
            steps_per_epoch: self.feed.steps_per_epoch().unwrap_or(0),
            trainable_parameters: trainable,
            parameters: all,
            device: self.device.clone(),
        })
    }

    fn out_of_memory(
        &self,
        OutOfMemory(cause): OutOfMemory,
        in_use: Option<u64>,
        kept: &'static str,
    ) -> TrainError {
        TrainError::OutOfMemory {
            step: self.progress.step,
            cause,
            planned: self.planned,
            in_use,
            kept,
        }
    }

    /// Saves the last complete step where the device still lets its values be read.
    fn rescue(&mut self, mut error: TrainError, saved: &mut Progress) -> TrainError {
        let done = caught(|| self.save(saved));
        if let TrainError::OutOfMemory { kept, .. } = &mut error
            && !matches!(done, Ok(Ok(())))
        {
            *kept = EARLIER;
        }
        error
    }

    fn finite(&self, what: &'static str, value: f64, rows: &[SampleId]) -> Result<(), TrainError> {
        if value.is_finite() {
            return Ok(());
        }
        let rows: Vec<String> = rows.iter().map(ToString::to_string).collect();
        Err(TrainError::NotFinite {
            step: self.progress.step,
            what,
            value,
            rows: rows.join(", "),
        })
    }

    fn emit(&mut self, event: Event) -> Result<(), TrainError> {
        self.metrics.write(&event)?;
        (self.report)(&event);
        Ok(())
    }
}

fn every(steps: usize, step: usize) -> bool {
    steps > 0 && step > 0 && step.is_multiple_of(steps)
}
