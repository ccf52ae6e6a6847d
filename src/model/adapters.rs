//! Which adapters the rows of a batch wear.

use std::ops::Range;
use std::sync::Arc;

use quantune_adapters::delta::Adapter;

use crate::ops::Segment;

/// An adapter on a row.
#[derive(Debug, Clone)]
pub struct Worn {
    /// The adapter.
    pub adapter: Arc<Adapter>,
    /// What its update is multiplied with, beside its own scale.
    pub weight: f64,
    /// Whether gradients flow into it. At most one adapter of a row may be trainable.
    pub trainable: bool,
}

impl Worn {
    /// The adapter at full weight, without gradients.
    pub fn frozen(adapter: Arc<Adapter>) -> Self {
        Self { adapter, weight: 1.0, trainable: false }
    }

    /// The adapter at full weight, with gradients.
    pub fn trainable(adapter: Arc<Adapter>) -> Self {
        Self { adapter, weight: 1.0, trainable: true }
    }

    /// Whether two rows wear the same adapters, not merely equal ones.
    pub fn same(a: &[Self], b: &[Self]) -> bool {
        let equal = |(a, b): (&Self, &Self)| {
            Arc::ptr_eq(&a.adapter, &b.adapter)
                && a.weight.to_bits() == b.weight.to_bits()
                && a.trainable == b.trainable
        };
        std::ptr::eq(a, b) || a.len() == b.len() && a.iter().zip(b).all(equal)
    }
}

/// A list of adapters, and the tokens of a batch that wear it.
pub(super) type Wearer<'a> = (&'a [Worn], Vec<usize>);

/// The adapters of each row of a batch.
#[derive(Debug, Clone, Copy)]
pub enum Adapters<'a> {
    /// All rows wear the same.
    Same(&'a [Worn]),
    /// Each row its own, as many lists as rows.
    PerRow(&'a [&'a [Worn]]),
}

impl<'a> Adapters<'a> {
    /// The bare base.
    pub const NONE: Adapters<'static> = Adapters::Same(&[]);

    /// What a row wears.
    ///
    /// # Panics
    /// If each row has its own and there is no such row.
    pub fn of(&self, row: usize) -> &'a [Worn] {
        match self {
            Adapters::Same(worn) => worn,
            Adapters::PerRow(rows) => rows[row],
        }
    }

    /// Runs of neighbouring rows that wear the same, as ranges of tokens with their list.
    pub(super) fn runs(&self, segments: &[Segment]) -> Vec<(Range<usize>, &'a [Worn])> {
        let end = segments.last().map_or(0, |segment| segment.tokens.end);
        match self {
            Adapters::Same(worn) => vec![(0..end, worn)],
            Adapters::PerRow(rows) => {
                let mut runs: Vec<(Range<usize>, &'a [Worn])> = Vec::new();
                let rows = segments.iter().zip(*rows);
                for (segment, &worn) in rows.filter(|(segment, _)| !segment.is_empty()) {
                    match runs.last_mut() {
                        Some((tokens, last)) if Worn::same(last, worn) => {
                            tokens.end = segment.tokens.end;
                        }
                        _ => runs.push((segment.tokens.clone(), worn)),
                    }
                }
                runs
            }
        }
    }

    /// Tokens that wear the same, wherever their rows stand, with their list.
    pub(super) fn wearers(&self, segments: &[Segment]) -> Vec<Wearer<'a>> {
        let mut wearers: Vec<Wearer> = Vec::new();
        for (tokens, worn) in self.runs(segments).into_iter().filter(|(_, worn)| !worn.is_empty()) {
            match wearers.iter_mut().find(|(other, _)| Worn::same(other, worn)) {
                Some((_, all)) => all.extend(tokens),
                None => wearers.push((worn, tokens.collect())),
            }
        }
        wearers
    }

    /// All adapters, a row's list after the other.
    pub(super) fn iter(&self) -> impl Iterator<Item = &'a Worn> {
        let (same, rows): (&[Worn], &[&[Worn]]) = match *self {
            Adapters::Same(worn) => (worn, &[]),
            Adapters::PerRow(rows) => (&[], rows),
        };
        same.iter().chain(rows.iter().flat_map(|row| row.iter()))
    }
}
