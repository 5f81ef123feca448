//! Placeholder of data/mask.
