//! Threads that spin from one parallel region to the next.
//!
//! A decode step is a hundred parallel regions of some ten microseconds with a little serial work between
//! them. Waking a thread for each, or letting it fall asleep within one, costs a tenth of the step. Inside
//! [`with_worker_pool`] the other threads of rayon's pool spin until the next region opens.
//!
//! Nothing waits for a late thread: a region ends when the threads that have entered it are done, and
//! [`with_worker_pool`] when its leader is.

mod regions;
mod sync;

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use regions::Regions;
pub(crate) use sync::spin_wait;

/// Spins after which a thread returns to rayon: some milliseconds, or more on a busy machine,
/// so that it does not block other work of rayon.
const PATIENCE: usize = 20_000;

/// Threads of rayon's pool, led by the one that called [`with_worker_pool`].
#[derive(Default)]
struct WorkerPool {
    regions: Regions,
    /// Helper threads that have joined.
    joined: AtomicUsize,
}

thread_local! {
    /// The pool that this thread leads.
    static LED: Cell<*const WorkerPool> = const { Cell::new(ptr::null()) };
    /// Whether this thread runs a task of a pool's region: parallel regions inside of it are serial.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on this thread, while rayon's other threads spin for the parallel regions of [`run`] and
/// [`par_for_each`](super::par_for_each). Rayon's parallel iterators run only on this thread meanwhile.
pub(crate) fn with_worker_pool<R>(work: impl FnOnce() -> R) -> R {
    let others = rayon::current_num_threads() - 1;
    if others == 0 || in_worker_pool() {
        return work();
    }
    let pool = Arc::new(WorkerPool::default());
    for _ in 0..others {
        let pool = pool.clone();
        rayon::spawn(move || {
            pool.joined.fetch_add(1, Ordering::Relaxed);
            // Rayon may run this job on the leader while it waits for rayon. It must not help: it would wait
            // for itself.
            if !in_worker_pool() {
                pool.regions.help(PATIENCE);
            }
        });
    }
    let leader = LeaderGuard::new(&pool);
    let result = work();
    drop(leader);
    // Jobs that no thread has taken are on top of this thread's own queue, if it is one of rayon's.
    for _ in pool.joined.load(Ordering::Relaxed)..others {
        rayon::yield_local();
    }
    result
}

/// Whether this thread leads a worker pool or runs one of its tasks, so that parallel regions are cheap.
pub(crate) fn in_worker_pool() -> bool {
    !LED.get().is_null() || IN_TASK.get()
}

/// Runs tasks `0..tasks` on several threads: those of the worker pool that this thread leads, else rayon's.
/// Within a task of a worker pool they run one after the other.
pub(crate) fn run(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    if tasks < 2 || IN_TASK.get() {
        return (0..tasks).for_each(task);
    }
    // SAFETY: `LeaderGuard` resets the pointer before the pool that it borrows is dropped.
    match unsafe { LED.get().as_ref() } {
        Some(pool) => pool.regions.run(tasks, &|i| {
            let _guard = TaskGuard::new();
            task(i);
        }),
        None => (0..tasks).into_par_iter().for_each(task),
    }
}

/// Makes this thread the leader of a pool until dropped, also on a panic.
struct LeaderGuard<'a>(&'a WorkerPool);

impl<'a> LeaderGuard<'a> {
    fn new(pool: &'a WorkerPool) -> Self {
        LED.set(pool);
        Self(pool)
    }
}

impl Drop for LeaderGuard<'_> {
    fn drop(&mut self) {
        LED.set(ptr::null());
        self.0.regions.close();
    }
}

/// Marks this thread as running a task of a region until dropped, also on a panic.
struct TaskGuard;

impl TaskGuard {
    fn new() -> Self {
        IN_TASK.set(true);
        Self
    }
}

impl Drop for TaskGuard {
    fn drop(&mut self) {
        IN_TASK.set(false);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Mutex;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::ops::par_for_each;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_task_is_run_once() {
        for threads in [1, 2, 5] {
            let count = || {
                for tasks in (0..300).chain([10_000]) {
                    let counts: Vec<AtomicUsize> =
                        (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    run(tasks, &|task| {
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                }
            };
            pool(threads).install(|| with_worker_pool(count));
            pool(threads).install(count);
        }
        with_worker_pool(|| run(3, &|_| ())); // outside of any pool
        assert!(!in_worker_pool());
    }

    #[test]
    fn other_threads_run_tasks() {
        let begun = Instant::now();
        let seen = Mutex::new(HashSet::new());
        let saw_three = || seen.lock().unwrap().len() == 3;
        pool(3).install(|| {
            // Each task waits until three threads have one, which may take a while on a busy machine.
            while !saw_three() {
                assert!(begun.elapsed() < Duration::from_secs(60), "no other thread ran a task");
                with_worker_pool(|| {
                    run(3, &|_| {
                        seen.lock().unwrap().insert(thread::current().id());
                        let begun = Instant::now();
                        while !saw_three() && begun.elapsed() < Duration::from_millis(100) {
                            thread::yield_now();
                        }
                    });
                });
            }
        });
    }

    #[test]
    fn nested_regions_and_rayon_loops_run_every_task() {
        let sum = AtomicUsize::new(0);
        let add = |n: usize| {
            sum.fetch_add(n, Ordering::Relaxed);
        };
        pool(4).install(|| {
            with_worker_pool(|| {
                with_worker_pool(|| run(10, &|_| run(10, &|i| add(i))));
                (0..1000usize).into_par_iter().for_each(add);
                run(10, &|_| (0..10usize).into_par_iter().for_each(add));
            });
        });
        assert_eq!(sum.into_inner(), 450 + 499_500 + 450);
    }

    #[test]
    fn par_for_each_consumes_every_item_once() {
        let add_up = || {
            for work in [0, 1_000_000] {
                let sum = AtomicUsize::new(0);
                par_for_each((0..100usize).map(Box::new).collect(), work, |n: Box<usize>| {
                    sum.fetch_add(*n, Ordering::Relaxed);
                });
                assert_eq!(sum.into_inner(), 4950);
            }
            let bad = |n: Box<usize>| assert!(*n != 50, "task 50");
            let tasks: Vec<Box<usize>> = (0..100).map(Box::new).collect();
            catch_unwind(AssertUnwindSafe(|| par_for_each(tasks, 1_000_000, bad))).unwrap_err();
        };
        pool(3).install(|| with_worker_pool(add_up));
        pool(3).install(add_up);
        with_worker_pool(add_up);
    }

    #[test]
    fn worker_pools_of_one_rayon_pool_do_not_deadlock() {
        let pool = pool(3);
        let sums: Vec<usize> = thread::scope(|scope| {
            let lead = || {
                pool.install(|| {
                    let sum = AtomicUsize::new(0);
                    for _ in 0..50 {
                        with_worker_pool(|| {
                            for _ in 0..20 {
                                run(9, &|i| {
                                    sum.fetch_add(i, Ordering::Relaxed);
                                });
                            }
                        });
                    }
                    sum.into_inner()
                })
            };
            let leaders: Vec<_> = (0..6).map(|_| scope.spawn(lead)).collect();
            leaders.into_iter().map(|leader| leader.join().unwrap()).collect()
        });
        assert_eq!(sums, [36_000; 6]);
    }

    #[test]
    fn a_panic_propagates_from_whichever_thread_ran_the_task() {
        pool(2).install(|| {
            with_worker_pool(|| {
                for _ in 0..100 {
                    for bad in 0..4 {
                        let task = |task: usize| assert!(task != bad, "task {task}");
                        let caught = catch_unwind(AssertUnwindSafe(|| run(4, &task))).unwrap_err();
                        assert_eq!(*caught.downcast::<String>().unwrap(), format!("task {bad}"));
                    }
                    run(4, &|_| ());
                }
            });
        });
        assert!(catch_unwind(|| pool(2).install(|| with_worker_pool(|| panic!("work")))).is_err());
        assert!(!in_worker_pool());
    }
}
