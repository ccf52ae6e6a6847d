//! Full training: [`Trainable`] for all weights of a model.

use candle_core::Var;

use crate::data::Batch;
use crate::model::full::FullModel;
use crate::objectives::ObjectiveOutput;
use crate::optim::AdamW;
use crate::train::TrainError;
use crate::train::learner::Trainable;
use crate::train::step::{TrainState, train_state};

/// A micro-batch of a step.
pub(super) struct ScaledBatch {
    /// The tokens.
    pub batch: Batch,
    /// Factor of the summed loss: 1 / the number of targets of the whole step.
    pub scale: f64,
}

/// A fully trainable model with its gradients and optimizer.
pub(super) struct FullTraining {
    /// The model.
    pub model: FullModel,
    state: Box<dyn TrainState>,
}

impl FullTraining {
    /// Training of `model` that continues with this optimizer.
    pub(super) fn new(model: FullModel, optimizer: AdamW) -> candle_core::Result<Self> {
        let state = train_state(model.compute.backend, &model.parameters, optimizer)?;
        Ok(Self { model, state })
    }

    /// The parameters with their names.
    pub(super) fn parameters(&self) -> Vec<(String, Var)> {
        named_parameters(&self.model)
    }

    /// Calls `with` with the optimizer, copied from the device if needed.
    pub(super) fn with_optimizer<T>(
        &self,
        with: impl FnOnce(&AdamW) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        let optimizer = self.state.optimizer()?;
        with(&optimizer)
    }
}

/// The parameters of a model with their names.
pub(super) fn named_parameters(model: &FullModel) -> Vec<(String, Var)> {
    model.names.iter().cloned().zip(model.parameters.iter().cloned()).collect()
}

impl Trainable for FullTraining {
    type MicroBatch = ScaledBatch;

    fn zero_gradients(&mut self) -> Result<(), TrainError> {
        Ok(self.state.zero_gradients()?)
    }

    fn accumulate(
        &mut self,
        part: &ScaledBatch,
        kept_layers: usize,
    ) -> Result<ObjectiveOutput, TrainError> {
        let ScaledBatch { batch, scale } = part;
        let sum = self.state.accumulate_full(&self.model, batch, *scale, kept_layers)?;
        Ok(ObjectiveOutput { loss: sum * scale, ..ObjectiveOutput::default() })
    }

    fn gradient_norm(&self) -> Result<f64, TrainError> {
        Ok(self.state.gradient_norm()?)
    }

    fn update(&mut self, factor: f32, learning_rate: f64) -> Result<bool, TrainError> {
        Ok(self.state.optimizer_step(&self.model.parameters, factor, learning_rate)?)
    }

    fn optimizer_steps(&self) -> u64 {
        self.state.optimizer_steps()
    }
}
