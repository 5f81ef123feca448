//! Dataset rows become token ids with labels, then batches.
//!
//! [`source`] reads rows, [`conversation`] gives them one form, [`template`] renders them with the
//! model's chat template, [`tokenize`] turns text into ids, [`mask`] decides which ids train,
//! [`loader`] shuffles and pads. This module imports no burn.

pub mod conversation;
pub mod loader;
pub mod mask;
pub mod source;
pub mod template;
pub mod tokenize;
pub mod vocabulary;

/// The label of a token that does not train.
pub const IGNORE_INDEX: i32 = -100;
