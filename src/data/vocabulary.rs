//! Placeholder of data/vocabulary.
