//! Matrix products with quantized weights read from their blocks: a packed, blocked GEMM (Goto and van
//! de Geijn 2008) whose right operand is dequantized panel by panel into the L2 cache.
//!
//! No dequantized weights are kept between calls. The panel type determines the precision of a product:
//! `f32`, or integers that share a scale along the contraction (block-floating), whose products
//! AVX-512 VNNI adds up at twice (`i16`) and four times (`i8`) the rate of `f32`.
//!
//! An element of the result is summed by one task in a fixed order, and depends only on its own row of the
//! left operand. So the bits depend neither on the number of threads, by which rows and columns
//! are partitioned, nor on the other rows.

mod kernel;
mod pack;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

pub(crate) use pack::{PackedRows, PanelType, Strided, Weights};

use super::cpu::SharedMutPtr;
use crate::isa::Isa;
use kernel::{
    BlockFloatOperand, TILE_COLS, TILE_ROWS, Tile, f32_tile, f32_tile_in_place, int8_tile,
    int16_tile,
};
use pack::PackedColumns;

/// Columns of a task: its panels stay in the L2 cache.
const COLUMN_GROUP: usize = 3 * TILE_COLS;
/// The same for types whose blocks are longer.
const LONG_COLUMN_GROUP: usize = 8 * TILE_COLS;
/// The most rows of a task, and, with several threads, the fewest: packing its
/// columns should cost little compared with multiplying. Floats are packed faster than blocks.
const MAX_ROWS: usize = 172 * TILE_ROWS;
const MAX_ROWS_OF_FLOATS: usize = 86 * TILE_ROWS;
const MIN_ROWS: usize = 8 * TILE_ROWS;
/// Tasks per thread, for load balancing.
const TASKS_PER_THREAD: usize = 4;
/// Units of the contraction packed at a time, for a group and for a long one: as many as fit the
/// L2 cache together with the rows. The update of an adapter fits together with 1536 `i16`.
const DEPTH_BLOCK: usize = 768 + 64;
const LONG_DEPTH_BLOCK: usize = 256 + 64;

/// One product in a sum of products.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Term<'a> {
    /// The left operand `(rows, depth)`.
    pub x: &'a PackedRows,
    /// The right operand.
    pub weights: Weights<'a>,
    /// Whether the right operand is transposed: `x · Wᵀ`, else `x · W`.
    pub transposed: bool,
}

impl Term<'_> {
    fn columns(&self) -> usize {
        if self.transposed { self.weights.rows() } else { self.weights.cols() }
    }

    fn depth(&self) -> usize {
        if self.transposed { self.weights.cols() } else { self.weights.rows() }
    }
}

/// The initial value of the sums.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Init<'a> {
    /// 0.
    Zero,
    /// A value per column.
    Bias(&'a [f32]),
    /// The values already in the output.
    Add,
}

/// The output: row `i` begins at `i · stride` of a buffer that is borrowed exclusively, so
/// that no two products can write the same elements.
pub(crate) struct Out<'a> {
    target: SharedMutPtr,
    stride: usize,
    buffer: PhantomData<&'a mut [f32]>,
}

impl<'a> Out<'a> {
    /// Rows `stride` values apart; a product may have fewer columns than that.
    pub(crate) fn new(values: &'a mut [f32], stride: usize) -> Self {
        Self { target: SharedMutPtr::new(values), stride, buffer: PhantomData }
    }
}

/// `out = init + Σ x · W`, or with `Wᵀ`.
pub(crate) struct Product<'a> {
    /// The products to sum; all have the same rows and columns.
    pub terms: Vec<Term<'a>>,
    /// The initial value of the sums.
    pub init: Init<'a>,
    /// The output.
    pub out: Out<'a>,
}

/// Computes several products in one parallel region.
///
/// # Panics
/// If shapes do not match: a bug of the caller.
pub(crate) fn multiply(isa: Isa, products: &mut [Product]) {
    let products = &*products;
    let groups: usize = products.iter().map(Product::groups).sum();
    let parts = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(groups.max(1));
    let tasks: Vec<(&Product, Range<usize>, Range<usize>)> =
        products.iter().flat_map(|product| tasks(product, parts)).collect();
    let run = |(product, rows, columns): &(&Product, Range<usize>, Range<usize>)| {
        thread_local!(static SCRATCH: RefCell<GemmScratch> = RefCell::default());
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: tasks of a product have disjoint rows and columns, and each product has
            // its own buffer: `Out` borrows it exclusively, and `products` is borrowed exclusively.
            unsafe { task(isa, product, rows.clone(), columns.clone(), scratch) }
        });
    };
    match &tasks[..] {
        [one] => run(one),
        tasks => tasks.par_iter().with_max_len(1).for_each(run),
    }
}

impl Product<'_> {
    /// Columns of a task. Only panels that are not transposed split along the blocks.
    fn group(&self) -> usize {
        let long = self.terms.iter().any(|t| !t.transposed && t.weights.block_len() > TILE_COLS);
        if long { LONG_COLUMN_GROUP } else { COLUMN_GROUP }
    }

    fn groups(&self) -> usize {
        self.terms.first().map_or(0, |term| term.columns().div_ceil(self.group()))
    }
}

/// Row and column ranges of a product's tasks, with the rows split into about this many parts.
fn tasks<'p, 'a>(
    product: &'p Product<'a>,
    parts: usize,
) -> impl Iterator<Item = (&'p Product<'a>, Range<usize>, Range<usize>)> + use<'p, 'a> {
    let first = product.terms.first().expect("a product has a term");
    let (rows, columns) = (first.x.rows, first.columns());
    for term in &product.terms {
        assert_eq!((term.x.rows, term.columns()), (rows, columns), "terms of one shape");
        assert_eq!(term.x.depth, term.depth(), "both sides of one depth");
    }
    let out = &product.out;
    assert!(rows < 2 || columns <= out.stride, "rows of a result do not overlap");
    let end = |row: usize| row.checked_mul(out.stride)?.checked_add(columns);
    assert!(rows == 0 || end(rows - 1).is_some_and(|end| end <= out.target.len()));
    if let Init::Bias(bias) = product.init {
        assert_eq!(bias.len(), columns);
    }
    let dense = |term: &Term| matches!(term.weights, Weights::Dense { .. });
    let most = if product.terms.iter().all(dense) { MAX_ROWS_OF_FLOATS } else { MAX_ROWS };
    let part = rows.div_ceil(parts.max(1)).clamp(MIN_ROWS, most);
    let part = rows.div_ceil(rows.div_ceil(part).max(1)).next_multiple_of(TILE_ROWS);
    let row_ranges = (0..rows).step_by(part.max(1)).map(move |r| r..rows.min(r + part));
    let group = product.group();
    row_ranges.flat_map(move |rows| {
        let groups = (0..columns).step_by(group).map(move |c| c..columns.min(c + group));
        groups.map(move |columns| (product, rows.clone(), columns))
    })
}

/// Panels of one thread, reused by every task.
#[derive(Default)]
struct GemmScratch {
    packed: Vec<PackedColumns>,
}

/// A range of the contraction of one term, its columns packed in the scratch.
struct DepthBlock<'a> {
    x: &'a PackedRows,
    depth: Range<usize>,
}

/// # Safety
/// No other thread accesses these rows and columns of `out`.
unsafe fn task(
    isa: Isa,
    product: &Product,
    rows: Range<usize>,
    columns: Range<usize>,
    scratch: &mut GemmScratch,
) {
    let most = if columns.len() > COLUMN_GROUP { LONG_DEPTH_BLOCK } else { DEPTH_BLOCK };
    let mut init = product.init;
    let mut depth_blocks: Vec<DepthBlock> = Vec::new();
    let mut units = 0;
    for term in &product.terms {
        let panel = term.x.panel;
        // At a block boundary of every type.
        let step = most / 256 * 256 * panel.values_per_unit();
        for first in (0..term.x.depth).step_by(step) {
            let depth = first..term.x.depth.min(first + step);
            let needed = panel.units(depth.len());
            if units + needed > most && !depth_blocks.is_empty() {
                // SAFETY: this function's contract guarantees that no other thread accesses these rows and
                // columns of `out`.
                unsafe { tiles(isa, &depth_blocks, scratch, &rows, &columns, init, &product.out) };
                init = Init::Add;
                depth_blocks.clear();
                units = 0;
            }
            units += needed;
            if scratch.packed.len() == depth_blocks.len() {
                scratch.packed.push(PackedColumns::default());
            }
            let packed = &mut scratch.packed[depth_blocks.len()];
            depth_blocks.push(DepthBlock { x: term.x, depth: depth.clone() });
            if term.transposed {
                packed.pack_transposed(isa, panel, term.weights, columns.clone(), depth)
            } else {
                packed.pack_straight(isa, panel, term.weights, columns.clone(), depth)
            }
        }
    }
    // SAFETY: this function's contract guarantees that no other thread accesses these rows and columns of
    // `out`.
    unsafe { tiles(isa, &depth_blocks, scratch, &rows, &columns, init, &product.out) };
}

/// All tiles of a task over the packed columns. A tile stays in the L1 cache until all
/// ranges are summed.
///
/// # Safety
/// As [`task`].
unsafe fn tiles(
    isa: Isa,
    depth_blocks: &[DepthBlock],
    scratch: &GemmScratch,
    rows: &Range<usize>,
    columns: &Range<usize>,
    init: Init,
    out: &Out,
) {
    let floats = depth_blocks.iter().all(|depth_block| depth_block.x.panel == PanelType::F32);
    let mut tile = Tile([[0.0; TILE_COLS]; TILE_ROWS]);
    for first_row in rows.clone().step_by(TILE_ROWS) {
        let count = TILE_ROWS.min(rows.end - first_row);
        for (i, first_column) in columns.clone().step_by(TILE_COLS).enumerate() {
            let width = TILE_COLS.min(columns.end - first_column);
            if count == TILE_ROWS && width == TILE_COLS && floats {
                // SAFETY: this function's contract guarantees that no other thread accesses these rows and
                // columns of `out`.
                unsafe {
                    whole_tile(isa, depth_blocks, scratch, first_row, first_column, i, init, out)
                };
                continue;
            }
            let row_of = |row: usize| {
                let at = out.target.at((first_row + row) * out.stride + first_column);
                // SAFETY: elements of this task, one row at a time.
                unsafe { at.slice(width) }
            };
            match init {
                Init::Zero => tile.0 = [[0.0; TILE_COLS]; TILE_ROWS],
                Init::Bias(bias) => {
                    for row in &mut tile.0 {
                        copy(&bias[first_column..][..width], row);
                    }
                }
                Init::Add => {
                    for (i, row) in tile.0[..count].iter_mut().enumerate() {
                        copy(row_of(i), row);
                    }
                }
            }
            for (depth_block, packed) in depth_blocks.iter().zip(&scratch.packed) {
                let (x, depth) = (depth_block.x, &depth_block.depth);
                let a = x.tile(first_row / TILE_ROWS, depth.start, depth.len());
                add(isa, x.panel, depth.len(), a, packed, i, &mut tile);
            }
            for (i, row) in tile.0[..count].iter().enumerate() {
                copy(row, row_of(i));
            }
        }
    }
}

/// One whole tile of floats, the `i`-th panel of columns, in place.
///
/// # Safety
/// As [`task`].
#[allow(clippy::too_many_arguments)] // position of the tile
unsafe fn whole_tile(
    isa: Isa,
    depth_blocks: &[DepthBlock],
    scratch: &GemmScratch,
    first_row: usize,
    first_column: usize,
    i: usize,
    init: Init,
    out: &Out,
) {
    const ZEROS: &[f32; TILE_COLS] = &[0.0; TILE_COLS];
    let needed = |stride: usize| (TILE_ROWS - 1) * stride + TILE_COLS;
    let at = out.target.at(first_row * out.stride + first_column);
    let out = (at.pointer(needed(out.stride)), out.stride);
    let mut init = match init {
        Init::Zero => (ZEROS.as_ptr(), 0),
        Init::Bias(bias) => (bias[first_column..][..TILE_COLS].as_ptr(), 0),
        Init::Add => (out.0.cast_const(), out.1),
    };
    for (depth_block, packed) in depth_blocks.iter().zip(&scratch.packed) {
        let depth = &depth_block.depth;
        let (a, _) = depth_block.x.tile(first_row / TILE_ROWS, depth.start, depth.len());
        let b = &packed.units[i * depth.len() * TILE_COLS..][..depth.len() * TILE_COLS];
        // SAFETY: both tiles are in bounds; only this task accesses that of `out`.
        unsafe { f32_tile_in_place(isa, a, b, init, out) };
        init = (out.0.cast_const(), out.1);
    }
}

/// Adds the product of a tile of rows and the `i`-th panel of columns.
#[inline(always)]
fn add(
    isa: Isa,
    panel: PanelType,
    depth: usize,
    (a_units, a_scales): (&[u32], &[f32]),
    packed: &PackedColumns,
    i: usize,
    tile: &mut Tile,
) {
    let (units, blocks) = (panel.units(depth), panel.blocks(depth));
    let b_units = &packed.units[i * units * TILE_COLS..][..units * TILE_COLS];
    let at = i * blocks * TILE_COLS..(i + 1) * blocks * TILE_COLS;
    let a = BlockFloatOperand { units: a_units, scales: a_scales };
    let b = BlockFloatOperand { units: b_units, scales: &packed.scales[at.clone()] };
    let per_block = panel.units_per_block();
    match panel {
        PanelType::F32 => f32_tile(isa, a_units, b_units, tile),
        PanelType::Int16 => int16_tile(isa, a, b, per_block, tile),
        PanelType::Int8 => int8_tile(isa, a, b, &packed.offsets[at], per_block, tile),
    }
}

/// Copies as many values as fit; a whole row of a tile without calling `memcpy`.
#[inline(always)]
fn copy(from: &[f32], to: &mut [f32]) {
    match (<&[f32; TILE_COLS]>::try_from(from), <&mut [f32; TILE_COLS]>::try_from(&mut *to)) {
        (Ok(from), Ok(to)) => *to = *from,
        _ => to.iter_mut().zip(from).for_each(|(to, from)| *to = *from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::normal;
    use crate::quant::testing::random_blocks;
    use crate::quant::{BlockType, Bytes, FrozenMatrix};
    use std::sync::Arc;

    fn values(seed: u64, len: usize) -> Vec<f32> {
        normal(seed, &[len]).to_vec1().unwrap()
    }

    fn matrix(block_type: BlockType, rows: usize, cols: usize) -> FrozenMatrix {
        let bytes = random_blocks(block_type, rows * cols, 5);
        FrozenMatrix::new(Bytes::new(Arc::new(bytes)), block_type, rows, cols).unwrap()
    }

    fn dense(weights: Weights) -> Vec<f32> {
        let mut out = vec![0.0; weights.rows() * weights.cols()];
        match weights {
            Weights::Frozen(m) => m.read_tile(0..m.rows(), 0..m.cols(), &mut out),
            Weights::Dense { values, scale, .. } => {
                out = values.iter().map(|v| v * scale).collect();
            }
        }
        out
    }

    /// `x · W` or `x · Wᵀ` in f64.
    fn exact(x: &[f32], m: usize, weights: Weights, transposed: bool) -> Vec<f64> {
        let (w, cols) = (dense(weights), weights.cols());
        let (n, k) = if transposed { (weights.rows(), cols) } else { (cols, weights.rows()) };
        let mut y = vec![0f64; m * n];
        for i in 0..m {
            for j in 0..n {
                let at = |l: usize| if transposed { j * cols + l } else { l * cols + j };
                y[i * n + j] = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(w[at(l)])).sum();
            }
        }
        y
    }

    fn error(found: &[f32], exact: &[f64]) -> f64 {
        let difference: f64 =
            found.iter().zip(exact).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
        (difference / exact.iter().map(|v| v * v).sum::<f64>()).sqrt()
    }

    fn run(
        isa: Isa,
        panel: PanelType,
        x: &[f32],
        m: usize,
        weights: Weights,
        transposed: bool,
    ) -> Vec<f32> {
        let k = x.len() / m;
        let mut packed = PackedRows::default();
        packed.pack(isa, panel, Strided { values: x, stride: k }, m, k);
        let n = if transposed { weights.rows() } else { weights.cols() };
        let mut y = vec![f32::NAN; m * n];
        let terms = vec![Term { x: &packed, weights, transposed }];
        let out = Out::new(&mut y, n);
        multiply(isa, &mut [Product { terms, init: Init::Zero, out }]);
        y
    }

    /// Every panel, ISA level, direction and block type against f64; integer panels give the same bits
    /// on every ISA level.
    #[test]
    fn every_isa_level_agrees_with_f64() {
        for &block_type in BlockType::ALL {
            for (m, rows, cols) in [(1, 40, 256), (29, 129, 512)] {
                let w = matrix(block_type, rows, cols);
                let w = Weights::Frozen(&w);
                for (panel, transposed, bound) in [
                    (PanelType::F32, true, 1e-6),
                    (PanelType::F32, false, 1e-6),
                    (PanelType::Int16, true, 3e-4),
                    (PanelType::Int16, false, 3e-4),
                    (PanelType::Int8, true, 2e-2),
                ] {
                    let x = values(1, m * if transposed { cols } else { rows });
                    let exact = exact(&x, m, w, transposed);
                    let mut first: Option<Vec<f32>> = None;
                    for isa in Isa::available() {
                        let y = run(isa, panel, &x, m, w, transposed);
                        let error = error(&y, &exact);
                        let case = format!("{block_type} {panel:?} {} {transposed}", isa.name());
                        assert!(error < bound, "{case}: {error:e}");
                        assert!(panel == PanelType::F32 || error > 0.0, "{case} is too good");
                        if panel != PanelType::F32 {
                            assert_eq!(first.get_or_insert_with(|| y.clone()), &y, "{case}");
                        }
                    }
                }
            }
        }
    }

    /// Odd sizes, several terms, bias, accumulation, and long contractions.
    #[test]
    fn shapes_terms_and_beginnings() {
        let sizes = [(1, 1, 1), (13, 33, 5), (25, 97, 131), (1100, 40, 70), (3, 50, 3001)];
        for (m, n, k) in sizes {
            let (x, w, bias) = (values(1, m * k), values(2, n * k), values(3, n));
            let (low, b) = (values(4, m * 3), values(5, n * 3));
            let weights = Weights::Dense { values: &w, cols: k, scale: 1.0 };
            let update = Weights::Dense { values: &b, cols: 3, scale: 0.5 };
            let sum: Vec<f64> = exact(&x, m, weights, true)
                .iter()
                .zip(exact(&low, m, update, true))
                .map(|(a, b)| a + b)
                .collect();
            for isa in Isa::available() {
                for (panel, bound) in [(PanelType::F32, 1e-5), (PanelType::Int16, 1e-3)] {
                    let (mut xs, mut lows) = (PackedRows::default(), PackedRows::default());
                    xs.pack(isa, panel, Strided { values: &x, stride: k }, m, k);
                    lows.pack(isa, PanelType::F32, Strided { values: &low, stride: 3 }, m, 3);
                    let stride = n + 2;
                    let mut y = vec![1.0; m * stride];
                    for (init, added) in
                        [(Init::Bias(&bias), bias.clone()), (Init::Zero, vec![0.0; n])]
                    {
                        let terms = || {
                            vec![
                                Term { x: &xs, weights, transposed: true },
                                Term { x: &lows, weights: update, transposed: true },
                            ]
                        };
                        for init in [init, Init::Add] {
                            let out = Out::new(&mut y[1..], stride);
                            multiply(isa, &mut [Product { terms: terms(), init, out }]);
                        }
                        let expected: Vec<f64> =
                            (0..m * n).map(|i| 2.0 * sum[i] + f64::from(added[i % n])).collect();
                        let found: Vec<f32> =
                            y.chunks(stride).flat_map(|row| row[1..=n].to_vec()).collect();
                        let error = error(&found, &expected);
                        assert!(error < bound, "{m} {n} {k} {panel:?} {}: {error:e}", isa.name());
                        let edges = y.chunks(stride).all(|row| row[0] == 1.0 && row[n + 1] == 1.0);
                        assert!(edges, "wrote beside its columns");
                    }
                }
            }
        }
    }

    /// Blocks whose sums come close to the limits of `i32`, in both directions.
    #[test]
    fn sums_reach_the_limit_and_do_not_pass_it() {
        let shapes: [fn(usize) -> f32; 5] = [
            |_| 1.0,
            |i| if i % 2 == 0 { 1.0 } else { -1.0 },
            |i| if i % 128 == 3 { 7.0 } else { 0.0 },
            |i| if i % 128 < 2 { -3.0 } else { 1e-4 },
            |i| 1.0 + (i % 128) as f32,
        ];
        for shape in shapes {
            let x: Vec<f32> = (0..2 * 256).map(shape).collect();
            let w: Vec<f32> = (0..33 * 256).map(|i| -shape(i)).collect();
            let forward = Weights::Dense { values: &w, cols: 256, scale: 1.0 };
            let turned: Vec<f32> = (0..256 * 33).map(|i| -shape(i / 33)).collect();
            let backward = Weights::Dense { values: &turned, cols: 33, scale: 1.0 };
            for (weights, transposed) in [(forward, true), (backward, false)] {
                let exact = exact(&x, 2, weights, transposed);
                for isa in Isa::available() {
                    let error =
                        error(&run(isa, PanelType::Int16, &x, 2, weights, transposed), &exact);
                    assert!(error < 1e-3, "{} {transposed}: {error:e}", isa.name());
                }
            }
        }
    }

    /// A weight gradient: the left operand is packed transposed, the right one not, and sums are
    /// added to the values of a wider buffer.
    #[test]
    fn transposed_rows_are_added_to_a_gradient() {
        for (m, n, k) in [(1, 1, 1), (12, 32, 64), (83, 40, 131), (50, 96, 300), (24, 288, 1500)] {
            let (x, w, before) = (values(1, k * m), values(2, k * n), values(3, m * (n + 1)));
            let turned: Vec<f32> = (0..m * k).map(|i| x[i % k * m + i / k]).collect();
            let weights = Weights::Dense { values: &w, cols: n, scale: 1.0 };
            let exact: Vec<f64> = exact(&turned, m, weights, false)
                .iter()
                .enumerate()
                .map(|(i, y)| y + f64::from(before[i / n * (n + 1) + i % n]))
                .collect();
            for isa in Isa::available() {
                for (panel, bound) in [(PanelType::F32, 1e-5), (PanelType::Int16, 1e-3)] {
                    let mut packed = PackedRows::default();
                    packed.pack_transposed(isa, panel, Strided { values: &x, stride: m }, m, k);
                    let mut y = before.clone();
                    let terms = vec![Term { x: &packed, weights, transposed: false }];
                    let out = Out::new(&mut y, n + 1);
                    multiply(isa, &mut [Product { terms, init: Init::Add, out }]);
                    let rows = y.chunks(n + 1).zip(before.chunks(n + 1));
                    assert!(rows.clone().all(|(y, before)| y[n] == before[n]));
                    let y: Vec<f32> = rows.flat_map(|(y, _)| y[..n].to_vec()).collect();
                    let error = error(&y, &exact);
                    assert!(error < bound, "{m} {n} {k} {panel:?} {}: {error:e}", isa.name());
                }
            }
        }
    }

    /// A slice of a 3-D tensor gives the same bits as the same matrix alone.
    #[test]
    fn a_window_multiplies_like_the_matrix_alone() {
        for &block_type in BlockType::ALL {
            let (rows, cols) = (48, 256);
            let bytes = random_blocks(block_type, 3 * rows * cols, 5);
            let whole = Bytes::new(Arc::new(bytes.clone()));
            let whole = FrozenMatrix::new(whole, block_type, 3 * rows, cols).unwrap();
            for (i, bytes) in bytes.chunks(bytes.len() / 3).enumerate() {
                let alone = Bytes::new(Arc::new(bytes.to_vec()));
                let alone = FrozenMatrix::new(alone, block_type, rows, cols).unwrap();
                let window = whole.window(i * rows..(i + 1) * rows).unwrap();
                let x = values(1, 5 * cols);
                for panel in [PanelType::F32, PanelType::Int16] {
                    let product = |w| run(Isa::current(), panel, &x, 5, Weights::Frozen(w), true);
                    assert_eq!(product(&window), product(&alone), "{block_type} {panel:?}");
                }
                let product = |w: &FrozenMatrix| {
                    let mut y = vec![0.0; 5 * rows];
                    crate::ops::row_dot::int16(Isa::current(), &x, w, &mut y);
                    y
                };
                assert_eq!(product(&window), product(&alone), "{block_type} row by row");
            }
            assert!(whole.window(2 * rows..4 * rows).is_err());
        }
    }

    #[test]
    fn rows_are_independent() {
        let w = matrix(BlockType::Q4_0, 70, 96);
        let x = values(1, 30 * 96);
        for panel in [PanelType::F32, PanelType::Int16, PanelType::Int8] {
            let isa = Isa::current();
            let all = run(isa, panel, &x, 30, Weights::Frozen(&w), true);
            for row in [0, 7, 29] {
                let alone = run(isa, panel, &x[row * 96..][..96], 1, Weights::Frozen(&w), true);
                assert_eq!(alone, all[row * 70..][..70]);
            }
        }
    }

    /// NaN and Inf propagate through the integer panels.
    #[test]
    fn nan_and_inf_propagate() {
        let w = values(2, 40 * 64);
        let weights = Weights::Dense { values: &w, cols: 64, scale: 1.0 };
        for isa in Isa::available() {
            for panel in [PanelType::F32, PanelType::Int16, PanelType::Int8] {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut x = values(1, 3 * 64);
                    x[64 + 5] = bad;
                    let y = run(isa, panel, &x, 3, weights, true);
                    assert!(y[40..80].iter().all(|v| !v.is_finite()), "{panel:?} {}", isa.name());
                    let rest = y[..40].iter().chain(&y[80..]);
                    assert!(rest.clone().all(|v| v.is_finite()));
                }
            }
        }
    }
}
