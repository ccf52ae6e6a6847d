//! The decoder over frozen weights: embedding, layers, final norm and head.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use quantune_adapters::config::{EMBEDDING, HEAD};
use quantune_adapters::delta::Dropout;
use quantune_adapters::targets::LinearSpec;

use super::adapters::{ActiveAdapter, Adapters};
use super::cache::{KvCache, StepBuffers};
use super::config::Config;
use super::embedding::{Embedding, adapts_embedding};
use super::layer::reference::TensorLayerPass;
use super::layer::{AdapterGradients, LayerPass, LinearGroup};
use super::layers::{Layer, Linear};
use super::lm_head::{AdaptedHead, LmHead};
use super::pass::{Pass, Rows};
use crate::ops::{BackendKind, Compute, DeviceMatrix, rms_norm};
use crate::quant::FrozenMatrix;

/// A decoder over frozen weights. Nothing is ever written to it or attached to it.
#[derive(Debug)]
pub struct Decoder {
    /// Its configuration.
    pub config: Config,
    /// Which form of the operations runs.
    pub compute: Compute,
    pub(super) device: Device,
    pub(super) embedding: Arc<FrozenMatrix>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: Arc<FrozenMatrix>,
    /// The head on another device.
    pub(super) uploaded_head: Option<Arc<DeviceMatrix>>,
    pub(super) inv_freq: Vec<f32>,
}

impl Decoder {
    /// The same decoder with its weights on a device, where its passes then compute and their caches of
    /// keys and values lie. The embedding stays in the map, as only rows of it are read; adapters stay
    /// on the CPU, they are small and go up with each use: what trains, saves and merges them is the
    /// same on every device.
    ///
    /// # Errors
    /// If the form is not the portable one, or the device has too little memory.
    pub fn on(mut self, device: &Device) -> Result<Self> {
        if self.compute.backend != BackendKind::Reference {
            candle_core::bail!("compute is {}, needed portable on a device", self.compute);
        }
        for layer in &mut self.layers {
            layer.upload(device)?;
        }
        self.norm = self.norm.to_device(device)?;
        self.uploaded_head = Some(Arc::new(DeviceMatrix::upload(&self.head, device)?));
        self.device = device.clone();
        Ok(self)
    }

    /// The same decoder with rows of embedding and head for `vocab_size` tokens, if it has fewer; those
    /// it has stay where they are. The others begin as the mean of those, which is the mean that
    /// transformers' `mean_resizing` draws them around (Hewitt 2021, "Initializing new word
    /// embeddings"), without the drawing.
    ///
    /// # Errors
    /// If its weights are on a device already.
    pub fn with_vocabulary(mut self, vocab_size: usize) -> Result<Self> {
        let more = vocab_size.saturating_sub(self.config.vocab_size);
        if more == 0 {
            return Ok(self);
        }
        if self.uploaded_head.is_some() {
            candle_core::bail!("a vocabulary grows before its weights are on a device");
        }
        let grown = |matrix: &FrozenMatrix| {
            matrix.grown(more, &matrix.mean_row()).map(Arc::new).map_err(candle_core::Error::wrap)
        };
        let one = Arc::ptr_eq(&self.embedding, &self.head);
        self.embedding = grown(&self.embedding)?;
        self.head = if one { self.embedding.clone() } else { grown(&self.head)? };
        self.config.vocab_size = vocab_size;
        Ok(self)
    }

    /// Where its passes compute.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Begins a pass over `rows`. `dropout` falls on the inputs of trainable adapters only.
    ///
    /// # Panics
    /// If the segments of `rows` do not part its tokens end to end, or a prefix is no earlier row: a
    /// caller's bug that threads must not meet.
    pub fn pass<'a>(
        &self,
        rows: &Rows,
        adapters: Adapters<'a>,
        dropout: Option<&'a Dropout>,
    ) -> Pass<'a> {
        Pass::new(&self.config, &self.inv_freq, rows, adapters, dropout)
    }

    fn embedding(&self) -> Embedding<'_> {
        let multiplier = self.config.variation.embedding_multiplier;
        Embedding { weight: &self.embedding, multiplier, device: &self.device }
    }

    fn lm_head(&self) -> LmHead<'_> {
        let Self { head: weight, config, compute, device, .. } = self;
        let uploaded = self.uploaded_head.as_deref();
        LmHead { weight, uploaded, config, compute: *compute, device }
    }

    /// The embeddings of tokens, `(N, hidden_size)` F32, on the tape of trainable adapters.
    ///
    /// # Errors
    /// If a token is out of vocabulary.
    pub fn embed(&self, tokens: &[u32], pass: &Pass) -> Result<Tensor> {
        self.embedding().forward(tokens, pass)
    }

    /// [`Self::embed`] into a buffer, which is overwritten; off the tape.
    pub fn embed_into(&self, tokens: &[u32], pass: &Pass, x: &mut Vec<f32>) -> Result<()> {
        self.embedding().forward_into(tokens, pass, x)
    }

    /// The backward pass of [`Self::embed_into`]: from `dx (N, hidden_size)` to the parameters of the
    /// trainable adapter, which all rows use. `dx` is used up.
    pub(crate) fn embed_back(
        &self,
        tokens: &[u32],
        pass: &Pass,
        dx: &mut [f32],
        sink: &mut AdapterGradients,
    ) -> Result<()> {
        self.embedding().backward(tokens, pass, dx, sink)
    }

    /// Whether a trainable adapter changes the embedding, so that gradients must reach it.
    pub(crate) fn trains_embedding(&self, adapters: Adapters) -> bool {
        adapters.iter().any(|active| active.trainable && adapts_embedding(&active.adapter))
    }

    /// Logits `(M, vocab_size)` of hidden states `(M, hidden_size)`, each row under its adapters: for
    /// few rows only. A row gets the same bits among any others. They are on the CPU, where tokens are
    /// sampled.
    pub fn logits(&self, hidden: &Tensor, adapters: Adapters) -> Result<Tensor> {
        self.lm_head().logits(hidden, adapters)
    }

    /// Log-probabilities of `targets`, one per row of `hidden (M, hidden_size)` → `(M)`, of rows that
    /// all use the same adapters. In the portable form trainable adapters are on the tape.
    pub fn log_probs(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        active: &[ActiveAdapter],
    ) -> Result<Tensor> {
        self.log_probs_at_temperature(hidden, targets, 1.0, active)
    }

    /// [`Self::log_probs`] of logits divided by `temperature`.
    pub fn log_probs_at_temperature(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
        active: &[ActiveAdapter],
    ) -> Result<Tensor> {
        self.lm_head().log_probs_at_temperature(hidden, targets, temperature, active)
    }

    /// The head with adapters; `None` if they do not change it.
    pub(crate) fn adapted_head<'a>(
        &'a self,
        active: &'a [ActiveAdapter],
    ) -> Result<Option<AdaptedHead<'a>>> {
        self.lm_head().adapted(active)
    }

    /// One layer by its fast form, or `None` where the portable one runs.
    pub fn layer_pass<'a>(&'a self, index: usize, pass: &'a Pass) -> Option<LayerPass<'a>> {
        LayerPass::new(&self.config, &self.layers[index], pass, self.compute)
    }

    /// One layer composed of operations on candle's tape: `x (N, hidden_size)` → the same shape.
    /// In the portable form these are plain candle ops; else each runs its own kernel.
    pub fn layer(&self, index: usize, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.layer_with(index, x, pass, None)
    }

    /// The norm before the head: `x (N, hidden_size)` → the same shape.
    pub fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.norm, self.config.rms_norm_eps, self.compute)
    }

    /// The hidden states the head reads, `(N, hidden_size)`. For scoring: but for the portable form
    /// nothing of it is on a tape, so no gradient reaches an adapter (training goes layer by layer).
    pub fn hidden(&self, rows: &Rows, adapters: Adapters) -> Result<Tensor> {
        self.hidden_with(rows, adapters, None, false)
    }

    /// [`Self::hidden`] of some of the tokens, `(chosen, hidden_size)`: the same bits, without what
    /// the last layer makes of the others once they are attended to. `chosen` may be in any order and
    /// name a token several times.
    pub fn hidden_of(&self, rows: &Rows, adapters: Adapters, chosen: &[u32]) -> Result<Tensor> {
        self.hidden_chosen(rows, adapters, None, chosen)
    }

    /// [`Self::hidden_cached`] of some of the new tokens, as [`Self::hidden_of`].
    pub fn hidden_cached_of(
        &self,
        rows: &Rows,
        adapters: Adapters,
        cache: &mut KvCache,
        chosen: &[u32],
    ) -> Result<Tensor> {
        self.hidden_chosen(rows, adapters, Some(cache), chosen)
    }

    /// The hidden states of new tokens after those in `cache`, which they join; without gradients,
    /// as [`Self::hidden`]. `rows` go on where the cache's rows end.
    pub fn hidden_cached(
        &self,
        rows: &Rows,
        adapters: Adapters,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        self.hidden_with(rows, adapters, Some(cache), false)
    }

    /// [`Self::hidden_cached`] for a decoding step, a token a row, at the speed of memory. In the
    /// integer modes its rounding is another than a prompt's, whatever the number of rows.
    pub fn hidden_step(
        &self,
        rows: &Rows,
        adapters: Adapters,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        self.hidden_with(rows, adapters, Some(cache), true)
    }

    fn hidden_with(
        &self,
        rows: &Rows,
        adapters: Adapters,
        mut cache: Option<&mut KvCache>,
        decoding: bool,
    ) -> Result<Tensor> {
        check_cache(rows, cache.as_deref(), self.compute)?;
        let pass = self.pass(rows, adapters, None);
        if self.compute.backend == BackendKind::Reference {
            let mut x = self.embed(&rows.tokens, &pass)?;
            for index in 0..self.layers.len() {
                x = self.layer_with(index, &x, &pass, cache.as_deref_mut())?;
            }
            return self.final_norm(&x);
        }
        // A step is so short that fresh buffers would cost of it; those of a prompt are large.
        let mut buffers = match cache.as_deref_mut().filter(|_| decoding) {
            Some(cache) => std::mem::take(&mut cache.step),
            None => StepBuffers::default(),
        };
        let StepBuffers { tape, work } = &mut buffers;
        let adapter_groups = decoding.then(|| adapters.adapter_groups(&pass.segments));
        let mut x = Vec::new();
        self.embed_into(&rows.tokens, &pass, &mut x)?;
        for index in 0..self.layers.len() {
            if let Some(mut layer) = self.layer_pass(index, &pass) {
                let cache = cache.as_deref_mut().map(|cache| (cache, index));
                if let Some(adapter_groups) = &adapter_groups {
                    layer = layer.decoding(adapter_groups);
                }
                layer.forward(&mut x, tape, false, work, cache)?;
            }
        }
        if let Some(cache) = cache.filter(|_| decoding) {
            cache.step = buffers;
        }
        self.normed(x)
    }

    fn hidden_chosen(
        &self,
        rows: &Rows,
        adapters: Adapters,
        mut cache: Option<&mut KvCache>,
        chosen: &[u32],
    ) -> Result<Tensor> {
        let picked = |hidden: Tensor, rows: Vec<u32>| {
            hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)
        };
        let none = || Tensor::zeros((0, self.config.hidden_size), DType::F32, &Device::Cpu);
        if self.compute.backend == BackendKind::Reference {
            let hidden = self.hidden_with(rows, adapters, cache, false)?;
            return if chosen.is_empty() { none() } else { picked(hidden, chosen.to_vec()) };
        }
        check_cache(rows, cache.as_deref(), self.compute)?;
        let mut rising = chosen.to_vec();
        rising.sort_unstable();
        rising.dedup();
        let pass = self.pass(rows, adapters, None);
        let narrow = pass.narrowed(&rising, &self.config, &self.inv_freq);
        let StepBuffers { mut tape, mut work } = StepBuffers::default();
        let mut x = Vec::new();
        self.embed_into(&rows.tokens, &pass, &mut x)?;
        for index in 0..self.layers.len() {
            let layer = self.layer_pass(index, &pass).expect("not the portable form");
            let cache = cache.as_deref_mut().map(|cache| (cache, index));
            if index + 1 < self.layers.len() {
                layer.forward(&mut x, &mut tape, false, &mut work, cache)?;
            } else {
                let top = self.layer_pass(index, &narrow).expect("not the portable form");
                layer.forward_to((&top, &rising), &mut x, &mut tape, &mut work, cache)?;
            }
        }
        if chosen.is_empty() {
            return none();
        }
        let places = chosen.iter().map(|row| rising.partition_point(|other| other < row) as u32);
        picked(self.normed(x)?, places.collect())
    }

    /// The final norm of `x (rows, hidden_size)`.
    fn normed(&self, x: Vec<f32>) -> Result<Tensor> {
        let shape = (x.len() / self.config.hidden_size, self.config.hidden_size);
        self.final_norm(&Tensor::from_vec(x, shape, &Device::Cpu)?)
    }

    /// The modules an adapter can sit on, in the order of the forward pass: the token embedding, the
    /// linear layers, and the head.
    pub fn linears(&self) -> Vec<LinearSpec> {
        let (vocab_size, hidden_size) = (self.config.vocab_size, self.config.hidden_size);
        let more = |matrix: &FrozenMatrix| matrix.more_rows().map_or(0, FrozenMatrix::rows);
        let spec = |name: &str, in_features, out_features| LinearSpec {
            name: name.into(),
            in_features,
            out_features,
            embedding: name == EMBEDDING,
            added_tokens: match name {
                EMBEDDING => more(&self.embedding),
                HEAD => more(&self.head),
                _ => 0,
            },
        };
        let layers = self.layers.iter().flat_map(Layer::linears);
        let layers = layers.map(|l| spec(&l.name, l.cols(), l.rows()));
        [spec(EMBEDDING, vocab_size, hidden_size)]
            .into_iter()
            .chain(layers)
            .chain([spec(HEAD, hidden_size, vocab_size)])
            .collect()
    }

    /// The frozen weight of a module of [`Decoder::linears`]; a head that is the embedding has its.
    pub fn linear_weight(&self, module: &str) -> Option<Arc<FrozenMatrix>> {
        match module {
            EMBEDDING => Some(self.embedding.clone()),
            HEAD => Some(self.head.clone()),
            _ => {
                let mut linears = self.layers.iter().flat_map(Layer::linears);
                linears.find(|linear| linear.name == module)?.matrix().ok().cloned()
            }
        }
    }

    /// The lowest layer that a trainable adapter sits on, and where in it: nothing below needs a
    /// gradient.
    pub fn lowest_trainable(&self, adapters: Adapters) -> Option<(usize, LinearGroup)> {
        let trained = |linear: &Linear| {
            let mut trainable = adapters.iter().filter(|active| active.trainable);
            trainable.any(|active| active.adapter.modules.contains_key(&linear.name))
        };
        self.layers.iter().enumerate().find_map(|(index, layer)| {
            let group = layer.groups().iter().position(|linears| linears.iter().any(trained))?;
            Some((index, LinearGroup(group)))
        })
    }

    /// Bytes of all frozen matrices, where they lie.
    pub fn weight_bytes(&self) -> usize {
        let linears = self.layers.iter().flat_map(Layer::linears).flat_map(Linear::matrix);
        let mut all: Vec<&Arc<FrozenMatrix>> = linears.chain([&self.embedding]).collect();
        if !Arc::ptr_eq(&self.embedding, &self.head) {
            all.push(&self.head);
        }
        all.iter().map(|matrix| matrix.bytes().len()).sum()
    }

    /// Which kernel serves each kind of linear layer in a decoding step.
    pub fn decode_kernels(&self) -> BTreeMap<String, String> {
        self.kernels_by(|weight| self.compute.decode_kernel(weight.block_type()))
    }

    /// Which kernel serves each kind of linear layer, in training, scoring and reading a prompt.
    pub fn kernels(&self) -> BTreeMap<String, String> {
        self.kernels_by(|_| self.compute.linear_kernel())
    }

    fn kernels_by(&self, name: impl Fn(&FrozenMatrix) -> String) -> BTreeMap<String, String> {
        let linears = self.layers.iter().flat_map(Layer::linears).flat_map(Linear::matrix);
        let at = match self.device {
            Device::Cpu => "",
            Device::Cuda(_) => " on cuda",
            Device::Metal(_) => " on metal",
        };
        let kernel = |weight: &Arc<FrozenMatrix>| {
            (weight.block_type().to_string(), format!("{}{at}", name(weight)))
        };
        linears.chain([&self.head]).map(kernel).collect()
    }

    fn layer_with(
        &self,
        index: usize,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let (config, layer, compute) = (&self.config, &self.layers[index], self.compute);
        let layer = TensorLayerPass { config, layer, pass, compute };
        layer.forward(x, cache.map(|cache| (cache, index)))
    }
}

/// Fails if a cache was made for another form, or a row that goes on grows so long that it rotates
/// otherwise than what is cached of it.
fn check_cache(rows: &Rows, cache: Option<&KvCache>, compute: Compute) -> Result<()> {
    let Some(cache) = cache else { return Ok(()) };
    if !cache.is_of(compute) {
        candle_core::bail!(
            "the cache was made for a decoder of another form, compute is {compute} here: needed one \
             made for this decoder"
        );
    }
    for row in rows.segments.iter().filter(|row| !row.is_empty()) {
        let (seen, now) = (rows.positions[row.tokens.start] as usize, row.len());
        if seen > 0 && !cache.same_rope_scaling(seen, seen + now) {
            candle_core::bail!(
                "a row of {seen} cached tokens and {now} new ones: rows of that length rotate \
                 otherwise here, needed all of its tokens anew"
            );
        }
    }
    Ok(())
}
