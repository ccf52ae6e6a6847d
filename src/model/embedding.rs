//! The token embedding under adapters.
//!
//! An adapter can have a low-rank update, a whole matrix (`modules_to_save`) or rows of some tokens
//! (`trainable_token_indices`). Each is added to the base's embedding, times the adapter's weight: a whole
//! matrix counts as its difference to the base's. Dropout does not apply here.

use candle_core::{Device, Result, Tensor, Var};
use quantune_adapters::config::EMBEDDING;
use quantune_adapters::delta::{Adapter, TOKEN_ROWS};

use super::adapters::{ActiveAdapter, parameter};
use super::gradients::GradientBuffers;
use super::pass::Pass;
use crate::ops::Values;
use crate::ops::frozen_linear::{frozen_rows, read_rows};
use crate::quant::FrozenMatrix;

/// The frozen embedding of a decoder.
pub(super) struct Embedding<'a> {
    pub weight: &'a FrozenMatrix,
    /// Embeddings are multiplied by it.
    pub multiplier: f64,
    /// The device of the layers.
    pub device: &'a Device,
}

/// Whether an adapter changes the embedding.
pub(super) fn adapts_embedding(adapter: &Adapter) -> bool {
    let whole = adapter.modules.contains_key(EMBEDDING) || adapter.saved.contains_key(EMBEDDING);
    whole || adapter.tokens.is_some()
}

impl Embedding<'_> {
    /// The embeddings of tokens, `(N, hidden_size)` F32, on the tape of trainable adapters.
    ///
    /// # Errors
    /// If a token is out of vocabulary.
    pub(super) fn forward(&self, tokens: &[u32], pass: &Pass) -> Result<Tensor> {
        let x = frozen_rows(self.weight, tokens, self.device)?;
        if !pass.adapters.iter().any(|active| adapts_embedding(&active.adapter)) {
            return self.scaled(x);
        }
        let runs = pass.adapters.runs(&pass.segments).into_iter();
        let parts = runs.map(|(range, active)| {
            let base = x.narrow(0, range.start, range.len())?;
            let mut x = base.clone();
            for active in active {
                for delta in embedding_deltas(&tokens[range.clone()], &base, active)? {
                    x = (x + (delta * active.weight)?)?;
                }
            }
            Ok(x)
        });
        self.scaled(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// Embeddings times the multiplier that a family may have.
    fn scaled(&self, x: Tensor) -> Result<Tensor> {
        let by = self.multiplier;
        if by == 1.0 { Ok(x) } else { x * by }
    }

    /// [`Self::scaled`] in place, which is also its backward pass.
    fn scale_in_place(&self, x: &mut [f32]) {
        let by = self.multiplier as f32;
        if by != 1.0 {
            x.iter_mut().for_each(|x| *x *= by);
        }
    }

    /// [`Self::forward`] into a buffer, which is overwritten; off the tape.
    pub(super) fn forward_into(&self, tokens: &[u32], pass: &Pass, x: &mut Vec<f32>) -> Result<()> {
        read_rows(self.weight, tokens, x)?;
        if !pass.adapters.iter().any(|active| adapts_embedding(&active.adapter)) {
            self.scale_in_place(x);
            return Ok(());
        }
        let width = self.weight.cols();
        for (range, active) in pass.adapters.runs(&pass.segments) {
            let tokens = &tokens[range.clone()];
            let base = x[range.start * width..range.end * width].to_vec();
            let x = &mut x[range.start * width..range.end * width];
            for ActiveAdapter { adapter, weight, .. } in active {
                let weight = *weight as f32;
                let towards = |x: &mut [f32], own: &[f32], base: &[f32]| {
                    let both = own.iter().zip(base);
                    x.iter_mut().zip(both).for_each(|(x, (own, base))| *x += weight * (own - base));
                };
                let rows = || tokens.iter().zip(base.chunks_exact(width));
                if let Some(own) = adapter.saved.get(EMBEDDING) {
                    let own = Values::of(own.as_tensor())?;
                    for (x, (&token, base)) in x.chunks_exact_mut(width).zip(rows()) {
                        towards(x, &own[token as usize * width..][..width], base);
                    }
                }
                if let Some(own) = &adapter.tokens {
                    let values = Values::of(own.rows.as_tensor())?;
                    for (x, (token, base)) in x.chunks_exact_mut(width).zip(rows()) {
                        if let Ok(at) = own.indices.binary_search(token) {
                            towards(x, &values[at * width..][..width], base);
                        }
                    }
                }
                if let Some(lora) = adapter.modules.get(EMBEDDING) {
                    let (a, b) = (Values::of(lora.a.as_tensor())?, Values::of(lora.b.as_tensor())?);
                    let (r, vocabulary) = (lora.r(), lora.in_features());
                    let scale = lora.scale as f32 * weight;
                    for (x, (&token, _)) in x.chunks_exact_mut(width).zip(rows()) {
                        for (x, b) in x.iter_mut().zip(b.chunks_exact(r)) {
                            let a = a[token as usize..].iter().step_by(vocabulary);
                            *x += scale * b.iter().zip(a).map(|(b, a)| b * a).sum::<f32>();
                        }
                    }
                }
            }
        }
        self.scale_in_place(x);
        Ok(())
    }

    /// The backward pass of [`Self::forward_into`]: from `dx (N, hidden_size)` to the parameters of the
    /// trainable adapter, which all rows use. `dx` is used up.
    pub(super) fn backward(
        &self,
        tokens: &[u32],
        pass: &Pass,
        dx: &mut [f32],
        sink: &mut GradientBuffers,
    ) -> Result<()> {
        self.scale_in_place(dx);
        let dx = &*dx;
        let width = self.weight.cols();
        for active in pass.adapters.iter().filter(|active| active.trainable) {
            let weight = active.weight as f32;
            let add = |sum: &mut [f32], d: &[f32]| {
                sum.iter_mut().zip(d).for_each(|(sum, d)| *sum += weight * d);
            };
            if active.adapter.saved.contains_key(EMBEDDING) {
                let gradient = sink.of(EMBEDDING, 0);
                for (&token, d) in tokens.iter().zip(dx.chunks_exact(width)) {
                    add(&mut gradient[token as usize * width..][..width], d);
                }
            }
            if let Some(own) = &active.adapter.tokens {
                let gradient = sink.of(TOKEN_ROWS, 0);
                for (token, d) in tokens.iter().zip(dx.chunks_exact(width)) {
                    if let Ok(at) = own.indices.binary_search(token) {
                        add(&mut gradient[at * width..][..width], d);
                    }
                }
            }
            if let Some(lora) = active.adapter.modules.get(EMBEDDING) {
                let (a, b) = (Values::of(lora.a.as_tensor())?, Values::of(lora.b.as_tensor())?);
                let (r, vocabulary) = (lora.r(), lora.in_features());
                let scale = lora.scale as f32 * weight;
                for (&token, d) in tokens.iter().zip(dx.chunks_exact(width)) {
                    let token = token as usize;
                    let mut hidden = vec![0f32; r];
                    for (d, b) in d.iter().zip(b.chunks_exact(r)) {
                        hidden.iter_mut().zip(b).for_each(|(hidden, b)| *hidden += d * b);
                    }
                    let da = sink.of(EMBEDDING, 0);
                    let column = da[token..].iter_mut().step_by(vocabulary);
                    column.zip(hidden).for_each(|(da, hidden)| *da += scale * hidden);
                    let db = sink.of(EMBEDDING, 1);
                    for (db, d) in db.chunks_exact_mut(r).zip(d) {
                        let a = a[token..].iter().step_by(vocabulary);
                        db.iter_mut().zip(a).for_each(|(db, a)| *db += scale * d * a);
                    }
                }
            }
        }
        Ok(())
    }
}

/// What an adapter adds to the embeddings of tokens, `(N, hidden_size)` each, on its tape.
fn embedding_deltas(tokens: &[u32], base: &Tensor, active: &ActiveAdapter) -> Result<Vec<Tensor>> {
    let on_tape = |var: &Var| parameter(active, var, base.device());
    let ids = Tensor::new(tokens, base.device())?;
    let mut deltas = Vec::new();
    if let Some(own) = active.adapter.saved.get(EMBEDDING) {
        deltas.push((on_tape(own)?.index_select(&ids, 0)? - base)?);
    }
    if let Some(own) = &active.adapter.tokens {
        // Which row of its own each token has, `(N, n)`.
        let mut places = vec![0f32; tokens.len() * own.indices.len()];
        for (token, row) in tokens.iter().zip(places.chunks_exact_mut(own.indices.len().max(1))) {
            if let Ok(at) = own.indices.binary_search(token) {
                row[at] = 1.0;
            }
        }
        let places = Tensor::from_vec(places, (tokens.len(), own.indices.len()), base.device())?;
        let has = places.sum_keepdim(1)?; // (N, 1)
        deltas.push((places.matmul(&on_tape(&own.rows)?)? - base.broadcast_mul(&has)?)?);
    }
    if let Some(lora) = active.adapter.modules.get(EMBEDDING) {
        let a = on_tape(&lora.a)?.t()?.contiguous()?.index_select(&ids, 0)?; // (N, r)
        deltas.push((a.matmul(&on_tape(&lora.b)?.t()?)? * lora.scale)?);
    }
    Ok(deltas)
}
