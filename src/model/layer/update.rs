//! The updates of active adapters on linear layers, including DoRA, and the gradients of trainable
//! adapters.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;
use rayon::prelude::*;

use super::buffers::{LoraTape, TapeBuffer, Workspace};
use super::elementwise::{CHUNK, times};
use super::layer_pass::LayerPass;
use crate::model::gradients::GradientBuffers;
use crate::model::layers::Linear;
use crate::ops::Values;
use crate::ops::gemm::{Init, Out, PackedRows, Product, Strided, Term, Weights, multiply};

/// A linear layer, the gradient of its output `(N, rows)`, and what the forward pass kept.
pub(super) type LinearGrad<'a> = (&'a Linear, &'a [f32], &'a LoraTape);

/// An adapter on a linear layer for a run of tokens.
pub(super) struct ActiveUpdate<'a> {
    a: Values<'a>,
    b: Values<'a>,
    pub(super) r: usize,
    scale: f32,
    pub(super) trainable: bool,
    pub(super) tokens: Range<usize>,
    /// Index of the dropout mask before A in the workspace.
    pub(super) mask: Option<usize>,
    pub(super) dora: Option<Dora>,
}

impl ActiveUpdate<'_> {
    pub(super) fn a(&self) -> Weights<'_> {
        let cols = self.a.len() / self.r;
        Weights::Dense { values: &self.a, cols, scale: 1.0 }
    }

    pub(super) fn b(&self) -> Weights<'_> {
        let values = self.dora.as_ref().map_or(&*self.b, |dora| &dora.b);
        Weights::Dense { values, cols: self.r, scale: self.scale }
    }
}

/// DoRA's form of an update: with `s = m / ‖W + scale · B A‖` per row, the layer's output is
/// `s ⊙ (W x + scale · B A x)`, or the base's and `weight` times the difference to that.
pub(super) struct Dora {
    /// B with its rows scaled, `(out, r)`.
    b: Vec<f32>,
    /// s and the norms, `(out)`.
    scales: Vec<f32>,
    norms: Arc<[f32]>,
    /// Weight of the adapter.
    weight: f32,
}

/// Scales of the base's product, per output, for a range of tokens: 1 plus the sum
/// of `weight · (s - 1)` of all DoRA updates of the run.
pub(super) type BaseScales = Vec<(Range<usize>, Vec<f32>)>;

/// A trainable update, and the inputs of its gradients.
struct TrainedUpdate<'a> {
    linear: &'a Linear,
    /// The gradient of the layer's output, `(N, out)`.
    dy: &'a [f32],
    /// `x · Aᵀ` and its gradient, `(N, r)`.
    hidden: &'a [f32],
    dhidden: &'a [f32],
    base: &'a TapeBuffer,
    update: &'a ActiveUpdate<'a>,
}

impl<'a> LayerPass<'a> {
    /// The updates of the active adapters on linear layers. Dropout masks are sampled, 0 outside their tokens.
    pub(super) fn updates<'l>(
        &self,
        linears: impl Iterator<Item = &'l Linear>,
        masks: &mut Vec<Vec<f32>>,
    ) -> Result<Vec<Vec<ActiveUpdate<'a>>>> {
        let runs = self.pass.adapters.runs(&self.pass.segments);
        let mut drawn = 0;
        let mut all = Vec::new();
        for linear in linears {
            let mut updates = Vec::new();
            for (tokens, active) in &runs {
                for active in *active {
                    let Some(lora) = active.adapter.modules.get(&linear.name) else { continue };
                    let mask = self.pass.dropout.filter(|_| active.trainable).map(|dropout| {
                        if drawn == masks.len() {
                            masks.push(Vec::new());
                        }
                        let (mask, width) = (&mut masks[drawn], lora.in_features());
                        mask.resize(self.tokens * width, 0.0);
                        mask[..tokens.start * width].fill(0.0);
                        mask[tokens.end * width..].fill(0.0);
                        let own = &mut mask[tokens.start * width..tokens.end * width];
                        dropout.draw(&linear.name, tokens.clone(), own);
                        drawn += 1;
                        drawn - 1
                    });
                    let b = Values::of(lora.b.as_tensor())?;
                    let dora = match lora.row_norms(&**linear.matrix()?)? {
                        Some(norms) => {
                            let scales = lora.row_scales(&**linear.matrix()?)?;
                            let scales = scales.expect("magnitudes have norms");
                            let rows = b.chunks_exact(lora.r()).zip(&scales);
                            let b = rows.flat_map(|(b, s)| b.iter().map(move |b| b * s)).collect();
                            Some(Dora { b, scales, norms, weight: active.weight as f32 })
                        }
                        None => None,
                    };
                    updates.push(ActiveUpdate {
                        a: Values::of(lora.a.as_tensor())?,
                        b,
                        r: lora.r(),
                        scale: (lora.scale * active.weight) as f32,
                        trainable: active.trainable,
                        tokens: tokens.clone(),
                        mask,
                        dora,
                    });
                }
            }
            all.push(updates);
        }
        Ok(all)
    }

    /// `dA += dlowᵀ · x` and `dB += scale · dyᵀ · hidden` of trainable updates.
    pub(super) fn lora_gradients(
        &self,
        linears: &[LinearGrad],
        x: &[f32],
        updates: &[Vec<ActiveUpdate>],
        dhiddens: &[Vec<f32>],
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        let trained = trained_updates(linears, updates, dhiddens);
        if trained.is_empty() {
            return Ok(());
        }
        let width = linears[0].0.cols();
        self.lora_products(&trained, x, width, work);
        self.add_lora_gradients(&trained, width, gradients, work);
        Ok(())
    }

    /// Leaves the products that gradients are made of in `work.products`: `dhiddenᵀ · x (r, width)` of
    /// all updates without dropout stacked, so that x is packed once; the same of each with dropout, whose
    /// x is what is left of it behind its mask; and `hiddenᵀ · dy (r, out)` of each.
    fn lora_products(
        &self,
        trained: &[TrainedUpdate],
        x: &[f32],
        width: usize,
        work: &mut Workspace,
    ) {
        let (n, isa, panel) = (self.tokens, self.isa, self.backward);
        let dense = |values, cols| Weights::Dense { values, cols, scale: 1.0 };
        let (mut masked, mut plain) = (Vec::new(), Vec::new());
        for one in trained {
            match one.update.mask {
                Some(mask) => masked.push((one, mask)),
                None => plain.push(one),
            }
        }
        let stacked: usize = plain.iter().map(|one| one.update.r).sum();
        for &(_, mask) in &masked {
            times(&mut work.masks[mask], x);
        }
        let count = 1 + masked.len() + trained.len();
        work.factors.resize_with(count.max(work.factors.len()), PackedRows::default);
        work.products.resize_with(count.max(work.products.len()), Vec::new);
        let transposed = &mut work.transposed;
        let mut factors = work.factors.iter_mut();
        let mut pack = |transposed: &[f32]| {
            let factor = factors.next().expect("as many as were counted");
            let stride = n;
            factor.pack(
                isa,
                panel,
                Strided { values: transposed, stride },
                transposed.len() / n,
                n,
            );
        };
        transposed.clear();
        plain.iter().for_each(|one| transpose(one.dhidden, one.update.r, transposed));
        pack(transposed);
        let dhiddens = masked.iter().map(|(one, _)| (one.dhidden, one.update.r));
        let hiddens = trained.iter().map(|one| (one.hidden, one.update.r));
        for (hidden, r) in dhiddens.chain(hiddens) {
            transposed.clear();
            transpose(hidden, r, transposed);
            pack(transposed);
        }

        let mut sources = vec![(dense(x, width), stacked, width)];
        let of_masks = masked.iter().map(|&(one, mask)| (&work.masks[mask], one.update.r));
        sources.extend(of_masks.map(|(x, r)| (dense(x, width), r, width)));
        sources.extend(trained.iter().map(|one| {
            let out = one.linear.rows();
            (dense(one.dy, out), one.update.r, out)
        }));
        let mut products = Vec::new();
        for ((&(weights, rows, cols), factor), out) in
            sources.iter().zip(&work.factors).zip(&mut work.products)
        {
            out.resize(rows * cols, 0.0);
            if rows > 0 {
                let terms = vec![Term { x: factor, weights, transposed: false }];
                let out = Out::new(out, cols);
                products.push(Product { terms, init: Init::Zero, out });
            }
        }
        multiply(isa, &mut products);
    }

    /// Adds what [`Self::lora_products`] left to the gradients.
    fn add_lora_gradients(
        &self,
        trained: &[TrainedUpdate],
        width: usize,
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) {
        let masked = trained.iter().filter(|one| one.update.mask.is_some()).count();
        let (mut in_stack, mut next_masked) = (0, 1);
        for (i, TrainedUpdate { linear, dy, base, update, .. }) in trained.iter().enumerate() {
            let place = gradients.places[&linear.name];
            let da = match update.mask {
                None => {
                    let rows = in_stack * width..(in_stack + update.r) * width;
                    in_stack += update.r;
                    &work.products[0][rows]
                }
                Some(_) => {
                    next_masked += 1;
                    &work.products[next_masked - 1][..]
                }
            };
            gradients.gradients[place].iter_mut().zip(da).for_each(|(sum, d)| *sum += d);
            let db = &work.products[1 + masked + i]; // (r, out)
            let scales = update.dora.as_ref().map(|dora| &dora.scales[..]);
            add_transposed(&mut gradients.gradients[place + 1], db, update.r, update.scale, scales);
            if let Some(dora) = &update.dora {
                let base = base.read(self.kept_as, &mut work.scaled); // (N, out)
                let dm = &mut gradients.gradients[place + 2];
                magnitude_gradient(dora, update, (dy, base), db, dm);
            }
        }
    }
}

/// The updates that train, each with what its gradients are computed from.
fn trained_updates<'t>(
    linears: &'t [LinearGrad<'t>],
    updates: &'t [Vec<ActiveUpdate<'t>>],
    dhiddens: &'t [Vec<f32>],
) -> Vec<TrainedUpdate<'t>> {
    let mut dhidden = dhiddens.iter();
    let mut trained = Vec::new();
    for ((linear, dy, tape), updates) in linears.iter().zip(updates) {
        for (update, hidden) in updates.iter().zip(&tape.hidden) {
            let dhidden = dhidden.next().expect("one for every update");
            if update.trainable {
                let base = &tape.base;
                trained.push(TrainedUpdate { linear, dy, hidden, dhidden, base, update });
            }
        }
    }
    trained
}

/// What the updates of a layer make of the base's product; nothing without DoRA.
pub(super) fn base_scales(updates: &[ActiveUpdate]) -> BaseScales {
    let mut all: BaseScales = Vec::new();
    for (update, dora) in updates.iter().filter_map(|u| Some((u, u.dora.as_ref()?))) {
        let last = all.last_mut().filter(|(tokens, _)| *tokens == update.tokens);
        let scales = match last {
            Some((_, scales)) => scales,
            None => {
                all.push((update.tokens.clone(), vec![1.0; dora.scales.len()]));
                &mut all.last_mut().expect("just pushed").1
            }
        };
        scales.iter_mut().zip(&dora.scales).for_each(|(c, s)| *c += dora.weight * (s - 1.0));
    }
    all
}

/// Multiplies rows of `values (N, width)` by the scales of their range.
pub(super) fn scale_rows(values: &mut [f32], width: usize, scales: &BaseScales) {
    for (tokens, scales) in scales {
        let rows = &mut values[tokens.start * width..tokens.end * width];
        rows.par_chunks_exact_mut(width).for_each(|row| {
            row.iter_mut().zip(scales).for_each(|(y, c)| *y *= c);
        });
    }
}

/// Adds `weight / ‖·‖ · Σ dy ⊙ (W x + scale · B A x)` to the gradient of the magnitudes: the norms
/// are treated as constants (Liu et al. 2024, section 4.3). `db (r, out)` is `hiddenᵀ · dy`.
fn magnitude_gradient(
    dora: &Dora,
    update: &ActiveUpdate,
    (dy, base): (&[f32], &[f32]),
    db: &[f32],
    dm: &mut [f32],
) {
    let out = dm.len();
    let columns = 64;
    let (tokens, r, scale, b) = (update.tokens.clone(), update.r, update.scale, &*update.b);
    dm.par_chunks_mut(columns).enumerate().for_each(|(chunk, dm)| {
        let first = chunk * columns;
        let mut sums = vec![0f64; dm.len()];
        for token in tokens.clone() {
            let at = token * out + first;
            let both = dy[at..at + dm.len()].iter().zip(&base[at..at + dm.len()]);
            sums.iter_mut().zip(both).for_each(|(sum, (d, y))| *sum += f64::from(d * y));
        }
        for (i, (dm, sum)) in dm.iter_mut().zip(sums).enumerate() {
            let row = first + i;
            let b = &b[row * r..(row + 1) * r];
            let through: f32 = b.iter().enumerate().map(|(k, b)| b * db[k * out + row]).sum();
            let all = dora.weight * sum as f32 + scale * through;
            *dm += all / dora.norms[row];
        }
    });
}

/// Appends the transpose of `values (n, r)`.
fn transpose(values: &[f32], r: usize, out: &mut Vec<f32>) {
    let (start, n) = (out.len(), values.len() / r);
    out.resize(start + values.len(), 0.0);
    let rows = out[start..].par_chunks_exact_mut(n.max(1)).enumerate();
    rows.for_each(|(i, row)| {
        row.iter_mut().zip(values[i..].iter().step_by(r)).for_each(|(to, value)| *to = *value);
    });
}

/// Adds the transpose of `values (r, m)`, times `scale` and the scale of each row, to `sums (m, r)`.
fn add_transposed(sums: &mut [f32], values: &[f32], r: usize, scale: f32, of_rows: Option<&[f32]>) {
    let m = sums.len() / r;
    let rows = (CHUNK / 4 / r).max(1);
    sums.par_chunks_mut(rows * r).enumerate().for_each(|(chunk, sums)| {
        for (row, sums) in (chunk * rows..).zip(sums.chunks_exact_mut(r)) {
            let scale = of_rows.map_or(scale, |of_rows| scale * of_rows[row]);
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum += scale * values[j * m + row];
            }
        }
    });
}
