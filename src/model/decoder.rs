//! The decoder over frozen weights: embedding, layers, final norm and head.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use quantune_adapters::config::{EMBEDDING, HEAD};
use quantune_adapters::delta::Dropout;
use quantune_adapters::targets::LinearSpec;

use super::adapters::{ActiveAdapter, Adapters};
use super::cache::TensorCache;
use super::config::Config;
use super::embedding::{Embedding, adapts_embedding};
use super::gradients::GradientBuffers;
use super::layer::LayerPass;
use super::layer::reference::TensorLayerPass;
use super::layers::{Layer, Linear, LinearGroup};
use super::lm_head::{AdaptedHead, LmHead};
use super::observe::InputSquares;
use super::pass::{Pass, Rows};
use crate::ops::{Compute, DeviceMatrix, rms_norm};
use crate::quant::FrozenMatrix;

/// A decoder over frozen weights. It is immutable; adapters are arguments of its functions.
///
/// ```
/// use quantune::model::{Adapters, Decoder, Rows};
/// use quantune::ops::Compute;
/// use quantune::weights::Checkpoint;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let checkpoint = Checkpoint::open("tests/golden/model/llama-tiny")?; // or a GGUF file
/// let decoder = Decoder::load(&checkpoint, Compute::INT16)?;
/// let hidden = decoder.hidden(&Rows::new(&[[1u32, 5, 9, 3]]), Adapters::NONE)?; // (4, hidden_size)
/// let logits = decoder.logits(&hidden, Adapters::NONE)?; // (4, vocab_size)
/// assert_eq!(logits.dims(), [4, decoder.config.vocab_size]);
/// # Ok(())
/// # }
/// ```
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
    /// The same decoder with copies of its weights as tensors on a device, where candle's operations
    /// then compute.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub(super) fn upload(mut self, device: &Device) -> Result<Self> {
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

    /// The device of its passes.
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

    pub(super) fn lm_head(&self) -> LmHead<'_> {
        let Self { head: weight, config, compute, device, .. } = self;
        let uploaded = self.uploaded_head.as_ref();
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
        sink: &mut GradientBuffers,
    ) -> Result<()> {
        self.embedding().backward(tokens, pass, dx, sink)
    }

    /// Whether a trainable adapter changes the embedding, so that gradients must reach it.
    pub(crate) fn trains_embedding(&self, adapters: Adapters) -> bool {
        adapters.iter().any(|active| active.trainable && adapts_embedding(&active.adapter))
    }

    /// The head with adapters; `None` if they do not change it.
    pub(crate) fn adapted_head<'a>(
        &'a self,
        active: &'a [ActiveAdapter],
    ) -> Result<Option<AdaptedHead<'a>>> {
        self.lm_head().adapted(active)
    }

    /// One layer of a pass of the CPU backend.
    pub(super) fn layer_pass<'a>(&'a self, index: usize, pass: &'a Pass) -> LayerPass<'a> {
        LayerPass::new(&self.config, &self.layers[index], pass, self.compute.precision)
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

    /// The pass over some of the tokens only, in ascending order, after attention over all.
    pub(super) fn narrowed<'a>(&self, pass: &Pass<'a>, chosen: &[u32]) -> Pass<'a> {
        pass.narrowed(chosen, &self.config, &self.inv_freq)
    }

    /// Runs rows through all layers and adds what goes into each linear layer to `squares`.
    pub fn observe(&self, rows: &Rows, adapters: Adapters, squares: &InputSquares) -> Result<()> {
        let mut pass = self.pass(rows, adapters, None);
        pass.squares = Some(squares);
        let mut x = self.embed(&rows.tokens, &pass)?;
        for index in 0..self.config.num_hidden_layers {
            x = self.layer(index, &x, &pass)?.detach();
        }
        Ok(())
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

    /// The lowest layer with a trainable adapter, and its group in it: nothing below needs a
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

    /// Bytes of all frozen matrices.
    pub fn weight_bytes(&self) -> usize {
        let linears = self.layers.iter().flat_map(Layer::linears).flat_map(Linear::matrix);
        let mut all: Vec<&Arc<FrozenMatrix>> = linears.chain([&self.embedding]).collect();
        if !Arc::ptr_eq(&self.embedding, &self.head) {
            all.push(&self.head);
        }
        all.iter().map(|matrix| matrix.bytes().len()).sum()
    }

    /// The kernel of each type of linear layer in a decode step.
    pub fn decode_kernels(&self) -> BTreeMap<String, String> {
        self.kernels_by(|weight| self.compute.decode_kernel(weight.block_type()))
    }

    /// The kernel of each type of linear layer in training, scoring and prefill.
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

    pub(super) fn layer_with(
        &self,
        index: usize,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut TensorCache>,
    ) -> Result<Tensor> {
        let (config, layer, compute) = (&self.config, &self.layers[index], self.compute);
        let layer = TensorLayerPass { config, layer, pass, compute };
        layer.forward(x, cache.map(|cache| (cache, index)))
    }
}
