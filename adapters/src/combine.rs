//! Several adapters merged into one: PEFT's `add_weighted_adapter` with all its combination types.
//!
//! Adapter i has weight `w_i` and, on a module, `ΔW_i = s_i B_i A_i`. There are three kinds:
//!
//! - `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` combine the A's and the B's
//!   separately, each with `√|w_i s_i|` (A gets the sign). That is cheap and approximate: the product of
//!   two sums is not the sum of the products. The ranks must be equal.
//! - `cat` stacks the ranks: exactly `Σ w_i ΔW_i`, at the sum of the ranks.
//! - `svd` and those ending in `_svd` combine the whole `ΔW_i` and keep the leading singular triples.
//!   `svd` itself never makes a whole `ΔW`: it decomposes the stacked factors.
//!
//! TIES (Yadav et al. 2023) keeps each adapter's largest values and of those the ones with the elected
//! sign; DARE (Yu et al. 2023) drops values at random and rescales the others.
//!
//! Two differences from PEFT: with one adapter PEFT uses `linear` whatever the combination type; here the
//! given type is used. And PEFT keeps the first adapter's `use_rslora`, which makes the result `√r` times
//! too large when it is read; here the result has a plain scale of 1.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use candle_core::{Device, Var};
use faer::Mat;
use rayon::prelude::*;

use crate::config::{InitLoraWeights, LoraConfig, Modules};
use crate::decompose::{Dense, Singular, leading_of_product};
use crate::delta::{Adapter, Lora};
use crate::rng::Stream;

/// PEFT's `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CombinationType {
    /// Sums of the A's and of the B's.
    Linear,
    /// The ranks of all adapters concatenated.
    Cat,
    /// The leading triples of the weighted sum.
    Svd,
    /// TIES on A's and B's.
    Ties,
    /// TIES on whole updates.
    TiesSvd,
    /// DARE and a sum, on A's and B's.
    DareLinear,
    /// DARE and a sum, on whole updates.
    DareLinearSvd,
    /// DARE and TIES' election, on A's and B's.
    DareTies,
    /// DARE and TIES' election, on whole updates.
    DareTiesSvd,
    /// Magnitude pruning and a sum, on A's and B's.
    MagnitudePrune,
    /// Magnitude pruning and a sum, on whole updates.
    MagnitudePruneSvd,
}

impl CombinationType {
    /// All combination types with PEFT's names.
    pub const ALL: [(&'static str, Self); 11] = [
        ("linear", Self::Linear),
        ("cat", Self::Cat),
        ("svd", Self::Svd),
        ("ties", Self::Ties),
        ("ties_svd", Self::TiesSvd),
        ("dare_linear", Self::DareLinear),
        ("dare_linear_svd", Self::DareLinearSvd),
        ("dare_ties", Self::DareTies),
        ("dare_ties_svd", Self::DareTiesSvd),
        ("magnitude_prune", Self::MagnitudePrune),
        ("magnitude_prune_svd", Self::MagnitudePruneSvd),
    ];

    /// How each adapter's values are pruned first.
    fn pruning(self) -> Pruning {
        match self {
            Self::Linear | Self::Cat | Self::Svd => Pruning::None,
            Self::Ties | Self::TiesSvd | Self::MagnitudePrune | Self::MagnitudePruneSvd => {
                Pruning::Magnitude
            }
            Self::DareLinear | Self::DareLinearSvd | Self::DareTies | Self::DareTiesSvd => {
                Pruning::Random
            }
        }
    }

    /// Whether only values of the elected sign are summed.
    fn elects(self) -> bool {
        matches!(self, Self::Ties | Self::TiesSvd | Self::DareTies | Self::DareTiesSvd)
    }

    /// Whether values are dropped at random.
    pub fn is_random(self) -> bool {
        self.pruning() == Pruning::Random
    }

    /// Whether whole updates are combined.
    fn is_svd(self) -> bool {
        self.name().ends_with("svd")
    }

    /// PEFT's name.
    pub fn name(self) -> &'static str {
        let own = Self::ALL.iter().find(|(_, method)| *method == self);
        own.map_or("", |(name, _)| name)
    }
}

impl FromStr for CombinationType {
    type Err = CombineError;

    fn from_str(name: &str) -> Result<Self, CombineError> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, method)| *method).ok_or_else(|| {
            let known = Self::ALL.map(|(name, _)| name).join(", ");
            CombineError::Settings(format!("combination_type {name:?}: needed one of {known}"))
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pruning {
    None,
    Magnitude,
    Random,
}

/// PEFT's `majority_sign_method`: how the sign of a value is elected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MajoritySign {
    /// The sign of the sum.
    Total,
    /// The sign of most values.
    Frequency,
}

impl FromStr for MajoritySign {
    type Err = CombineError;

    fn from_str(name: &str) -> Result<Self, CombineError> {
        match name {
            "total" => Ok(Self::Total),
            "frequency" => Ok(Self::Frequency),
            other => Err(CombineError::Settings(format!(
                "majority_sign_method {other:?}: needed total or frequency"
            ))),
        }
    }
}

/// How adapters are combined. Settings that the combination type does not use are errors.
#[derive(Clone, Copy)]
pub struct Combination<'a> {
    /// The combination type.
    pub method: CombinationType,
    /// The fraction of values that pruning keeps, above 0 and at most 1; needed by TIES, DARE and magnitude pruning.
    pub density: Option<f64>,
    /// How TIES elects signs, by default [`MajoritySign::Total`].
    pub majority_sign_method: Option<MajoritySign>,
    /// Rank of the result of the svd kinds, by default the largest of the adapters.
    pub svd_rank: Option<usize>,
    /// DARE's masks.
    pub masks: DareMasks<'a>,
}

/// Which values DARE keeps.
#[derive(Clone, Copy)]
pub enum DareMasks<'a> {
    /// Random with this seed, keyed by module, adapter and matrix.
    Seed(u64),
    /// Computed by the caller, of length [`MaskRequest::count`].
    Given(&'a dyn Fn(&MaskRequest<'_>) -> Vec<bool>),
}

/// One matrix that DARE needs a mask for.
#[derive(Debug, Clone, Copy)]
pub struct MaskRequest<'a> {
    /// The module's path.
    pub module: &'a str,
    /// Index of the adapter in the call.
    pub adapter: usize,
    /// Which of its matrices.
    pub matrix: UpdateMatrix,
    /// Number of its values, row-major.
    pub count: usize,
    /// The fraction to keep.
    pub density: f64,
}

/// A matrix of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateMatrix {
    /// `A (r, in)`.
    A,
    /// `B (out, r)`.
    B,
    /// `s B A (out, in)`.
    Product,
}

/// Why adapters cannot be combined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CombineError {
    /// Invalid settings, or settings that do not apply to the combination type.
    #[error("{0}")]
    Settings(String),
    /// No adapters.
    #[error("no adapters to combine")]
    Empty,
    /// An adapter that is not plain LoRA.
    #[error("adapter {name} has {what}, which cannot be combined with others: needed plain LoRA")]
    NotPlain {
        /// The adapter.
        name: String,
        /// What it has.
        what: &'static str,
    },
    /// Updates of one module with different shapes.
    #[error("{module}: adapter {name} is for a layer of {found:?}, another for one of {needed:?}")]
    Shape {
        /// The module's path.
        module: String,
        /// The adapter.
        name: String,
        /// (out, in) of its update.
        found: (usize, usize),
        /// (out, in) of the first.
        needed: (usize, usize),
    },
    /// Factors of different ranks, which cannot be summed.
    #[error(
        "{module}: adapters of rank {ranks:?}; {method} needs the same rank, cat and the svd kinds do not"
    )]
    Ranks {
        /// The module's path.
        module: String,
        /// The ranks.
        ranks: Vec<usize>,
        /// The method.
        method: &'static str,
    },
    /// A matrix that cannot be decomposed.
    #[error(
        "{0}: the decomposition of the sum does not converge; the adapters hold values that are not finite"
    )]
    NotConverged(String),
    /// candle could not make or read a tensor.
    #[error("adapter tensors: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// Combines adapters, each with a weight, into a new one of scale 1. All tensors are F32 on the CPU.
///
/// # Errors
/// If there is no adapter, one is not plain LoRA, settings do not apply, or shapes or ranks differ.
pub fn combine(
    name: &str,
    adapters: &[(&Adapter, f64)],
    settings: &Combination<'_>,
) -> Result<Adapter, CombineError> {
    let density = check(adapters, settings)?;
    let modules: BTreeSet<&String> = adapters.iter().flat_map(|(a, _)| a.modules.keys()).collect();
    let ranks = adapters.iter().flat_map(|(a, _)| a.modules.values().map(Lora::r));
    let svd_rank = settings.svd_rank.unwrap_or_else(|| ranks.max().unwrap_or(1));
    let mut made = BTreeMap::new();
    for module in modules {
        let updates = updates(module, adapters)?;
        let factors = match settings.method {
            CombinationType::Cat => stacked(&updates),
            CombinationType::Svd => {
                let stacked = stacked(&updates);
                let b = matrix(&stacked.b, stacked.out, stacked.r);
                let a = matrix(&stacked.a, stacked.r, stacked.of_in);
                let triples = leading_of_product(&b, &a, svd_rank);
                cut(triples.map_err(|_| CombineError::NotConverged(module.clone()))?, svd_rank)
            }
            _ if settings.method.is_svd() => {
                let products = updates.iter().map(WeightedUpdate::product).collect();
                let weights: Vec<f32> = updates.iter().map(|u| u.weight as f32).collect();
                let sum = merged(
                    products,
                    &weights,
                    UpdateMatrix::Product,
                    (module, &updates),
                    settings,
                    density,
                )?;
                let (rows, cols) = (updates[0].out, updates[0].of_in);
                let triples = Dense { values: &sum, rows, cols }.leading(svd_rank);
                cut(triples.map_err(|_| CombineError::NotConverged(module.clone()))?, svd_rank)
            }
            _ => combine_factors(module, &updates, settings, density)?,
        };
        made.insert(module.clone(), factors);
    }
    let r = made.values().map(|factors| factors.r).max().unwrap_or(1);
    let modules = made.into_iter().map(|(module, factors)| {
        let lora = factors.padded(r)?;
        Ok((module, lora))
    });
    let modules: BTreeMap<String, Lora> = modules.collect::<candle_core::Result<_>>()?;
    let config = config(adapters, &modules, r);
    let name = name.into();
    let saved = BTreeMap::new();
    Ok(Adapter { name, config, modules, score: None, saved, tokens: None, head_tokens: None })
}

/// The density, once everything is known to make sense.
fn check(adapters: &[(&Adapter, f64)], settings: &Combination<'_>) -> Result<f64, CombineError> {
    let method = settings.method.name();
    let settings_error = |problem: String| Err(CombineError::Settings(problem));
    if adapters.is_empty() {
        return Err(CombineError::Empty);
    }
    for (adapter, weight) in adapters {
        let has = [
            ("DoRA magnitudes", adapter.modules.values().any(|lora| lora.magnitude.is_some())),
            ("modules trained whole", !adapter.saved.is_empty()),
            ("token rows", adapter.tokens.is_some() || adapter.head_tokens.is_some()),
            ("a score head", adapter.score.is_some()),
        ];
        if let Some((what, _)) = has.iter().find(|(_, has)| *has) {
            return Err(CombineError::NotPlain { name: adapter.name.clone(), what });
        }
        if !weight.is_finite() {
            return settings_error(format!(
                "weight {weight} of {}: needed a finite number",
                adapter.name
            ));
        }
    }
    if settings.majority_sign_method.is_some() && !settings.method.elects() {
        return settings_error(format!(
            "majority_sign_method only applies to the ties kinds, found {method}"
        ));
    }
    match settings.svd_rank {
        Some(_) if !settings.method.is_svd() => {
            return settings_error(format!(
                "svd_rank only applies to the svd kinds, found {method}"
            ));
        }
        Some(0) => return settings_error("svd_rank: found 0, needed 1 or more".into()),
        _ => {}
    }
    match (settings.method.pruning(), settings.density) {
        (Pruning::None, None) => Ok(1.0),
        (Pruning::None, Some(_)) => settings_error(format!(
            "density only applies to combination types that prune, found {method}"
        )),
        (_, None) => {
            settings_error(format!("{method} needs a density, the fraction of values to keep"))
        }
        (Pruning::Magnitude, Some(density)) if (0.0..=1.0).contains(&density) => Ok(density),
        (Pruning::Random, Some(density)) if density > 0.0 && density <= 1.0 => Ok(density),
        (Pruning::Magnitude, Some(density)) => {
            settings_error(format!("density: found {density}, needed 0 to 1"))
        }
        (Pruning::Random, Some(density)) => {
            settings_error(format!("density: found {density}, needed above 0, to 1"))
        }
    }
}

/// An adapter's update of the module at hand.
struct WeightedUpdate {
    /// The adapter's place in the call.
    adapter: usize,
    weight: f64,
    scale: f64,
    a: Vec<f32>,
    b: Vec<f32>,
    r: usize,
    of_in: usize,
    out: usize,
}

impl WeightedUpdate {
    /// `s B A (out, in)`.
    fn product(&self) -> Vec<f32> {
        let mut product = vec![0f32; self.out * self.of_in];
        let rows = product.par_chunks_mut(self.of_in).zip(self.b.par_chunks(self.r));
        rows.for_each(|(row, b)| {
            for (b, a) in b.iter().zip(self.a.chunks_exact(self.of_in)) {
                row.iter_mut().zip(a).for_each(|(sum, a)| *sum += b * a);
            }
            row.iter_mut().for_each(|value| *value *= self.scale as f32);
        });
        product
    }
}

/// The updates of the module, of the adapters that have one.
fn updates(
    module: &str,
    adapters: &[(&Adapter, f64)],
) -> Result<Vec<WeightedUpdate>, CombineError> {
    let mut updates: Vec<WeightedUpdate> = Vec::new();
    for (adapter, (of, weight)) in adapters.iter().enumerate() {
        let Some(lora) = of.modules.get(module) else { continue };
        let update = WeightedUpdate {
            adapter,
            weight: *weight,
            scale: lora.scale,
            a: lora.a.as_detached_tensor().flatten_all()?.to_vec1()?,
            b: lora.b.as_detached_tensor().flatten_all()?.to_vec1()?,
            r: lora.r(),
            of_in: lora.in_features(),
            out: lora.out_features(),
        };
        if let Some(first) = updates.first()
            && (first.out, first.of_in) != (update.out, update.of_in)
        {
            return Err(CombineError::Shape {
                module: module.into(),
                name: of.name.clone(),
                found: (update.out, update.of_in),
                needed: (first.out, first.of_in),
            });
        }
        updates.push(update);
    }
    Ok(updates)
}

/// Factors of a combined update of scale 1.
struct CombinedFactors {
    /// `A (r, in)`.
    a: Vec<f32>,
    /// `B (out, r)`.
    b: Vec<f32>,
    r: usize,
    of_in: usize,
    out: usize,
}

impl CombinedFactors {
    /// An update of rank r; the additional ranks are zero.
    fn padded(mut self, r: usize) -> candle_core::Result<Lora> {
        self.a.resize(r * self.of_in, 0.0);
        let mut b = vec![0f32; self.out * r];
        for (to, from) in b.chunks_exact_mut(r).zip(self.b.chunks_exact(self.r)) {
            to[..self.r].copy_from_slice(from);
        }
        let a = Var::from_vec(self.a, (r, self.of_in), &Device::Cpu)?;
        Ok(Lora::new(a, Var::from_vec(b, (self.out, r), &Device::Cpu)?, 1.0))
    }
}

/// All ranks concatenated: exactly the weighted sum.
fn stacked(updates: &[WeightedUpdate]) -> CombinedFactors {
    let (r, out, of_in) = (updates.iter().map(|u| u.r).sum(), updates[0].out, updates[0].of_in);
    let mut a = Vec::with_capacity(r * of_in);
    let mut b = vec![0f32; out * r];
    let mut first = 0;
    for update in updates {
        let factor = (update.weight * update.scale) as f32;
        a.extend(update.a.iter().map(|value| value * factor));
        for (to, from) in b.chunks_exact_mut(r).zip(update.b.chunks_exact(update.r)) {
            to[first..first + update.r].copy_from_slice(from);
        }
        first += update.r;
    }
    CombinedFactors { a, b, r, of_in, out }
}

/// Combines the A's and the B's separately.
fn combine_factors(
    module: &str,
    updates: &[WeightedUpdate],
    settings: &Combination<'_>,
    density: f64,
) -> Result<CombinedFactors, CombineError> {
    let ranks: Vec<usize> = updates.iter().map(|update| update.r).collect();
    if ranks.iter().any(|r| *r != ranks[0]) {
        let (module, method) = (module.into(), settings.method.name());
        return Err(CombineError::Ranks { module, ranks, method });
    }
    let roots = |with_sign: bool| -> Vec<f32> {
        let root = |update: &WeightedUpdate| {
            let weight = update.weight * update.scale;
            weight.abs().sqrt() * if with_sign && weight < 0.0 { -1.0 } else { 1.0 }
        };
        updates.iter().map(|update| root(update) as f32).collect()
    };
    let of_a = updates.iter().map(|update| update.a.clone()).collect();
    let of_b = updates.iter().map(|update| update.b.clone()).collect();
    Ok(CombinedFactors {
        a: merged(of_a, &roots(true), UpdateMatrix::A, (module, updates), settings, density)?,
        b: merged(of_b, &roots(false), UpdateMatrix::B, (module, updates), settings, density)?,
        r: ranks[0],
        of_in: updates[0].of_in,
        out: updates[0].out,
    })
}

/// Prunes the matrices of all adapters, elects signs, and sums.
fn merged(
    mut matrices: Vec<Vec<f32>>,
    weights: &[f32],
    matrix: UpdateMatrix,
    (module, updates): (&str, &[WeightedUpdate]),
    settings: &Combination<'_>,
    density: f64,
) -> Result<Vec<f32>, CombineError> {
    for (values, update) in matrices.iter_mut().zip(updates) {
        match settings.method.pruning() {
            Pruning::Magnitude if density < 1.0 => keep_largest(values, density),
            Pruning::Random if density < 1.0 => {
                let (adapter, count) = (update.adapter, values.len());
                let draw = MaskRequest { module, adapter, matrix, count, density };
                keep_drawn(values, &settings.masks.of(&draw)?, density);
            }
            _ => {}
        }
    }
    Ok(if settings.method.elects() {
        let sign = settings.majority_sign_method.unwrap_or(MajoritySign::Total);
        elected(&matrices, weights, sign)
    } else {
        summed(&matrices, weights)
    })
}

impl DareMasks<'_> {
    fn of(self, draw: &MaskRequest<'_>) -> Result<Vec<bool>, CombineError> {
        match self {
            Self::Seed(seed) => {
                let purpose = format!("dare {:?} {}", draw.matrix, draw.module);
                let mut stream = Stream::new(seed, &purpose, &[draw.adapter as u64]);
                Ok((0..draw.count).map(|_| stream.uniform_f64() < draw.density).collect())
            }
            Self::Given(make) => {
                let mask = make(draw);
                if mask.len() == draw.count {
                    Ok(mask)
                } else {
                    Err(CombineError::Settings(format!(
                        "{}: a mask of {}, needed {}",
                        draw.module,
                        mask.len(),
                        draw.count
                    )))
                }
            }
        }
    }
}

/// Zeroes all but a fraction of the largest values; of equal ones the first are kept.
fn keep_largest(values: &mut [f32], density: f64) {
    let kept = (density * values.len() as f64) as usize;
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    if kept > 0 && kept < values.len() {
        let size = |i: u32| values[i as usize].abs();
        order.select_nth_unstable_by(kept, |&i, &j| size(j).total_cmp(&size(i)).then(i.cmp(&j)));
    }
    order[kept..].iter().for_each(|&i| values[i as usize] = 0.0);
}

/// Zeroes the values outside of the mask and scales the others up, so that the expected sum is the same.
fn keep_drawn(values: &mut [f32], mask: &[bool], density: f64) {
    for (value, kept) in values.iter_mut().zip(mask) {
        *value = if *kept { *value / density as f32 } else { 0.0 };
    }
}

fn summed(matrices: &[Vec<f32>], weights: &[f32]) -> Vec<f32> {
    let mut sum = vec![0f32; matrices[0].len()];
    for (values, weight) in matrices.iter().zip(weights) {
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value * weight);
    }
    sum
}

/// The weighted mean of the values with the elected sign, as in TIES: divided by their count, not by the
/// sum of their weights.
fn elected(matrices: &[Vec<f32>], weights: &[f32], method: MajoritySign) -> Vec<f32> {
    let at = |i: usize| {
        let values = || matrices.iter().map(move |values| values[i]);
        let vote = |value: f32| match method {
            MajoritySign::Total => value,
            MajoritySign::Frequency if value == 0.0 => 0.0,
            MajoritySign::Frequency => value.signum(),
        };
        let is_positive = values().map(vote).sum::<f32>() >= 0.0;
        let (mut sum, mut count) = (0f32, 0f32);
        for (value, weight) in values().zip(weights) {
            if value != 0.0 && (value > 0.0) == is_positive {
                sum += value * weight;
                count += 1.0;
            }
        }
        sum / count.max(1.0)
    };
    (0..matrices[0].len()).map(at).collect()
}

/// `B = U diag(s)`, `A = Vᵀ`, of rank r; ranks above the number of triples are zero.
fn cut(triples: Singular, r: usize) -> CombinedFactors {
    let (out, of_in, k) = (triples.u.nrows(), triples.v.nrows(), triples.s.len());
    let mut a = vec![0f32; r * of_in];
    let mut b = vec![0f32; out * r];
    for rank in 0..k {
        for col in 0..of_in {
            a[rank * of_in + col] = triples.v[(col, rank)] as f32;
        }
        for row in 0..out {
            b[row * r + rank] = (triples.u[(row, rank)] * triples.s[rank]) as f32;
        }
    }
    CombinedFactors { a, b, r, of_in, out }
}

fn matrix(values: &[f32], rows: usize, cols: usize) -> Mat<f64> {
    Mat::from_fn(rows, cols, |row, col| f64::from(values[row * cols + col]))
}

/// The first adapter's config with rank and `lora_alpha` r. Its targets are those of the adapters where all
/// name the same, else the paths of the modules.
fn config(adapters: &[(&Adapter, f64)], modules: &BTreeMap<String, Lora>, r: usize) -> LoraConfig {
    let first = &adapters[0].0.config;
    let named = |config: &LoraConfig| {
        let (targets, excluded) = (config.target_modules.clone(), config.exclude_modules.clone());
        (targets, excluded, config.layers_to_transform.clone(), config.layers_pattern.clone())
    };
    let alike = adapters.iter().all(|(adapter, _)| named(&adapter.config) == named(first))
        && adapters.iter().all(|(adapter, _)| adapter.modules.len() == modules.len());
    let names = LoraConfig {
        r,
        lora_alpha: r as f64,
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        use_rslora: false,
        init_lora_weights: InitLoraWeights::KaimingUniform,
        inference_mode: true,
        ..first.clone()
    };
    if alike {
        names
    } else {
        LoraConfig {
            target_modules: Some(Modules::List(modules.keys().cloned().collect())),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            ..names
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(name: &str, modules: &[(&str, usize)]) -> Adapter {
        let mut stream = Stream::new(9, name, &[]);
        let mut var = |rows: usize, cols: usize| {
            let values = (0..rows * cols).map(|_| stream.normal()).collect();
            Var::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
        };
        let modules: BTreeMap<_, _> = modules
            .iter()
            .map(|(module, r)| (module.to_string(), Lora::new(var(*r, 7), var(5, *r), 0.5)))
            .collect();
        let name = name.into();
        let config = LoraConfig::default();
        let saved = BTreeMap::new();
        Adapter { name, config, modules, score: None, saved, tokens: None, head_tokens: None }
    }

    fn how(method: CombinationType) -> Combination<'static> {
        let density = (method.pruning() != Pruning::None).then_some(0.6);
        let masks = DareMasks::Seed(1);
        Combination { method, density, majority_sign_method: None, svd_rank: None, masks }
    }

    fn product(adapter: &Adapter, module: &str) -> Vec<f32> {
        let lora = &adapter.modules[module];
        let product = (lora.b.matmul(lora.a.as_tensor()).unwrap() * lora.scale).unwrap();
        product.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Largest absolute difference of two lists.
    fn apart(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
    }

    #[test]
    fn cat_and_svd_give_the_weighted_sum() {
        let (one, two) = (adapter("one", &[("q", 2), ("k", 3)]), adapter("two", &[("q", 1)]));
        let sum: Vec<f32> = (product(&one, "q").iter().zip(product(&two, "q")))
            .map(|(a, b)| 0.7 * a - 1.5 * b)
            .collect();
        let k: Vec<f32> = product(&one, "k").iter().map(|value| 0.7 * value).collect();
        for (method, r) in [(CombinationType::Cat, 3), (CombinationType::Svd, 3)] {
            let made = combine("made", &[(&one, 0.7), (&two, -1.5)], &how(method)).unwrap();
            assert!(apart(&product(&made, "q"), &sum) < 1e-5, "{method:?}");
            assert!(apart(&product(&made, "k"), &k) < 1e-5, "{method:?}");
            assert_eq!((made.config.r, made.config.lora_alpha), (r, r as f64));
            let paths = Modules::List(vec!["k".into(), "q".into()]);
            assert_eq!(made.config.target_modules, Some(paths));
        }
        let cut = Combination { svd_rank: Some(1), ..how(CombinationType::Svd) };
        let made = combine("made", &[(&one, 1.0)], &cut).unwrap();
        assert_eq!(made.modules["q"].r(), 1);
        assert!(apart(&product(&made, "q"), &product(&one, "q")) > 1e-2);
    }

    #[test]
    fn masks_are_keyed_by_module_adapter_and_matrix() {
        let (one, two) = (adapter("one", &[("q", 2), ("k", 2)]), adapter("two", &[("q", 2)]));
        let made = |method| combine("made", &[(&one, 1.0), (&two, 1.0)], &how(method)).unwrap();
        let alone = combine("made", &[(&one, 1.0)], &how(CombinationType::DareLinearSvd)).unwrap();
        let all = made(CombinationType::DareLinearSvd);
        assert_eq!(product(&all, "k"), product(&alone, "k"));
        assert_eq!(product(&all, "q"), product(&made(CombinationType::DareLinearSvd), "q"));
        assert_ne!(product(&all, "q"), product(&made(CombinationType::DareTiesSvd), "q"));
    }

    #[test]
    fn invalid_combinations_are_errors() {
        let one = adapter("one", &[("q", 2)]);
        let check = |adapters: &[(&Adapter, f64)], settings: &Combination<'_>, needed: &str| {
            let error = combine("made", adapters, settings).unwrap_err().to_string();
            assert!(error.contains(needed), "{error:?} should say {needed:?}");
        };
        let both = |other| [(&one, 1.0), (other, 1.0)];
        let other = adapter("other", &[("q", 3)]);
        check(
            &both(&other),
            &how(CombinationType::Ties),
            "q: adapters of rank [2, 3]; ties needs the same",
        );
        check(&[], &how(CombinationType::Cat), "no adapters");
        check(&[(&one, f64::NAN)], &how(CombinationType::Cat), "weight NaN of one");
        let mut changed = one.copy("changed").unwrap();
        changed.score = Some(changed.modules["q"].a.clone());
        check(&both(&changed), &how(CombinationType::Cat), "adapter changed has a score head");
        let settings = [
            (
                Combination { density: Some(0.5), ..how(CombinationType::Cat) },
                "density only applies to combination types that",
            ),
            (Combination { density: None, ..how(CombinationType::Ties) }, "ties needs a density"),
            (
                Combination { density: Some(1.5), ..how(CombinationType::Ties) },
                "found 1.5, needed 0 to 1",
            ),
            (
                Combination { density: Some(0.0), ..how(CombinationType::DareTies) },
                "needed above 0, to 1",
            ),
            (
                Combination { svd_rank: Some(2), ..how(CombinationType::Cat) },
                "svd_rank only applies to the svd kinds",
            ),
            (Combination { svd_rank: Some(0), ..how(CombinationType::Svd) }, "svd_rank: found 0"),
            (
                Combination {
                    majority_sign_method: Some(MajoritySign::Total),
                    ..how(CombinationType::DareLinear)
                },
                "majority_sign_method only applies to the ties kinds",
            ),
        ];
        for (settings, needed) in &settings {
            check(&[(&one, 1.0)], settings, needed);
        }
        assert!(
            "tie"
                .parse::<CombinationType>()
                .unwrap_err()
                .to_string()
                .contains("magnitude_prune_svd")
        );
    }
}
