//! One optimizer step over micro-batches, whatever they are of: gradients added up, clipped, and
//! AdamW over all that trains.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Var;
use quantune_adapters::delta::Adapter;
use serde_json::json;

use super::TrainError;
use super::log::Numbers;
use super::step::{Buffers, Noise, StepSettings, accumulate, dropout};
use crate::data::Batch;
use crate::model::{ActiveAdapter, Decoder};
use crate::objectives::{Objective, Stats};
use crate::optim::{AdamW, AdamWSettings, Gradients, clip_factor, global_norm};

/// A part of a step.
#[derive(Debug)]
pub struct MicroBatch {
    /// The tokens.
    pub batch: Batch,
    /// What is minimized over them.
    pub objective: Objective,
    /// What the objective's sum is multiplied with: 1 / the count of the whole step.
    pub scale: f64,
    /// Which of the trained adapters they wear.
    pub adapter: usize,
    /// The pass over the data, which keys dropout.
    pub epoch: u64,
    /// What logits are divided by.
    pub temperature: f64,
}

/// What a step came to.
#[derive(Debug, Default)]
pub struct Stepped {
    /// The loss, scaled.
    pub loss: f64,
    /// The norm of the gradient before it was clipped.
    pub grad_norm: f64,
    /// What the objectives counted, added up.
    pub stats: Stats,
    /// Log-probs of sampled tokens as they were before the step, part after part.
    pub logps: Vec<f32>,
}

/// What objectives counted, under TRL's names.
pub fn stats_numbers(stats: &Stats) -> Numbers {
    stats.metrics().into_iter().map(|(key, value)| (key.to_string(), json!(value))).collect()
}

/// The adapters that are trained, their gradients and their optimizer.
#[derive(Debug)]
pub struct Learner<'a> {
    decoder: &'a Decoder,
    /// The adapters, the policy's or only one first.
    pub adapters: Vec<Arc<Adapter>>,
    active: Vec<Vec<ActiveAdapter>>,
    parameters: Vec<Var>,
    /// Which parameters are of which adapter.
    ranges: Vec<Range<usize>>,
    gradients: Gradients,
    buffers: Buffers,
    /// The moments.
    pub optimizer: AdamW,
    /// Layers, from the top, whose tapes are kept.
    pub kept_layers: usize,
    max_grad_norm: f64,
    /// Of dropout: its probability and seed.
    dropout: (f64, u64),
    /// Of NEFTune's noise; 0 is none.
    pub noise_alpha: f64,
}

impl<'a> Learner<'a> {
    /// A learner that has not taken a step. `max_grad_norm` 0 clips nothing.
    pub fn new(
        decoder: &'a Decoder,
        adapters: Vec<Arc<Adapter>>,
        settings: AdamWSettings,
        max_grad_norm: f64,
        dropout: (f64, u64),
    ) -> Result<Self, TrainError> {
        let (mut parameters, mut ranges) = (Vec::new(), Vec::new());
        for adapter in &adapters {
            let start = parameters.len();
            parameters.extend(adapter.parameters().into_iter().map(|(_, var)| var));
            ranges.push(start..parameters.len());
        }
        let lengths: Vec<usize> = parameters.iter().map(|var| var.elem_count()).collect();
        let top = adapters.iter().map(|adapter| vec![ActiveAdapter::trainable(adapter.clone())]);
        Ok(Self {
            decoder,
            active: top.collect(),
            adapters,
            parameters,
            ranges,
            gradients: lengths.iter().map(|&n| vec![0.0; n]).collect(),
            buffers: Buffers::default(),
            optimizer: AdamW::new(settings, &lengths),
            kept_layers: 0,
            max_grad_norm,
            dropout,
            noise_alpha: 0.0,
        })
    }

    /// The same with the first adapter on top of others.
    pub fn on_top_of(mut self, below: &[ActiveAdapter]) -> Self {
        if let Some(first) = self.active.first_mut() {
            first.splice(..0, below.iter().cloned());
        }
        self
    }

    /// The same with learning rates as LoRA+ has them (Hayou et al. 2024; PEFT's
    /// `create_loraplus_optimizer`): B and magnitudes learn `ratio` times as fast, updates of the
    /// embedding at `embedding` times the rate.
    pub fn with_lora_plus(mut self, ratio: f64, embedding: f64) -> Self {
        let names = self.adapters.iter().flat_map(|adapter| adapter.parameters());
        let rate = |(name, var): (String, Var)| {
            if name.contains("lora_embedding_") {
                embedding
            } else if name.contains("lora_B") || var.rank() == 1 {
                ratio
            } else {
                1.0
            }
        };
        self.optimizer = self.optimizer.with_rates(names.map(rate).collect());
        self
    }

    /// The frozen base.
    pub fn decoder(&self) -> &'a Decoder {
        self.decoder
    }

    /// What rows wear that `adapter` is trained on.
    pub fn active(&self, adapter: usize) -> &[ActiveAdapter] {
        &self.active[adapter]
    }

    /// The same, not to be learned from.
    pub fn active_frozen(&self, adapter: usize) -> Vec<ActiveAdapter> {
        let frozen = |active: &ActiveAdapter| ActiveAdapter { trainable: false, ..active.clone() };
        self.active[adapter].iter().map(frozen).collect()
    }

    /// Takes a step.
    ///
    /// # Errors
    /// [`TrainError::Diverged`] if the loss, the gradient or a parameter is no number any more; the
    /// step it names is the optimizer's.
    pub fn step(
        &mut self,
        parts: &[MicroBatch],
        learning_rate: f64,
    ) -> Result<Stepped, TrainError> {
        self.gradients.iter_mut().for_each(|gradient| gradient.fill(0.0));
        let mut stepped = Stepped::default();
        let (p, seed) = self.dropout;
        for part in parts {
            let dropout = dropout(&part.batch, part.epoch, p, seed);
            let settings = StepSettings {
                objective: &part.objective,
                scale: part.scale,
                temperature: part.temperature,
                kept_layers: self.kept_layers,
                active: &self.active[part.adapter],
                parameters: &self.parameters[self.ranges[part.adapter].clone()],
                dropout: dropout.as_ref(),
                noise: (self.noise_alpha > 0.0).then_some(Noise {
                    alpha: self.noise_alpha,
                    seed,
                    epoch: part.epoch,
                }),
            };
            let gradients = &mut self.gradients[self.ranges[part.adapter].clone()];
            let judged =
                accumulate(self.decoder, &part.batch, &settings, gradients, &mut self.buffers)?;
            stepped.loss += judged.loss * part.scale;
            stepped.stats.add(judged.stats);
            stepped.logps.extend(judged.logps);
        }
        for (adapter, range) in self.adapters.iter().zip(&self.ranges) {
            adapter.mask_frozen_ranks(&mut self.gradients[range.clone()]);
        }
        stepped.grad_norm = global_norm(&self.gradients);
        let diverged = TrainError::Diverged { step: self.optimizer.step + 1, loss: stepped.loss };
        if !stepped.loss.is_finite() || !stepped.grad_norm.is_finite() {
            return Err(diverged);
        }
        let most = self.max_grad_norm;
        let factor = if most > 0.0 { clip_factor(stepped.grad_norm, most) } else { 1.0 };
        let held = self.adapters.iter().map(|adapter| adapter.frozen_ranks());
        let held = held.collect::<candle_core::Result<Vec<_>>>()?;
        if !self.optimizer.step(&self.parameters, &self.gradients, factor, learning_rate)? {
            return Err(diverged);
        }
        for (adapter, held) in self.adapters.iter().zip(&held) {
            adapter.restore_frozen_ranks(held)?;
            adapter.invalidate_decode_weights();
        }
        Ok(stepped)
    }
}
