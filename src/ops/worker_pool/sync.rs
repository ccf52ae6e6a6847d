//! What [`regions`](super::regions) synchronizes with. The model checker compiles that file with loom's
//! types in place of these.

use std::hint::spin_loop;

pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
pub(crate) use std::sync::{Mutex, PoisonError};

/// Turns of waiting in which a core is kept; after them it is offered to other threads at each turn.
const SPINS: usize = 2000;

/// Waits a moment for another thread; `turn` counts from 0.
pub(crate) fn spin_wait(turn: usize) {
    if turn < SPINS {
        spin_loop();
    } else {
        // The other thread may not be running: threads can be more than cores.
        std::thread::yield_now();
    }
}

/// A value whose reads the model checker tracks, up to its drop.
pub(crate) struct Tracked<T>(T);

impl<T> Tracked<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(value)
    }

    pub(crate) fn get(&self) -> &T {
        &self.0
    }
}
