//! Products of a few rows with frozen matrices plus low-rank (LoRA) updates, bound by memory bandwidth:
//! `y = s ⊙ (W x) + Σ weight · B (A x)`.
//!
//! `A x` of all updates is computed in the parallel region of the products; `B (A x)` is added to a
//! product's rows by the thread that computed them. The bits of a token depend on its own updates only.

use std::ops::Range;
use std::sync::Arc;

use quantune_adapters::decode::{DECODE_GROUP, DecodeWeights};

use super::cpu::SharedMutPtr;
use super::gemm::PanelType;
use super::low_rank::{self, BatchRows, LowRankElement};
use super::row_dot::{self, FusedTasks};
use crate::isa::Isa;

/// The adapter updates of some tokens to one product.
pub(crate) struct TokenUpdates<'a, T> {
    /// Index of the product.
    pub product: usize,
    /// Indices of the rows of the input.
    pub tokens: &'a [usize],
    /// Low-rank updates and their weights.
    pub updates: Vec<(Arc<DecodeWeights<T>>, f32)>,
    /// Scales of the product's columns (DoRA), applied before updates are added.
    pub scales: Option<Vec<f32>>,
}

/// Buffers of [`multiply`], reused by the next call.
#[derive(Debug, Default)]
pub(crate) struct RowDotBuffers {
    /// Inputs padded to whole groups.
    x: Vec<f32>,
    /// `A x` of all updates.
    lora_hidden: Vec<f32>,
}

/// Products of `x (tokens, cols)` with matrices of the same width, with updates. Activations are
/// rounded to 16 bits unless `panel` is F32.
///
/// # Panics
/// If an update has not the shape of its product or a token is not a row of `x`: a bug of the caller.
pub(crate) fn multiply<T: LowRankElement>(
    isa: Isa,
    panel: PanelType,
    x: &[f32],
    products: &mut [row_dot::RowProduct],
    updates: &[TokenUpdates<T>],
    buffers: &mut RowDotBuffers,
) {
    let Some(cols) = products.first().map(|(matrix, _)| matrix.cols()) else { return };
    let stride = cols.next_multiple_of(DECODE_GROUP);
    let RowDotBuffers { x: padded, lora_hidden } = buffers;
    let inputs = if updates.is_empty() || stride == cols {
        x
    } else {
        padded.clear();
        padded.resize(x.len() / cols * stride, 0.0);
        for (to, from) in padded.chunks_exact_mut(stride).zip(x.chunks_exact(cols)) {
            to[..cols].copy_from_slice(from);
        }
        &padded[..]
    };

    // Offset of the `A x` of each update.
    let mut end = 0;
    let starts: Vec<usize> = updates
        .iter()
        .flat_map(|of| of.updates.iter().map(|(form, _)| (of.tokens.len(), form)))
        .map(|(tokens, form)| {
            let start = end;
            end += tokens * low_rank::xa_stride(form);
            start
        })
        .collect();
    lora_hidden.resize(end, 0.0);
    let mut shrinks = Vec::new();
    let mut start = starts.iter();
    for TokenUpdates { tokens, updates, .. } in updates {
        for (form, weight) in updates {
            let start = *start.next().expect("one for every update");
            let (blocks, step) = (low_rank::blocks(form), low_rank::blocks_of_task(form));
            let tasks = (0..blocks).step_by(step).map(|first| first..blocks.min(first + step));
            shrinks.extend(tasks.map(|blocks| (*tokens, form, *weight, start, blocks)));
        }
    }
    let target = SharedMutPtr::new(lora_hidden);
    let shrink = |task: usize| {
        let (tokens, form, weight, start, blocks) = &shrinks[task];
        let len = tokens.len() * low_rank::xa_stride(form);
        let (hidden, tokens) = (target.at(*start), BatchRows { tokens, stride });
        assert!(form.in_features == cols && len <= hidden.len());
        // SAFETY: the CPU supports the ISA level; no two tasks share a column of an update's `A x`.
        unsafe {
            let factor = weight * form.factor;
            low_rank::shrink(isa, form, blocks.clone(), inputs, tokens, factor, hidden);
        }
    };
    let out_features: Vec<usize> = products.iter().map(|(matrix, _)| matrix.rows()).collect();
    let add_updates = |product: usize, rows: Range<usize>, y: SharedMutPtr| {
        let stride = out_features[product];
        let mut first = 0;
        for TokenUpdates { product: of, tokens, updates, scales } in updates {
            let starts = &starts[first..first + updates.len()];
            first += updates.len();
            if *of != product {
                continue;
            }
            if let Some(scales) = scales {
                for token in *tokens {
                    // SAFETY: no other thread accesses these rows.
                    let y = unsafe { y.at(token * stride + rows.start).slice(rows.len()) };
                    y.iter_mut().zip(&scales[rows.clone()]).for_each(|(y, scale)| *y *= scale);
                }
            }
            for ((form, _), start) in updates.iter().zip(starts) {
                let len = tokens.len() * low_rank::xa_stride(form);
                let tokens = BatchRows { tokens, stride };
                assert_eq!(form.out_features, stride);
                // SAFETY: the CPU supports the ISA level; no other thread accesses these rows; the tasks
                // that wrote `A x` are done, and none writes to it again.
                unsafe {
                    let hidden = target.at(*start).read(len);
                    low_rank::expand(isa, form, rows.clone(), hidden, y, tokens);
                }
            }
        }
    };
    let fused = FusedTasks { tasks: shrinks.len(), run: &shrink, epilogue: &add_updates };
    match panel {
        PanelType::F32 => row_dot::f32_many(isa, x, products, fused),
        PanelType::Int16 | PanelType::Int8 => row_dot::int16_many(isa, x, products, fused),
    }
}
