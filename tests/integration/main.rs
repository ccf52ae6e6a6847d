//! The integration tests: the public API against golden files and hostile input.

mod adapters;
mod allocations;
mod cli;
mod data;
mod generate;
mod model;
mod rooms;
mod support;
mod text;
mod train;
mod weights;
