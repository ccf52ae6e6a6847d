//! The maths of LoRA (Hu et al. 2021) and DoRA, and [`Adapter`]: the updates of a base by module.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Result, Tensor, Var};
use rayon::prelude::*;

use crate::base::BaseRows;
use crate::config::{CLASSIFIER, ConfigError, EMBEDDING, InitLoraWeights, LoraConfig, SCORE};
use crate::decode::{DecodeScalar, DecodeWeights, DecodeWeightsCache};
use crate::rng::Stream;
use crate::targets::{Target, TargetError};

/// The low-rank update of one linear layer: `ΔW = scale · B A`.
///
/// Weights derived from A, B and the magnitudes are cached for decoding. Whoever sets one of these
/// [`Var`]s must call [`Adapter::invalidate_decode_weights`] afterwards, or set it inside
/// [`Adapter::update_parameters`], which does.
#[derive(Debug, Clone)]
pub struct Lora {
    /// `A (r, in)` F32.
    pub a: Var,
    /// `B (out, r)` F32.
    pub b: Var,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
    pub scale: f64,
    /// DoRA's magnitudes; `None` for plain LoRA.
    pub magnitude: Option<Magnitude>,
    /// How many of the last ranks do not train. An update initialized from the base's weight (PiSSA,
    /// OLoRA) subtracts its initial value in these, so that `ΔW` starts at zero.
    pub frozen_ranks: usize,
    pub(crate) decode_cache: Arc<Mutex<DecodeWeightsCache>>,
}

/// DoRA's magnitudes (Liu et al. 2024): a trained length for each row of the merged weight,
/// `W' = m ⊙ (W + scale · B A) / ‖W + scale · B A‖`, with norms row by row that get no gradient.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// `m (out)` F32.
    pub vector: Var,
    norms: Arc<Mutex<RowNorms>>,
}

#[derive(Debug, Default)]
struct RowNorms {
    /// `‖W‖²` of each row, which never changes.
    base: Option<Arc<[f64]>>,
    /// `‖W + scale · B A‖` of each row, until A or B changes.
    merged: Option<Arc<[f32]>>,
}

impl Lora {
    /// A plain LoRA update: `A (r, in)`, `B (out, r)`, both F32.
    pub fn new(a: Var, b: Var, scale: f64) -> Self {
        Self { a, b, scale, magnitude: None, frozen_ranks: 0, decode_cache: Arc::default() }
    }

    /// The update's term of the layer's output: `scale · (mask ⊙ x) Aᵀ Bᵀ`.
    ///
    /// Shapes: `x (N, in)` F32, `mask (N, in)` F32 as [`Dropout::mask`] draws it → `(N, out)` F32.
    /// With `trainable`, gradients flow into A and B; without, only into `x`. Computed on the device of
    /// `x`, wherever A and B are.
    pub fn delta(&self, x: &Tensor, mask: Option<&Tensor>, trainable: bool) -> Result<Tensor> {
        let (a, b) = if trainable {
            (self.a.as_tensor().clone(), self.b.as_tensor().clone())
        } else {
            (self.a.as_detached_tensor(), self.b.as_detached_tensor())
        };
        let (a, b) = (a.to_device(x.device())?, b.to_device(x.device())?);
        let low = match mask {
            Some(mask) => (x * mask)?.matmul(&a.t()?)?, // (N, r)
            None => x.matmul(&a.t()?)?,
        };
        (low * self.scale)?.matmul(&b.t()?) // (N, out)
    }

    /// DoRA's `m / ‖·‖ ⊙ y`, of the output `y` of the merged weight without magnitudes; `y` itself for
    /// plain LoRA.
    ///
    /// Shapes: `y (N, out)` F32, `norms (out)` F32 on its device, from [`Self::row_norms`] →
    /// `(N, out)`. With `trainable`, gradients flow into the magnitudes; the norms get none.
    pub fn scaled(&self, y: &Tensor, norms: &Tensor, trainable: bool) -> Result<Tensor> {
        let Some(magnitude) = &self.magnitude else { return Ok(y.clone()) };
        let m = if trainable {
            magnitude.vector.as_tensor().clone()
        } else {
            magnitude.vector.as_detached_tensor()
        };
        y.broadcast_mul(&m.to_device(y.device())?.div(norms)?)
    }

    /// DoRA's `‖W + scale · B A‖` of each row, `(out)` F32; `None` for plain LoRA.
    ///
    /// Cached until [`Adapter::invalidate_decode_weights`]. Computed as
    /// `‖W‖² + 2 s Σ B ∘ (W Aᵀ) + s² Σ B ∘ (B A Aᵀ)`, without a merged weight in memory; sums over
    /// ranks are `f64`.
    pub fn row_norms(&self, base: &dyn BaseRows) -> Result<Option<Arc<[f32]>>> {
        let Some(magnitude) = &self.magnitude else { return Ok(None) };
        let known = {
            let norms = magnitude.norms();
            if norms.merged.is_some() {
                return Ok(norms.merged.clone());
            }
            norms.base.clone()
        };
        let (r, needed) = (self.r(), (self.out_features(), self.in_features()));
        if (base.rows(), base.cols()) != needed {
            let found = (base.rows(), base.cols());
            candle_core::bail!("an update of {needed:?} on a weight of {found:?}");
        }
        let a = self.a.as_detached_tensor().flatten_all()?.to_vec1::<f32>()?;
        let b = self.b.as_detached_tensor().flatten_all()?.to_vec1::<f32>()?;
        // Not under the lock: rayon may run another task on this thread that needs the same norms.
        let squares = merged_squares(base, (&a, &b, r), self.scale, known.as_deref());
        let (of_base, merged): (Vec<f64>, Vec<f32>) =
            squares.into_iter().map(|(w, all)| (w, all.max(0.0).sqrt() as f32)).unzip();
        let mut norms = magnitude.norms();
        norms.base.get_or_insert_with(|| of_base.into());
        norms.merged = Some(merged.into());
        Ok(norms.merged.clone())
    }

    /// DoRA's factor of each row of `W + scale · B A`: `m / ‖W + scale · B A‖ (out)`; `None` for plain
    /// LoRA.
    pub fn row_scales(&self, base: &dyn BaseRows) -> Result<Option<Vec<f32>>> {
        let (Some(norms), Some(magnitude)) = (self.row_norms(base)?, &self.magnitude) else {
            return Ok(None);
        };
        let m = magnitude.vector.as_detached_tensor().to_vec1::<f32>()?;
        Ok(Some(m.iter().zip(&*norms).map(|(m, norm)| m / norm).collect()))
    }

    /// The update in the layout that decode kernels read, cached until
    /// [`Adapter::invalidate_decode_weights`]. DoRA's factors are of the `base` of the first call: an
    /// adapter is used with one base only.
    pub fn decode_weights<T: DecodeScalar>(
        &self,
        base: &dyn BaseRows,
    ) -> Result<Arc<DecodeWeights<T>>> {
        let lock = || self.decode_cache.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut decode_cache = lock();
            if let Some(form) = T::slot(&mut decode_cache) {
                return Ok(form.clone());
            }
            let generation = decode_cache.generation;
            // Not under the lock: rayon may run another task on this thread that needs the same.
            drop(decode_cache);
            let made = DecodeWeights::new(self, self.row_scales(base)?)?;
            let mut decode_cache = lock();
            // Parameters that changed meanwhile are read again.
            if decode_cache.generation == generation {
                return Ok(T::slot(&mut decode_cache)
                    .get_or_insert_with(|| Arc::new(made))
                    .clone());
            }
        }
    }

    /// Rank of the update.
    pub fn r(&self) -> usize {
        self.a.dims()[0]
    }

    /// Columns of the layer's weight.
    pub fn in_features(&self) -> usize {
        self.a.dims()[1]
    }

    /// Rows of the layer's weight.
    pub fn out_features(&self) -> usize {
        self.b.dims()[0]
    }
}

/// Rows of the base that one task reads.
const ROWS: usize = 32;

/// `‖w‖²` and `‖w + scale · b A‖²` of each row w of the base.
fn merged_squares(
    base: &dyn BaseRows,
    (a, b, r): (&[f32], &[f32], usize),
    scale: f64,
    known: Option<&[f64]>,
) -> Vec<(f64, f64)> {
    let (rows, cols) = (base.rows(), base.cols());
    let a_row = |k: usize| &a[k * cols..(k + 1) * cols];
    let mut gram = vec![0f64; r * r]; // A Aᵀ
    for i in 0..r {
        for j in 0..=i {
            let product = dot(a_row(i), a_row(j));
            (gram[i * r + j], gram[j * r + i]) = (product, product);
        }
    }
    let chunk = |first: usize| -> Vec<(f64, f64)> {
        let chunk = first..(first + ROWS).min(rows);
        let mut w = vec![0f32; chunk.len() * cols];
        base.read(chunk.clone(), &mut w);
        let row = |(row, w): (usize, &[f32])| {
            let b = &b[row * r..(row + 1) * r];
            let of_base = known.map_or_else(|| dot(w, w), |known| known[row]);
            let (mut mixed, mut own) = (0f64, 0f64);
            for (k, &b_k) in b.iter().enumerate().filter(|(_, b)| **b != 0.0) {
                mixed += f64::from(b_k) * dot(w, a_row(k));
                let through = gram[k * r..].iter().zip(b).map(|(g, b)| g * f64::from(*b));
                own += f64::from(b_k) * through.sum::<f64>();
            }
            (of_base, of_base + 2.0 * scale * mixed + scale * scale * own)
        };
        chunk.zip(w.chunks_exact(cols)).map(row).collect()
    };
    let firsts: Vec<usize> = (0..rows).step_by(ROWS).collect();
    firsts.into_par_iter().flat_map_iter(chunk).collect()
}

/// `Σ x y`, summed in f32 over chunks of 256 and in f64 over the chunks.
fn dot(x: &[f32], y: &[f32]) -> f64 {
    let part = |(x, y): (&[f32], &[f32])| {
        let mut sums = [0f32; 16];
        let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<16>(), y.as_chunks::<16>());
        for (x, y) in x.iter().zip(y) {
            for i in 0..16 {
                sums[i] += x[i] * y[i];
            }
        }
        let rest: f32 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
        f64::from(sums.iter().sum::<f32>() + rest)
    };
    x.chunks(256).zip(y.chunks(256)).map(part).sum()
}

impl Magnitude {
    /// Magnitudes `(out)` F32, without cached norms.
    pub fn new(vector: Var) -> Self {
        Self { vector, norms: Arc::default() }
    }

    fn norms(&self) -> MutexGuard<'_, RowNorms> {
        self.norms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Identity of a token in the data set, independent of its place in a batch: the key of its dropout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenKey {
    /// The epoch.
    pub epoch: u64,
    /// The row of the data set.
    pub row: u64,
    /// The token's position in its row.
    pub position: u64,
}

/// LoRA's dropout, with random numbers keyed by token and module: packing, the split into
/// micro-batches, recomputation and a resumed run see the same mask.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Probability in `[0, 1)` that an input of A is dropped.
    pub p: f64,
    /// The run's seed.
    pub seed: u64,
    /// The token of each row of activations.
    pub keys: Arc<Vec<TokenKey>>,
}

impl Dropout {
    /// The mask `(N, in)` F32 for the input of A of `module`, one row for each key: 0 with probability
    /// p, else `1 / (1 - p)`.
    pub fn mask(&self, module: &str, in_features: usize, device: &Device) -> Result<Tensor> {
        let mut mask = vec![0f32; self.keys.len() * in_features];
        self.draw(module, 0..self.keys.len(), &mut mask);
        Tensor::from_vec(mask, (self.keys.len(), in_features), device)
    }

    /// Writes [`Self::mask`] of some rows into a buffer `(rows, in)`.
    pub fn draw(&self, module: &str, rows: Range<usize>, mask: &mut [f32]) {
        let module = Stream::new(0, module, &[]).next_u64();
        let kept = (1.0 / (1.0 - self.p)) as f32;
        let below = (self.p * 2f64.powi(32)) as u32;
        let keys = &self.keys[rows];
        // An empty layer has no chunks to iterate, and chunks of size 0 panic.
        let width = (mask.len() / keys.len().max(1)).max(1);
        mask.par_chunks_mut(width).zip(keys).for_each(|(row, key)| {
            let index = [key.epoch, key.row, key.position, module];
            let mut stream = Stream::new(self.seed, "dropout", &index);
            for pair in row.chunks_mut(2) {
                let bits = stream.next_u64();
                for (value, bits) in pair.iter_mut().zip([bits as u32, (bits >> 32) as u32]) {
                    *value = if bits < below { 0.0 } else { kept };
                }
            }
        });
    }
}

/// Why an adapter could not be initialized.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// An initialization that is not implemented: such adapters can only be read from a file.
    #[error("init_lora_weights {0:?} is only supported in adapters that are read from a file")]
    Undrawable(String),
    /// An initialization from the base's weights, which [`Adapter::new`] does not have.
    #[error("{0} needs the weights of the base")]
    NeedsBaseWeights(String),
    /// The config is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The config does not fit the base.
    #[error(transparent)]
    Targets(#[from] TargetError),
    /// The settings or the base's weights do not suit the initialization.
    #[error("{0}")]
    Unsuitable(String),
    /// A weight that cannot be decomposed.
    #[error("{0}: the decomposition of its weight does not converge")]
    NotConverged(String),
    /// candle could not create a tensor.
    #[error("tensors of a new adapter: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// Low-rank updates, and other trained tensors, for one base.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its name in messages.
    pub name: String,
    /// PEFT's config.
    pub config: LoraConfig,
    /// The updates by module path, like `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, Lora>,
    /// The score head `(1, hidden_size)` F32 of reward and value models: PEFT's `score` in
    /// `modules_to_save`.
    pub score: Option<Var>,
    /// Other modules trained as a whole, by module path: `model.embed_tokens` and `lm_head`
    /// `(vocab_size, hidden_size)` F32.
    pub saved: BTreeMap<String, Var>,
    /// Rows of the token embedding that replace those of the base.
    pub tokens: Option<TokenRows>,
    /// Rows of the head that replace those of the base.
    pub head_tokens: Option<TokenRows>,
}

/// Rows of the token embedding or of the head that replace those of the base: PEFT's
/// `trainable_token_indices`.
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// The tokens, in ascending order.
    pub indices: Vec<u32>,
    /// Their rows `(tokens, hidden_size)` F32.
    pub rows: Var,
}

impl TokenRows {
    fn copy(&self) -> Result<Self> {
        let rows = Var::from_tensor(&self.rows.as_detached_tensor().copy()?)?;
        Ok(Self { indices: self.indices.clone(), rows })
    }
}

impl Adapter {
    /// A new adapter on `targets`, initialized by `config.init_lora_weights` where that needs no weights
    /// of the base ([`crate::initialize::begin`] handles those that do).
    ///
    /// Random numbers are keyed by module path: the values of a module do not depend on which other
    /// modules are targets.
    ///
    /// # Errors
    /// If the initialization or DoRA needs the base's weights.
    pub fn new(
        name: &str,
        config: LoraConfig,
        targets: &[Target],
        seed: u64,
        device: &Device,
    ) -> std::result::Result<Self, InitError> {
        if config.use_dora {
            return Err(InitError::NeedsBaseWeights("use_dora".into()));
        }
        let mut modules = BTreeMap::new();
        for target in targets {
            let lora = init_random(&config.init_lora_weights, target, seed, device)?;
            modules.insert(target.spec.name.clone(), lora);
        }
        Ok(Self {
            name: name.into(),
            config,
            modules,
            score: None,
            saved: BTreeMap::new(),
            tokens: None,
            head_tokens: None,
        })
    }

    /// The rows of the head that the adapter replaces, with the key of their gradients in
    /// [`Self::parameter_indices`]: its rows of the head, or, where the head is the embedding (`tied`), its
    /// rows of the embedding.
    pub fn head_rows(&self, tied: bool) -> Option<(&TokenRows, &'static str)> {
        match (&self.head_tokens, &self.tokens) {
            (Some(rows), _) => Some((rows, HEAD_TOKEN_ROWS)),
            (None, Some(rows)) if tied => Some((rows, TOKEN_ROWS)),
            (None, _) => None,
        }
    }

    /// Adds a score head `(1, hidden_size)`, and sets the config's `task_type` to `SEQ_CLS`. The head is
    /// normal with standard deviation `1 / sqrt(hidden_size + 1)` (Stiennon et al. 2020), or zero.
    pub fn add_score(&mut self, hidden_size: usize, zero: bool, seed: u64) -> Result<()> {
        let mut stream = Stream::new(seed, "score", &[]);
        let deviation = if zero { 0.0 } else { 1.0 / ((hidden_size + 1) as f32).sqrt() };
        let values: Vec<f32> = (0..hidden_size).map(|_| stream.normal() * deviation).collect();
        self.score = Some(Var::from_vec(values, (1, hidden_size), &Device::Cpu)?);
        self.config.task_type = Some("SEQ_CLS".into());
        self.config.modules_to_save.retain(|module| ![SCORE, CLASSIFIER].contains(&&**module));
        self.config.modules_to_save.push(SCORE.into());
        Ok(())
    }

    /// Removes the score head, and sets the config's `task_type` to `CAUSAL_LM`.
    pub fn remove_score(&mut self) {
        self.score = None;
        self.config.task_type = Some("CAUSAL_LM".into());
        self.config.modules_to_save.retain(|module| ![SCORE, CLASSIFIER].contains(&&**module));
    }

    /// A deep copy under another name: its tensors are independent of these.
    pub fn copy(&self, name: &str) -> Result<Self> {
        let var = |var: &Var| Var::from_tensor(&var.as_detached_tensor().copy()?);
        let copied = |(module, lora): (&String, &Lora)| {
            let magnitude = lora.magnitude.as_ref().map(|m| var(&m.vector).map(Magnitude::new));
            let lora = Lora {
                a: var(&lora.a)?,
                b: var(&lora.b)?,
                scale: lora.scale,
                magnitude: magnitude.transpose()?,
                frozen_ranks: lora.frozen_ranks,
                decode_cache: Arc::default(),
            };
            Ok((module.clone(), lora))
        };
        Ok(Self {
            name: name.into(),
            config: self.config.clone(),
            modules: self.modules.iter().map(copied).collect::<Result<_>>()?,
            score: self.score.as_ref().map(var).transpose()?,
            saved: self
                .saved
                .iter()
                .map(|(module, weight)| var(weight).map(|weight| (module.clone(), weight)))
                .collect::<Result<_>>()?,
            tokens: self.tokens.as_ref().map(TokenRows::copy).transpose()?,
            head_tokens: self.head_tokens.as_ref().map(TokenRows::copy).transpose()?,
        })
    }

    /// All tensors under PEFT's names: A, B and magnitudes of each module, sorted by module path; then
    /// modules trained as a whole, token rows, and the score head. Optimizer states and checkpoints have
    /// the same order.
    ///
    /// Call [`Self::invalidate_decode_weights`] after setting one of them, or set them inside
    /// [`Self::update_parameters`].
    pub fn parameters(&self) -> Vec<(String, Var)> {
        let mut all = Vec::new();
        for (module, lora) in &self.modules {
            all.push((tensor_name(module, 'A'), lora.a.clone()));
            all.push((tensor_name(module, 'B'), lora.b.clone()));
            if let Some(magnitude) = &lora.magnitude {
                all.push((magnitude_name(module), magnitude.vector.clone()));
            }
        }
        all.extend(self.saved.iter().map(|(module, var)| (saved_name(module), var.clone())));
        for (rows, module) in [(&self.tokens, TOKEN_ROWS), (&self.head_tokens, HEAD_TOKEN_ROWS)] {
            all.extend(rows.iter().map(|own| (token_rows_name(module), own.rows.clone())));
        }
        all.extend(self.score.iter().map(|score| (score_name(), score.clone())));
        all
    }

    /// Number of trainable parameters: all but the frozen ranks.
    pub fn num_parameters(&self) -> usize {
        let all: usize = self.parameters().iter().map(|(_, var)| var.elem_count()).sum();
        let held = |lora: &Lora| lora.frozen_ranks * (lora.in_features() + lora.out_features());
        all - self.modules.values().map(held).sum::<usize>()
    }

    /// Index into [`Self::parameters`] of A of each module (B is the next, the magnitudes the one after
    /// it), of each module trained as a whole, and of [`TOKEN_ROWS`] and [`HEAD_TOKEN_ROWS`].
    pub fn parameter_indices(&self) -> HashMap<String, usize> {
        let updates = self.modules.iter();
        let updates =
            updates.map(|(module, lora)| (module, if lora.magnitude.is_some() { 3 } else { 2 }));
        let wholes = self.saved.keys().map(|module| (module, 1));
        let names = [TOKEN_ROWS, HEAD_TOKEN_ROWS].map(String::from);
        let tokens = self.tokens.iter().map(|_| (&names[0], 1));
        let tokens = tokens.chain(self.head_tokens.iter().map(|_| (&names[1], 1)));
        let mut at = 0;
        let place = |(module, parameters): (&String, usize)| {
            let place = at;
            at += parameters;
            (module.clone(), place)
        };
        updates.chain(wholes).chain(tokens).map(place).collect()
    }

    /// Zeroes the gradients of frozen ranks; `gradients` has the order of [`Self::parameters`].
    pub fn mask_frozen_ranks(&self, gradients: &mut [Vec<f32>]) {
        let places = self.parameter_indices();
        for (module, lora) in self.modules.iter().filter(|(_, lora)| lora.frozen_ranks > 0) {
            let (place, trained) = (places[module], lora.r() - lora.frozen_ranks);
            gradients[place][trained * lora.in_features()..].fill(0.0);
            for row in gradients[place + 1].chunks_exact_mut(lora.r()) {
                row[trained..].fill(0.0);
            }
        }
    }

    /// A copy of the frozen ranks by module: the last rows of A and columns of B.
    pub fn frozen_ranks(&self) -> Result<Vec<(String, [Tensor; 2])>> {
        let held = self.modules.iter().filter(|(_, lora)| lora.frozen_ranks > 0);
        let copy = |(module, lora): (&String, &Lora)| {
            let first = lora.r() - lora.frozen_ranks;
            let a = lora.a.as_detached_tensor().narrow(0, first, lora.frozen_ranks)?.copy()?;
            let b = lora.b.as_detached_tensor().narrow(1, first, lora.frozen_ranks)?.copy()?;
            Ok((module.clone(), [a, b]))
        };
        held.map(copy).collect()
    }

    /// Restores what [`Self::frozen_ranks`] copied, after an optimizer step whose weight decay changed
    /// frozen ranks too. Invalidates the decode weights.
    pub fn restore_frozen_ranks(&self, held: &[(String, [Tensor; 2])]) -> Result<()> {
        for (module, [held_a, held_b]) in held {
            let lora = &self.modules[module];
            let trained = lora.r() - lora.frozen_ranks;
            let a = lora.a.as_detached_tensor().narrow(0, 0, trained)?.copy()?;
            let b = lora.b.as_detached_tensor().narrow(1, 0, trained)?.copy()?;
            lora.a.set(&Tensor::cat(&[&a, held_a], 0)?)?;
            lora.b.set(&Tensor::cat(&[&b, held_b], 1)?.contiguous()?)?;
        }
        if !held.is_empty() {
            self.invalidate_decode_weights();
        }
        Ok(())
    }

    /// Runs `change`, which may set the parameters, and invalidates what is cached of them, whether it
    /// succeeds or not.
    pub fn update_parameters<T>(&self, change: impl FnOnce(&[(String, Var)]) -> T) -> T {
        /// Invalidates on drop, and so after a panic too.
        struct Invalidate<'a>(&'a Adapter);
        impl Drop for Invalidate<'_> {
            fn drop(&mut self) {
                self.0.invalidate_decode_weights();
            }
        }
        let _invalidate = Invalidate(self);
        change(&self.parameters())
    }

    /// Freezes the ranks that an adapter has frozen which began with `init`: a file does not record
    /// them.
    pub fn freeze_ranks(&mut self, init: &InitLoraWeights) {
        for lora in self.modules.values_mut() {
            lora.frozen_ranks = if init.freezes_ranks() { lora.r() / 2 } else { 0 };
        }
    }

    /// Drops what is cached of the parameters (decode weights, DoRA's norms), and marks decode weights in
    /// use elsewhere as stale. Must be called after a parameter was set outside of
    /// [`Self::update_parameters`]: a [`Var`] does not report that it was set, and decoding would continue
    /// with the old values.
    pub fn invalidate_decode_weights(&self) {
        for lora in self.modules.values() {
            lora.decode_cache.lock().unwrap_or_else(PoisonError::into_inner).invalidate();
        }
        for magnitude in self.modules.values().filter_map(|lora| lora.magnitude.as_ref()) {
            magnitude.norms().merged = None;
        }
    }
}

/// A new update with PEFT's random initialization.
pub(crate) fn init_random(
    init: &InitLoraWeights,
    Target { spec, r, scale }: &Target,
    seed: u64,
    device: &Device,
) -> std::result::Result<Lora, InitError> {
    let (of_in, out) = (spec.in_features, spec.out_features);
    let draw = |factor: &str, count: usize, one: &dyn Fn(&mut Stream) -> f32| -> Vec<f32> {
        let mut stream = Stream::new(seed, &format!("lora_{factor} {}", spec.name), &[]);
        (0..count).map(|_| one(&mut stream)).collect()
    };
    // kaiming_uniform with a = sqrt(5): bound sqrt(6 / ((1 + 5) fan_in)).
    let linear = |fan_in: usize| {
        move |stream: &mut Stream| (2.0 * stream.uniform() - 1.0) / (fan_in as f32).sqrt()
    };
    let (a, b) = match init {
        InitLoraWeights::Random if spec.embedding => {
            (draw("A", r * of_in, &Stream::normal), draw("B", out * r, &Stream::normal))
        }
        InitLoraWeights::KaimingUniform | InitLoraWeights::Gaussian if spec.embedding => {
            (vec![0.0; r * of_in], draw("B", out * r, &Stream::normal))
        }
        InitLoraWeights::KaimingUniform => {
            (draw("A", r * of_in, &linear(of_in)), vec![0.0; out * r])
        }
        InitLoraWeights::Random => {
            (draw("A", r * of_in, &linear(of_in)), draw("B", out * r, &linear(*r)))
        }
        InitLoraWeights::Gaussian => {
            let normal = |stream: &mut Stream| stream.normal() / *r as f32;
            (draw("A", r * of_in, &normal), vec![0.0; out * r])
        }
        InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora | InitLoraWeights::Loftq => {
            return Err(InitError::NeedsBaseWeights(format!("init_lora_weights {init}")));
        }
        InitLoraWeights::Stored(init) => return Err(InitError::Undrawable(init.clone())),
    };
    let a = Var::from_vec(a, (*r, of_in), device)?;
    let b = Var::from_vec(b, (out, *r), device)?;
    Ok(Lora::new(a, b, *scale))
}

/// PEFT's name of the score head.
pub(crate) fn score_name() -> String {
    format!("base_model.model.{SCORE}.weight")
}

/// PEFT's name of DoRA's magnitudes of a module.
pub(crate) fn magnitude_name(module: &str) -> String {
    format!("base_model.model.{module}.lora_magnitude_vector")
}

/// PEFT's name of a module trained as a whole.
pub(crate) fn saved_name(module: &str) -> String {
    format!("base_model.model.{module}.weight")
}

/// PEFT's module of token rows of the embedding.
pub const TOKEN_ROWS: &str = "model.embed_tokens.token_adapter";
/// PEFT's module of token rows of the head.
pub const HEAD_TOKEN_ROWS: &str = "lm_head.token_adapter";

/// PEFT's name of token rows.
pub(crate) fn token_rows_name(module: &str) -> String {
    format!("base_model.model.{module}.trainable_tokens_delta")
}

/// PEFT's name of A or B of a module; for an embedding they are parameters, not linear layers.
pub(crate) fn tensor_name(module: &str, factor: char) -> String {
    if module == EMBEDDING {
        format!("base_model.model.{module}.lora_embedding_{factor}")
    } else {
        format!("base_model.model.{module}.lora_{factor}.weight")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::targets::LinearSpec;

    fn target(name: &str, r: usize) -> Target {
        let (name, embedding, added_tokens) = (name.into(), false, 0);
        let spec = LinearSpec { name, in_features: 60, out_features: 50, embedding, added_tokens };
        Target { spec, r, scale: 0.5 }
    }

    fn initialized(init: InitLoraWeights, targets: &[Target]) -> Adapter {
        let config = LoraConfig { init_lora_weights: init, ..LoraConfig::default() };
        Adapter::new("test", config, targets, 7, &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn gradients_match_finite_differences() {
        let draw = |purpose, rows, cols| {
            let mut stream = Stream::new(3, purpose, &[]);
            let values: Vec<f32> = (0..rows * cols).map(|_| stream.normal()).collect();
            Var::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
        };
        let (x, weight) = (draw("x", 4, 5), draw("weight", 4, 3));
        let lora = Lora::new(draw("a", 2, 5), draw("b", 3, 2), 0.75);
        let key = |position| TokenKey { epoch: 0, row: 0, position };
        let keys = Arc::new((0..4).map(key).collect());
        let mask = Dropout { p: 0.3, seed: 1, keys }.mask("m", 5, &Device::Cpu).unwrap();
        for mask in [None, Some(&mask)] {
            let loss =
                || (lora.delta(&x, mask, true).unwrap() * &*weight).unwrap().sum_all().unwrap();
            let grads = loss().backward().unwrap();
            for var in [&lora.a, &lora.b, &x] {
                let original = var.copy().unwrap();
                let grad = grads.get(var).unwrap();
                for at in 0..var.elem_count() {
                    let moved = |step: f32| {
                        let mut values = values(&original);
                        values[at] += step;
                        let moved = Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap();
                        var.set(&moved).unwrap();
                        loss().to_scalar::<f32>().unwrap()
                    };
                    // The loss is linear in each single number: only rounding is between them.
                    let numeric = (moved(0.5) - moved(-0.5)) / 1.0;
                    let exact = values(grad)[at];
                    assert!((numeric - exact).abs() < 1e-4, "{at}: {numeric} and {exact}");
                }
                var.set(&original).unwrap();
            }
        }
    }

    #[test]
    fn update_parameters_invalidates_decode_weights() {
        /// Rows of a base's weight that plain LoRA does not read.
        struct Zeros;
        impl BaseRows for Zeros {
            fn rows(&self) -> usize {
                50
            }
            fn cols(&self) -> usize {
                60
            }
            fn read(&self, _: Range<usize>, out: &mut [f32]) {
                out.fill(0.0);
            }
        }
        let adapter = initialized(InitLoraWeights::Random, &[target("m", 4)]);
        let decode_weights = || adapter.modules["m"].decode_weights::<f32>(&Zeros).unwrap();
        let before = decode_weights();
        assert!(Arc::ptr_eq(&before, &decode_weights()));
        let doubled = adapter.update_parameters(|parameters| {
            let (_, a) = &parameters[0];
            a.set(&(a.as_detached_tensor() * 2.0)?)
        });
        doubled.unwrap();
        assert!(!before.is_current());
        assert_eq!(decode_weights().a[0], 2.0 * before.a[0]);
    }

    #[test]
    fn frozen_delta_records_no_gradient() {
        let adapter = initialized(InitLoraWeights::Random, &[target("m", 4)]);
        let x = Tensor::ones((3, 60), candle_core::DType::F32, &Device::Cpu).unwrap();
        let frozen = adapter.modules["m"].delta(&x, None, false).unwrap();
        let trained = adapter.modules["m"].delta(&x, None, true).unwrap();
        assert!(!frozen.track_op() && trained.track_op());
        assert_eq!(values(&frozen), values(&trained));
    }

    #[test]
    fn initialization_matches_peft_and_is_keyed_by_module() {
        let targets = [target("one", 4), target("two", 8)];
        let stats = |var: &Var| {
            let values = values(var);
            let n = values.len() as f32;
            let deviation = (values.iter().map(|v| v * v).sum::<f32>() / n).sqrt();
            (values.iter().fold(0f32, |m, v| m.max(v.abs())), deviation)
        };
        let within = |(max, deviation): (f32, f32), bound: f32| {
            assert!(max <= bound && max > 0.95 * bound, "{max} of {bound}");
            let uniform = bound / 3f32.sqrt();
            assert!((deviation / uniform - 1.0).abs() < 0.1, "{deviation} of {uniform}");
        };
        let kaiming = initialized(InitLoraWeights::KaimingUniform, &targets);
        within(stats(&kaiming.modules["two"].a), 60f32.powf(-0.5));
        assert_eq!(stats(&kaiming.modules["two"].b).0, 0.0);
        let random = initialized(InitLoraWeights::Random, &targets);
        within(stats(&random.modules["two"].a), 60f32.powf(-0.5));
        within(stats(&random.modules["two"].b), 8f32.powf(-0.5));
        let gaussian = initialized(InitLoraWeights::Gaussian, &targets);
        let (_, deviation) = stats(&gaussian.modules["two"].a);
        assert!((deviation * 8.0 - 1.0).abs() < 0.1, "{deviation}");
        assert_eq!(stats(&gaussian.modules["two"].b).0, 0.0);

        let alone = initialized(InitLoraWeights::Random, &targets[1..]);
        assert_eq!(values(&alone.modules["two"].b), values(&random.modules["two"].b));
        assert_ne!(values(&random.modules["one"].a)[..9], values(&random.modules["two"].a)[..9]);

        let names: Vec<_> = random.parameters().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names[0], "base_model.model.one.lora_A.weight");
        assert_eq!(names[3], "base_model.model.two.lora_B.weight");
        assert_eq!(random.num_parameters(), (4 + 8) * (60 + 50));

        let eva = LoraConfig {
            init_lora_weights: InitLoraWeights::Stored("eva".into()),
            ..LoraConfig::default()
        };
        let error = Adapter::new("test", eva, &targets, 7, &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("\"eva\""), "{error}");
    }

    #[test]
    fn dropout_mask_is_keyed_by_token() {
        let keys: Vec<TokenKey> =
            (0..40).map(|i| TokenKey { epoch: 1, row: i / 10, position: i % 10 }).collect();
        let draw = |keys: &[TokenKey], seed, module: &str, p| {
            let dropout = Dropout { p, seed, keys: Arc::new(keys.to_vec()) };
            dropout.mask(module, 513, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap()
        };
        let whole = draw(&keys, 5, "m", 0.1);
        let split = [draw(&keys[..13], 5, "m", 0.1), draw(&keys[13..], 5, "m", 0.1)].concat();
        assert_eq!(whole, split);
        let mut shuffled = keys.clone();
        shuffled.reverse();
        let mut back = draw(&shuffled, 5, "m", 0.1);
        back.reverse();
        assert_eq!(whole, back);

        let next_epoch: Vec<_> = keys.iter().map(|k| TokenKey { epoch: 2, ..*k }).collect();
        for other in
            [draw(&keys, 6, "m", 0.1), draw(&keys, 5, "n", 0.1), draw(&next_epoch, 5, "m", 0.1)]
        {
            // Independent masks drop the same input with probability p².
            let both = whole.iter().flatten().zip(other.iter().flatten());
            let both = both.filter(|(a, b)| **a == 0.0 && **b == 0.0).count();
            assert!((both as f64 / (40.0 * 513.0) - 0.01).abs() < 0.004, "{both}");
        }
        for p in [0.0, 0.1, 0.5, 0.9] {
            let mask = draw(&keys, 5, "m", p);
            let kept = (1.0 / (1.0 - p)) as f32;
            assert!(mask.iter().flatten().all(|&v| v == 0.0 || v == kept));
            let mean = mask.iter().flatten().map(|&v| f64::from(v)).sum::<f64>() / (40.0 * 513.0);
            assert!((mean - 1.0).abs() < 0.06, "p {p}: mean {mean}");
        }
    }
}
