//! One optimizer step over micro-batches: gradients are accumulated and clipped, and the optimizer updates
//! all parameters. The parameters belong to a [`Trainable`]: adapters over a frozen base
//! ([`AdapterTraining`]), or all weights of a model.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Var;
use quantune_adapters::delta::Adapter;

use super::TrainError;
use super::step::{Noise, StepSettings, TrainState, dropout, train_state};
use crate::data::Batch;
use crate::model::{ActiveAdapter, Decoder};
use crate::objectives::{Objective, ObjectiveOutput, Stats};
use crate::optim::{AdamW, AdamWSettings, clip_factor};

/// A micro-batch of a step.
#[derive(Debug)]
pub struct MicroBatch {
    /// The tokens.
    pub batch: Batch,
    /// The objective to minimize.
    pub objective: Objective,
    /// Factor of the objective's sum: 1 / the count of the whole step.
    pub scale: f64,
    /// Index of the trained adapter that the rows use.
    pub adapter: usize,
    /// The pass over the data, which keys dropout.
    pub epoch: u64,
    /// Temperature of the logits.
    pub temperature: f64,
}

/// The result of a step.
#[derive(Debug, Default)]
pub struct StepResult {
    /// The loss, scaled.
    pub loss: f64,
    /// The gradient norm before clipping.
    pub grad_norm: f64,
    /// Summed statistics of the objectives.
    pub stats: Stats,
    /// Log-probs of sampled tokens before the step, by micro-batch.
    pub logps: Vec<f32>,
}

/// Trainable parameters with their gradients and optimizer.
pub trait Trainable {
    /// A micro-batch of a step.
    type MicroBatch;

    /// Sets all gradients to 0.
    ///
    /// # Errors
    /// If the device has too little memory.
    fn zero_gradients(&mut self) -> Result<(), TrainError>;

    /// Adds the gradients of a micro-batch's scaled loss, keeping the tapes of the upper `kept_layers`
    /// layers. Returns the statistics of its objective; the loss is scaled.
    ///
    /// # Errors
    /// If the micro-batch does not fit the model.
    fn accumulate(
        &mut self,
        part: &Self::MicroBatch,
        kept_layers: usize,
    ) -> Result<ObjectiveOutput, TrainError>;

    /// Sets the gradients of what stays frozen within trainable parameters to 0.
    ///
    /// # Errors
    /// If the device fails.
    fn mask_gradients(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    /// The norm over all gradients.
    ///
    /// # Errors
    /// If the device fails.
    fn gradient_norm(&self) -> Result<f64, TrainError>;

    /// Takes an optimizer step with the gradients times `factor`. Returns whether all parameters are
    /// finite after it.
    ///
    /// # Errors
    /// If the device fails.
    fn update(&mut self, factor: f32, learning_rate: f64) -> Result<bool, TrainError>;

    /// Optimizer steps taken.
    fn optimizer_steps(&self) -> u64;
}

/// Takes optimizer steps.
#[derive(Debug)]
pub struct Learner<T> {
    /// The trainable parameters.
    pub trained: T,
    /// Layers, from the top, whose tapes are kept for the backward pass.
    pub kept_layers: usize,
    /// Gradient clipping norm; 0 is off.
    pub max_grad_norm: f64,
}

/// A learner of adapters.
pub type AdapterLearner<'a> = Learner<AdapterTraining<'a>>;

impl<T: Trainable> Learner<T> {
    /// Takes a step.
    ///
    /// # Errors
    /// [`TrainError::Diverged`] if the loss, the gradient or a parameter is NaN or infinite; the step
    /// it names is the optimizer's.
    pub fn step(
        &mut self,
        parts: &[T::MicroBatch],
        learning_rate: f64,
    ) -> Result<StepResult, TrainError> {
        self.trained.zero_gradients()?;
        let mut result = StepResult::default();
        for part in parts {
            let output = self.trained.accumulate(part, self.kept_layers)?;
            result.loss += output.loss;
            result.stats.add(output.stats);
            result.logps.extend(output.logps);
        }
        self.trained.mask_gradients()?;
        result.grad_norm = self.trained.gradient_norm()?;
        let step = self.trained.optimizer_steps() + 1;
        let diverged = TrainError::Diverged { step, loss: result.loss };
        if !result.loss.is_finite() || !result.grad_norm.is_finite() {
            return Err(diverged);
        }
        let clips = self.max_grad_norm > 0.0;
        let factor = if clips { clip_factor(result.grad_norm, self.max_grad_norm) } else { 1.0 };
        if !self.trained.update(factor, learning_rate)? {
            return Err(diverged);
        }
        Ok(result)
    }
}

/// The adapters that are trained over a frozen base, their gradients and their optimizer.
#[derive(Debug)]
pub struct AdapterTraining<'a> {
    decoder: &'a Decoder,
    /// The adapters; the policy's, or the only one, is the first.
    pub adapters: Vec<Arc<Adapter>>,
    active: Vec<Vec<ActiveAdapter>>,
    parameters: Vec<Var>,
    /// The parameter range of each adapter.
    ranges: Vec<Range<usize>>,
    /// Gradients and optimizer on the decoder's backend.
    state: Box<dyn TrainState>,
    /// The probability of dropout, and its seed.
    dropout: (f64, u64),
    /// NEFTune noise alpha; 0 is off.
    pub noise_alpha: f64,
}

impl<'a> AdapterLearner<'a> {
    /// A new learner. `max_grad_norm` 0 disables gradient clipping.
    ///
    /// # Errors
    /// If a tensor operation fails.
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
        let active = adapters.iter().map(|adapter| vec![ActiveAdapter::trainable(adapter.clone())]);
        let optimizer = AdamW::new(settings, &lengths);
        let state = train_state(decoder.compute.backend, &parameters, optimizer)?;
        let trained = AdapterTraining {
            decoder,
            active: active.collect(),
            adapters,
            parameters,
            ranges,
            state,
            dropout,
            noise_alpha: 0.0,
        };
        Ok(Self { trained, kept_layers: 0, max_grad_norm })
    }

    /// The learner with the first adapter on top of frozen ones.
    pub fn on_top_of(mut self, frozen: &[ActiveAdapter]) -> Self {
        if let Some(first) = self.trained.active.first_mut() {
            first.splice(..0, frozen.iter().cloned());
        }
        self
    }

    /// The learner with the learning rates of LoRA+ (Hayou et al. 2024; PEFT's
    /// `create_loraplus_optimizer`): B and magnitudes have `ratio` times the learning rate, updates of the
    /// embedding `embedding` times.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn with_lora_plus(mut self, ratio: f64, embedding: f64) -> Result<Self, TrainError> {
        let named = self.trained.adapters.iter().flat_map(|adapter| adapter.parameters());
        let rate = |(name, var): (String, Var)| {
            if name.contains("lora_embedding_") {
                embedding
            } else if name.contains("lora_B") || var.rank() == 1 {
                ratio
            } else {
                1.0
            }
        };
        let rates = named.map(rate).collect();
        let optimizer = self.trained.optimizer()?.into_owned().with_rates(rates);
        self.trained.set_optimizer(optimizer)?;
        Ok(self)
    }

    /// The frozen base.
    pub fn decoder(&self) -> &'a Decoder {
        self.trained.decoder
    }

    /// The active adapters of rows that train `adapter`.
    pub fn active(&self, adapter: usize) -> &[ActiveAdapter] {
        &self.trained.active[adapter]
    }

    /// The active adapters of [`Self::active`], all of them frozen.
    pub fn active_frozen(&self, adapter: usize) -> Vec<ActiveAdapter> {
        let frozen = |active: &ActiveAdapter| ActiveAdapter { trainable: false, ..active.clone() };
        self.active(adapter).iter().map(frozen).collect()
    }
}

impl AdapterTraining<'_> {
    /// The optimizer's state on the host.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn optimizer(&self) -> Result<Cow<'_, AdamW>, TrainError> {
        Ok(self.state.optimizer()?)
    }

    /// Replaces the optimizer's state.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn set_optimizer(&mut self, state: AdamW) -> Result<(), TrainError> {
        Ok(self.state.set_optimizer(state, &self.parameters)?)
    }
}

impl Trainable for AdapterTraining<'_> {
    type MicroBatch = MicroBatch;

    fn zero_gradients(&mut self) -> Result<(), TrainError> {
        Ok(self.state.zero_gradients()?)
    }

    fn accumulate(
        &mut self,
        part: &MicroBatch,
        kept_layers: usize,
    ) -> Result<ObjectiveOutput, TrainError> {
        let (p, seed) = self.dropout;
        let dropout = dropout(&part.batch, part.epoch, p, seed);
        let noise = Noise { alpha: self.noise_alpha, seed, epoch: part.epoch };
        let range = self.ranges[part.adapter].clone();
        let settings = StepSettings {
            objective: &part.objective,
            scale: part.scale,
            temperature: part.temperature,
            kept_layers,
            active: &self.active[part.adapter],
            parameters: &self.parameters[range.clone()],
            dropout: dropout.as_ref(),
            noise: (self.noise_alpha > 0.0).then_some(noise),
        };
        let output = self.state.accumulate(self.decoder, &part.batch, &settings, range)?;
        Ok(ObjectiveOutput { loss: output.loss * part.scale, ..output })
    }

    fn mask_gradients(&mut self) -> Result<(), TrainError> {
        for (adapter, range) in self.adapters.iter().zip(&self.ranges) {
            // Gradients on a device are copied for it.
            if adapter.modules.values().any(|lora| lora.frozen_ranks > 0) {
                self.state.mask_frozen_ranks(adapter, range.clone())?;
            }
        }
        Ok(())
    }

    fn gradient_norm(&self) -> Result<f64, TrainError> {
        Ok(self.state.gradient_norm()?)
    }

    fn update(&mut self, factor: f32, learning_rate: f64) -> Result<bool, TrainError> {
        let frozen = self.adapters.iter().map(|adapter| adapter.frozen_ranks());
        let frozen = frozen.collect::<candle_core::Result<Vec<_>>>()?;
        if !self.state.optimizer_step(&self.parameters, factor, learning_rate)? {
            return Ok(false);
        }
        for (adapter, frozen) in self.adapters.iter().zip(&frozen) {
            adapter.restore_frozen_ranks(frozen)?;
            adapter.invalidate_decode_weights();
        }
        Ok(true)
    }

    fn optimizer_steps(&self) -> u64 {
        self.state.optimizer_steps()
    }
}
