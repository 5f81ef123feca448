//! Placeholder of model/names.
