//! Adapters initialized from the base's weights: PiSSA (Meng et al. 2024), OLoRA (Büyükakyüz
//! 2024), LoftQ (Li et al. 2023), and DoRA's magnitudes (Liu et al. 2024).
//!
//! PiSSA and OLoRA subtract their initial value `B₀ A₀` from the base's weight and train
//! `W - s B₀ A₀ + s B A`, which starts as the base. Here the base never changes, and a quantized one
//! cannot: the difference would not fit its block type. The update itself is `s (B A - B₀ A₀)`, whatever
//! W is, so here it is a LoRA of rank 2r
//!
//! ```text
//! A' = [A; A₀] (2r, in)    B' = [B, -B₀] (out, 2r)    ΔW = s B' A'
//! ```
//!
//! whose last r ranks are frozen ([`Lora::frozen_ranks`]). It starts at zero (to the rounding of a sum),
//! on a quantized base too, with the same gradients as in PEFT. In a file it is what PEFT's conversion
//! (`path_initial_model_for_weight_conversion`) writes: an update of rank 2r with `lora_alpha` doubled, or
//! multiplied by the square root of two under rsLoRA, which every reader of LoRA understands. A reader
//! that continues training trains all 2r ranks.
//!
//! LoftQ has two forms. For a base that is quantized already and whose original is given, the update
//! starts as the leading singular triples of `W - Q`: one round, after which the model is nearer to the
//! original than its base is. Where the base is quantized here, [`loftq`] alternates.
//!
//! Modules are initialized in parallel while their memory together is at most three times that of the
//! largest: its weight as `f32`, another of that size for LoftQ, and three squares of its shorter side
//! as `f64`.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use faer::Mat;
use rayon::prelude::*;

use crate::base::BaseRows;
use crate::config::{InitLoraWeights, LoraConfig};
use crate::decompose::{Dense, Singular};
use crate::delta::{Adapter, InitError, Lora, Magnitude, TokenRows, init_random};
use crate::rng::Stream;
use crate::targets::{LinearSpec, Target, Unmatched, resolve};

/// Looks up a weight of a base by module path. The embedding's weight is `(vocab_size, hidden_size)`.
pub type WeightLookup<'a> = dyn Fn(&str) -> Option<Box<dyn BaseRows + 'a>> + Sync + 'a;

/// The weights an adapter is initialized from.
#[derive(Clone, Copy)]
pub struct BaseWeights<'a> {
    /// The base's weights, dequantized where they are quantized.
    pub base: &'a WeightLookup<'a>,
    /// The weights before quantization, which LoftQ needs.
    pub original: Option<&'a WeightLookup<'a>>,
}

/// Creates an adapter by its config, on the modules that the config targets on a base with these linear
/// layers and this head. The adapter's config is that of the result: with PiSSA the rank is 2r. Also
/// returns the names and patterns of the config that match no module.
///
/// Modules trained as a whole start as the base's weights, token rows as the base's rows. All tensors
/// are F32 on the CPU.
///
/// # Errors
/// If the config is invalid or does not fit the base, or a weight is missing, of another shape, or not
/// finite.
pub fn begin(
    name: &str,
    mut config: LoraConfig,
    linears: &[LinearSpec],
    head: Option<&str>,
    bases: BaseWeights<'_>,
    seed: u64,
) -> Result<(Adapter, Vec<Unmatched>), InitError> {
    config.validate()?;
    config.trainable_token_indices.sort_unstable();
    config.head_token_indices.sort_unstable();
    let holds = config.init_lora_weights.freezes_ranks();
    if holds && config.lora_dropout > 0.0 {
        let fault =
            "needed 0: with dropped inputs the frozen ranks would not cancel the initial value";
        let (init, p) = (&config.init_lora_weights, config.lora_dropout);
        return Err(InitError::Unsuitable(format!("lora_dropout {p} with {init}: {fault}")));
    }
    let resolved = resolve(&config, linears, head)?;
    let initialized = if holds { config.doubled()? } else { config.as_plain() };
    // The scales that the resulting config means.
    let scales: BTreeMap<String, f64> = resolve(&initialized, linears, head)?
        .targets
        .into_iter()
        .map(|t| (t.spec.name, t.scale))
        .collect();
    let start = Initializer { config: &config, bases, seed };
    let mut modules = BTreeMap::new();
    for group in groups(&resolved.targets) {
        let made: Vec<(String, Lora)> =
            group.into_par_iter().map(|target| start.module(target)).collect::<Result<_, _>>()?;
        modules.extend(made);
    }
    for (module, lora) in &mut modules {
        lora.scale = scales[module];
        if config.use_dora {
            let base = start.weight(module, bases.base)?;
            magnitudes(lora, base.as_ref())?;
        }
    }
    let mut saved = BTreeMap::new();
    for spec in &resolved.saved {
        let base = start.weight(&spec.name, bases.base)?;
        let values = read(&spec.name, base.as_ref())?;
        let shape = (base.rows(), base.cols());
        saved.insert(spec.name.clone(), Var::from_vec(values, shape, &Device::Cpu)?);
    }
    let rows_of = |spec: &Option<LinearSpec>, indices: &[u32]| match spec {
        None => Ok(None),
        Some(spec) => {
            let base = start.weight(&spec.name, bases.base)?;
            token_rows(indices, base.as_ref()).map(Some)
        }
    };
    let tokens = rows_of(&resolved.tokens, &config.trainable_token_indices)?;
    let head_tokens = rows_of(&resolved.head_tokens, &config.head_token_indices)?;
    let name = name.into();
    let adapter =
        Adapter { name, config: initialized, modules, score: None, saved, tokens, head_tokens };
    Ok((adapter, resolved.unmatched))
}

/// Adds DoRA's magnitudes: the norms of the merged rows, so that the output does not change yet.
fn magnitudes(lora: &mut Lora, base: &dyn BaseRows) -> Result<(), InitError> {
    let out = lora.out_features();
    let vector = Var::from_vec(vec![0f32; out], out, &Device::Cpu)?;
    lora.magnitude = Some(Magnitude::new(vector.clone()));
    if let Some(norms) = lora.row_norms(base)? {
        vector.set(&Tensor::from_slice(&norms, out, &Device::Cpu)?)?;
    }
    Ok(())
}

fn token_rows(indices: &[u32], embedding: &dyn BaseRows) -> Result<TokenRows, InitError> {
    let cols = embedding.cols();
    let mut rows = vec![0f32; indices.len() * cols];
    for (&token, row) in indices.iter().zip(rows.chunks_exact_mut(cols)) {
        embedding.read(token as usize..token as usize + 1, row);
    }
    let rows = Var::from_vec(rows, (indices.len(), cols), &Device::Cpu)?;
    Ok(TokenRows { indices: indices.to_vec(), rows })
}

/// The targets in groups that are initialized in parallel. The split depends on sizes only.
fn groups(targets: &[Target]) -> Vec<Vec<&Target>> {
    let cost = |target: &Target| {
        let (of_in, out) = (target.spec.in_features, target.spec.out_features);
        8 * of_in * out + 24 * of_in.min(out).pow(2)
    };
    let most = 3 * targets.iter().map(cost).max().unwrap_or(0);
    let (mut groups, mut sum) = (Vec::new(), 0);
    let mut group = Vec::new();
    for target in targets {
        if sum + cost(target) > most && !group.is_empty() {
            groups.push(std::mem::take(&mut group));
            sum = 0;
        }
        sum += cost(target);
        group.push(target);
    }
    groups.push(group);
    groups
}

/// Initializes the modules of a new adapter.
struct Initializer<'a, 'b> {
    config: &'a LoraConfig,
    bases: BaseWeights<'b>,
    seed: u64,
}

impl Initializer<'_, '_> {
    /// One update, with its scale before ranks are doubled.
    fn module(&self, target: &Target) -> Result<(String, Lora), InitError> {
        let Target { spec, r, scale } = target;
        let init = &self.config.init_lora_weights;
        let lora = match init {
            InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora if spec.embedding => {
                // As in PEFT, an embedding starts as plain LoRA; its frozen ranks are zero.
                let plain =
                    init_random(&InitLoraWeights::KaimingUniform, target, self.seed, &Device::Cpu)?;
                let rows = plain.b.flatten_all()?.to_vec1::<f32>()?;
                let b =
                    Mat::from_fn(spec.out_features, *r, |row, col| f64::from(rows[row * r + col]));
                with_frozen_ranks(target, &b, &Mat::zeros(*r, spec.in_features), true)?
            }
            InitLoraWeights::Pissa { niter } => {
                let base = self.weight(&spec.name, self.bases.base)?;
                let values = read(&spec.name, base.as_ref())?;
                let w = dense(spec, &values, base.as_ref())?;
                let made = match niter {
                    None => w.leading(*r),
                    Some(niter) => {
                        let mut stream =
                            Stream::new(self.seed, &format!("pissa {}", spec.name), &[]);
                        w.leading_randomized(*r, *niter, &mut stream)
                    }
                };
                let made = made.map_err(|_| InitError::NotConverged(spec.name.clone()))?;
                let (b, a) = factors(&made, positive(spec, *scale, init)?);
                with_frozen_ranks(target, &b, &a, false)?
            }
            InitLoraWeights::Olora => {
                let base = self.weight(&spec.name, self.bases.base)?;
                let values = read(&spec.name, base.as_ref())?;
                let (q, r) = dense(spec, &values, base.as_ref())?.leading_qr(*r);
                with_frozen_ranks(target, &q, &r, false)?
            }
            InitLoraWeights::Loftq => {
                let Some(original) = self.bases.original else {
                    return Err(InitError::Unsuitable(
                        "init_lora_weights loftq needs the base before its quantization".into(),
                    ));
                };
                let (base, original) =
                    (self.weight(&spec.name, self.bases.base)?, self.weight(&spec.name, original)?);
                let mut lost = read(&spec.name, original.as_ref())?;
                let known = read(&spec.name, base.as_ref())?;
                let w = dense(spec, &known, base.as_ref())?;
                dense(spec, &lost, original.as_ref())?;
                lost.iter_mut().zip(w.values).for_each(|(lost, known)| *lost -= known);
                drop(known);
                let (rows, cols) = (base.rows(), base.cols());
                let made = Dense { values: &lost, rows, cols }.leading(*r);
                let mut made = made.map_err(|_| InitError::NotConverged(spec.name.clone()))?;
                if made.s.iter().all(|s| *s == 0.0) {
                    // Quantization lost nothing, and factors of zeros would never train.
                    let init = &InitLoraWeights::KaimingUniform;
                    return Ok((
                        spec.name.clone(),
                        init_random(init, target, self.seed, &Device::Cpu)?,
                    ));
                }
                if spec.embedding {
                    std::mem::swap(&mut made.u, &mut made.v);
                }
                let (b, a) = factors(&made, positive(spec, *scale, init)?);
                plain(target, &b, &a)?
            }
            _ => init_random(init, target, self.seed, &Device::Cpu)?,
        };
        Ok((spec.name.clone(), lora))
    }

    fn weight<'b>(
        &self,
        module: &str,
        weights: &WeightLookup<'b>,
    ) -> Result<Box<dyn BaseRows + 'b>, InitError> {
        weights(module)
            .ok_or_else(|| InitError::Unsuitable(format!("{module}: no weight of that name")))
    }
}

/// Factors with `scale · B A = U diag(s) Vᵀ` and equal norms: `B (out, k)`, `A (k, in)`.
fn factors(made: &Singular, scale: f64) -> (Mat<f64>, Mat<f64>) {
    let root: Vec<f64> = made.s.iter().map(|s| (s / scale).sqrt()).collect();
    let b = Mat::from_fn(made.u.nrows(), root.len(), |row, k| made.u[(row, k)] * root[k]);
    let a = Mat::from_fn(root.len(), made.v.nrows(), |k, col| made.v[(col, k)] * root[k]);
    (b, a)
}

/// An update that starts as `B (out, k) · A (k, in)`; ranks above k are zero.
fn plain(target: &Target, b: &Mat<f64>, a: &Mat<f64>) -> Result<Lora, InitError> {
    let (of_in, out, r) = (target.spec.in_features, target.spec.out_features, target.r);
    let (mut of_a, mut of_b) = (vec![0f32; r * of_in], vec![0f32; out * r]);
    fill(&mut of_a, &mut of_b, (b, a), 0, 1.0);
    let a = Var::from_vec(of_a, (r, of_in), &Device::Cpu)?;
    let b = Var::from_vec(of_b, (out, r), &Device::Cpu)?;
    Ok(Lora::new(a, b, target.scale))
}

/// An update of twice the rank that starts at zero: `B A` minus a frozen `B A`, or with `b_alone` a
/// frozen zero.
fn with_frozen_ranks(
    target: &Target,
    b: &Mat<f64>,
    a: &Mat<f64>,
    b_alone: bool,
) -> Result<Lora, InitError> {
    let (of_in, out, r) = (target.spec.in_features, target.spec.out_features, target.r);
    let (mut of_a, mut of_b) = (vec![0f32; 2 * r * of_in], vec![0f32; out * 2 * r]);
    fill(&mut of_a, &mut of_b, (b, a), 0, 1.0);
    if !b_alone {
        fill(&mut of_a, &mut of_b, (b, a), r, -1.0);
    }
    let a = Var::from_vec(of_a, (2 * r, of_in), &Device::Cpu)?;
    let b = Var::from_vec(of_b, (out, 2 * r), &Device::Cpu)?;
    Ok(Lora { frozen_ranks: r, ..Lora::new(a, b, target.scale) })
}

/// Writes factors into the ranks from `first` on.
fn fill(
    of_a: &mut [f32],
    of_b: &mut [f32],
    (b, a): (&Mat<f64>, &Mat<f64>),
    first: usize,
    sign: f32,
) {
    let (k, of_in, out) = (a.nrows(), a.ncols(), b.nrows());
    let r = of_b.len() / out;
    for rank in 0..k {
        for col in 0..of_in {
            of_a[(first + rank) * of_in + col] = a[(rank, col)] as f32;
        }
        for row in 0..out {
            of_b[row * r + first + rank] = b[(row, rank)] as f32 * sign;
        }
    }
}

/// A weight's numbers `(rows, cols)`, all finite.
fn read(module: &str, weight: &dyn BaseRows) -> Result<Vec<f32>, InitError> {
    let mut values = vec![0f32; weight.rows() * weight.cols()];
    weight.read(0..weight.rows(), &mut values);
    if values.iter().all(|value| value.is_finite()) {
        Ok(values)
    } else {
        Err(InitError::Unsuitable(format!("{module}: the weight holds values that are not finite")))
    }
}

/// The numbers as a matrix, if it is of the module's shape.
fn dense<'v>(
    spec: &LinearSpec,
    values: &'v [f32],
    weight: &dyn BaseRows,
) -> Result<Dense<'v>, InitError> {
    let found = (weight.rows(), weight.cols());
    let needed = if spec.embedding {
        (spec.in_features, spec.out_features)
    } else {
        (spec.out_features, spec.in_features)
    };
    if found == needed {
        Ok(Dense { values, rows: found.0, cols: found.1 })
    } else {
        Err(InitError::Unsuitable(format!(
            "{}: the weight is {found:?}, needed {needed:?}",
            spec.name
        )))
    }
}

fn positive(spec: &LinearSpec, scale: f64, init: &InitLoraWeights) -> Result<f64, InitError> {
    if scale > 0.0 {
        Ok(scale)
    } else {
        Err(InitError::Unsuitable(format!(
            "{}: init_lora_weights {init} with a scale of {scale}, needed a lora_alpha above 0",
            spec.name
        )))
    }
}

/// A weight in two parts, `Q + scale · B A`, of which Q is quantized.
#[derive(Debug, Clone)]
pub struct Loftq {
    /// What the quantized part is read as, `(rows, cols)`.
    pub quantized: Vec<f32>,
    /// `A (r, cols)`.
    pub a: Vec<f32>,
    /// `B (rows, r)`.
    pub b: Vec<f32>,
    /// `‖W - Q - scale · B A‖` after each round.
    pub norms: Vec<f64>,
}

/// LoftQ's alternation (Li et al. 2023, algorithm 1): `Q ← quantize(W - s B A)`, then B and A the r
/// leading singular triples of `W - Q`, `rounds` times. `quantize` gives what its blocks are read as.
///
/// The second half of a round is the best there is; the first only about, since a quantizer chooses
/// the scales of its blocks too. So the result is that of the best round.
pub fn loftq(
    weight: &dyn BaseRows,
    r: usize,
    scale: f64,
    rounds: usize,
    quantize: &dyn Fn(&[f32]) -> Vec<f32>,
) -> Result<Loftq, InitError> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let spec = LinearSpec {
        name: "loftq".into(),
        in_features: cols,
        out_features: rows,
        embedding: false,
        added_tokens: 0,
    };
    let scale = positive(&spec, scale, &InitLoraWeights::Loftq)?;
    let values = read(&spec.name, weight)?;
    let target = Target { spec, r, scale };
    let mut left = values.clone(); // W - s B A
    let mut best: Option<Loftq> = None;
    let mut norms = Vec::with_capacity(rounds);
    for _ in 0..rounds.max(1) {
        let quantized = quantize(&left);
        let lost: Vec<f32> = values.iter().zip(&quantized).map(|(w, q)| w - q).collect();
        let made = Dense { values: &lost, rows, cols }.leading(r);
        let made = made.map_err(|_| InitError::NotConverged(target.spec.name.clone()))?;
        let (b, a) = factors(&made, scale);
        let (mut of_a, mut of_b) = (vec![0f32; r * cols], vec![0f32; rows * r]);
        fill(&mut of_a, &mut of_b, (&b, &a), 0, 1.0);
        let mut square = 0f64;
        for row in 0..rows {
            let update = merged_row(&of_b[row * r..(row + 1) * r], &of_a, cols, scale);
            for (col, update) in update.iter().enumerate() {
                let at = row * cols + col;
                left[at] = values[at] - update;
                square += f64::from(lost[at] - update).powi(2);
            }
        }
        norms.push(square.sqrt());
        if best.as_ref().is_none_or(|best| best.norms[0] > square.sqrt()) {
            best = Some(Loftq { quantized, a: of_a, b: of_b, norms: vec![square.sqrt()] });
        }
    }
    let best = best.expect("there is a round");
    Ok(Loftq { norms, ..best })
}

/// A row of `scale · B A`.
fn merged_row(b: &[f32], a: &[f32], cols: usize, scale: f64) -> Vec<f32> {
    let mut sum = vec![0f32; cols];
    for (b, a) in b.iter().zip(a.chunks_exact(cols)) {
        sum.iter_mut().zip(a).for_each(|(sum, a)| *sum += b * a);
    }
    sum.iter_mut().for_each(|sum| *sum *= scale as f32);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{EMBEDDING, HEAD, Modules};

    struct Weight(Vec<f32>, usize);

    impl BaseRows for Weight {
        fn rows(&self) -> usize {
            self.0.len() / self.1
        }

        fn cols(&self) -> usize {
            self.1
        }

        fn read(&self, rows: std::ops::Range<usize>, out: &mut [f32]) {
            out.copy_from_slice(&self.0[rows.start * self.1..rows.end * self.1]);
        }
    }

    fn spec(name: &str, of_in: usize, out: usize) -> LinearSpec {
        let embedding = name == EMBEDDING;
        let (name, added_tokens) = (name.into(), 0);
        LinearSpec { name, in_features: of_in, out_features: out, embedding, added_tokens }
    }

    fn linears() -> Vec<LinearSpec> {
        vec![spec("q", 12, 20), spec("k", 12, 3), spec(EMBEDDING, 30, 12), spec(HEAD, 12, 30)]
    }

    /// Random weights; `grain` rounds them.
    fn weight(module: &str, grain: f32) -> Option<Box<dyn BaseRows>> {
        let spec = linears().into_iter().find(|spec| spec.name == module)?;
        let mut stream = Stream::new(5, module, &[]);
        let values = (0..spec.in_features * spec.out_features).map(|_| stream.normal());
        let values = values.map(|v| if grain > 0.0 { (v / grain).round() * grain } else { v });
        let cols = if spec.embedding { spec.out_features } else { spec.in_features };
        Some(Box::new(Weight(values.collect(), cols)))
    }

    fn config(init: InitLoraWeights, targets: &[&str]) -> LoraConfig {
        let targets = targets.iter().map(|name| name.to_string()).collect();
        LoraConfig {
            r: 4,
            lora_alpha: 6.0,
            rank_pattern: vec![("k".into(), 5)],
            alpha_pattern: vec![("q".into(), 3.0)],
            target_modules: Some(Modules::List(targets)),
            init_lora_weights: init,
            ..LoraConfig::default()
        }
    }

    fn initialized(config: LoraConfig) -> Result<Adapter, InitError> {
        let (base, original) =
            (|module: &str| weight(module, 0.25), |module: &str| weight(module, 0.0));
        let bases = BaseWeights { base: &base, original: Some(&original) };
        begin("test", config, &linears(), Some(HEAD), bases, 1).map(|(adapter, _)| adapter)
    }

    /// `s B A`, of the ranks given.
    fn product(lora: &Lora, ranks: std::ops::Range<usize>) -> Vec<f32> {
        let a = lora.a.narrow(0, ranks.start, ranks.len()).unwrap();
        let b = lora.b.narrow(1, ranks.start, ranks.len()).unwrap();
        let product = (b.contiguous().unwrap().matmul(&a).unwrap() * lora.scale).unwrap();
        product.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn largest(values: &[f32]) -> f32 {
        values.iter().fold(0.0, |most, value| most.max(value.abs()))
    }

    #[test]
    fn pissa_and_olora_start_at_zero_from_the_base() {
        for (init, use_rslora) in [
            (InitLoraWeights::Pissa { niter: None }, false),
            (InitLoraWeights::Pissa { niter: Some(20) }, true),
            (InitLoraWeights::Olora, true),
        ] {
            let asked = LoraConfig { use_rslora, ..config(init, &["q", "k", "embed_tokens"]) };
            let adapter = initialized(asked.clone()).unwrap();
            let resolved = resolve(&asked, &linears(), Some(HEAD)).unwrap();
            for Target { spec, r, scale } in resolved.targets {
                let lora = &adapter.modules[&spec.name];
                assert_eq!((lora.r(), lora.frozen_ranks), (2 * r, r), "{}", spec.name);
                assert!((lora.scale - scale).abs() < 1e-12, "{}", spec.name);
                assert!(largest(&product(lora, 0..2 * r)) < 1e-5, "{}", spec.name);
                let start = largest(&product(lora, 0..r));
                assert_eq!(start > 0.1, !spec.embedding, "{}: {start}", spec.name);
            }
            assert_eq!(adapter.config.init_lora_weights, InitLoraWeights::KaimingUniform);
            assert_eq!(adapter.config.rank_pattern, [("k".to_string(), 10)]);
            if asked.init_lora_weights == InitLoraWeights::Olora {
                continue; // its start is a part of the base times the scale
            }
            // A module of three rows has three ranks: all of it.
            let mut base = vec![0f32; 36];
            weight("k", 0.25).unwrap().read(0..3, &mut base);
            let whole = product(&adapter.modules["k"], 0..5);
            assert!(whole.iter().zip(&base).all(|(made, base)| (made - base).abs() < 1e-5));
        }
    }

    #[test]
    fn loftq_reduces_quantization_error() {
        let adapter =
            initialized(config(InitLoraWeights::Loftq, &["q", "k", "embed_tokens"])).unwrap();
        for (module, rows) in [("q", 20), ("k", 3), (EMBEDDING, 30)] {
            let lora = &adapter.modules[module];
            assert_eq!(lora.frozen_ranks, 0);
            let update = product(lora, 0..lora.r());
            let (known, lost) = (weight(module, 0.25).unwrap(), weight(module, 0.0).unwrap());
            let known = read(module, known.as_ref()).unwrap();
            let lost = read(module, lost.as_ref()).unwrap();
            let cols = lost.len() / rows;
            let norm = |with: f32| -> f32 {
                let left = (0..lost.len()).map(|i| {
                    let transposed = (i % cols) * rows + i / cols;
                    let update = update[if module == EMBEDDING { transposed } else { i }];
                    (lost[i] - known[i] - with * update).powi(2)
                });
                left.sum::<f32>().sqrt()
            };
            assert!(norm(1.0) < 0.8 * norm(0.0), "{module}: {} of {}", norm(1.0), norm(0.0));
        }
        assert_eq!(adapter.config.init_lora_weights, InitLoraWeights::KaimingUniform);
    }

    #[test]
    fn loftq_alternates() {
        let original = weight("q", 0.0).unwrap();
        let quantize = |values: &[f32]| values.iter().map(|v| (v / 0.7).round() * 0.7).collect();
        let made = loftq(original.as_ref(), 3, 1.5, 5, &quantize).unwrap();
        assert!(made.norms[4] < made.norms[0], "{:?}", made.norms);
        let values = read("q", original.as_ref()).unwrap();
        let square = values.iter().zip(&made.quantized).enumerate().map(|(i, (w, q))| {
            let update = merged_row(&made.b[i / 12 * 3..][..3], &made.a, 12, 1.5)[i % 12];
            f64::from(w - q - update).powi(2)
        });
        let best = made.norms.iter().fold(f64::MAX, |best, norm| best.min(*norm));
        assert!((square.sum::<f64>().sqrt() - best).abs() < 1e-5);
    }

    #[test]
    fn magnitudes_start_as_row_norms() {
        for init in
            [InitLoraWeights::KaimingUniform, InitLoraWeights::Random, InitLoraWeights::Olora]
        {
            let adapter =
                initialized(LoraConfig { use_dora: true, ..config(init, &["q", "k"]) }).unwrap();
            let lora = &adapter.modules["q"];
            let mut merged = vec![0f32; 240];
            weight("q", 0.25).unwrap().read(0..20, &mut merged);
            merged.iter_mut().zip(product(lora, 0..lora.r())).for_each(|(w, update)| *w += update);
            let vector = lora.magnitude.as_ref().unwrap().vector.to_vec1::<f32>().unwrap();
            for (row, m) in merged.chunks(12).zip(vector) {
                let norm = row.iter().map(|w| w * w).sum::<f32>().sqrt();
                assert!((norm - m).abs() < 1e-5, "{norm} {m}");
            }
        }
    }

    #[test]
    fn saved_modules_and_token_rows_start_as_the_base() {
        let adapter = initialized(LoraConfig {
            modules_to_save: vec!["lm_head".into()],
            trainable_token_indices: vec![7, 2],
            ..config(InitLoraWeights::KaimingUniform, &["q"])
        });
        let adapter = adapter.unwrap();
        let (head, embedding) = (weight(HEAD, 0.25).unwrap(), weight(EMBEDDING, 0.25).unwrap());
        let saved = adapter.saved[HEAD].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(saved, read(HEAD, head.as_ref()).unwrap());
        let tokens = adapter.tokens.unwrap();
        assert_eq!(tokens.indices, [2, 7]);
        let known = read(EMBEDDING, embedding.as_ref()).unwrap();
        let rows = tokens.rows.to_vec2::<f32>().unwrap();
        assert_eq!(rows, [&known[24..36], &known[84..96]]);
    }

    #[test]
    fn unsupported_initializations_are_errors() {
        let check = |config: LoraConfig, needed: &str| {
            let error = initialized(config).unwrap_err().to_string();
            assert!(error.contains(needed), "{error:?} should say {needed:?}");
        };
        let pissa = || config(InitLoraWeights::Pissa { niter: None }, &["q"]);
        check(LoraConfig { lora_dropout: 0.1, ..pissa() }, "lora_dropout 0.1 with pissa: needed 0");
        check(LoraConfig { alpha_pattern: Vec::new(), lora_alpha: 0.0, ..pissa() }, "scale of 0");
        check(LoraConfig { r: 40_000, ..pissa() }, "found 80000, needed 1 to 65536");
        check(
            LoraConfig { use_dora: true, ..config(InitLoraWeights::Olora, &["lm_head"]) },
            "use_dora",
        );
        let bases = BaseWeights { base: &|module: &str| weight(module, 0.0), original: None };
        let loftq = config(InitLoraWeights::Loftq, &["q"]);
        let error = begin("test", loftq, &linears(), Some(HEAD), bases, 1).unwrap_err();
        assert!(error.to_string().contains("before its quantization"), "{error}");
    }
}
