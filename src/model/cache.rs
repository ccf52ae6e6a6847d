//! The KV cache, per layer, row and key head, exact or quantized: in panels for the CPU kernels, or in
//! tensors for the reference backend.

mod tensors;

use std::ops::Range;

use candle_core::{Result, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::backend::CpuScratch;
use super::decoder::Decoder;
use crate::isa::Isa;
use crate::ops::attention::{
    self, AttentionConfig, CachedQueries, Heads, KeyBlock, KeyValueBlocks, Qkv,
};
use crate::ops::lanes::{Element, LANE_GROUP};
use crate::ops::{BackendKind, Compute, Precision, Segment, par_for_each};
use crate::string_enum::string_enum;
use tensors::TensorRow;

string_enum! {
    /// The data type of the KV cache.
    #[derive(Debug)]
    pub enum CacheType {
        /// F32.
        F32 = "f32",
        /// Half precision: half the memory.
        F16 = "f16",
        /// Eight bits, and a scale per head and token: a little more than a quarter.
        Q8 = "q8",
    }
}

#[allow(clippy::derivable_impls)] // string_enum! marks no variant as the default
impl Default for CacheType {
    fn default() -> Self {
        Self::F32
    }
}

impl CacheType {
    /// The default for a compute precision.
    pub fn of(compute: Compute) -> Self {
        match compute.precision {
            Precision::F32 => Self::F32,
            Precision::Int16 | Precision::Int8 => Self::F16,
        }
    }
}

/// The KV cache of a batch of rows with different lengths, in the layout of a backend.
#[derive(Debug, Clone)]
pub struct KvCache {
    rows: CacheRows,
    /// Rows of more tokens than this have another RoPE scaling, so that their cache must be recomputed
    /// once they grow beyond it (longrope).
    longrope_threshold: Option<usize>,
}

/// The rows of a cache, by backend.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one per batch, never in a list
enum CacheRows {
    Cpu(PanelCache),
    Reference(TensorCache),
}

/// The cache of [`Cpu`](super::backend::Cpu).
pub(super) type PanelCache = LayerCaches<PanelRow>;
/// The cache of [`Reference`](super::backend::Reference).
pub(super) type TensorCache = LayerCaches<TensorRow>;

/// Evaluates an expression on the rows of a cache, for every backend.
macro_rules! on_rows {
    ($cache:expr, $rows:ident => $value:expr) => {
        match $cache {
            CacheRows::Cpu($rows) => $value,
            CacheRows::Reference($rows) => $value,
        }
    };
}

/// The keys and values of one row in one layer.
pub(super) trait CachedRow: Clone + std::fmt::Debug {
    /// Buffers of a decode step, reused by the next. They are not copied.
    type Scratch: Default + std::fmt::Debug;

    /// Its tokens.
    fn len(&self) -> usize;

    /// Drops all but the first tokens.
    fn truncate(&mut self, tokens: usize);
}

/// The rows of every layer.
#[derive(Debug)]
pub(super) struct LayerCaches<R: CachedRow> {
    layers: Vec<Vec<R>>,
    kv_heads: usize,
    head_dim: usize,
    pub scratch: R::Scratch,
}

impl<R: CachedRow> Clone for LayerCaches<R> {
    fn clone(&self) -> Self {
        self.with_layers(self.layers.clone())
    }
}

impl<R: CachedRow> LayerCaches<R> {
    fn new(row: R, rows: usize, layers: usize, heads: Heads) -> Self {
        let Heads { kv_heads, head_dim, .. } = heads;
        let (layers, scratch) = (vec![vec![row; rows]; layers], R::Scratch::default());
        Self { layers, kv_heads, head_dim, scratch }
    }

    fn with_layers(&self, layers: Vec<Vec<R>>) -> Self {
        let (kv_heads, head_dim) = (self.kv_heads, self.head_dim);
        Self { layers, kv_heads, head_dim, scratch: R::Scratch::default() }
    }

    fn rows(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    fn len(&self, row: usize) -> usize {
        self.layers.first().map_or(0, |layer| layer[row].len())
    }

    fn take(&mut self, row: usize) -> Self {
        let layers = self.layers.iter_mut().map(|layer| vec![layer.remove(row)]).collect();
        self.with_layers(layers)
    }

    fn truncate(&mut self, row: usize, tokens: usize) {
        for layer in &mut self.layers {
            layer[row].truncate(tokens);
        }
    }

    fn append(&mut self, other: Self) {
        assert_eq!((self.kv_heads, self.head_dim), (other.kv_heads, other.head_dim));
        assert_eq!(self.layers.len(), other.layers.len());
        for (layer, rows) in self.layers.iter_mut().zip(other.layers) {
            layer.extend(rows);
        }
    }

    fn into_rows(mut self) -> Vec<Self> {
        let layers = std::mem::take(&mut self.layers);
        let depth = layers.len();
        let rows = layers.first().map_or(0, Vec::len);
        let mut caches: Vec<Self> =
            (0..rows).map(|_| self.with_layers(Vec::with_capacity(depth))).collect();
        for layer in layers {
            for (cache, row) in caches.iter_mut().zip(layer) {
                cache.layers.push(vec![row]);
            }
        }
        caches
    }
}

/// The key heads of a row in panels, which the CPU's kernels read.
#[derive(Debug, Clone)]
pub(super) enum PanelRow {
    F32(Vec<HeadCache<f32>>),
    F16(Vec<HeadCache<f16>>),
    Q8(Vec<HeadCache<i8>>),
}

impl CachedRow for PanelRow {
    type Scratch = CpuScratch;

    fn len(&self) -> usize {
        match self {
            Self::F32(heads) => heads[0].len,
            Self::F16(heads) => heads[0].len,
            Self::Q8(heads) => heads[0].len,
        }
    }

    fn truncate(&mut self, tokens: usize) {
        self.heads_mut().into_iter().for_each(|head| head.truncate(tokens));
    }
}

impl PanelRow {
    fn new(kind: CacheType, Heads { kv_heads, head_dim, .. }: Heads) -> Self {
        match kind {
            CacheType::F32 => Self::F32(vec![HeadCache::new(head_dim); kv_heads]),
            CacheType::F16 => Self::F16(vec![HeadCache::new(head_dim); kv_heads]),
            CacheType::Q8 => Self::Q8(vec![HeadCache::new(head_dim); kv_heads]),
        }
    }

    fn heads_mut(&mut self) -> Vec<&mut dyn Append> {
        fn each_of<B: Stored>(heads: &mut [HeadCache<B>]) -> Vec<&mut dyn Append> {
            heads.iter_mut().map(|head| head as &mut dyn Append).collect()
        }
        match self {
            Self::F32(heads) => each_of(heads),
            Self::F16(heads) => each_of(heads),
            Self::Q8(heads) => each_of(heads),
        }
    }
}

impl CachedRow for TensorRow {
    type Scratch = ();

    fn len(&self) -> usize {
        self.len
    }

    fn truncate(&mut self, tokens: usize) {
        self.len = self.len.min(tokens);
    }
}

impl KvCache {
    /// An empty exact cache for `rows` rows that `decoder` reads.
    pub fn new(decoder: &Decoder, rows: usize) -> Self {
        Self::with_type(decoder, rows, CacheType::F32)
    }

    /// An empty cache for `rows` rows that `decoder` reads, where its backend computes.
    pub fn with_type(decoder: &Decoder, rows: usize, kind: CacheType) -> Self {
        let (config, backend) = (&decoder.config, decoder.compute.backend);
        let rows = CacheRows::new(backend, kind, rows, config.num_hidden_layers, config.heads());
        let longrope_threshold = config.long_inv_freq().map(|(original, _)| original);
        Self { rows, longrope_threshold }
    }

    /// Whether rows of `from` and of `to` tokens have the same RoPE scaling, so that the cache of one can
    /// be used for the other.
    pub fn same_rope_scaling(&self, from: usize, to: usize) -> bool {
        self.longrope_threshold.is_none_or(|most| (from > most) == (to > most))
    }

    /// Whether a backend reads its rows.
    pub(super) fn matches_layout(&self, backend: BackendKind) -> bool {
        self.rows.backend() == backend
    }

    /// The rows of a cache of [`Cpu`](super::backend::Cpu).
    ///
    /// # Errors
    /// If it is of another backend.
    pub(super) fn panels_mut(&mut self) -> Result<&mut PanelCache> {
        match &mut self.rows {
            CacheRows::Cpu(rows) => Ok(rows),
            other => Err(other.mismatch(BackendKind::Cpu)),
        }
    }

    /// The rows of a cache of [`Reference`](super::backend::Reference).
    ///
    /// # Errors
    /// If it is of another backend.
    pub(super) fn tensors_mut(&mut self) -> Result<&mut TensorCache> {
        match &mut self.rows {
            CacheRows::Reference(rows) => Ok(rows),
            other => Err(other.mismatch(BackendKind::Reference)),
        }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        on_rows!(&self.rows, rows => rows.rows())
    }

    /// The number of tokens that a row has.
    pub fn len(&self, row: usize) -> usize {
        on_rows!(&self.rows, rows => rows.len(row))
    }

    /// Whether no row has a token.
    pub fn is_empty(&self) -> bool {
        (0..self.rows()).all(|row| self.len(row) == 0)
    }

    /// Removes a row and returns it as a separate cache; the rows after it move up.
    pub fn take(&mut self, row: usize) -> Self {
        let rows = match &mut self.rows {
            CacheRows::Cpu(rows) => CacheRows::Cpu(rows.take(row)),
            CacheRows::Reference(rows) => CacheRows::Reference(rows.take(row)),
        };
        Self { rows, longrope_threshold: self.longrope_threshold }
    }

    /// Drops all of a row's tokens but the first `tokens`.
    pub fn truncate(&mut self, row: usize, tokens: usize) {
        on_rows!(&mut self.rows, rows => rows.truncate(row, tokens));
    }

    /// Appends the rows of another cache of the same decoder and type.
    ///
    /// # Errors
    /// If it is of another backend.
    pub fn append(&mut self, other: Self) -> Result<()> {
        match (&mut self.rows, other.rows) {
            (CacheRows::Cpu(rows), CacheRows::Cpu(other)) => rows.append(other),
            (CacheRows::Reference(rows), CacheRows::Reference(other)) => rows.append(other),
            (rows, other) => return Err(other.mismatch(rows.backend())),
        }
        Ok(())
    }

    /// Splits the cache into one per row.
    pub fn into_rows(self) -> Vec<Self> {
        let longrope_threshold = self.longrope_threshold;
        let rows: Vec<CacheRows> = match self.rows {
            CacheRows::Cpu(rows) => rows.into_rows().into_iter().map(CacheRows::Cpu).collect(),
            CacheRows::Reference(rows) => {
                rows.into_rows().into_iter().map(CacheRows::Reference).collect()
            }
        };
        rows.into_iter().map(|rows| Self { rows, longrope_threshold }).collect()
    }
}

impl CacheRows {
    fn new(
        backend: BackendKind,
        kind: CacheType,
        rows: usize,
        layers: usize,
        heads: Heads,
    ) -> Self {
        match backend {
            BackendKind::Cpu => {
                Self::Cpu(LayerCaches::new(PanelRow::new(kind, heads), rows, layers, heads))
            }
            BackendKind::Reference => {
                Self::Reference(LayerCaches::new(TensorRow::new(kind), rows, layers, heads))
            }
        }
    }

    fn backend(&self) -> BackendKind {
        match self {
            Self::Cpu(_) => BackendKind::Cpu,
            Self::Reference(_) => BackendKind::Reference,
        }
    }

    fn mismatch(&self, needed: BackendKind) -> candle_core::Error {
        let found = self.backend();
        let text = format!("the cache was made for backend {found}, needed one for {needed}");
        candle_core::Error::Msg(text)
    }
}

impl TensorCache {
    /// Appends the new tokens' keys and values and attends to all there are, as
    /// [`PanelCache::attend`], with tensors on the decoder's device.
    pub fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        (k, v): (&Tensor, &Tensor),
        heads: Heads,
        segments: &[Segment],
        scores: AttentionConfig,
    ) -> Result<Tensor> {
        assert_eq!((heads.kv_heads, heads.head_dim), (self.kv_heads, self.head_dim));
        let rows = &mut self.layers[layer];
        assert!(segments.len() <= rows.len(), "{} rows, {} cached", segments.len(), rows.len());
        let mut outs = Vec::new();
        for (row, segment) in rows.iter_mut().zip(segments).filter(|(_, s)| !s.is_empty()) {
            let part = |x: &Tensor| x.narrow(0, segment.tokens.start, segment.len());
            let first = attention::seen(row.len, scores.window).start;
            let by_head = |x: &Tensor| attention::by_head(&part(x)?, heads.kv_heads);
            row.append([by_head(k)?, by_head(v)?])?;
            let (k, v) = row.read(first)?;
            outs.push(attention::portable_row(&part(q)?, &k, &v, heads, scores)?);
        }
        match outs.is_empty() {
            true => Ok(q.clone()), // no tokens, and nothing to attend to
            false => Tensor::cat(&outs, 0),
        }
    }
}

impl PanelCache {
    /// Appends the new tokens' keys and values and attends to all there are, or to those in the
    /// window of `scores`: older ones are kept too. Queries see their own keys as the cache keeps
    /// them.
    ///
    /// Shapes: q `(N, heads · head_dim)`, k and v `(N, kv_heads · head_dim)`, `segments` the new
    /// tokens of each row, without prefixes → `out` as q, contiguous.
    #[allow(clippy::too_many_arguments)] // those of the attention kernels, and which layer
    pub fn attend(
        &mut self,
        isa: Isa,
        layer: usize,
        qkv: Qkv,
        heads: Heads,
        segments: &[Segment],
        scores: impl Into<AttentionConfig>,
        out: &mut [f32],
    ) {
        assert_eq!((heads.kv_heads, heads.head_dim), (self.kv_heads, self.head_dim));
        let rows = &mut self.layers[layer];
        assert!(segments.len() <= rows.len(), "{} rows, {} cached", segments.len(), rows.len());
        let mut appends = Vec::new();
        for (row, segment) in rows.iter_mut().zip(segments) {
            assert!(segment.prefix.is_empty(), "a cached row has all it sees in the cache");
            if !segment.is_empty() {
                let heads = row.heads_mut().into_iter().enumerate();
                appends.extend(heads.map(|(head, cache)| (head, cache, segment)));
            }
        }
        let tokens: usize = segments.iter().map(|segment| segment.len()).sum();
        par_for_each(appends, tokens * self.kv_heads * self.head_dim, |(head, cache, segment)| {
            let column = head * heads.head_dim;
            cache.reserve(segment.len());
            for token in segment.tokens.clone() {
                let k = &qkv.k.values[token * qkv.k.stride + column..][..heads.head_dim];
                let v = &qkv.v.values[token * qkv.v.stride + column..][..heads.head_dim];
                cache.append(k, v);
            }
        });

        let queries = CachedQueries { q: qkv.q, heads, segments, scores: scores.into() };
        let lengths: Vec<usize> = rows.iter().map(PanelRow::len).collect();
        queries.attend(isa, &lengths, out, |row, head, task| match &rows[row] {
            PanelRow::F32(heads) => task.run(&heads[head]),
            PanelRow::F16(heads) => task.run(&heads[head]),
            PanelRow::Q8(heads) => task.run(&heads[head]),
        });
    }
}

/// The keys and values of one key head of a row.
///
/// Keys are in panels `(head_dim, 16)`, one for every 16 tokens, so that scores of 16 keys are
/// sums over broadcast values of the query; values in rows padded to a multiple of 16.
#[derive(Debug, Clone)]
pub(super) struct HeadCache<B> {
    head_dim: usize,
    len: usize,
    keys: Vec<B>,
    values: Vec<B>,
    /// The factor of each key and of each value, if the type has one.
    scales: Option<(Vec<f32>, Vec<f32>)>,
    /// Scratch for a converted key.
    key: Vec<B>,
}

/// A storage type of keys and values.
pub(super) trait Stored: Element + Default {
    /// Whether the values of a head have a common factor.
    const SCALED: bool;

    /// Converts a head and gives its factor.
    fn convert(from: &[f32], to: &mut [Self]) -> f32;
}

impl Stored for f32 {
    const SCALED: bool = false;

    fn convert(from: &[f32], to: &mut [Self]) -> f32 {
        to.copy_from_slice(from);
        1.0
    }
}

impl Stored for f16 {
    const SCALED: bool = false;

    fn convert(from: &[f32], to: &mut [Self]) -> f32 {
        to.convert_from_f32_slice(from);
        1.0
    }
}

impl Stored for i8 {
    const SCALED: bool = true;

    fn convert(from: &[f32], to: &mut [Self]) -> f32 {
        // As integers magnitudes order as they do as numbers, and NaN is above all: it reaches the
        // factor instead of becoming a 0.
        let bits = from.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(bits);
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        for (to, x) in to.iter_mut().zip(from) {
            *to = (x * inverse).round() as i8;
        }
        largest / 127.0
    }
}

/// A head of any storage type to which tokens can be appended.
trait Append: Send {
    /// Reserves capacity for this many tokens.
    fn reserve(&mut self, tokens: usize);

    /// Appends a token's key and value.
    fn append(&mut self, key: &[f32], value: &[f32]);

    /// Drops all but the first tokens.
    fn truncate(&mut self, tokens: usize);
}

impl<B: Stored> HeadCache<B> {
    fn new(head_dim: usize) -> Self {
        let scales = B::SCALED.then(Default::default);
        let key = vec![B::default(); head_dim];
        Self { head_dim, len: 0, keys: Vec::new(), values: Vec::new(), scales, key }
    }
}

impl<B: Stored> Append for HeadCache<B> {
    fn reserve(&mut self, tokens: usize) {
        let panels = (self.len + tokens).div_ceil(LANE_GROUP) * LANE_GROUP * self.head_dim;
        self.keys.reserve(panels - self.keys.len());
        self.values.reserve(tokens * self.head_dim.next_multiple_of(LANE_GROUP));
    }

    fn append(&mut self, key: &[f32], value: &[f32]) {
        let (panel, column) = (self.len / LANE_GROUP, self.len % LANE_GROUP);
        if column == 0 {
            self.keys.resize(self.keys.len() + LANE_GROUP * self.head_dim, B::default());
            if let Some((keys, values)) = &mut self.scales {
                keys.resize(keys.len() + LANE_GROUP, 0.0);
                values.resize(values.len() + LANE_GROUP, 0.0);
            }
        }
        let key_scale = B::convert(key, &mut self.key);
        let panel = &mut self.keys[panel * LANE_GROUP * self.head_dim..];
        for (to, x) in panel.chunks_exact_mut(LANE_GROUP).zip(&self.key) {
            to[column] = *x;
        }
        let start = self.values.len();
        self.values.resize(start + self.head_dim.next_multiple_of(LANE_GROUP), B::default());
        let value_scale = B::convert(value, &mut self.values[start..][..self.head_dim]);
        if let Some((keys, values)) = &mut self.scales {
            keys[self.len] = key_scale;
            values[self.len] = value_scale;
        }
        self.len += 1;
    }

    fn truncate(&mut self, tokens: usize) {
        if tokens >= self.len {
            return;
        }
        let (panels, column) = (tokens.div_ceil(LANE_GROUP), tokens % LANE_GROUP);
        self.keys.truncate(panels * LANE_GROUP * self.head_dim);
        self.values.truncate(tokens * self.head_dim.next_multiple_of(LANE_GROUP));
        if column > 0 {
            // Columns without a key are zeros, as in a panel just begun.
            let last = &mut self.keys[(panels - 1) * LANE_GROUP * self.head_dim..];
            last.chunks_exact_mut(LANE_GROUP).for_each(|keys| keys[column..].fill(B::default()));
        }
        if let Some((keys, values)) = &mut self.scales {
            for scales in [keys, values] {
                scales.truncate(panels * LANE_GROUP);
                scales[tokens..].fill(0.0);
            }
        }
        self.len = tokens;
    }
}

impl<B: Stored> KeyValueBlocks for HeadCache<B> {
    type Element = B;

    fn block<'a>(
        &'a self,
        range: Range<usize>,
        _: (&'a mut [f32], &'a mut [f32]),
    ) -> KeyBlock<'a, B> {
        let padded = self.head_dim.next_multiple_of(LANE_GROUP);
        let scales = self.scales.as_ref();
        KeyBlock {
            keys: &self.keys[range.start * self.head_dim..],
            values: &self.values[range.start * padded..],
            scales: scales.map(|(k, v)| (&k[range.start..], &v[range.start..])),
        }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // a batch of one row is one range
mod tests {
    use candle_core::Device;
    use quantune_adapters::rng::Stream;

    use super::*;
    use crate::ops::attention::StridedHeads;
    use crate::ops::causal_attention;

    const KINDS: [(CacheType, f64); 3] =
        [(CacheType::F32, 1e-5), (CacheType::F16, 2e-3), (CacheType::Q8, 2e-2)];

    const FORMS: [Compute; 2] = [Compute::F32, Compute::REFERENCE];

    fn cache(rows: usize, heads: Heads, kind: CacheType, compute: Compute) -> KvCache {
        let rows = CacheRows::new(compute.backend, kind, rows, 1, heads);
        KvCache { rows, longrope_threshold: None }
    }

    /// q, k and v as columns of one buffer, `(n, stride)`.
    fn buffer(n: usize, heads: Heads) -> Vec<f32> {
        let mut stream = Stream::new(7, "cache", &[]);
        (0..n * stride(heads)).map(|_| stream.normal()).collect()
    }

    fn stride(heads: Heads) -> usize {
        (heads.heads + 2 * heads.kv_heads) * heads.head_dim
    }

    fn columns(buffer: &[f32], heads: Heads) -> Qkv<'_> {
        let stride = stride(heads);
        let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let from = |column: usize| StridedHeads { values: &buffer[column..], stride };
        Qkv { q: from(0), k: from(q), v: from(q + kv) }
    }

    /// [`columns`] as tensors.
    fn tensors(buffer: &[f32], heads: Heads) -> [Tensor; 3] {
        let n = buffer.len() / stride(heads);
        let all = Tensor::from_slice(buffer, (n, stride(heads)), &Device::Cpu).unwrap();
        let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let part = |start, width| all.narrow(1, start, width).unwrap().contiguous().unwrap();
        [part(0, q), part(q, kv), part(q + kv, kv)]
    }

    /// What the portable form gives for one row.
    fn portable(buffer: &[f32], heads: Heads, scores: AttentionConfig) -> Vec<f32> {
        let n = buffer.len() / stride(heads);
        let [q, k, v] = tensors(buffer, heads);
        let rows = [Segment::whole(0..n)].into();
        let y = causal_attention(&q, &k, &v, heads, &rows, scores, Compute::REFERENCE).unwrap();
        y.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn error(a: &[f32], b: &[f32]) -> f64 {
        let norm = |x: f64| x * x;
        let difference: f64 = a.iter().zip(b).map(|(a, b)| norm(f64::from(a - b))).sum();
        (difference / b.iter().map(|&b| norm(f64::from(b))).sum::<f64>()).sqrt()
    }

    /// What attention gives for new tokens of the rows.
    fn feed(
        cache: &mut KvCache,
        isa: Isa,
        new: &[f32],
        heads: Heads,
        scores: AttentionConfig,
        rows: &[Range<usize>],
    ) -> Vec<f32> {
        let rows: Vec<Segment> = rows.iter().cloned().map(Segment::whole).collect();
        if cache.matches_layout(BackendKind::Reference) {
            let [q, k, v] = tensors(new, heads);
            let out =
                cache.tensors_mut().unwrap().attend(0, &q, (&k, &v), heads, &rows, scores).unwrap();
            assert_eq!(out.dims(), q.dims());
            return out.flatten_all().unwrap().to_vec1().unwrap();
        }
        let mut out = vec![f32::NAN; new.len() / stride(heads) * heads.heads * heads.head_dim];
        cache.panels_mut().unwrap().attend(
            isa,
            0,
            columns(new, heads),
            heads,
            &rows,
            scores,
            &mut out,
        );
        out
    }

    /// Feeds a row in pieces, all its tokens once.
    fn in_pieces(
        isa: Isa,
        mut cache: KvCache,
        buffer: &[f32],
        heads: Heads,
        scores: AttentionConfig,
        pieces: &[usize],
    ) -> Vec<f32> {
        let (mut done, mut all) = (0, Vec::new());
        for &piece in pieces {
            let new = &buffer[done * stride(heads)..(done + piece) * stride(heads)];
            all.extend(feed(&mut cache, isa, new, heads, scores, &[0..piece]));
            done += piece;
        }
        assert_eq!(cache.len(0), done);
        all
    }

    #[test]
    fn every_type_is_as_exact_as_it_says_and_pieces_do_not_matter() {
        let cases = [
            (Heads { heads: 6, kv_heads: 2, head_dim: 16 }, AttentionConfig::default()),
            (Heads { heads: 2, kv_heads: 2, head_dim: 12 }, AttentionConfig::default()),
            (Heads { heads: 8, kv_heads: 1, head_dim: 40 }, Some(37).into()),
            (
                Heads { heads: 4, kv_heads: 2, head_dim: 20 },
                AttentionConfig { window: Some(50), scale: Some(0.4), cap: Some(2.0) },
            ),
        ];
        let fast = Isa::available().map(|isa| (isa, Compute::F32));
        for (isa, compute) in fast.chain([(Isa::current(), Compute::REFERENCE)]) {
            for (heads, scores) in cases {
                let buffer = buffer(300, heads); // more than a portable row begins with room for
                let expected = portable(&buffer, heads, scores);
                for (kind, tolerance) in KINDS {
                    let run = |pieces: &[usize]| {
                        let cache = cache(1, heads, kind, compute);
                        in_pieces(isa, cache, &buffer, heads, scores, pieces)
                    };
                    let what = format!("{compute} {isa:?} {kind:?} {heads:?}");
                    let once = run(&[300]);
                    let off = error(&once, &expected);
                    assert!(off < tolerance, "{what} is off by {off:e}");
                    let pieces = run(&[1, 99, 8, 1, 1, 120, 1, 69]);
                    match compute {
                        Compute::REFERENCE => assert!(error(&pieces, &once) < 1e-6, "{what}"),
                        _ => assert_eq!(pieces, once, "{what}"),
                    }
                }
            }
        }
    }

    /// Both forms keep the same numbers.
    #[test]
    fn the_portable_form_is_the_fast_one() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 20 };
        let mut buffer = buffer(90, heads);
        let width = heads.head_dim;
        let zeros = heads.heads * width; // a key head of zeros
        buffer[5 * stride(heads) + zeros..][..width].fill(0.0);
        let scores = AttentionConfig { window: Some(50), scale: Some(0.4), cap: Some(2.0) };
        for (kind, _) in KINDS {
            let [fast, portable] = FORMS.map(|compute| {
                let cache = cache(1, heads, kind, compute);
                in_pieces(Isa::current(), cache, &buffer, heads, scores, &[70, 1, 19])
            });
            let error = error(&portable, &fast);
            assert!(error < 1e-5, "{kind:?} is off by {error:e}");
        }
        // NaN propagates, and is not rounded to a number.
        buffer[stride(heads) * 40 + zeros] = f32::NAN;
        for (kind, _) in KINDS {
            for compute in FORMS {
                let cache = cache(1, heads, kind, compute);
                let found = in_pieces(Isa::current(), cache, &buffer, heads, scores, &[90]);
                assert!(found[41 * zeros..42 * zeros].iter().any(|x| x.is_nan()), "{compute}");
            }
        }
    }

    #[test]
    fn the_exact_cache_gives_the_bits_of_training() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 24 };
        let buffer = buffer(150, heads);
        let isa = Isa::current();
        let mut out = vec![0f32; 150 * 4 * 24];
        let mut lse = vec![0f32; 150 * 4];
        let qkv = columns(&buffer, heads);
        let row = [Segment::whole(0..150)];
        crate::ops::attention::forward(isa, qkv, heads, &row, None, &mut out, &mut lse);
        let exact = cache(1, heads, CacheType::F32, Compute::F32);
        let cached = in_pieces(isa, exact, &buffer, heads, None.into(), &[100, 1, 49]);
        assert_eq!(cached, out);
    }

    fn part(buffer: &[f32], heads: Heads, tokens: Range<usize>) -> &[f32] {
        &buffer[tokens.start * stride(heads)..tokens.end * stride(heads)]
    }

    /// What the only row of a cache gets for some tokens of a buffer.
    fn feed_row(
        cache: &mut KvCache,
        buffer: &[f32],
        heads: Heads,
        tokens: Range<usize>,
    ) -> Vec<f32> {
        let rows = [0..tokens.len()];
        let new = part(buffer, heads, tokens);
        feed(cache, Isa::current(), new, heads, AttentionConfig::default(), &rows)
    }

    #[test]
    fn truncated_tokens_have_no_effect() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 24 };
        let buffer = buffer(80, heads);
        let feed = |cache: &mut KvCache, tokens| feed_row(cache, &buffer, heads, tokens);
        for ((kind, _), compute) in KINDS.into_iter().flat_map(|kind| FORMS.map(|f| (kind, f))) {
            for kept in [0, 7, 16, 33, 50] {
                let empty = || cache(1, heads, kind, compute);
                let (mut longer, mut plain) = (empty(), empty());
                if kept > 0 {
                    feed(&mut longer, 0..kept);
                    feed(&mut plain, 0..kept);
                }
                feed(&mut longer, 60..80);
                longer.truncate(0, kept);
                assert_eq!(longer.len(0), kept);
                let (ours, theirs) = (feed(&mut longer, kept..60), feed(&mut plain, kept..60));
                assert_eq!(ours, theirs, "{compute} {kind:?}, {kept} kept");
            }
        }
    }

    /// A prompt's cache is copied, and the copies go on apart, also from an earlier token.
    #[test]
    fn copies_go_on_apart() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 16 };
        let buffer = buffer(80, heads);
        let feed = |cache: &mut KvCache, tokens| feed_row(cache, &buffer, heads, tokens);
        for ((kind, _), compute) in KINDS.into_iter().flat_map(|kind| FORMS.map(|f| (kind, f))) {
            let alone = |pieces: &[Range<usize>]| {
                let (mut cache, mut last) = (cache(1, heads, kind, compute), Vec::new());
                pieces.iter().for_each(|piece| last = feed(&mut cache, piece.clone()));
                last
            };
            let mut prompt = cache(1, heads, kind, compute);
            feed(&mut prompt, 0..40);
            let (mut first, mut second, mut shorter) =
                (prompt.clone(), prompt.clone(), prompt.clone());
            shorter.truncate(0, 10);
            let found = [
                feed(&mut first, 40..41),
                feed(&mut second, 50..51),
                feed(&mut shorter, 60..61),
                feed(&mut first, 41..42),
                feed(&mut prompt, 70..72),
            ];
            let needed = [
                alone(&[0..40, 40..41]),
                alone(&[0..40, 50..51]),
                alone(&[0..10, 60..61]),
                alone(&[0..40, 40..41, 41..42]),
                alone(&[0..40, 70..72]),
            ];
            for (found, needed) in found.iter().zip(&needed) {
                assert!(error(found, needed) < 1e-6, "{compute} {kind:?}");
            }
        }
    }

    #[test]
    fn rows_of_other_lengths_and_without_tokens_do_not_matter() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 16 };
        let width = heads.heads * heads.head_dim;
        let buffer = buffer(60, heads);
        let feed = |cache: &mut KvCache, tokens: Range<usize>, rows: &[Range<usize>]| {
            let new = part(&buffer, heads, tokens);
            feed(cache, Isa::current(), new, heads, AttentionConfig::default(), rows)
        };
        for ((kind, _), compute) in KINDS.into_iter().flat_map(|kind| FORMS.map(|f| (kind, f))) {
            let mut batch = cache(3, heads, kind, compute);
            let prompts = feed(&mut batch, 0..57, &[0..20, 20..20, 20..57]);
            assert_eq!(batch.take(0).len(0), 20);
            assert_eq!((batch.rows(), batch.len(0), batch.len(1)), (2, 0, 37));
            let next = feed(&mut batch, 57..60, &[0..1, 1..3]);

            let mut alone = cache(1, heads, kind, compute);
            assert_eq!(prompts[20 * width..], feed(&mut alone, 20..57, &[0..37]));
            assert_eq!(next[width..], feed(&mut alone, 58..60, &[0..2]));
            if compute == Compute::REFERENCE {
                assert!(feed(&mut alone, 0..0, &[0..0]).is_empty());
            }
        }
    }
}
