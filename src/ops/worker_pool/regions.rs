//! The protocol of a worker pool: a leader opens parallel regions, and helpers that spin between them
//! share their tasks.
//!
//! A region ends when the helpers that have entered it have left; a late helper finds it closed.
//! `scripts/check/loom.sh` checks this file under every interleaving of small models.

use std::any::Any;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;

use super::sync::{
    AtomicBool, AtomicPtr, AtomicUsize, Mutex, Ordering, PoisonError, Tracked, spin_wait,
};

/// The regions of one leader, one after the other.
#[derive(Default)]
pub(crate) struct Regions {
    /// Counts openings and closings: odd while a region is open.
    epoch: CachePadded<AtomicUsize>,
    region: AtomicPtr<Region<'static>>,
    /// Helpers that may be in the region.
    inside: CachePadded<AtomicUsize>,
    /// Whether no more regions will open.
    closed: CachePadded<AtomicBool>,
}

/// A value on separate cache lines, to avoid false sharing.
#[derive(Default)]
#[repr(align(128))]
struct CachePadded<T>(T);

impl<T> Deref for CachePadded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// The tasks of one parallel region.
struct Region<'a> {
    next: CachePadded<AtomicUsize>,
    tasks: Tracked<usize>,
    run: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Regions {
    /// Called by the leader: runs tasks `0..tasks` in a new region. A panic of a task, on any
    /// thread, resumes here after the region has ended.
    pub(crate) fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let (next, panic) = (CachePadded::default(), Mutex::new(None));
        let region = Region { next, tasks: Tracked::new(tasks), run: task, panic };
        self.region.store(ptr::from_ref(&region).cast_mut().cast(), Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::Release);
        let guard = RegionGuard(self);
        region.work();
        drop(guard);
        let panic = region.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Called by a helper: works in every region that opens, until [`Self::close`] or until it has spun
    /// `patience` times for one region.
    pub(super) fn help(&self, patience: usize) {
        let (mut done, mut turns) = (0, 0);
        while !self.closed.load(Ordering::Acquire) && turns < patience {
            let epoch = self.epoch.load(Ordering::Relaxed);
            if epoch.is_multiple_of(2) || epoch == done {
                spin_wait(turns);
                turns += 1;
                continue;
            }
            // A helper enters first and then checks the epoch; the leader closes the epoch first and
            // then checks for helpers. Both read-modify-write `inside`, so that one comes second and
            // sees the other's earlier write: either the leader waits, or the helper finds it closed.
            self.inside.fetch_add(1, Ordering::AcqRel);
            if self.epoch.load(Ordering::Acquire) == epoch {
                // SAFETY: the leader, on whose stack the region is, waits until no helper is inside.
                let region = unsafe { &*self.region.load(Ordering::Relaxed) };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| region.work())) {
                    *region.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
            }
            self.inside.fetch_sub(1, Ordering::Release);
            (done, turns) = (epoch, 0);
        }
    }

    /// Dismisses the helpers: no more regions will open.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

impl Region<'_> {
    fn work(&self) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= *self.tasks.get() {
                return;
            }
            (self.run)(task);
        }
    }
}

/// Closes the region when dropped, also on a panic, and waits until no helper is inside.
struct RegionGuard<'a>(&'a Regions);

impl Drop for RegionGuard<'_> {
    fn drop(&mut self) {
        let Regions { epoch, inside, .. } = self.0;
        epoch.fetch_add(1, Ordering::Release);
        // See `help` for why this is not a plain load.
        let mut helpers = inside.fetch_add(0, Ordering::AcqRel);
        let mut turn = 0;
        while helpers != 0 {
            spin_wait(turn);
            turn += 1;
            helpers = inside.load(Ordering::Acquire);
        }
    }
}
