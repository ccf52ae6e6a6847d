//! Linear layers that share their input, forward and backward: frozen, frozen with adapters, or trainable.

use candle_core::Result;
use rayon::prelude::*;

use super::buffers::{LoraTape, Workspace};
use super::elementwise::{CHUNK, times};
use super::layer_pass::LayerPass;
use super::update::{ActiveUpdate, BaseScales, LinearGrad, base_scales, scale_rows};
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

/// What is added to the base's products of linear layers, and what scales them, by layer.
struct Added<'p> {
    updates: &'p [Vec<ActiveUpdate<'p>>],
    scales: &'p [BaseScales],
    biases: &'p [Option<Values<'p>>],
}

/// What of one linear layer.
type AddedToLinear<'p> = (&'p [ActiveUpdate<'p>], &'p BaseScales, &'p Option<Values<'p>>);

impl<'p> Added<'p> {
    fn iter(&self) -> impl Iterator<Item = AddedToLinear<'p>> + use<'p> {
        let all = self.updates.iter().zip(self.scales).zip(self.biases);
        all.map(|((updates, scales), bias)| (&updates[..], scales, bias))
    }
}

/// What the backward pass of linear layers goes through, by layer, and the gradients of `x · Aᵀ` of all
/// updates.
struct Back<'p> {
    updates: &'p [Vec<ActiveUpdate<'p>>],
    scales: &'p [BaseScales],
    dhiddens: &'p [Vec<f32>],
}

/// The terms that updates add to a layer's output: the next of `hidden`, packed, times B.
fn hidden_terms<'p>(
    hidden: &mut impl Iterator<Item = &'p PackedRows>,
    updates: &'p [ActiveUpdate],
) -> impl Iterator<Item = Term<'p>> {
    updates.iter().map(move |update| {
        let x = hidden.next().expect("packed for every update");
        Term { x, weights: update.b(), transposed: true }
    })
}

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
        self.pack_input(x, outs[0].0.cols(), work);
        let updates = self.updates(outs.iter().map(|(linear, ..)| *linear), &mut work.masks)?;
        self.lora_hidden(&mut outs, &updates, x, work);
        let biases = outs.iter().map(|(linear, ..)| linear.bias.as_ref());
        let biases = biases.map(|bias| bias.map(|bias| Values::of(&bias.value)).transpose());
        let biases = biases.collect::<Result<Vec<_>>>()?;
        let scales: Vec<BaseScales> = updates.iter().map(|updates| base_scales(updates)).collect();
        let added = Added { updates: &updates, scales: &scales, biases: &biases };
        self.base_products(&mut outs, &added, accumulate, work)?;
        if scales.iter().any(|scales| !scales.is_empty()) {
            self.scaled_products(&mut outs, &added, accumulate, work);
        }
        Ok(())
    }

    /// Packs the input `x (N, width)` of linear layers, and as updates read it.
    fn pack_input(&self, x: &[f32], width: usize, work: &mut Workspace) {
        let all = Strided { values: x, stride: width };
        work.x.pack(self.isa, self.forward, all, self.tokens, width);
        if self.update_panel() != self.forward {
            work.x_of_update.pack(self.isa, self.update_panel(), all, self.tokens, width);
        }
    }

    /// The panels of inputs of updates: bytes would round what a step changes of an adapter away.
    fn update_panel(&self) -> PanelType {
        match self.forward {
            PanelType::Int8 => PanelType::Int16,
            panel => panel,
        }
    }

    /// `x · Aᵀ (N, r)` of all updates, on the tapes and packed: of those on all tokens at once, of the
    /// others one by one.
    fn lora_hidden(
        &self,
        outs: &mut [LinearOut],
        updates: &[Vec<ActiveUpdate>],
        x: &[f32],
        work: &mut Workspace,
    ) {
        let (n, isa, of_update) = (self.tokens, self.isa, self.update_panel());
        let width = outs[0].0.cols();
        let x_of_update = if of_update == self.forward { &work.x } else { &work.x_of_update };
        let mut products = Vec::new();
        let mut apart = Vec::new();
        for ((_, _, tape), updates) in outs.iter_mut().zip(updates) {
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
        let hidden = hidden.zip(updates.iter().flatten()).map(|(hidden, u)| (&hidden[..], u.r));
        pack_all(isa, PanelType::F32, hidden, n, &mut work.lora_hidden);
    }

    /// The outputs of linear layers; of those whose base is scaled (DoRA), the base's product alone, left
    /// in `work.bases`.
    fn base_products(
        &self,
        outs: &mut [LinearOut],
        added: &Added,
        accumulate: Accumulate,
        work: &mut Workspace,
    ) -> Result<()> {
        let weights =
            outs.iter().map(|(linear, ..)| linear.values()).collect::<Result<Vec<_>>>()?;
        let Workspace { x, lora_hidden, bases, .. } = work;
        bases.resize_with(outs.len().max(bases.len()), Vec::new);
        let (x, mut hidden) = (&*x, lora_hidden.iter());
        let mut products = Vec::new();
        let linears = outs.iter_mut().zip(&weights).zip(bases).zip(added.iter());
        for ((((linear, out, _), weights), base), (updates, scales, bias)) in linears {
            let mut terms = vec![Term { x, weights: weights.weights(), transposed: true }];
            let of_updates = hidden_terms(&mut hidden, updates);
            if !scales.is_empty() {
                // The base's product meets its scales before anything is added to it.
                of_updates.for_each(drop);
                base.resize(self.tokens * linear.rows(), 0.0);
                let out = Out::new(base, linear.rows());
                products.push(Product { terms, init: Init::Zero, out });
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
        multiply(self.isa, &mut products);
        Ok(())
    }

    /// The outputs of linear layers whose base is scaled, from the products that [`Self::base_products`]
    /// left, which go on the tape where magnitudes train.
    fn scaled_products(
        &self,
        outs: &mut [LinearOut],
        added: &Added,
        accumulate: Accumulate,
        work: &mut Workspace,
    ) {
        let mut hidden = work.lora_hidden.iter();
        let mut products = Vec::new();
        let linears = outs.iter_mut().zip(&mut work.bases).zip(added.iter());
        for (((linear, out, tape), base), (updates, scales, bias)) in linears {
            let terms = hidden_terms(&mut hidden, updates);
            if scales.is_empty() {
                terms.for_each(drop);
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
            let (terms, out) = (terms.collect(), Out::new(out, linear.rows()));
            products.push(Product { terms, init: Init::Add, out });
        }
        multiply(self.isa, &mut products);
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
        let updates = self.updates(linears.iter().map(|(linear, ..)| *linear), &mut work.masks)?;
        let trains = linears.iter().any(|(linear, ..)| linear.gradient().is_some());
        if dx.is_none() && !trains && updates.iter().flatten().all(|update| !update.trainable) {
            return Ok(());
        }
        let scales: Vec<BaseScales> = updates.iter().map(|updates| base_scales(updates)).collect();
        self.pack_output_gradients(linears, dx.is_some().then_some(&scales[..]), work);
        let dhiddens = self.lora_hidden_gradients(&updates, work);
        let back = Back { updates: &updates, scales: &scales, dhiddens: &dhiddens };
        self.weight_and_input_gradients(linears, x, dx, &back, gradients, work)?;
        self.bias_gradients(linears, gradients);
        self.lora_gradients(linears, x, &updates, &dhiddens, gradients, work)?;
        work.dhidden = dhiddens;
        Ok(())
    }

    /// Packs the gradients of outputs, and with `scales` what of them goes back through the scales of the
    /// base's product.
    fn pack_output_gradients(
        &self,
        linears: &[LinearGrad],
        scales: Option<&[BaseScales]>,
        work: &mut Workspace,
    ) {
        let (n, isa, panel) = (self.tokens, self.isa, self.backward);
        work.dys.resize_with(linears.len().max(work.dys.len()), PackedRows::default);
        work.dbases.resize_with(linears.len().max(work.dbases.len()), PackedRows::default);
        for ((linear, dy, _), packed) in linears.iter().zip(&mut work.dys) {
            let (values, stride) = (*dy, linear.rows());
            packed.pack(isa, panel, Strided { values, stride }, n, stride);
        }
        let scaled = linears.iter().zip(&mut work.dbases).zip(scales.unwrap_or_default());
        for (((_, dy, _), packed), scales) in scaled.filter(|(_, scales)| !scales.is_empty()) {
            let stride = dy.len() / n.max(1);
            work.scaled.clear();
            work.scaled.extend_from_slice(dy);
            scale_rows(&mut work.scaled, stride, scales);
            let values = &work.scaled;
            packed.pack(isa, panel, Strided { values, stride }, n, stride);
        }
    }

    /// `scale · dy · B (N, r)` of all updates, 0 outside their tokens, in buffers of the workspace.
    fn lora_hidden_gradients(
        &self,
        updates: &[Vec<ActiveUpdate>],
        work: &mut Workspace,
    ) -> Vec<Vec<f32>> {
        let mut dhiddens = std::mem::take(&mut work.dhidden);
        dhiddens.resize_with(updates.iter().flatten().count().max(dhiddens.len()), Vec::new);
        let mut free = dhiddens.iter_mut();
        let mut products = Vec::new();
        for (updates, dy) in updates.iter().zip(&work.dys) {
            for update in updates {
                let dhidden = free.next().expect("one for every update");
                dhidden.clear();
                dhidden.resize(self.tokens * update.r, 0.0);
                let terms = vec![Term { x: dy, weights: update.b(), transposed: false }];
                let out = Out::new(dhidden, update.r);
                products.push(Product { terms, init: Init::Zero, out });
            }
        }
        multiply(self.isa, &mut products);
        drop(products);
        for (dhidden, update) in dhiddens.iter_mut().zip(updates.iter().flatten()) {
            dhidden[..update.tokens.start * update.r].fill(0.0);
            dhidden[update.tokens.end * update.r..].fill(0.0);
        }
        dhiddens
    }

    /// `dW += dyᵀ · x` of trainable weights, and `dx`, if it is wanted.
    fn weight_and_input_gradients(
        &self,
        linears: &[LinearGrad],
        x: &[f32],
        mut dx: Option<&mut [f32]>,
        back: &Back,
        gradients: &mut GradientBuffers,
        work: &mut Workspace,
    ) -> Result<()> {
        let (n, isa, width) = (self.tokens, self.isa, linears[0].0.cols());
        let transposed = self.transposed_gradients(linears, work);
        let mut dws = take_weight_gradients(linears, gradients);
        let mut products: Vec<Product> = Vec::new();
        for (((linear, ..), transposed), dw) in linears.iter().zip(&transposed).zip(&mut dws) {
            let Some(dw) = dw else { continue };
            let x = Weights::Dense { values: x, cols: linear.cols(), scale: 1.0 };
            let terms = vec![Term { x: transposed, weights: x, transposed: false }];
            let out = Out::new(dw, linear.cols());
            products.push(Product { terms, init: Init::Add, out });
        }
        let weights =
            linears.iter().map(|(linear, ..)| linear.values()).collect::<Result<Vec<_>>>()?;
        let mut masked = Vec::new();
        if let Some(dx) = &mut dx {
            let pairs = back.dhiddens.iter().zip(back.updates.iter().flatten());
            let pairs = pairs.map(|(dhidden, update)| (&dhidden[..], update.r));
            pack_all(isa, PanelType::F32, pairs, n, &mut work.lora_hidden);
            let mut packed = work.lora_hidden.iter();
            let mut terms = Vec::new();
            let dys = work.dys.iter().zip(&work.dbases).zip(back.scales);
            let linears = weights.iter().zip(back.updates).zip(dys);
            for ((weights, updates), ((dy, dbase), scales)) in linears {
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
        work.transposed_dys = transposed;
        Ok(())
    }

    /// The gradients of the outputs of trainable layers, packed transposed: the left operand of `dW`.
    fn transposed_gradients(
        &self,
        linears: &[LinearGrad],
        work: &mut Workspace,
    ) -> Vec<PackedRows> {
        let mut transposed = std::mem::take(&mut work.transposed_dys);
        transposed.resize_with(linears.len().max(transposed.len()), PackedRows::default);
        for ((linear, dy, _), transposed) in linears.iter().zip(&mut transposed) {
            if linear.gradient().is_some() {
                let dy = Strided { values: dy, stride: linear.rows() };
                transposed.pack_transposed(self.isa, self.backward, dy, linear.rows(), self.tokens);
            }
        }
        transposed
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
