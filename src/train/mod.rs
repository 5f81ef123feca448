//! Batches become losses, gradients, optimizer steps and run states.
//!
//! [`trainer`] holds the loop. One turn of it: [`step`] computes gradients over the micro-batches, each
//! by way of [`recompute`], [`loss_scale`] keeps f16 from overflowing, [`schedule`] gives the learning
//! rate, [`optimizer`] moves the weights, [`moments`] holds what it remembers of each, [`run_state`] saves
//! all that is needed to go on. [`run_dir`] lays out what a run leaves behind; [`event`] is what it reports
//! meanwhile.

pub mod choice;
pub mod event;
pub mod finish;
pub mod heap;
mod load;
pub mod loss_scale;
pub mod memory;
pub mod moments;
pub mod moments_8bit;
pub mod optimizer;
pub mod out_of_memory;
pub mod prepare;
pub mod recompute;
pub mod run_dir;
pub mod run_state;
pub mod schedule;
pub mod step;
pub mod trainer;

pub use event::Event;
