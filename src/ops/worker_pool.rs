//! Threads that stay at hand from one parallel region to the next.
//!
//! A decoding step is a hundred regions of some ten microseconds with a little serial work between
//! them, and a thread that is woken for each, or falls asleep in the middle of one, costs a tenth of it.
//! Inside [`with_worker_pool`] the pool's other threads spin until there is something to do.
//!
//! Whoever is late is not waited for: a region ends when the threads that have entered it are done, and
//! [`with_worker_pool`] when its leader is.

use std::any::Any;
use std::cell::Cell;
use std::hint::spin_loop;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

/// Turns of waiting in which a core is kept; then it is offered to others between two looks.
const SPINS: usize = 2000;
/// Looks after which a thread of the team goes back to the pool: some milliseconds, or many on a busy
/// machine. Nothing it may be holding up below this call then waits for ever.
const LOOKS: usize = 20_000;

/// Some threads of rayon's pool, led by the one that called [`with_worker_pool`].
#[derive(Default)]
struct WorkerPool {
    /// Of the region: odd while it is open.
    number: CachePadded<AtomicUsize>,
    region: AtomicPtr<Region<'static>>,
    /// Threads that may be in the region.
    inside: CachePadded<AtomicUsize>,
    closed: CachePadded<AtomicBool>,
    /// Threads that have come.
    joined: AtomicUsize,
}

/// On cache lines of its own: what one thread writes does not disturb who reads something else.
#[derive(Default)]
#[repr(align(128))]
struct CachePadded<T>(T);

impl<T> Deref for CachePadded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Tasks of one parallel region.
struct Region<'a> {
    next: CachePadded<AtomicUsize>,
    tasks: usize,
    run: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

thread_local! {
    /// The team that this thread leads.
    static LED: Cell<*const WorkerPool> = const { Cell::new(ptr::null()) };
    /// Whether this thread is in a region: what a task of a team calls is serial.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Does `work` on this thread, with the pool's other threads at hand for its parallel regions by
/// [`run`] and [`par_for_each`](super::par_for_each). Regions of rayon's are slow inside: nobody else is free for them.
pub fn with_worker_pool<R>(work: impl FnOnce() -> R) -> R {
    let others = rayon::current_num_threads() - 1;
    if others == 0 || in_worker_pool() {
        return work();
    }
    let team = Arc::new(WorkerPool::default());
    for _ in 0..others {
        let team = team.clone();
        rayon::spawn(move || team.help());
    }
    let lead = LeaderGuard::of(&team);
    let result = work();
    drop(lead);
    // Whom nobody took up lies on top of what this thread has to do, if it is one of the pool's.
    for _ in team.joined.load(Ordering::Relaxed)..others {
        rayon::yield_local();
    }
    result
}

/// Whether this thread leads a team, or works for one: regions are cheap.
pub fn in_worker_pool() -> bool {
    !LED.get().is_null() || BUSY.get()
}

/// Runs tasks `0..tasks` on several threads: the team's that this thread leads, else rayon's. Within a
/// task of a team's they are run one after the other.
pub fn run(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    if tasks < 2 || BUSY.get() {
        return (0..tasks).for_each(task);
    }
    // SAFETY: who sets the pointer takes it back before the team is gone.
    match unsafe { LED.get().as_ref() } {
        Some(team) => team.run(tasks, task),
        None => (0..tasks).into_par_iter().for_each(task),
    }
}

/// What ends when the leader's work does, in panic too.
struct LeaderGuard<'a>(&'a WorkerPool);

impl<'a> LeaderGuard<'a> {
    fn of(team: &'a WorkerPool) -> Self {
        LED.set(team);
        Self(team)
    }
}

impl Drop for LeaderGuard<'_> {
    fn drop(&mut self) {
        LED.set(ptr::null());
        self.0.closed.store(true, Ordering::Release);
    }
}

impl WorkerPool {
    /// The leader's part of a region.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let (next, panic) = (CachePadded::default(), Mutex::new(None));
        let region = Region { next, tasks, run: task, panic };
        self.region.store(ptr::from_ref(&region).cast_mut().cast(), Ordering::Relaxed);
        self.number.fetch_add(1, Ordering::SeqCst);
        let closing = RegionGuard(self);
        region.work();
        drop(closing);
        let panic = region.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// The other threads' part: whatever region comes, until there are no more.
    fn help(&self) {
        self.joined.fetch_add(1, Ordering::Relaxed);
        // A thread that waits for rayon may be given this. One that leads must not: it would wait for
        // itself.
        if in_worker_pool() {
            return;
        }
        let (mut done, mut looks) = (0, 0);
        while !self.closed.load(Ordering::Acquire) && looks < LOOKS {
            let number = self.number.load(Ordering::Relaxed);
            if number.is_multiple_of(2) || number == done {
                spin_wait(looks);
                looks += 1;
                continue;
            }
            // First inside, then the look whether it is open: who closes it looks the other way round.
            self.inside.fetch_add(1, Ordering::SeqCst);
            if self.number.load(Ordering::SeqCst) == number {
                // SAFETY: the region is there until nobody is inside.
                let region = unsafe { &*self.region.load(Ordering::Relaxed) };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| region.work())) {
                    *region.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
            }
            self.inside.fetch_sub(1, Ordering::Release);
            (done, looks) = (number, 0);
        }
    }
}

impl Region<'_> {
    fn work(&self) {
        let _busy = BusyGuard::new();
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            (self.run)(task);
        }
    }
}

/// While a thread is in a region, in panic too.
struct BusyGuard;

impl BusyGuard {
    fn new() -> Self {
        BUSY.set(true);
        Self
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        BUSY.set(false);
    }
}

/// Closes the region, in panic too, when nobody is inside.
struct RegionGuard<'a>(&'a WorkerPool);

impl Drop for RegionGuard<'_> {
    fn drop(&mut self) {
        self.0.number.fetch_add(1, Ordering::SeqCst);
        for turn in 0.. {
            if self.0.inside.load(Ordering::SeqCst) == 0 {
                break;
            }
            spin_wait(turn);
        }
    }
}

/// Waits a moment for what another thread is about to do; `turn` counts from 0.
pub fn spin_wait(turn: usize) {
    match turn < SPINS {
        true => spin_loop(),
        // The other may not be running: threads can be more than cores.
        false => std::thread::yield_now(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
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
        with_worker_pool(|| run(3, &|_| ())); // from outside of any pool
        assert!(!in_worker_pool());
    }

    #[test]
    fn other_threads_take_part() {
        let begun = Instant::now();
        let seen = Mutex::new(HashSet::new());
        let saw_three = || seen.lock().unwrap().len() == 3;
        pool(3).install(|| {
            // Each task waits a while for three threads to have one; on a busy machine they come later.
            while !saw_three() {
                assert!(begun.elapsed() < Duration::from_secs(60), "other threads never came");
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
    fn regions_within_regions_and_rayons() {
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
    fn each_takes_what_it_is_given_once() {
        let add_up = || {
            for at_hand in [0, 1_000_000] {
                let sum = AtomicUsize::new(0);
                par_for_each((0..100usize).map(Box::new).collect(), at_hand, |n: Box<usize>| {
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
    fn teams_of_one_pool_do_not_wait_for_each_other() {
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
    fn a_panic_comes_out_of_the_region_whoever_had_the_task() {
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
