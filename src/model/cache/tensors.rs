//! A row's keys and values as tensors on a device, which candle's operations read.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};

use super::{CacheType, CachedRow, LayerCaches};
use crate::ops::Segment;
use crate::ops::attention::{self, AttentionConfig, Heads};

/// Buffers are allocated in multiples of this many tokens.
const ROOM: usize = 256;

/// The zero point of Q8 values, because candle's bytes are unsigned.
const ZERO: f64 = 128.0;

/// The cache of the reference backend.
pub(crate) type TensorCache = LayerCaches<TensorRow>;

/// The key heads of a row.
#[derive(Debug, Clone)]
pub struct TensorRow {
    kind: CacheType,
    len: usize,
    /// Keys and values, once there are some. A copy of the row shares them until one of the two takes
    /// in a token.
    kept: Option<Arc<[Kept; 2]>>,
}

/// Keys or values.
#[derive(Debug)]
struct Kept {
    /// `(kv_heads, room, head_dim)`: F32, F16, or U8.
    heads: Tensor,
    /// Scales of U8 values, `(kv_heads, room, 1)` F32.
    scales: Option<Tensor>,
}

impl CachedRow for TensorRow {
    fn tokens(&self) -> usize {
        self.len
    }

    fn truncate(&mut self, tokens: usize) {
        self.len = self.len.min(tokens);
    }
}

impl TensorCache {
    /// An empty cache of `rows` rows.
    pub(in crate::model) fn new(kind: CacheType, rows: usize, layers: usize, heads: Heads) -> Self {
        Self::of(TensorRow::new(kind), rows, layers, heads)
    }

    /// Appends the new tokens' keys and values and attends to all there are, as
    /// [`PanelCache::attend`](super::PanelCache::attend), with tensors on the decoder's device.
    pub(in crate::model) fn attend(
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

impl TensorRow {
    fn new(kind: CacheType) -> Self {
        Self { kind, len: 0, kept: None }
    }

    /// Takes in the keys and values of new tokens, `(kv_heads, T, head_dim)` F32 each.
    fn append(&mut self, new: [Tensor; 2]) -> Result<()> {
        let len = self.len + new[0].dim(1)?;
        let [keys, values] = new;
        let new = [Kept::of(self.kind, keys)?, Kept::of(self.kind, values)?];
        let own = self.kept.as_mut().and_then(Arc::get_mut);
        if own.is_none_or(|kept| kept[0].room() < len) {
            let room = len.next_multiple_of(ROOM);
            let old = self.kept.as_deref().map(|kept| kept.each_ref());
            let [keys, values] = old.map_or([None; 2], |kept| kept.map(Some));
            let grown = |old, new| Kept::grown(old, self.len, new, room);
            self.kept = Some(Arc::new([grown(keys, &new[0])?, grown(values, &new[1])?]));
        }
        for (kept, new) in self.kept.iter().flat_map(|kept| kept.iter()).zip(&new) {
            kept.set(new, self.len)?;
        }
        self.len = len;
        Ok(())
    }

    /// Keys and values of the tokens from `first` on, `(kv_heads, tokens, head_dim)` F32 each.
    fn read(&self, first: usize) -> Result<(Tensor, Tensor)> {
        let Some(kept) = &self.kept else { candle_core::bail!("a row of no tokens") };
        let read = |kept: &Kept| kept.read(first, self.len - first);
        Ok((read(&kept[0])?, read(&kept[1])?))
    }
}

impl Kept {
    /// `x (kv_heads, T, head_dim)` F32 as it is kept.
    fn of(kind: CacheType, x: Tensor) -> Result<Self> {
        let x = x.detach();
        let (heads, scales) = match kind {
            CacheType::F32 => (x, None),
            CacheType::F16 => (x.to_dtype(DType::F16)?, None),
            CacheType::Q8 => {
                let largest = x.abs()?.max_keepdim(D::Minus1)?;
                // A head of zeros has a scale of 0, and is 0 by any other.
                let inverse = (largest.maximum(1e-30)?.recip()? * 127.0)?;
                let rounded = x.broadcast_mul(&inverse)?.round()?;
                // A maximum passes over a NaN; the scale must not.
                let non_finite = (&x * 0.0)?.sum_keepdim(D::Minus1)?;
                let scales = ((largest + non_finite)? / 127.0)?;
                ((rounded + ZERO)?.to_dtype(DType::U8)?, Some(scales))
            }
        };
        Ok(Self { heads: heads.contiguous()?, scales })
    }

    fn room(&self) -> usize {
        self.heads.dims()[1]
    }

    /// Buffers of `room` tokens for what is like `new`, the first `len` of them as in `old`.
    fn grown(old: Option<&Self>, len: usize, new: &Self, room: usize) -> Result<Self> {
        let buffer = |like: &Tensor, old: Option<&Tensor>| -> Result<Tensor> {
            let (kv_heads, _, width) = like.dims3()?;
            let buffer = Tensor::zeros((kv_heads, room, width), like.dtype(), like.device())?;
            if let Some(old) = old.filter(|_| len > 0) {
                buffer.slice_set(&old.narrow(1, 0, len)?.contiguous()?, 1, 0)?;
            }
            Ok(buffer)
        };
        let scales = |new| buffer(new, old.and_then(|old| old.scales.as_ref()));
        Ok(Self {
            heads: buffer(&new.heads, old.map(|old| &old.heads))?,
            scales: new.scales.as_ref().map(scales).transpose()?,
        })
    }

    /// Overwrites the tokens from `place` on.
    fn set(&self, new: &Self, place: usize) -> Result<()> {
        self.heads.slice_set(&new.heads, 1, place)?;
        match (&self.scales, &new.scales) {
            (Some(scales), Some(new)) => scales.slice_set(new, 1, place),
            _ => Ok(()),
        }
    }

    fn read(&self, first: usize, tokens: usize) -> Result<Tensor> {
        let part = |x: &Tensor| x.narrow(1, first, tokens);
        let heads = part(&self.heads)?.to_dtype(DType::F32)?;
        match &self.scales {
            Some(scales) => (heads - ZERO)?.broadcast_mul(&part(scales)?),
            None => Ok(heads),
        }
    }
}
