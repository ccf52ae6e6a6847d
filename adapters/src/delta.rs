//! The maths of LoRA (Hu et al. 2021), and an adapter: the updates of a base by module.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use rayon::prelude::*;

use crate::config::{InitLoraWeights, LoraConfig};
use crate::rng::Stream;
use crate::targets::Target;

/// The low-rank update of one linear layer: `ΔW = scale · B A`.
#[derive(Debug, Clone)]
pub struct Lora {
    /// `A (r, in)` F32.
    pub a: Var,
    /// `B (out, r)` F32.
    pub b: Var,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
    pub scale: f64,
}

impl Lora {
    /// What the update adds to the layer's output: `scale · (mask ⊙ x) Aᵀ Bᵀ`.
    ///
    /// Shapes: `x (N, in)` F32, `mask (N, in)` F32 as [`Dropout::mask`] draws it → `(N, out)` F32.
    /// With `trainable` the result depends on A and B on the tape; without, it records nothing
    /// that `x` does not record itself.
    pub fn delta(&self, x: &Tensor, mask: Option<&Tensor>, trainable: bool) -> Result<Tensor> {
        let (a, b) = if trainable {
            (self.a.as_tensor().clone(), self.b.as_tensor().clone())
        } else {
            (self.a.as_detached_tensor(), self.b.as_detached_tensor())
        };
        let low = match mask {
            Some(mask) => (x * mask)?.matmul(&a.t()?)?, // (N, r)
            None => x.matmul(&a.t()?)?,
        };
        (low * self.scale)?.matmul(&b.t()?) // (N, out)
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
        let module = Stream::new(0, module, &[]).next_u64();
        let kept = (1.0 / (1.0 - self.p)) as f32;
        let below = (self.p * 2f64.powi(32)) as u32;
        let mut mask = vec![0f32; self.keys.len() * in_features];
        // An empty layer has no chunks to iterate, and chunks of size 0 panic.
        mask.par_chunks_mut(in_features.max(1)).zip(self.keys.par_iter()).for_each(|(row, key)| {
            let index = [key.epoch, key.row, key.position, module];
            let mut stream = Stream::new(self.seed, "dropout", &index);
            for pair in row.chunks_mut(2) {
                let bits = stream.next_u64();
                for (value, bits) in pair.iter_mut().zip([bits as u32, (bits >> 32) as u32]) {
                    *value = if bits < below { 0.0 } else { kept };
                }
            }
        });
        Tensor::from_vec(mask, (self.keys.len(), in_features), device)
    }
}

/// Why an adapter could not be begun.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// An initialization whose tensors can only come from a file.
    #[error("init_lora_weights {0:?} cannot begin an adapter, needed true, false or \"gaussian\"")]
    Init(String),
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
}

impl Adapter {
    /// A fresh adapter over `targets`, begun as `config.init_lora_weights` says.
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
        let mut modules = BTreeMap::new();
        for Target { spec, r, scale } in targets {
            let mut of_a = Stream::new(seed, &format!("lora_A {}", spec.name), &[]);
            let mut of_b = Stream::new(seed, &format!("lora_B {}", spec.name), &[]);
            // kaiming_uniform with a = sqrt(5): bound sqrt(6 / ((1 + 5) fan_in)).
            let linear = |stream: &mut Stream, fan_in: usize| {
                (2.0 * stream.uniform() - 1.0) / (fan_in as f32).sqrt()
            };
            let (of_in, out) = (spec.in_features, spec.out_features);
            let (a, b): (Vec<f32>, Vec<f32>) = match &config.init_lora_weights {
                InitLoraWeights::KaimingUniform => {
                    ((0..r * of_in).map(|_| linear(&mut of_a, of_in)).collect(), vec![0.0; out * r])
                }
                InitLoraWeights::Random => (
                    (0..r * of_in).map(|_| linear(&mut of_a, of_in)).collect(),
                    (0..out * r).map(|_| linear(&mut of_b, *r)).collect(),
                ),
                InitLoraWeights::Gaussian => {
                    let a = (0..r * of_in).map(|_| of_a.normal() / *r as f32).collect();
                    (a, vec![0.0; out * r])
                }
                InitLoraWeights::Stored(init) => return Err(InitError::Init(init.clone())),
            };
            let a = Var::from_vec(a, (*r, of_in), device)?;
            let b = Var::from_vec(b, (out, *r), device)?;
            modules.insert(spec.name.clone(), Lora { a, b, scale: *scale });
        }
        Ok(Self { name: name.into(), config, modules })
    }

    /// All tensors under PEFT's names, by module path, A before B: the order of optimizer states,
    /// checkpoints and files.
    pub fn parameters(&self) -> Vec<(String, Var)> {
        let both = self.modules.iter().flat_map(|(module, lora)| {
            [(tensor_name(module, 'A'), lora.a.clone()), (tensor_name(module, 'B'), lora.b.clone())]
        });
        both.collect()
    }

    /// How many numbers the adapter has.
    pub fn num_parameters(&self) -> usize {
        self.modules.values().map(|lora| lora.a.elem_count() + lora.b.elem_count()).sum()
    }
}

/// PEFT's name of A or B of a module.
pub(crate) fn tensor_name(module: &str, factor: char) -> String {
    format!("base_model.model.{module}.lora_{factor}.weight")
}
