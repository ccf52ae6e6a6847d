//! The integration tests: the public API against golden files and hostile input.

mod adapters;
mod model;
mod rooms;
mod support;
mod train;
mod weights;
