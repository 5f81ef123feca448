//! Placeholder of adapter/merge.
