//! Linear layers that share their input, forward and back, with the updates that rows wear on them.

use candle_core::Result;
use rayon::prelude::*;

use super::tape::{Lows, Workspace};
use super::update::{BaseScales, base_scales, scale_rows};
use super::{AdapterGradients, CHUNK, LayerPass, times};
use crate::isa::Isa;
use crate::model::decode_linear;
use crate::model::layers::{Linear, Shared};
use crate::ops::Values;
use crate::ops::gemm::{
    Init, Out, PackedRows, PanelType, Product, Strided, Term, Weights, multiply,
};

/// What products are added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::model) enum Onto {
    Nothing,
    /// What the buffer holds: the residual stream.
    Sum,
}

impl LayerPass<'_> {
    /// [`Self::project`] of layers that share their input, which may be one module.
    pub(super) fn project_shared<const M: usize>(
        &self,
        shared: &Shared<M>,
        outs: [(&mut [f32], &mut Lows); M],
        x: &[f32],
        work: &mut Workspace,
    ) -> Result<()> {
        match shared {
            Shared::Apart(linears) => {
                let mut linears = linears.iter();
                let outs = outs.map(|(out, low)| {
                    (linears.next().expect("as many as there are outputs"), out, low)
                });
                self.project(outs, x, Onto::Nothing, work)
            }
            Shared::Whole(linear) => {
                let width = linear.weight.rows();
                let mut whole = std::mem::take(&mut work.side_by_side);
                whole.resize(self.tokens * width, 0.0);
                let mut parts = Vec::new();
                let mut lows = Vec::new();
                for (out, low) in outs {
                    parts.push(out);
                    lows.push(low);
                }
                // The first keeps what the module has to.
                let low = lows.swap_remove(0);
                self.project([(linear, &mut whole[..], low)], x, Onto::Nothing, work)?;
                let mut start = 0;
                for part in parts {
                    let of = part.len() / self.tokens.max(1);
                    for (to, from) in
                        part.chunks_exact_mut(of.max(1)).zip(whole.chunks_exact(width))
                    {
                        to.copy_from_slice(&from[start..start + of]);
                    }
                    start += of;
                }
                work.side_by_side = whole;
                Ok(())
            }
        }
    }

    /// [`Self::project_back`] through [`Self::project_shared`].
    pub(super) fn project_shared_back<const M: usize>(
        &self,
        shared: &Shared<M>,
        dys: [(&[f32], &Lows); M],
        x: &[f32],
        dx: Option<&mut [f32]>,
        gradients: &mut AdapterGradients,
        work: &mut Workspace,
    ) -> Result<()> {
        match shared {
            Shared::Apart(linears) => {
                let mut linears = linears.iter();
                let dys = dys.map(|(dy, low)| {
                    (linears.next().expect("as many as there are outputs"), dy, low)
                });
                self.project_back(dys, x, dx, gradients, work)
            }
            Shared::Whole(linear) => {
                let width = linear.weight.rows();
                let mut whole = std::mem::take(&mut work.side_by_side);
                whole.resize(self.tokens * width, 0.0);
                let mut start = 0;
                for (dy, _) in dys {
                    let of = dy.len() / self.tokens.max(1);
                    for (to, from) in whole.chunks_exact_mut(width).zip(dy.chunks_exact(of.max(1)))
                    {
                        to[start..start + of].copy_from_slice(from);
                    }
                    start += of;
                }
                let dy = [(linear, &whole[..], dys[0].1)];
                let result = self.project_back(dy, x, dx, gradients, work);
                work.side_by_side = whole;
                result
            }
        }
    }

    /// The products of linear layers that share the input `x`, updates and biases included.
    pub(super) fn project<const M: usize>(
        &self,
        outs: [(&Linear, &mut [f32], &mut Lows); M],
        x: &[f32],
        onto: Onto,
        work: &mut Workspace,
    ) -> Result<()> {
        if self.adapter_groups.is_some() {
            let outs = outs.map(|(linear, out, _)| (linear, out));
            return decode_linear::project(self, outs, x, onto, work);
        }
        let (n, isa) = (self.tokens, self.isa);
        let width = outs[0].0.weight.cols();
        let all = Strided { values: x, stride: width };
        work.x.pack(isa, self.forward, all, n, width);
        // Bytes would round what a step changes of an adapter away.
        let of_update = match self.forward {
            PanelType::Int8 => PanelType::Int16,
            panel => panel,
        };
        if of_update != self.forward {
            work.x_of_update.pack(isa, of_update, all, n, width);
        }
        let x_of_update = if of_update == self.forward { &work.x } else { &work.x_of_update };
        let updates = self.updates(outs.iter().map(|(linear, ..)| *linear), &mut work.masks)?;
        let mut outs = outs;

        // x · Aᵀ of all updates on all tokens at once; the others one by one.
        let mut products = Vec::new();
        let mut apart = Vec::new();
        for ((_, _, lows), updates) in outs.iter_mut().zip(&updates) {
            lows.low.resize_with(updates.len(), Vec::new);
            for (low, update) in lows.low.iter_mut().zip(updates) {
                low.clear();
                low.resize(n * update.r, 0.0);
                if update.tokens.len() < n || update.mask.is_some() {
                    apart.push((low, update));
                    continue;
                }
                let terms = vec![Term { x: x_of_update, weights: update.a(), transposed: true }];
                let out = Out::new(low, update.r);
                products.push(Product { terms, init: Init::Zero, out });
            }
        }
        multiply(isa, &mut products);
        drop(products);
        for (low, update) in apart {
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
            let out = Out::new(&mut low[update.tokens.start * update.r..], update.r);
            multiply(isa, &mut [Product { terms, init: Init::Zero, out }]);
        }
        let lows = outs.iter().flat_map(|(_, _, lows)| lows.low.iter());
        pack_all(
            isa,
            PanelType::F32,
            lows.zip(updates.iter().flatten()).map(|(l, u)| (&l[..], u.r)),
            n,
            &mut work.lows,
        );

        let biases: Vec<Option<Values>> = outs
            .iter()
            .map(|(linear, ..)| linear.bias.as_ref().map(Values::of).transpose())
            .collect::<Result<_>>()?;
        let scales: Vec<BaseScales> = updates.iter().map(|updates| base_scales(updates)).collect();
        let mut bases = std::mem::take(&mut work.bases);
        let mut low = work.lows.iter();
        let mut products = Vec::new();
        let mut after = Vec::new();
        let linears = outs.iter_mut().zip(&mut bases).zip(updates.iter().zip(&scales)).zip(&biases);
        for ((((linear, out, _), base), (updates, scales)), bias) in linears {
            let frozen = Weights::Frozen(&linear.weight);
            let mut terms = vec![Term { x: &work.x, weights: frozen, transposed: true }];
            let mut of_updates = Vec::new();
            for update in updates {
                let x = low.next().expect("packed for every update");
                of_updates.push(Term { x, weights: update.b(), transposed: true });
            }
            if !scales.is_empty() {
                // The base's product meets its scales before anything is added to it.
                base.resize(n * linear.weight.rows(), 0.0);
                let to = Out::new(base, linear.weight.rows());
                products.push(Product { terms, init: Init::Zero, out: to });
                after.push(of_updates);
                continue;
            }
            terms.extend(of_updates);
            let init = match (onto, bias) {
                (Onto::Nothing, None) => Init::Zero,
                (Onto::Nothing, Some(bias)) => Init::Bias(bias),
                (Onto::Sum, bias) => {
                    if let Some(bias) = bias {
                        for row in out.chunks_exact_mut(bias.len()) {
                            row.iter_mut().zip(&**bias).for_each(|(out, b)| *out += b);
                        }
                    }
                    Init::Add
                }
            };
            let out = Out::new(out, linear.weight.rows());
            products.push(Product { terms, init, out });
        }
        multiply(isa, &mut products);
        drop(products);

        let mut products = Vec::new();
        let mut after = after.into_iter();
        let linears = outs.iter_mut().zip(&mut bases).zip(updates.iter().zip(&scales)).zip(&biases);
        for ((((linear, out, lows), base), (updates, scales)), bias) in linears {
            if scales.is_empty() {
                continue;
            }
            if updates.iter().any(|update| update.trainable && update.dora.is_some()) {
                lows.base.copy(self.forward, base);
            }
            scale_rows(base, linear.weight.rows(), scales);
            if onto == Onto::Nothing {
                out.fill(0.0);
            }
            let bias = bias.as_deref();
            let rows = out.par_chunks_exact_mut(linear.weight.rows());
            rows.zip(base.par_chunks_exact(linear.weight.rows())).for_each(|(out, base)| {
                out.iter_mut().zip(base).for_each(|(out, y)| *out += y);
                if let Some(bias) = bias {
                    out.iter_mut().zip(bias).for_each(|(out, b)| *out += b);
                }
            });
            let terms = after.next().expect("one for every scaled layer");
            let out = Out::new(out, linear.weight.rows());
            products.push(Product { terms, init: Init::Add, out });
        }
        multiply(isa, &mut products);
        drop(products);
        work.bases = bases;
        Ok(())
    }

    /// The way back through linear layers that share the input `x`: the gradients of trainable
    /// updates, and, if wanted, that of `x`.
    pub(super) fn project_back<const M: usize>(
        &self,
        linears: [(&Linear, &[f32], &Lows); M],
        x: &[f32],
        dx: Option<&mut [f32]>,
        gradients: &mut AdapterGradients,
        work: &mut Workspace,
    ) -> Result<()> {
        let (n, isa, panel) = (self.tokens, self.isa, self.backward);
        let width = linears[0].0.weight.cols();
        let updates = self.updates(linears.iter().map(|(linear, ..)| *linear), &mut work.masks)?;
        if dx.is_none() && updates.iter().flatten().all(|update| !update.trainable) {
            return Ok(());
        }
        for ((linear, dy, _), packed) in linears.iter().zip(&mut work.dys) {
            let (values, stride) = (*dy, linear.weight.rows());
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

        // dlow = scale · dy · B, nothing outside its tokens.
        let mut dlows = std::mem::take(&mut work.dlows);
        dlows.resize_with(updates.iter().flatten().count().max(dlows.len()), Vec::new);
        let mut free = dlows.iter_mut();
        let mut products = Vec::new();
        for (updates, dy) in updates.iter().zip(&work.dys) {
            for update in updates {
                let dlow = free.next().expect("one for every update");
                dlow.clear();
                dlow.resize(n * update.r, 0.0);
                let terms = vec![Term { x: dy, weights: update.b(), transposed: false }];
                let out = Out::new(dlow, update.r);
                products.push(Product { terms, init: Init::Zero, out });
            }
        }
        multiply(isa, &mut products);
        drop(products);
        for (dlow, update) in dlows.iter_mut().zip(updates.iter().flatten()) {
            dlow[..update.tokens.start * update.r].fill(0.0);
            dlow[update.tokens.end * update.r..].fill(0.0);
        }

        if let Some(dx) = dx {
            let pairs = dlows.iter().zip(updates.iter().flatten()).map(|(l, u)| (&l[..], u.r));
            pack_all(isa, PanelType::F32, pairs, n, &mut work.lows);
            let mut packed = work.lows.iter();
            let mut terms = Vec::new();
            let mut apart = Vec::new();
            let dys = work.dys.iter().zip(&work.dbases).zip(&scales);
            for (((linear, ..), updates), ((dy, dbase), scales)) in
                linears.iter().zip(&updates).zip(dys)
            {
                let frozen = Weights::Frozen(&linear.weight);
                let x = if scales.is_empty() { dy } else { dbase };
                terms.push(Term { x, weights: frozen, transposed: false });
                for update in updates {
                    let x = packed.next().expect("packed for every update");
                    let term = Term { x, weights: update.a(), transposed: false };
                    match update.mask {
                        None => terms.push(term),
                        Some(mask) => apart.push((term, &work.masks[mask])),
                    }
                }
            }
            let out = Out::new(dx, width);
            multiply(isa, &mut [Product { terms, init: Init::Zero, out }]);
            // What came through dropout meets its mask first.
            for (term, mask) in apart {
                let through = &mut work.through;
                through.resize(n * width, 0.0);
                let out = Out::new(through, width);
                multiply(isa, &mut [Product { terms: vec![term], init: Init::Zero, out }]);
                times(through, mask);
                let both = dx.par_chunks_mut(CHUNK).zip(through.par_chunks(CHUNK));
                both.for_each(|(dx, d)| dx.iter_mut().zip(d).for_each(|(dx, d)| *dx += d));
            }
        }
        self.lora_gradients(&linears, x, &updates, &dlows, gradients, work)?;
        work.dlows = dlows;
        Ok(())
    }
}

/// Packs each `(n, r)`, as many as there are.
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
