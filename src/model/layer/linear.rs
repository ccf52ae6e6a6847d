//! Linear layers that share their input, forward and backward: frozen, frozen with adapters, or trainable.

use candle_core::Result;
use rayon::prelude::*;

use super::buffers::{LoraTape, Workspace};
use super::elementwise::{CHUNK, times};
use super::layer_pass::LayerPass;
use super::update::{BaseScales, LinearGrad, base_scales, scale_rows};
use crate::isa::{Isa, multiversion};
use crate::model::decode_linear::{self, DecodeStep};
use crate::model::gradients::GradientBuffers;
use crate::model::layers::{Linear, Parameter, Projection};
use crate::ops::Values;
use crate::ops::gemm::{
    Init, Out, PackedRows, PanelType, Product, Strided, Term, Weights, multiply,
};

/// How a product is written to its output buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accumulate {
    /// The output is overwritten.
    Overwrite,
    /// The product is added to the output: the residual stream.
    Add,
}

/// A linear layer, its output `(N, rows)`, and values saved for the backward pass.
pub(super) type LinearOut<'a> = (&'a Linear, &'a mut [f32], &'a mut LoraTape);

impl LayerPass<'_> {
    /// [`Self::project`] of a projection into separate outputs.
    pub(super) fn project_all(
        &self,
        projection: &Projection,
        outs: Vec<&mut [f32]>,
        tapes: &mut Vec<LoraTape>,
        x: &[f32],
        work: &mut Workspace,
    ) -> Result<()> {
        tapes.resize_with(outs.len(), LoraTape::default);
        match projection {
            Projection::Separate(linears) => {
                let outs = linears.iter().zip(outs).zip(tapes);
                let outs = outs.map(|((linear, out), tape)| (linear, out, tape)).collect();
                self.project(outs, x, Accumulate::Overwrite, work)
            }
            Projection::Fused(linear) => {
                let width = linear.rows();
                let mut whole = std::mem::take(&mut work.side_by_side);
                whole.resize(self.tokens * width, 0.0);
                let out = vec![(linear, &mut whole[..], &mut tapes[0])];
                self.project(out, x, Accumulate::Overwrite, work)?;
                let mut start = 0;
                for part in outs {
                    let of = part.len() / self.tokens.max(1);
                    let rows = part.chunks_exact_mut(of.max(1)).zip(whole.chunks_exact(width));
                    rows.for_each(|(to, from)| to.copy_from_slice(&from[start..start + of]));
                    start += of;
                }
                work.side_by_side = whole;
                Ok(())
            }
        }
    }

    /// The backward pass of [`Self::project_all`].
    #[allow(clippy::too_many_arguments)] // a unit, its states, its tape, gradients, buffers
    pub(super) fn project_all_back(
        &self,
        projection: &Projection,
        dys: &[&[f32]],
        tapes: &[LoraTape],
        x: &[f32],
        dx: Option<&mut [f32]>,
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        match projection {
            Projection::Separate(linears) => {
                let dys = linears.iter().zip(dys).zip(tapes);
                let dys: Vec<LinearGrad> =
                    dys.map(|((linear, dy), tape)| (linear, *dy, tape)).collect();
                self.project_back(&dys, x, dx, gradients, work)
            }
            Projection::Fused(linear) => {
                let width = linear.rows();
                let mut whole = std::mem::take(&mut work.side_by_side);
                whole.resize(self.tokens * width, 0.0);
                let mut start = 0;
                for dy in dys {
                    let of = dy.len() / self.tokens.max(1);
                    let rows = whole.chunks_exact_mut(width).zip(dy.chunks_exact(of.max(1)));
                    rows.for_each(|(to, from)| to[start..start + of].copy_from_slice(from));
                    start += of;
                }
                let dy = [(linear, &whole[..], &tapes[0])];
                let result = self.project_back(&dy, x, dx, gradients, work);
                work.side_by_side = whole;
                result
            }
        }
    }

    /// The products of linear layers that share the input `x`, updates and biases included.
    pub(super) fn project(
        &self,
        mut outs: Vec<LinearOut>,
        x: &[f32],
        accumulate: Accumulate,
        work: &mut Workspace,
    ) -> Result<()> {
        if let Some(adapter_groups) = self.adapter_groups {
            let outs = outs.into_iter().map(|(linear, out, _)| (linear, out)).collect();
            let step = DecodeStep { isa: self.isa, panel: self.forward, adapter_groups };
            let add = accumulate == Accumulate::Add;
            return decode_linear::project(step, outs, x, add, &mut work.decode);
        }
        let (n, isa) = (self.tokens, self.isa);
        let width = outs[0].0.cols();
        let all = Strided { values: x, stride: width };
        work.x.pack(isa, self.forward, all, n, width);
        // In 8 bits, the changes of an adapter by a step would be rounded away.
        let of_update = match self.forward {
            PanelType::Int8 => PanelType::Int16,
            panel => panel,
        };
        if of_update != self.forward {
            work.x_of_update.pack(isa, of_update, all, n, width);
        }
        let x_of_update = if of_update == self.forward { &work.x } else { &work.x_of_update };
        let updates = self.updates(outs.iter().map(|(linear, ..)| *linear), &mut work.masks)?;

        // x · Aᵀ of all updates on all tokens at once; the others one by one.
        let mut products = Vec::new();
        let mut apart = Vec::new();
        for ((_, _, tape), updates) in outs.iter_mut().zip(&updates) {
            tape.hidden.resize_with(updates.len(), Vec::new);
            for (hidden, update) in tape.hidden.iter_mut().zip(updates) {
                hidden.clear();
                hidden.resize(n * update.r, 0.0);
                if update.tokens.len() < n || update.mask.is_some() {
                    apart.push((hidden, update));
                    continue;
                }
                let terms = vec![Term { x: x_of_update, weights: update.a(), transposed: true }];
                let out = Out::new(hidden, update.r);
                products.push(Product { terms, init: Init::Zero, out });
            }
        }
        multiply(isa, &mut products);
        drop(products);
        for (hidden, update) in apart {
            let own = update.tokens.start * width..update.tokens.end * width;
            let mut values = &x[own.clone()];
            if let Some(mask) = update.mask {
                let mask = &mut work.masks[mask][own];
                times(mask, values);
                values = mask;
            }
            let input = Strided { values, stride: width };
            work.masked.pack(isa, of_update, input, update.tokens.len(), width);
            let terms = vec![Term { x: &work.masked, weights: update.a(), transposed: true }];
            let out = Out::new(&mut hidden[update.tokens.start * update.r..], update.r);
            multiply(isa, &mut [Product { terms, init: Init::Zero, out }]);
        }
        let hidden = outs.iter().flat_map(|(_, _, tape)| tape.hidden.iter());
        pack_all(
            isa,
            PanelType::F32,
            hidden.zip(updates.iter().flatten()).map(|(l, u)| (&l[..], u.r)),
            n,
            &mut work.lora_hidden,
        );

        let biases: Vec<Option<Values>> = outs
            .iter()
            .map(|(linear, ..)| {
                linear.bias.as_ref().map(|bias| Values::of(&bias.value)).transpose()
            })
            .collect::<Result<_>>()?;
        let scales: Vec<BaseScales> = updates.iter().map(|updates| base_scales(updates)).collect();
        let weights =
            outs.iter().map(|(linear, ..)| linear.values()).collect::<Result<Vec<_>>>()?;
        let mut bases = std::mem::take(&mut work.bases);
        bases.resize_with(outs.len().max(bases.len()), Vec::new);
        let mut hidden = work.lora_hidden.iter();
        let mut products = Vec::new();
        let mut after = Vec::new();
        let linears = outs.iter_mut().zip(&weights).zip(&mut bases);
        let linears = linears.zip(updates.iter().zip(&scales)).zip(&biases);
        for (((((linear, out, _), weights), base), (updates, scales)), bias) in linears {
            let weights = weights.weights();
            let mut terms = vec![Term { x: &work.x, weights, transposed: true }];
            let mut of_updates = Vec::new();
            for update in updates {
                let x = hidden.next().expect("packed for every update");
                of_updates.push(Term { x, weights: update.b(), transposed: true });
            }
            if !scales.is_empty() {
                // The base's product is scaled before anything is added to it.
                base.resize(n * linear.rows(), 0.0);
                let to = Out::new(base, linear.rows());
                products.push(Product { terms, init: Init::Zero, out: to });
                after.push(of_updates);
                continue;
            }
            terms.extend(of_updates);
            let init = match (accumulate, bias) {
                (Accumulate::Overwrite, None) => Init::Zero,
                (Accumulate::Overwrite, Some(bias)) => Init::Bias(bias),
                (Accumulate::Add, bias) => {
                    if let Some(bias) = bias {
                        for row in out.chunks_exact_mut(bias.len()) {
                            row.iter_mut().zip(&**bias).for_each(|(out, b)| *out += b);
                        }
                    }
                    Init::Add
                }
            };
            let out = Out::new(out, linear.rows());
            products.push(Product { terms, init, out });
        }
        multiply(isa, &mut products);
        drop(products);

        let mut products = Vec::new();
        let mut after = after.into_iter();
        let linears = outs.iter_mut().zip(&mut bases).zip(updates.iter().zip(&scales)).zip(&biases);
        for ((((linear, out, tape), base), (updates, scales)), bias) in linears {
            if scales.is_empty() {
                continue;
            }
            if updates.iter().any(|update| update.trainable && update.dora.is_some()) {
                tape.base.copy(self.kept_as, base);
            }
            scale_rows(base, linear.rows(), scales);
            if accumulate == Accumulate::Overwrite {
                out.fill(0.0);
            }
            let bias = bias.as_deref();
            let rows = out.par_chunks_exact_mut(linear.rows());
            rows.zip(base.par_chunks_exact(linear.rows())).for_each(|(out, base)| {
                out.iter_mut().zip(base).for_each(|(out, y)| *out += y);
                if let Some(bias) = bias {
                    out.iter_mut().zip(bias).for_each(|(out, b)| *out += b);
                }
            });
            let terms = after.next().expect("one for every scaled layer");
            let out = Out::new(out, linear.rows());
            products.push(Product { terms, init: Init::Add, out });
        }
        multiply(isa, &mut products);
        drop(products);
        work.bases = bases;
        Ok(())
    }

    /// The backward pass of linear layers that share the input `x`: adds the gradients of trainable
    /// weights, biases and updates, and overwrites that of `x` if it is needed.
    pub(super) fn project_back(
        &self,
        linears: &[LinearGrad],
        x: &[f32],
        dx: Option<&mut [f32]>,
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        let (n, isa, panel) = (self.tokens, self.isa, self.backward);
        let width = linears[0].0.cols();
        let updates = self.updates(linears.iter().map(|(linear, ..)| *linear), &mut work.masks)?;
        let trains = linears.iter().any(|(linear, ..)| linear.gradient().is_some());
        if dx.is_none() && !trains && updates.iter().flatten().all(|update| !update.trainable) {
            return Ok(());
        }
        work.dys.resize_with(linears.len().max(work.dys.len()), PackedRows::default);
        work.dbases.resize_with(linears.len().max(work.dbases.len()), PackedRows::default);
        for ((linear, dy, _), packed) in linears.iter().zip(&mut work.dys) {
            let (values, stride) = (*dy, linear.rows());
            packed.pack(isa, panel, Strided { values, stride }, n, stride);
        }
        let scales: Vec<BaseScales> = updates.iter().map(|updates| base_scales(updates)).collect();
        if dx.is_some() {
            for (((_, dy, _), packed), scales) in
                linears.iter().zip(&mut work.dbases).zip(&scales).filter(|(_, s)| !s.is_empty())
            {
                let stride = dy.len() / n.max(1);
                work.scaled.clear();
                work.scaled.extend_from_slice(dy);
                scale_rows(&mut work.scaled, stride, scales);
                let values = &work.scaled;
                packed.pack(isa, panel, Strided { values, stride }, n, stride);
            }
        }

        // dhidden = scale · dy · B, 0 outside its tokens.
        let mut dhiddens = std::mem::take(&mut work.dhidden);
        dhiddens.resize_with(updates.iter().flatten().count().max(dhiddens.len()), Vec::new);
        let mut free = dhiddens.iter_mut();
        let mut products = Vec::new();
        for (updates, dy) in updates.iter().zip(&work.dys) {
            for update in updates {
                let dhidden = free.next().expect("one for every update");
                dhidden.clear();
                dhidden.resize(n * update.r, 0.0);
                let terms = vec![Term { x: dy, weights: update.b(), transposed: false }];
                let out = Out::new(dhidden, update.r);
                products.push(Product { terms, init: Init::Zero, out });
            }
        }
        multiply(isa, &mut products);
        drop(products);
        for (dhidden, update) in dhiddens.iter_mut().zip(updates.iter().flatten()) {
            dhidden[..update.tokens.start * update.r].fill(0.0);
            dhidden[update.tokens.end * update.r..].fill(0.0);
        }

        let turned = self.turned_gradients(linears, work);
        let mut dws = take_weight_gradients(linears, gradients);
        let mut products: Vec<Product> = Vec::new();
        for (((linear, ..), turned), dw) in linears.iter().zip(&turned).zip(&mut dws) {
            // dW += dyᵀ · x
            let Some(dw) = dw else { continue };
            let x = Weights::Dense { values: x, cols: linear.cols(), scale: 1.0 };
            let terms = vec![Term { x: turned, weights: x, transposed: false }];
            let out = Out::new(dw, linear.cols());
            products.push(Product { terms, init: Init::Add, out });
        }
        let weights =
            linears.iter().map(|(linear, ..)| linear.values()).collect::<Result<Vec<_>>>()?;
        let mut dx = dx;
        let mut masked = Vec::new();
        if let Some(dx) = &mut dx {
            let pairs = dhiddens.iter().zip(updates.iter().flatten()).map(|(l, u)| (&l[..], u.r));
            pack_all(isa, PanelType::F32, pairs, n, &mut work.lora_hidden);
            let mut packed = work.lora_hidden.iter();
            let mut terms = Vec::new();
            let dys = work.dys.iter().zip(&work.dbases).zip(&scales);
            for ((weights, updates), ((dy, dbase), scales)) in weights.iter().zip(&updates).zip(dys)
            {
                let x = if scales.is_empty() { dy } else { dbase };
                terms.push(Term { x, weights: weights.weights(), transposed: false });
                for update in updates {
                    let x = packed.next().expect("packed for every update");
                    let term = Term { x, weights: update.a(), transposed: false };
                    match update.mask {
                        None => terms.push(term),
                        Some(mask) => masked.push((term, &work.masks[mask])),
                    }
                }
            }
            products.insert(0, Product { terms, init: Init::Zero, out: Out::new(dx, width) });
        }
        multiply(isa, &mut products);
        drop(products);
        put_weight_gradients(linears, dws, gradients);
        self.bias_gradients(linears, gradients);
        if let Some(dx) = dx {
            // A gradient through dropout is multiplied by its mask first.
            for (term, mask) in masked {
                let through = &mut work.through;
                through.resize(n * width, 0.0);
                let out = Out::new(through, width);
                multiply(isa, &mut [Product { terms: vec![term], init: Init::Zero, out }]);
                times(through, mask);
                let both = dx.par_chunks_mut(CHUNK).zip(through.par_chunks(CHUNK));
                both.for_each(|(dx, d)| dx.iter_mut().zip(d).for_each(|(dx, d)| *dx += d));
            }
        }
        work.turned_dys = turned;
        self.lora_gradients(linears, x, &updates, &dhiddens, gradients, work)?;
        work.dhidden = dhiddens;
        Ok(())
    }

    /// The gradients of the outputs of trainable layers, packed transposed: the left operand of `dW`.
    fn turned_gradients(&self, linears: &[LinearGrad], work: &mut Workspace) -> Vec<PackedRows> {
        let mut turned = std::mem::take(&mut work.turned_dys);
        turned.resize_with(linears.len().max(turned.len()), PackedRows::default);
        for ((linear, dy, _), turned) in linears.iter().zip(&mut turned) {
            if linear.gradient().is_some() {
                let dy = Strided { values: dy, stride: linear.rows() };
                turned.pack_turned(self.isa, self.backward, dy, linear.rows(), self.tokens);
            }
        }
        turned
    }

    /// `db += Σ dy` over the tokens, of trainable biases.
    fn bias_gradients(&self, linears: &[LinearGrad], gradients: &mut GradientBuffers) {
        const COLUMNS: usize = 64;
        for (linear, dy, _) in linears {
            let Some(Parameter { gradient: Some(index), .. }) = linear.bias else { continue };
            let parts = gradients.gradients[index].par_chunks_mut(COLUMNS).enumerate();
            parts.for_each(|(part, sums)| {
                add_rows(self.isa, &dy[part * COLUMNS..], linear.rows(), sums);
            });
        }
    }
}

/// Moves the gradients of trainable weights out, so that products can write to several at once.
fn take_weight_gradients(
    linears: &[LinearGrad],
    gradients: &mut GradientBuffers,
) -> Vec<Option<Vec<f32>>> {
    let mut take = |index: usize| std::mem::take(&mut gradients.gradients[index]);
    linears.iter().map(|(linear, ..)| linear.gradient()).map(|index| index.map(&mut take)).collect()
}

/// Moves the gradients back.
fn put_weight_gradients(
    linears: &[LinearGrad],
    dws: Vec<Option<Vec<f32>>>,
    gradients: &mut GradientBuffers,
) {
    for ((linear, ..), dw) in linears.iter().zip(dws) {
        if let Some((index, dw)) = linear.gradient().zip(dw) {
            gradients.gradients[index] = dw;
        }
    }
}

multiversion! {
    /// Adds the first values of each row of `values (.., stride)` to `sums`.
    fn add_rows(isa; values: &[f32], stride: usize, sums: &mut [f32]) {
        for row in values.chunks(stride) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
    }
}

/// Packs each of the matrices `(n, r)`.
fn pack_all<'v>(
    isa: Isa,
    panel: PanelType,
    all: impl Iterator<Item = (&'v [f32], usize)>,
    n: usize,
    packed: &mut Vec<PackedRows>,
) {
    for (i, (values, stride)) in all.enumerate() {
        if packed.len() <= i {
            packed.push(PackedRows::default());
        }
        packed[i].pack(isa, panel, Strided { values, stride }, n, stride);
    }
}
