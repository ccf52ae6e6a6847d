//! The integration tests: the public API against golden files and hostile input.

mod model;
mod rooms;
mod support;
mod text;
