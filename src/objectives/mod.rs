//! Room `objectives`.
