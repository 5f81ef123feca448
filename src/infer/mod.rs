//! The model writes text, with a KV cache.
