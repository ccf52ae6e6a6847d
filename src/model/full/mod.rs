//! Full training of a decoder: the layers of [`Decoder`] with trainable weights, in full precision.
//!
//! Its parameters are F32 tensors under Hugging Face's names, with Hugging Face's values. A micro-batch is
//! a forward pass through the layers, next-token cross-entropy at the head, and a backward pass that sums
//! the gradients of all parameters. The reference backend runs the layers' reference form on candle's tape,
//! and a parity test compares the two. With integer panels products round as they do for a frozen
//! base, while parameters, gradients and sums stay F32.

mod cpu;
mod reference;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use quantune_adapters::config::{EMBEDDING as EMBEDDING_MODULE, HEAD as HEAD_MODULE};
use quantune_adapters::rng::Stream;
use rayon::prelude::*;

use super::decoder::Decoder;
use super::layers::{self, Layer, LayerSource, Linear, Norm, Parameter};
use super::load::{gguf_offset, read_vector};
use super::{Config, ModelError};
use crate::data::Batch;
use crate::ops::{Compute, Values, segment};
use crate::quant::FrozenMatrix;
use crate::weights::Checkpoint;
pub use cpu::FullBuffers;

/// A fully trainable decoder.
#[derive(Debug)]
pub struct FullModel {
    /// Its properties.
    pub config: Config,
    /// Which form of the operations runs.
    pub compute: Compute,
    /// Hugging Face's names of the parameters.
    pub names: Vec<String>,
    /// The parameters: F32, contiguous, on the CPU unless [`FullModel::on`] brought them elsewhere.
    pub parameters: Vec<Var>,
    layers: Vec<Layer>,
    norm: Norm,
    /// Index of the head: that of the embedding, if tied.
    head: usize,
    inv_freq: Vec<f32>,
}

/// Index of the embedding.
const EMBEDDING: usize = 0;

/// Parameters on the way to a model, in their order.
struct Builder<'a, F> {
    config: &'a Config,
    /// Makes the parameter of a name and shape.
    make: F,
    names: Vec<String>,
    parameters: Vec<Var>,
    error: Option<candle_core::Error>,
}

impl<F: FnMut(&str, &[usize]) -> Result<Var>> Builder<'_, F> {
    fn add(&mut self, name: String, shape: &[usize]) -> Option<Parameter> {
        match (self.make)(&name, shape) {
            Ok(var) => {
                let gradient = Some(self.parameters.len());
                let parameter = Parameter { value: var.as_tensor().clone(), gradient };
                self.names.push(name);
                self.parameters.push(var);
                Some(parameter)
            }
            Err(error) => {
                self.error.get_or_insert(error);
                None
            }
        }
    }
}

impl<F: FnMut(&str, &[usize]) -> Result<Var>> LayerSource for Builder<'_, F> {
    fn norm(&mut self, module: String, width: usize) -> Option<Norm> {
        let name = format!("{module}.weight");
        let offset = gguf_offset(self.config, &name);
        self.add(name, &[width]).map(|weight| Norm { weight, offset })
    }

    fn linear(&mut self, name: String, rows: usize, cols: usize, bias: bool) -> Option<Linear> {
        let weight = self.add(format!("{name}.weight"), &[rows, cols])?;
        let bias = if bias { Some(self.add(format!("{name}.bias"), &[rows])?) } else { None };
        Some(Linear::trainable(name, weight, bias, rows, cols))
    }
}

/// A frozen copy of a model's parameters.
struct FrozenCopy<'a> {
    config: &'a Config,
    values: HashMap<&'a str, Tensor>,
    error: Option<candle_core::Error>,
}

impl FrozenCopy<'_> {
    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.error.get_or_insert(error)).ok()
    }

    fn vector(&mut self, name: &str) -> Option<Tensor> {
        let copy = self.values[name].copy();
        self.note(copy)
    }

    fn matrix(&mut self, name: &str) -> Option<Arc<FrozenMatrix>> {
        let copy = || -> Result<Arc<FrozenMatrix>> {
            let values = &self.values[name];
            let (rows, cols) = values.dims2()?;
            let matrix = FrozenMatrix::from_f32(&Values::of(values)?, rows, cols);
            Ok(Arc::new(matrix.map_err(candle_core::Error::wrap)?))
        };
        let copy = copy();
        self.note(copy)
    }
}

impl LayerSource for FrozenCopy<'_> {
    fn norm(&mut self, module: String, _width: usize) -> Option<Norm> {
        let name = format!("{module}.weight");
        let weight = Parameter::frozen(self.vector(&name)?);
        let factors = Norm { weight, offset: gguf_offset(self.config, &name) }.factors();
        self.note(factors).map(Norm::frozen)
    }

    fn linear(&mut self, name: String, _rows: usize, _cols: usize, bias: bool) -> Option<Linear> {
        let weight = self.matrix(&format!("{name}.weight"))?;
        let bias = if bias { Some(self.vector(&format!("{name}.bias"))?) } else { None };
        Some(Linear::frozen(name, weight, bias))
    }
}

impl FullModel {
    /// A model to train from the beginning, as GPT-2 begins (Radford et al. 2019): weights are normal
    /// with deviation `initializer_range`, those that write to the residual stream divided by
    /// `sqrt(2 · layers)`; norms multiply by 1 and biases are 0. A row of a matrix depends on `seed`, its name and
    /// its place alone.
    pub fn random(
        config: Config,
        initializer_range: f64,
        seed: u64,
        compute: Compute,
    ) -> Result<Self> {
        let residual = initializer_range / (2.0 * config.num_hidden_layers as f64).sqrt();
        let properties = config.clone();
        Self::with(config, compute, |name, shape| {
            let mut values = vec![0f32; shape.iter().product()];
            if let &[_, cols] = shape {
                let writes = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
                let std = (if writes { residual } else { initializer_range }) as f32;
                let purpose = format!("init {name}");
                values.par_chunks_exact_mut(cols).enumerate().for_each(|(row, values)| {
                    let mut stream = Stream::new(seed, &purpose, &[row as u64]);
                    values.iter_mut().for_each(|value| *value = std * stream.normal());
                });
            } else if name.ends_with("norm.weight") {
                values.fill(1.0 - gguf_offset(&properties, name));
            }
            values
        })
    }

    /// The model of a checkpoint in any format we read, dequantized.
    ///
    /// # Errors
    /// As [`Decoder::load`], and if it has no head to train.
    pub fn load(
        checkpoint: &Checkpoint,
        compute: Compute,
    ) -> std::result::Result<Self, ModelError> {
        let decoder = Decoder::load(checkpoint, compute)?;
        let tied = decoder.config.tie_word_embeddings;
        if !tied && Arc::ptr_eq(&decoder.embedding, &decoder.head) {
            let path = checkpoint.path().display().to_string();
            let reason = "a sequence classifier; needed lm_head.weight to train".into();
            return Err(ModelError::Tensors { path, reason });
        }
        let config = decoder.config.clone();
        let mut matrices: HashMap<String, Arc<FrozenMatrix>> = HashMap::new();
        for linear in decoder.layers.iter().flat_map(Layer::linears) {
            matrices.insert(linear.name.clone(), linear.matrix()?.clone());
        }
        matrices.insert(EMBEDDING_MODULE.into(), decoder.embedding.clone());
        matrices.insert(HEAD_MODULE.into(), decoder.head.clone());
        let mut fault = None;
        let model = Self::with(config.clone(), compute, |name, shape| {
            let mut values = vec![0f32; shape.iter().product()];
            let module = name.strip_suffix(".weight").and_then(|module| matrices.get(module));
            if let Some(matrix) = module {
                matrix.read_tile(0..matrix.rows(), 0..matrix.cols(), &mut values);
            } else {
                // As it is stored: a frozen norm is kept as it multiplies.
                match read_vector(checkpoint, &config, name, values.len()) {
                    Ok(vector) => values = vector,
                    Err(error) => fault = Some(error),
                }
            }
            values
        })?;
        fault.map_or(Ok(model), Err)
    }

    /// A model whose parameters of a name and shape have these values.
    fn with(
        config: Config,
        compute: Compute,
        mut values: impl FnMut(&str, &[usize]) -> Vec<f32>,
    ) -> Result<Self> {
        Self::build(config, compute, |name, shape| {
            Var::from_vec(values(name, shape), shape, &Device::Cpu)
        })
    }

    /// A model of parameters that `make` gives by name and shape, in their order.
    fn build(
        config: Config,
        compute: Compute,
        make: impl FnMut(&str, &[usize]) -> Result<Var>,
    ) -> Result<Self> {
        let (vocab_size, hidden_size) = (config.vocab_size, config.hidden_size);
        let mut builder = Builder {
            config: &config,
            make,
            names: Vec::new(),
            parameters: Vec::new(),
            error: None,
        };
        builder.add(format!("{EMBEDDING_MODULE}.weight"), &[vocab_size, hidden_size]);
        let layers = (0..config.num_hidden_layers).map(|i| layers::build(&config, i, &mut builder));
        let layers: Option<Vec<Layer>> = layers.collect();
        let norm = builder.norm("model.norm".into(), hidden_size);
        let mut head = EMBEDDING;
        if !config.tie_word_embeddings {
            head = builder.parameters.len();
            builder.add(format!("{HEAD_MODULE}.weight"), &[vocab_size, hidden_size]);
        }
        let Builder { names, parameters, error, .. } = builder;
        if let Some(error) = error {
            return Err(error);
        }
        let (layers, norm) = layers.zip(norm).expect("everything was made");
        let inv_freq = config.inv_freq();
        Ok(Self { config, compute, names, parameters, layers, norm, head, inv_freq })
    }

    /// The same model with its parameters as tensors on a device.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub(super) fn upload(self, device: &Device) -> Result<Self> {
        let mut parameters = self.parameters.into_iter();
        Self::build(self.config, self.compute, |_, _| {
            let var = parameters.next().expect("as many as before");
            Var::from_tensor(&var.as_detached_tensor().to_device(device)?)
        })
    }

    /// Where its parameters are.
    pub fn device(&self) -> &Device {
        self.parameters[EMBEDDING].device()
    }

    /// The parameters on the CPU, copied if they are elsewhere.
    pub fn on_cpu(&self) -> Result<Vec<Tensor>> {
        self.parameters.iter().map(|var| var.as_detached_tensor().to_device(&Device::Cpu)).collect()
    }

    /// Whether each parameter decays: matrices do, norms and biases do not, as in transformers'
    /// Trainer; the embedding (and with it a tied head) only if `embeddings`.
    pub fn decays(&self, embeddings: bool) -> Vec<bool> {
        let decays =
            |(index, var): (usize, &Var)| var.rank() == 2 && (embeddings || index != EMBEDDING);
        self.parameters.iter().enumerate().map(decays).collect()
    }

    /// Number of parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|var| var.elem_count()).sum()
    }

    /// Zero gradients, one vector per parameter.
    pub fn zero_gradients(&self) -> Vec<Vec<f32>> {
        self.parameters.iter().map(|var| vec![0.0; var.elem_count()]).collect()
    }

    /// A frozen decoder of the present values, copied, on the CPU.
    pub(super) fn frozen_copy(&self, compute: Compute) -> Result<Decoder> {
        let values = self.names.iter().map(String::as_str).zip(self.on_cpu()?).collect();
        let mut copy = FrozenCopy { config: &self.config, values, error: None };
        let embedding = copy.matrix(&self.names[EMBEDDING]);
        let head = match self.head {
            EMBEDDING => embedding.clone(),
            head => copy.matrix(&self.names[head]),
        };
        let layers = (0..self.config.num_hidden_layers)
            .map(|index| layers::build(&self.config, index, &mut copy))
            .collect::<Option<Vec<_>>>();
        let norm = copy.norm("model.norm".into(), self.config.hidden_size);
        if let Some(error) = copy.error {
            return Err(error);
        }
        let copied = embedding.zip(head).zip(layers.zip(norm));
        let ((embedding, head), (layers, norm)) = copied.expect("everything was copied");
        Ok(Decoder {
            config: self.config.clone(),
            compute,
            device: Device::Cpu,
            embedding,
            layers,
            norm: norm.weight.value,
            head,
            uploaded_head: None,
            inv_freq: self.inv_freq.clone(),
        })
    }

    /// Fails on a batch that is not of this model: threads must not meet one.
    fn check(&self, batch: &Batch) -> Result<()> {
        let (n, vocabulary) = (batch.tokens.len(), self.config.vocab_size);
        let targets = batch.targets.iter().map(|&(_, token)| token);
        let mut all = batch.tokens.iter().copied().chain(targets);
        if let Some(token) = all.find(|&token| token as usize >= vocabulary) {
            candle_core::bail!("token {token} is outside the vocabulary of {vocabulary}");
        }
        if let Some(fault) = segment::fault(&batch.segments, n) {
            candle_core::bail!("a batch of {n} tokens: {fault}");
        }
        if batch.positions.len() != n {
            candle_core::bail!("{} positions for {n} tokens", batch.positions.len());
        }
        match batch.targets.iter().find(|&&(row, _)| row as usize >= n) {
            Some((row, _)) => candle_core::bail!("a target of token {row}, there are {n}"),
            None => Ok(()),
        }
    }
}
