//! Placeholder of recipe/schema.
