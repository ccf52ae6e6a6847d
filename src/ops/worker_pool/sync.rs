//! The synchronization primitives of [`regions`](super::regions). The model checker compiles that file with
//! loom's types in place of these.

use std::hint::spin_loop;

pub use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
pub use std::sync::{Mutex, PoisonError};

/// Spins before the thread begins to yield its core to other threads.
const SPINS: usize = 2000;

/// Waits a moment for another thread; `turn` counts from 0.
pub fn spin_wait(turn: usize) {
    if turn < SPINS {
        spin_loop();
    } else {
        // The other thread may not be running: there can be more threads than cores.
        std::thread::yield_now();
    }
}

/// A value whose reads the model checker tracks, up to its drop.
pub struct Tracked<T>(T);

impl<T> Tracked<T> {
    pub fn new(value: T) -> Self {
        Self(value)
    }

    pub fn get(&self) -> &T {
        &self.0
    }
}
