//! Placeholder of data/loader.
