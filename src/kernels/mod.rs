//! The tensor operations that matter.
