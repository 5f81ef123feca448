//! How much memory a run needs, in which phase and for what, before anything of it is allocated.
//!
//! [`plan::MemoryPlan`] is computed from the resolved recipe, the model's configuration and the headers
//! of its files: no weight is read. The model's base and adapters are counted tensor by tensor
//! ([`kept`](crate::model::kept), [`outline`](crate::adapter::outline)); what lies between the forward
//! and the backward pass is found by running each block on a tape of sizes, which follows burn's
//! rules for what stays alive, with what each kernel keeps from the table in `kernels`.
//! [`room`] says what a device has, [`advice`] which knobs buy how much.
//!
//! Not counted: what other programs take, and on a GPU what its driver takes.

pub mod advice;
mod block;
pub mod bytes;
mod ends;
mod kernels;
mod layers;
pub mod plan;
pub mod room;
mod step;
mod tape;
mod tape_run;

pub use block::Rows;
pub use bytes::{Bytes, Kind};
pub use kernels::Platform;
pub use plan::{Base, MemoryPlan, Phase, Planner};
