//! Batches become losses, gradients, optimizer steps and run states.
