//! The integration tests: the public API against golden files and hostile input.

mod adapters;
mod allocations;
mod binary;
mod cli;
mod comparisons;
mod data;
mod export;
mod export_adapters;
mod generate;
mod model;
mod objectives;
mod rl;
mod rl_cli;
mod rooms;
mod support;
mod text;
mod train;
mod weights;
