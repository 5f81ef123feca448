//! Placeholder of export/write.
