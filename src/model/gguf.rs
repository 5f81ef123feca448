//! Placeholder of model/gguf.
