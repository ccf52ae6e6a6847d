//! The integration tests: the public API against golden files and hostile input.

mod adapters;
mod generate;
mod model;
mod rooms;
mod support;
mod train;
mod weights;
