//! Which adapters the rows of a batch use.

use std::ops::Range;
use std::sync::Arc;

use quantune_adapters::delta::Adapter;

use crate::ops::Segment;

/// An adapter on a row.
#[derive(Debug, Clone)]
pub struct ActiveAdapter {
    /// The adapter.
    pub adapter: Arc<Adapter>,
    /// What its update is multiplied with, beside its own scale.
    pub weight: f64,
    /// Whether gradients flow into it. At most one adapter of a row may be trainable.
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
    /// All rows use the same.
    Same(&'a [ActiveAdapter]),
    /// Each row its own, as many lists as rows.
    PerRow(&'a [&'a [ActiveAdapter]]),
}

impl<'a> Adapters<'a> {
    /// The bare base.
    pub const NONE: Adapters<'static> = Adapters::Same(&[]);

    /// What a row uses.
    ///
    /// # Panics
    /// If each row has its own and there is no such row.
    pub fn of(&self, row: usize) -> &'a [ActiveAdapter] {
        match self {
            Adapters::Same(active) => active,
            Adapters::PerRow(rows) => rows[row],
        }
    }

    /// Runs of neighbouring rows that use the same, as ranges of tokens with their list.
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

    /// Tokens that use the same, wherever their rows stand, with their list.
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

    /// All adapters, a row's list after the other.
    pub(super) fn iter(&self) -> impl Iterator<Item = &'a ActiveAdapter> {
        let (same, rows): (&[ActiveAdapter], &[&[ActiveAdapter]]) = match *self {
            Adapters::Same(active) => (active, &[]),
            Adapters::PerRow(rows) => (&[], rows),
        };
        same.iter().chain(rows.iter().flat_map(|row| row.iter()))
    }
}
