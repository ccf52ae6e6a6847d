//! Packing: copies values into panels, in the order in which a kernel reads them.
//!
//! A panel holds the contraction in 32-bit *units*: one `f32`, two `i16` or four bytes. Integer
//! panels are block-floating: each row (or column) has a scale per block of the contraction. A
//! scale of `i16` is the smallest one that keeps the block's Euclidean norm below the root of 2^31: by
//! the Cauchy-Schwarz inequality no sum or partial sum of a block's products then overflows an `i32`. That
//! gives a block three to eight times the levels of a scale from the largest magnitude alone.

use std::cell::RefCell;

use crate::isa::{Isa, IsaLevel, multiversion};
use crate::quant::FrozenMatrix;

use super::kernel::{TILE_COLS, TILE_ROWS};
use crate::ops::cpu::SharedMutPtr;

/// The element type of panels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PanelType {
    /// Unquantized `f32`.
    F32,
    /// 16-bit integers with a scale per 128 values.
    Int16,
    /// Bytes with a scale per 32 values.
    Int8,
}

impl PanelType {
    /// Values of the contraction in one unit.
    pub(crate) fn values_per_unit(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Int16 => 2,
            Self::Int8 => 4,
        }
    }

    /// Values of the contraction that share a scale. `f32` has none; its blocks are nominal.
    pub(crate) const fn block(self) -> usize {
        match self {
            Self::F32 | Self::Int16 => 128,
            Self::Int8 => 32,
        }
    }

    pub(crate) fn units(self, values: usize) -> usize {
        values.div_ceil(self.values_per_unit())
    }

    pub(crate) fn blocks(self, values: usize) -> usize {
        match self {
            Self::F32 => 0,
            Self::Int16 | Self::Int8 => values.div_ceil(self.block()),
        }
    }

    pub(crate) fn units_per_block(self) -> usize {
        self.block() / self.values_per_unit()
    }
}

/// The weights of a product: `(rows, cols)`, read a tile at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weights<'a> {
    /// Frozen blocks.
    Frozen(&'a FrozenMatrix),
    /// Row-major `f32` values times `scale`: a factor of an adapter.
    Dense {
        /// `rows · cols` values.
        values: &'a [f32],
        /// Width of a row.
        cols: usize,
        /// Factor of every value.
        scale: f32,
    },
}

impl Weights<'_> {
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Frozen(matrix) => matrix.rows(),
            Self::Dense { values, cols, .. } => values.len() / cols.max(&1),
        }
    }

    pub(crate) fn cols(&self) -> usize {
        match self {
            Self::Frozen(matrix) => matrix.cols(),
            Self::Dense { cols, .. } => *cols,
        }
    }

    /// Number of values that are decoded together: the block length.
    pub(crate) fn block_len(&self) -> usize {
        match self {
            Self::Frozen(matrix) => matrix.block_type().block_len(),
            Self::Dense { .. } => 1,
        }
    }

    /// Columns `first..first + out.len()` of one row.
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        match self {
            Self::Frozen(matrix) => matrix.read_tile(row..row + 1, first..first + out.len(), out),
            Self::Dense { values, cols, scale } => {
                let at = row * cols + first;
                for (out, value) in out.iter_mut().zip(&values[at..]) {
                    *out = value * scale;
                }
            }
        }
    }
}

/// A row-major matrix inside a wider buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strided<'a> {
    /// From the first row's first value on.
    pub values: &'a [f32],
    /// Values from one row to the next.
    pub stride: usize,
}

/// The left operand of products, packed once for all products that share it: `(rows, depth)` in tiles of
/// [`TILE_ROWS`] rows. Its buffers are reused.
#[derive(Debug, Clone)]
pub(crate) struct PackedRows {
    pub panel: PanelType,
    pub rows: usize,
    pub depth: usize,
    /// `(tiles, units, TILE_ROWS)`.
    units: Vec<u32>,
    /// `(tiles, blocks, TILE_ROWS)`.
    scales: Vec<f32>,
}

impl Default for PackedRows {
    fn default() -> Self {
        let (units, scales) = (Vec::new(), Vec::new());
        Self { panel: PanelType::F32, rows: 0, depth: 0, units, scales }
    }
}

impl PackedRows {
    /// Packs `x (rows, depth)`, in parallel over tiles of rows.
    pub(crate) fn pack(
        &mut self,
        isa: Isa,
        panel: PanelType,
        x: Strided,
        rows: usize,
        depth: usize,
    ) {
        use rayon::prelude::*;
        let end = |rows: usize| (rows - 1).checked_mul(x.stride)?.checked_add(depth);
        assert!(rows == 0 || end(rows).is_some_and(|end| end <= x.values.len()));
        let tiles = rows.div_ceil(TILE_ROWS);
        let (units, blocks) = (panel.units(depth), panel.blocks(depth));
        (self.panel, self.rows, self.depth) = (panel, rows, depth);
        self.units.resize(tiles * units * TILE_ROWS, 0);
        self.scales.resize(tiles * blocks * TILE_ROWS, 0.0);
        if units == 0 {
            return;
        }
        let scales = self.scales.as_mut_slice();
        let scales: Vec<&mut [f32]> = match blocks {
            0 => (0..tiles).map(|_| Default::default()).collect(),
            _ => scales.chunks_exact_mut(blocks * TILE_ROWS).collect(),
        };
        thread_local!(static SCRATCH: RefCell<RowScratch> = RefCell::default());
        let tiles = self.units.par_chunks_exact_mut(units * TILE_ROWS).zip(scales);
        tiles.enumerate().with_min_len(4).for_each(|(tile, (out, scales))| {
            SCRATCH.with_borrow_mut(|scratch| {
                let first = tile * TILE_ROWS;
                // Whole cache lines of floats are transposed without a copy.
                let lying = &x.values[first * x.stride..];
                if panel == PanelType::F32 && depth == x.stride && may_transpose(lying, depth) {
                    // SAFETY: any bits are a `u32`, whose alignment is the same.
                    let units_of = unsafe { lying.align_to::<u32>().1 };
                    transpose(isa, (units_of, x.stride), (TILE_ROWS, units), out, TILE_ROWS);
                    return;
                }
                for row in 0..TILE_ROWS.min(rows - first) {
                    let x = &x.values[(first + row) * x.stride..][..depth];
                    scratch.quantize(isa, panel, x, row, true);
                }
                for row in rows.saturating_sub(first).min(TILE_ROWS)..TILE_ROWS {
                    scratch.clear(panel, depth, row);
                }
                scratch.write::<TILE_ROWS>(isa, (units, blocks), TILE_ROWS, out, scales);
            });
        });
    }

    /// Packs the transpose of `x (depth, rows)`: the left operand of a weight gradient, `dyᵀ · x`.
    ///
    /// # Panics
    /// For [`PanelType::Int8`], which only forward products use.
    pub(crate) fn pack_transposed(
        &mut self,
        isa: Isa,
        panel: PanelType,
        x: Strided,
        rows: usize,
        depth: usize,
    ) {
        use rayon::prelude::*;
        let end = |depth: usize| (depth - 1).checked_mul(x.stride)?.checked_add(rows);
        assert!(depth == 0 || end(depth).is_some_and(|end| end <= x.values.len()));
        assert!(panel != PanelType::Int8, "bytes serve forward products only");
        let tiles = rows.div_ceil(TILE_ROWS);
        let (units, blocks) = (panel.units(depth), panel.blocks(depth));
        (self.panel, self.rows, self.depth) = (panel, rows, depth);
        self.units.resize(tiles * units * TILE_ROWS, 0);
        self.scales.resize(tiles * blocks * TILE_ROWS, 0.0);
        if units == 0 || tiles == 0 {
            return;
        }
        // Neighbouring tiles share the cache lines they are read from.
        const TILES: usize = 4;
        let scales = SharedMutPtr::new(&mut self.scales);
        let groups = self.units.par_chunks_mut(TILES * units * TILE_ROWS).enumerate();
        groups.for_each(|(group, out)| {
            let mut few = [0f32; PanelType::F32.block() * TILE_ROWS];
            for (block, first) in (0..depth).step_by(panel.block()).enumerate() {
                let count = panel.block().min(depth - first);
                for (i, out) in out.chunks_exact_mut(units * TILE_ROWS).enumerate() {
                    let tile = group * TILES + i;
                    let width = TILE_ROWS.min(rows - tile * TILE_ROWS);
                    let mut values = &x.values[first * x.stride + tile * TILE_ROWS..];
                    let mut stride = x.stride;
                    // Partial tiles are copied and zero-padded.
                    if width < TILE_ROWS || !count.is_multiple_of(panel.values_per_unit()) {
                        few.fill(0.0);
                        let lines = values.chunks(stride).zip(few.chunks_exact_mut(TILE_ROWS));
                        lines.take(count).for_each(|(from, to)| {
                            to[..width].copy_from_slice(&from[..width]);
                        });
                        (values, stride) = (&few, TILE_ROWS);
                    }
                    let at = panel.units(first) * TILE_ROWS;
                    let out = &mut out[at..at + panel.units(count) * TILE_ROWS];
                    match panel {
                        PanelType::F32 => f32_rows(isa, values, stride, out),
                        PanelType::Int16 => {
                            let at = (tile * blocks + block) * TILE_ROWS;
                            // SAFETY: only this task accesses the scales of this tile and block.
                            let scales = unsafe { scales.at(at).slice(TILE_ROWS) };
                            int16_rows(isa, values, stride, count, out, scales);
                        }
                        PanelType::Int8 => unreachable!("refused above"),
                    }
                }
            }
        });
    }

    /// Units and scales of one tile of rows, from value `first` of the contraction on; `first` must be
    /// at a block boundary.
    pub(crate) fn tile(&self, tile: usize, first: usize, values: usize) -> (&[u32], &[f32]) {
        let (units, blocks) = (self.panel.units(self.depth), self.panel.blocks(self.depth));
        let at = tile * units + self.panel.units(first);
        let taken = self.panel.units(values);
        let scales = match blocks {
            0 => &[][..],
            _ => &self.scales[(tile * blocks + first / self.panel.block()) * TILE_ROWS..],
        };
        (&self.units[at * TILE_ROWS..(at + taken) * TILE_ROWS], scales)
    }
}

/// Up to 16 quantized rows, before they are transposed into a panel.
#[derive(Default)]
struct RowScratch {
    /// `(16, units)`.
    units: Vec<u32>,
    stride: usize,
    /// `(16, blocks)`.
    scales: Vec<f32>,
    sums: Vec<i32>,
    blocks: usize,
}

impl RowScratch {
    const ROWS: usize = 16;

    fn fit(&mut self, panel: PanelType, depth: usize) {
        self.stride = panel.units(depth).next_multiple_of(16);
        self.blocks = panel.blocks(depth);
        if self.units.len() < Self::ROWS * self.stride {
            self.units.resize(Self::ROWS * self.stride, 0);
        }
        if self.scales.len() < Self::ROWS * self.blocks {
            self.scales.resize(Self::ROWS * self.blocks, 0.0);
            self.sums.resize(Self::ROWS * self.blocks, 0);
        }
    }

    fn quantize(&mut self, isa: Isa, panel: PanelType, x: &[f32], row: usize, unsigned: bool) {
        self.fit(panel, x.len());
        let units = &mut self.units[row * self.stride..][..self.stride];
        let blocks = row * self.blocks..(row + 1) * self.blocks;
        let (scales, sums) = (&mut self.scales[blocks.clone()], &mut self.sums[blocks]);
        match panel {
            PanelType::F32 => {
                for (unit, x) in units.iter_mut().zip(x) {
                    *unit = x.to_bits();
                }
            }
            PanelType::Int16 => {
                // SAFETY: any bits are two `i16`, whose alignment is lower.
                let words = unsafe { units.align_to_mut::<i16>().1 };
                words[x.len().saturating_sub(1)..].fill(0); // an odd last value's other half
                int16_row(isa, x, words, scales);
            }
            PanelType::Int8 => {
                // SAFETY: any bits are four bytes, whose alignment is lower.
                let bytes = unsafe { units.align_to_mut::<u8>().1 };
                bytes[x.len()..].fill(0);
                int8_row(isa, x, bytes, scales, sums, if unsigned { 128 } else { 0 });
            }
        }
    }

    fn clear(&mut self, panel: PanelType, depth: usize, row: usize) {
        self.fit(panel, depth);
        self.units[row * self.stride..][..self.stride].fill(0);
        self.scales[row * self.blocks..(row + 1) * self.blocks].fill(0.0);
        self.sums[row * self.blocks..(row + 1) * self.blocks].fill(0);
    }

    /// Writes the first `LANES` rows into a panel `stride` lanes wide.
    fn write<const LANES: usize>(
        &self,
        isa: Isa,
        (units, blocks): (usize, usize),
        stride: usize,
        out: &mut [u32],
        scales: &mut [f32],
    ) {
        transpose(isa, (&self.units, self.stride), (LANES, units), out, stride);
        for block in 0..blocks {
            for lane in 0..LANES {
                scales[block * stride + lane] = self.scales[lane * self.blocks + block];
            }
        }
    }
}

/// The right operand of a product for a group of columns and a range of the contraction, in panels
/// of [`TILE_COLS`] columns. Thread-local and reused.
#[derive(Default)]
pub(crate) struct PackedColumns {
    /// `(panels, units, TILE_COLS)`.
    pub units: Vec<u32>,
    /// `(panels, blocks, TILE_COLS)`.
    pub scales: Vec<f32>,
    /// `(panels, blocks, TILE_COLS)`: `-128 Σ` of a block's bytes.
    pub offsets: Vec<i32>,
    row: Vec<f32>,
    scratch: RowScratch,
}

impl PackedColumns {
    /// Columns `columns` are rows of the weights, the contraction is their columns `depth`.
    pub(crate) fn pack_transposed(
        &mut self,
        isa: Isa,
        panel: PanelType,
        weights: Weights,
        columns: std::ops::Range<usize>,
        depth: std::ops::Range<usize>,
    ) {
        let (units, blocks) = self.fit(panel, columns.len(), depth.len());
        let all_scales = self.scales.len();
        self.row.resize(depth.len(), 0.0);
        const LANES: usize = RowScratch::ROWS;
        for (half, first) in columns.clone().step_by(LANES).enumerate() {
            let count = LANES.min(columns.end - first);
            for lane in 0..count {
                weights.read(first + lane, depth.start, &mut self.row);
                self.scratch.quantize(isa, panel, &self.row, lane, false);
            }
            for lane in count..LANES {
                self.scratch.clear(panel, depth.len(), lane);
            }
            let (of_panel, lane) = (half * LANES / TILE_COLS, half * LANES % TILE_COLS);
            let out = &mut self.units[of_panel * units * TILE_COLS + lane..];
            let at = of_panel * blocks * TILE_COLS + lane;
            let scales = &mut self.scales[at.min(all_scales)..]; // `f32` has none
            self.scratch.write::<LANES>(isa, (units, blocks), TILE_COLS, out, scales);
            if panel == PanelType::Int8 {
                for block in 0..blocks {
                    for lane in 0..LANES {
                        let sum = self.scratch.sums[lane * self.scratch.blocks + block];
                        self.offsets[at + block * TILE_COLS + lane] = -128 * sum;
                    }
                }
            }
        }
        // The missing half panel after an odd number of halves.
        if columns.len().div_ceil(LANES) % 2 == 1 {
            let last = columns.len() / TILE_COLS;
            let units = self.units[last * units * TILE_COLS..].chunks_exact_mut(TILE_COLS);
            units.for_each(|unit| unit[LANES..].fill(0));
            let scales = self.scales[last * blocks * TILE_COLS..].chunks_exact_mut(TILE_COLS);
            scales.for_each(|scale| scale[LANES..].fill(0.0));
            let offsets = self.offsets[last * blocks * TILE_COLS..].chunks_exact_mut(TILE_COLS);
            offsets.for_each(|offset| offset[LANES..].fill(0));
        }
    }

    /// Columns `columns` are columns of the weights, the contraction is their rows `depth`.
    ///
    /// # Panics
    /// For [`PanelType::Int8`], which only forward products use.
    pub(super) fn pack_straight(
        &mut self,
        isa: Isa,
        panel: PanelType,
        weights: Weights,
        columns: std::ops::Range<usize>,
        depth: std::ops::Range<usize>,
    ) {
        let (units, blocks) = self.fit(panel, columns.len(), depth.len());
        let width = columns.len().next_multiple_of(TILE_COLS);
        let stretch = panel.block();
        for (block, first) in depth.clone().step_by(stretch).enumerate() {
            let count = stretch.min(depth.end - first);
            // Whole panels of floats are read in place.
            let lying = match weights {
                Weights::Dense { values, cols, scale: 1.0 }
                    if columns.len() == width && count.is_multiple_of(2) =>
                {
                    Some((&values[first * cols + columns.start..], cols))
                }
                _ => None,
            };
            if lying.is_none() {
                self.row.clear();
                self.row.resize(stretch * width, 0.0);
                for (row, out) in (first..first + count).zip(self.row.chunks_exact_mut(width)) {
                    weights.read(row, columns.start, &mut out[..columns.len()]);
                }
            }
            let (values, stride) = lying.unwrap_or((&self.row, width));
            for of_panel in 0..width / TILE_COLS {
                let at = of_panel * units + panel.units(block * stretch);
                let out = &mut self.units[at * TILE_COLS..][..panel.units(count) * TILE_COLS];
                let values = &values[of_panel * TILE_COLS..];
                match panel {
                    PanelType::F32 => f32_columns(isa, values, stride, out),
                    PanelType::Int16 => {
                        let at = (of_panel * blocks + block) * TILE_COLS;
                        let scales = &mut self.scales[at..at + TILE_COLS];
                        int16_columns(isa, values, stride, count, out, scales);
                    }
                    PanelType::Int8 => panic!("bytes serve forward products only"),
                }
            }
        }
    }

    fn fit(&mut self, panel: PanelType, columns: usize, depth: usize) -> (usize, usize) {
        let panels = columns.div_ceil(TILE_COLS);
        let (units, blocks) = (panel.units(depth), panel.blocks(depth));
        self.units.resize(panels * units * TILE_COLS, 0);
        self.scales.resize(panels * blocks * TILE_COLS, 0.0);
        self.offsets.resize(panels * blocks * TILE_COLS, 0);
        (units, blocks)
    }
}

/// The largest magnitude, compared as bits: these order like the numbers, with NaN above
/// all, so that a NaN reaches the scale and the result.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff)))
}

/// The largest `i16`, the largest norm of a block of them (a little below `sqrt(2^31)`, as rounding
/// adds up to `sqrt(128) / 2`), and the largest signed byte.
const INT16_MAX: f32 = 32_767.0;
const INT16_NORM: f32 = 46_300.0;
const INT8_MAX: f32 = 127.0;

/// Whether a block with this largest magnitude can be divided by its scale. If it is near 0, infinite or NaN it
/// cannot; the block becomes zeros with `largest` itself as the scale.
#[inline(always)]
fn is_divisible(largest: f32) -> bool {
    largest > f32::MIN_POSITIVE * 65_536.0 && largest.is_finite()
}

/// The scale of a block of `i16`, and its inverse, which values are multiplied by.
/// `squares` is the sum of squares of the values over `largest`.
#[inline(always)]
fn int16_scale(largest: f32, squares: f32) -> (f32, f32) {
    let by_norm = squares.sqrt() / INT16_NORM;
    let by_max = 1.0 / INT16_MAX;
    let scale = largest * if by_norm > by_max { by_norm } else { by_max };
    if is_divisible(largest) { (scale, 1.0 / scale) } else { (largest, 0.0) }
}

/// `1 / largest`, or 0 if [`is_divisible`] is false.
#[inline(always)]
fn unit(largest: f32) -> f32 {
    if is_divisible(largest) { 1.0 / largest } else { 0.0 }
}

/// `x` rounded to the nearest integer, in the low bits of `x + 1.5 · 2^23`.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    (x + 12_582_912.0).to_bits()
}

multiversion! {
    fn int16_row(isa; x: &[f32], words: &mut [i16], scales: &mut [f32]) {
        let blocks = x.chunks(PanelType::Int16.block()).zip(words.chunks_mut(PanelType::Int16.block()));
        for ((x, words), scale) in blocks.zip(scales) {
            let largest = largest(x);
            let unit = unit(largest);
            let mut squares = [0f32; 16]; // separate sums, the same on every ISA level
            let (wide, rest) = x.as_chunks::<16>();
            for x in wide {
                for (sum, x) in squares.iter_mut().zip(x) {
                    *sum += (x * unit) * (x * unit);
                }
            }
            let rest: f32 = rest.iter().map(|x| (x * unit) * (x * unit)).sum();
            let (made, inverse) = int16_scale(largest, squares.iter().sum::<f32>() + rest);
            *scale = made;
            for (word, x) in words.iter_mut().zip(x) {
                *word = nearest(x * inverse) as i16;
            }
        }
    }

    fn int8_row(isa; x: &[f32], bytes: &mut [u8], scales: &mut [f32], sums: &mut [i32], zero: u8) {
        let blocks = x.chunks(PanelType::Int8.block()).zip(bytes.chunks_mut(PanelType::Int8.block()));
        for (((x, bytes), scale), sum) in blocks.zip(scales).zip(sums) {
            let largest = largest(x);
            let inverse = INT8_MAX * unit(largest);
            *scale = largest / INT8_MAX;
            *sum = 0;
            for (byte, x) in bytes.iter_mut().zip(x) {
                let q = nearest(x * inverse) as i8;
                *sum += i32::from(q);
                *byte = (q as u8).wrapping_add(zero);
            }
        }
    }

    fn f32_columns(isa; values: &[f32], width: usize, out: &mut [u32]) {
        f32_lanes::<TILE_COLS>(values, width, out);
    }

    fn f32_rows(isa; values: &[f32], width: usize, out: &mut [u32]) {
        f32_lanes::<TILE_ROWS>(values, width, out);
    }

    fn int16_columns(
        isa;
        values: &[f32],
        width: usize,
        count: usize,
        out: &mut [u32],
        scales: &mut [f32],
    ) {
        int16_lanes::<TILE_COLS>(values, width, count, out, scales);
    }

    fn int16_rows(
        isa;
        values: &[f32],
        width: usize,
        count: usize,
        out: &mut [u32],
        scales: &mut [f32],
    ) {
        int16_lanes::<TILE_ROWS>(values, width, count, out, scales);
    }
}

/// Packs the first `LANES` of each row of `values (.., width)`, row after row.
#[inline(always)]
fn f32_lanes<const LANES: usize>(values: &[f32], width: usize, out: &mut [u32]) {
    for (row, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let values: &[f32; LANES] = values[row * width..].first_chunk().expect("a row");
        for (out, value) in out.iter_mut().zip(values) {
            *out = value.to_bits();
        }
    }
}

/// Packs a block of `count` rows as pairs of integers with a scale per lane.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // lanes of several arrays go together
fn int16_lanes<const LANES: usize>(
    values: &[f32],
    width: usize,
    count: usize,
    out: &mut [u32],
    scales: &mut [f32],
) {
    let row = |row: usize| -> &[f32; LANES] {
        values[row * width..].first_chunk().expect("a row of the panel")
    };
    let mut most = [0u32; LANES];
    for i in 0..count {
        for (most, x) in most.iter_mut().zip(row(i)) {
            *most = (*most).max(x.to_bits() & 0x7fff_ffff);
        }
    }
    let units = most.map(|most| unit(f32::from_bits(most)));
    let mut squares = [0f32; LANES];
    for i in 0..count {
        let row = row(i);
        for lane in 0..LANES {
            let x = row[lane] * units[lane];
            squares[lane] += x * x;
        }
    }
    let mut inverses = [0f32; LANES];
    for (lane, scale) in scales.iter_mut().enumerate() {
        (*scale, inverses[lane]) = int16_scale(f32::from_bits(most[lane]), squares[lane]);
    }
    for (pair, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let (even, odd) = (row(2 * pair), row(2 * pair + 1));
        for i in 0..LANES {
            let low = nearest(even[i] * inverses[i]) & 0xffff;
            out[i] = low | nearest(odd[i] * inverses[i]) << 16;
        }
    }
}

/// Whether [`transpose`] may read rows of this width from these values.
fn may_transpose(values: &[f32], width: usize) -> bool {
    width.is_multiple_of(16) && values.len() >= RowScratch::ROWS * width
}

/// `out[unit · stride + lane] = units[lane · from_stride + unit]` for `lanes` up to 16.
fn transpose(
    isa: Isa,
    (units, from_stride): (&[u32], usize),
    (lanes, depth): (usize, usize),
    out: &mut [u32],
    stride: usize,
) {
    assert!(lanes <= RowScratch::ROWS && from_stride.is_multiple_of(16) && depth <= from_stride);
    assert!(units.len() >= RowScratch::ROWS * from_stride);
    assert!(depth == 0 || out.len() >= (depth - 1) * stride + lanes);
    #[cfg(target_arch = "x86_64")]
    if isa.level() == IsaLevel::Avx512Vnni {
        // SAFETY: the CPU supports AVX-512; the assertions above check the bounds.
        unsafe {
            x86::transpose(units.as_ptr(), from_stride, lanes, depth, out.as_mut_ptr(), stride)
        };
        return;
    }
    let _ = isa;
    for first in (0..depth).step_by(16) {
        for unit in first..depth.min(first + 16) {
            let out = &mut out[unit * stride..][..lanes];
            for (lane, out) in out.iter_mut().enumerate() {
                *out = units[lane * from_stride + unit];
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// # Safety
    /// `from` holds 16 rows of `from_stride`, a multiple of 16 and at least `depth`; `to` holds
    /// `depth` rows `stride` apart, of `lanes` up to 16.
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn transpose(
        from: *const u32,
        from_stride: usize,
        lanes: usize,
        depth: usize,
        to: *mut u32,
        stride: usize,
    ) {
        let kept = ((1u32 << lanes) - 1) as u16;
        for first in (0..depth).step_by(16) {
            // SAFETY: this function's contract guarantees that the rows and the panel are in bounds.
            unsafe {
                let mut r = [_mm512_setzero_si512(); 16];
                for (lane, r) in r.iter_mut().enumerate() {
                    *r = _mm512_loadu_si512(from.add(lane * from_stride + first).cast());
                }
                let r = transposed(r);
                for (i, r) in r.into_iter().take(depth - first).enumerate() {
                    _mm512_mask_storeu_epi32(to.add((first + i) * stride).cast(), kept, r);
                }
            }
        }
    }

    /// Transposes a 16 x 16 matrix: swaps pairs, quadruples, then quarters of registers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transposed(r: [__m512i; 16]) -> [__m512i; 16] {
        let mut a = r;
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        let mut b = a;
        for i in 0..4 {
            b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
        }
        let mut c = b;
        for i in 0..4 {
            c[i] = _mm512_shuffle_i32x4::<0x88>(b[i], b[4 + i]);
            c[4 + i] = _mm512_shuffle_i32x4::<0xdd>(b[i], b[4 + i]);
            c[8 + i] = _mm512_shuffle_i32x4::<0x88>(b[8 + i], b[12 + i]);
            c[12 + i] = _mm512_shuffle_i32x4::<0xdd>(b[8 + i], b[12 + i]);
        }
        let mut d = c;
        for i in 0..4 {
            d[i] = _mm512_shuffle_i32x4::<0x88>(c[i], c[8 + i]);
            d[8 + i] = _mm512_shuffle_i32x4::<0xdd>(c[i], c[8 + i]);
            d[4 + i] = _mm512_shuffle_i32x4::<0x88>(c[4 + i], c[12 + i]);
            d[12 + i] = _mm512_shuffle_i32x4::<0xdd>(c[4 + i], c[12 + i]);
        }
        d
    }
}
