//! The two ends of the decoder under adapters: the embedding it begins with, and the head it is read
//! by.
//!
//! Both may get low-rank updates, and an adapter may bring a whole matrix of its own
//! (`modules_to_save`) or some tokens' rows (`trainable_token_indices`). All of it is added to what
//! the base gives, times the adapter's weight: a whole matrix counts as its difference to the base's.
//! Dropout does not reach the ends.

use candle_core::{Device, Result, Tensor, Var};
pub use quantune_adapters::config::{EMBEDDING, HEAD};
use quantune_adapters::delta::{Adapter, Lora, TOKEN_ROWS};
use rayon::prelude::*;

use super::adapters::{ActiveAdapter, Adapters};
use super::decoder::Decoder;
use super::layer::AdapterGradients;
use super::pass::Pass;
use super::scoring::at_temperature;
use crate::isa::Isa;
use crate::ops::attention::dot;
use crate::ops::frozen_linear::{few_rows, frozen_rows, read_rows};
use crate::ops::gemm::{
    Init, Out, PackedRows, PanelType, Product, Strided, Term, Weights, multiply,
};
use crate::ops::linear_cross_entropy::{
    TargetStatsMut, check_targets, chunk_rows, log_probs_of_logits, score, softcap,
};
use crate::ops::{
    BackendKind, Compute, LogitSoftcap, Values, capped_log_probs, frozen_linear, par_for_each,
};

/// Panels of the forward and the backward pass.
type Panels = (PanelType, PanelType);

/// Whether an adapter has a part in the embedding.
fn embeds(adapter: &Adapter) -> bool {
    let whole = adapter.modules.contains_key(EMBEDDING) || adapter.saved.contains_key(EMBEDDING);
    whole || adapter.tokens.is_some()
}

impl Decoder {
    /// Whether an adapter has a part in the head.
    fn heads(&self, adapter: &Adapter) -> bool {
        let whole = adapter.modules.contains_key(HEAD) || adapter.saved.contains_key(HEAD);
        whole || adapter.head_rows(self.config.tie_word_embeddings).is_some()
    }

    /// Whether a trainable adapter has a part in the embedding, so that gradients must come all the
    /// way down.
    pub(crate) fn trains_embedding(&self, adapters: Adapters) -> bool {
        adapters.iter().any(|active| active.trainable && embeds(&active.adapter))
    }

    /// What the decoder begins with, `(N, hidden_size)` F32, on the tape of trainable adapters.
    ///
    /// # Errors
    /// If a token is out of vocabulary.
    pub fn embed(&self, tokens: &[u32], pass: &Pass) -> Result<Tensor> {
        let x = frozen_rows(&self.embedding, tokens, &self.device)?;
        if !pass.adapters.iter().any(|active| embeds(&active.adapter)) {
            return self.embedded(x);
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
        self.embedded(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// What the layers take of the embeddings of tokens.
    fn embedded(&self, x: Tensor) -> Result<Tensor> {
        let by = self.config.variation.embedding_multiplier;
        if by == 1.0 { Ok(x) } else { x * by }
    }

    /// [`Self::embedded`] in place, which is also the backward pass.
    fn embedded_in_place(&self, x: &mut [f32]) {
        let by = self.config.variation.embedding_multiplier as f32;
        if by != 1.0 {
            x.iter_mut().for_each(|x| *x *= by);
        }
    }

    /// [`Self::embed`] into a buffer, which is overwritten; off the tape.
    pub fn embed_into(&self, tokens: &[u32], pass: &Pass, x: &mut Vec<f32>) -> Result<()> {
        read_rows(&self.embedding, tokens, x)?;
        if !pass.adapters.iter().any(|active| embeds(&active.adapter)) {
            self.embedded_in_place(x);
            return Ok(());
        }
        let width = self.config.hidden_size;
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
        self.embedded_in_place(x);
        Ok(())
    }

    /// The backward pass from `dx (N, hidden_size)`, the gradient of what [`Self::embed_into`] gave, to
    /// the parts of the trainable adapter, which all rows use. `dx` is used up.
    pub(crate) fn embed_back(
        &self,
        tokens: &[u32],
        pass: &Pass,
        dx: &mut [f32],
        sink: &mut AdapterGradients,
    ) -> Result<()> {
        self.embedded_in_place(dx);
        let dx = &*dx;
        let width = self.config.hidden_size;
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
                    let mut low = vec![0f32; r];
                    for (d, b) in d.iter().zip(b.chunks_exact(r)) {
                        low.iter_mut().zip(b).for_each(|(low, b)| *low += d * b);
                    }
                    let da = sink.of(EMBEDDING, 0);
                    let column = da[token..].iter_mut().step_by(vocabulary);
                    column.zip(low).for_each(|(da, low)| *da += scale * low);
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

    /// [`Self::logits`] of either backend.
    pub(super) fn logits_of(&self, hidden: &Tensor, adapters: Adapters) -> Result<Tensor> {
        let hidden = &self.to_head(hidden)?;
        let base = match &self.uploaded_head {
            Some(head) => head.linear(&hidden.detach())?.to_device(&Device::Cpu)?,
            None => few_rows(hidden, &self.head, self.compute)?,
        };
        if !adapters.iter().any(|active| self.heads(&active.adapter)) {
            return self.capped(base);
        }
        let (rows, vocabulary) = base.dims2()?;
        let base = base.flatten_all()?.to_vec1::<f32>()?;
        let hidden = hidden.contiguous()?.to_device(&Device::Cpu)?;
        let hidden_values = Values::of(&hidden)?;
        let mut logits = Vec::with_capacity(base.len());
        for row in 0..rows {
            let x = &hidden_values[row * self.config.hidden_size..][..self.config.hidden_size];
            let base = &base[row * vocabulary..][..vocabulary];
            match self.adapted_head(adapters.of(row))? {
                Some(head) => logits.extend(head.one_row(x, base)),
                None => logits.extend_from_slice(base),
            }
        }
        self.capped(Tensor::from_vec(logits, (rows, vocabulary), &Device::Cpu)?)
    }

    /// Log-probabilities of `targets`, one per row of `hidden (M, hidden_size)` → `(M)`, of rows that
    /// all use the same. In the portable form trainable adapters are on the tape.
    pub fn log_probs(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        active: &[ActiveAdapter],
    ) -> Result<Tensor> {
        self.log_probs_at_temperature(hidden, targets, 1.0, active)
    }

    /// [`Self::log_probs`] of logits divided by `temperature`.
    pub fn log_probs_at_temperature(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
        active: &[ActiveAdapter],
    ) -> Result<Tensor> {
        let cap = self.config.logit_softcap(temperature);
        let hidden = self.to_head(hidden)?;
        // Without a cap hidden states may as well be divided; with one, logits are, behind it.
        let hidden = &if cap.is_some() { hidden } else { at_temperature(hidden, temperature)? };
        let Some(head) = self.adapted_head(active)? else {
            let Some(head) = &self.uploaded_head else {
                return capped_log_probs(hidden, &self.head, targets, cap, self.compute);
            };
            check_targets(targets, &self.head)?;
            return log_probs_of_logits(head.linear(hidden)?, targets, cap);
        };
        check_targets(targets, &self.head)?;
        if self.compute.backend == BackendKind::Reference {
            let logits = self.adapted_logits(hidden, active)?; // (M, V)
            return log_probs_of_logits(logits, targets, cap);
        }
        let panels = self.compute.precision.panels();
        let hidden = hidden.contiguous()?;
        let (mut logps, mut entropies) = (vec![0.0; targets.len()], vec![0.0; targets.len()]);
        let mut is_argmax = vec![false; targets.len()];
        let found = TargetStatsMut {
            logps: &mut logps,
            entropies: &mut entropies,
            is_argmax: &mut is_argmax,
        };
        head.forward(panels, &Values::of(&hidden)?, (targets, cap), found);
        Tensor::from_vec(logps, targets.len(), hidden.device())
    }

    /// Logits `(M, vocab_size)` composed of candle's operations: the portable form.
    fn adapted_logits(&self, hidden: &Tensor, active: &[ActiveAdapter]) -> Result<Tensor> {
        let base = match &self.uploaded_head {
            Some(head) => head.linear(hidden)?,
            None => frozen_linear(hidden, &self.head, Compute::REFERENCE)?,
        };
        let mut logits = base.clone();
        for active in active {
            let on_tape = |var: &Var| on_tape(active, var, &self.device);
            if let Some(lora) = active.adapter.modules.get(HEAD) {
                let delta = lora.delta(hidden, None, active.trainable)?;
                logits = (logits + (delta * active.weight)?)?;
            }
            if let Some(own) = active.adapter.saved.get(HEAD) {
                let delta = (hidden.matmul(&on_tape(own)?.t()?)? - &base)?;
                logits = (logits + (delta * active.weight)?)?;
            }
            if let Some((own, _)) = active.adapter.head_rows(self.config.tie_word_embeddings) {
                // Which logit each row of its own is added to, `(n, V)`.
                let (n, vocabulary) = (own.indices.len(), self.config.vocab_size);
                let mut places = vec![0f32; n * vocabulary];
                for (row, &token) in own.indices.iter().enumerate() {
                    places[row * vocabulary + token as usize] = 1.0;
                }
                let places = Tensor::from_vec(places, (n, vocabulary), hidden.device())?;
                let rows = frozen_rows(&self.head, &own.indices, hidden.device())?;
                let delta = hidden.matmul(&(on_tape(&own.rows)? - rows)?.t()?)?.matmul(&places)?;
                logits = (logits + (delta * active.weight)?)?;
            }
        }
        Ok(logits)
    }

    /// What the head multiplies of hidden states.
    fn to_head(&self, hidden: &Tensor) -> Result<Tensor> {
        let by = self.config.variation.logits_multiplier;
        if by == 1.0 { Ok(hidden.clone()) } else { hidden * by }
    }

    /// Logits under the cap, if there is one.
    fn capped(&self, logits: Tensor) -> Result<Tensor> {
        match self.config.variation.final_logit_softcapping {
            Some(cap) => (logits / cap)?.tanh()? * cap,
            None => Ok(logits),
        }
    }

    /// What adapters make of the head; nothing where they have no part in it.
    pub(crate) fn adapted_head<'a>(
        &'a self,
        active: &'a [ActiveAdapter],
    ) -> Result<Option<AdaptedHead<'a>>> {
        if !active.iter().any(|active| self.heads(&active.adapter)) {
            return Ok(None);
        }
        let mut head = AdaptedHead { decoder: self, base: 1.0, parts: Vec::new() };
        for active in active {
            let ActiveAdapter { adapter, weight, trainable } = active;
            let weight = *weight as f32;
            let mut part = |kind| head.parts.push(Part { kind, weight, trainable: *trainable });
            if let Some(lora) = adapter.modules.get(HEAD) {
                part(Kind::update(lora)?);
            }
            if let Some(own) = adapter.saved.get(HEAD) {
                part(Kind::Whole(Values::of(own.as_tensor())?));
                head.base -= weight;
            }
            if let Some((own, gradients)) = adapter.head_rows(self.config.tie_word_embeddings) {
                let mut difference = Vec::new();
                read_rows(&self.head, &own.indices, &mut difference)?;
                let values = Values::of(own.rows.as_tensor())?;
                difference.iter_mut().zip(&*values).for_each(|(d, own)| *d = own - *d);
                let mut part = |kind| head.parts.push(Part { kind, weight, trainable: *trainable });
                part(Kind::Tokens { indices: &own.indices, difference, gradients });
            }
        }
        Ok(Some(head))
    }
}

/// A parameter of an adapter on a device, on the tape if the adapter trains.
fn on_tape(active: &ActiveAdapter, parameter: &Var, device: &Device) -> Result<Tensor> {
    match active.trainable {
        true => parameter.as_tensor().to_device(device),
        false => parameter.as_detached_tensor().to_device(device),
    }
}

/// What an adapter adds to the embeddings of tokens, `(N, hidden_size)` each, on its tape.
fn embedding_deltas(tokens: &[u32], base: &Tensor, active: &ActiveAdapter) -> Result<Vec<Tensor>> {
    let on_tape = |var: &Var| on_tape(active, var, base.device());
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

/// The head as some rows use it.
pub(crate) struct AdaptedHead<'a> {
    decoder: &'a Decoder,
    /// What is left of the base's product beside whole heads.
    base: f32,
    parts: Vec<Part<'a>>,
}

/// What one adapter adds to the head.
struct Part<'a> {
    kind: Kind<'a>,
    weight: f32,
    trainable: bool,
}

enum Kind<'a> {
    /// `A (r, H)`, `B (V, r)`.
    Update { a: Values<'a>, b: Values<'a>, r: usize, scale: f32 },
    /// `(V, H)`.
    Whole(Values<'a>),
    /// Own rows less the base's, `(n, H)`, and the name of their gradients.
    Tokens { indices: &'a [u32], difference: Vec<f32>, gradients: &'static str },
}

impl<'a> Kind<'a> {
    fn update(lora: &'a Lora) -> Result<Self> {
        let (a, b) = (Values::of(lora.a.as_tensor())?, Values::of(lora.b.as_tensor())?);
        Ok(Self::Update { a, b, r: lora.r(), scale: lora.scale as f32 })
    }
}

/// Buffers of a chunk of rows.
#[derive(Default)]
struct Chunk {
    logits: Vec<f32>,
    /// How steep the cap is at each logit, if there is one.
    slopes: Vec<f32>,
    x: PackedRows,
    /// The same for dense weights, where bytes would be too coarse.
    x_of_parts: PackedRows,
    lows: Vec<Vec<f32>>,
    packed: Vec<PackedRows>,
}

impl Chunk {
    /// Caps the logits, and keeps how steep that is at each.
    fn softcap(&mut self, isa: Isa, vocabulary: usize, cap: LogitSoftcap) {
        let Self { logits, slopes, .. } = self;
        slopes.resize(logits.len(), 0.0);
        let rows = logits.par_chunks_exact_mut(vocabulary);
        let rows = rows.zip(slopes.par_chunks_exact_mut(vocabulary));
        rows.for_each(|(logits, slopes)| softcap(isa, logits, slopes, cap));
    }
}

/// Logits of a hidden state that a thread takes at a time.
const LOGITS: usize = 256;

impl AdaptedHead<'_> {
    fn width(&self) -> usize {
        self.decoder.config.hidden_size
    }

    /// The logits of one hidden state, given the base's.
    fn one_row(&self, x: &[f32], base: &[f32]) -> Vec<f32> {
        let (width, isa) = (self.width(), Isa::current());
        let mut logits: Vec<f32> = base.iter().map(|y| self.base * y).collect();
        for part in &self.parts {
            match &part.kind {
                Kind::Update { a, b, r, scale } => {
                    let low: Vec<f32> = a.chunks_exact(width).map(|a| dot(isa, a, x)).collect();
                    let (b, scale) = (&**b, scale * part.weight);
                    let rows = logits.chunks_mut(LOGITS).zip(b.chunks(LOGITS * r));
                    par_for_each(rows.collect(), b.len(), |(y, b)| {
                        let rows = y.iter_mut().zip(b.chunks_exact(*r));
                        rows.for_each(|(y, b)| *y += scale * dot(isa, b, &low));
                    });
                }
                Kind::Whole(own) => {
                    let (own, weight) = (&**own, part.weight);
                    let rows = logits.chunks_mut(LOGITS).zip(own.chunks(LOGITS * width));
                    par_for_each(rows.collect(), own.len(), |(y, own)| {
                        let rows = y.iter_mut().zip(own.chunks_exact(width));
                        rows.for_each(|(y, own)| *y += weight * dot(isa, own, x));
                    });
                }
                Kind::Tokens { indices, difference, .. } => {
                    for (&token, row) in indices.iter().zip(difference.chunks_exact(width)) {
                        logits[token as usize] += part.weight * dot(isa, row, x);
                    }
                }
            }
        }
        logits
    }

    /// What there is to find of targets `(M)` from `x (M, H)`, a chunk of rows at a time. A cap comes
    /// behind all parts.
    pub fn forward(
        &self,
        panels: Panels,
        x: &[f32],
        (targets, cap): (&[u32], Option<LogitSoftcap>),
        mut found: TargetStatsMut,
    ) {
        let (width, vocabulary) = (self.width(), self.decoder.config.vocab_size);
        let (isa, rows) = (Isa::current(), chunk_rows(targets.len(), vocabulary));
        let mut chunk = Chunk::default();
        for (i, (x, targets)) in x.chunks(rows * width).zip(targets.chunks(rows)).enumerate() {
            self.logits(panels.0, x, &mut chunk);
            if let Some(cap) = cap {
                chunk.softcap(isa, vocabulary, cap);
            }
            found.take(isa, &mut chunk.logits, i * rows, targets, None);
        }
    }

    /// The backward pass from the gradient `dlogps (M)` of log-probs: that to `x`, `dx (M, H)`, is
    /// overwritten, and those of trainable parts are added up. Logits are computed again.
    pub fn backward(
        &self,
        panels: Panels,
        x: &[f32],
        (targets, dlogps, cap): (&[u32], &[f32], Option<LogitSoftcap>),
        dx: &mut [f32],
        sink: &mut AdapterGradients,
    ) {
        let (width, vocabulary) = (self.width(), self.decoder.config.vocab_size);
        let (isa, rows) = (Isa::current(), chunk_rows(targets.len(), vocabulary));
        let mut chunk = Chunk::default();
        let all = x.chunks(rows * width).zip(dx.chunks_mut(rows * width));
        for ((x, dx), (targets, dlogps)) in all.zip(targets.chunks(rows).zip(dlogps.chunks(rows))) {
            self.logits(panels.0, x, &mut chunk);
            if let Some(cap) = cap {
                chunk.softcap(isa, vocabulary, cap);
            }
            let per_row = chunk.logits.par_chunks_exact_mut(vocabulary).zip(targets).zip(dlogps);
            per_row.for_each(|((logits, &target), &d)| {
                score(isa, logits, target as usize, Some(d));
            });
            if cap.is_some() {
                let both = chunk.logits.par_iter_mut().zip(&chunk.slopes);
                both.for_each(|(d, slope)| *d *= slope);
            }
            self.back(panels.1, x, dx, &mut chunk, sink);
        }
    }

    /// Leaves the logits `(m, V)` of `x (m, H)` in the chunk, and of each update `x · Aᵀ (m, r)`.
    fn logits(&self, panel: PanelType, x: &[f32], chunk: &mut Chunk) {
        let (width, vocabulary) = (self.width(), self.decoder.config.vocab_size);
        let (isa, rows) = (Isa::current(), x.len() / width);
        let Chunk { logits, x: packed_x, x_of_parts, lows, packed, .. } = chunk;
        let values = Strided { values: x, stride: width };
        packed_x.pack(isa, panel, values, rows, width);
        let x_of_parts = match panel {
            PanelType::Int8 => {
                x_of_parts.pack(isa, PanelType::Int16, values, rows, width);
                &*x_of_parts
            }
            PanelType::F32 | PanelType::Int16 => &*packed_x,
        };
        lows.resize_with(self.parts.len(), Vec::new);
        packed.resize_with(self.parts.len(), PackedRows::default);
        for ((part, low), packed) in self.parts.iter().zip(&mut *lows).zip(&mut *packed) {
            if let Kind::Update { a, r, .. } = &part.kind {
                low.resize(rows * r, 0.0);
                let a = Weights::Dense { values: a, cols: width, scale: 1.0 };
                product(isa, vec![Term { x: x_of_parts, weights: a, transposed: true }], low, *r);
                packed.pack(isa, PanelType::F32, Strided { values: low, stride: *r }, rows, *r);
            }
        }
        logits.resize(rows * vocabulary, 0.0);
        logits.fill(0.0);
        if self.base != 0.0 {
            let frozen = Weights::Frozen(&self.decoder.head);
            let terms = vec![Term { x: packed_x, weights: frozen, transposed: true }];
            product(isa, terms, logits, vocabulary);
            scale(logits, self.base);
        }
        let mut terms = Vec::new();
        for (part, packed) in self.parts.iter().zip(&*packed) {
            match &part.kind {
                Kind::Update { b, r, scale, .. } => {
                    let b = Weights::Dense { values: b, cols: *r, scale: scale * part.weight };
                    terms.push(Term { x: packed, weights: b, transposed: true });
                }
                Kind::Whole(own) => {
                    let own = Weights::Dense { values: own, cols: width, scale: part.weight };
                    terms.push(Term { x: x_of_parts, weights: own, transposed: true });
                }
                Kind::Tokens { .. } => {}
            }
        }
        if !terms.is_empty() {
            add_product(isa, terms, logits, vocabulary);
        }
        for part in &self.parts {
            let Kind::Tokens { indices, difference, .. } = &part.kind else { continue };
            let (indices, difference, weight) = (*indices, &difference[..], part.weight);
            let lines = logits.par_chunks_exact_mut(vocabulary).zip(x.par_chunks_exact(width));
            lines.for_each(|(logits, x)| {
                for (&token, row) in indices.iter().zip(difference.chunks_exact(width)) {
                    logits[token as usize] += weight * dot(isa, row, x);
                }
            });
        }
    }

    /// From the gradient of the chunk's logits, which lies in their place.
    fn back(
        &self,
        panel: PanelType,
        x: &[f32],
        dx: &mut [f32],
        chunk: &mut Chunk,
        sink: &mut AdapterGradients,
    ) {
        let (width, vocabulary) = (self.width(), self.decoder.config.vocab_size);
        let (isa, rows) = (Isa::current(), x.len() / width);
        let dlogits = Strided { values: &chunk.logits, stride: vocabulary };
        let (mut straight, mut turned) = (PackedRows::default(), PackedRows::default());
        straight.pack(isa, panel, dlogits, rows, vocabulary);
        if self.parts.iter().any(|part| part.trainable) {
            turned.pack_turned(isa, panel, dlogits, vocabulary, rows);
        }
        dx.fill(0.0);
        if self.base != 0.0 {
            let frozen = Weights::Frozen(&self.decoder.head);
            product(
                isa,
                vec![Term { x: &straight, weights: frozen, transposed: false }],
                dx,
                width,
            );
            scale(dx, self.base);
        }
        for (part, low) in self.parts.iter().zip(&chunk.lows) {
            match &part.kind {
                Kind::Update { a, b, r, scale } => {
                    let scale = scale * part.weight;
                    let weights = Weights::Dense { values: b, cols: *r, scale };
                    let mut dlow = vec![0f32; rows * r]; // scale · dlogits · B
                    let terms = vec![Term { x: &straight, weights, transposed: false }];
                    product(isa, terms, &mut dlow, *r);
                    let of_low = Strided { values: &dlow, stride: *r };
                    let mut packed = PackedRows::default();
                    packed.pack(isa, PanelType::F32, of_low, rows, *r);
                    let a = Weights::Dense { values: a, cols: width, scale: 1.0 };
                    let terms = vec![Term { x: &packed, weights: a, transposed: false }];
                    add_product(isa, terms, dx, width);
                    if part.trainable {
                        packed.pack_turned(isa, panel, of_low, *r, rows);
                        let weights = Weights::Dense { values: x, cols: width, scale: 1.0 };
                        let terms = vec![Term { x: &packed, weights, transposed: false }];
                        add_product(isa, terms, sink.of(HEAD, 0), width);
                        let weights = Weights::Dense { values: low, cols: *r, scale };
                        let terms = vec![Term { x: &turned, weights, transposed: false }];
                        add_product(isa, terms, sink.of(HEAD, 1), *r);
                    }
                }
                Kind::Whole(own) => {
                    let own = Weights::Dense { values: own, cols: width, scale: part.weight };
                    let terms = vec![Term { x: &straight, weights: own, transposed: false }];
                    add_product(isa, terms, dx, width);
                    if part.trainable {
                        let weights = Weights::Dense { values: x, cols: width, scale: part.weight };
                        let terms = vec![Term { x: &turned, weights, transposed: false }];
                        add_product(isa, terms, sink.of(HEAD, 0), width);
                    }
                }
                Kind::Tokens { indices, difference, gradients } => {
                    let rows = chunk.logits.chunks_exact(vocabulary).zip(x.chunks_exact(width));
                    for ((dlogits, x), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                        for (i, &token) in indices.iter().enumerate() {
                            let d = part.weight * dlogits[token as usize];
                            let row = i * width..(i + 1) * width;
                            let from = &difference[row.clone()];
                            dx.iter_mut().zip(from).for_each(|(dx, w)| *dx += d * w);
                            if part.trainable {
                                let sums = &mut sink.of(gradients, 0)[row];
                                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += d * x);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `out = Σ x · W`.
fn product(isa: Isa, terms: Vec<Term>, out: &mut [f32], stride: usize) {
    let product = Product { terms, init: Init::Zero, out: Out::new(out, stride) };
    multiply(isa, &mut [product]);
}

/// `out += Σ x · W`.
fn add_product(isa: Isa, terms: Vec<Term>, out: &mut [f32], stride: usize) {
    let product = Product { terms, init: Init::Add, out: Out::new(out, stride) };
    multiply(isa, &mut [product]);
}

fn scale(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        values.par_iter_mut().for_each(|value| *value *= factor);
    }
}
