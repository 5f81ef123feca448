//! Placeholder of recipe/load.
