//! Placeholder of export/merged.
