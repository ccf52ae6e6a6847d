//! A few rows of input times a frozen matrix (GEMV), for decode steps: the weights are read once, in place, and
//! the speed is bound by memory bandwidth.
//!
//! [`int16`] rounds the input to 15 bits with one scale per 32 values and multiplies it with the integers the
//! blocks store, exactly; the scales of both are then applied in `f32`. [`f32`](fn@f32) keeps the input
//! unrounded. Both sum every output element in one fixed order, independent of the number of threads and
//! of other input rows, so a row gives the same bits alone and in a batch.
//!
//! The kernels are generic over the vectors of an ISA level ([`i16_vector`]), the block type ([`formats`])
//! and the form of the input ([`activations`]); [`kernel`] is the loop. With AVX-512 most types
//! process sixteen rows at a time (`tile`, `bytes`), up to eight rows of input at once: for one row of input
//! this is as fast as weights repacked beforehand, and needs no copy.
//!
//! A call from outside rayon's threads pays for waking them up, unless they already spin in a
//! [`worker_pool`].

mod activations;
#[cfg(target_arch = "x86_64")]
mod bytes;
mod formats;
mod i16_vector;
mod kernel;
#[cfg(target_arch = "x86_64")]
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(target_arch = "x86_64")]
use self::activations::ActivationBatches;
use self::activations::Activations;
use self::i16_vector::{I16Portable, I16Vector};
use self::kernel::Output;
use super::cpu::SharedMutPtr;
use super::worker_pool;
use crate::isa::{Isa, IsaLevel};
use crate::quant::{BlockType, FrozenMatrix};

/// Bytes of weights in one task: enough to amortize the cost of scheduling it, few enough to fit the
/// L2 cache, from which they are read again if there are more rows of input than a kernel takes at once.
const TASK_BYTES: usize = 32 * 1024;
/// Kernels process rows in pairs or 16 at a time.
const TILE_ROWS: usize = 16;
/// Below this many bytes of weights, outside of a worker pool, waking threads costs more than they save.
const ALONE_BYTES: usize = 96 * 1024;

/// A frozen matrix `W (rows, cols)` and the output buffer for `x · Wᵀ (m, rows)`.
pub(crate) type RowProduct<'a> = (&'a FrozenMatrix, &'a mut [f32]);

/// `y (m, rows) = x (m, cols) · Wᵀ`, all in `f32`. For small `m`: weights are decoded again for
/// every four or eight rows of `x`.
pub(crate) fn f32(isa: Isa, x: &[f32], w: &FrozenMatrix, y: &mut [f32]) {
    f32_many(isa, x, &mut [(w, y)], FusedTasks::NOTHING);
}

/// `y (m, rows) = x (m, cols) · Wᵀ` with `x` rounded to 15 bits per 32 values; matrices of floats
/// are multiplied in `f32`. For small `m`, as [`f32`](fn@f32).
pub(crate) fn int16(isa: Isa, x: &[f32], w: &FrozenMatrix, y: &mut [f32]) {
    int16_many(isa, x, &mut [(w, y)], FusedTasks::NOTHING);
}

/// Other work in the parallel region of a product: a separate region would cost as much as a small product.
#[derive(Clone, Copy)]
pub(crate) struct FusedTasks<'a> {
    /// How many tasks.
    pub tasks: usize,
    /// Runs one of them.
    pub run: &'a (dyn Fn(usize) + Sync),
    /// Called with the index of a product and a range of its rows once these rows and all tasks are done.
    /// The pointer is to the whole product; no other thread accesses these rows of it.
    pub epilogue: &'a (dyn Fn(usize, Range<usize>, SharedMutPtr) + Sync),
}

impl FusedTasks<'_> {
    /// No other work.
    pub const NOTHING: FusedTasks<'static> =
        FusedTasks { tasks: 0, run: &|_| (), epilogue: &|_, _, _| () };
}

/// [`f32`](fn@f32) for several matrices of the same width, in one parallel region.
pub(crate) fn f32_many(isa: Isa, x: &[f32], products: &mut [RowProduct], fused: FusedTasks) {
    many(isa, x, products, fused, |block_type| match block_type {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => InputForm::Floats,
        _ => InputForm::F32,
    });
}

/// [`int16`] for several matrices of the same width, in one parallel region.
pub(crate) fn int16_many(isa: Isa, x: &[f32], products: &mut [RowProduct], fused: FusedTasks) {
    many(isa, x, products, fused, |block_type| match block_type {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => InputForm::Floats,
        _ => InputForm::Int16,
    });
}

/// The form of the input that the kernels of a block type take.
#[derive(Clone, Copy, PartialEq, Eq)]
enum InputForm {
    /// `f32` in the order of the values, for matrices of floats.
    Floats,
    /// `f32` in the order in which blocks are decoded.
    F32,
    /// Rounded integers in the order in which blocks are decoded.
    Int16,
}

/// The forms of one input that a call needs.
struct PreparedInput {
    floats: Option<Activations<f32>>,
    f32: Option<Activations<f32>>,
    int16: Option<Activations<i16>>,
    /// `int16`, laid out for `tile`.
    #[cfg(target_arch = "x86_64")]
    batches: Option<ActivationBatches>,
    /// `int16`, laid out for `bytes`.
    #[cfg(target_arch = "x86_64")]
    bytes: Option<bytes::ByteActivations>,
}

/// A range of stored rows of one product.
struct RowTask<'a> {
    product: usize,
    /// Row of the product at which the matrix begins.
    before: usize,
    matrix: &'a FrozenMatrix,
    form: InputForm,
    /// Rows in storage order.
    rows: Range<usize>,
    /// The product.
    whole: SharedMutPtr,
    /// The output of the matrix's first row.
    y: SharedMutPtr,
    /// Row stride of the product: rows of the matrix and of the rows appended to it.
    stride: usize,
}

fn many(
    isa: Isa,
    x: &[f32],
    products: &mut [RowProduct],
    fused: FusedTasks,
    form_of: impl Fn(BlockType) -> InputForm,
) {
    let Some(cols) = products.first().map(|(w, _)| w.cols()) else { return };
    if x.is_empty() || cols == 0 {
        (0..fused.tasks).for_each(fused.run);
        for (product, (matrix, y)) in products.iter_mut().enumerate() {
            y.fill(0.0);
            (fused.epilogue)(product, 0..matrix.rows(), SharedMutPtr::new(y));
        }
        return;
    }
    let m = x.len() / cols;
    assert_eq!(x.len(), m * cols);
    let mut tasks = Vec::new();
    let mut total = 0;
    for (product, (matrix, y)) in products.iter_mut().enumerate() {
        assert_eq!(matrix.cols(), cols);
        assert_eq!(y.len(), m * matrix.rows());
        let (stride, whole) = (matrix.rows(), SharedMutPtr::new(y));
        // A matrix with appended rows is stored as two, side by side.
        let more = matrix.more_rows().map(|more| (more, matrix.own_rows()));
        for (matrix, before) in [(*matrix, 0)].into_iter().chain(more) {
            // A multiple of the tile height, whatever the kernel, and of the period of interleaved rows.
            let mut step = (TASK_BYTES / matrix.row_bytes()).max(1).next_multiple_of(TILE_ROWS);
            while !step.is_multiple_of(matrix.order().stretch()) {
                step += TILE_ROWS;
            }
            let (form, y) = (form_of(matrix.block_type()), whole.at(before));
            for start in (0..matrix.own_rows()).step_by(step) {
                let rows = start..matrix.own_rows().min(start + step);
                tasks.push(RowTask { product, before, matrix, form, rows, whole, y, stride });
            }
            total += matrix.own_rows() * matrix.row_bytes();
        }
    }
    let needed = |form| tasks.iter().any(|task| task.form == form);
    let int16 = needed(InputForm::Int16).then(|| Activations::rounded(isa, x, cols));
    #[cfg(target_arch = "x86_64")]
    let in_bytes = |task: &RowTask| {
        let (matrix, rows) = (task.matrix, task.rows.len());
        task.form == InputForm::Int16 && bytes::has(matrix.block_type()) && bytes::needs(m, rows)
    };
    let input = PreparedInput {
        #[cfg(target_arch = "x86_64")]
        bytes: int16
            .as_ref()
            .filter(|_| isa.level() == IsaLevel::Avx512Vnni && tasks.iter().any(in_bytes))
            // SAFETY: an `Isa` is only made by detection, so the CPU supports AVX-512 and VNNI.
            .map(|x| unsafe { bytes::ByteActivations::new(x) }),
        #[cfg(target_arch = "x86_64")]
        batches: int16
            .as_ref()
            .filter(|_| isa.level() == IsaLevel::Avx512Vnni)
            .map(ActivationBatches::new),
        floats: needed(InputForm::Floats).then(|| Activations::straight(isa, x, cols)),
        f32: needed(InputForm::F32).then(|| Activations::decoded(isa, x, cols)),
        int16,
    };
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let one = |task: &RowTask| {
        // Fused tasks are taken first; when none is left to take, some may still be running.
        loop {
            let taken = next.fetch_add(1, Ordering::Relaxed);
            if taken >= fused.tasks {
                break;
            }
            let _counted = CountOnDrop(&done);
            (fused.run)(taken);
        }
        run(isa, &input, task);
        for turn in 0.. {
            if done.load(Ordering::Acquire) == fused.tasks {
                break;
            }
            worker_pool::spin_wait(turn);
        }
        let rows = task.before + task.rows.start..task.before + task.rows.end;
        (fused.epilogue)(task.product, rows, task.whole);
    };
    if total <= ALONE_BYTES && !worker_pool::in_worker_pool() {
        tasks.iter().for_each(one);
    } else {
        worker_pool::run(tasks.len(), &|i| one(&tasks[i]));
    }
}

/// Counts a task as done on drop, even if it panics, so that no thread waits forever.
struct CountOnDrop<'a>(&'a AtomicUsize);

impl Drop for CountOnDrop<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

fn run(isa: Isa, input: &PreparedInput, task: &RowTask) {
    let (matrix, rows, y) = (task.matrix, task.rows.clone(), task.y);
    let weights = matrix.stored_bytes(rows.clone());
    let output = Output { matrix, first_row: rows.start, y, stride: task.stride };
    // SAFETY: an `Isa` is only made by detection, so the CPU supports its level; no two tasks share a row.
    unsafe {
        match (isa.level(), task.form) {
            #[cfg(target_arch = "x86_64")]
            (IsaLevel::Avx512Vnni, InputForm::Int16) => {
                let int16 = input.int16.as_ref().expect(NEEDED);
                let batches = input.batches.as_ref().expect(NEEDED);
                if bytes::has(matrix.block_type()) {
                    let input = (batches, input.bytes.as_ref());
                    bytes::block_rows(weights, int16, input, &output);
                } else {
                    tile::block_rows(weights, int16, batches, &output);
                }
            }
            #[cfg(target_arch = "x86_64")]
            (IsaLevel::Avx512Vnni, form) => {
                run_f32::<x86::I16Avx512>(weights, form, input, &output)
            }
            #[cfg(target_arch = "x86_64")]
            (IsaLevel::Avx2 | IsaLevel::AvxVnni, form) => {
                run_on::<x86::I16Avx2>(weights, form, input, &output)
            }
            (_, form) => run_on::<I16Portable>(weights, form, input, &output),
        }
    }
}

/// The `expect` message for a form of the input.
const NEEDED: &str = "made because a task needs it";

/// # Safety
/// The CPU must support the features of `W`, and no other thread may access the elements of `y` that
/// belong to these rows.
unsafe fn run_on<W: I16Vector>(
    bytes: &[u8],
    form: InputForm,
    input: &PreparedInput,
    output: &Output,
) {
    // SAFETY: both functions have the same safety contract as this one.
    unsafe {
        match form {
            InputForm::Floats | InputForm::F32 => run_f32::<W>(bytes, form, input, output),
            InputForm::Int16 => {
                kernel::block_rows::<W, i16>(bytes, input.int16.as_ref().expect(NEEDED), output);
            }
        }
    }
}

/// [`run_on`] with input in `f32`; kernels for integers are not compiled for `W`.
///
/// # Safety
/// As [`run_on`].
unsafe fn run_f32<W: I16Vector>(
    bytes: &[u8],
    form: InputForm,
    input: &PreparedInput,
    output: &Output,
) {
    // SAFETY: both kernels have the same safety contract as this function.
    unsafe {
        if form == InputForm::Floats {
            kernel::float_rows::<W>(bytes, input.floats.as_ref().expect(NEEDED), output);
        } else {
            kernel::block_rows::<W, f32>(bytes, input.f32.as_ref().expect(NEEDED), output);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quantune_adapters::rng::Stream;

    use super::*;
    use crate::quant::testing::random_blocks;
    use crate::quant::{Bytes, RowOrder};

    fn matrix(block_type: BlockType, rows: usize, cols: usize) -> FrozenMatrix {
        // Misaligned by one byte: a memory-mapped file guarantees no alignment.
        let mut bytes = vec![0];
        bytes.extend(random_blocks(block_type, rows * cols, 3));
        let all = Bytes::new(Arc::new(bytes));
        let window = all.slice(1..all.len()).unwrap();
        FrozenMatrix::new(window, block_type, rows, cols).unwrap()
    }

    /// Normally distributed values with outliers like those of activations.
    fn input(m: usize, cols: usize) -> Vec<f32> {
        let mut stream = Stream::new(4, "input", &[]);
        let value = |i| stream.normal() * if i % 100 == 7 { 8.0 } else { 1.0 };
        (0..m * cols).map(value).collect()
    }

    /// Dequantized weights times input in `f64`, and the sums of the products' magnitudes.
    fn reference(x: &[f32], w: &FrozenMatrix) -> (Vec<f64>, Vec<f64>) {
        let (rows, cols) = (w.rows(), w.cols());
        let mut weights = vec![0f32; rows * cols];
        w.read_tile(0..rows, 0..cols, &mut weights);
        let mut y = Vec::new();
        let mut sizes = Vec::new();
        for x in x.chunks_exact(cols) {
            for w in weights.chunks_exact(cols) {
                let products = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                y.push(products.clone().sum());
                sizes.push(products.map(f64::abs).sum());
            }
        }
        (y, sizes)
    }

    /// Compares both forms with the reference on every ISA level this CPU supports.
    fn check(w: &FrozenMatrix, m: usize) {
        let x = input(m, w.cols());
        let (exact, sizes) = reference(&x, w);
        for isa in Isa::available() {
            let name =
                format!("{} {}x{}, m {m}, {}", w.block_type(), w.rows(), w.cols(), isa.name());
            let mut y = vec![f32::NAN; exact.len()];
            f32(isa, &x, w, &mut y);
            for ((y, exact), size) in y.iter().zip(&exact).zip(&sizes) {
                let error = (f64::from(*y) - exact).abs() / size.max(1e-30);
                assert!(error < 1e-6, "{name}: f32 is off by {error:e}");
            }
            let error = frobenius(&y, &exact);
            assert!(error < 1e-5, "{name}: f32 is off by {error:e} in all");
            y.fill(f32::NAN);
            int16(isa, &x, w, &mut y);
            let error = frobenius(&y, &exact);
            assert!(error < 1e-3, "{name}: int16 is off by {error:e}");
        }
    }

    fn frobenius(y: &[f32], exact: &[f64]) -> f64 {
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let difference = norm(&mut y.iter().zip(exact).map(|(y, exact)| f64::from(*y) - exact));
        difference / norm(&mut exact.iter().copied())
    }

    #[test]
    fn every_block_type_on_every_isa_level() {
        for &block_type in BlockType::ALL {
            let block = block_type.block_len().max(32);
            for (rows, cols) in [(5, block), (7, 3 * block), (35, 2304), (19, 17 * block)] {
                let w = matrix(block_type, rows, cols);
                for m in [1, 3, 8] {
                    check(&w, m);
                }
            }
        }
    }

    #[test]
    fn floats_of_any_width() {
        for block_type in [BlockType::F32, BlockType::F16, BlockType::BF16] {
            for cols in [1, 31, 33, 100] {
                check(&matrix(block_type, 5, cols), 2);
            }
        }
    }

    #[test]
    fn interleaved_rows_go_where_they_belong() {
        for block_type in [BlockType::F16, BlockType::Q4_0, BlockType::Q6_K] {
            let w = matrix(block_type, 48, 512);
            check(&w.with_order(RowOrder::Interleaved { head_dim: 8 }).unwrap(), 3);
        }
    }

    #[test]
    fn a_grown_matrix_is_two_side_by_side() {
        for block_type in [BlockType::Q4_1, BlockType::Q6_K, BlockType::F16] {
            let w = matrix(block_type, 37, 768);
            let row = input(1, 768);
            let grown = w.grown(3, &row).unwrap();
            check(&grown, 3);
            for form in [f32, int16] {
                let x = input(5, 768);
                let (mut all, mut own) = (vec![0.0; 5 * 40], vec![0.0; 5 * 37]);
                form(Isa::current(), &x, &grown, &mut all);
                form(Isa::current(), &x, &w, &mut own);
                for (all, own) in all.chunks_exact(40).zip(own.chunks_exact(37)) {
                    assert_eq!(&all[..37], own, "{block_type}");
                }
            }
        }
    }

    /// The epilogue is called for every row once, also of a matrix with appended rows, whose two parts need
    /// not meet at a block boundary; and its low-rank update is added to every row.
    #[test]
    fn what_follows_a_product_reaches_every_row() {
        use candle_core::{Device, Var};
        use quantune_adapters::decode::DecodeWeights;
        use quantune_adapters::delta::Lora;

        use crate::ops::low_rank::{BatchRows, expand};

        let (r, cols, own) = (4, 768, 37);
        let w = matrix(BlockType::Q4_1, own, cols);
        for more in [0, 1, 3, 16, 30] {
            let w = match more {
                0 => w.clone(),
                more => w.grown(more, &input(1, cols)).unwrap(),
            };
            let rows = own + more;
            let mut stream = Stream::new(5, "update", &[more as u64]);
            let mut draw = |rows: usize, cols: usize| {
                let values: Vec<f32> = (0..rows * cols).map(|_| stream.normal()).collect();
                Var::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
            };
            let lora = Lora::new(draw(r, 16), draw(rows, r), 1.0);
            let form = DecodeWeights::<f32>::new(&lora, None).unwrap();
            let lows: Vec<f32> = (0..3).flat_map(|token| [1.0, 2.0, 3.0, token as f32]).collect();
            let b = lora.b.to_vec2::<f32>().unwrap();
            let x = input(3, cols);
            for isa in Isa::available() {
                let mut base = vec![0.0; 3 * rows];
                int16(isa, &x, &w, &mut base);
                let mut y = vec![f32::NAN; 3 * rows];
                let epilogue = |product: usize, range: Range<usize>, y: SharedMutPtr| {
                    assert_eq!((product, y.len()), (0, 3 * rows));
                    let tokens = BatchRows { tokens: &[0, 1, 2], stride: rows };
                    // SAFETY: no other thread accesses these rows.
                    unsafe { expand(isa, &form, range, &lows, y, tokens) };
                };
                let fused = FusedTasks { tasks: 0, run: &|_| (), epilogue: &epilogue };
                int16_many(isa, &x, &mut [(&w, &mut y)], fused);
                for (at, (y, base)) in y.iter().zip(&base).enumerate() {
                    let low = &lows[at / rows * 4..][..4];
                    let update: f32 = low.iter().zip(&b[at % rows]).map(|(low, b)| low * b).sum();
                    let error = (y - base - update).abs();
                    assert!(error < 1e-3, "{} + {more} rows, {at}: {y} is off by {error}", own);
                }
            }
        }
    }

    #[test]
    fn a_row_alone_and_among_others_has_the_same_bits() {
        let types = BlockType::ALL.iter().flat_map(|block_type| {
            // A multiple of sixteen groups and half of that, or one group more.
            let widths = if block_type.block_len() <= 32 { &[768, 544][..] } else { &[768] };
            widths.iter().map(move |cols| (*block_type, *cols))
        });
        for (block_type, cols) in types {
            let w = matrix(block_type, 37, cols);
            let x = input(15, cols);
            for isa in Isa::available() {
                for form in [f32, int16] {
                    let mut among = vec![0.0; 15 * 37];
                    form(isa, &x, &w, &mut among);
                    for (x, among) in x.chunks_exact(cols).zip(among.chunks_exact(37)) {
                        let mut alone = vec![0.0; 37];
                        form(isa, x, &w, &mut alone);
                        assert_eq!(alone, among, "{block_type} {}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn several_matrices_in_one_region_on_any_number_of_threads() {
        let x = input(2, 512);
        let types = [BlockType::Q4_K, BlockType::BF16, BlockType::Q6_K, BlockType::Q8_0];
        let matrices = types.map(|block_type| matrix(block_type, 330, 512));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut ys = vec![vec![0.0; 2 * 330]; matrices.len()];
            let mut products: Vec<RowProduct> =
                matrices.iter().zip(&mut ys).map(|(w, y)| (w, &mut y[..])).collect();
            pool.install(|| int16_many(Isa::current(), &x, &mut products, FusedTasks::NOTHING));
            ys
        };
        let ys = run(1);
        assert_eq!(ys, run(3));
        // In a worker pool too, with fused tasks, which run once and before every epilogue.
        let in_team = || {
            let mut ys = vec![vec![0.0; 2 * 330]; matrices.len()];
            let mut products: Vec<RowProduct> =
                matrices.iter().zip(&mut ys).map(|(w, y)| (w, &mut y[..])).collect();
            let counts = [const { AtomicUsize::new(0) }; 7];
            let run = |task: usize| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            };
            let epilogue = |_: usize, _: Range<usize>, _: SharedMutPtr| {
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            };
            let fused = FusedTasks { tasks: counts.len(), run: &run, epilogue: &epilogue };
            int16_many(Isa::current(), &x, &mut products, fused);
            ys
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for _ in 0..50 {
            assert_eq!(ys, pool.install(|| worker_pool::with_worker_pool(in_team)));
        }
        for (w, y) in matrices.iter().zip(&ys) {
            let mut alone = vec![0.0; 2 * 330];
            int16(Isa::current(), &x, w, &mut alone);
            assert_eq!(*y, alone);
        }
    }

    #[test]
    fn a_panic_of_a_fused_task_propagates() {
        use std::panic::{AssertUnwindSafe, catch_unwind};

        let (w, x) = (matrix(BlockType::Q4_0, 960, 512), input(1, 512));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for bad in 0..4 {
            let run = |task: usize| assert!(task != bad, "task {task}");
            let fused = FusedTasks { tasks: 4, run: &run, ..FusedTasks::NOTHING };
            let mut y = vec![0.0; 960];
            let product = || int16_many(Isa::current(), &x, &mut [(&w, &mut y)], fused);
            let product = AssertUnwindSafe(product);
            let caught =
                pool.install(|| catch_unwind(|| worker_pool::with_worker_pool({ product }.0)));
            assert_eq!(*caught.unwrap_err().downcast::<String>().unwrap(), format!("task {bad}"));
        }
    }

    #[test]
    fn nothing_is_hidden_by_rounding() {
        let types = [BlockType::Q4_0, BlockType::Q8_0, BlockType::Q6_K];
        for (block_type, m) in types.into_iter().flat_map(|of| [1, 2, 4, 8].map(|m| (of, m))) {
            // Whole tiles and a remainder.
            let w = matrix(block_type, 37, 512);
            for isa in Isa::available() {
                let y = |value: f32| {
                    let (mut x, mut y) = (input(m, 512), vec![0.0; m * 37]);
                    x[(m - 1) * 512 + 300] = value;
                    int16(isa, &x, &w, &mut y);
                    y
                };
                let finite = y(1.0);
                for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let y = y(value);
                    let (others, last) = y.split_at((m - 1) * 37);
                    assert!(last.iter().all(|y| !y.is_finite()), "{block_type} {m} {}", isa.name());
                    assert_eq!(others, &finite[..others.len()]);
                }
                let mut y = vec![f32::NAN; m * 37];
                int16(isa, &vec![0.0; m * 512], &w, &mut y);
                assert!(y.iter().all(|y| *y == 0.0), "{block_type} {m} {}", isa.name());
            }
        }
    }
}
