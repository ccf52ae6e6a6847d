//! Keys and values of tokens already seen, per layer, row and key head, exact or compressed: in
//! panels that the CPU's kernels read, or in tensors on candle's device. A backend chooses its form
//! ([`Backend::Cache`](super::backend::Backend::Cache)), and may have one of its own.

mod panels;
mod tensors;

use std::fmt::Debug;

use crate::ops::attention::Heads;
use crate::ops::{Compute, Precision};
use crate::string_enum::string_enum;
pub(super) use panels::PanelCache;
pub(super) use tensors::TensorCache;

string_enum! {
    /// How keys and values are kept.
    #[derive(Debug)]
    pub enum CacheType {
        /// Exactly.
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
    /// As exact as the products of a precision.
    pub fn of(compute: Compute) -> Self {
        match compute.precision {
            Precision::F32 => Self::F32,
            Precision::Int16 | Precision::Int8 => Self::F16,
        }
    }
}

/// The keys and values of a batch of rows, each row of its own length, as a backend keeps them.
pub trait RowCaches: Clone + Debug + Send + Sync + 'static {
    /// The number of rows.
    fn rows(&self) -> usize;

    /// The number of tokens that a row has.
    fn len(&self, row: usize) -> usize;

    /// Removes a row and returns it as a cache of its own; those behind it move up.
    fn take(&mut self, row: usize) -> Self;

    /// Forgets all of a row's tokens but the first `tokens`.
    fn truncate(&mut self, row: usize, tokens: usize);

    /// Appends the rows of another cache of the same decoder and type.
    fn append(&mut self, other: Self);

    /// Each row as a cache of its own.
    fn into_rows(self) -> Vec<Self>;
}

/// The keys and values of one row in one layer.
pub trait CachedRow: Clone + Debug + Send + Sync + 'static {
    /// How many tokens it has.
    fn tokens(&self) -> usize;

    /// Forgets all but the first tokens.
    fn truncate(&mut self, tokens: usize);
}

/// The rows of every layer.
#[derive(Debug, Clone)]
pub struct LayerCaches<R> {
    layers: Vec<Vec<R>>,
    kv_heads: usize,
    head_dim: usize,
}

impl<R: CachedRow> LayerCaches<R> {
    fn of(row: R, rows: usize, layers: usize, heads: Heads) -> Self {
        let Heads { kv_heads, head_dim, .. } = heads;
        Self { layers: vec![vec![row; rows]; layers], kv_heads, head_dim }
    }

    fn with_layers(&self, layers: Vec<Vec<R>>) -> Self {
        let (kv_heads, head_dim) = (self.kv_heads, self.head_dim);
        Self { layers, kv_heads, head_dim }
    }
}

impl<R: CachedRow> RowCaches for LayerCaches<R> {
    fn rows(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    fn len(&self, row: usize) -> usize {
        self.layers.first().map_or(0, |layer| layer[row].tokens())
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

#[allow(clippy::single_range_in_vec_init)] // a batch of one row is one range
#[cfg(test)]
mod tests {
    use std::ops::Range;

    use candle_core::{Device, Tensor};
    use quantune_adapters::rng::Stream;

    use super::*;
    use crate::isa::Isa;
    use crate::ops::attention::{self, AttentionConfig, Qkv, StridedHeads};
    use crate::ops::{BackendKind, Segment, causal_attention};

    const KINDS: [(CacheType, f64); 3] =
        [(CacheType::F32, 1e-5), (CacheType::F16, 2e-3), (CacheType::Q8, 2e-2)];

    const FORMS: [Compute; 2] = [Compute::F32, Compute::REFERENCE];

    /// A cache of either form.
    #[derive(Clone)]
    enum TestCache {
        Panels(PanelCache),
        Tensors(TensorCache),
    }

    macro_rules! either {
        ($cache:expr, $rows:ident => $value:expr) => {
            match $cache {
                TestCache::Panels($rows) => $value,
                TestCache::Tensors($rows) => $value,
            }
        };
    }

    impl TestCache {
        fn rows(&self) -> usize {
            either!(self, rows => rows.rows())
        }

        fn len(&self, row: usize) -> usize {
            either!(self, rows => rows.len(row))
        }

        fn truncate(&mut self, row: usize, tokens: usize) {
            either!(self, rows => rows.truncate(row, tokens));
        }

        /// Removes a row, and gives its tokens.
        fn take(&mut self, row: usize) -> usize {
            either!(self, rows => rows.take(row).len(0))
        }
    }

    fn cache(rows: usize, heads: Heads, kind: CacheType, compute: Compute) -> TestCache {
        match compute.backend {
            BackendKind::Cpu => TestCache::Panels(PanelCache::new(kind, rows, 1, heads)),
            BackendKind::Reference => TestCache::Tensors(TensorCache::new(kind, rows, 1, heads)),
        }
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
        cache: &mut TestCache,
        isa: Isa,
        new: &[f32],
        heads: Heads,
        scores: AttentionConfig,
        rows: &[Range<usize>],
    ) -> Vec<f32> {
        let rows: Vec<Segment> = rows.iter().cloned().map(Segment::whole).collect();
        match cache {
            TestCache::Tensors(cache) => {
                let [q, k, v] = tensors(new, heads);
                let out = cache.attend(0, &q, (&k, &v), heads, &rows, scores).unwrap();
                assert_eq!(out.dims(), q.dims());
                out.flatten_all().unwrap().to_vec1().unwrap()
            }
            TestCache::Panels(cache) => {
                let tokens = new.len() / stride(heads);
                let mut out = vec![f32::NAN; tokens * heads.heads * heads.head_dim];
                cache.attend(isa, 0, columns(new, heads), heads, &rows, scores, &mut out);
                out
            }
        }
    }

    /// Feeds a row in pieces, all its tokens once.
    fn in_pieces(
        isa: Isa,
        mut cache: TestCache,
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
        // NaN is kept, not rounded to a number.
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
        attention::forward(isa, qkv, heads, &row, None, &mut out, &mut lse);
        let exact = cache(1, heads, CacheType::F32, Compute::F32);
        let cached = in_pieces(isa, exact, &buffer, heads, None.into(), &[100, 1, 49]);
        assert_eq!(cached, out);
    }

    fn part(buffer: &[f32], heads: Heads, tokens: Range<usize>) -> &[f32] {
        &buffer[tokens.start * stride(heads)..tokens.end * stride(heads)]
    }

    /// What the only row of a cache gets for some tokens of a buffer.
    fn feed_row(
        cache: &mut TestCache,
        buffer: &[f32],
        heads: Heads,
        tokens: Range<usize>,
    ) -> Vec<f32> {
        let rows = [0..tokens.len()];
        let new = part(buffer, heads, tokens);
        feed(cache, Isa::current(), new, heads, AttentionConfig::default(), &rows)
    }

    #[test]
    fn what_is_forgotten_leaves_no_trace() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 24 };
        let buffer = buffer(80, heads);
        let feed = |cache: &mut TestCache, tokens| feed_row(cache, &buffer, heads, tokens);
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
        let feed = |cache: &mut TestCache, tokens| feed_row(cache, &buffer, heads, tokens);
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
        let feed = |cache: &mut TestCache, tokens: Range<usize>, rows: &[Range<usize>]| {
            let new = part(&buffer, heads, tokens);
            feed(cache, Isa::current(), new, heads, AttentionConfig::default(), rows)
        };
        for ((kind, _), compute) in KINDS.into_iter().flat_map(|kind| FORMS.map(|f| (kind, f))) {
            let mut batch = cache(3, heads, kind, compute);
            let prompts = feed(&mut batch, 0..57, &[0..20, 20..20, 20..57]);
            assert_eq!(batch.take(0), 20);
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
