//! Allocations: after the first steps have created the buffers, a step allocates nothing as large as an
//! activation.

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::cell::Cell;

use quantune::model::{ActiveAdapter, Adapters, FullBuffers, KvCache, Rows};
use quantune::ops::Compute;

use crate::pretrain;
use crate::support::{golden_json, load};
use crate::train::{Layout, Run, adapter, rows};

/// The system allocator, recording each thread's largest request: an unchecked count read from a file
/// would show as a large request.
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is forwarded to the system allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(block.size()));
        // SAFETY: the caller guarantees the contract of `alloc`.
        unsafe { System.alloc(block) }
    }

    unsafe fn alloc_zeroed(&self, block: Block) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(block.size()));
        // SAFETY: the caller guarantees the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(block) }
    }

    unsafe fn realloc(&self, old: *mut u8, block: Block, size: usize) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(size));
        // SAFETY: the caller guarantees the contract of `realloc`.
        unsafe { System.realloc(old, block, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, block: Block) {
        // SAFETY: the caller guarantees the contract of `dealloc`.
        unsafe { System.dealloc(old, block) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// The result of `run`, and its largest allocation.
pub fn largest_allocation<T>(run: impl FnOnce() -> T) -> (T, usize) {
    LARGEST.set(0);
    let out = run();
    (out, LARGEST.get())
}

/// Runs `step` three times on one thread; returns the largest allocation of the first and of the third.
fn first_and_third(step: impl FnMut() + Send) -> (usize, usize) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        let mut step = step;
        let largest = [0, 1, 2].map(|_| largest_allocation(&mut step).1);
        (largest[0], largest[2])
    })
}

#[test]
fn a_third_step_allocates_no_activation() {
    let name = "llama-q4_0";
    let all = rows(name);
    for compute in [Compute::F32, Compute::INT16] {
        for (recompute, dropout) in [(false, 0.0), (true, 0.0), (false, 0.1), (true, 0.1)] {
            let decoder = load(name, compute);
            let initial = adapter(name, "initial", &decoder);
            let hidden_size = decoder.config.hidden_size;
            let run = Run::new(decoder, initial);
            let mut buffers = None;
            let layout = Layout { micro: 12, recompute, dropout };
            let tokens: usize = all[..12].iter().map(|row| row.tokens.len()).sum();
            let activation = tokens * hidden_size * size_of::<f32>();
            let (first, third) = first_and_third(|| {
                run.step_with(&all[..12], layout, &mut buffers);
            });
            assert!(first >= activation, "the first step's largest is {first}");
            assert!(
                third < activation,
                "{compute:?}, recompute {recompute}, dropout {dropout}: {third} bytes are new, an \
                 activation has {activation}"
            );
        }
    }
}

#[test]
fn a_third_step_of_a_whole_model_allocates_no_activation() {
    let run = golden_json("pretrain/llama-untied/run.json");
    let batch = &pretrain::micro_batches(&run, 0, 4)[0];
    for compute in [Compute::F32, Compute::INT16] {
        for kept_layers in [0, 2] {
            let model = pretrain::load("llama-untied", compute);
            let (mut gradients, mut buffers) = (model.zero_gradients(), FullBuffers::default());
            let activation = batch.tokens.len() * model.config.hidden_size * size_of::<f32>();
            let (first, third) = first_and_third(|| {
                model.accumulate(batch, 1.0, kept_layers, &mut gradients, &mut buffers).unwrap();
            });
            assert!(first >= activation, "the first step's largest is {first}");
            assert!(third < activation, "{compute:?}, {kept_layers} layers kept: {third} are new");
        }
    }
}

#[test]
fn a_third_decoding_step_allocates_no_activation() {
    let name = "llama-q4_0";
    let decoder = load(name, Compute::INT16);
    let active = [ActiveAdapter::frozen(adapter(name, "final", &decoder).into())];
    let rows: Vec<Vec<u32>> = (0..64).map(|i| vec![i % 50 + 3; 4]).collect();
    let mut cache = KvCache::new(&decoder, rows.len());
    decoder.hidden_cached(&Rows::new(&rows), Adapters::Same(&active), &mut cache).unwrap();
    let activation = rows.len() * decoder.config.intermediate_size * size_of::<f32>();
    let (first, third) = first_and_third(|| {
        let next = rows.iter().enumerate().map(|(i, row)| (&row[..1], cache.len(i)));
        let next = Rows::after(next.collect::<Vec<_>>().into_iter());
        decoder.hidden_step(&next, Adapters::Same(&active), &mut cache).unwrap();
    });
    assert!(first >= activation, "the first step's largest is {first}");
    assert!(third < activation, "{third} bytes are new, an activation has {activation}");
}
