//! One integration binary, so that burn links once.

mod bad_input;
mod chat_templates;
mod cli;
mod data;
mod data_cache;
mod data_commands;
mod data_order;
mod data_rules;
mod export;
mod fixture;
mod gguf;
mod gguf_families;
mod golden_lora;
mod golden_models;
mod golden_packing;
#[cfg(feature = "webgpu")]
mod gpu;
mod half_precision;
mod hub;
mod hub_dataset;
mod hub_server;
mod memory_measured;
mod memory_outline;
mod memory_plan;
mod memory_table;
mod merge;
mod methods;
mod packing;
mod peft;
mod quant;
mod quantised;
#[path = "../benches/random_model/mod.rs"]
mod random_model;
mod reader_fuzz;
mod readers;
mod recipe;
mod recipe_data;
mod recompute;
mod reference;
mod resume;
mod rows;
mod run_dir;
mod tokenizer;
mod train;
mod verify;
mod weights;
