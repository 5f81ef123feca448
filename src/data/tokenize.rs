//! Placeholder of data/tokenize.
