//! Placeholder of export/peft.
