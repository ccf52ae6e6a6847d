//! Backends: a trait at the level of decoder layers, and its implementations.
//!
//! A backend has its own types for hidden states, tapes, the KV cache, gradients and the optimizer state.
//! Training, scoring and generation are generic over it and do not access the values of a layer; only token
//! ids, log-probs, scores and logits are exchanged.
//!
//! [`Reference`] defines the answer. Every other backend is compared with it, output and gradients, by the
//! tests that `backend_tests!` defines for each. A new backend is a file here with its implementation,
//! a [`BackendKind`], and a line in `with_backend!` and in those tests.

mod cpu;
mod dispatch;
mod head_input;
mod reference;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Debug;

use candle_core::{Device, Result, Var};

pub use cpu::{Cpu, CpuHeadTape, CpuScratch};
pub(crate) use dispatch::with_backend;
pub use head_input::HeadInput;
pub use reference::{Reference, ReferenceHeadTape, ReferenceHidden, ReferenceTape};

use super::adapters::{ActiveAdapter, AdapterGroup};
use super::cache::{CacheType, RowCaches};
use super::config::Config;
use super::decoder::Decoder;
use super::full::FullModel;
use super::layer::AdapterSizes;
use super::layers::LinearGroup;
use super::pass::Pass;
use crate::data::Batch;
use crate::ops::BackendKind;
use crate::ops::linear_cross_entropy::Distributions;
use crate::optim::AdamW;

/// What a layer keeps of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: the layer has no backward pass.
    Nothing,
    /// Its input, from which its backward pass recomputes the rest.
    Input,
    /// Everything that its backward pass needs.
    Tape,
}

/// The buffers in which the gradients of trainable parameters are summed.
#[derive(Debug)]
pub struct ParameterGradients<'a, B: Backend> {
    /// The parameters: A, then B, module by module, as [`Adapter::parameters`] lists them.
    ///
    /// [`Adapter::parameters`]: quantune_adapters::delta::Adapter::parameters
    pub parameters: &'a [Var],
    /// The index of each module's first parameter, as [`Adapter::parameter_indices`] has it.
    ///
    /// [`Adapter::parameter_indices`]: quantune_adapters::delta::Adapter::parameter_indices
    pub places: &'a HashMap<String, usize>,
    /// The gradients, one per parameter.
    pub gradients: &'a mut [B::Gradient],
}

/// Options of a layer's forward pass in inference.
#[derive(Debug)]
pub struct Inference<'a, B: Backend> {
    /// The KV cache that is attended to, and to which the new tokens are appended.
    pub cache: Option<&'a mut B::Cache>,
    /// In a decode step, the tokens of each list of active adapters.
    pub(super) adapter_groups: Option<&'a [AdapterGroup<'a>]>,
    /// The tokens that are needed above the layer, in ascending order, with the pass over only these; the
    /// others are only attended to.
    pub(super) chosen: Option<(&'a Pass<'a>, &'a [u32])>,
}

/// Memory of layers in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerBytes {
    /// The input of one layer: the residual stream.
    pub input: usize,
    /// The tape of one layer.
    pub tape: usize,
    /// The buffers that all layers share.
    pub shared: usize,
    /// Whether this is the total; otherwise it is a lower bound.
    pub complete: bool,
}

/// Bytes that the head works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadBytes {
    /// Logits of the rows that are held at a time, and what their product works with.
    pub logits: usize,
    /// The rows that are read, behind the norm too, and the gradients of both.
    pub rows: usize,
}

/// An engine for one decoder layer after the other, forward and backward, and for what stands around
/// the layers.
///
/// The N tokens of all rows are concatenated without padding. All functions fail if the device fails or
/// runs out of memory. Values are F32, except for rounding inside products.
pub trait Backend: Debug + Sized + 'static {
    /// The residual stream `(N, hidden_size)`, or its gradient.
    type Hidden: Debug + Default + Send;
    /// Hidden states behind the final norm, which the head reads in inference, `(M, hidden_size)`.
    type HeadInput: HeadInput;
    /// What a layer keeps for its backward pass.
    type Tape: Debug + Default + Send;
    /// Values of the head saved for its backward pass.
    type HeadTape: Debug + Default + Send;
    /// Buffers that are used again by the next layer and the next pass.
    type Scratch: Debug + Default + Send + Sync;
    /// The keys and values of rows.
    type Cache: RowCaches;
    /// The gradient of one parameter, in its shape.
    type Gradient: Debug + Send;
    /// The state of the optimizer.
    type Optimizer: Debug + Send;
    /// Buffers of full training steps.
    type FullBuffers: Debug + Default + Send;

    /// Its name.
    const KIND: BackendKind;

    /// Whether layers can be recomputed in the backward pass where all weights train.
    const RECOMPUTES_FULL_TRAINING: bool;

    /// The same decoder with its weights on a device, where its passes then compute.
    ///
    /// # Errors
    /// If the backend computes elsewhere only.
    fn decoder_on(decoder: Decoder, device: &Device) -> Result<Decoder>;

    /// [`Self::decoder_on`] of a model whose weights all train.
    ///
    /// # Errors
    /// As there.
    fn full_model_on(model: FullModel, device: &Device) -> Result<FullModel>;

    /// Writes the embeddings of `tokens` (N) to `x`, with the active adapters' parts.
    ///
    /// # Errors
    /// If a token is out of vocabulary.
    fn embed(decoder: &Decoder, tokens: &[u32], pass: &Pass, x: &mut Self::Hidden) -> Result<()>;

    /// Edits hidden states as `(N, hidden_size)` numbers on the host.
    fn edit_hidden(x: &mut Self::Hidden, edit: &mut dyn FnMut(&mut [f32])) -> Result<()>;

    /// Adds the gradients of the embedding's trainable parts from `dx`, which is overwritten.
    fn embed_backward(
        decoder: &Decoder,
        tokens: &[u32],
        pass: &Pass,
        dx: &mut Self::Hidden,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()>;

    /// Overwrites `x`, the input of layer `index`, with its output. `kept` selects what is saved, and
    /// where.
    fn layer_forward(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        x: &mut Self::Hidden,
        kept: (Keep, &mut Self::Tape),
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// Turns `dx`, the gradient of the output of layer `index`, into that of its input, and adds the
    /// gradients of trainable parameters. `streams` are x, which is overwritten, and `dx`; `kept` is
    /// that of [`Self::layer_forward`], and its tape is used up.
    ///
    /// With `lowest`, nothing is computed below that group of linear layers, and `dx` has no meaning
    /// afterwards.
    #[allow(clippy::too_many_arguments)] // a layer, its two streams, its tape, where gradients go
    fn layer_backward(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        streams: (&mut Self::Hidden, &mut Self::Hidden),
        kept: (Keep, &mut Self::Tape),
        lowest: Option<LinearGroup>,
        gradients: &mut ParameterGradients<Self>,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// Overwrites `x`, the input of layer `index`, with its output, without a backward pass.
    fn layer_inference(
        decoder: &Decoder,
        index: usize,
        pass: &Pass,
        x: &mut Self::Hidden,
        inference: Inference<Self>,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// An empty cache of `rows` rows for a decoder of this config.
    fn cache(config: &Config, rows: usize, kind: CacheType) -> Self::Cache;

    /// The final norm of the last layer's output: N states that the head reads.
    fn final_norm(decoder: &Decoder, x: Self::Hidden) -> Result<Self::HeadInput>;

    /// The log-probs (M) of `targets`, each a row of `x` and the token it is to predict, of logits
    /// divided by `temperature`, in nats. All rows use the same adapters.
    ///
    /// # Errors
    /// If a target is out of vocabulary.
    fn log_probs(
        decoder: &Decoder,
        x: &Self::Hidden,
        targets: &[(u32, u32)],
        temperature: f64,
        active: &[ActiveAdapter],
        head: &mut Self::HeadTape,
    ) -> Result<Vec<f32>>;

    /// What else is known of the distributions that [`Self::log_probs`] read last, if anything is.
    fn distributions(head: &Self::HeadTape) -> Option<Distributions<'_>>;

    /// Adds to `dx` what follows from the gradient `dlogps` (M) of the log-probs read last, and the
    /// gradients of trainable parts of the head. `read_with` are the temperature and the active
    /// adapters of [`Self::log_probs`].
    fn log_probs_backward(
        decoder: &Decoder,
        dlogps: &[f32],
        read_with: (f64, &[ActiveAdapter]),
        head: &mut Self::HeadTape,
        dx: &mut Self::Hidden,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()>;

    /// The scores (S) that a score head `weight (1, hidden_size)` gives to chosen rows of `x`.
    fn scores(
        decoder: &Decoder,
        x: &Self::Hidden,
        rows: &[u32],
        weight: &Var,
        head: &mut Self::HeadTape,
    ) -> Result<Vec<f32>>;

    /// Adds to `dx` what follows from the gradient `dscores` (S) of the scores read last, and the
    /// gradient of the score head, which is the last parameter.
    fn scores_backward(
        decoder: &Decoder,
        dscores: &[f32],
        weight: &Var,
        head: &mut Self::HeadTape,
        dx: &mut Self::Hidden,
        gradients: &mut ParameterGradients<Self>,
    ) -> Result<()>;

    /// Sets `dx` to zeros in the shape of `x`.
    fn zero_like(x: &Self::Hidden, dx: &mut Self::Hidden);

    /// Log-probs (M) of `targets`, one per row of `hidden`, of logits divided by `temperature`, in nats.
    /// All rows use the same adapters.
    ///
    /// # Errors
    /// If a target is out of vocabulary.
    fn target_log_probs(
        decoder: &Decoder,
        hidden: &Self::HeadInput,
        targets: &[u32],
        temperature: f64,
        active: &[ActiveAdapter],
    ) -> Result<Vec<f32>>;

    /// One micro-batch in which all weights of `model` train: the sum of `-log p(target)` over its
    /// targets, in nats. The gradients of that sum times `scale` are added to `gradients`.
    ///
    /// # Errors
    /// If a token or target is out of vocabulary, or the rows do not part the tokens.
    fn accumulate_full(
        model: &FullModel,
        batch: &Batch,
        scale: f64,
        kept_layers: usize,
        gradients: &mut [Self::Gradient],
        buffers: &mut Self::FullBuffers,
    ) -> Result<f64>;

    /// Memory of the layers for a batch of `tokens` tokens.
    fn layer_bytes(decoder: &Decoder, tokens: usize, sizes: &AdapterSizes) -> LayerBytes;

    /// The memory of reading `rows` rows at a head of `vocabulary` outputs, forward and backward.
    fn head_bytes(decoder: &Decoder, rows: usize, vocabulary: usize) -> HeadBytes;

    /// Bytes of the keys and values of `tokens` tokens.
    fn cache_bytes(config: &Config, tokens: usize, kind: CacheType) -> usize;

    /// Bytes of `count` numbers that train: values, gradients and the optimizer's state.
    fn parameter_bytes(count: usize) -> usize;

    /// Bytes that a micro-batch of `tokens` tokens works with where all weights of `model` train and the
    /// uppermost `kept_layers` keep their tapes, beside [`Self::parameter_bytes`].
    fn full_training_bytes(model: &FullModel, tokens: usize, kept_layers: usize) -> usize;

    /// Gradients of zeros, where the backend computes with `parameters`.
    fn zero_gradients(parameters: &[Var]) -> Result<Vec<Self::Gradient>>;

    /// Sets gradients to zeros.
    fn clear_gradients(gradients: &mut [Self::Gradient]) -> Result<()>;

    /// A copy of gradients on the host.
    fn read_gradients(gradients: &[Self::Gradient]) -> Result<Vec<Vec<f32>>>;

    /// Edits gradients as numbers on the host, one vector per parameter.
    fn edit_gradients(
        gradients: &mut [Self::Gradient],
        edit: &mut dyn FnMut(&mut [Vec<f32>]),
    ) -> Result<()>;

    /// The Euclidean norm over all gradients; NaN or Inf if one of them is.
    fn gradient_norm(gradients: &[Self::Gradient]) -> Result<f64>;

    /// The optimizer with a saved or new state, on the device of the backend.
    fn optimizer(state: AdamW, parameters: &[Var]) -> Result<Self::Optimizer>;

    /// The optimizer state on the host, copied if needed.
    fn optimizer_state(optimizer: &Self::Optimizer) -> Result<Cow<'_, AdamW>>;

    /// Steps taken by the optimizer.
    fn optimizer_steps(optimizer: &Self::Optimizer) -> u64;

    /// One optimizer step by the gradients times `factor`, with each parameter's decay and rate.
    /// Returns whether all parameters are finite after it.
    fn optimizer_step(
        optimizer: &mut Self::Optimizer,
        parameters: &[Var],
        gradients: &[Self::Gradient],
        factor: f32,
        learning_rate: f64,
    ) -> Result<bool>;

    /// Runs decode steps with the backend's threads spinning between them.
    fn decoding<T>(steps: impl FnOnce() -> T) -> T;
}
