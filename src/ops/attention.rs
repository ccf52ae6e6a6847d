//! Causal grouped-query attention (GQA) over packed rows: a token attends only to its own row.
//!
//! The CPU kernel is FlashAttention-2 (Dao 2023) on slices: blocks of keys, an online softmax, and
//! only the log-sum-exp of each query is kept for the backward pass, which recomputes the weights.
//! The query heads that share a key head are rows of one matrix, query by query: `heads` rows of
//! the first query, then those of the next. So a tile of rows spans few positions, and masked
//! tiles are skipped; short rows are not padded to a block.
//!
//! A query's result depends only on its own row, and neither on the threads nor on how many
//! queries are processed at a time: a cache that is filled in chunks gives the same bits. So does a
//! prompt that several rows share as their prefix, compared with one copy per row; in the backward pass
//! their contributions to the gradients of its keys and values are summed in the order of the rows.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};

use super::cpu::{SharedMutPtr, Values, par_for_each, tanh, values};
use super::lanes::{
    AlignedScratch, Element, LANE_GROUP, Lanes, Left, MAX_TILE_ROWS, Right, exp2, isa_levels,
    panel, product, product_transposed, tile_rows,
};
use super::segment::{self, Segment};
use super::{Compute, OpForm};
use crate::isa::{Isa, multiversion};

/// Keys per block, and rows of queries per block in the backward pass.
pub(crate) const KEYS: usize = 64;

/// Rows of queries that share a packed block of keys in the forward pass.
const ROWS: usize = 192;

/// From this length on the backward pass has a task for each query head of a row, so that a single row
/// keeps more threads busy than it has key heads.
const LONG_ROW: usize = 256;

/// How far, in powers of two, a score may exceed the current maximum before the output is rescaled.
const RESCALE_THRESHOLD: f32 = 8.0;

thread_local! {
    static SCRATCH: Cell<AlignedScratch> = const { Cell::new(AlignedScratch::new()) };
    static PARTIALS: Cell<AlignedScratch> = const { Cell::new(AlignedScratch::new()) };
}

/// The layout of heads in `q (N, heads · head_dim)` and in `k`, `v (N, kv_heads · head_dim)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`: head `h` reads key head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of a head in scratch, padded to whole groups of lanes.
    fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(LANE_GROUP)
    }
}

/// Options that change attention scores from `q · k / sqrt(head_dim)` over all keys up to the query.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AttentionConfig {
    /// Sliding window: a token attends to this many positions, including itself.
    pub window: Option<usize>,
    /// Scale of `q · k`; `None` is `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Softcap: scores become `cap · tanh(score / cap)` before the softmax (Gemma 2).
    pub cap: Option<f32>,
}

impl From<Option<usize>> for AttentionConfig {
    fn from(window: Option<usize>) -> Self {
        Self { window, ..Self::default() }
    }
}

impl AttentionConfig {
    fn scale(&self, heads: Heads) -> f32 {
        self.scale.unwrap_or_else(|| 1.0 / (heads.head_dim as f32).sqrt())
    }
}

/// The positions that the token at `position` of its row attends to: the last `window` of those up to
/// itself, or all of them.
pub(crate) fn seen(position: usize, window: Option<usize>) -> Range<usize> {
    let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
    first..position + 1
}

/// `softmax(q · kᵀ / sqrt(head_dim)) · v` per head, each token over those of its row up to itself,
/// prefix first, with the options in `scores` (an [`AttentionConfig`], or only a window).
///
/// Shapes: `q (N, heads · head_dim)`, `k`, `v (N, kv_heads · head_dim)`, F32 → as `q`. `segments`
/// are the rows of the batch, contiguous from 0 to N.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    segments: &Arc<[Segment]>,
    scores: impl Into<AttentionConfig>,
    compute: Compute,
) -> Result<Tensor> {
    let scores = scores.into();
    check(q, k, v, heads, segments, scores)?;
    match compute.op_form() {
        OpForm::Kernel => {
            let (isa, segments) = (Isa::current(), segments.clone());
            let op = CausalAttention { isa, heads, segments, scores, lse: OnceLock::new() };
            q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
        }
        OpForm::Portable => portable(q, k, v, heads, segments, scores),
    }
}

fn check(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    rows: &[Segment],
    scores: AttentionConfig,
) -> Result<()> {
    let (n, width) = q.dims2()?;
    if let Some(fault) = segment::fault(rows, n) {
        candle_core::bail!("attention over {n} tokens: {fault}");
    }
    if scores.window == Some(0) {
        candle_core::bail!("the attention window is 0, expected at least 1");
    }
    let kv = [n, heads.kv_width()];
    if width != heads.q_width() || k.dims() != kv || v.dims() != kv {
        let (q, k, v) = (q.dims(), k.dims(), v.dims());
        candle_core::bail!("attention: q is {q:?}, k {k:?}, v {v:?} for {heads:?}");
    }
    Ok(())
}

fn portable(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    segments: &[Segment],
    scores: AttentionConfig,
) -> Result<Tensor> {
    let rows = segments.iter().filter(|row| !row.is_empty()).map(|row| {
        let part = |x: &Tensor, tokens: &Range<usize>| x.narrow(0, tokens.start, tokens.len());
        let whole = |x: &Tensor| {
            let own = part(x, &row.tokens)?;
            let x = if row.prefix.is_empty() {
                own
            } else {
                Tensor::cat(&[part(x, &row.prefix)?, own], 0)?
            };
            by_head(&x, heads.kv_heads)
        };
        portable_row(&part(q, &row.tokens)?, &whole(k)?, &whole(v)?, heads, scores)
    });
    Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
}

/// `x (tokens, heads · head_dim)` → `(heads, tokens, head_dim)`, contiguous.
pub(crate) fn by_head(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    x.reshape((tokens, heads, width / heads))?.transpose(0, 1)?.contiguous()
}

/// The portable form for the last tokens of a row. With a window, the keys may begin with the first that any
/// of them attends to.
///
/// Shapes: `q (T, heads · head_dim)`, `k`, `v (kv_heads, keys, head_dim)`, F32 → as `q`.
pub(crate) fn portable_row(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    scoring: AttentionConfig,
) -> Result<Tensor> {
    let Heads { heads: q_heads, kv_heads, head_dim } = heads;
    let (t, keys) = (q.dim(0)?, k.dim(1)?);
    // The query heads that share a key head are rows of one matrix.
    let q = by_head(q, q_heads)?.reshape((kv_heads, heads.group() * t, head_dim))?;
    let mut scores = (q.matmul(&k.t()?)? * f64::from(scoring.scale(heads)))?;
    if let Some(cap) = scoring.cap.map(f64::from) {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let mut scores = scores.reshape((q_heads, t, keys))?;
    let first = keys - t; // key of the first query
    if seen(first, scoring.window) != (0..keys) {
        let mask = (0..t * keys).map(|i| {
            let seen = seen(first + i / keys, scoring.window);
            if seen.contains(&(i % keys)) { 0.0 } else { f32::NEG_INFINITY }
        });
        let mask: Vec<f32> = mask.collect();
        scores = scores.broadcast_add(&Tensor::from_vec(mask, (t, keys), q.device())?)?;
    }
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?; // (heads, T, keys)
    let weights = weights.reshape((kv_heads, heads.group() * t, keys))?;
    let out = weights.matmul(v)?.reshape((q_heads, t, head_dim))?;
    out.transpose(0, 1)?.reshape((t, heads.q_width()))
}

struct CausalAttention {
    isa: Isa,
    heads: Heads,
    segments: Arc<[Segment]>,
    scores: AttentionConfig,
    /// Log-sum-exp of each query's scores, `(N, heads)`, left by the forward pass.
    lse: OnceLock<Vec<f32>>,
}

impl CausalAttention {
    fn qkv<'a>(&self, q: &'a [f32], k: &'a [f32], v: &'a [f32]) -> Qkv<'a> {
        let (q_width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        Qkv {
            q: StridedHeads { values: q, stride: q_width },
            k: StridedHeads { values: k, stride: kv_width },
            v: StridedHeads { values: v, stride: kv_width },
        }
    }
}

impl CustomOp3 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (values(q, q_layout)?, values(k, k_layout)?, values(v, v_layout)?);
        let mut out = vec![0f32; q.len()];
        let mut lse = vec![0f32; q.len() / self.heads.head_dim];
        let qkv = self.qkv(q, k, v);
        forward(self.isa, qkv, self.heads, &self.segments, self.scores, &mut out, &mut lse);
        // A tape runs an op's forward once; a second run would give the same values.
        let _ = self.lse.set(lse);
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dout = dout.contiguous()?;
        let (qs, ks, vs) = (Values::of(q)?, Values::of(k)?, Values::of(v)?);
        let (outs, douts) = (Values::of(out)?, Values::of(&dout)?);
        let lse = self.lse.get().expect("the forward pass came first");
        let (mut dq, mut dk) = (vec![0f32; qs.len()], vec![0f32; ks.len()]);
        let mut dv = vec![0f32; vs.len()];
        let (q_width, kv_width) = (self.heads.q_width(), self.heads.kv_width());
        let grad = QkvGrad::separate((&mut dq, q_width), (&mut dk, kv_width), (&mut dv, kv_width));
        let qkv = self.qkv(&qs, &ks, &vs);
        let result = AttentionForward { out: &outs, lse };
        backward(self.isa, qkv, self.heads, &self.segments, self.scores, result, &douts, grad);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// The heads of each token inside a wider buffer: those of token `t` begin at `t * stride`.
#[derive(Clone, Copy)]
pub(crate) struct StridedHeads<'a> {
    /// Values, from the first token's first head on.
    pub values: &'a [f32],
    /// Stride between tokens.
    pub stride: usize,
}

impl<'a> StridedHeads<'a> {
    fn at(self, token: usize, column: usize, width: usize) -> &'a [f32] {
        &self.values[token * self.stride + column..][..width]
    }

    /// The same tokens, from a column on.
    fn column(self, column: usize) -> Self {
        Self { values: &self.values[column..], ..self }
    }
}

/// Queries `(N, heads · head_dim)`, keys and values `(N, kv_heads · head_dim)`, which may be column
/// ranges of one buffer.
#[derive(Clone, Copy)]
pub(crate) struct Qkv<'a> {
    /// Queries.
    pub q: StridedHeads<'a>,
    /// Keys.
    pub k: StridedHeads<'a>,
    /// Values.
    pub v: StridedHeads<'a>,
}

/// Results of the forward pass for the backward pass: output `(N, heads · head_dim)`, log-sum-exps
/// `(N, heads)`.
#[derive(Clone, Copy)]
pub(crate) struct AttentionForward<'a> {
    /// The output.
    pub out: &'a [f32],
    /// Log-sum-exp of each query's scaled scores.
    pub lse: &'a [f32],
}

/// Gradient buffers of a [`Qkv`].
pub(crate) struct QkvGrad<'a> {
    q: StridedHeadsMut,
    k: StridedHeadsMut,
    v: StridedHeadsMut,
    borrowed: PhantomData<&'a mut [f32]>,
}

/// Mutable [`StridedHeads`] that tasks write to, each to different elements.
#[derive(Clone, Copy)]
struct StridedHeadsMut {
    target: SharedMutPtr,
    stride: usize,
}

impl StridedHeadsMut {
    /// # Safety
    /// As for [`SharedMutPtr::slice`].
    unsafe fn at<'a>(self, token: usize, column: usize, width: usize) -> &'a mut [f32] {
        // SAFETY: this function's contract guarantees that no other thread accesses these elements.
        unsafe { self.target.at(token * self.stride + column).slice(width) }
    }
}

impl<'a> QkvGrad<'a> {
    /// Three separate buffers, each with its stride.
    pub(crate) fn separate(
        q: (&'a mut [f32], usize),
        k: (&'a mut [f32], usize),
        v: (&'a mut [f32], usize),
    ) -> Self {
        let columns =
            |(values, stride)| StridedHeadsMut { target: SharedMutPtr::new(values), stride };
        Self { q: columns(q), k: columns(k), v: columns(v), borrowed: PhantomData }
    }
}

/// `out = softmax(q · kᵀ / sqrt(head_dim)) · v` per head, and the log-sum-exp of each query's
/// scaled scores; for masking see [`causal_attention`].
///
/// Shapes: `out (N, heads · head_dim)`, `lse (N, heads)`; both are overwritten.
pub(crate) fn forward(
    isa: Isa,
    qkv: Qkv,
    heads: Heads,
    segments: &[Segment],
    scores: impl Into<AttentionConfig>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let scores = scores.into();
    let tokens = segments.last().map_or(0, |segment| segment.tokens.end);
    let (width, head_dim) = (heads.q_width(), heads.head_dim);
    assert!(out.len() >= tokens * width && lse.len() >= tokens * heads.heads);
    let (out, lse) = (SharedMutPtr::new(out), SharedMutPtr::new(lse));
    let step = queries_at_a_time(heads);
    let (mut tasks, mut work) = (Vec::new(), 0);
    for segment in segments.iter().filter(|segment| !segment.is_empty()) {
        work += segment.len() * segment.positions() * width;
        for kv_head in 0..heads.kv_heads {
            let starts = segment.tokens.clone().step_by(step);
            tasks.extend(starts.map(|start| (segment, kv_head, start)));
        }
    }
    par_for_each(tasks, work, |(segment, kv_head, start)| {
        let queries = Queries {
            q: qkv.q,
            tokens: start..segment.tokens.end.min(start + step),
            position: segment.prefix.len() + start - segment.tokens.start,
            heads: kv_head * heads.group()..(kv_head + 1) * heads.group(),
        };
        let keys = Packed {
            k: qkv.k.column(kv_head * head_dim),
            v: qkv.v.column(kv_head * head_dim),
            row: segment,
            head_dim,
        };
        attend(isa, &queries, &keys, heads, scores, |token, head, row, value| {
            // SAFETY: each task writes only its own heads and tokens.
            unsafe {
                out.at(token * width + head * head_dim).slice(head_dim).copy_from_slice(row);
                lse.at(token * heads.heads + head).slice(1)[0] = value;
            }
        });
    });
}

/// New queries `(N, heads · head_dim)` of rows whose keys and values are in a KV cache: row `i` has
/// the queries `segments[i]`, which are the last positions of the row and have no prefix.
pub(crate) struct CachedQueries<'a> {
    pub q: StridedHeads<'a>,
    pub heads: Heads,
    pub segments: &'a [Segment],
    pub scores: AttentionConfig,
}

/// Some queries of one key head, and the positions they attend to.
pub(crate) struct CachedTask<'a> {
    isa: Isa,
    queries: Queries<'a>,
    heads: Heads,
    scores: AttentionConfig,
    out: SharedMutPtr,
}

impl CachedQueries<'_> {
    /// Attends to rows of these `lengths`, new tokens included: `run` is called with row, key head and a
    /// task, which it must run over the cached keys. `out (N, heads · head_dim)` is overwritten.
    pub(crate) fn attend(
        &self,
        isa: Isa,
        lengths: &[usize],
        out: &mut [f32],
        run: impl Fn(usize, usize, CachedTask) + Sync + Send,
    ) {
        let Self { q, heads, segments, scores } = *self;
        let tokens = segments.iter().map(|segment| segment.tokens.end).max().unwrap_or(0);
        assert!(out.len() >= tokens * heads.q_width());
        let out = SharedMutPtr::new(out);
        let step = queries_at_a_time(heads);
        let (mut tasks, mut work) = (Vec::new(), 0);
        // A row may have no new tokens; its range may then be past the end.
        let rows = segments.iter().zip(lengths).enumerate();
        for (row, (segment, &length)) in rows.filter(|(_, (segment, _))| !segment.is_empty()) {
            work += segment.len() * length * heads.q_width();
            let before = length - segment.len();
            for kv_head in 0..heads.kv_heads {
                let starts = segment.tokens.clone().step_by(step);
                tasks.extend(starts.map(|start| (row, segment, before, kv_head, start)));
            }
        }
        par_for_each(tasks, work, |(row, segment, before, kv_head, start)| {
            let queries = Queries {
                q,
                tokens: start..segment.tokens.end.min(start + step),
                position: before + start - segment.tokens.start,
                heads: kv_head * heads.group()..(kv_head + 1) * heads.group(),
            };
            run(row, kv_head, CachedTask { isa, queries, heads, scores, out });
        });
    }
}

impl CachedTask<'_> {
    /// Attends to these keys.
    pub(crate) fn run<K: KeyValueBlocks>(&self, keys: &K) {
        let (width, head_dim) = (self.heads.q_width(), self.heads.head_dim);
        attend(self.isa, &self.queries, keys, self.heads, self.scores, |token, head, row, _| {
            // SAFETY: each task writes only its own heads and tokens, while `out` is borrowed.
            unsafe {
                let out = self.out.at(token * width + head * head_dim);
                out.slice(head_dim).copy_from_slice(row);
            }
        });
    }
}

/// Number of tokens whose queries share a packed block of keys.
fn queries_at_a_time(heads: Heads) -> usize {
    (ROWS / heads.group()).clamp(MAX_TILE_ROWS, ROWS)
}

/// Queries of heads that share a key head, as the rows of one matrix: row `r` is head
/// `heads.start + r % heads.len()` of token `tokens.start + r / heads.len()`.
pub(crate) struct Queries<'a> {
    pub q: StridedHeads<'a>,
    pub tokens: Range<usize>,
    /// Position of the first token in its row.
    pub position: usize,
    pub heads: Range<usize>,
}

impl Queries<'_> {
    fn rows(&self) -> usize {
        self.tokens.len() * self.heads.len()
    }

    /// The token and head of a row.
    fn of(&self, row: usize) -> (usize, usize) {
        (self.tokens.start + row / self.heads.len(), self.heads.start + row % self.heads.len())
    }

    /// The keys of a block that any row of a tile attends to, and those of each row.
    fn limits(
        &self,
        tile: &Range<usize>,
        block: &Range<usize>,
        window: Option<usize>,
    ) -> KeyLimits {
        let position = |row: usize| self.position + row / self.heads.len();
        let (first, last) = (position(tile.start), position(tile.end - 1));
        let within = |range: Range<usize>| {
            let start = range.start.clamp(block.start, block.end) - block.start;
            (start, (range.end.clamp(block.start, block.end) - block.start).max(start))
        };
        let any = within(seen(first, window).start..last + 1);
        let every = within(seen(last, window).start..first + 1);
        let mut rows = [any; MAX_TILE_ROWS];
        if any != every {
            for (limits, row) in rows.iter_mut().zip(tile.clone()) {
                *limits = within(seen(position(row), window));
            }
        }
        KeyLimits { any, rows }
    }

    /// Copies the heads of `from` to padded rows, times `factor`.
    fn gather(&self, isa: Isa, from: StridedHeads, head_dim: usize, factor: f32, to: &mut [f32]) {
        let width = self.heads.len() * head_dim;
        let padded = head_dim.next_multiple_of(LANE_GROUP);
        for (token, rows) in self.tokens.clone().zip(to.chunks_mut(self.heads.len() * padded)) {
            let from = from.at(token, self.heads.start * head_dim, width);
            scaled_rows(isa, from, head_dim, factor, rows);
        }
    }
}

multiversion! {
    /// Copies rows of `width` values to rows padded to whole groups, times `factor`.
    fn scaled_rows(isa; from: &[f32], width: usize, factor: f32, to: &mut [f32]) {
        let padded = width.next_multiple_of(LANE_GROUP);
        for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(padded)) {
            for (to, x) in to.iter_mut().zip(from) {
                *to = x * factor;
            }
            to[width..].fill(0.0);
        }
    }

    /// Scores `s` in powers of two, each of them times the factor of its key, become
    /// `c · tanh(s / c)`, `cap` being `c` in nats.
    fn cap_scores(isa; scores: &mut [f32], keys: Option<&[f32]>, cap: f32) {
        if let Some(keys) = keys {
            scores.iter_mut().zip(keys).for_each(|(score, key)| *score *= key);
        }
        let (below, above) = (std::f32::consts::LN_2 / cap, cap * std::f32::consts::LOG2_E);
        for score in scores {
            *score = above * tanh(*score * below);
        }
    }

    /// [`cap_scores`], and its derivative at each score.
    fn cap_scores_and_slopes(isa; scores: &mut [f32], slopes: &mut [f32], cap: f32) {
        let (below, above) = (std::f32::consts::LN_2 / cap, cap * std::f32::consts::LOG2_E);
        for (score, slope) in scores.iter_mut().zip(slopes) {
            let t = tanh(*score * below);
            (*score, *slope) = (above * t, 1.0 - t * t);
        }
    }

    /// `a *= b`.
    fn times(isa; a: &mut [f32], b: &[f32]) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a *= b);
    }

    /// `Σ a · b`, with a sum per lane so that it vectorizes.
    pub(crate) fn dot(isa; a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0f32; LANE_GROUP];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANE_GROUP>(), b.as_chunks::<LANE_GROUP>());
        for (a, b) in a.iter().zip(b) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a * b;
            }
        }
        for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
            *lane += a * b;
        }
        lanes.iter().sum()
    }
}

/// First and last key, within a block, that a row attends to.
struct KeyLimits {
    any: (usize, usize),
    rows: [(usize, usize); MAX_TILE_ROWS],
}

/// The keys and values of one key head of one row.
pub(crate) trait KeyValueBlocks {
    /// Storage type.
    type Element: Element;

    /// The keys and values of `range`, which begins at a multiple of [`KEYS`] and has at most that length.
    /// They may be written to the scratch: `KEYS · head_dim` and `KEYS · padded head_dim` values.
    fn block<'a>(
        &'a self,
        range: Range<usize>,
        scratch: (&'a mut [f32], &'a mut [f32]),
    ) -> KeyBlock<'a, Self::Element>;
}

/// Some keys and as many values.
pub(crate) struct KeyBlock<'a, B> {
    /// Panels `(head_dim, 16)`, the last one padded.
    pub keys: &'a [B],
    /// Rows of `head_dim`, padded to a multiple of 16.
    pub values: &'a [B],
    /// Scales of each key and each value, padded to a multiple of 16.
    pub scales: Option<(&'a [f32], &'a [f32])>,
}

/// Keys and values of a row as the projections return them.
struct Packed<'a> {
    k: StridedHeads<'a>,
    v: StridedHeads<'a>,
    row: &'a Segment,
    head_dim: usize,
}

impl KeyValueBlocks for Packed<'_> {
    type Element = f32;

    fn block<'a>(
        &'a self,
        range: Range<usize>,
        (keys, values): (&'a mut [f32], &'a mut [f32]),
    ) -> KeyBlock<'a, f32> {
        panels(self.k, self.row, &range, self.head_dim, values, keys);
        padded_rows(self.v, self.row, &range, self.head_dim, values);
        KeyBlock { keys, values, scales: None }
    }
}

/// Copies the heads at a block of `positions` of a row to panels `(head_dim, 16)`. Where prefix and
/// own tokens meet in the block, they are not contiguous and go through `scratch (KEYS, padded)`.
fn panels(
    from: StridedHeads,
    row: &Segment,
    positions: &Range<usize>,
    head_dim: usize,
    scratch: &mut [f32],
    to: &mut [f32],
) {
    let border = row.prefix.len();
    let from = if positions.start < border && border < positions.end {
        padded_rows(from, row, positions, head_dim, scratch);
        StridedHeads { values: scratch, stride: head_dim.next_multiple_of(LANE_GROUP) }
    } else {
        let start = row.token(positions.start) * from.stride;
        StridedHeads { values: &from.values[start..], ..from }
    };
    let starts = (0..positions.len()).step_by(LANE_GROUP);
    for (start, to) in starts.zip(to.chunks_exact_mut(LANE_GROUP * head_dim)) {
        let count = LANE_GROUP.min(positions.len() - start);
        panel(&from.values[start * from.stride..], from.stride, count, head_dim, to);
    }
}

/// Copies the heads at a block of `positions` of a row to rows padded to whole groups.
fn padded_rows(
    from: StridedHeads,
    row: &Segment,
    positions: &Range<usize>,
    head_dim: usize,
    to: &mut [f32],
) {
    let padded = head_dim.next_multiple_of(LANE_GROUP);
    for (position, to) in positions.clone().zip(to.chunks_exact_mut(padded)) {
        to[..head_dim].copy_from_slice(from.at(row.token(position), 0, head_dim));
        to[head_dim..].fill(0.0);
    }
}

/// Computes attention, and calls `emit` with token, head, output `(head_dim)` and log-sum-exp of each row.
pub(crate) fn attend<K: KeyValueBlocks>(
    isa: Isa,
    queries: &Queries,
    keys: &K,
    heads: Heads,
    scoring: AttentionConfig,
    mut emit: impl FnMut(usize, usize, &[f32], f32),
) {
    let (head_dim, padded, rows) = (heads.head_dim, heads.padded(), queries.rows());
    let window = scoring.window;
    let scale = scoring.scale(heads) * std::f32::consts::LOG2_E; // scores are powers of two
    AlignedScratch::with(&SCRATCH, |scratch| {
        let [q, out, max, sum, scores, key_scratch, value_scratch] = scratch.split([
            rows * padded,
            rows * padded,
            rows,
            rows * LANE_GROUP,
            MAX_TILE_ROWS * KEYS,
            KEYS * head_dim,
            KEYS * padded,
        ]);
        queries.gather(isa, queries.q, head_dim, scale, q);
        out.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        let first = seen(queries.position, window).start / KEYS * KEYS;
        let end = queries.position + queries.tokens.len();
        for start in (first..end).step_by(KEYS) {
            let range = start..end.min(start + KEYS);
            let block = keys.block(range.clone(), (&mut *key_scratch, &mut *value_scratch));
            for row in (0..rows).step_by(tile_rows(isa)) {
                let tile = row..rows.min(row + tile_rows(isa));
                let limits = queries.limits(&tile, &range, window);
                let (low, high) = limits.any;
                if low == high {
                    continue;
                }
                let groups = low / LANE_GROUP..high.div_ceil(LANE_GROUP);
                let from = groups.start * LANE_GROUP;
                let left = Left { values: &q[row * padded..], stride: padded };
                let right = Right {
                    values: &block.keys[from * head_dim..],
                    row_stride: LANE_GROUP,
                    group_stride: LANE_GROUP * head_dim,
                };
                let size = (tile.len(), groups.len(), head_dim);
                product(isa, size, left, right, &mut scores[from..], KEYS, false);
                let mut scales = block.scales;
                if let Some(cap) = scoring.cap {
                    // The cap is applied after the scales of the keys, which are not applied again then.
                    let keys = scales.map(|(keys, _)| &keys[from..groups.end * LANE_GROUP]);
                    for row in scores.chunks_exact_mut(KEYS).take(tile.len()) {
                        cap_scores(isa, &mut row[from..groups.end * LANE_GROUP], keys, cap);
                    }
                    scales = scales.map(|(_, values)| (&[1.0; KEYS][..], values));
                }
                online_softmax(
                    isa,
                    ScoreTile { rows: tile.len(), groups, limits: &limits },
                    scores,
                    scales,
                    &mut max[tile.clone()],
                    &mut sum[tile.start * LANE_GROUP..tile.end * LANE_GROUP],
                    &mut out[tile.start * padded..tile.end * padded],
                );
                let left = Left { values: &scores[low..], stride: KEYS };
                let right = Right {
                    values: &block.values[low * padded..],
                    row_stride: padded,
                    group_stride: LANE_GROUP,
                };
                let size = (tile.len(), padded / LANE_GROUP, high - low);
                product(isa, size, left, right, &mut out[row * padded..], padded, true);
            }
        }
        // SAFETY: there are as many sums as rows.
        unsafe { normalize(isa, sum, out) };
        for row in 0..rows {
            let (token, head) = queries.of(row);
            let lse = (max[row] + sum[row * LANE_GROUP].log2()) * std::f32::consts::LN_2;
            emit(token, head, &out[row * padded..][..head_dim], lse);
        }
    });
}

/// Rows of scores `KEYS` apart, with `groups` valid groups of columns.
struct ScoreTile<'a> {
    rows: usize,
    groups: Range<usize>,
    limits: &'a KeyLimits,
}

/// A step of the online softmax: scores become weights relative to the new maximum, and sum and output are
/// rescaled to it. Sums are kept per lane, `(rows, 16)`; `out` is `(rows, padded)`.
fn online_softmax(
    isa: Isa,
    tile: ScoreTile,
    scores: &mut [f32],
    scales: Option<(&[f32], &[f32])>,
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
) {
    let columns = tile.groups.end * LANE_GROUP;
    assert!(tile.rows <= MAX_TILE_ROWS && columns <= KEYS && scores.len() >= tile.rows * KEYS);
    assert!(max.len() == tile.rows && sum.len() == tile.rows * LANE_GROUP);
    assert!(out.len().is_multiple_of(tile.rows * LANE_GROUP));
    assert!(scales.is_none_or(|(k, v)| k.len() >= columns && v.len() >= columns));
    // SAFETY: the assertions check that all accesses are in bounds.
    unsafe { online_softmax_tile(isa, tile, scores, scales, max, sum, out) }
}

isa_levels! {
    unsafe fn online_softmax_tile(
        tile: ScoreTile,
        scores: &mut [f32],
        scales: Option<(&[f32], &[f32])>,
        max: &mut [f32],
        sum: &mut [f32],
        out: &mut [f32],
    ) = online_softmax_body;
    /// Divides outputs `(rows, padded)` by their sums, `(rows, 16)` per lane; lane 0 is set to the
    /// total.
    unsafe fn normalize(sum: &mut [f32], out: &mut [f32]) = normalize_body;
    unsafe fn softmax_backward_tile(
        tile: ScoreTile,
        columns: usize,
        p: &mut [f32],
        ds: &mut [f32],
        lse: &[f32],
        delta: &[f32],
    ) = softmax_backward_body;
}

#[inline(always)]
unsafe fn online_softmax_body<S: Lanes>(
    tile: ScoreTile,
    scores: &mut [f32],
    scales: Option<(&[f32], &[f32])>,
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
) {
    // SAFETY: the features are those of `S`, and the safe wrapper asserts the lengths of all slices.
    unsafe {
        match tile.groups.len() {
            1 => online_softmax_rows::<S, 1>(tile, scores, scales, max, sum, out),
            2 => online_softmax_rows::<S, 2>(tile, scores, scales, max, sum, out),
            3 => online_softmax_rows::<S, 3>(tile, scores, scales, max, sum, out),
            4 => online_softmax_rows::<S, 4>(tile, scores, scales, max, sum, out),
            _ => unreachable!("a block has {KEYS} keys"),
        }
    }
}

/// `G` groups of scores, held in registers.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // registers are named by constant indices
unsafe fn online_softmax_rows<S: Lanes, const G: usize>(
    tile: ScoreTile,
    scores: &mut [f32],
    scales: Option<(&[f32], &[f32])>,
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
) {
    let width = out.len() / tile.rows;
    let start = tile.groups.start * LANE_GROUP;
    for row in 0..tile.rows {
        let (low, high) = tile.limits.rows[row];
        // SAFETY: the features are those of `S`, and the safe wrapper asserts the lengths of all slices.
        unsafe {
            let line = scores.as_mut_ptr().add(row * KEYS + start);
            if low == high {
                for g in 0..G {
                    S::splat(0.0).store(line.add(g * LANE_GROUP));
                }
                continue;
            }
            let mut lanes = [S::splat(0.0); G];
            for g in 0..G {
                lanes[g] = S::load(line.add(g * LANE_GROUP));
                if let Some((keys, _)) = scales {
                    lanes[g] = lanes[g].mul(S::load(keys.as_ptr().add(start + g * LANE_GROUP)));
                }
            }
            if low > start || high < start + G * LANE_GROUP {
                for g in 0..G {
                    let from = (start + g * LANE_GROUP) as isize;
                    let (low, high) = (low as isize - from, high as isize - from);
                    lanes[g] = lanes[g].within(low, high, f32::NEG_INFINITY);
                }
            }
            let mut largest = lanes[0];
            for g in 1..G {
                largest = lanes[g].max(largest);
            }
            let (largest, before) = (largest.largest(), max[row]);
            let sums = sum.as_mut_ptr().add(row * LANE_GROUP);
            // A score may exceed the maximum a little without loss, which saves rescaling the output.
            if largest > before + RESCALE_THRESHOLD {
                max[row] = largest;
                let shrink = exp2(S::splat(before - largest));
                S::load(sums).mul(shrink).store(sums);
                let out = out.as_mut_ptr().add(row * width);
                let mut column = 0;
                while column < width {
                    S::load(out.add(column)).mul(shrink).store(out.add(column));
                    column += LANE_GROUP;
                }
            }
            let max = S::splat(max[row]);
            let mut total = S::load(sums);
            for g in 0..G {
                let weight = exp2(lanes[g].sub(max));
                total = total.add(weight);
                let weight = match scales {
                    Some((_, values)) => {
                        weight.mul(S::load(values.as_ptr().add(start + g * LANE_GROUP)))
                    }
                    None => weight,
                };
                weight.store(line.add(g * LANE_GROUP));
            }
            total.store(sums);
        }
    }
}

#[inline(always)]
unsafe fn normalize_body<S: Lanes>(sum: &mut [f32], out: &mut [f32]) {
    let rows = sum.len() / LANE_GROUP;
    let width = out.len() / rows;
    for row in 0..rows {
        // SAFETY: the features are those of `S`, and the safe wrapper asserts the lengths of all slices.
        unsafe {
            let total = S::load(sum.as_ptr().add(row * LANE_GROUP)).sum();
            sum[row * LANE_GROUP] = total;
            let factor = S::splat(1.0 / total);
            let out = out.as_mut_ptr().add(row * width);
            let mut column = 0;
            while column < width {
                S::load(out.add(column)).mul(factor).store(out.add(column));
                column += LANE_GROUP;
            }
        }
    }
}

/// The gradients of [`forward`]: overwrites those of q, k and v.
///
/// With weights `p` and `dp = dout · vᵀ`: `ds = p (dp - Σ dout · out)`, then `dv = pᵀ · dout`,
/// `dq = ds · k`, `dk = dsᵀ · q`, the last two scaled.
///
/// Shapes: `dout (N, heads · head_dim)`.
#[allow(clippy::too_many_arguments)] // three matrices in, three out, and the mask
pub(crate) fn backward(
    isa: Isa,
    qkv: Qkv,
    heads: Heads,
    segments: &[Segment],
    scores: impl Into<AttentionConfig>,
    attended: AttentionForward,
    dout: &[f32],
    grad: QkvGrad,
) {
    let scores = scores.into();
    let (width, group, head_dim) = (heads.q_width(), heads.group(), heads.head_dim);
    let (mut rows, mut work, mut partial_tokens) = (Vec::new(), 0, 0);
    for segment in segments.iter().filter(|segment| !segment.is_empty()) {
        work += segment.len() * segment.positions() * width;
        let per_head = group > 1 && segment.len() >= LONG_ROW;
        let row = RowGrad { segment, per_head, at: partial_tokens };
        partial_tokens += row.partial_tokens() * row.stride(heads);
        rows.push(row);
    }
    let (mut tasks, mut sums) = (Vec::new(), Vec::new());
    for (i, row) in rows.iter().enumerate() {
        let followed = rows[i + 1..].iter().any(|other| other.has_prefix(row.segment));
        for kv_head in 0..heads.kv_heads {
            let all = kv_head * group..(kv_head + 1) * group;
            if row.per_head {
                tasks.extend(all.map(|head| (row, kv_head, head..head + 1)));
            } else {
                tasks.push((row, kv_head, all));
            }
            if row.per_head || followed {
                sums.push((i, kv_head));
            }
        }
    }
    AlignedScratch::with(&PARTIALS, |scratch| {
        let parts = scratch.split([partial_tokens, partial_tokens]).map(SharedMutPtr::new);
        par_for_each(tasks, work, |(row, kv_head, query_heads)| {
            let column = kv_head * head_dim;
            let [dk, dv] = [(grad.k, parts[0]), (grad.v, parts[1])].map(|(whole, parts)| {
                let part = StridedHeadsMut { target: parts.at(row.at), stride: row.stride(heads) };
                let before = row.segment.prefix.len();
                if row.per_head {
                    let column = query_heads.start * head_dim;
                    KeyGrad { before, prefix: (part, 0, column), own: (part, before, column) }
                } else {
                    let own = (whole, row.segment.tokens.start, column);
                    KeyGrad { before, prefix: (part, 0, column), own }
                }
            });
            let task = Backward {
                queries: Queries {
                    q: qkv.q,
                    tokens: row.segment.tokens.clone(),
                    position: row.segment.prefix.len(),
                    heads: query_heads,
                },
                k: qkv.k.column(column),
                v: qkv.v.column(column),
                row: row.segment,
                scores,
                heads,
                attended,
                dout: StridedHeads { values: dout, stride: width },
                dq: grad.q,
                dk,
                dv,
            };
            // SAFETY: each task writes dq of its own heads and tokens, and of dk and dv those of
            // its own key head and tokens, or the partial sums of its row and head.
            unsafe { task.run(isa) };
        });
        par_for_each(sums, 2 * partial_tokens, |(i, kv_head)| {
            for (to, parts) in [(grad.k, parts[0]), (grad.v, parts[1])] {
                // SAFETY: all partial sums are written; each task adds those of one key head of the
                // tokens of one row.
                unsafe { rows[i].sum_partials(to, parts, &rows[i + 1..], kv_head, heads) };
            }
        });
    });
}

/// How the contribution of a row to the gradients of keys and values is computed. For tokens that other
/// tasks also attend to, it goes to partial sums, added later: `(rows, stride)` values from `at` on, for each
/// token of the prefix and, if `per_head`, for each token of the row.
struct RowGrad<'a> {
    segment: &'a Segment,
    /// Whether each query head has a separate task and partial sum.
    per_head: bool,
    at: usize,
}

impl RowGrad<'_> {
    /// Number of tokens with partial sums.
    fn partial_tokens(&self) -> usize {
        self.segment.prefix.len() + if self.per_head { self.segment.len() } else { 0 }
    }

    /// Stride between tokens: a partial sum for each task.
    fn stride(&self, heads: Heads) -> usize {
        if self.per_head { heads.q_width() } else { heads.kv_width() }
    }

    fn has_prefix(&self, segment: &Segment) -> bool {
        !self.segment.prefix.is_empty() && self.segment.prefix == segment.tokens
    }

    /// Sums the gradients of a key head of this row's own tokens: its own query heads one after
    /// the other, then the rows that have it as their prefix.
    ///
    /// # Safety
    /// No other thread may access these columns of `to` or write to those of `parts`.
    unsafe fn sum_partials(
        &self,
        to: StridedHeadsMut,
        parts: SharedMutPtr,
        rows_behind: &[RowGrad],
        kv_head: usize,
        heads: Heads,
    ) {
        let column = kv_head * heads.head_dim;
        let add = |row: &RowGrad, first: usize, overwrite: bool| {
            let part = StridedHeadsMut { target: parts.at(row.at), stride: row.stride(heads) };
            let width = row.stride(heads) / heads.kv_heads;
            for (i, token) in self.segment.tokens.clone().enumerate() {
                // SAFETY: this function's contract guarantees that no other thread writes to these elements.
                let (to, from) = unsafe {
                    let from = part.at(first + i, kv_head * width, width);
                    (to.at(token, column, heads.head_dim), from)
                };
                if overwrite {
                    to.fill(0.0);
                }
                for from in from.chunks_exact(heads.head_dim) {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                }
            }
        };
        if self.per_head {
            add(self, self.segment.prefix.len(), true);
        }
        for row in rows_behind.iter().filter(|row| row.has_prefix(self.segment)) {
            add(row, 0, false);
        }
    }
}

/// Destination of dk or dv of the keys of a row: prefix and own tokens, each with the token and column it
/// begins at.
#[derive(Clone, Copy)]
struct KeyGrad {
    /// Positions of the prefix.
    before: usize,
    prefix: (StridedHeadsMut, usize, usize),
    own: (StridedHeadsMut, usize, usize),
}

impl KeyGrad {
    /// The head at a position of the row.
    ///
    /// # Safety
    /// As for [`SharedMutPtr::slice`].
    unsafe fn at<'a>(self, position: usize, head_dim: usize) -> &'a mut [f32] {
        let ((columns, token, column), i) = match position.checked_sub(self.before) {
            Some(own) => (self.own, own),
            None => (self.prefix, position),
        };
        // SAFETY: this function's contract guarantees that no other thread accesses these elements.
        unsafe { columns.at(token + i, column, head_dim) }
    }
}

/// Some query heads of one key head of one row.
struct Backward<'a> {
    queries: Queries<'a>,
    k: StridedHeads<'a>,
    v: StridedHeads<'a>,
    row: &'a Segment,
    scores: AttentionConfig,
    heads: Heads,
    attended: AttentionForward<'a>,
    dout: StridedHeads<'a>,
    dq: StridedHeadsMut,
    dk: KeyGrad,
    dv: KeyGrad,
}

/// Scratch of the backward pass of some heads.
struct BackwardBuffers<'s> {
    /// Queries, gradients of the output and gradients of the queries, `(rows, padded)`.
    q: &'s mut [f32],
    dout: &'s mut [f32],
    dq: &'s mut [f32],
    /// Per row, see [`Backward::per_row`].
    lse: &'s mut [f32],
    delta: &'s mut [f32],
    /// A block of keys and values: panels `(head_dim, 16)`, and rows `(KEYS, padded)` of the keys.
    kt: &'s mut [f32],
    vt: &'s mut [f32],
    k: &'s mut [f32],
    /// Gradients of the block, `(KEYS, padded)`.
    dk: &'s mut [f32],
    dv: &'s mut [f32],
    /// Weights and gradients of scores of some rows, `(KEYS, KEYS)`.
    p: &'s mut [f32],
    ds: &'s mut [f32],
    /// Derivative of the softcap in a tile, if there is one.
    slopes: &'s mut [f32],
}

impl Backward<'_> {
    /// # Safety
    /// No other thread may access the heads of the row in `dq`, `dk` and `dv`.
    unsafe fn run(&self, isa: Isa) {
        let Self { queries, row: segment, scores, heads, .. } = self;
        let (head_dim, padded, rows) = (heads.head_dim, heads.padded(), queries.rows());
        let (length, per_token) = (segment.positions(), queries.heads.len());
        let scale = scores.scale(*heads) * std::f32::consts::LOG2_E; // scores are powers of two
        AlignedScratch::with(&SCRATCH, |scratch| {
            let [q, dout, dq, lse, delta, kt, vt, k, dk, dv, p, ds, slopes] = scratch.split([
                rows * padded,
                rows * padded,
                rows * padded,
                rows,
                rows,
                KEYS * head_dim,
                KEYS * head_dim,
                KEYS * padded,
                KEYS * padded,
                KEYS * padded,
                KEYS * KEYS,
                KEYS * KEYS,
                scores.cap.map_or(0, |_| MAX_TILE_ROWS * KEYS),
            ]);
            queries.gather(isa, queries.q, head_dim, scale, q);
            queries.gather(isa, self.dout, head_dim, 1.0, dout);
            self.per_row(isa, dout, lse, delta);
            dq.fill(0.0);
            let mut b =
                BackwardBuffers { q, dout, dq, lse, delta, kt, vt, k, dk, dv, p, ds, slopes };
            for start in (0..length).step_by(KEYS) {
                let block = start..length.min(start + KEYS);
                panels(self.k, segment, &block, head_dim, b.k, b.kt);
                panels(self.v, segment, &block, head_dim, b.k, b.vt);
                padded_rows(self.k, segment, &block, head_dim, b.k);
                b.dk.fill(0.0);
                b.dv.fill(0.0);
                let rows_attending_to = self.rows_attending_to(&block);
                for first in rows_attending_to.clone().step_by(KEYS) {
                    let taken = first..rows_attending_to.end.min(first + KEYS);
                    for row in taken.clone().step_by(tile_rows(isa)) {
                        let tile = row..taken.end.min(row + tile_rows(isa));
                        self.add_query_gradients(isa, &block, tile, first, &mut b);
                    }
                    for low in (0..block.len()).step_by(tile_rows(isa)) {
                        let high = block.len().min(low + tile_rows(isa));
                        self.add_key_gradients(isa, start, low..high, &taken, &mut b);
                    }
                }
                // `q` was multiplied by the scale in powers of two.
                let parts = [(self.dk, &*b.dk, std::f32::consts::LN_2), (self.dv, &*b.dv, 1.0)];
                for (to, from, factor) in parts {
                    for (position, from) in block.clone().zip(from.chunks_exact(padded)) {
                        // SAFETY: this function's contract guarantees exclusive access to these heads and
                        // tokens.
                        let to = unsafe { to.at(position, head_dim) };
                        to.iter_mut().zip(from).for_each(|(to, x)| *to = x * factor);
                    }
                }
            }
            for (token, dq) in queries.tokens.clone().zip(b.dq.chunks_exact(per_token * padded)) {
                for (head, dq) in queries.heads.clone().zip(dq.chunks_exact(padded)) {
                    // SAFETY: this function's contract guarantees exclusive access to these heads and tokens.
                    let to = unsafe { self.dq.at(token, head * head_dim, head_dim) };
                    to.iter_mut().zip(dq).for_each(|(to, x)| *to = x * scores.scale(*heads));
                }
            }
        });
    }

    /// Computes the weights and the gradients of scores of a tile of rows over a block of keys, and adds
    /// to the gradients of the queries. `first` is the first row of `p` and `ds`.
    fn add_query_gradients(
        &self,
        isa: Isa,
        block: &Range<usize>,
        tile: Range<usize>,
        first: usize,
        b: &mut BackwardBuffers,
    ) {
        let Self { queries, scores, heads, .. } = self;
        let (head_dim, padded, row) = (heads.head_dim, heads.padded(), tile.start);
        let limits = queries.limits(&tile, block, scores.window);
        let (low, high) = limits.any;
        if low == high {
            return;
        }
        let groups = low / LANE_GROUP..high.div_ceil(LANE_GROUP);
        let from = groups.start * LANE_GROUP;
        let size = (tile.len(), groups.len(), head_dim);
        let at = (row - first) * KEYS;
        for (left, right, to) in [(&*b.q, &*b.kt, &mut *b.p), (&*b.dout, &*b.vt, &mut *b.ds)] {
            let left = Left { values: &left[row * padded..], stride: padded };
            let right = Right {
                values: &right[from * head_dim..],
                row_stride: LANE_GROUP,
                group_stride: LANE_GROUP * head_dim,
            };
            product(isa, size, left, right, &mut to[at + from..], KEYS, false);
        }
        let known = from..groups.end * LANE_GROUP;
        if let Some(cap) = scores.cap {
            let rows = b.p[at..].chunks_exact_mut(KEYS).take(tile.len());
            for (p, slopes) in rows.zip(b.slopes.chunks_exact_mut(KEYS)) {
                let (p, slopes) = (&mut p[known.clone()], &mut slopes[known.clone()]);
                cap_scores_and_slopes(isa, p, slopes, cap);
            }
        }
        softmax_backward(
            isa,
            ScoreTile { rows: tile.len(), groups, limits: &limits },
            block.len().next_multiple_of(LANE_GROUP),
            (&mut b.p[at..], &mut b.ds[at..]),
            (&b.lse[tile.clone()], &b.delta[tile.clone()]),
        );
        if scores.cap.is_some() {
            let rows = b.ds[at..].chunks_exact_mut(KEYS).take(tile.len());
            for (ds, slopes) in rows.zip(b.slopes.chunks_exact(KEYS)) {
                times(isa, &mut ds[known.clone()], &slopes[known.clone()]);
            }
        }
        let left = Left { values: &b.ds[at + low..], stride: KEYS };
        let right = rows_of(&b.k[low * padded..], padded);
        let size = (tile.len(), padded / LANE_GROUP, high - low);
        product(isa, size, left, right, &mut b.dq[row * padded..], padded, true);
    }

    /// Adds the contribution of the rows of `taken`, whose `p` and `ds` are given, to the gradients of some
    /// `keys` of the block that begins at `start`.
    fn add_key_gradients(
        &self,
        isa: Isa,
        start: usize,
        keys: Range<usize>,
        taken: &Range<usize>,
        b: &mut BackwardBuffers,
    ) {
        let (padded, low) = (self.heads.padded(), keys.start);
        let rows_attending_to = self.rows_attending_to(&(start + low..start + keys.end));
        let (begin, end) =
            (rows_attending_to.start.max(taken.start), rows_attending_to.end.min(taken.end));
        if begin >= end {
            return;
        }
        let size = (keys.len(), padded / LANE_GROUP, end - begin);
        let at = (begin - taken.start) * KEYS + low;
        for (left, right, to) in [(&*b.p, &*b.dout, &mut *b.dv), (&*b.ds, &*b.q, &mut *b.dk)] {
            let left = Left { values: &left[at..], stride: KEYS };
            let right = rows_of(&right[begin * padded..], padded);
            product_transposed(isa, size, left, right, &mut to[low * padded..], padded, true);
        }
    }

    /// The rows that attend to any of these keys.
    fn rows_attending_to(&self, keys: &Range<usize>) -> Range<usize> {
        let (length, before) = (self.row.positions(), self.row.prefix.len());
        let end = self
            .scores
            .window
            .map_or(length, |window| length.min((keys.end - 1).saturating_add(window)));
        let [start, end] = [keys.start, end].map(|position| position.saturating_sub(before));
        start * self.queries.heads.len()..end * self.queries.heads.len()
    }

    /// Each row's log-sum-exp in powers of two, and `Σ dout · out`.
    fn per_row(&self, isa: Isa, dout: &[f32], lse: &mut [f32], delta: &mut [f32]) {
        let head_dim = self.heads.head_dim;
        let out = StridedHeads { values: self.attended.out, stride: self.heads.q_width() };
        let dout = dout.chunks_exact(self.heads.padded());
        for (row, ((lse, delta), dout)) in lse.iter_mut().zip(delta).zip(dout).enumerate() {
            let (token, head) = self.queries.of(row);
            let known = self.attended.lse[token * self.heads.heads + head];
            *lse = known * std::f32::consts::LOG2_E;
            let out = out.at(token, head * head_dim, head_dim);
            *delta = dot(isa, out, &dout[..head_dim]);
        }
    }
}

fn rows_of(values: &[f32], width: usize) -> Right<'_, f32> {
    Right { values, row_stride: width, group_stride: LANE_GROUP }
}

/// Scores become weights `p = 2^(score - lse)`, and `ds`, which holds `dp`, becomes
/// `p (dp - delta)`; both are 0 in all `columns` that are masked for a row.
fn softmax_backward(
    isa: Isa,
    tile: ScoreTile,
    columns: usize,
    (p, ds): (&mut [f32], &mut [f32]),
    (lse, delta): (&[f32], &[f32]),
) {
    let all = tile.rows * KEYS;
    assert!(tile.groups.end * LANE_GROUP <= columns && columns <= KEYS);
    assert!(tile.rows <= MAX_TILE_ROWS && p.len() >= all && ds.len() >= all);
    assert!(lse.len() == tile.rows && delta.len() == tile.rows);
    // SAFETY: the assertions check that all accesses are in bounds.
    unsafe { softmax_backward_tile(isa, tile, columns, p, ds, lse, delta) }
}

#[inline(always)]
unsafe fn softmax_backward_body<S: Lanes>(
    tile: ScoreTile,
    columns: usize,
    p: &mut [f32],
    ds: &mut [f32],
    lse: &[f32],
    delta: &[f32],
) {
    let (start, end) = (tile.groups.start * LANE_GROUP, tile.groups.end * LANE_GROUP);
    for row in 0..tile.rows {
        let (low, high) = tile.limits.rows[row];
        let edge = low > start || high < end;
        // SAFETY: the features are those of `S`, and the safe wrapper asserts the lengths of all slices.
        unsafe {
            let (lse, delta) = (S::splat(lse[row]), S::splat(delta[row]));
            let p = p.as_mut_ptr().add(row * KEYS);
            let ds = ds.as_mut_ptr().add(row * KEYS);
            let mut column = 0;
            while column < columns {
                if column < start || column >= end {
                    S::splat(0.0).store(p.add(column));
                    S::splat(0.0).store(ds.add(column));
                } else {
                    let mut weight = exp2(S::load(p.add(column)).sub(lse));
                    let mut difference = S::load(ds.add(column)).sub(delta);
                    if edge {
                        let low = low as isize - column as isize;
                        let high = high as isize - column as isize;
                        weight = weight.within(low, high, 0.0);
                        difference = difference.within(low, high, 0.0);
                    }
                    weight.store(p.add(column));
                    weight.mul(difference).store(ds.add(column));
                }
                column += LANE_GROUP;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{finite_differences, normal, parity};
    use super::*;

    fn inputs(n: usize, heads: Heads) -> [Tensor; 3] {
        [
            normal(1, &[n, heads.q_width()]),
            normal(2, &[n, heads.kv_width()]),
            normal(3, &[n, heads.kv_width()]),
        ]
    }

    /// The CPU kernel on a given ISA level.
    fn fast(
        isa: Isa,
        t: &[Tensor],
        heads: Heads,
        segments: &Arc<[Segment]>,
        scores: impl Into<AttentionConfig>,
    ) -> Result<Tensor> {
        let (segments, scores) = (segments.clone(), scores.into());
        let op = CausalAttention { isa, heads, segments, scores, lse: OnceLock::new() };
        t[0].apply_op3(&t[1], &t[2], op)
    }

    /// An attention config with an effective softcap and an unusual scale.
    fn capped(window: Option<usize>) -> AttentionConfig {
        AttentionConfig { window, scale: Some(0.6), cap: Some(1.5) }
    }

    /// A row's length, and the index of its prefix row.
    type Length = (usize, Option<usize>);

    /// Contiguous rows.
    fn rows(lengths: &[Length]) -> Arc<[Segment]> {
        let mut rows: Vec<Segment> = Vec::new();
        for &(length, prefix) in lengths {
            let start = rows.last().map_or(0, |row| row.tokens.end);
            let prefix = prefix.map_or(0..0, |row| rows[row].tokens.clone());
            rows.push(Segment { tokens: start..start + length, prefix });
        }
        rows.into()
    }

    fn tokens(rows: &[Segment]) -> usize {
        rows.last().unwrap().tokens.end
    }

    #[test]
    fn parity_over_packed_rows_shared_prefixes_grouped_heads_and_windows() {
        let heads = |heads, kv_heads, head_dim| Heads { heads, kv_heads, head_dim };
        let cases: [(Heads, &[Length]); 9] = [
            (heads(4, 2, 16), &[(5, None), (1, None), (24, None)]),
            (heads(3, 1, 8), &[(130, None)]),
            (heads(2, 2, 12), &[(64, None), (0, None), (129, None)]),
            (heads(1, 1, 4), &[(1, None), (3, None)]),
            (heads(5, 1, 33), &[(41, None), (LONG_ROW + 9, None)]),
            // Blocks of keys with the end of a prefix and the beginning of its row.
            (heads(6, 2, 16), &[(70, None), (9, Some(0)), (1, Some(0)), (61, Some(0))]),
            // Plain rows among groups, prefixes of whole blocks and of one token, empty rows.
            (
                heads(2, 1, 12),
                &[(7, None), (64, None), (5, Some(1)), (1, None), (0, Some(1)), (30, Some(3))],
            ),
            // Long rows, whose query heads have a task each, before and after short ones.
            (heads(4, 2, 8), &[(LONG_ROW, None), (3, Some(0)), (LONG_ROW + 3, Some(0))]),
            (heads(3, 1, 5), &[(20, None), (LONG_ROW + 70, Some(0)), (2, Some(0)), (3, None)]),
        ];
        for (heads, lengths) in cases {
            let segments = rows(lengths);
            let inputs = inputs(tokens(&segments), heads);
            let windows = [None, Some(2), Some(20), Some(70)].map(AttentionConfig::from);
            let capped = [None, Some(20)].map(capped);
            for scores in windows.into_iter().chain(capped) {
                for isa in Isa::available() {
                    parity(
                        &inputs,
                        |t| fast(isa, t, heads, &segments, scores),
                        |t| {
                            let [q, k, v] = [&t[0], &t[1], &t[2]];
                            causal_attention(q, k, v, heads, &segments, scores, Compute::REFERENCE)
                        },
                    );
                }
            }
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 8 };
        for lengths in [&[(7, None), (13, None)][..], &[(6, None), (5, Some(0)), (9, Some(0))]] {
            let segments = rows(lengths);
            let scores = [None.into(), Some(4).into(), capped(Some(4))];
            for (isa, scores) in Isa::available().flat_map(|isa| scores.map(|scores| (isa, scores)))
            {
                finite_differences(&inputs(20, heads), |t| fast(isa, t, heads, &segments, scores));
            }
        }
    }

    /// Rows that share a prompt as prefix give the same bits as rows that each begin with a copy of it.
    #[test]
    fn a_shared_prefix_gives_the_bits_of_its_copies() {
        let heads = Heads { heads: 6, kv_heads: 2, head_dim: 24 };
        for (prompt, responses) in [(70, [9, 200, 1]), (64, [64, 3, 5]), (3, [1, 2, 300])] {
            let mut lengths = vec![(prompt, None)];
            lengths.extend(responses.map(|length| (length, Some(0))));
            let shared = rows(&lengths);
            let copies = rows(&responses.map(|length| (prompt + length, None)));
            // The tokens of the copies, as indices into the shared layout.
            let places: Vec<u32> = shared[1..]
                .iter()
                .flat_map(|r| (0..r.positions()).map(|p| r.token(p) as u32))
                .collect();
            let places = Tensor::new(places, &candle_core::Device::Cpu).unwrap();
            let inputs = inputs(tokens(&shared), heads);
            let copied = inputs.each_ref().map(|t| t.index_select(&places, 0).unwrap());
            for (isa, window) in Isa::available().flat_map(|isa| [(isa, None), (isa, Some(90))]) {
                let ours = fast(isa, &inputs, heads, &shared, window).unwrap();
                let theirs = fast(isa, &copied, heads, &copies, window).unwrap();
                let bits = |t: Tensor| t.to_vec2::<f32>().unwrap();
                assert_eq!(bits(ours.index_select(&places, 0).unwrap()), bits(theirs), "{isa:?}");
            }
        }
    }

    #[test]
    fn column_ranges_of_one_buffer_match_separate_buffers() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 20 };
        let (n, q_width, kv_width) = (300, heads.q_width(), heads.kv_width());
        let stride = q_width + 2 * kv_width;
        let parts = inputs(n, heads).map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let starts = [0, q_width, q_width + kv_width];
        let widths = [q_width, kv_width, kv_width];
        let mut buffer = vec![0f32; n * stride];
        for ((part, start), width) in parts.iter().zip(starts).zip(widths) {
            for (row, part) in buffer.chunks_exact_mut(stride).zip(part.chunks_exact(width)) {
                row[start..start + width].copy_from_slice(part);
            }
        }
        let dout = normal(5, &[n, q_width]).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let run = |qkv: Qkv, grad: QkvGrad| {
            let (isa, segments) = (Isa::current(), rows(&[(280, None), (n - 280, None)]));
            let (mut out, mut lse) = (vec![0f32; n * q_width], vec![0f32; n * heads.heads]);
            forward(isa, qkv, heads, &segments, None, &mut out, &mut lse);
            let attended = AttentionForward { out: &out, lse: &lse };
            backward(isa, qkv, heads, &segments, None, attended, &dout, grad);
            out
        };

        let mut grads = parts.clone().map(|part| vec![f32::NAN; part.len()]);
        let [q, k, v] = &parts;
        let [dq, dk, dv] = &mut grads;
        let qkv = Qkv {
            q: StridedHeads { values: q, stride: q_width },
            k: StridedHeads { values: k, stride: kv_width },
            v: StridedHeads { values: v, stride: kv_width },
        };
        let separate = run(qkv, QkvGrad::separate((dq, q_width), (dk, kv_width), (dv, kv_width)));

        let mut again = parts.clone().map(|part| vec![f32::NAN; part.len()]);
        let [dq, dk, dv] = &mut again;
        let [q, k, v] = starts.map(|start| StridedHeads { values: &buffer[start..], stride });
        let grad = QkvGrad::separate((dq, q_width), (dk, kv_width), (dv, kv_width));
        assert_eq!(separate, run(Qkv { q, k, v }, grad));
        assert_eq!(grads, again);
    }

    #[test]
    fn changing_one_row_leaves_its_neighbours_bit_equal() {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 8 };
        let segments = rows(&[(70, None), (20, None), (10, None)]);
        let [q, k, v] = inputs(100, heads);
        let other = normal(9, &[20, heads.kv_width()]);
        let changed = k.slice_assign(&[70..90, 0..heads.kv_width()], &other).unwrap();
        let run = |k: &Tensor| {
            let y = causal_attention(&q, k, &v, heads, &segments, None, Compute::F32).unwrap();
            y.to_vec2::<f32>().unwrap()
        };
        let (before, after) = (run(&k), run(&changed));
        assert_eq!(before[..70], after[..70]);
        assert_eq!(before[90..], after[90..]);
        assert_ne!(before[70..90], after[70..90]);
    }

    #[test]
    fn threads_do_not_matter() {
        let heads = Heads { heads: 6, kv_heads: 2, head_dim: 16 };
        let segments =
            rows(&[(300, None), (40, None), (20, Some(1)), (270, Some(1)), (9, Some(0))]);
        let inputs = inputs(tokens(&segments), heads);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let vars = inputs.each_ref().map(|t| candle_core::Var::from_tensor(t).unwrap());
                let t = vars.each_ref().map(|var| var.as_tensor().clone());
                let y = fast(Isa::current(), &t, heads, &segments, None).unwrap();
                let grads = y.sqr().unwrap().backward().unwrap();
                vars.each_ref().map(|v| grads.get(v).unwrap().to_vec2::<f32>().unwrap())
            })
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn rows_must_partition_the_tokens() {
        let heads = Heads { heads: 1, kv_heads: 1, head_dim: 4 };
        let [q, k, v] = inputs(6, heads);
        for compute in [Compute::F32, Compute::REFERENCE] {
            let y = causal_attention(&q, &k, &v, heads, &rows(&[(5, None)]), None, compute);
            assert!(y.is_err());
        }
    }
}
