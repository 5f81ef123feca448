//! Placeholder of data/template.
