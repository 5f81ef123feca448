//! Placeholder of adapter/peft.
