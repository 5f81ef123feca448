//! Placeholder of model/weights.
