//! Room `weights`.
