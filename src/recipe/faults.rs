//! Placeholder of recipe/faults.
