//! One micro-batch, the same for every objective: *up* through the layers, *read* the head,
//! *judge*, and *down* again layer by layer.
//!
//! Below the layers whose tapes are kept, each layer keeps only its input on the way up and
//! rebuilds its tape on the way down, so that memory is the inputs of all layers and the tape of
//! one. Nothing below the lowest trainable adapter gets a gradient.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};
use quantune_adapters::delta::{Dropout, TokenKey};
use quantune_adapters::rng::Stream;

use crate::data::Batch;
use crate::model::layer::{AdapterGradients, Tape, Workspace};
use crate::model::scoring::scores;
use crate::model::{ActiveAdapter, Adapters, Decoder, Pass, Reading, Rows};
use crate::objectives::{Objective, ObjectiveOutput};
use crate::ops::BackendKind;
use crate::ops::linear_cross_entropy::Distributions;

/// What a micro-batch is taken with.
#[derive(Debug)]
pub struct StepSettings<'a> {
    /// What is minimized.
    pub objective: &'a Objective,
    /// What the sum of losses is multiplied with: 1 / the count of the whole step.
    pub scale: f64,
    /// What logits are divided by.
    pub temperature: f64,
    /// Layers, from the top, whose tapes are kept for the way down; the others are recomputed.
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
/// tokens, drawn anew for each token and epoch, but always the same for the same one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    /// Its size.
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

/// Buffers of a step, used again by the next.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Tokens of the largest batch so far.
    tokens: usize,
    work: Workspace,
    /// By layer; of recomputed ones only the input is in use.
    tapes: Vec<Tape>,
    /// The tape of layers that keep none.
    scratch: Tape,
    /// The residual stream and its gradient, `(N, hidden_size)`.
    x: Vec<f32>,
    dx: Vec<f32>,
    logps: Reading,
    scores: Reading,
}

/// Adds the gradients of a micro-batch to `gradients` and returns what the objective says of it,
/// its summed loss (unscaled) first.
pub fn accumulate(
    decoder: &Decoder,
    batch: &Batch,
    settings: &StepSettings,
    gradients: &mut [Vec<f32>],
    buffers: &mut Buffers,
) -> Result<ObjectiveOutput> {
    if settings.objective.reads_log_probs() && batch.targets.is_empty() {
        return Ok(ObjectiveOutput::default());
    }
    let rows = Rows {
        tokens: batch.tokens.clone(),
        positions: batch.positions.clone(),
        segments: batch.segments.clone().into(),
    };
    let pass = decoder.pass(&rows, Adapters::Same(settings.active), settings.dropout);
    match decoder.compute.backend {
        BackendKind::Reference => portable(decoder, batch, &pass, settings, gradients),
        BackendKind::Cpu => fast(decoder, batch, &pass, settings, gradients, buffers),
    }
}

/// By the layers' fast form.
fn fast(
    decoder: &Decoder,
    batch: &Batch,
    pass: &Pass,
    settings: &StepSettings,
    gradients: &mut [Vec<f32>],
    buffers: &mut Buffers,
) -> Result<ObjectiveOutput> {
    // Hundreds of buffers that grow one after another leave as many holes of their old sizes, up to
    // twice the memory: for a batch larger than all before they are made anew.
    if batch.tokens.len() > buffers.tokens {
        *buffers = Buffers { tokens: batch.tokens.len(), ..Buffers::default() };
    }
    let Buffers { work, tapes, scratch, x, dx, logps, scores, .. } = buffers;
    let layers = decoder.config.num_hidden_layers;
    let lowest = decoder.lowest_trainable(Adapters::Same(settings.active));
    let to_embedding = decoder.trains_embedding(Adapters::Same(settings.active));
    let first = if to_embedding { 0 } else { lowest.map_or(layers, |(index, _)| index) };
    let layer = |index| decoder.layer_pass(index, pass).expect("not the portable form");
    let kept = |index: usize| index + settings.kept_layers >= layers;
    let mut places = HashMap::new();
    for active in settings.active.iter().filter(|active| active.trainable) {
        places.extend(active.adapter.parameter_indices());
    }

    // Up.
    decoder.embed_into(&batch.tokens, pass, x)?;
    if let Some(noise) = settings.noise {
        noise.add(batch, x);
    }
    tapes.resize_with(layers, Tape::default);
    for (index, tape) in tapes.iter_mut().enumerate() {
        if index >= first {
            tape.x.clear();
            tape.x.extend_from_slice(x);
        }
        let taped = index >= first && kept(index);
        let tape = if taped { tape } else { &mut *scratch };
        layer(index).forward(x, tape, taped, work, None)?;
    }

    // Read.
    let objective = settings.objective;
    let (temperature, active) = (settings.temperature, settings.active);
    let read_logps = match objective.reads_log_probs() {
        true => {
            let targets = &batch.targets;
            let found = decoder.read_log_probs(x, targets, temperature, active, true, logps)?;
            Some(Var::new(found, &Device::Cpu)?) // (M)
        }
        false => None,
    };
    let head = match objective.score_rows() {
        Some(_) => Some(settings.head()?.flatten_all()?.to_vec1::<f32>()?),
        None => None,
    };
    let read_scores = match (objective.score_rows(), &head) {
        (Some(rows), Some(head)) => {
            let found = decoder.read_scores(x, rows, head, scores)?;
            Some(Var::new(found, &Device::Cpu)?) // (S)
        }
        _ => None,
    };

    // Judge.
    let distributions = read_logps.as_ref().map(|_| logps.distributions());
    let (judged, mut store) =
        judge(read_logps.as_deref(), read_scores.as_deref(), distributions, settings)?;
    dx.clear();
    dx.resize(x.len(), 0.0);
    if let Some(read) = read_logps
        && let Some(dlogps) = store.remove(&read)
    {
        let dlogps = dlogps.to_vec1::<f32>()?;
        let sink = &mut AdapterGradients { places: &places, gradients };
        decoder.log_probs_back(&dlogps, temperature, active, logps, dx, sink)?;
    }
    if let (Some(read), Some(head)) = (read_scores, head)
        && let Some(dscores) = store.remove(&read)
    {
        let dhead = gradients.last_mut().expect("the head is the last parameter");
        decoder.scores_back(&dscores.to_vec1::<f32>()?, &head, scores, dx, dhead)?;
    }

    // Down.
    let mut sink = AdapterGradients { places: &places, gradients };
    let lowest = lowest.filter(|_| !to_embedding);
    for index in (first..layers).rev() {
        let stop = lowest.filter(|(lowest, _)| *lowest == index).map(|(_, group)| group);
        let mut tape = &mut tapes[index];
        if !kept(index) {
            std::mem::swap(&mut scratch.x, &mut tape.x);
            x.copy_from_slice(&scratch.x);
            layer(index).forward(x, scratch, true, work, None)?;
            tape = scratch;
        }
        layer(index).backward(dx, tape, stop, &mut sink, work)?;
    }
    if to_embedding {
        let sink = &mut AdapterGradients { places: &places, gradients };
        decoder.embed_back(&batch.tokens, pass, dx, sink)?;
    }
    Ok(judged)
}

impl StepSettings<'_> {
    /// The score head of the adapter that trains.
    fn head(&self) -> Result<&Var> {
        let mut trainable = self.active.iter().filter(|active| active.trainable);
        match trainable.find_map(|active| active.adapter.score.as_ref()) {
            Some(head) => Ok(head),
            None => candle_core::bail!("scores are read, but the adapter has no score head"),
        }
    }
}

/// What the objective says of what was read, and gradients on the tape behind it.
fn judge(
    logps: Option<&Tensor>,
    scores: Option<&Tensor>,
    distributions: Option<Distributions>,
    settings: &StepSettings,
) -> Result<(ObjectiveOutput, GradStore)> {
    let (sum, judged) = settings.objective.compute(logps, scores, distributions)?;
    Ok((judged, (&sum * settings.scale)?.backward()?))
}

/// What the objective says of the last layer's output `x (N, H)`, and the gradient to it. That of
/// the score head is added up here.
fn read(
    decoder: &Decoder,
    x: Tensor,
    batch: &Batch,
    settings: &StepSettings,
    gradients: &mut [Vec<f32>],
) -> Result<(ObjectiveOutput, Option<Tensor>)> {
    let top = Var::from_tensor(&x)?;
    drop(x);
    let rows = |rows: Vec<u32>| -> Result<Tensor> {
        let rows = Tensor::new(rows, top.device())?;
        decoder.final_norm(&top.as_tensor().index_select(&rows, 0)?) // (M, H)
    };
    let objective = settings.objective;
    let logps = match objective.reads_log_probs() {
        true => {
            let (positions, targets): (Vec<u32>, Vec<u32>) = batch.targets.iter().copied().unzip();
            let (read, heat) = (rows(positions)?, settings.temperature);
            let logps = decoder.log_probs_at_temperature(&read, &targets, heat, settings.active)?; // (M)
            Some(logps.to_device(&Device::Cpu)?) // few numbers: what judges them needs no device
        }
        false => None,
    };
    let read_scores = match objective.score_rows() {
        Some(positions) => {
            let scores = scores(&rows(positions.to_vec())?, settings.head()?)?; // (S)
            Some(scores.to_device(&Device::Cpu)?)
        }
        None => None,
    };
    let (judged, mut store) = judge(logps.as_ref(), read_scores.as_ref(), None, settings)?;
    take_gradients(&mut store, settings.parameters, gradients)?;
    Ok((judged, store.remove(&top).map(|dx| dx.detach())))
}

/// By the layers' portable form, on candle's tape.
fn portable(
    decoder: &Decoder,
    batch: &Batch,
    pass: &Pass,
    settings: &StepSettings,
    gradients: &mut [Vec<f32>],
) -> Result<ObjectiveOutput> {
    let layers = decoder.config.num_hidden_layers;
    let lowest = decoder.lowest_trainable(Adapters::Same(settings.active));
    let to_embedding = decoder.trains_embedding(Adapters::Same(settings.active));
    let first = if to_embedding { 0 } else { lowest.map_or(layers, |(index, _)| index) };

    // Up.
    let embedded = decoder.embed(&batch.tokens, pass)?; // (N, H)
    let mut x = embedded.detach();
    if let Some(noise) = settings.noise {
        let mut values = x.flatten_all()?.to_vec1()?;
        noise.add(batch, &mut values);
        x = Tensor::from_vec(values, x.shape(), x.device())?;
    }
    let mut kept = Vec::new();
    for index in 0..layers {
        if index < first {
            x = decoder.layer(index, &x, pass)?;
            continue;
        }
        // The lowest layer's input needs no gradient, and as a plain tensor asks for none.
        let bottom = index == first && !to_embedding;
        let input = if bottom { x } else { Var::from_tensor(&x)?.into_inner() };
        let output = decoder.layer(index, &input, pass)?;
        x = output.detach();
        let recomputed = index + settings.kept_layers < layers;
        kept.push((index, input, (!recomputed).then_some(output)));
    }

    let (judged, mut dx) = read(decoder, x, batch, settings, gradients)?;

    // Down.
    while let Some((index, input, output)) = kept.pop() {
        let Some(dy) = dx else { break };
        let output = match output {
            Some(output) => output,
            None => decoder.layer(index, &input, pass)?,
        };
        let mut store = (output * dy)?.sum_all()?.backward()?;
        // candle's gradient of a leaf hangs on the tape of what it was multiplied with: A, where a layer's
        // input meets it without a norm between, whose gradient the next layer would add again.
        dx = store.remove(&input).map(|dx| dx.detach());
        take_gradients(&mut store, settings.parameters, gradients)?;
    }
    if let Some(dx) = dx.filter(|_| to_embedding) {
        let mut store = (embedded * dx)?.sum_all()?.backward()?;
        take_gradients(&mut store, settings.parameters, gradients)?;
    }
    Ok(judged)
}

/// Adds up the gradients of parameters that a tape holds.
fn take_gradients(
    store: &mut GradStore,
    parameters: &[Var],
    gradients: &mut [Vec<f32>],
) -> Result<()> {
    for (parameter, gradient) in parameters.iter().zip(gradients) {
        if let Some(added) = store.remove(parameter) {
            let added = added.flatten_all()?.to_vec1::<f32>()?;
            gradient.iter_mut().zip(added).for_each(|(sum, value)| *sum += value);
        }
    }
    Ok(())
}

/// Dropout whose masks belong to the tokens of `batch`, wherever they stand in it.
pub fn dropout(batch: &Batch, epoch: u64, p: f64, seed: u64) -> Option<Dropout> {
    if p == 0.0 {
        return None;
    }
    let key = |&(row, position): &(u64, u32)| TokenKey { epoch, row, position: position.into() };
    Some(Dropout { p, seed, keys: Arc::new(batch.keys.iter().map(key).collect()) })
}
