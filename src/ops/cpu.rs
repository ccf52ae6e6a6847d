//! Shared by the CPU kernels: views of tensors as slices, parallel loops and outputs that threads divide among
//! themselves, vectorizable `exp` and `tanh`.

use std::ops::{Deref, Range};
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Error, Layout, Result, Storage, Tensor};
use rayon::prelude::*;

use super::worker_pool;

/// The values of a contiguous `f32` tensor on the CPU, borrowed.
pub(crate) struct Values<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Self> {
        let (guard, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("expected a contiguous tensor, found strides {:?}", layout.stride())
        };
        let Storage::Cpu(CpuStorage::F32(_)) = &*guard else {
            return Err(Error::UnexpectedDType {
                msg: "a CPU kernel needs f32 on the CPU",
                expected: DType::F32,
                got: tensor.dtype(),
            });
        };
        Ok(Self { storage: Box::new(guard), range: start..end })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("checked when it was made"),
        }
    }
}

/// The values of a custom op's argument.
pub(super) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("expected a contiguous tensor, found strides {:?}", layout.stride())
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Below this many multiply-adds waking a thread costs more than it saves.
const MIN_PARALLEL_WORK: usize = 50_000;
/// The same for threads that spin in a worker pool.
const MIN_PARALLEL_WORK_IN_POOL: usize = 5_000;

/// Runs the tasks, on several threads if their total `work`, in multiply-adds, is large enough.
pub(crate) fn par_for_each<T: Send>(tasks: Vec<T>, work: usize, run: impl Fn(T) + Sync + Send) {
    let in_pool = worker_pool::in_worker_pool();
    if tasks.len() < 2
        || work <= if in_pool { MIN_PARALLEL_WORK_IN_POOL } else { MIN_PARALLEL_WORK }
    {
        tasks.into_iter().for_each(run);
    } else if in_pool {
        let tasks: Vec<_> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
        let take = |i: usize| tasks[i].lock().unwrap_or_else(PoisonError::into_inner).take();
        worker_pool::run(tasks.len(), &|i| run(take(i).expect("every task is run once")));
    } else {
        tasks.into_par_iter().for_each(run);
    }
}

/// Prefetches the cache line of an address, which need not be valid, into the L1 cache.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and prefetching never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// A pointer to a slice that several threads write to, each to different elements.
#[derive(Clone, Copy)]
pub(crate) struct SharedMutPtr {
    start: *mut f32,
    len: usize,
}

// SAFETY: a `SharedMutPtr` is only a pointer; the caller of its methods guarantees disjoint elements.
unsafe impl Send for SharedMutPtr {}
// SAFETY: as for `Send`: shared pointers are written to at disjoint elements.
unsafe impl Sync for SharedMutPtr {}

impl SharedMutPtr {
    pub(crate) fn new(values: &mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len() }
    }

    /// Elements from here on.
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// The elements from `offset` on.
    pub(crate) fn at(self, offset: usize) -> Self {
        assert!(offset <= self.len);
        // SAFETY: the offset is inside the slice this was made from.
        Self { start: unsafe { self.start.add(offset) }, len: self.len - offset }
    }

    /// The first of `len` elements.
    pub(crate) fn pointer(self, len: usize) -> *mut f32 {
        assert!(len <= self.len);
        self.start
    }

    /// The first `len` elements, for reading.
    ///
    /// # Safety
    /// As [`Self::slice`], but other threads may read the elements too.
    pub(crate) unsafe fn read<'a>(self, len: usize) -> &'a [f32] {
        assert!(len <= self.len);
        // SAFETY: the assertion checks the bounds; this function's contract guarantees that no thread writes
        // to it.
        unsafe { std::slice::from_raw_parts(self.start, len) }
    }

    /// The first `len` elements.
    ///
    /// # Safety
    /// The slice this was made from must still be borrowed, and no other thread may access
    /// these elements while the result lives.
    pub(crate) unsafe fn slice<'a>(self, len: usize) -> &'a mut [f32] {
        assert!(len <= self.len);
        // SAFETY: the assertion checks the bounds; this function's contract guarantees exclusive access.
        unsafe { std::slice::from_raw_parts_mut(self.start, len) }
    }
}

/// `eˣ` to 2 units in the last place, written so that loops over it vectorize (Cody and Waite's
/// reduction, Cephes' polynomial). Below -87.3 it is 0; above 88.3 it saturates.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clamped = x.clamp(-87.3, 88.3);
    let shifted = clamped * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_5e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let scale = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.3 { 0.0 } else { y * scale }
}

/// The hyperbolic tangent, to an absolute error of 2e-7.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_two_units() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.5e-7, "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn tanh_is_exact_to_seven_digits_of_one() {
        for i in -6000..6000 {
            let x = i as f32 / 100.0;
            let error = (f64::from(tanh(x)) - f64::from(x).tanh()).abs();
            assert!(error < 2e-7, "tanh({x}) is off by {error:e}");
        }
    }
}
