//! Linear layers in a decode step: the base's products and the updates of each token's adapters, bound by
//! memory bandwidth.
//!
//! Tokens with the same adapters are processed together, wherever their rows are in the batch. The bits of a
//! token depend only on its own list of adapters.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use candle_core::Result;
use half::f16;
use quantune_adapters::decode::DecodeWeights;
use quantune_adapters::delta::Adapter;

use super::adapters::{ActiveAdapter, AdapterGroup};
use super::layers::Linear;
use crate::isa::Isa;
use crate::ops::Values;
use crate::ops::adapted_row_dot::{self, RowDotBuffers, TokenUpdates};
use crate::ops::gemm::PanelType;
use crate::ops::low_rank::LowRankElement;
use crate::ops::row_dot;

/// A decode step: its kernels and its adapters.
#[derive(Debug, Clone, Copy)]
pub(super) struct DecodeStep<'a> {
    pub isa: Isa,
    pub panel: PanelType,
    /// The tokens of each list of adapters.
    pub adapter_groups: &'a [AdapterGroup<'a>],
}

/// Buffers of [`project`], reused by the next layer and step.
#[derive(Debug, Default)]
pub(super) struct DecodeBuffers {
    /// The base's product, if it is added to the residual stream.
    product: Vec<f32>,
    rows: RowDotBuffers,
    half_forms: DecodeWeightsByModule<f16>,
    whole_forms: DecodeWeightsByModule<f32>,
}

/// A cache of the decode weights of updates, by module. Weights that an adapter has dropped
/// since are not returned.
#[derive(Debug)]
struct DecodeWeightsByModule<T>(HashMap<String, Vec<CachedDecodeWeights<T>>>);

/// The decode weights of an adapter's update. The weak reference keeps the adapter's address allocated, so
/// that no other adapter is mistaken for it.
type CachedDecodeWeights<T> = (Weak<Adapter>, Weak<DecodeWeights<T>>);

impl<T> Default for DecodeWeightsByModule<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: LowRankElement> DecodeWeightsByModule<T> {
    /// The decode weights of a list of adapters on a linear layer, in order, without adapters that have no
    /// update there.
    fn find(
        &mut self,
        linear: &Linear,
        active: &[ActiveAdapter],
        mut take: impl FnMut(&ActiveAdapter, Arc<DecodeWeights<T>>),
    ) -> Result<()> {
        if !self.0.contains_key(&linear.name) {
            self.0.insert(linear.name.clone(), Vec::new());
        }
        let known = self.0.get_mut(&linear.name).expect("just inserted");
        for active in active {
            let is_its = |of: &Weak<Adapter>| of.as_ptr() == Arc::as_ptr(&active.adapter);
            let found = known.iter().find(|(of, _)| is_its(of));
            let found = found.and_then(|(_, form)| form.upgrade());
            if let Some(form) = found.filter(|form| form.is_current()) {
                take(active, form);
                continue;
            }
            let Some(lora) = active.adapter.modules.get(&linear.name) else { continue };
            let form = lora.decode_weights::<T>(&**linear.matrix()?)?;
            known.retain(|(of, form)| !is_its(of) && form.strong_count() > 0);
            known.push((Arc::downgrade(&active.adapter), Arc::downgrade(&form)));
            take(active, form);
        }
        Ok(())
    }
}

/// The products of linear layers that share the input `x (tokens, in)`, updates and biases included. With
/// `add` they are added to the outputs.
pub(super) fn project(
    step: DecodeStep,
    outs: Vec<(&Linear, &mut [f32])>,
    x: &[f32],
    add: bool,
    buffers: &mut DecodeBuffers,
) -> Result<()> {
    let DecodeBuffers { product, rows, half_forms, whole_forms } = buffers;
    // Updates have the precision of the base's products: 16 bits unless those are F32.
    match step.panel {
        PanelType::F32 => project_as::<f32>(step, outs, x, add, product, rows, whole_forms),
        PanelType::Int16 | PanelType::Int8 => {
            project_as::<f16>(step, outs, x, add, product, rows, half_forms)
        }
    }
}

fn project_as<T: LowRankElement>(
    step: DecodeStep,
    mut outs: Vec<(&Linear, &mut [f32])>,
    x: &[f32],
    add: bool,
    product: &mut Vec<f32>,
    rows: &mut RowDotBuffers,
    found: &mut DecodeWeightsByModule<T>,
) -> Result<()> {
    let mut updates = Vec::new();
    for (index, (linear, _)) in outs.iter().enumerate() {
        updates_of(index, linear, step.adapter_groups, found, &mut updates)?;
    }
    let mut products: Vec<row_dot::RowProduct> = Vec::new();
    if add {
        // A product overwrites its output, so adding it to the residual stream needs a buffer.
        product.resize(outs.iter().map(|(_, out)| out.len()).sum(), 0.0);
        let mut rest = &mut product[..];
        for (linear, out) in &outs {
            let (part, others) = rest.split_at_mut(out.len());
            products.push((linear.matrix()?, part));
            rest = others;
        }
    } else {
        for (linear, out) in &mut outs {
            products.push((linear.matrix()?, &mut out[..]));
        }
    }
    adapted_row_dot::multiply(step.isa, step.panel, x, &mut products, &updates, rows);
    drop(products);
    if add {
        let sums = outs.iter_mut().flat_map(|(_, out)| out.iter_mut());
        sums.zip(&*product).for_each(|(out, y)| *out += y);
    }
    for (linear, out) in &mut outs {
        if let Some(bias) = &linear.bias {
            let bias = Values::of(&bias.value)?;
            for row in out.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(&*bias).for_each(|(out, b)| *out += b);
            }
        }
    }
    Ok(())
}

/// Adds the updates of each list of adapters on a linear layer, the `index`-th of those that share an
/// input.
fn updates_of<'w, T: LowRankElement>(
    index: usize,
    linear: &Linear,
    adapter_groups: &'w [AdapterGroup<'w>],
    found: &mut DecodeWeightsByModule<T>,
    all: &mut Vec<TokenUpdates<'w, T>>,
) -> Result<()> {
    for (active, tokens) in adapter_groups {
        let mut updates = Vec::new();
        found.find(linear, active, |active, form| updates.push((form, active.weight as f32)))?;
        if !updates.is_empty() {
            let scales = row_scales(&updates);
            all.push(TokenUpdates { product: index, tokens, updates, scales });
        }
    }
    Ok(())
}

/// The scales of the base's product with DoRA, `1 + Σ weight · (s − 1)`; `None` without DoRA.
fn row_scales<T>(updates: &[(Arc<DecodeWeights<T>>, f32)]) -> Option<Vec<f32>> {
    let mut scales: Option<Vec<f32>> = None;
    for (form, weight) in updates {
        let Some(s) = &form.row_scales else { continue };
        let scales = scales.get_or_insert_with(|| vec![1.0; s.len()]);
        scales.iter_mut().zip(s).for_each(|(scale, s)| *scale += weight * (s - 1.0));
    }
    scales
}
