//! A row's keys and values in panels that the CPU's kernels read.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{CacheType, CachedRow, LayerCaches};
use crate::isa::Isa;
use crate::ops::attention::{AttentionConfig, CachedQueries, Heads, KeyBlock, KeyValueBlocks, Qkv};
use crate::ops::lanes::{Element, LANE_GROUP};
use crate::ops::{Segment, par_for_each};

/// The cache of the CPU backend.
pub(crate) type PanelCache = LayerCaches<PanelRow>;

/// The key heads of a row, all of one type.
#[derive(Debug, Clone)]
pub struct PanelRow(PanelHeads);

#[derive(Debug, Clone)]
enum PanelHeads {
    F32(Vec<HeadCache<f32>>),
    F16(Vec<HeadCache<f16>>),
    Q8(Vec<HeadCache<i8>>),
}

impl CachedRow for PanelRow {
    fn tokens(&self) -> usize {
        match &self.0 {
            PanelHeads::F32(heads) => heads[0].len,
            PanelHeads::F16(heads) => heads[0].len,
            PanelHeads::Q8(heads) => heads[0].len,
        }
    }

    fn truncate(&mut self, tokens: usize) {
        self.heads_mut().into_iter().for_each(|head| head.truncate(tokens));
    }
}

impl PanelRow {
    fn new(kind: CacheType, Heads { kv_heads, head_dim, .. }: Heads) -> Self {
        Self(match kind {
            CacheType::F32 => PanelHeads::F32(vec![HeadCache::new(head_dim); kv_heads]),
            CacheType::F16 => PanelHeads::F16(vec![HeadCache::new(head_dim); kv_heads]),
            CacheType::Q8 => PanelHeads::Q8(vec![HeadCache::new(head_dim); kv_heads]),
        })
    }

    fn heads_mut(&mut self) -> Vec<&mut dyn Append> {
        fn each_of<B: Stored>(heads: &mut [HeadCache<B>]) -> Vec<&mut dyn Append> {
            heads.iter_mut().map(|head| head as &mut dyn Append).collect()
        }
        match &mut self.0 {
            PanelHeads::F32(heads) => each_of(heads),
            PanelHeads::F16(heads) => each_of(heads),
            PanelHeads::Q8(heads) => each_of(heads),
        }
    }
}

impl PanelCache {
    /// An empty cache of `rows` rows.
    pub(in crate::model) fn new(kind: CacheType, rows: usize, layers: usize, heads: Heads) -> Self {
        Self::of(PanelRow::new(kind, heads), rows, layers, heads)
    }

    /// Bytes of the keys and values of `tokens` tokens, beside those of scales.
    pub(in crate::model) fn bytes(
        kind: CacheType,
        tokens: usize,
        layers: usize,
        heads: Heads,
    ) -> usize {
        let number = match kind {
            CacheType::F32 => size_of::<f32>(),
            CacheType::F16 => size_of::<f16>(),
            CacheType::Q8 => size_of::<i8>(),
        };
        2 * layers * heads.kv_heads * heads.head_dim * tokens * number
    }

    /// Appends the new tokens' keys and values and attends to all there are, or to those in the
    /// window of `scores`: older ones are kept too. Queries see their own keys as the cache keeps
    /// them.
    ///
    /// Shapes: q `(N, heads · head_dim)`, k and v `(N, kv_heads · head_dim)`, `segments` the new
    /// tokens of each row, without prefixes → `out` as q, contiguous.
    #[allow(clippy::too_many_arguments)] // those of the attention kernels, and which layer
    pub(crate) fn attend(
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
        let lengths: Vec<usize> = rows.iter().map(PanelRow::tokens).collect();
        queries.attend(isa, &lengths, out, |row, head, task| match &rows[row].0 {
            PanelHeads::F32(heads) => task.run(&heads[head]),
            PanelHeads::F16(heads) => task.run(&heads[head]),
            PanelHeads::Q8(heads) => task.run(&heads[head]),
        });
    }
}

/// The keys and values of one key head of a row.
///
/// Keys lie in panels `(head_dim, 16)`, a panel for every 16 tokens, so that scores of 16 keys are
/// sums over broadcast values of the query; values in rows padded to a multiple of 16.
#[derive(Debug, Clone)]
struct HeadCache<B> {
    head_dim: usize,
    len: usize,
    keys: Vec<B>,
    values: Vec<B>,
    /// The factor of each key and of each value, if the type has one.
    scales: Option<(Vec<f32>, Vec<f32>)>,
    /// A converted key on its way.
    key: Vec<B>,
}

/// What keys and values can be stored as.
trait Stored: Element + Default {
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

/// A head of any type that takes in tokens.
trait Append: Send {
    /// Makes room for so many tokens.
    fn reserve(&mut self, tokens: usize);

    /// Takes in a token's key and value.
    fn append(&mut self, key: &[f32], value: &[f32]);

    /// Forgets all but the first tokens.
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
