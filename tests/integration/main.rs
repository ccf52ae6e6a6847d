//! The integration tests: the public API against golden files and hostile input.

mod data;
mod model;
mod rooms;
mod support;
