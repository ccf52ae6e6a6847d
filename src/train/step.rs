//! One micro-batch, the same for every objective and backend: forward through the layers, the head,
//! the objective, and backward layer by layer.
//!
//! Below the layers whose tapes are kept, each layer keeps only its input in the forward pass and
//! recomputes its tape in the backward pass, so that memory is the inputs of all layers and the tape
//! of one. Nothing below the lowest trainable adapter gets a gradient.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Result, Var};
use quantune_adapters::delta::{Adapter, Dropout, TokenKey};
use quantune_adapters::rng::Stream;

use crate::data::Batch;
use crate::model::backend::{Backend, Keep, ParameterGradients, with_backend};
use crate::model::{ActiveAdapter, Adapters, Decoder, FullModel, Rows};
use crate::objectives::{Objective, ObjectiveOutput};
use crate::ops::BackendKind;
use crate::optim::AdamW;

/// Settings of a micro-batch's forward and backward pass.
#[derive(Debug)]
pub struct StepSettings<'a> {
    /// The objective to minimize.
    pub objective: &'a Objective,
    /// Factor of the summed loss: 1 / the count of the whole step.
    pub scale: f64,
    /// Temperature of the logits.
    pub temperature: f64,
    /// Layers, from the top, whose tapes are kept for the backward pass; the others are recomputed.
    pub kept_layers: usize,
    /// The adapters of every row, one of them trainable.
    pub active: &'a [ActiveAdapter],
    /// The trainable parameters, in the order of the gradients: A, then B, module by module, and the
    /// score head last, if the adapter has one.
    pub parameters: &'a [Var],
    /// Dropout before A of the trainable adapter.
    pub dropout: Option<&'a Dropout>,
    /// Noise on the embeddings.
    pub noise: Option<Noise>,
}

/// NEFTune's noise (Jain et al. 2023): uniform in `±alpha / sqrt(L · hidden_size)` for a row of L
/// tokens, keyed by token and epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    /// Alpha.
    pub alpha: f64,
    /// The run's seed.
    pub seed: u64,
    /// The pass over the data.
    pub epoch: u64,
}

impl Noise {
    /// Adds it to embeddings `x (N, hidden_size)`.
    fn add(&self, batch: &Batch, x: &mut [f32]) {
        let width = x.len() / batch.tokens.len().max(1);
        for segment in &batch.segments {
            let most = self.alpha / ((segment.tokens.len() * width) as f64).sqrt();
            for token in segment.tokens.clone() {
                let (row, position) = batch.keys[token];
                let key = [self.epoch, row, position.into()];
                let mut stream = Stream::new(self.seed, "neftune", &key);
                for x in &mut x[token * width..(token + 1) * width] {
                    *x += (most * (2.0 * stream.uniform_f64() - 1.0)) as f32;
                }
            }
        }
    }
}

/// Buffers of a step, reused by the next.
#[derive(Debug)]
pub struct Buffers<B: Backend> {
    /// Tokens of the largest batch so far.
    tokens: usize,
    scratch: B::Scratch,
    /// By layer.
    tapes: Vec<B::Tape>,
    /// The residual stream and its gradient, `(N, hidden_size)`.
    x: B::Hidden,
    dx: B::Hidden,
    head: B::HeadTape,
}

impl<B: Backend> Default for Buffers<B> {
    fn default() -> Self {
        Self {
            tokens: 0,
            scratch: B::Scratch::default(),
            tapes: Vec::new(),
            x: B::Hidden::default(),
            dx: B::Hidden::default(),
            head: B::HeadTape::default(),
        }
    }
}

/// Adds the gradients of a micro-batch to `gradients`, one per parameter of
/// [`StepSettings::parameters`]. Returns the statistics of the objective; the summed loss is unscaled.
pub fn accumulate<B: Backend>(
    decoder: &Decoder,
    batch: &Batch,
    settings: &StepSettings,
    gradients: &mut [B::Gradient],
    buffers: &mut Buffers<B>,
) -> Result<ObjectiveOutput> {
    let objective = settings.objective;
    if objective.reads_log_probs() && batch.targets.is_empty() {
        return Ok(ObjectiveOutput::default());
    }
    // Growing hundreds of buffers one after another fragments the heap, up to twice the memory: for a batch
    // larger than all before, they are freed and allocated again.
    if batch.tokens.len() > buffers.tokens {
        *buffers = Buffers { tokens: batch.tokens.len(), ..Buffers::default() };
    }
    let Buffers { scratch, tapes, x, dx, head, .. } = buffers;
    let rows = Rows {
        tokens: batch.tokens.clone(),
        positions: batch.positions.clone(),
        segments: batch.segments.clone().into(),
    };
    let active = settings.active;
    let pass = &decoder.pass(&rows, Adapters::Same(active), settings.dropout);
    let layers = decoder.config.num_hidden_layers;
    let lowest = decoder.lowest_trainable(Adapters::Same(active));
    let to_embedding = decoder.trains_embedding(Adapters::Same(active));
    let first = if to_embedding { 0 } else { lowest.map_or(layers, |(index, _)| index) };
    let keep = |index: usize| {
        if index < first {
            Keep::Nothing
        } else if index + settings.kept_layers < layers {
            Keep::Input
        } else {
            Keep::Tape
        }
    };
    let mut places = HashMap::new();
    for active in active.iter().filter(|active| active.trainable) {
        places.extend(active.adapter.parameter_indices());
    }
    let parameters = settings.parameters;
    let gradients = &mut ParameterGradients::<B> { parameters, places: &places, gradients };

    // Forward.
    B::embed(decoder, &batch.tokens, pass, x)?;
    if let Some(noise) = settings.noise {
        B::edit_hidden(x, &mut |x| noise.add(batch, x))?;
    }
    tapes.resize_with(layers, B::Tape::default);
    for (index, tape) in tapes.iter_mut().enumerate() {
        B::layer_forward(decoder, index, pass, x, (keep(index), tape), scratch)?;
    }

    let output = compute_objective::<B>(decoder, batch, settings, (x, dx), head, gradients)?;

    // Backward.
    let lowest = lowest.filter(|_| !to_embedding);
    for index in (first..layers).rev() {
        let lowest = lowest.filter(|(lowest, _)| *lowest == index).map(|(_, group)| group);
        let kept = (keep(index), &mut tapes[index]);
        B::layer_backward(decoder, index, pass, (x, dx), kept, lowest, gradients, scratch)?;
    }
    if to_embedding {
        B::embed_backward(decoder, &batch.tokens, pass, dx, gradients)?;
    }
    Ok(output)
}

/// Reads the head from the last layer's output and evaluates the objective: leaves the gradient of that
/// output in the second of `streams`, and adds those of the head.
fn compute_objective<B: Backend>(
    decoder: &Decoder,
    batch: &Batch,
    settings: &StepSettings,
    streams: (&B::Hidden, &mut B::Hidden),
    head: &mut B::HeadTape,
    gradients: &mut ParameterGradients<B>,
) -> Result<ObjectiveOutput> {
    let (x, dx) = streams;
    let (objective, active) = (settings.objective, settings.active);
    let temperature = settings.temperature;
    let logps = match objective.reads_log_probs() {
        true => {
            let found = B::log_probs(decoder, x, &batch.targets, temperature, active, head)?;
            Some(Var::new(found, &Device::Cpu)?) // (M)
        }
        false => None,
    };
    let score_head = objective.score_rows().map(|_| settings.score_head()).transpose()?;
    let scores = match (objective.score_rows(), score_head) {
        (Some(rows), Some(weight)) => {
            Some(Var::new(B::scores(decoder, x, rows, weight, head)?, &Device::Cpu)?) // (S)
        }
        _ => None,
    };

    // Objective.
    let distributions = B::distributions(head).filter(|_| logps.is_some());
    let (sum, output) = objective.compute(logps.as_deref(), scores.as_deref(), distributions)?;
    let mut store = (&sum * settings.scale)?.backward()?;
    B::zero_like(x, dx);
    if let Some(logps) = logps
        && let Some(dlogps) = store.remove(&logps)
    {
        let dlogps = dlogps.to_vec1::<f32>()?;
        let read_with = (temperature, active);
        B::log_probs_backward(decoder, &dlogps, read_with, head, dx, gradients)?;
    }
    if let (Some(scores), Some(weight)) = (scores, score_head)
        && let Some(dscores) = store.remove(&scores)
    {
        let dscores = dscores.to_vec1::<f32>()?;
        B::scores_backward(decoder, &dscores, weight, head, dx, gradients)?;
    }
    Ok(output)
}

/// Gradients, optimizer and buffers of a training run on its backend.
pub trait TrainState: Debug + Send {
    /// Sets all gradients to 0.
    fn zero_gradients(&mut self) -> Result<()>;

    /// Adds the gradients of a micro-batch to those of the parameters in `range`, which are
    /// [`StepSettings::parameters`]. Returns the statistics of the objective.
    fn accumulate(
        &mut self,
        decoder: &Decoder,
        batch: &Batch,
        settings: &StepSettings,
        range: Range<usize>,
    ) -> Result<ObjectiveOutput>;

    /// Adds the gradients of a micro-batch in which all weights of `model` train, times `scale`. Returns
    /// its summed loss, unscaled.
    fn accumulate_full(
        &mut self,
        model: &FullModel,
        batch: &Batch,
        scale: f64,
        kept_layers: usize,
    ) -> Result<f64>;

    /// A copy of all gradients on the host.
    fn gradients(&self) -> Result<Vec<Vec<f32>>>;

    /// Sets the gradients of an adapter's frozen ranks to 0; its parameters are in `range`.
    fn mask_frozen_ranks(&mut self, adapter: &Adapter, range: Range<usize>) -> Result<()>;

    /// The Euclidean norm over all gradients; NaN or Inf if one of them is.
    fn gradient_norm(&self) -> Result<f64>;

    /// One optimizer step with the gradients times `factor`. Returns whether all parameters are finite
    /// after it.
    fn optimizer_step(
        &mut self,
        parameters: &[Var],
        factor: f32,
        learning_rate: f64,
    ) -> Result<bool>;

    /// Optimizer steps taken.
    fn optimizer_steps(&self) -> u64;

    /// The optimizer state on the host, copied if it is on another device.
    fn optimizer(&self) -> Result<Cow<'_, AdamW>>;

    /// Replaces the optimizer's state.
    fn set_optimizer(&mut self, state: AdamW, parameters: &[Var]) -> Result<()>;
}

/// A training state for `parameters` with zero gradients, on the backend `kind`.
///
/// # Errors
/// If the sizes of the optimizer state and the parameters differ, or the device has too little memory.
pub fn train_state(
    kind: BackendKind,
    parameters: &[Var],
    optimizer: AdamW,
) -> Result<Box<dyn TrainState>> {
    with_backend!(kind, B => Ok(Box::new(BackendTrainState::<B> {
        gradients: B::zero_gradients(parameters)?,
        optimizer: B::optimizer(optimizer, parameters)?,
        buffers: Buffers::default(),
        full_buffers: Default::default(),
    })))
}

#[derive(Debug)]
struct BackendTrainState<B: Backend> {
    gradients: Vec<B::Gradient>,
    optimizer: B::Optimizer,
    buffers: Buffers<B>,
    full_buffers: B::FullBuffers,
}

impl<B: Backend> TrainState for BackendTrainState<B> {
    fn zero_gradients(&mut self) -> Result<()> {
        B::clear_gradients(&mut self.gradients)
    }

    fn accumulate(
        &mut self,
        decoder: &Decoder,
        batch: &Batch,
        settings: &StepSettings,
        range: Range<usize>,
    ) -> Result<ObjectiveOutput> {
        let gradients = &mut self.gradients[range];
        accumulate(decoder, batch, settings, gradients, &mut self.buffers)
    }

    fn accumulate_full(
        &mut self,
        model: &FullModel,
        batch: &Batch,
        scale: f64,
        kept_layers: usize,
    ) -> Result<f64> {
        let (gradients, buffers) = (&mut self.gradients, &mut self.full_buffers);
        B::accumulate_full(model, batch, scale, kept_layers, gradients, buffers)
    }

    fn gradients(&self) -> Result<Vec<Vec<f32>>> {
        B::read_gradients(&self.gradients)
    }

    fn mask_frozen_ranks(&mut self, adapter: &Adapter, range: Range<usize>) -> Result<()> {
        let gradients = &mut self.gradients[range];
        B::edit_gradients(gradients, &mut |gradients| adapter.mask_frozen_ranks(gradients))
    }

    fn gradient_norm(&self) -> Result<f64> {
        B::gradient_norm(&self.gradients)
    }

    fn optimizer_step(
        &mut self,
        parameters: &[Var],
        factor: f32,
        learning_rate: f64,
    ) -> Result<bool> {
        let optimizer = &mut self.optimizer;
        B::optimizer_step(optimizer, parameters, &self.gradients, factor, learning_rate)
    }

    fn optimizer_steps(&self) -> u64 {
        B::optimizer_steps(&self.optimizer)
    }

    fn optimizer(&self) -> Result<Cow<'_, AdamW>> {
        B::optimizer_state(&self.optimizer)
    }

    fn set_optimizer(&mut self, state: AdamW, parameters: &[Var]) -> Result<()> {
        self.optimizer = B::optimizer(state, parameters)?;
        Ok(())
    }
}

impl StepSettings<'_> {
    /// The score head of the adapter that trains.
    fn score_head(&self) -> Result<&Var> {
        let mut trainable = self.active.iter().filter(|active| active.trainable);
        match trainable.find_map(|active| active.adapter.score.as_ref()) {
            Some(head) => Ok(head),
            None => {
                candle_core::bail!("the objective needs scores, but the adapter has no score head")
            }
        }
    }
}

/// Dropout whose masks are keyed by the tokens of `batch`, independent of their position in it.
pub fn dropout(batch: &Batch, epoch: u64, p: f64, seed: u64) -> Option<Dropout> {
    if p == 0.0 {
        return None;
    }
    let key = |&(row, position): &(u64, u32)| TokenKey { epoch, row, position: position.into() };
    Some(Dropout { p, seed, keys: Arc::new(batch.keys.iter().map(key).collect()) })
}
