//! All weights of a model, as a learner trains them.

use candle_core::{Tensor, Var};
use rayon::prelude::*;

use crate::data::Batch;
use crate::model::full::{FullBuffers, FullModel};
use crate::objectives::ObjectiveOutput;
use crate::ops::BackendKind;
use crate::optim::{AdamW, Gradients, TensorAdamW, global_norm, tensor_norm};
use crate::train::TrainError;
use crate::train::learner::Trainable;

/// A part of a step.
pub struct ScaledBatch {
    /// The tokens.
    pub batch: Batch,
    /// What the sum of losses is multiplied with: 1 / the targets of the whole step.
    pub scale: f64,
}

/// A model whose weights all train, with their gradients and optimizer.
pub struct FullTraining {
    /// The model.
    pub model: FullModel,
    state: TrainingState,
}

/// Gradients and optimizer, where the parameters are.
enum TrainingState {
    /// In plain buffers.
    Buffers { gradients: Gradients, buffers: Box<FullBuffers>, optimizer: AdamW },
    /// On the model's device.
    Tensors { gradients: Vec<Tensor>, optimizer: TensorAdamW },
}

impl FullTraining {
    /// The training of a model that continues with this optimizer.
    pub fn new(model: FullModel, optimizer: AdamW) -> candle_core::Result<Self> {
        let state = match model.compute.backend {
            BackendKind::Reference => TrainingState::Tensors {
                gradients: Vec::new(),
                optimizer: TensorAdamW::of(optimizer, &model.parameters)?,
            },
            BackendKind::Cpu => {
                let (gradients, buffers) = (model.zero_gradients(), Box::default());
                TrainingState::Buffers { gradients, buffers, optimizer }
            }
        };
        Ok(Self { model, state })
    }

    /// The parameters with their names.
    pub fn parameters(&self) -> Vec<(String, Var)> {
        named_parameters(&self.model)
    }

    /// Calls `with` with the optimizer, copied from the device if it is there.
    pub fn with_optimizer<T>(
        &self,
        with: impl FnOnce(&AdamW) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        match &self.state {
            TrainingState::Buffers { optimizer, .. } => with(optimizer),
            TrainingState::Tensors { optimizer, .. } => with(&optimizer.on_cpu()?),
        }
    }
}

/// The parameters of a model with their names.
pub fn named_parameters(model: &FullModel) -> Vec<(String, Var)> {
    model.names.iter().cloned().zip(model.parameters.iter().cloned()).collect()
}

impl Trainable for FullTraining {
    type MicroBatch = ScaledBatch;

    fn zero_gradients(&mut self) -> Result<(), TrainError> {
        match &mut self.state {
            TrainingState::Buffers { gradients, .. } => {
                gradients.par_iter_mut().for_each(|gradient| gradient.fill(0.0));
            }
            TrainingState::Tensors { gradients, .. } => {
                let zeros = self.model.parameters.iter().map(|var| var.as_tensor().zeros_like());
                *gradients = zeros.collect::<candle_core::Result<_>>()?;
            }
        }
        Ok(())
    }

    fn accumulate(
        &mut self,
        part: &ScaledBatch,
        kept_layers: usize,
    ) -> Result<ObjectiveOutput, TrainError> {
        let (model, ScaledBatch { batch, scale }) = (&self.model, part);
        let sum = match &mut self.state {
            TrainingState::Buffers { gradients, buffers, .. } => {
                model.accumulate(batch, *scale, kept_layers, gradients, buffers)?
            }
            TrainingState::Tensors { gradients, .. } => {
                model.accumulate_tensors(batch, *scale, gradients)?
            }
        };
        Ok(ObjectiveOutput { loss: sum * scale, ..ObjectiveOutput::default() })
    }

    fn gradient_norm(&mut self) -> Result<f64, TrainError> {
        match &self.state {
            TrainingState::Buffers { gradients, .. } => Ok(global_norm(gradients)),
            TrainingState::Tensors { gradients, .. } => Ok(tensor_norm(gradients)?),
        }
    }

    fn update(&mut self, factor: f32, learning_rate: f64) -> Result<bool, TrainError> {
        let parameters = &self.model.parameters;
        match &mut self.state {
            TrainingState::Buffers { gradients, optimizer, .. } => {
                Ok(optimizer.step(parameters, gradients, factor, learning_rate)?)
            }
            TrainingState::Tensors { gradients, optimizer } => {
                Ok(optimizer.step(parameters, gradients, factor, learning_rate)?)
            }
        }
    }

    fn optimizer_steps(&self) -> u64 {
        match &self.state {
            TrainingState::Buffers { optimizer, .. } => optimizer.step,
            TrainingState::Tensors { optimizer, .. } => optimizer.step,
        }
    }
}
