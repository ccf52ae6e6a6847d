//! Log-probabilities of target tokens from hidden states: the product with the lm_head and the
//! softmax are computed in chunks of rows, so that the logits `(tokens, vocabulary)` are never materialized.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{Values, exp, tanh, values};
use super::frozen_linear::{matmul, matmul_transposed};
use super::gemm::{Init, Out, PackedRows, PanelType, Product, Strided, Term, Weights, multiply};
use super::{Compute, OpForm};
use crate::isa::{Isa, multiversion};
use crate::quant::FrozenMatrix;

/// Logits per chunk, in values: 32 MB. Each chunk packs the lm_head again, so that smaller chunks
/// are slower.
const CHUNK_LOGITS: usize = 8 << 20;

/// A softcap on logits (Gemma 2): they become `cap · tanh(logit / cap) / temperature`. The temperature is
/// applied after the cap; without a cap it may as well divide the hidden states.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitSoftcap {
    /// The bound of logits.
    pub cap: f32,
    /// Divisor of capped logits.
    pub temperature: f32,
}

/// `log softmax(x · Wᵀ)[target]` per row, differentiable in `x`; `W` is the frozen head.
///
/// Shapes: `x (M, H)` F32, `W (V, H)`, `targets` M token ids → `(M)` F32, natural logarithms.
/// Backward: `dx = dy · (W[target] - Σ p W)`. That vector is computed along with the forward pass,
/// while a chunk's probabilities are in memory, and only if `x` is tracked.
pub fn linear_log_probs(
    x: &Tensor,
    head: &Arc<FrozenMatrix>,
    targets: &[u32],
    compute: Compute,
) -> Result<Tensor> {
    capped_log_probs(x, head, targets, None, compute)
}

/// [`linear_log_probs`] with an optional softcap on the logits.
pub(crate) fn capped_log_probs(
    x: &Tensor,
    head: &Arc<FrozenMatrix>,
    targets: &[u32],
    cap: Option<LogitSoftcap>,
    compute: Compute,
) -> Result<Tensor> {
    let rows = x.dim(0)?;
    if rows != targets.len() {
        candle_core::bail!("{rows} rows of hidden states for {} targets", targets.len());
    }
    check_targets(targets, head)?;
    match compute.op_form() {
        OpForm::Kernel => x.contiguous()?.apply_op1(LinearLogProbs {
            head: head.clone(),
            targets: targets.into(),
            cap,
            panels: compute.precision.panels(),
            with_gradient: x.track_op(),
            gradient: OnceLock::new(),
        }),
        OpForm::Portable => {
            let logits = super::frozen_linear(x, head, compute)?; // (M, V)
            log_probs_of_logits(logits, targets, cap)
        }
    }
}

/// The portable form after the lm_head: `logits (M, V)`, before the cap, and M targets → `(M)`, on the
/// tape and device of the logits.
pub(crate) fn log_probs_of_logits(
    mut logits: Tensor,
    targets: &[u32],
    cap: Option<LogitSoftcap>,
) -> Result<Tensor> {
    if let Some(LogitSoftcap { cap, temperature }) = cap {
        let (cap, temperature) = (f64::from(cap), f64::from(temperature));
        logits = ((logits / cap)?.tanh()? * (cap / temperature))?;
    }
    let targets = Tensor::from_slice(targets, (targets.len(), 1), logits.device())?;
    let logps = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
    logps.gather(&targets, 1)?.squeeze(1)
}

/// Fails if a target is outside the vocabulary.
pub(crate) fn check_targets(targets: &[u32], head: &FrozenMatrix) -> Result<()> {
    match targets.iter().find(|&&target| target as usize >= head.rows()) {
        Some(t) => candle_core::bail!("target {t} is outside the vocabulary of {}", head.rows()),
        None => Ok(()),
    }
}

/// Logits of a chunk and their panels: kept thread-local for the next call, because allocating
/// them in every step would cost page faults.
#[derive(Default)]
struct LogitScratch {
    logits: Vec<f32>,
    /// Derivative of the softcap at each logit, if there is one.
    slopes: Vec<f32>,
    packed: PackedRows,
    turned: PackedRows,
    logps: Vec<f32>,
}

thread_local!(static SCRATCH: Cell<LogitScratch> = Cell::default());

/// Rows per chunk.
pub(crate) fn chunk_rows(rows: usize, vocabulary: usize) -> usize {
    (CHUNK_LOGITS / vocabulary.max(1)).clamp(24, 512).min(rows.max(1))
}

/// Scratch bytes of a call over `rows` rows: logits, and their panels in the backward pass.
pub(crate) fn working_bytes(rows: usize, vocabulary: usize, compute: Compute) -> usize {
    let logits = chunk_rows(rows, vocabulary) * vocabulary * size_of::<f32>();
    let panels = match compute.precision.backward_panel() {
        PanelType::Int16 | PanelType::Int8 => logits / 2,
        PanelType::F32 => logits,
    };
    logits + panels
}

/// Statistics of the M next-token distributions of M targets.
#[derive(Debug, Clone, Copy)]
pub struct Distributions<'a> {
    /// Their entropies, in nats.
    pub entropies: &'a [f32],
    /// Whether the target is the most likely token.
    pub is_argmax: &'a [bool],
}

/// Outputs for M distributions and a target in each.
pub(crate) struct TargetStatsMut<'a> {
    /// The targets' log-probabilities, in nats.
    pub logps: &'a mut [f32],
    /// The distributions' entropies, in nats.
    pub entropies: &'a mut [f32],
    /// Whether the target is the most likely token.
    pub is_argmax: &'a mut [bool],
}

impl TargetStatsMut<'_> {
    /// Records the statistics of some rows' targets; the logits are overwritten as by
    /// [`score`].
    pub(crate) fn take(
        &mut self,
        isa: Isa,
        logits: &mut [f32],
        first: usize,
        targets: &[u32],
        factor: Option<f32>,
    ) {
        let rows = first..first + targets.len();
        let found = self.logps[rows.clone()].par_iter_mut().zip(&mut self.entropies[rows.clone()]);
        let found = found.zip(&mut self.is_argmax[rows]).zip(targets);
        let per_row = logits.par_chunks_exact_mut(logits.len() / targets.len().max(1));
        per_row.zip(found).for_each(|(logits, (((logp, entropy), is_argmax), &target))| {
            let scored = score(isa, logits, target as usize, factor);
            (*logp, *entropy, *is_argmax) = (scored.logp, scored.entropy, scored.is_argmax);
        });
    }
}

/// Statistics of `targets (M)` from hidden states `x (M, H)`, and, if a buffer is given for it,
/// the `gradient (M, H)` of the log-probs to `x`. `panels` are those of the forward and of the backward pass.
pub(crate) fn forward(
    panels: (PanelType, PanelType),
    x: &[f32],
    head: &FrozenMatrix,
    targets: &[u32],
    cap: Option<LogitSoftcap>,
    mut found: TargetStatsMut,
    mut gradient: Option<&mut [f32]>,
) {
    let (vocabulary, width) = (head.rows(), head.cols());
    let chunk = chunk_rows(targets.len(), vocabulary);
    let (isa, with_gradient) = (Isa::current(), gradient.is_some());
    let LogitScratch { mut logits, mut slopes, mut packed, turned, logps: kept } = SCRATCH.take();
    logits.resize((chunk * vocabulary).max(logits.len()), 0.0);
    for (i, targets) in targets.chunks(chunk).enumerate() {
        let first = i * chunk;
        let rows = first * width..(first + targets.len()) * width;
        let logits = &mut logits[..targets.len() * vocabulary];
        matmul_transposed(panels.0, &x[rows.clone()], head, logits, &mut packed);
        if let Some(cap) = cap {
            slopes.resize(logits.len().max(slopes.len()), 0.0);
            let pairs = logits.par_chunks_mut(vocabulary).zip(slopes.par_chunks_mut(vocabulary));
            pairs.for_each(|(logits, slopes)| softcap(isa, logits, slopes, cap));
        }
        found.take(isa, logits, first, targets, with_gradient.then_some(1.0));
        if cap.is_some() && with_gradient {
            let pairs = logits.par_chunks_mut(vocabulary).zip(slopes.par_chunks(vocabulary));
            pairs.for_each(|(d, slopes)| d.iter_mut().zip(slopes).for_each(|(d, s)| *d *= s));
        }
        if let Some(gradient) = &mut gradient {
            matmul(panels.1, logits, head, &mut gradient[rows], &mut packed);
        }
    }
    SCRATCH.set(LogitScratch { logits, slopes, packed, turned, logps: kept });
}

/// Gradient buffers of [`loss_and_gradients`].
pub(crate) struct LossGrad<'a> {
    /// Gradient to the hidden states, `(M, H)`: overwritten.
    pub x: &'a mut [f32],
    /// Gradient to the lm_head, `(V, H)`: added to.
    pub head: &'a mut [f32],
}

/// The sum of `-log softmax(x · Wᵀ)[target]` over the rows, in nats, and the gradients of it times
/// `scale` to both sides, chunk by chunk. A cap on the logits comes before the softmax.
///
/// Shapes: `x (M, H)`, `head (V, H)`, `targets` M token ids, each of them a row of the head.
pub(crate) fn loss_and_gradients(
    panels: (PanelType, PanelType),
    x: &[f32],
    head: &[f32],
    (targets, cap): (&[u32], Option<LogitSoftcap>),
    scale: f32,
    grad: LossGrad,
) -> f64 {
    if targets.is_empty() {
        return 0.0;
    }
    let width = x.len() / targets.len();
    let vocabulary = head.len() / width;
    let chunk = chunk_rows(targets.len(), vocabulary);
    let (isa, (forward, backward)) = (Isa::current(), panels);
    let dense = |values| Weights::Dense { values, cols: width, scale: 1.0 };
    let LogitScratch { mut logits, mut slopes, mut packed, mut turned, mut logps } = SCRATCH.take();
    logits.resize((chunk * vocabulary).max(logits.len()), 0.0);
    logps.resize(chunk.max(logps.len()), 0.0);
    let mut loss = 0.0;
    let chunks = x.chunks(chunk * width).zip(grad.x.chunks_mut(chunk * width));
    for ((x, dx), targets) in chunks.zip(targets.chunks(chunk)) {
        let rows = targets.len();
        let logits = &mut logits[..rows * vocabulary];
        packed.pack(isa, forward, Strided { values: x, stride: width }, rows, width);
        let terms = vec![Term { x: &packed, weights: dense(head), transposed: true }];
        let out = Out::new(logits, vocabulary);
        multiply(isa, &mut [Product { terms, init: Init::Zero, out }]);
        if let Some(cap) = cap {
            slopes.resize(logits.len().max(slopes.len()), 0.0);
            let pairs = logits.par_chunks_mut(vocabulary).zip(slopes.par_chunks_mut(vocabulary));
            pairs.for_each(|(logits, slopes)| softcap(isa, logits, slopes, cap));
        }
        let per_row = logits.par_chunks_exact_mut(vocabulary).zip(&mut logps).zip(targets);
        per_row.for_each(|((logits, logp), &target)| {
            *logp = score(isa, logits, target as usize, Some(-scale)).logp;
        });
        if cap.is_some() {
            let pairs = logits.par_chunks_mut(vocabulary).zip(slopes.par_chunks(vocabulary));
            pairs.for_each(|(d, slopes)| d.iter_mut().zip(slopes).for_each(|(d, s)| *d *= s));
        }
        loss -= logps[..rows].iter().map(|&logp| f64::from(logp)).sum::<f64>();

        let dlogits = Strided { values: logits, stride: vocabulary };
        packed.pack(isa, backward, dlogits, rows, vocabulary);
        turned.pack_transposed(isa, backward, dlogits, vocabulary, rows);
        let to_x = Product {
            terms: vec![Term { x: &packed, weights: dense(head), transposed: false }],
            init: Init::Zero,
            out: Out::new(dx, width),
        };
        let to_head = Product {
            terms: vec![Term { x: &turned, weights: dense(x), transposed: false }],
            init: Init::Add,
            out: Out::new(grad.head, width),
        };
        multiply(isa, &mut [to_x, to_head]);
    }
    SCRATCH.set(LogitScratch { logits, slopes, packed, turned, logps });
    loss
}

struct LinearLogProbs {
    head: Arc<FrozenMatrix>,
    targets: Vec<u32>,
    cap: Option<LogitSoftcap>,
    /// Forward and backward.
    panels: (PanelType, PanelType),
    with_gradient: bool,
    /// `d logp / d x`, `(M, H)`, left by the forward pass.
    gradient: OnceLock<Vec<f32>>,
}

impl CustomOp1 for LinearLogProbs {
    fn name(&self) -> &'static str {
        "linear_log_probs"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let mut logps = vec![0f32; self.targets.len()];
        let mut gradient = vec![0f32; if self.with_gradient { x.len() } else { 0 }];
        let to = self.with_gradient.then_some(&mut gradient[..]);
        let mut entropies = vec![0f32; self.targets.len()];
        let (head, targets) = (&self.head, &self.targets);
        let mut is_argmax = vec![false; targets.len()];
        let found = TargetStatsMut {
            logps: &mut logps,
            entropies: &mut entropies,
            is_argmax: &mut is_argmax,
        };
        forward(self.panels, x, head, targets, self.cap, found, to);
        // A tape runs an op's forward once; a second run would give the same values.
        let _ = self.gradient.set(gradient);
        Ok((CpuStorage::F32(logps), self.targets.len().into()))
    }

    fn bwd(&self, x: &Tensor, _logps: &Tensor, dlogps: &Tensor) -> Result<Option<Tensor>> {
        let gradient = self.gradient.get().expect("the forward pass came first");
        let dlogps = dlogps.contiguous()?;
        let dlogps = Values::of(&dlogps)?;
        let rows = gradient.chunks_exact(self.head.cols()).zip(&*dlogps);
        let dx: Vec<f32> = rows.flat_map(|(row, d)| row.iter().map(move |g| g * d)).collect();
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// A target and its distribution, from logits.
pub(crate) struct TargetStats {
    /// Its log-probability, in nats.
    pub logp: f32,
    /// The entropy of the distribution, in nats.
    pub entropy: f32,
    /// Whether it is the most likely token.
    pub is_argmax: bool,
}

multiversion! {
    /// Applies the softcap to logits, and writes its derivative at each to `slopes`.
    pub(crate) fn softcap(isa; logits: &mut [f32], slopes: &mut [f32], cap: LogitSoftcap) {
        let LogitSoftcap { cap, temperature } = cap;
        for (logit, slope) in logits.iter_mut().zip(slopes) {
            let t = tanh(*logit / cap);
            (*logit, *slope) = (cap / temperature * t, (1.0 - t * t) / temperature);
        }
    }

    /// The target's log-probability, and the entropy; the logits become `factor` times the
    /// log-probability's gradient, `onehot - p`, if `factor` is given.
    pub(crate) fn score(isa; logits: &mut [f32], target: usize, factor: Option<f32>) -> TargetStats {
        let mut most = [f32::NEG_INFINITY; 16];
        let (wide, rest) = logits.as_chunks::<16>();
        for l in wide {
            for i in 0..16 {
                most[i] = if l[i] > most[i] { l[i] } else { most[i] };
            }
        }
        let max = most.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
        let target_logit = logits[target];
        let (mut sum, mut mean) = (0f64, 0f64); // 150 thousand terms: f32 would lose four digits
        for logits in logits.chunks_mut(512) {
            let (mut parts, mut means) = ([0f32; 16], [0f32; 16]);
            let (wide, rest) = logits.as_chunks_mut::<16>();
            for l in wide {
                for i in 0..16 {
                    let below = l[i] - max;
                    l[i] = exp(below);
                    parts[i] += l[i];
                    means[i] += l[i] * below;
                }
            }
            for (i, l) in rest.iter_mut().enumerate() {
                let below = *l - max;
                *l = exp(below);
                parts[i] += *l;
                means[i] += *l * below;
            }
            sum += f64::from(parts.iter().sum::<f32>());
            mean += f64::from(means.iter().sum::<f32>());
        }
        if let Some(factor) = factor {
            let scale = (-f64::from(factor) / sum) as f32;
            for l in logits.iter_mut() {
                *l *= scale;
            }
            logits[target] += factor;
        }
        let logp = f64::from(target_logit - max) - sum.ln();
        let (logp, entropy) = (logp as f32, (sum.ln() - mean / sum) as f32);
        TargetStats { logp, entropy, is_argmax: target_logit >= max }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{finite_differences, normal, parity};
    use super::*;

    fn head(vocabulary: usize, width: usize) -> Arc<FrozenMatrix> {
        let w: Vec<f32> = normal(5, &[vocabulary * width]).to_vec1().unwrap();
        Arc::new(FrozenMatrix::from_f32(&w, vocabulary, width).unwrap())
    }

    #[test]
    fn parity_and_differences() {
        let head = head(301, 24);
        let targets: Vec<u32> = (0..40).map(|i| i * 7 % 301).collect();
        let inputs = [normal(1, &[40, 24])];
        for cap in [None, Some(LogitSoftcap { cap: 3.0, temperature: 0.7 })] {
            let run = |compute| {
                let (head, targets) = (head.clone(), targets.clone());
                move |t: &[Tensor]| capped_log_probs(&t[0], &head, &targets, cap, compute)
            };
            parity(&inputs, run(Compute::F32), run(Compute::REFERENCE));
            finite_differences(&inputs, run(Compute::F32));
        }
    }

    #[test]
    fn entropies_are_those_of_all_tokens() {
        let head = head(301, 24);
        let x = normal(1, &[5, 24]);
        let logits = super::super::frozen_linear(&x, &head, Compute::REFERENCE).unwrap();
        let logps = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap().to_vec2::<f32>();
        let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (mut found, mut entropies) = ([0f32; 5], [0f32; 5]);
        let panels = (PanelType::F32, PanelType::F32);
        let mut is_argmax = [false; 5];
        let all = TargetStatsMut {
            logps: &mut found,
            entropies: &mut entropies,
            is_argmax: &mut is_argmax,
        };
        forward(panels, &x, &head, &[0, 1, 2, 3, 4], None, all, None);
        for (row, entropy) in logps.unwrap().iter().zip(entropies) {
            let needed: f64 = row.iter().map(|&l| -f64::from(l) * f64::from(l).exp()).sum();
            assert!((needed - f64::from(entropy)).abs() < 1e-4, "{entropy}, not {needed}");
        }
    }

    #[test]
    fn chunks_change_nothing() {
        // 600 rows are chunks of 512 and 88; each row alone gives the same bits, gradient too.
        assert_eq!(chunk_rows(600, 50), 512);
        let head = head(50, 8);
        let x = normal(1, &[600, 8]);
        let targets: Vec<u32> = (0..600).map(|i| i % 50).collect();
        for compute in [Compute::F32, Compute::INT16] {
            let run = |x: &Tensor, targets: &[u32]| {
                let x = candle_core::Var::from_tensor(x).unwrap();
                let logps = linear_log_probs(&x, &head, targets, compute).unwrap();
                let grads = logps.sum_all().unwrap().backward().unwrap();
                (logps.to_vec1::<f32>().unwrap(), grads.get(&x).unwrap().to_vec2::<f32>().unwrap())
            };
            let (all, gradients) = run(&x, &targets);
            for i in [0, 511, 512, 599] {
                let row = x.narrow(0, i, 1).unwrap().copy().unwrap();
                let (one, gradient) = run(&row, &targets[i..=i]);
                assert_eq!((one[0], &gradient[0]), (all[i], &gradients[i]), "{compute:?} row {i}");
            }
        }
    }

    #[test]
    fn targets_are_checked() {
        let head = head(10, 4);
        let x = normal(1, &[2, 4]);
        assert!(linear_log_probs(&x, &head, &[1, 10], Compute::F32).is_err());
        assert!(linear_log_probs(&x, &head, &[1], Compute::F32).is_err());
    }
}
