//! The maths of LoRA (Hu et al. 2021), and an adapter: the updates of a base by module.

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
#[derive(Debug, Clone)]
pub struct Lora {
    /// `A (r, in)` F32.
    pub a: Var,
    /// `B (out, r)` F32.
    pub b: Var,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
    pub scale: f64,
    /// DoRA's magnitudes, of updates that have them.
    pub magnitude: Option<Magnitude>,
    /// Of the r, how many, the last ones, stay as they began. An update that begins with numbers of
    /// the base's own (PiSSA, OLoRA) takes them off again in these, so that it begins as nothing.
    pub frozen_ranks: usize,
    pub(crate) decode_cache: Arc<Mutex<DecodeWeightsCache>>,
}

/// What DoRA (Liu et al. 2024) makes of a merged weight: each of its rows gets a length of its own,
/// `W' = m ⊙ (W + scale · B A) / ‖W + scale · B A‖`, the norms row by row and no part of the tape.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// `m (out)` F32.
    pub vector: Var,
    norms: Arc<Mutex<RowNorms>>,
}

#[derive(Debug, Default)]
struct RowNorms {
    /// `‖W‖²` of each row: the base stays as it is.
    base: Option<Arc<[f64]>>,
    /// `‖W + scale · B A‖` of each row, until A or B change.
    merged: Option<Arc<[f32]>>,
}

impl Lora {
    /// A plain update.
    pub fn new(a: Var, b: Var, scale: f64) -> Self {
        Self { a, b, scale, magnitude: None, frozen_ranks: 0, decode_cache: Arc::default() }
    }

    /// What the update adds to the layer's output: `scale · (mask ⊙ x) Aᵀ Bᵀ`.
    ///
    /// Shapes: `x (N, in)` F32, `mask (N, in)` F32 as [`Dropout::mask`] draws it → `(N, out)` F32.
    /// With `trainable` the result depends on A and B on the tape; without, it records nothing
    /// that `x` does not record itself. It is computed on the device of `x`, wherever A and B are.
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

    /// DoRA's `m / ‖·‖ ⊙ y` of what the merged weight without magnitudes makes of the layer's input.
    ///
    /// Shapes: `y (N, out)` F32, `norms (out)` F32 on its device, as [`Self::row_norms`] gives them →
    /// `(N, out)`. With
    /// `trainable` the magnitudes are on the tape; the norms never are. Without magnitudes it is y.
    pub fn scaled(&self, y: &Tensor, norms: &Tensor, trainable: bool) -> Result<Tensor> {
        let Some(magnitude) = &self.magnitude else { return Ok(y.clone()) };
        let m = match trainable {
            true => magnitude.vector.as_tensor().clone(),
            false => magnitude.vector.as_detached_tensor(),
        };
        y.broadcast_mul(&m.to_device(y.device())?.div(norms)?)
    }

    /// DoRA's `‖W + scale · B A‖` of each row, `(out)`; nothing without magnitudes.
    ///
    /// They are kept until [`Adapter::changed`]. By `‖W‖² + 2 s Σ B ∘ (W Aᵀ) + s² Σ B ∘ (B A Aᵀ)` no
    /// merged weight is made; the sums over ranks are `f64`.
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
        // Unlocked: a thread that waits for its part may take up other work that asks for the same.
        let squares = merged_squares(base, (&a, &b, r), self.scale, known.as_deref());
        let (of_base, merged): (Vec<f64>, Vec<f32>) =
            squares.into_iter().map(|(w, all)| (w, all.max(0.0).sqrt() as f32)).unzip();
        let mut norms = magnitude.norms();
        norms.base.get_or_insert_with(|| of_base.into());
        norms.merged = Some(merged.into());
        Ok(norms.merged.clone())
    }

    /// What DoRA multiplies the rows of `W + scale · B A` with, `m / ‖W + scale · B A‖ (out)`; nothing
    /// without magnitudes.
    pub fn row_scales(&self, base: &dyn BaseRows) -> Result<Option<Vec<f32>>> {
        let (Some(norms), Some(magnitude)) = (self.row_norms(base)?, &self.magnitude) else {
            return Ok(None);
        };
        let m = magnitude.vector.as_detached_tensor().to_vec1::<f32>()?;
        Ok(Some(m.iter().zip(&*norms).map(|(m, norm)| m / norm).collect()))
    }

    /// The update as decoding reads it, on a base's weight: with magnitudes, on that which is asked for
    /// first, for an adapter is of one base. It is kept until [`Adapter::changed`].
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
            // Unlocked: a thread that waits for its part may take up other work that asks for the same.
            drop(decode_cache);
            let made = DecodeWeights::new(self, self.row_scales(base)?)?;
            let mut decode_cache = lock();
            // Numbers that changed meanwhile are read again.
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

/// Rows of the base that a thread reads at a time.
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

/// `Σ x y`, in parts short enough for f32.
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
    /// Magnitudes whose norms nobody has asked for yet.
    pub fn new(vector: Var) -> Self {
        Self { vector, norms: Arc::default() }
    }

    fn norms(&self) -> MutexGuard<'_, RowNorms> {
        self.norms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which token of the data a row of activations belongs to, wherever it stands in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenKey {
    /// The pass over the data.
    pub epoch: u64,
    /// The row of the data set.
    pub row: u64,
    /// The token's place in its row.
    pub position: u64,
}

/// LoRA's dropout, drawn anew for each token and module but always the same for the same token:
/// packing, any split into micro-batches, recomputation and a resumed run see the same mask.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Probability in `[0, 1)` that an input is dropped.
    pub p: f64,
    /// The run's seed.
    pub seed: u64,
    /// The token of each row of activations.
    pub keys: Arc<Vec<TokenKey>>,
}

impl Dropout {
    /// The mask `(N, in)` F32 before A of `module`, one row a key: 0 with probability p, else
    /// `1 / (1 - p)`.
    pub fn mask(&self, module: &str, in_features: usize, device: &Device) -> Result<Tensor> {
        let mut mask = vec![0f32; self.keys.len() * in_features];
        self.draw(module, 0..self.keys.len(), &mut mask);
        Tensor::from_vec(mask, (self.keys.len(), in_features), device)
    }

    /// The same for some of the rows of activations, into a buffer `(rows, in)`.
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

/// Why an adapter could not be begun.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// An initialization whose tensors can only come from a file.
    #[error(
        "init_lora_weights {0:?} cannot begin an adapter, needed one that can be drawn or made of the base"
    )]
    Undrawable(String),
    /// What is made of the base's weights, without them.
    #[error("{0} is made of the base's weights, which are not at hand here")]
    NeedsBaseWeights(String),
    /// The config is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The config does not fit the base.
    #[error(transparent)]
    Targets(#[from] TargetError),
    /// The base's weights are not as the initialization needs them.
    #[error("{0}")]
    Unsuitable(String),
    /// A weight that cannot be decomposed.
    #[error("{0}: the decomposition of its weight does not converge")]
    NotConverged(String),
    /// No memory on the device, or no such device.
    #[error("a new adapter's tensors: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// A set of updates for one base.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// What a user calls it.
    pub name: String,
    /// Where it came from and how it scales.
    pub config: LoraConfig,
    /// The updates by module path, like `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, Lora>,
    /// The head `(1, hidden_size)` F32 that makes a score of a hidden state, of adapters that have
    /// one. It is PEFT's `score` in `modules_to_save`.
    pub score: Option<Var>,
    /// Other modules trained whole, by module path: `model.embed_tokens` and `lm_head`
    /// `(vocab_size, hidden_size)` F32.
    pub saved: BTreeMap<String, Var>,
    /// Token embeddings of its own.
    pub tokens: Option<TokenRows>,
    /// Rows of the head of its own.
    pub head_tokens: Option<TokenRows>,
}

/// Rows of the token embedding, or of the head, that an adapter has in place of the base's. PEFT's
/// `trainable_token_indices`.
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// The tokens, rising.
    pub indices: Vec<u32>,
    /// Their rows `(indices, hidden_size)` F32.
    pub rows: Var,
}

impl TokenRows {
    fn copy(&self) -> Result<Self> {
        let rows = Var::from_tensor(&self.rows.as_detached_tensor().copy()?)?;
        Ok(Self { indices: self.indices.clone(), rows })
    }
}

impl Adapter {
    /// A fresh adapter over `targets`, begun as `config.init_lora_weights` says, of what needs no
    /// weights of the base ([`crate::initialize::begin`] does with them).
    ///
    /// Each tensor's numbers are keyed by its module's path, so that another choice of modules
    /// leaves those of the others as they are.
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

    /// The rows of the head that the adapter has of its own: those it has of the head, else, where the
    /// head is the embedding (`tied`), those it has of that; with the name of their gradients.
    pub fn head_rows(&self, tied: bool) -> Option<(&TokenRows, &'static str)> {
        match (&self.head_tokens, &self.tokens) {
            (Some(rows), _) => Some((rows, HEAD_TOKEN_ROWS)),
            (None, Some(rows)) if tied => Some((rows, TOKEN_ROWS)),
            (None, _) => None,
        }
    }

    /// Gives the adapter a score head for hidden states of `hidden_size` numbers, and marks it as
    /// PEFT marks a sequence classifier: normal with standard deviation
    /// `1 / sqrt(hidden_size + 1)` (Stiennon et al. 2020), or zero.
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

    /// Takes the score head away, which leaves an adapter that generates.
    pub fn remove_score(&mut self) {
        self.score = None;
        self.config.task_type = Some("CAUSAL_LM".into());
        self.config.modules_to_save.retain(|module| ![SCORE, CLASSIFIER].contains(&&**module));
    }

    /// The same numbers in tensors of its own: a start for another adapter.
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

    /// All tensors under PEFT's names, by module path, A, B and the magnitudes; then whole modules,
    /// token rows, and the score head last: the order of optimizer states, checkpoints and files.
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

    /// How many numbers of the adapter train.
    pub fn num_parameters(&self) -> usize {
        let all: usize = self.parameters().iter().map(|(_, var)| var.elem_count()).sum();
        let held = |lora: &Lora| lora.frozen_ranks * (lora.in_features() + lora.out_features());
        all - self.modules.values().map(held).sum::<usize>()
    }

    /// Where the gradient of A of each module is among those of [`Self::parameters`] (B's is the next,
    /// that of magnitudes the one after), that of each whole module, and of [`TOKEN_ROWS`] and
    /// [`HEAD_TOKEN_ROWS`].
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

    /// Zeroes the gradients of what stays as it began; they are in the order of [`Self::parameters`].
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

    /// A copy of what stays as it began, by module: the last rows of A and columns of B.
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

    /// Puts back what [`Self::held`] copied: weight decay does not spare it.
    pub fn restore_frozen_ranks(&self, held: &[(String, [Tensor; 2])]) -> Result<()> {
        for (module, [held_a, held_b]) in held {
            let lora = &self.modules[module];
            let trained = lora.r() - lora.frozen_ranks;
            let a = lora.a.as_detached_tensor().narrow(0, 0, trained)?.copy()?;
            let b = lora.b.as_detached_tensor().narrow(1, 0, trained)?.copy()?;
            lora.a.set(&Tensor::cat(&[&a, held_a], 0)?)?;
            lora.b.set(&Tensor::cat(&[&b, held_b], 1)?.contiguous()?)?;
        }
        Ok(())
    }

    /// Freezes the ranks that an adapter has frozen which began with `init`: a file does not record
    /// them.
    pub fn freeze_ranks(&mut self, init: &InitLoraWeights) {
        for lora in self.modules.values_mut() {
            lora.frozen_ranks = if init.freezes_ranks() { lora.r() / 2 } else { 0 };
        }
    }

    /// Forgets what was made of the numbers before they changed: whoever sets them says so.
    pub fn invalidate_decode_weights(&self) {
        for lora in self.modules.values() {
            lora.decode_cache.lock().unwrap_or_else(PoisonError::into_inner).invalidate();
        }
        for magnitude in self.modules.values().filter_map(|lora| lora.magnitude.as_ref()) {
            magnitude.norms().merged = None;
        }
    }
}

/// An update that is drawn at random, as PEFT draws it.
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

/// PEFT's name of a module trained whole.
pub(crate) fn saved_name(module: &str) -> String {
    format!("base_model.model.{module}.weight")
}

/// PEFT's module of token rows.
pub const TOKEN_ROWS: &str = "model.embed_tokens.token_adapter";
/// The same of the head's own.
pub const HEAD_TOKEN_ROWS: &str = "lm_head.token_adapter";

/// PEFT's name of token rows.
pub(crate) fn token_rows_name(module: &str) -> String {
    format!("base_model.model.{module}.trainable_tokens_delta")
}

/// PEFT's name of A or B of a module: those of an embedding are no linear layers there.
pub(crate) fn tensor_name(module: &str, factor: char) -> String {
    match module == EMBEDDING {
        true => format!("base_model.model.{module}.lora_embedding_{factor}"),
        false => format!("base_model.model.{module}.lora_{factor}.weight"),
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

    fn begun(init: InitLoraWeights, targets: &[Target]) -> Adapter {
        let config = LoraConfig { init_lora_weights: init, ..LoraConfig::default() };
        Adapter::new("test", config, targets, 7, &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
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
    fn a_frozen_delta_leaves_no_tape() {
        let adapter = begun(InitLoraWeights::Random, &[target("m", 4)]);
        let x = Tensor::ones((3, 60), candle_core::DType::F32, &Device::Cpu).unwrap();
        let frozen = adapter.modules["m"].delta(&x, None, false).unwrap();
        let trained = adapter.modules["m"].delta(&x, None, true).unwrap();
        assert!(!frozen.track_op() && trained.track_op());
        assert_eq!(values(&frozen), values(&trained));
    }

    #[test]
    fn initial_numbers_are_pefts_and_keyed_by_module() {
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
        let kaiming = begun(InitLoraWeights::KaimingUniform, &targets);
        within(stats(&kaiming.modules["two"].a), 60f32.powf(-0.5));
        assert_eq!(stats(&kaiming.modules["two"].b).0, 0.0);
        let random = begun(InitLoraWeights::Random, &targets);
        within(stats(&random.modules["two"].a), 60f32.powf(-0.5));
        within(stats(&random.modules["two"].b), 8f32.powf(-0.5));
        let gaussian = begun(InitLoraWeights::Gaussian, &targets);
        let (_, deviation) = stats(&gaussian.modules["two"].a);
        assert!((deviation * 8.0 - 1.0).abs() < 0.1, "{deviation}");
        assert_eq!(stats(&gaussian.modules["two"].b).0, 0.0);

        let alone = begun(InitLoraWeights::Random, &targets[1..]);
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
    fn dropout_belongs_to_the_token_not_to_the_batch() {
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
            // Masks drawn apart drop the same input with probability p².
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
