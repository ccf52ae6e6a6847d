//! The CPU backend: hand-written kernels over plain buffers, forward and backward.

use std::borrow::Cow;

use candle_core::{Device, Result, Tensor, Var};
use rayon::prelude::*;

use super::{Backend, HeadBytes, Inference, Keep, LayerBytes, ParameterGradients};
use crate::data::Batch;
use crate::model::adapters::ActiveAdapter;
use crate::model::cache::{CacheType, PanelCache};
use crate::model::config::Config;
use crate::model::decoder::Decoder;
use crate::model::full::{FullBuffers, FullModel};
use crate::model::gradients::GradientBuffers;
use crate::model::layer::{AdapterSizes, LayerPass, Tape, Workspace};
use crate::model::layers::LinearGroup;
use crate::model::pass::Pass;
use crate::model::reading::Reading;
use crate::ops::linear_cross_entropy::{self, Distributions};
use crate::ops::{BackendKind, worker_pool};
use crate::optim::{AdamW, global_norm};

/// The backend of [`BackendKind::Cpu`].
#[derive(Debug)]
pub struct Cpu;

/// Buffers of all layers.
#[derive(Debug, Default)]
pub struct CpuScratch {
    work: Workspace,
    /// The tape of recomputed layers.
    tape: Tape,
}

/// The rows that log-probs and scores were read from.
#[derive(Debug, Default)]
pub struct CpuHeadTape {
    logps: Reading,
    scores: Reading,
    /// The score head `(hidden_size)`.
    weight: Vec<f32>,
}

fn layer<'a>(decoder: &'a Decoder, index: usize, pass: &'a Pass) -> LayerPass<'a> {
    decoder.layer_pass(index, pass)
}

impl ParameterGradients<'_, Cpu> {
    fn sink(&mut self) -> GradientBuffers<'_> {
        GradientBuffers { places: self.places, gradients: self.gradients }
    }
}

impl Backend for Cpu {
    type Hidden = Vec<f32>;
    type HeadInput = Tensor;
    type Tape = Tape;
    type HeadTape = CpuHeadTape;
    type Scratch = CpuScratch;
    type Cache = PanelCache;
    type Gradient = Vec<f32>;
    type Optimizer = AdamW;
    type FullBuffers = Box<FullBuffers>;

    const KIND: BackendKind = BackendKind::Cpu;
    const RECOMPUTES_FULL_TRAINING: bool = true;

    fn decoder_on(_decoder: Decoder, _device: &Device) -> Result<Decoder> {
        candle_core::bail!("backend cpu does not compute on a device: needed backend reference");
    }

    fn full_model_on(_model: FullModel, _device: &Device) -> Result<FullModel> {
        candle_core::bail!("backend cpu does not compute on a device: needed backend reference");
    }

    fn embed(decoder: &Decoder, tokens: &[u32], pass: &Pass, x: &mut Vec<f32>) -> Result<()> {
        decoder.embed_into(tokens, pass, x)
    }

    fn edit_hidden(x: &mut Vec<f32>, edit: &mut dyn FnMut(&mut [f32])) -> Result<()> {
        edit(x);
        Ok(())
    }

    fn embed_backward(
        decoder: &Decoder,
        tokens: &[u32],
        pass: &Pass,
        dx: &mut Vec<f32>,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()> {
        decoder.embed_back(tokens, pass, dx, &mut gradients.sink())
    }

    fn layer_forward(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        x: &mut Vec<f32>,
        (keep, tape): (Keep, &mut Tape),
        scratch: &mut CpuScratch,
    ) -> Result<()> {
        if keep != Keep::Nothing {
            tape.x.clear();
            tape.x.extend_from_slice(x);
        }
        let taped = keep == Keep::Tape;
        let tape = if taped { tape } else { &mut scratch.tape };
        layer(decoder, index, pass).forward(x, tape, taped, &mut scratch.work, None)
    }

    fn layer_backward(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        (x, dx): (&mut Vec<f32>, &mut Vec<f32>),
        (keep, tape): (Keep, &mut Tape),
        lowest: Option<LinearGroup>,
        gradients: &mut ParameterGradients<Self>,
        scratch: &mut CpuScratch,
    ) -> Result<()> {
        let layer = layer(decoder, index, pass);
        let CpuScratch { work, tape: recomputed } = scratch;
        let tape = if keep == Keep::Tape {
            tape
        } else {
            std::mem::swap(&mut recomputed.x, &mut tape.x);
            x.copy_from_slice(&recomputed.x);
            layer.forward(x, recomputed, true, work, None)?;
            recomputed
        };
        layer.backward(dx, tape, lowest, &mut gradients.sink(), work)
    }

    fn layer_inference(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        x: &mut Vec<f32>,
        inference: Inference<Self>,
        CpuScratch { work, tape }: &mut CpuScratch,
    ) -> Result<()> {
        let Inference { cache, adapter_groups, chosen } = inference;
        let cache = cache.map(|cache| (cache, index));
        let mut of_all = layer(decoder, index, pass);
        if let Some(adapter_groups) = adapter_groups {
            of_all = of_all.decoding(adapter_groups);
        }
        match chosen {
            Some((narrow, chosen)) => {
                let narrow = layer(decoder, index, narrow);
                of_all.forward_to((&narrow, chosen), x, tape, work, cache)
            }
            None => of_all.forward(x, tape, false, work, cache),
        }
    }

    fn cache(config: &Config, rows: usize, kind: CacheType) -> PanelCache {
        PanelCache::new(kind, rows, config.num_hidden_layers, config.heads())
    }

    fn final_norm(decoder: &Decoder, x: Vec<f32>) -> Result<Tensor> {
        let width = decoder.config.hidden_size;
        let shape = (x.len() / width, width);
        decoder.final_norm(&Tensor::from_vec(x, shape, &Device::Cpu)?)
    }

    fn log_probs(
        decoder: &Decoder,
        x: &Vec<f32>,
        targets: &[(u32, u32)],
        temperature: f64,
        active: &[ActiveAdapter],
        head: &mut CpuHeadTape,
    ) -> Result<Vec<f32>> {
        let reading = &mut head.logps;
        Ok(decoder.read_log_probs(x, targets, temperature, active, true, reading)?.to_vec())
    }

    fn distributions(head: &CpuHeadTape) -> Option<Distributions<'_>> {
        Some(head.logps.distributions())
    }

    fn log_probs_backward(
        decoder: &Decoder,
        dlogps: &[f32],
        (temperature, active): (f64, &[ActiveAdapter]),
        head: &mut CpuHeadTape,
        dx: &mut Vec<f32>,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()> {
        let (reading, sink) = (&mut head.logps, &mut gradients.sink());
        decoder.log_probs_backward(dlogps, temperature, active, reading, dx, sink)
    }

    fn scores(
        decoder: &Decoder,
        x: &Vec<f32>,
        rows: &[u32],
        weight: &Var,
        head: &mut CpuHeadTape,
    ) -> Result<Vec<f32>> {
        head.weight = weight.flatten_all()?.to_vec1()?;
        decoder.read_scores(x, rows, &head.weight, &mut head.scores)
    }

    fn scores_backward(
        decoder: &Decoder,
        dscores: &[f32],
        _weight: &Var,
        head: &mut CpuHeadTape,
        dx: &mut Vec<f32>,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()> {
        let Some(dweight) = gradients.gradients.last_mut() else {
            candle_core::bail!("scores have a gradient, but no parameter has");
        };
        decoder.scores_backward(dscores, &head.weight, &mut head.scores, dx, dweight)
    }

    fn zero_like(x: &Vec<f32>, dx: &mut Vec<f32>) {
        dx.clear();
        dx.resize(x.len(), 0.0);
    }

    fn target_log_probs(
        decoder: &Decoder,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
        active: &[ActiveAdapter],
    ) -> Result<Vec<f32>> {
        decoder.lm_head().log_probs(hidden, targets, temperature, active)
    }

    fn accumulate_full(
        model: &FullModel,
        batch: &Batch,
        scale: f64,
        kept_layers: usize,
        gradients: &mut [Vec<f32>],
        buffers: &mut Box<FullBuffers>,
    ) -> Result<f64> {
        model.accumulate(batch, scale, kept_layers, gradients, buffers)
    }

    fn layer_bytes(decoder: &Decoder, tokens: usize, sizes: &AdapterSizes) -> LayerBytes {
        let (config, compute) = (&decoder.config, decoder.compute);
        LayerBytes {
            input: tokens * config.hidden_size * size_of::<f32>(),
            tape: Tape::bytes(config, compute, tokens, sizes),
            shared: Tape::shared_bytes(config, compute, tokens, sizes),
            complete: true,
        }
    }

    fn head_bytes(decoder: &Decoder, rows: usize, vocabulary: usize) -> HeadBytes {
        HeadBytes {
            logits: linear_cross_entropy::working_bytes(rows, vocabulary, decoder.compute),
            rows: Reading::bytes(&decoder.config, rows),
        }
    }

    fn cache_bytes(config: &Config, tokens: usize, kind: CacheType) -> usize {
        PanelCache::bytes(kind, tokens, config.num_hidden_layers, config.heads())
    }

    fn parameter_bytes(count: usize) -> usize {
        4 * count * size_of::<f32>() // two moments
    }

    fn full_training_bytes(model: &FullModel, tokens: usize, kept_layers: usize) -> usize {
        let (config, compute) = (&model.config, model.compute);
        linear_cross_entropy::working_bytes(tokens, config.vocab_size, compute)
            + FullBuffers::bytes(config, tokens, kept_layers)
    }

    fn zero_gradients(parameters: &[Var]) -> Result<Vec<Vec<f32>>> {
        Ok(parameters.iter().map(|var| vec![0.0; var.elem_count()]).collect())
    }

    fn clear_gradients(gradients: &mut [Vec<f32>]) -> Result<()> {
        gradients.par_iter_mut().for_each(|gradient| gradient.fill(0.0));
        Ok(())
    }

    fn read_gradients(gradients: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
        Ok(gradients.to_vec())
    }

    fn edit_gradients(
        gradients: &mut [Vec<f32>],
        edit: &mut dyn FnMut(&mut [Vec<f32>]),
    ) -> Result<()> {
        edit(gradients);
        Ok(())
    }

    fn gradient_norm(gradients: &[Vec<f32>]) -> Result<f64> {
        Ok(global_norm(gradients))
    }

    fn optimizer(state: AdamW, _parameters: &[Var]) -> Result<AdamW> {
        Ok(state)
    }

    fn optimizer_state(optimizer: &AdamW) -> Result<Cow<'_, AdamW>> {
        Ok(Cow::Borrowed(optimizer))
    }

    fn optimizer_steps(optimizer: &AdamW) -> u64 {
        optimizer.step
    }

    fn optimizer_step(
        optimizer: &mut AdamW,
        parameters: &[Var],
        gradients: &[Vec<f32>],
        factor: f32,
        learning_rate: f64,
    ) -> Result<bool> {
        optimizer.step(parameters, gradients, factor, learning_rate)
    }

    fn decoding<T>(steps: impl FnOnce() -> T) -> T {
        worker_pool::with_worker_pool(steps)
    }
}
