//! Linear layers on the few tokens of a decoding step: the base's product, and the updates of
//! whatever each token wears, at the speed of memory.
//!
//! Tokens that wear the same are taken together, wherever they stand in the batch; `A x` of all
//! updates is computed in one parallel region with the base's products, and `B (A x)` is added to a
//! product's rows by the thread that computed them. A token's bits depend on its own list of
//! adapters only.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

use candle_core::Result;
use half::f16;
use quantune_adapters::decode::DecodeWeights;
use quantune_adapters::delta::Adapter;

use super::adapters::{ActiveAdapter, AdapterGroup};
use super::layer::{LayerPass, Onto, Workspace};
use super::layers::Linear;
use crate::ops::gemm::PanelType;
use crate::ops::low_rank::{self, Number, TokenRows};
use crate::ops::row_dot;
use crate::ops::{SharedMutPtr, Values};

/// Buffers of [`project`], used again.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// The base's product, where it is added to what is there.
    product: Vec<f32>,
    /// Inputs filled up to whole groups.
    x: Vec<f32>,
    lows: Vec<f32>,
    half_forms: Known<f16>,
    whole_forms: Known<f32>,
}

/// The updates that steps before found, by module. What an adapter has let go of since is not found any
/// more.
#[derive(Debug)]
struct Known<T>(HashMap<String, Vec<Found<T>>>);

/// An adapter's update. Its place in memory is kept, so that no other adapter is taken for it.
type Found<T> = (Weak<Adapter>, Weak<DecodeWeights<T>>);

impl<T> Default for Known<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Number> Known<T> {
    /// The forms of what rows wear on a linear layer, in the order of the lists; none where an adapter
    /// has no update.
    fn find(
        &mut self,
        linear: &Linear,
        active: &[ActiveAdapter],
        mut take: impl FnMut(&ActiveAdapter, Arc<DecodeWeights<T>>),
    ) -> Result<()> {
        if !self.0.contains_key(&linear.name) {
            self.0.insert(linear.name.clone(), Vec::new());
        }
        let known = self.0.get_mut(&linear.name).expect("just put there");
        for active in active {
            let is_its = |of: &Weak<Adapter>| of.as_ptr() == Arc::as_ptr(&active.adapter);
            let found = known.iter().find(|(of, _)| is_its(of));
            let found = found.and_then(|(_, form)| form.upgrade());
            if let Some(form) = found.filter(|form| form.is_current()) {
                take(active, form);
                continue;
            }
            let Some(lora) = active.adapter.modules.get(&linear.name) else { continue };
            let form = lora.decode_weights::<T>(&*linear.weight)?;
            known.retain(|(of, form)| !is_its(of) && form.strong_count() > 0);
            known.push((Arc::downgrade(&active.adapter), Arc::downgrade(&form)));
            take(active, form);
        }
        Ok(())
    }
}

/// An adapter's update of one linear layer for the tokens that wear it.
struct Update<T> {
    form: Arc<DecodeWeights<T>>,
    weight: f32,
    /// Where its `A x` lie.
    lows: Range<usize>,
}

/// What tokens that wear the same add to one linear layer.
struct Updates<'a> {
    /// Which of the linear layers.
    linear: usize,
    tokens: &'a [usize],
    /// Which of all updates, in the order of the list.
    updates: Range<usize>,
    /// DoRA's: `W x` becomes `scales ⊙ W x`, of `(out)`, `1 + Σ weight · (s − 1)`.
    scales: Option<Vec<f32>>,
}

/// The products of linear layers that share the input `x (tokens, in)`, updates and biases included.
pub(super) fn project<const M: usize>(
    pass: &LayerPass,
    outs: [(&Linear, &mut [f32]); M],
    x: &[f32],
    onto: Onto,
    work: &mut Workspace,
) -> Result<()> {
    let Buffers { product, x: padded, lows, half_forms, whole_forms } = &mut work.decode;
    let buffers = (product, padded, lows);
    // Updates are as exact as the base's products: in 16 bits but where those are F32.
    match pass.forward {
        PanelType::F32 => project_as::<f32, M>(pass, outs, x, onto, buffers, whole_forms),
        PanelType::Int16 | PanelType::Int8 => {
            project_as::<f16, M>(pass, outs, x, onto, buffers, half_forms)
        }
    }
}

fn project_as<T: Number, const M: usize>(
    pass: &LayerPass,
    mut outs: [(&Linear, &mut [f32]); M],
    x: &[f32],
    onto: Onto,
    (product, padded, lows): (&mut Vec<f32>, &mut Vec<f32>, &mut Vec<f32>),
    known: &mut Known<T>,
) -> Result<()> {
    let isa = pass.isa;
    let adapter_groups = pass.adapter_groups.expect("made for a decoding step");
    let linears = outs.each_ref().map(|(linear, _)| *linear);
    let (all, flat) = updates(linears, adapter_groups, known)?;

    // All tokens' inputs in whole groups, for what reads them so.
    let cols = outs[0].0.weight.cols();
    let stride = cols.next_multiple_of(quantune_adapters::decode::DECODE_GROUP);
    let inputs = if all.is_empty() || stride == cols {
        x
    } else {
        padded.clear();
        padded.resize(x.len() / cols * stride, 0.0);
        for (to, from) in padded.chunks_exact_mut(stride).zip(x.chunks_exact(cols)) {
            to[..cols].copy_from_slice(from);
        }
        &padded[..]
    };
    lows.resize(flat.last().map_or(0, |update| update.lows.end), 0.0);

    // The base's products, and beside them A x.
    let mut shrinks = Vec::new();
    for Updates { tokens, updates, .. } in &all {
        for update in &flat[updates.clone()] {
            let (blocks, step) =
                (low_rank::blocks(&update.form), low_rank::blocks_of_task(&update.form));
            let tasks = (0..blocks).step_by(step).map(|first| first..blocks.min(first + step));
            shrinks.extend(tasks.map(|blocks| (*tokens, update, blocks)));
        }
    }
    let target = SharedMutPtr::new(lows);
    let shrink = |task: usize| {
        let (tokens, update, blocks) = &shrinks[task];
        let factor = update.weight * update.form.factor;
        let (low, tokens) = (target.at(update.lows.start), TokenRows { tokens, stride });
        // SAFETY: no two tasks share a column of an update's lows.
        unsafe {
            low_rank::shrink(isa, &update.form, blocks.clone(), inputs, tokens, factor, low);
        }
    };
    let mut products: Vec<row_dot::RowProduct> = match onto {
        Onto::Nothing => {
            outs.iter_mut().map(|(linear, out)| (&*linear.weight, &mut out[..])).collect()
        }
        Onto::Sum => {
            // A product overwrites; what is added to the residual stream is computed apart.
            product.resize(outs[0].1.len(), 0.0);
            vec![(&*outs[0].0.weight, &mut product[..])]
        }
    };
    let out_features: Vec<usize> = products.iter().map(|(weight, _)| weight.rows()).collect();
    let low_of = |update: &Update<T>| {
        // SAFETY: the tasks beside, which wrote it, are done, and none writes to it again.
        unsafe { target.at(update.lows.start).read(update.lows.len()) }
    };
    let add_updates = |linear: usize, rows: Range<usize>, y: SharedMutPtr| {
        let stride = out_features[linear];
        for Updates { tokens, updates, scales, .. } in all.iter().filter(|u| u.linear == linear) {
            if let Some(scales) = scales {
                for token in *tokens {
                    // SAFETY: no other thread is given these rows.
                    let y = unsafe { y.at(token * stride + rows.start).slice(rows.len()) };
                    y.iter_mut().zip(&scales[rows.clone()]).for_each(|(y, scale)| *y *= scale);
                }
            }
            for index in updates.clone() {
                let (update, tokens) = (&flat[index], TokenRows { tokens, stride });
                // SAFETY: no other thread is given these rows.
                unsafe {
                    low_rank::expand(isa, &update.form, rows.clone(), low_of(update), y, tokens);
                }
            }
        }
    };
    let fused = row_dot::FusedTasks { tasks: shrinks.len(), run: &shrink, epilogue: &add_updates };
    match pass.forward {
        PanelType::F32 => row_dot::f32_many(isa, x, &mut products, fused),
        PanelType::Int16 | PanelType::Int8 => row_dot::int16_many(isa, x, &mut products, fused),
    }
    drop(products);
    if onto == Onto::Sum {
        outs[0].1.iter_mut().zip(&*product).for_each(|(out, y)| *out += y);
    }
    for (linear, out) in &mut outs {
        if let Some(bias) = &linear.bias {
            let bias = Values::of(bias)?;
            for row in out.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(&*bias).for_each(|(out, b)| *out += b);
            }
        }
    }
    Ok(())
}

/// What each list of adapters does to each linear layer, where it does anything, and all updates: those
/// of a layer one after the other.
fn updates<'w, T: Number, const M: usize>(
    linears: [&Linear; M],
    adapter_groups: &'w [AdapterGroup<'w>],
    known: &mut Known<T>,
) -> Result<(Vec<Updates<'w>>, Vec<Update<T>>)> {
    let (mut all, mut flat, mut end) = (Vec::new(), Vec::new(), 0);
    for (index, linear) in linears.into_iter().enumerate() {
        for (active, tokens) in adapter_groups {
            let first = flat.len();
            known.find(linear, active, |active, form| {
                let lows = end..end + tokens.len() * low_rank::xa_stride(&form);
                end = lows.end;
                flat.push(Update { form, weight: active.weight as f32, lows });
            })?;
            if first < flat.len() {
                let (scales, updates) = (row_scales(&flat[first..]), first..flat.len());
                all.push(Updates { linear: index, tokens, updates, scales });
            }
        }
    }
    Ok((all, flat))
}

/// What DoRA makes of `W x`, if any of these is one.
fn row_scales<T>(updates: &[Update<T>]) -> Option<Vec<f32>> {
    let mut scales: Option<Vec<f32>> = None;
    for update in updates {
        let Some(s) = &update.form.row_scales else { continue };
        let scales = scales.get_or_insert_with(|| vec![1.0; s.len()]);
        scales.iter_mut().zip(s).for_each(|(scale, s)| *scale += update.weight * (s - 1.0));
    }
    scales
}
