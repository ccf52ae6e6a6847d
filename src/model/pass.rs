//! Shared by all layers of a forward pass: rows, rotations, adapters and dropout.

use std::collections::HashSet;
use std::sync::Arc;

use quantune_adapters::delta::Dropout;

use super::adapters::Adapters;
use super::config::{Config, LayerRope};
use super::observe::InputSquares;
use crate::ops::rope::Rotation;
use crate::ops::{Segment, segment};

/// The tokens of a batch: rows end to end.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Token ids, N.
    pub tokens: Vec<u32>,
    /// Each token's position in its row.
    pub positions: Vec<u32>,
    /// Each row's tokens, end to end from 0 to N. A row uses the adapters of its prefix.
    pub segments: Arc<[Segment]>,
}

impl Rows {
    /// Whole rows from position 0.
    pub fn new<T: AsRef<[u32]>>(rows: &[T]) -> Self {
        Self::after(rows.iter().map(|row| (row.as_ref(), 0)))
    }

    /// Rows that continue, each from the given position.
    pub fn after<'a>(rows: impl Iterator<Item = (&'a [u32], usize)>) -> Self {
        let (mut tokens, mut positions, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        for (row, seen) in rows {
            segments.push(Segment::whole(tokens.len()..tokens.len() + row.len()));
            tokens.extend_from_slice(row);
            positions.extend((seen..seen + row.len()).map(|p| p as u32));
        }
        Self { tokens, positions, segments: segments.into() }
    }
}

/// Data shared by the layers of a pass.
#[derive(Debug)]
pub struct Pass<'a> {
    pub(super) segments: Arc<[Segment]>,
    pub(super) rotations: Rotations,
    pub(super) adapters: Adapters<'a>,
    pub(super) dropout: Option<&'a Dropout>,
    /// Where squared inputs of linear layers are summed, in passes without gradients.
    pub(super) squares: Option<&'a InputSquares>,
}

/// The rotations of a batch's tokens.
#[derive(Debug)]
pub(super) struct Rotations {
    global: Rotation,
    /// Of layers with a window, if they have their own.
    local: Option<Rotation>,
}

impl Rotations {
    pub(super) fn new(
        config: &Config,
        inv_freq: &[f32],
        positions: &[u32],
        segments: &[Segment],
    ) -> Self {
        let global = match config.long_inv_freq() {
            Some((original, long)) => {
                let long = (original, &long[..]);
                by_length(positions, segments, inv_freq, long)
            }
            None => Rotation::new(positions, inv_freq),
        };
        let heads = |rotation: Rotation| rotation.in_heads_of(config.head_dim);
        let local = config.local_inv_freq();
        Self {
            global: heads(global).grown(config.rope_attention_factor()),
            local: local.map(|inv_freq| heads(Rotation::new(positions, &inv_freq))),
        }
    }

    /// That of a layer, if it rotates.
    pub(super) fn of(&self, rope: LayerRope) -> Option<&Rotation> {
        match rope {
            LayerRope::None => None,
            LayerRope::Global => Some(&self.global),
            LayerRope::Local => Some(self.local.as_ref().unwrap_or(&self.global)),
        }
    }
}

impl<'a> Pass<'a> {
    /// A pass over `rows`. `dropout` applies to the inputs of trainable adapters only.
    ///
    /// # Panics
    /// If the segments of `rows` do not part its tokens end to end, or a prefix is no earlier row: a
    /// caller's bug that threads must not meet.
    pub(super) fn new(
        config: &Config,
        inv_freq: &[f32],
        rows: &Rows,
        adapters: Adapters<'a>,
        dropout: Option<&'a Dropout>,
    ) -> Self {
        assert_eq!(segment::fault(&rows.segments, rows.tokens.len()), None);
        assert_eq!(rows.tokens.len(), rows.positions.len());
        let rotations = Rotations::new(config, inv_freq, &rows.positions, &rows.segments);
        Pass { segments: rows.segments.clone(), rotations, adapters, dropout, squares: None }
    }

    /// The pass over some of the tokens only, in ascending order, after attention over all.
    pub(super) fn narrowed(&self, chosen: &[u32], config: &Config, inv_freq: &[f32]) -> Self {
        let mut end = 0;
        let part = |segment: &Segment| {
            let start = end;
            end = chosen.partition_point(|&token| (token as usize) < segment.tokens.end);
            Segment::whole(start..end)
        };
        let segments = self.segments.iter().map(part).collect();
        let rotations = Rotations::new(config, inv_freq, &[], &[]);
        Pass { segments, rotations, adapters: self.adapters, dropout: None, squares: None }
    }
}

/// The rotation of rows that turn by other frequencies where they have more than so many tokens. Rows
/// that share a prefix are as long as the longest of them.
fn by_length(
    positions: &[u32],
    segments: &[Segment],
    short: &[f32],
    (original, long): (usize, &[f32]),
) -> Rotation {
    let is_long = |row: &Segment| {
        let last = row.tokens.clone().last().map(|token| positions[token] as usize);
        last.is_some_and(|last| last >= original)
    };
    let beginning = |row: &Segment| match row.prefix.is_empty() {
        true => row.tokens.start,
        false => row.prefix.start,
    };
    let long_rows = segments.iter().filter(|row| is_long(row)).map(beginning);
    let long_rows: HashSet<usize> = long_rows.collect();
    let parts = segments.iter().filter(|row| !row.is_empty()).map(|row| {
        let inv_freq = if long_rows.contains(&beginning(row)) { long } else { short };
        Rotation::new(&positions[row.tokens.clone()], inv_freq)
    });
    let parts: Vec<Rotation> = parts.collect();
    match parts.is_empty() {
        true => Rotation::new(&[], short),
        false => Rotation::joined(&parts),
    }
}
