//! Keys and values of tokens already seen, per layer and row.

use std::ops::Range;

use super::Config;
use crate::ops::attention::{Heads, attend_to_cache};

/// The keys and values of a batch of rows, F32, each row of its own length.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<Vec<RowCache>>,
    width: usize,
}

#[derive(Debug, Clone, Default)]
struct RowCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for `rows` rows.
    pub fn new(config: &Config, rows: usize) -> Self {
        let width = config.num_key_value_heads * config.head_dim;
        Self { layers: vec![vec![RowCache::default(); rows]; config.num_hidden_layers], width }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }

    /// Tokens of a row that have been seen.
    pub fn len(&self, row: usize) -> usize {
        self.layers.first().map_or(0, |layer| layer[row].keys.len() / self.width)
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        (0..self.rows()).all(|row| self.len(row) == 0)
    }

    /// Forgets the rows for which `keep`, one a row, is false; those behind them move up.
    pub fn retain(&mut self, keep: &[bool]) {
        for layer in &mut self.layers {
            let mut keep = keep.iter();
            layer.retain(|_| *keep.next().expect("keep has one entry a row"));
        }
    }

    /// Appends the new tokens' keys and values and attends to all there are.
    ///
    /// Shapes: `q`, `out (N, heads · head_dim)`, `k`, `v (N, kv_heads · head_dim)`; `segments`
    /// are the new tokens of each row.
    pub(super) fn attend(
        &mut self,
        layer: usize,
        (q, k, v): (&[f32], &[f32], &[f32]),
        heads: Heads,
        segments: &[Range<usize>],
        out: &mut [f32],
    ) {
        let rows = &mut self.layers[layer];
        for (row, segment) in rows.iter_mut().zip(segments) {
            let new = segment.start * self.width..segment.end * self.width;
            row.keys.extend_from_slice(&k[new.clone()]);
            row.values.extend_from_slice(&v[new]);
        }
        let keys: Vec<&[f32]> = rows.iter().map(|row| &row.keys[..]).collect();
        let values: Vec<&[f32]> = rows.iter().map(|row| &row.values[..]).collect();
        attend_to_cache(q, &keys, &values, heads, segments, out);
    }
}
