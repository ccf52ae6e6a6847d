//! Room `optim`.
