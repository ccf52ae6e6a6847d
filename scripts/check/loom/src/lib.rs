//! Models of the worker pool's protocol. `regions` is the file of the library, compiled with loom's types.

#![cfg(test)]

#[path = "../../../../src/ops/worker_pool/regions.rs"]
mod regions;

/// As `src/ops/worker_pool/sync.rs`, with loom's types.
mod sync {
    pub use std::sync::PoisonError;

    use loom::cell::UnsafeCell;
    pub use loom::sync::Mutex;
    pub use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

    pub fn spin_wait(_turn: usize) {
        loom::thread::yield_now();
    }

    /// Reads are tracked up to the drop, which counts as a write: a read that may come later fails
    /// the model.
    pub struct Tracked<T>(UnsafeCell<T>);

    impl<T> Tracked<T> {
        pub fn new(value: T) -> Self {
            Self(UnsafeCell::new(value))
        }

        pub fn get(&self) -> &T {
            self.0.with(|value| unsafe { &*value })
        }
    }

    impl<T> Drop for Tracked<T> {
        fn drop(&mut self) {
            self.0.with_mut(|_| ());
        }
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread::{self, JoinHandle};

use regions::Regions;

const PATIENT: usize = usize::MAX;
/// For two helpers: loom does not schedule fairly, so that two spinning threads may alternate forever.
const FEW_TURNS: usize = 1;

fn helpers(regions: &Arc<Regions>, count: usize, patience: usize) -> Vec<JoinHandle<()>> {
    let help = || {
        let regions = regions.clone();
        thread::spawn(move || regions.help(patience))
    };
    (0..count).map(|_| help()).collect()
}

fn close(regions: &Regions, helpers: Vec<JoinHandle<()>>) {
    regions.close();
    helpers.into_iter().for_each(|helper| helper.join().unwrap());
}

/// Cells that are each written by one task, without synchronization: a task that ran twice,
/// or that still runs after its region, is a race that loom reports.
struct Cells(Vec<UnsafeCell<usize>>);

unsafe impl Sync for Cells {}

impl Cells {
    fn new(count: usize) -> Self {
        Self((0..count).map(|_| UnsafeCell::new(0)).collect())
    }

    fn increment(&self, task: usize) {
        self.0[task].with_mut(|value| unsafe { *value += 1 });
    }

    /// Reads them as the leader does after a region.
    fn assert_all(&self, expected: usize) {
        for cell in &self.0 {
            cell.with(|value| assert_eq!(unsafe { *value }, expected));
        }
    }
}

fn every_task_runs_once(helper_count: usize, region_count: usize, tasks: usize, patience: usize) {
    loom::model(move || {
        let regions = Arc::new(Regions::default());
        let helpers = helpers(&regions, helper_count, patience);
        let cells = Cells::new(tasks);
        for region in 1..=region_count {
            regions.run(tasks, &|task| cells.increment(task));
            cells.assert_all(region);
        }
        close(&regions, helpers);
    });
}

#[test]
fn one_helper_shares_a_region() {
    every_task_runs_once(1, 1, 3, PATIENT);
}

#[test]
fn a_helper_may_be_late_for_a_region_and_catch_the_next() {
    every_task_runs_once(1, 2, 2, PATIENT);
}

#[test]
fn two_helpers_share_a_region() {
    every_task_runs_once(2, 1, 2, FEW_TURNS);
}

#[test]
fn an_impatient_helper_leaves_while_regions_come() {
    every_task_runs_once(1, 2, 2, 1);
}

#[test]
fn helpers_end_when_there_was_no_region() {
    every_task_runs_once(2, 0, 0, FEW_TURNS);
}

/// A panic of a task propagates to the leader, whichever thread ran it; all other tasks may or may not
/// have run, but none of them is still running; and the next region works.
#[test]
fn a_panic_propagates_to_the_leader_and_ends_the_region() {
    loom::model(|| {
        let regions = Arc::new(Regions::default());
        let helpers = helpers(&regions, 1, PATIENT);
        let cells = Cells::new(2);
        let runs = AtomicUsize::new(0);
        let task = |task: usize| {
            cells.increment(task);
            runs.fetch_add(1, Ordering::Relaxed);
            assert!(task != 0, "task 0");
        };
        let panic = catch_unwind(AssertUnwindSafe(|| regions.run(2, &task))).unwrap_err();
        assert_eq!(*panic.downcast_ref::<&str>().unwrap(), "task 0");
        let first = runs.load(Ordering::Relaxed);
        assert!((1..=2).contains(&first));
        cells.0[0].with(|value| assert_eq!(unsafe { *value }, 1));
        regions.run(2, &|task| cells.increment(task));
        cells.0[0].with(|value| assert_eq!(unsafe { *value }, 2));
        cells.0[1].with(|value| assert_eq!(unsafe { *value }, first));
        close(&regions, helpers);
    });
}
