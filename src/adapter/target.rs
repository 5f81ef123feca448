//! Placeholder of adapter/target.
