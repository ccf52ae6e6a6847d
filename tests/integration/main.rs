//! The integration tests: the public API against golden files and hostile input.

mod adapter_kinds;
mod adapters;
mod allocations;
mod binary;
mod chat;
mod cli;
mod comparisons;
mod corpus;
mod data;
mod export;
mod export_adapters;
mod families;
mod generate;
mod hot_swap;
mod model;
mod objectives;
mod pretrain;
mod pretrain_cli;
mod rl;
mod rl_cli;
mod rooms;
mod support;
mod text;
mod train;
mod train_tokenizer;
mod weights;
