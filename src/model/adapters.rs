//! The active adapters of the rows of a batch.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use quantune_adapters::delta::Adapter;

use crate::ops::Segment;

/// An adapter on a row.
#[derive(Debug, Clone)]
pub struct ActiveAdapter {
    /// The adapter.
    pub adapter: Arc<Adapter>,
    /// Weight of its update, in addition to its own scale.
    pub weight: f64,
    /// Whether it gets gradients. At most one adapter of a row may be trainable.
    pub trainable: bool,
}

impl ActiveAdapter {
    /// The adapter at full weight, without gradients.
    pub fn frozen(adapter: Arc<Adapter>) -> Self {
        Self { adapter, weight: 1.0, trainable: false }
    }

    /// The adapter at full weight, with gradients.
    pub fn trainable(adapter: Arc<Adapter>) -> Self {
        Self { adapter, weight: 1.0, trainable: true }
    }

    /// Whether two rows use the same adapters, not merely equal ones.
    pub fn same(a: &[Self], b: &[Self]) -> bool {
        let equal = |(a, b): (&Self, &Self)| {
            Arc::ptr_eq(&a.adapter, &b.adapter)
                && a.weight.to_bits() == b.weight.to_bits()
                && a.trainable == b.trainable
        };
        std::ptr::eq(a, b) || a.len() == b.len() && a.iter().zip(b).all(equal)
    }
}

/// A list of adapters, and the tokens of a batch that use it.
pub(super) type AdapterGroup<'a> = (&'a [ActiveAdapter], Vec<usize>);

/// The adapters of each row of a batch.
#[derive(Debug, Clone, Copy)]
pub enum Adapters<'a> {
    /// The same for all rows.
    Same(&'a [ActiveAdapter]),
    /// A list per row.
    PerRow(&'a [&'a [ActiveAdapter]]),
}

impl<'a> Adapters<'a> {
    /// No adapters.
    pub const NONE: Adapters<'static> = Adapters::Same(&[]);

    /// The adapters of a row.
    ///
    /// # Panics
    /// If the row is out of range.
    pub fn of(&self, row: usize) -> &'a [ActiveAdapter] {
        match self {
            Adapters::Same(active) => active,
            Adapters::PerRow(rows) => rows[row],
        }
    }

    /// Runs of neighbouring rows with the same adapters, as ranges of tokens with their list.
    pub(super) fn runs(&self, segments: &[Segment]) -> Vec<(Range<usize>, &'a [ActiveAdapter])> {
        let end = segments.last().map_or(0, |segment| segment.tokens.end);
        match self {
            Adapters::Same(active) => vec![(0..end, active)],
            Adapters::PerRow(rows) => {
                let mut runs: Vec<(Range<usize>, &'a [ActiveAdapter])> = Vec::new();
                let rows = segments.iter().zip(*rows);
                for (segment, &active) in rows.filter(|(segment, _)| !segment.is_empty()) {
                    match runs.last_mut() {
                        Some((tokens, last)) if ActiveAdapter::same(last, active) => {
                            tokens.end = segment.tokens.end;
                        }
                        _ => runs.push((segment.tokens.clone(), active)),
                    }
                }
                runs
            }
        }
    }

    /// Tokens with the same adapters, wherever their rows are, with their list.
    pub(super) fn adapter_groups(&self, segments: &[Segment]) -> Vec<AdapterGroup<'a>> {
        let mut adapter_groups: Vec<AdapterGroup> = Vec::new();
        for (tokens, active) in
            self.runs(segments).into_iter().filter(|(_, active)| !active.is_empty())
        {
            match adapter_groups.iter_mut().find(|(other, _)| ActiveAdapter::same(other, active)) {
                Some((_, all)) => all.extend(tokens),
                None => adapter_groups.push((active, tokens.collect())),
            }
        }
        adapter_groups
    }

    /// All adapters of all lists.
    pub(super) fn iter(&self) -> impl Iterator<Item = &'a ActiveAdapter> {
        let (same, rows): (&[ActiveAdapter], &[&[ActiveAdapter]]) = match *self {
            Adapters::Same(active) => (active, &[]),
            Adapters::PerRow(rows) => (&[], rows),
        };
        same.iter().chain(rows.iter().flat_map(|row| row.iter()))
    }
}

/// A parameter of an adapter on a device, on the tape if the adapter is trainable.
pub(super) fn parameter(active: &ActiveAdapter, of: &Var, device: &Device) -> Result<Tensor> {
    match active.trainable {
        true => of.as_tensor().to_device(device),
        false => of.as_detached_tensor().to_device(device),
    }
}
