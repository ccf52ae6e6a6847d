//! Inference: forward passes for scoring, prefill and decode steps, on the backend of the decoder.

use candle_core::{DType, Device, Result, Tensor};

use super::adapters::{ActiveAdapter, Adapters};
use super::backend::{Backend, HeadInput, Inference, with_backend};
use super::decoder::Decoder;
use super::kv_cache::{CacheOf, KvCache};
use super::lm_head::Logits;
use super::pass::Rows;
use crate::ops::Compute;

impl Decoder {
    /// The hidden states the head reads, `(N, hidden_size)`. For scoring: but for the portable form
    /// nothing of it is on a tape, so no gradient reaches an adapter (training goes layer by layer).
    pub fn hidden(&self, rows: &Rows, adapters: Adapters) -> Result<Tensor> {
        self.hidden_with(rows, adapters, None, None, false)
    }

    /// [`Self::hidden`] of some of the tokens, `(chosen, hidden_size)`: the same bits, without what
    /// the last layer makes of the others once they are attended to. `chosen` may be in any order and
    /// name a token several times.
    pub fn hidden_of(&self, rows: &Rows, adapters: Adapters, chosen: &[u32]) -> Result<Tensor> {
        self.hidden_with(rows, adapters, None, Some(chosen), false)
    }

    /// [`Self::hidden_cached`] of some of the new tokens, as [`Self::hidden_of`].
    pub fn hidden_cached_of(
        &self,
        rows: &Rows,
        adapters: Adapters,
        cache: &mut KvCache,
        chosen: &[u32],
    ) -> Result<Tensor> {
        self.hidden_with(rows, adapters, Some(cache), Some(chosen), false)
    }

    /// The hidden states of new tokens after those in `cache`, to which they are appended; without
    /// gradients, as [`Self::hidden`]. `rows` start where the cache's rows end.
    pub fn hidden_cached(
        &self,
        rows: &Rows,
        adapters: Adapters,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        self.hidden_with(rows, adapters, Some(cache), None, false)
    }

    /// [`Self::hidden_cached`] for a decode step with one token per row, bound by memory bandwidth. In the
    /// integer precisions it rounds differently from prefill, independent of the number of rows.
    pub fn hidden_step(
        &self,
        rows: &Rows,
        adapters: Adapters,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        self.hidden_with(rows, adapters, Some(cache), None, true)
    }

    fn hidden_with(
        &self,
        rows: &Rows,
        adapters: Adapters,
        cache: Option<&mut KvCache>,
        chosen: Option<&[u32]>,
        decoding: bool,
    ) -> Result<Tensor> {
        with_backend!(self.compute.backend, B => {
            match hidden::<B>(self, rows, adapters, cache, chosen, decoding)? {
                Some(hidden) => hidden.into_tensor(),
                None => Tensor::zeros((0, self.config.hidden_size), DType::F32, &Device::Cpu),
            }
        })
    }

    /// The logits of the last token of each row of a decode step, as of [`Self::hidden_step`].
    pub fn logits_step(
        &self,
        rows: &Rows,
        adapters: Adapters,
        cache: &mut KvCache,
    ) -> Result<Logits> {
        with_backend!(self.compute.backend, B => {
            let hidden = hidden::<B>(self, rows, adapters, Some(cache), None, true)?;
            hidden.expect("of all tokens").logits(self, adapters)
        })
    }

    /// The logits of one token of each row, read in several passes one after the other, each over new
    /// tokens after those in `cache`, to which they are appended. A pass is its rows, those of the cache,
    /// and the tokens whose logits are wanted: over all passes one of each row, in the order of the rows.
    ///
    /// # Errors
    /// If no token is chosen.
    pub fn logits_cached(
        &self,
        passes: &[(Rows, Vec<u32>)],
        adapters: Adapters,
        cache: &mut KvCache,
    ) -> Result<Logits> {
        with_backend!(self.compute.backend, B => {
            let mut parts = Vec::new();
            for (rows, chosen) in passes {
                let chosen = Some(&chosen[..]);
                parts.extend(hidden::<B>(self, rows, adapters, Some(&mut *cache), chosen, false)?);
            }
            if parts.is_empty() {
                candle_core::bail!("no token was chosen whose logits are read");
            }
            HeadInput::concat(parts)?.logits(self, adapters)
        })
    }

    /// Log-probabilities (M) of `targets`, one per row of `hidden (M, hidden_size)`, of rows that all use
    /// the same adapters.
    pub fn log_probs(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        active: &[ActiveAdapter],
    ) -> Result<Vec<f32>> {
        self.log_probs_at_temperature(hidden, targets, 1.0, active)
    }

    /// [`Self::log_probs`] of logits divided by `temperature`.
    pub fn log_probs_at_temperature(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
        active: &[ActiveAdapter],
    ) -> Result<Vec<f32>> {
        with_backend!(self.compute.backend, B => {
            B::target_log_probs(self, &HeadInput::from_tensor(hidden)?, targets, temperature, active)
        })
    }

    /// Logits `(M, vocab_size)` of hidden states `(M, hidden_size)`, each row under its own adapters:
    /// for few rows only. A row gets the same bits among any others. They are on the CPU.
    pub fn logits(&self, hidden: &Tensor, adapters: Adapters) -> Result<Tensor> {
        with_backend!(self.compute.backend, B => {
            <B as Backend>::HeadInput::from_tensor(hidden)?.logits(self, adapters)?.into_tensor()
        })
    }
}

/// Fails if the cache is of another backend, or a row grows so long that its RoPE scaling differs from that
/// of its cached keys (LongRoPE).
fn check_cache(rows: &Rows, cache: Option<&KvCache>, compute: Compute) -> Result<()> {
    let Some(cache) = cache else { return Ok(()) };
    if !cache.is_of(compute.backend) {
        candle_core::bail!(
            "the cache was made for a decoder of another form, compute is {compute} here: needed one \
             made for this decoder"
        );
    }
    for row in rows.segments.iter().filter(|row| !row.is_empty()) {
        let (seen, now) = (rows.positions[row.tokens.start] as usize, row.len());
        if seen > 0 && !cache.same_rope_scaling(seen, seen + now) {
            candle_core::bail!(
                "a row of {seen} cached tokens and {now} new ones: rows of that length have \
                 another RoPE scaling here, so that all of its tokens must be computed again"
            );
        }
    }
    Ok(())
}

/// The hidden states behind the final norm, `(N, hidden_size)`, or of the `chosen` tokens in their
/// order, `None` if none is chosen; with `decoding`, by a decode step.
pub(super) fn hidden<B: Backend>(
    decoder: &Decoder,
    rows: &Rows,
    adapters: Adapters,
    cache: Option<&mut KvCache>,
    chosen: Option<&[u32]>,
    decoding: bool,
) -> Result<Option<B::HeadInput>> {
    check_cache(rows, cache.as_deref(), decoder.compute)?;
    let pass = decoder.pass(rows, adapters, None);
    let sorted = chosen.map(|chosen| {
        let mut sorted = chosen.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        sorted
    });
    let narrow = sorted.as_deref().map(|sorted| (decoder.narrowed(&pass, sorted), sorted));
    let (mut cache, kept) = match cache {
        Some(cache) => {
            let CacheOf { rows, scratch } = cache.of::<B>()?;
            (Some(rows), Some(scratch))
        }
        None => (None, None),
    };
    // A step is so short that fresh buffers would cost of it; those of a prompt are large.
    let mut fresh = None;
    let scratch = match kept.filter(|_| decoding) {
        Some(kept) => kept,
        None => fresh.insert(B::Scratch::default()),
    };
    let adapter_groups = decoding.then(|| adapters.adapter_groups(&pass.segments));
    let layers = decoder.config.num_hidden_layers;
    let mut x = B::Hidden::default();
    B::embed(decoder, &rows.tokens, &pass, &mut x)?;
    for index in 0..layers {
        let narrow = narrow.as_ref().filter(|_| index + 1 == layers);
        let inference = Inference {
            cache: cache.as_deref_mut(),
            adapter_groups: adapter_groups.as_deref(),
            chosen: narrow.map(|(pass, sorted)| (pass, *sorted)),
        };
        B::layer_inference(decoder, index, &pass, &mut x, inference, scratch)?;
    }
    let (Some(chosen), Some((_, sorted))) = (chosen, narrow) else {
        return Ok(Some(B::final_norm(decoder, x)?));
    };
    if chosen.is_empty() {
        return Ok(None);
    }
    let places = chosen.iter().map(|row| sorted.partition_point(|other| other < row) as u32);
    let places: Vec<u32> = places.collect();
    Ok(Some(B::final_norm(decoder, x)?.select(&places)?))
}
