//! Placeholder of quant/blocks.
