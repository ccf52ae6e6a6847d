//! The reference backend: plain differentiable candle ops in F32 on any candle device. It defines the
//! answer.

use std::borrow::Cow;

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};

use super::{Backend, Cpu, HeadBytes, Inference, Keep, LayerBytes, ParameterGradients};
use crate::data::Batch;
use crate::model::adapters::ActiveAdapter;
use crate::model::cache::{CacheType, TensorCache};
use crate::model::config::Config;
use crate::model::decoder::Decoder;
use crate::model::full::FullModel;
use crate::model::layer::AdapterSizes;
use crate::model::layers::LinearGroup;
use crate::model::lm_head::scores;
use crate::model::pass::Pass;
use crate::ops::BackendKind;
use crate::ops::linear_cross_entropy::Distributions;
use crate::optim::{AdamW, TensorAdamW, tensor_norm};

/// The backend of [`BackendKind::Reference`].
#[derive(Debug)]
pub struct Reference;

/// Hidden states `(N, hidden_size)`, or a gradient to them: `None` before there is one.
#[derive(Debug, Default)]
pub struct ReferenceHidden(Option<Tensor>);

/// A layer's input, and its output with candle's tape behind it.
#[derive(Debug, Default)]
pub struct ReferenceTape {
    input: Option<Tensor>,
    output: Option<Tensor>,
}

/// What was read from which hidden states, with candle's tape behind it.
#[derive(Debug, Default)]
pub struct ReferenceHeadTape {
    logps: Option<(Var, Tensor)>,
    scores: Option<(Var, Tensor)>,
}

impl ReferenceHidden {
    fn get(&self) -> Result<&Tensor> {
        match &self.0 {
            Some(x) => Ok(x),
            None => candle_core::bail!("no hidden states were computed"),
        }
    }

    fn add(&mut self, dx: Option<Tensor>) -> Result<()> {
        let Some(dx) = dx else { return Ok(()) };
        // candle's gradient of a leaf hangs on the tape of what it was multiplied with: A, where a
        // layer's input meets it without a norm between, whose gradient the next layer would add again.
        let dx = dx.detach();
        self.0 = Some(match self.0.take() {
            Some(sum) => (sum + dx)?,
            None => dx,
        });
        Ok(())
    }
}

/// The gradients of all leaves from the gradient `dy` of `y`.
fn backward(y: &Tensor, dy: &Tensor) -> Result<GradStore> {
    (y * dy)?.sum_all()?.backward()
}

impl ParameterGradients<'_, Reference> {
    /// Adds the gradients that a tape holds.
    fn take(&mut self, store: &mut GradStore) -> Result<()> {
        for (parameter, gradient) in self.parameters.iter().zip(&mut *self.gradients) {
            if let Some(added) = store.remove(parameter) {
                *gradient = (&*gradient + added.detach())?;
            }
        }
        Ok(())
    }
}

/// The final norm of rows of `top`.
fn read_rows(decoder: &Decoder, top: &Var, rows: Vec<u32>) -> Result<Tensor> {
    let rows = Tensor::new(rows, top.device())?;
    decoder.final_norm(&top.as_tensor().index_select(&rows, 0)?) // (M, H)
}

/// Backpropagates from `y`, computed from `top`.
fn head_backward(
    (top, y): (Var, Tensor),
    dy: &[f32],
    dx: &mut ReferenceHidden,
    gradients: &mut ParameterGradients<Reference>,
) -> Result<()> {
    let dy = Tensor::new(dy, y.device())?;
    let mut store = backward(&y, &dy)?;
    gradients.take(&mut store)?;
    dx.add(store.remove(&top))
}

impl Backend for Reference {
    type Hidden = ReferenceHidden;
    type HeadInput = Tensor;
    type Tape = ReferenceTape;
    type HeadTape = ReferenceHeadTape;
    type Scratch = ();
    type Cache = TensorCache;
    type Gradient = Tensor;
    type Optimizer = TensorAdamW;
    type FullBuffers = ();

    const KIND: BackendKind = BackendKind::Reference;
    const RECOMPUTES_FULL_TRAINING: bool = false;

    fn decoder_on(decoder: Decoder, device: &Device) -> Result<Decoder> {
        decoder.upload(device)
    }

    fn full_model_on(model: FullModel, device: &Device) -> Result<FullModel> {
        model.upload(device)
    }

    fn embed(decoder: &Decoder, tokens: &[u32], pass: &Pass, x: &mut Self::Hidden) -> Result<()> {
        x.0 = Some(decoder.embed(tokens, pass)?.detach()); // (N, H)
        Ok(())
    }

    fn edit_hidden(x: &mut Self::Hidden, edit: &mut dyn FnMut(&mut [f32])) -> Result<()> {
        let states = x.get()?;
        let mut values = states.flatten_all()?.to_vec1()?;
        edit(&mut values);
        x.0 = Some(Tensor::from_vec(values, states.shape(), states.device())?);
        Ok(())
    }

    fn embed_backward(
        decoder: &Decoder,
        tokens: &[u32],
        pass: &Pass,
        dx: &mut Self::Hidden,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()> {
        let Some(dx) = dx.0.take() else { return Ok(()) };
        gradients.take(&mut backward(&decoder.embed(tokens, pass)?, &dx)?)
    }

    fn layer_forward(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        x: &mut Self::Hidden,
        (keep, tape): (Keep, &mut Self::Tape),
        (): &mut (),
    ) -> Result<()> {
        if keep == Keep::Nothing {
            x.0 = Some(decoder.layer(index, x.get()?, pass)?);
            return Ok(());
        }
        let input = Var::from_tensor(x.get()?)?.into_inner();
        let output = decoder.layer(index, &input, pass)?;
        x.0 = Some(output.detach());
        let output = Some(output).filter(|_| keep == Keep::Tape);
        *tape = ReferenceTape { input: Some(input), output };
        Ok(())
    }

    fn layer_backward(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        (_, dx): (&mut Self::Hidden, &mut Self::Hidden),
        (_, tape): (Keep, &mut Self::Tape),
        lowest: Option<LinearGroup>,
        gradients: &mut ParameterGradients<Self>,
        (): &mut (),
    ) -> Result<()> {
        let ReferenceTape { mut input, output } = std::mem::take(tape);
        if lowest.is_some() && output.is_none() {
            input = input.map(|input| input.detach()); // nothing below needs its gradient
        }
        let (Some(input), Some(dy)) = (input, dx.0.take()) else { return Ok(()) };
        let output = match output {
            Some(output) => output,
            None => decoder.layer(index, &input, pass)?,
        };
        let mut store = backward(&output, &dy)?;
        dx.add(store.remove(&input))?;
        gradients.take(&mut store)
    }

    fn layer_inference(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        x: &mut Self::Hidden,
        inference: Inference<Self>,
        (): &mut (),
    ) -> Result<()> {
        let mut y = decoder.layer_with(index, x.get()?, pass, inference.cache)?;
        // A selection of nothing is no launch on CUDA; without chosen tokens nothing is read.
        if let Some((_, chosen)) = inference.chosen.filter(|(_, chosen)| !chosen.is_empty()) {
            y = y.index_select(&Tensor::new(chosen, y.device())?, 0)?;
        }
        x.0 = Some(y);
        Ok(())
    }

    fn cache(config: &Config, rows: usize, kind: CacheType) -> TensorCache {
        TensorCache::new(kind, rows, config.num_hidden_layers, config.heads())
    }

    fn final_norm(decoder: &Decoder, x: Self::Hidden) -> Result<Tensor> {
        decoder.final_norm(x.get()?)
    }

    fn log_probs(
        decoder: &Decoder,
        x: &Self::Hidden,
        targets: &[(u32, u32)],
        temperature: f64,
        active: &[ActiveAdapter],
        head: &mut Self::HeadTape,
    ) -> Result<Vec<f32>> {
        let (rows, targets): (Vec<u32>, Vec<u32>) = targets.iter().copied().unzip();
        let top = Var::from_tensor(x.get()?)?;
        let hidden = read_rows(decoder, &top, rows)?;
        let head_of = decoder.lm_head();
        let logps = head_of.tensor_log_probs(&hidden, &targets, temperature, active)?; // (M)
        let found = logps.to_vec1()?;
        head.logps = Some((top, logps));
        Ok(found)
    }

    fn distributions(_head: &Self::HeadTape) -> Option<Distributions<'_>> {
        None
    }

    fn log_probs_backward(
        _decoder: &Decoder,
        dlogps: &[f32],
        _read_with: (f64, &[ActiveAdapter]),
        head: &mut Self::HeadTape,
        dx: &mut Self::Hidden,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()> {
        let Some(read) = head.logps.take() else { return Ok(()) };
        head_backward(read, dlogps, dx, gradients)
    }

    fn scores(
        decoder: &Decoder,
        x: &Self::Hidden,
        rows: &[u32],
        weight: &Var,
        head: &mut Self::HeadTape,
    ) -> Result<Vec<f32>> {
        let top = Var::from_tensor(x.get()?)?;
        let read = scores(&read_rows(decoder, &top, rows.to_vec())?, weight)?; // (S)
        let found = read.to_vec1()?;
        head.scores = Some((top, read));
        Ok(found)
    }

    fn scores_backward(
        _decoder: &Decoder,
        dscores: &[f32],
        _weight: &Var,
        head: &mut Self::HeadTape,
        dx: &mut Self::Hidden,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()> {
        let Some(read) = head.scores.take() else { return Ok(()) };
        head_backward(read, dscores, dx, gradients)
    }

    fn zero_like(_x: &Self::Hidden, dx: &mut Self::Hidden) {
        dx.0 = None;
    }

    fn target_log_probs(
        decoder: &Decoder,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
        active: &[ActiveAdapter],
    ) -> Result<Vec<f32>> {
        decoder.lm_head().tensor_log_probs(hidden, targets, temperature, active)?.to_vec1()
    }

    fn accumulate_full(
        model: &FullModel,
        batch: &Batch,
        scale: f64,
        _kept_layers: usize,
        gradients: &mut [Tensor],
        (): &mut (),
    ) -> Result<f64> {
        model.accumulate_tensors(batch, scale, gradients)
    }

    fn layer_bytes(decoder: &Decoder, tokens: usize, sizes: &AdapterSizes) -> LayerBytes {
        // What candle keeps beside is not known.
        LayerBytes { complete: false, ..Cpu::layer_bytes(decoder, tokens, sizes) }
    }

    fn head_bytes(decoder: &Decoder, rows: usize, vocabulary: usize) -> HeadBytes {
        Cpu::head_bytes(decoder, rows, vocabulary)
    }

    fn cache_bytes(config: &Config, tokens: usize, kind: CacheType) -> usize {
        Cpu::cache_bytes(config, tokens, kind)
    }

    fn parameter_bytes(count: usize) -> usize {
        Cpu::parameter_bytes(count)
    }

    fn full_training_bytes(model: &FullModel, tokens: usize, kept_layers: usize) -> usize {
        Cpu::full_training_bytes(model, tokens, kept_layers)
    }

    fn zero_gradients(parameters: &[Var]) -> Result<Vec<Tensor>> {
        parameters.iter().map(|var| var.as_tensor().zeros_like()).collect()
    }

    fn clear_gradients(gradients: &mut [Tensor]) -> Result<()> {
        for gradient in gradients {
            *gradient = gradient.zeros_like()?;
        }
        Ok(())
    }

    fn read_gradients(gradients: &[Tensor]) -> Result<Vec<Vec<f32>>> {
        let read = |gradient: &Tensor| gradient.to_device(&Device::Cpu)?.flatten_all()?.to_vec1();
        gradients.iter().map(read).collect()
    }

    fn edit_gradients(
        gradients: &mut [Tensor],
        edit: &mut dyn FnMut(&mut [Vec<f32>]),
    ) -> Result<()> {
        let mut values = Self::read_gradients(gradients)?;
        edit(&mut values);
        for (gradient, values) in gradients.iter_mut().zip(values) {
            *gradient = Tensor::from_vec(values, gradient.shape(), gradient.device())?;
        }
        Ok(())
    }

    fn gradient_norm(gradients: &[Tensor]) -> Result<f64> {
        tensor_norm(gradients)
    }

    fn optimizer(state: AdamW, parameters: &[Var]) -> Result<TensorAdamW> {
        TensorAdamW::of(state, parameters)
    }

    fn optimizer_state(optimizer: &TensorAdamW) -> Result<Cow<'_, AdamW>> {
        Ok(Cow::Owned(optimizer.on_cpu()?))
    }

    fn optimizer_steps(optimizer: &TensorAdamW) -> u64 {
        optimizer.step
    }

    fn optimizer_step(
        optimizer: &mut TensorAdamW,
        parameters: &[Var],
        gradients: &[Tensor],
        factor: f32,
        learning_rate: f64,
    ) -> Result<bool> {
        optimizer.step(parameters, gradients, factor, learning_rate)
    }

    fn decoding<T>(steps: impl FnOnce() -> T) -> T {
        steps() // on candle's threads
    }
}
