//! The loop.

pub mod step;
