//! A YAML recipe becomes a [`Plan`]: every knob declared once, checked once, resolved once.
//!
//! [`schema`] declares the knobs, [`load`] reads YAML and `--set` overrides, [`resolve`] turns them
//! into a [`Plan`], [`faults`] reports everything that is wrong at once. This module imports no burn,
//! and serde_yaml stays inside it.

mod check;
mod conflict;
mod document;
pub mod edit;
pub mod faults;
mod given;
mod knob_words;
mod knobs;
pub mod load;
pub mod named_templates;
pub mod plan;
mod plan_adapter;
pub mod resolve;
pub mod schema;
pub mod source;
pub(crate) mod suggest;
mod tree;

pub use plan::*;
pub(crate) use suggest::nearest;
pub(crate) use tree::yaml_to_json;
