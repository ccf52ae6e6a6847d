//! A decoder all of whose weights train: the same model as [`Decoder`], in full precision.
//!
//! Its parameters are `f32` under Hugging Face's names. One micro-batch goes *up* through the
//! layers, is *read* at the head and judged by next-token cross-entropy, and goes *down* again; the
//! gradients of all parameters are added up on the way. The fast form is written out by hand over
//! plain buffers; [`BackendKind::Reference`] composes the same of candle ops on its tape, and a parity
//! test holds the two together. With integer panels products round as they do for a frozen base,
//! while parameters, gradients and sums stay `f32`.

mod layer;
mod portable;

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use quantune_adapters::rng::Stream;
use rayon::prelude::*;

use super::config::QkNorm;
use super::decoder::Decoder;
use super::layers::{self, Shared};
use super::{Config, ModelError};
use crate::data::Batch;
use crate::isa::Isa;
use crate::ops::linear_cross_entropy::{LearnGrad, learn};
use crate::ops::rope::Rotation;
use crate::ops::{BackendKind, Compute, Values, rms_norm, segment};
use crate::quant::FrozenMatrix;
use crate::weights::Checkpoint;
use layer::{LayerPass, Tape, Workspace};

/// A decoder whose parameters all train.
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
    places: Places,
}

/// Where the parameters of each part are.
#[derive(Debug)]
struct Places {
    layers: Vec<Layer>,
    norm: usize,
    /// The embedding, if it is tied.
    head: usize,
}

const EMBEDDING: usize = 0;

/// The parameters of a layer.
#[derive(Debug)]
struct Layer {
    input_norm: usize,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// Of the heads of queries and keys, `(head_dim)`.
    q_norm: Option<usize>,
    k_norm: Option<usize>,
    post_attention_norm: usize,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// The parameters of a linear layer `(rows, cols)`.
#[derive(Debug, Clone, Copy)]
struct Linear {
    weight: usize,
    bias: Option<usize>,
    rows: usize,
    cols: usize,
}

/// Names and shapes on the way to a model.
#[derive(Default)]
struct Plan {
    shapes: Vec<(String, Vec<usize>)>,
}

impl Plan {
    fn of(config: &Config) -> (Self, Places) {
        let c = config;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let q_width = c.num_attention_heads * c.head_dim;
        let kv_width = c.num_key_value_heads * c.head_dim;
        let mut plan = Self::default();
        plan.add("model.embed_tokens.weight".into(), vec![c.vocab_size, hidden]);
        let of_heads = c.family.qk_norm != QkNorm::None;
        let layer = |index: usize| {
            let path = |name: &str| format!("model.layers.{index}.{name}");
            let norm = |name: &str| path(&format!("{name}.weight"));
            let of_heads = |plan: &mut Self, name: &str| {
                of_heads.then(|| plan.add(norm(&format!("self_attn.{name}")), vec![c.head_dim]))
            };
            Layer {
                input_norm: plan.add(norm("input_layernorm"), vec![hidden]),
                q: plan.linear(path("self_attn.q_proj"), q_width, hidden, c.qkv_bias),
                k: plan.linear(path("self_attn.k_proj"), kv_width, hidden, c.qkv_bias),
                v: plan.linear(path("self_attn.v_proj"), kv_width, hidden, c.qkv_bias),
                o: plan.linear(path("self_attn.o_proj"), hidden, q_width, c.o_bias),
                q_norm: of_heads(&mut plan, "q_norm"),
                k_norm: of_heads(&mut plan, "k_norm"),
                post_attention_norm: plan.add(norm("post_attention_layernorm"), vec![hidden]),
                gate: plan.linear(path("mlp.gate_proj"), inner, hidden, c.mlp_bias),
                up: plan.linear(path("mlp.up_proj"), inner, hidden, c.mlp_bias),
                down: plan.linear(path("mlp.down_proj"), hidden, inner, c.mlp_bias),
            }
        };
        let layers = (0..c.num_hidden_layers).map(layer).collect();
        let norm = plan.add("model.norm.weight".into(), vec![hidden]);
        let head = match c.tie_word_embeddings {
            true => EMBEDDING,
            false => plan.add("lm_head.weight".into(), vec![c.vocab_size, hidden]),
        };
        (plan, Places { layers, norm, head })
    }

    fn add(&mut self, name: String, shape: Vec<usize>) -> usize {
        self.shapes.push((name, shape));
        self.shapes.len() - 1
    }

    fn linear(&mut self, name: String, rows: usize, cols: usize, bias: bool) -> Linear {
        let weight = self.add(format!("{name}.weight"), vec![rows, cols]);
        let bias = bias.then(|| self.add(format!("{name}.bias"), vec![rows]));
        Linear { weight, bias, rows, cols }
    }
}

/// Buffers of a step, used again by the next.
#[derive(Debug, Default)]
pub struct FullBuffers {
    work: Workspace,
    /// By layer; of recomputed ones only the input is in use.
    tapes: Vec<Tape>,
    /// The tape of layers that keep none.
    scratch: Tape,
    /// The last layer's output and the gradient of the residual stream, `(N, hidden_size)`.
    x: Vec<f32>,
    dx: Vec<f32>,
    read: Read,
}

/// Rows of hidden states on their way to the head and back.
#[derive(Debug, Default)]
struct Read {
    /// The rows that predict something `(M, hidden_size)`, behind the norm, and the gradients.
    x: Vec<f32>,
    normed: Vec<f32>,
    dnormed: Vec<f32>,
    dx: Vec<f32>,
    targets: Vec<u32>,
}

impl FullModel {
    /// A model to train from the beginning, as GPT-2 begins (Radford et al. 2019): weights are normal
    /// with deviation `initializer_range`, those that write to the residual stream divided by
    /// `sqrt(2 · layers)`; norms are 1 and biases 0. A row of a matrix depends on `seed`, its name and
    /// its place alone.
    pub fn random(
        config: Config,
        initializer_range: f64,
        seed: u64,
        compute: Compute,
    ) -> Result<Self> {
        let residual = initializer_range / (2.0 * config.num_hidden_layers as f64).sqrt();
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
                values.fill(1.0);
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
        Ok(Self::of(&decoder)?)
    }

    /// A copy of a frozen decoder's weights, dequantized.
    pub fn of(decoder: &Decoder) -> Result<Self> {
        enum Source<'a> {
            Matrix(&'a FrozenMatrix),
            Vector(&'a Tensor),
        }
        Self::check_config(&decoder.config)?;
        let mut sources = vec![Source::Matrix(&decoder.embedding)];
        for layer in &decoder.layers {
            let groups = [
                (&layer.input_norm, layer.qkv.linears(), &layer.o, [&layer.q_norm, &layer.k_norm]),
                (&layer.pre_feedforward_norm, layer.gate_up.linears(), &layer.down, [&None; 2]),
            ];
            for (norm, linears, last, of_heads) in groups {
                sources.extend(norm.as_ref().map(Source::Vector));
                for linear in linears.iter().chain([last]) {
                    sources.push(Source::Matrix(&linear.weight));
                    sources.extend(linear.bias.as_ref().map(Source::Vector));
                }
                sources.extend(of_heads.into_iter().flatten().map(Source::Vector));
            }
        }
        sources.push(Source::Vector(&decoder.norm));
        if !decoder.config.tie_word_embeddings {
            sources.push(Source::Matrix(&decoder.head));
        }
        let mut sources = sources.into_iter();
        Self::with(decoder.config.clone(), decoder.compute, |_, shape| {
            match sources.next().expect("the plan of the same config") {
                Source::Matrix(matrix) => {
                    let mut values = vec![0f32; shape.iter().product()];
                    matrix.read_tile(0..matrix.rows(), 0..matrix.cols(), &mut values);
                    values
                }
                Source::Vector(vector) => vector.to_vec1::<f32>().expect("an F32 vector"),
            }
        })
    }

    /// A model whose parameters of a name and shape have these values.
    pub fn with(
        config: Config,
        compute: Compute,
        mut values: impl FnMut(&str, &[usize]) -> Vec<f32>,
    ) -> Result<Self> {
        Self::check_config(&config)?;
        let (plan, places) = Plan::of(&config);
        let (mut names, mut parameters) = (Vec::new(), Vec::new());
        for (name, shape) in plan.shapes {
            parameters.push(Var::from_vec(values(&name, &shape), shape, &Device::Cpu)?);
            names.push(name);
        }
        Ok(Self { config, compute, names, parameters, places })
    }

    /// The same model with its parameters on a device, where its micro-batches then compute.
    ///
    /// # Errors
    /// If the form is not the portable one, or the device has too little memory.
    pub fn on(mut self, device: &Device) -> Result<Self> {
        if self.compute.backend != BackendKind::Reference {
            candle_core::bail!("compute is {}, needed portable on a device", self.compute);
        }
        for var in &mut self.parameters {
            *var = Var::from_tensor(&var.as_detached_tensor().to_device(device)?)?;
        }
        Ok(self)
    }

    /// Where its parameters are.
    pub fn device(&self) -> &Device {
        self.parameters[EMBEDDING].device()
    }

    /// The parameters on the CPU, copied if they are elsewhere.
    pub fn on_cpu(&self) -> Result<Vec<Tensor>> {
        self.parameters.iter().map(|var| var.as_detached_tensor().to_device(&Device::Cpu)).collect()
    }

    /// Whether all weights of such a decoder can train.
    ///
    /// # Errors
    /// What it has that is computed for frozen weights only.
    pub fn check_config(config: &Config) -> Result<()> {
        match config.beyond_llama() {
            Some(what) => candle_core::bail!(
                "all weights of {what} cannot train here, those of a plain llama, qwen2 or qwen3 can; \
                 adapters on it can"
            ),
            None => Ok(()),
        }
    }

    /// Whether each parameter decays: matrices do, norms and biases do not, as in transformers'
    /// Trainer; the embedding (and with it a tied head) only if `embeddings`.
    pub fn decays(&self, embeddings: bool) -> Vec<bool> {
        let decays =
            |(index, var): (usize, &Var)| var.rank() == 2 && (embeddings || index != EMBEDDING);
        self.parameters.iter().enumerate().map(decays).collect()
    }

    /// How many numbers train.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|var| var.elem_count()).sum()
    }

    /// Gradients of 0, one vector a parameter.
    pub fn zero_gradients(&self) -> Vec<Vec<f32>> {
        self.parameters.iter().map(|var| vec![0.0; var.elem_count()]).collect()
    }

    /// A frozen decoder of the present values, copied, on the device they are on.
    ///
    /// # Errors
    /// If that is not the CPU and `compute` not portable.
    pub fn decoder(&self, compute: Compute) -> Result<Decoder> {
        let values = self.on_cpu()?;
        let matrix = |index: usize| -> Result<Arc<FrozenMatrix>> {
            let (rows, cols) = values[index].dims2()?;
            let matrix = FrozenMatrix::from_f32(&Values::of(&values[index])?, rows, cols);
            Ok(Arc::new(matrix.map_err(candle_core::Error::wrap)?))
        };
        let vector = |index: usize| values[index].copy();
        let linear = |linear: &Linear| -> Result<layers::Linear> {
            let name = self.names[linear.weight].trim_end_matches(".weight").to_string();
            let bias = linear.bias.map(vector).transpose()?;
            Ok(layers::Linear { name, weight: matrix(linear.weight)?, uploaded: None, bias })
        };
        let layer = |(index, layer): (usize, &Layer)| -> Result<layers::Layer> {
            Ok(layers::Layer {
                input_norm: Some(vector(layer.input_norm)?),
                qkv: Shared::Apart([linear(&layer.q)?, linear(&layer.k)?, linear(&layer.v)?]),
                q_norm: layer.q_norm.map(vector).transpose()?,
                k_norm: layer.k_norm.map(vector).transpose()?,
                o: linear(&layer.o)?,
                post_attention_norm: None,
                pre_feedforward_norm: Some(vector(layer.post_attention_norm)?),
                gate_up: Shared::Apart([linear(&layer.gate)?, linear(&layer.up)?]),
                down: linear(&layer.down)?,
                post_feedforward_norm: None,
                scores: self.config.scores(index),
                rope: self.config.rope_of(index),
            })
        };
        let embedding = matrix(EMBEDDING)?;
        let head = match self.places.head {
            EMBEDDING => embedding.clone(),
            head => matrix(head)?,
        };
        let decoder = Decoder {
            config: self.config.clone(),
            compute,
            device: Device::Cpu,
            embedding,
            layers: self.places.layers.iter().enumerate().map(layer).collect::<Result<_>>()?,
            norm: vector(self.places.norm)?,
            head,
            uploaded_head: None,
            inv_freq: self.config.inv_freq(),
        };
        match self.device() {
            Device::Cpu => Ok(decoder),
            device => decoder.on(device),
        }
    }

    /// One micro-batch: the sum of `-log p(target)` over its targets, in nats. The gradients of that
    /// sum times `scale` (1 / the count of the whole step) are added to `gradients`, in the order of
    /// the parameters.
    ///
    /// Layers below the uppermost `kept_layers` keep only their input on the way up and are
    /// recomputed on the way down; in the portable form all keep all.
    ///
    /// # Errors
    /// If a token or target is outside the vocabulary, or the rows do not part the tokens.
    pub fn accumulate(
        &self,
        batch: &Batch,
        scale: f64,
        kept_layers: usize,
        gradients: &mut [Vec<f32>],
        buffers: &mut FullBuffers,
    ) -> Result<f64> {
        self.check(batch)?;
        if batch.targets.is_empty() {
            return Ok(0.0);
        }
        if self.compute.backend == BackendKind::Reference {
            return self.portable(batch, scale, gradients);
        }
        let panels = self.compute.precision.panels();
        let isa = Isa::current();
        let values: Vec<Values> =
            self.parameters.iter().map(|var| Values::of(var)).collect::<Result<_>>()?;
        let values: Vec<&[f32]> = values.iter().map(|values| &**values).collect();
        let rotation = Rotation::new(&batch.positions, &self.config.inv_freq());
        let rotation = rotation.grown(self.config.rope_growth());
        let segments = &batch.segments[..];
        let layers = &self.places.layers;
        let pass = |index: usize| LayerPass {
            config: &self.config,
            layer: &layers[index],
            values: &values,
            segments,
            rotation: &rotation,
            isa,
            panels,
            tokens: batch.tokens.len(),
        };
        let kept = |index: usize| index + kept_layers >= layers.len();

        // Up.
        let FullBuffers { work, tapes, scratch, x, dx, read } = buffers;
        let width = self.config.hidden_size;
        tapes.resize_with(layers.len().max(tapes.len()), Tape::default);
        let bottom = tapes.first_mut().map_or(&mut *x, |tape| &mut tape.x);
        embed(values[EMBEDDING], width, &batch.tokens, bottom);
        for index in 0..layers.len() {
            let (below, above) = tapes.split_at_mut(index + 1);
            let out = match above.first_mut().filter(|_| index + 1 < layers.len()) {
                Some(tape) => &mut tape.x,
                None => &mut *x,
            };
            let tape = &mut below[index];
            if kept(index) {
                pass(index).forward(tape, out, work);
            } else {
                std::mem::swap(&mut scratch.x, &mut tape.x);
                pass(index).forward(scratch, out, work);
                std::mem::swap(&mut scratch.x, &mut tape.x);
            }
        }

        // Read and judge.
        let eps = self.config.rms_norm_eps as f32;
        let Places { norm, head, .. } = self.places;
        let targets = &batch.targets;
        read.targets.clear();
        read.targets.extend(targets.iter().map(|&(_, token)| token));
        for buffer in [&mut read.x, &mut read.normed, &mut read.dnormed] {
            buffer.resize(targets.len() * width, 0.0);
        }
        let rows = read.x.par_chunks_exact_mut(width).with_min_len(64).zip(targets);
        rows.for_each(|(to, &(row, _))| to.copy_from_slice(&x[row as usize * width..][..width]));
        rms_norm::forward(isa, &read.x, values[norm], eps, &mut read.normed);
        let grad = LearnGrad { x: &mut read.dnormed, head: &mut gradients[head] };
        let loss = learn(panels, &read.normed, values[head], &read.targets, scale as f32, grad);

        // Down.
        for (buffer, length) in [(&mut *dx, x.len()), (&mut read.dx, read.x.len())] {
            buffer.clear();
            buffer.resize(length, 0.0);
        }
        rms_norm::backward_with_weight(
            isa,
            &read.x,
            values[norm],
            eps,
            &read.dnormed,
            &mut read.dx,
            &mut gradients[norm],
            work.shares(),
        );
        for (&(row, _), from) in targets.iter().zip(read.dx.chunks_exact(width)) {
            let to = &mut dx[row as usize * width..][..width];
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
        for index in (0..layers.len()).rev() {
            let tape = &mut tapes[index];
            if kept(index) {
                pass(index).backward(tape, dx, gradients, work);
            } else {
                std::mem::swap(&mut scratch.x, &mut tape.x);
                pass(index).forward(scratch, x, work);
                pass(index).backward(scratch, dx, gradients, work);
            }
        }
        embed_back(&batch.tokens, dx, width, &mut gradients[EMBEDDING]);
        Ok(loss)
    }

    /// What threads must not meet.
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

/// The rows of `embedding (V, width)` that `tokens` name: `x (N, width)`.
fn embed(embedding: &[f32], width: usize, tokens: &[u32], x: &mut Vec<f32>) {
    x.resize(tokens.len() * width, 0.0);
    let rows = x.par_chunks_exact_mut(width).with_min_len(64).zip(tokens);
    rows.for_each(|(to, &token)| {
        to.copy_from_slice(&embedding[token as usize * width..][..width]);
    });
}

/// Rows of the embedding whose gradient a thread adds up.
const EMBEDDING_ROWS: usize = 512;

/// Adds the gradient `dx (N, width)` of embedded tokens to that of the embedding `(V, width)`.
fn embed_back(tokens: &[u32], dx: &[f32], width: usize, gradient: &mut [f32]) {
    let parts = gradient.par_chunks_mut(EMBEDDING_ROWS * width).enumerate();
    parts.for_each(|(part, gradient)| {
        let first = part * EMBEDDING_ROWS;
        for (&token, dx) in tokens.iter().zip(dx.chunks_exact(width)) {
            let Some(row) = (token as usize).checked_sub(first) else { continue };
            if let Some(sums) = gradient.get_mut(row * width..(row + 1) * width) {
                sums.iter_mut().zip(dx).for_each(|(sum, d)| *sum += d);
            }
        }
    });
}

/// Bytes that a micro-batch of `tokens` tokens works with, beside parameters, gradients and head.
pub fn working_bytes(config: &Config, tokens: usize, kept_layers: usize) -> usize {
    let layers = config.num_hidden_layers;
    let kept = kept_layers.min(layers);
    let tape = Tape::width(config);
    let tapes = kept * tape + (layers - kept) * config.hidden_size;
    let scratch = if kept < layers { tape } else { 0 };
    // The stream, its gradient, and the head's rows, beside what layers share.
    let streams = 6 * config.hidden_size;
    (tapes + scratch + streams + Workspace::width(config)) * tokens * size_of::<f32>()
}
