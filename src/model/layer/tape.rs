//! What a layer keeps for the way down, the buffers that layers share, and the bytes of both.

use half::f16;

use crate::model::config::{Config, Norms, QkNorm};
use crate::model::decode_linear;
use crate::ops::gemm::{PackedRows, PanelType};
use crate::ops::{Compute, half_tape};

/// What a layer keeps for the way down. No product need be computed again from it.
#[derive(Debug, Default)]
pub struct Tape {
    /// Its input `(N, hidden_size)`.
    pub x: Vec<f32>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) attended: Kept,
    pub(super) lse: Vec<f32>,
    /// Queries and keys before their norms, where they have some.
    pub(super) raw_q: Vec<f32>,
    pub(super) raw_k: Vec<f32>,
    /// The residual stream between attention and feed-forward layer.
    pub(super) middle: Vec<f32>,
    /// What o and down gave, before the norms behind them, where there are some.
    pub(super) attention_branch: Vec<f32>,
    pub(super) inner_branch: Vec<f32>,
    pub(super) gate: Kept,
    pub(super) up: Kept,
    pub(super) lows: [Lows; 7],
}

/// A product kept for the way down: as it is, or in 16 bits where products are integers' anyway.
#[derive(Debug, Default)]
pub(super) struct Kept {
    exact: Vec<f32>,
    half: Vec<f16>,
}

impl Kept {
    /// Takes what is in `values`, in exchange for the buffer that was kept before.
    pub(super) fn keep(&mut self, panel: PanelType, values: &mut Vec<f32>) {
        match panel {
            PanelType::F32 => std::mem::swap(&mut self.exact, values),
            PanelType::Int16 | PanelType::Int8 => half_tape::narrow(values, &mut self.half),
        }
    }

    /// Keeps a copy.
    pub(super) fn copy(&mut self, panel: PanelType, values: &[f32]) {
        match panel {
            PanelType::F32 => {
                self.exact.clear();
                self.exact.extend_from_slice(values);
            }
            PanelType::Int16 | PanelType::Int8 => half_tape::narrow(values, &mut self.half),
        }
    }

    /// What is kept, by way of a buffer where it is not kept as it is.
    pub(super) fn read<'k>(&'k self, panel: PanelType, buffer: &'k mut Vec<f32>) -> &'k [f32] {
        match panel {
            PanelType::F32 => &self.exact,
            PanelType::Int16 | PanelType::Int8 => {
                buffer.resize(self.half.len(), 0.0);
                half_tape::widen(&self.half, buffer);
                buffer
            }
        }
    }

    /// Gives it back into `values`.
    pub(super) fn give(&mut self, panel: PanelType, values: &mut Vec<f32>) {
        match panel {
            PanelType::F32 => std::mem::swap(&mut self.exact, values),
            PanelType::Int16 | PanelType::Int8 => half_tape::widen(&self.half, values),
        }
    }
}

/// What is kept of a linear layer for the gradients of its updates.
#[derive(Debug, Default)]
pub(super) struct Lows {
    /// `x · Aᵀ (N, r)` of each update.
    pub(super) low: Vec<Vec<f32>>,
    /// The base's own product `(N, out)`, where magnitudes train.
    pub(super) base: Kept,
}

impl Tape {
    /// Bytes of the buffers that all layers share, beside the tapes.
    pub fn shared_bytes(config: &Config, compute: Compute, tokens: usize, sizes: &Sizes) -> usize {
        let (h, i) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        // The stream and what a norm makes of it, what attention and gate give and what goes into o
        // and down, and the gradients of all.
        let mut floats = 4 * h + 3 * q + 2 * kv + 4 * i;
        if config.family.norms != Norms::Before {
            floats += 2 * h;
        }
        // Packed are the widest input, and the gradients of outputs that share one.
        let input = h.max(q).max(i);
        let outputs = q.max(h).max(i) + kv.max(i) + kv;
        let mut packed = input + outputs;
        if sizes.magnitudes > 0 {
            floats += outputs + q.max(h).max(i);
            packed += outputs;
        }
        if sizes.dropout {
            floats += input + 2 * h + input;
            packed += input;
        }
        let packed = match compute.precision.backward_panel() {
            PanelType::Int16 | PanelType::Int8 => packed / 2,
            PanelType::F32 => packed,
        };
        // Of the layers that share an input, most of a layer's updates; as they are, packed, and
        // their gradients.
        (floats + packed + 2 * sizes.ranks) * tokens * size_of::<f32>()
    }

    /// Bytes a tape of `tokens` tokens takes.
    pub fn bytes(config: &Config, compute: Compute, tokens: usize, sizes: &Sizes) -> usize {
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let kept = q + 2 * config.intermediate_size + sizes.magnitudes;
        let kept = match compute.precision.forward_panel() {
            PanelType::Int16 | PanelType::Int8 => kept / 2,
            PanelType::F32 => kept,
        };
        let mut width = 2 * config.hidden_size + q + 2 * kv + kept;
        if config.family.qk_norm != QkNorm::None {
            width += q + kv;
        }
        if config.family.norms != Norms::Before {
            width += 2 * config.hidden_size;
        }
        (width + config.num_attention_heads + sizes.ranks) * tokens * size_of::<f32>()
    }
}

/// How large the updates are that a layer wears: what its tape and its buffers depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sizes {
    /// Ranks of all its updates together.
    pub ranks: usize,
    /// Outputs of its linear layers that have magnitudes (DoRA), all together.
    pub magnitudes: usize,
    /// Whether dropout draws masks.
    pub dropout: bool,
}

/// Buffers of a pass, used again by every layer and every pass.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(super) normed: Vec<f32>,
    pub(super) attended: Vec<f32>,
    pub(in crate::model) decode: decode_linear::Buffers,
    pub(super) gate: Vec<f32>,
    pub(super) up: Vec<f32>,
    pub(super) inner: Vec<f32>,
    pub(super) x: PackedRows,
    pub(super) x_of_update: PackedRows,
    pub(super) masked: PackedRows,
    pub(super) lows: Vec<PackedRows>,
    pub(super) dys: [PackedRows; 3],
    pub(super) dlows: Vec<Vec<f32>>,
    /// The base's products where DoRA scales them, and gradients on their way to the base.
    pub(super) bases: [Vec<f32>; 3],
    pub(super) scaled: Vec<f32>,
    pub(super) dbases: [PackedRows; 3],
    /// Dropout's of the updates at hand, `(N, in)`.
    pub(super) masks: Vec<Vec<f32>>,
    pub(super) through: Vec<f32>,
    pub(super) turned: Vec<f32>,
    pub(super) factors: Vec<PackedRows>,
    pub(super) products: Vec<Vec<f32>>,
    pub(super) dinner: Vec<f32>,
    pub(super) dnormed: Vec<f32>,
    pub(super) dattended: Vec<f32>,
    pub(super) dq: Vec<f32>,
    pub(super) dk: Vec<f32>,
    pub(super) dv: Vec<f32>,
    /// Gradients of queries, keys or a branch before a norm.
    pub(super) draw: Vec<f32>,
    /// Outputs of linear layers side by side, where they are one module, and their gradient.
    pub(super) side_by_side: Vec<f32>,
    /// What o or down gave, and its gradient.
    pub(super) branch: Vec<f32>,
    pub(super) dbranch: Vec<f32>,
}
