//! The head of a decoder (`lm_head`) under adapters: logits and log-probs of hidden states.
//!
//! An adapter can have a low-rank update, a whole matrix (`modules_to_save`) or rows of some tokens
//! (`trainable_token_indices`). Each is added to the base's logits, times the adapter's weight: a whole matrix
//! counts as its difference to the base's. Dropout does not apply here.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use quantune_adapters::config::HEAD;
use quantune_adapters::delta::{Adapter, Lora};
use rayon::prelude::*;

use super::adapters::{ActiveAdapter, Adapters, parameter};
use super::config::Config;
use super::gradients::GradientBuffers;
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
    Compute, DeviceMatrix, LogitSoftcap, Values, capped_log_probs, frozen_linear, par_for_each,
};
use crate::quant::FrozenMatrix;

/// Panels of the forward and of the backward pass.
type Panels = (PanelType, PanelType);

/// Logits on the host, where tokens are sampled: a row for each hidden state.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits {
    /// `(M, vocab_size)`.
    values: Vec<f32>,
    vocab_size: usize,
}

impl Logits {
    /// Logits `(M, vocab_size)`, row by row.
    ///
    /// # Panics
    /// If `values` are no whole rows.
    pub fn new(values: Vec<f32>, vocab_size: usize) -> Self {
        assert!(values.len().is_multiple_of(vocab_size), "rows of {vocab_size} logits");
        Self { values, vocab_size }
    }

    /// How many logits a row has.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The logits of the row `index`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocab_size..][..self.vocab_size]
    }

    /// All of them as a tensor `(M, vocab_size)`.
    pub fn into_tensor(self) -> Result<Tensor> {
        let shape = (self.values.len() / self.vocab_size, self.vocab_size);
        Tensor::from_vec(self.values, shape, &Device::Cpu)
    }
}

/// The frozen head of a decoder.
#[derive(Clone, Copy)]
pub(super) struct LmHead<'a> {
    pub weight: &'a Arc<FrozenMatrix>,
    /// The same on another device.
    pub uploaded: Option<&'a Arc<DeviceMatrix>>,
    pub config: &'a Config,
    pub compute: Compute,
    pub device: &'a Device,
}

impl<'a> LmHead<'a> {
    /// Whether an adapter changes the head.
    fn adapted_by(&self, adapter: &Adapter) -> bool {
        let whole = adapter.modules.contains_key(HEAD) || adapter.saved.contains_key(HEAD);
        whole || adapter.head_rows(self.config.tie_word_embeddings).is_some()
    }

    /// The logits of hidden states `(M, hidden_size)`, each row under its adapters: for few rows only. A
    /// row gets the same bits among any others.
    pub(super) fn logits(&self, hidden: &Tensor, adapters: Adapters) -> Result<Logits> {
        let hidden = &self.scaled_hidden(hidden)?;
        let base = match self.uploaded {
            Some(head) => {
                let base = head.linear(&hidden.detach())?; // (M, V)
                base.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?
            }
            None => few_rows(hidden, self.weight, self.compute)?,
        };
        let vocab_size = self.weight.rows();
        if !adapters.iter().any(|active| self.adapted_by(&active.adapter)) {
            return Ok(Logits::new(self.capped(base), vocab_size));
        }
        let hidden = hidden.contiguous()?.to_device(&Device::Cpu)?;
        let states = Values::of(&hidden)?;
        let mut logits = Vec::with_capacity(base.len());
        let rows = states.chunks_exact(self.config.hidden_size).zip(base.chunks_exact(vocab_size));
        for (row, (x, base)) in rows.enumerate() {
            match self.adapted(adapters.of(row))? {
                Some(head) => logits.extend(head.one_row(x, base)),
                None => logits.extend_from_slice(base),
            }
        }
        Ok(Logits::new(self.capped(logits), vocab_size))
    }

    /// Log-probabilities (M) of `targets`, one per row of `hidden (M, hidden_size)`, of logits divided by
    /// `temperature`, of rows that all use the same adapters, by the CPU's kernels.
    pub(super) fn log_probs(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
        active: &[ActiveAdapter],
    ) -> Result<Vec<f32>> {
        let (hidden, cap) = self.before_head(hidden, temperature)?;
        let Some(head) = self.adapted(active)? else {
            return capped_log_probs(&hidden, self.weight, targets, cap, self.compute)?.to_vec1();
        };
        check_targets(targets, self.weight)?;
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
        Ok(logps)
    }

    /// [`Self::log_probs`] composed of candle's operations, with trainable adapters on the tape: the
    /// definition of the answer.
    pub(super) fn tensor_log_probs(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
        active: &[ActiveAdapter],
    ) -> Result<Tensor> {
        let (hidden, cap) = self.before_head(hidden, temperature)?;
        check_targets(targets, self.weight)?;
        let logits = self.adapted_logits(&hidden, active)?; // (M, V)
        log_probs_of_logits(logits, targets, cap)
    }

    /// Hidden states as the head's matrix multiplies them for logits divided by `temperature`, and the
    /// cap on the logits.
    fn before_head(
        &self,
        hidden: &Tensor,
        temperature: f64,
    ) -> Result<(Tensor, Option<LogitSoftcap>)> {
        let cap = self.config.logit_softcap(temperature);
        let hidden = self.scaled_hidden(hidden)?;
        // Without a cap hidden states may as well be divided; with one, logits are, behind it.
        Ok((if cap.is_some() { hidden } else { at_temperature(hidden, temperature)? }, cap))
    }

    /// Logits `(M, vocab_size)` composed of candle's operations: the portable form.
    fn adapted_logits(&self, hidden: &Tensor, active: &[ActiveAdapter]) -> Result<Tensor> {
        let base = match self.uploaded {
            Some(head) => head.linear(hidden)?,
            None => frozen_linear(hidden, self.weight, Compute::REFERENCE)?,
        };
        let mut logits = base.clone();
        for active in active {
            let on_tape = |var: &Var| parameter(active, var, self.device);
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
                let rows = frozen_rows(self.weight, &own.indices, hidden.device())?;
                let delta = hidden.matmul(&(on_tape(&own.rows)? - rows)?.t()?)?.matmul(&places)?;
                logits = (logits + (delta * active.weight)?)?;
            }
        }
        Ok(logits)
    }

    /// Hidden states times the multiplier that a family may have.
    fn scaled_hidden(&self, hidden: &Tensor) -> Result<Tensor> {
        let by = self.config.variation.logits_multiplier;
        if by == 1.0 { Ok(hidden.clone()) } else { hidden * by }
    }

    /// Logits under the cap, if there is one.
    fn capped(&self, mut logits: Vec<f32>) -> Vec<f32> {
        if let Some(cap) = self.config.variation.final_logit_softcapping {
            let (cap, inverse) = (cap as f32, (1.0 / cap) as f32);
            // To the bit what candle makes of `(logits / cap).tanh() * cap`.
            logits.iter_mut().for_each(|y| *y = (*y * inverse + 0.0).tanh() * cap + 0.0);
        }
        logits
    }

    /// The head with adapters; `None` if they do not change it.
    pub(super) fn adapted(&self, active: &'a [ActiveAdapter]) -> Result<Option<AdaptedHead<'a>>> {
        if !active.iter().any(|active| self.adapted_by(&active.adapter)) {
            return Ok(None);
        }
        let mut head = AdaptedHead {
            weight: self.weight,
            vocab_size: self.config.vocab_size,
            base: 1.0,
            parts: Vec::new(),
        };
        for active in active {
            let ActiveAdapter { adapter, weight, trainable } = active;
            let weight = *weight as f32;
            let mut part = |kind| head.parts.push(HeadPart { kind, weight, trainable: *trainable });
            if let Some(lora) = adapter.modules.get(HEAD) {
                part(HeadPartKind::update(lora)?);
            }
            if let Some(own) = adapter.saved.get(HEAD) {
                part(HeadPartKind::Whole(Values::of(own.as_tensor())?));
                head.base -= weight;
            }
            if let Some((own, gradients)) = adapter.head_rows(self.config.tie_word_embeddings) {
                let mut difference = Vec::new();
                read_rows(self.weight, &own.indices, &mut difference)?;
                let values = Values::of(own.rows.as_tensor())?;
                difference.iter_mut().zip(&*values).for_each(|(d, own)| *d = own - *d);
                let mut part =
                    |kind| head.parts.push(HeadPart { kind, weight, trainable: *trainable });
                part(HeadPartKind::Tokens { indices: &own.indices, difference, gradients });
            }
        }
        Ok(Some(head))
    }
}

/// The head with the adapters of some rows.
pub(crate) struct AdaptedHead<'a> {
    weight: &'a FrozenMatrix,
    vocab_size: usize,
    /// Factor of the base's product: 1 minus the weights of whole matrices.
    base: f32,
    parts: Vec<HeadPart<'a>>,
}

/// What one adapter adds to the head.
struct HeadPart<'a> {
    kind: HeadPartKind<'a>,
    weight: f32,
    trainable: bool,
}

enum HeadPartKind<'a> {
    /// `A (r, H)`, `B (V, r)`.
    Update { a: Values<'a>, b: Values<'a>, r: usize, scale: f32 },
    /// `(V, H)`.
    Whole(Values<'a>),
    /// The adapter's rows minus the base's, `(n, H)`, and the name of their gradients.
    Tokens { indices: &'a [u32], difference: Vec<f32>, gradients: &'static str },
}

impl<'a> HeadPartKind<'a> {
    fn update(lora: &'a Lora) -> Result<Self> {
        let (a, b) = (Values::of(lora.a.as_tensor())?, Values::of(lora.b.as_tensor())?);
        Ok(Self::Update { a, b, r: lora.r(), scale: lora.scale as f32 })
    }
}

/// Buffers of a chunk of rows.
#[derive(Default)]
struct LogitChunk {
    logits: Vec<f32>,
    /// Derivative of the softcap at each logit, if there is one.
    slopes: Vec<f32>,
    x: PackedRows,
    /// The same for dense weights, where bytes would be too coarse.
    x_of_parts: PackedRows,
    lora_hidden: Vec<Vec<f32>>,
    packed: Vec<PackedRows>,
}

impl LogitChunk {
    /// Caps the logits, and keeps how steep that is at each.
    fn softcap(&mut self, isa: Isa, vocabulary: usize, cap: LogitSoftcap) {
        let Self { logits, slopes, .. } = self;
        slopes.resize(logits.len(), 0.0);
        let rows = logits.par_chunks_exact_mut(vocabulary);
        let rows = rows.zip(slopes.par_chunks_exact_mut(vocabulary));
        rows.for_each(|(logits, slopes)| softcap(isa, logits, slopes, cap));
    }
}

/// Logits of a hidden state per task.
const LOGITS: usize = 256;

impl AdaptedHead<'_> {
    fn width(&self) -> usize {
        self.weight.cols()
    }

    /// The logits of one hidden state, given the base's.
    fn one_row(&self, x: &[f32], base: &[f32]) -> Vec<f32> {
        let (width, isa) = (self.width(), Isa::current());
        let mut logits: Vec<f32> = base.iter().map(|y| self.base * y).collect();
        for part in &self.parts {
            match &part.kind {
                HeadPartKind::Update { a, b, r, scale } => {
                    let hidden: Vec<f32> = a.chunks_exact(width).map(|a| dot(isa, a, x)).collect();
                    let (b, scale) = (&**b, scale * part.weight);
                    let rows = logits.chunks_mut(LOGITS).zip(b.chunks(LOGITS * r));
                    par_for_each(rows.collect(), b.len(), |(y, b)| {
                        let rows = y.iter_mut().zip(b.chunks_exact(*r));
                        rows.for_each(|(y, b)| *y += scale * dot(isa, b, &hidden));
                    });
                }
                HeadPartKind::Whole(own) => {
                    let (own, weight) = (&**own, part.weight);
                    let rows = logits.chunks_mut(LOGITS).zip(own.chunks(LOGITS * width));
                    par_for_each(rows.collect(), own.len(), |(y, own)| {
                        let rows = y.iter_mut().zip(own.chunks_exact(width));
                        rows.for_each(|(y, own)| *y += weight * dot(isa, own, x));
                    });
                }
                HeadPartKind::Tokens { indices, difference, .. } => {
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
    pub(crate) fn forward(
        &self,
        panels: Panels,
        x: &[f32],
        (targets, cap): (&[u32], Option<LogitSoftcap>),
        mut found: TargetStatsMut,
    ) {
        let (width, vocabulary) = (self.width(), self.vocab_size);
        let (isa, rows) = (Isa::current(), chunk_rows(targets.len(), vocabulary));
        let mut chunk = LogitChunk::default();
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
    pub(crate) fn backward(
        &self,
        panels: Panels,
        x: &[f32],
        (targets, dlogps, cap): (&[u32], &[f32], Option<LogitSoftcap>),
        dx: &mut [f32],
        sink: &mut GradientBuffers,
    ) {
        let (width, vocabulary) = (self.width(), self.vocab_size);
        let (isa, rows) = (Isa::current(), chunk_rows(targets.len(), vocabulary));
        let mut chunk = LogitChunk::default();
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
            self.backward_chunk(panels.1, x, dx, &mut chunk, sink);
        }
    }

    /// Leaves the logits `(m, V)` of `x (m, H)` in the chunk, and of each update `x · Aᵀ (m, r)`.
    fn logits(&self, panel: PanelType, x: &[f32], chunk: &mut LogitChunk) {
        let (width, vocabulary) = (self.width(), self.vocab_size);
        let (isa, rows) = (Isa::current(), x.len() / width);
        let LogitChunk { logits, x: packed_x, x_of_parts, lora_hidden, packed, .. } = chunk;
        let values = Strided { values: x, stride: width };
        packed_x.pack(isa, panel, values, rows, width);
        let x_of_parts = match panel {
            PanelType::Int8 => {
                x_of_parts.pack(isa, PanelType::Int16, values, rows, width);
                &*x_of_parts
            }
            PanelType::F32 | PanelType::Int16 => &*packed_x,
        };
        lora_hidden.resize_with(self.parts.len(), Vec::new);
        packed.resize_with(self.parts.len(), PackedRows::default);
        for ((part, hidden), packed) in self.parts.iter().zip(&mut *lora_hidden).zip(&mut *packed) {
            if let HeadPartKind::Update { a, r, .. } = &part.kind {
                hidden.resize(rows * r, 0.0);
                let a = Weights::Dense { values: a, cols: width, scale: 1.0 };
                product(
                    isa,
                    vec![Term { x: x_of_parts, weights: a, transposed: true }],
                    hidden,
                    *r,
                );
                packed.pack(isa, PanelType::F32, Strided { values: hidden, stride: *r }, rows, *r);
            }
        }
        logits.resize(rows * vocabulary, 0.0);
        logits.fill(0.0);
        if self.base != 0.0 {
            let frozen = Weights::Frozen(self.weight);
            let terms = vec![Term { x: packed_x, weights: frozen, transposed: true }];
            product(isa, terms, logits, vocabulary);
            scale(logits, self.base);
        }
        let mut terms = Vec::new();
        for (part, packed) in self.parts.iter().zip(&*packed) {
            match &part.kind {
                HeadPartKind::Update { b, r, scale, .. } => {
                    let b = Weights::Dense { values: b, cols: *r, scale: scale * part.weight };
                    terms.push(Term { x: packed, weights: b, transposed: true });
                }
                HeadPartKind::Whole(own) => {
                    let own = Weights::Dense { values: own, cols: width, scale: part.weight };
                    terms.push(Term { x: x_of_parts, weights: own, transposed: true });
                }
                HeadPartKind::Tokens { .. } => {}
            }
        }
        if !terms.is_empty() {
            add_product(isa, terms, logits, vocabulary);
        }
        for part in &self.parts {
            let HeadPartKind::Tokens { indices, difference, .. } = &part.kind else { continue };
            let (indices, difference, weight) = (*indices, &difference[..], part.weight);
            let lines = logits.par_chunks_exact_mut(vocabulary).zip(x.par_chunks_exact(width));
            lines.for_each(|(logits, x)| {
                for (&token, row) in indices.iter().zip(difference.chunks_exact(width)) {
                    logits[token as usize] += weight * dot(isa, row, x);
                }
            });
        }
    }

    /// From the gradient of the chunk's logits, which is in their place.
    fn backward_chunk(
        &self,
        panel: PanelType,
        x: &[f32],
        dx: &mut [f32],
        chunk: &mut LogitChunk,
        sink: &mut GradientBuffers,
    ) {
        let (width, vocabulary) = (self.width(), self.vocab_size);
        let (isa, rows) = (Isa::current(), x.len() / width);
        let dlogits = Strided { values: &chunk.logits, stride: vocabulary };
        let (mut straight, mut turned) = (PackedRows::default(), PackedRows::default());
        straight.pack(isa, panel, dlogits, rows, vocabulary);
        if self.parts.iter().any(|part| part.trainable) {
            turned.pack_transposed(isa, panel, dlogits, vocabulary, rows);
        }
        dx.fill(0.0);
        if self.base != 0.0 {
            let frozen = Weights::Frozen(self.weight);
            product(
                isa,
                vec![Term { x: &straight, weights: frozen, transposed: false }],
                dx,
                width,
            );
            scale(dx, self.base);
        }
        for (part, hidden) in self.parts.iter().zip(&chunk.lora_hidden) {
            match &part.kind {
                HeadPartKind::Update { a, b, r, scale } => {
                    let scale = scale * part.weight;
                    let weights = Weights::Dense { values: b, cols: *r, scale };
                    let mut dhidden = vec![0f32; rows * r]; // scale · dlogits · B
                    let terms = vec![Term { x: &straight, weights, transposed: false }];
                    product(isa, terms, &mut dhidden, *r);
                    let of_hidden = Strided { values: &dhidden, stride: *r };
                    let mut packed = PackedRows::default();
                    packed.pack(isa, PanelType::F32, of_hidden, rows, *r);
                    let a = Weights::Dense { values: a, cols: width, scale: 1.0 };
                    let terms = vec![Term { x: &packed, weights: a, transposed: false }];
                    add_product(isa, terms, dx, width);
                    if part.trainable {
                        packed.pack_transposed(isa, panel, of_hidden, *r, rows);
                        let weights = Weights::Dense { values: x, cols: width, scale: 1.0 };
                        let terms = vec![Term { x: &packed, weights, transposed: false }];
                        add_product(isa, terms, sink.of(HEAD, 0), width);
                        let weights = Weights::Dense { values: hidden, cols: *r, scale };
                        let terms = vec![Term { x: &turned, weights, transposed: false }];
                        add_product(isa, terms, sink.of(HEAD, 1), *r);
                    }
                }
                HeadPartKind::Whole(own) => {
                    let own = Weights::Dense { values: own, cols: width, scale: part.weight };
                    let terms = vec![Term { x: &straight, weights: own, transposed: false }];
                    add_product(isa, terms, dx, width);
                    if part.trainable {
                        let weights = Weights::Dense { values: x, cols: width, scale: part.weight };
                        let terms = vec![Term { x: &turned, weights, transposed: false }];
                        add_product(isa, terms, sink.of(HEAD, 0), width);
                    }
                }
                HeadPartKind::Tokens { indices, difference, gradients } => {
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

/// Hidden states whose logits are divided by `temperature`.
fn at_temperature(hidden: Tensor, temperature: f64) -> Result<Tensor> {
    if temperature == 1.0 { Ok(hidden) } else { hidden * (1.0 / temperature) }
}

/// The scores of hidden states `(M, hidden_size)` by a head `(1, hidden_size)`, wherever it is → `(M)`
/// on their device.
pub(super) fn scores(hidden: &Tensor, head: &Tensor) -> Result<Tensor> {
    hidden.matmul(&head.to_device(hidden.device())?.t()?)?.squeeze(1)
}
