//! Placeholder of data/source.
