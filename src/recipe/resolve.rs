//! Placeholder of recipe/resolve.
