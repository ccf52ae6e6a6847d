//! The tape of a layer for the backward pass, the buffers that layers share, and their sizes in bytes.

use half::f16;

use super::attention::AttentionTape;
use super::feed_forward::FeedForwardTape;
use crate::model::config::{Config, Norms};
use crate::model::decode_linear::DecodeBuffers;
use crate::ops::gemm::{PackedRows, PanelType};
use crate::ops::{Compute, half_tape};

/// Values of a layer saved for the backward pass, which recomputes no product.
#[derive(Debug, Default)]
pub struct Tape {
    /// Its input `(N, hidden_size)`.
    pub x: Vec<f32>,
    pub(super) attention: AttentionTape,
    /// The residual stream between attention and feed-forward block.
    pub(super) post_attention_residual: Vec<f32>,
    pub(super) feed_forward: FeedForwardTape,
}

/// Values saved for the backward pass: in F32, or in 16 bits if products are rounded anyway.
#[derive(Debug, Default)]
pub(super) struct TapeBuffer {
    exact: Vec<f32>,
    half: Vec<f16>,
}

impl TapeBuffer {
    /// Saves `values` by swapping buffers.
    pub(super) fn keep(&mut self, panel: PanelType, values: &mut Vec<f32>) {
        match panel {
            PanelType::F32 => std::mem::swap(&mut self.exact, values),
            PanelType::Int16 | PanelType::Int8 => half_tape::narrow(values, &mut self.half),
        }
    }

    /// Saves a copy.
    pub(super) fn copy(&mut self, panel: PanelType, values: &[f32]) {
        match panel {
            PanelType::F32 => {
                self.exact.clear();
                self.exact.extend_from_slice(values);
            }
            PanelType::Int16 | PanelType::Int8 => half_tape::narrow(values, &mut self.half),
        }
    }

    /// The saved values, converted into `buffer` if they are not stored in F32.
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

    /// Moves the saved values back into `values`.
    pub(super) fn give(&mut self, panel: PanelType, values: &mut Vec<f32>) {
        match panel {
            PanelType::F32 => std::mem::swap(&mut self.exact, values),
            PanelType::Int16 | PanelType::Int8 => half_tape::widen(&self.half, values),
        }
    }
}

/// Values of a linear layer saved for the gradients of its adapters.
#[derive(Debug, Default)]
pub(super) struct LoraTape {
    /// `x · Aᵀ (N, r)` of each update.
    pub(super) hidden: Vec<Vec<f32>>,
    /// The base's product `(N, out)`, if DoRA magnitudes are trainable.
    pub(super) base: TapeBuffer,
}

/// Takes a buffer out of the workspace and resizes it. Its values are arbitrary.
pub(super) fn take(buffer: &mut Vec<f32>, len: usize) -> Vec<f32> {
    let mut buffer = std::mem::take(buffer);
    buffer.resize(len, 0.0);
    buffer
}

impl Tape {
    /// Bytes of the buffers that all layers share, without tapes.
    pub fn shared_bytes(config: &Config, compute: Compute, tokens: usize, sizes: &Sizes) -> usize {
        let (floats, packed) = Self::shared_width(config, sizes);
        let packed = match compute.precision.backward_panel() {
            PanelType::Int16 | PanelType::Int8 => packed / 2,
            PanelType::F32 => packed,
        };
        // Of the layers that share an input, most of a layer's updates; unpacked, packed, and
        // their gradients.
        (floats + packed + 2 * sizes.ranks) * tokens * size_of::<f32>()
    }

    /// [`Self::shared_bytes`] of fully trainable layers, whose gradients are packed twice.
    pub(in crate::model) fn trainable_shared_bytes(config: &Config, tokens: usize) -> usize {
        let (floats, packed) = Self::shared_width(config, &Sizes::default());
        (floats + 2 * packed) * tokens * size_of::<f32>()
    }

    /// Values per token in the buffers that all layers share, and in packed ones.
    fn shared_width(config: &Config, sizes: &Sizes) -> (usize, usize) {
        let (h, i) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        // The residual stream and its norm, the outputs of attention and gate, the inputs of o
        // and down, and the gradients of all of them.
        let mut floats = 4 * h + 3 * q + 2 * kv + 4 * i;
        if config.family.norms != Norms::Before {
            floats += 2 * h;
        }
        // Packed: the widest input, and the gradients of outputs that share an input.
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
        (floats, packed)
    }

    /// Bytes a tape of `tokens` tokens takes.
    pub fn bytes(config: &Config, compute: Compute, tokens: usize, sizes: &Sizes) -> usize {
        let halved = compute.precision.forward_panel() != PanelType::F32;
        Self::bytes_as(config, halved, tokens, sizes)
    }

    /// [`Self::bytes`] of a fully trainable layer, which saves nothing in 16 bits.
    pub(in crate::model) fn trainable_bytes(config: &Config, tokens: usize) -> usize {
        Self::bytes_as(config, false, tokens, &Sizes::default())
    }

    fn bytes_as(config: &Config, halved: bool, tokens: usize, sizes: &Sizes) -> usize {
        let (attention, attended) = AttentionTape::width(config);
        let (block, products) = FeedForwardTape::width(config);
        let kept = attended + products + sizes.magnitudes;
        let kept = if halved { kept / 2 } else { kept };
        let mut width = 2 * config.hidden_size + attention + block + kept;
        if config.family.norms != Norms::Before {
            width += 2 * config.hidden_size;
        }
        (width + sizes.ranks) * tokens * size_of::<f32>()
    }
}

/// Sizes of a layer's updates, which its tape and its buffers depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sizes {
    /// Ranks of all its updates together.
    pub ranks: usize,
    /// Total outputs of its linear layers with magnitudes (DoRA).
    pub magnitudes: usize,
    /// Whether there are dropout masks.
    pub dropout: bool,
}

/// Buffers of a pass, reused by every layer and every pass.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(super) normed: Vec<f32>,
    pub(super) attended: Vec<f32>,
    pub(super) decode: DecodeBuffers,
    pub(super) gate: Vec<f32>,
    pub(super) up: Vec<f32>,
    pub(super) inner: Vec<f32>,
    /// The output of o or down, and its gradient.
    pub(super) branch: Vec<f32>,
    pub(super) dbranch: Vec<f32>,
    pub(super) dinner: Vec<f32>,
    pub(super) dnormed: Vec<f32>,
    pub(super) dattended: Vec<f32>,
    pub(super) dq: Vec<f32>,
    pub(super) dk: Vec<f32>,
    pub(super) dv: Vec<f32>,
    /// Gradient of queries or keys before a norm.
    pub(super) d_pre_norm: Vec<f32>,
    /// Partial sums of the gradient of a trainable norm.
    pub(in crate::model) norm_shares: Vec<f32>,
    /// Outputs of a fused projection, and their gradient.
    pub(super) side_by_side: Vec<f32>,
    /// The packed input of linear layers; in the precision of updates; and after dropout.
    pub(super) x: PackedRows,
    pub(super) x_of_update: PackedRows,
    pub(super) masked: PackedRows,
    /// `A x` of LoRA, or its gradient, packed.
    pub(super) lora_hidden: Vec<PackedRows>,
    /// Gradients of outputs, packed; and transposed, for trainable weights.
    pub(super) dys: Vec<PackedRows>,
    pub(super) turned_dys: Vec<PackedRows>,
    pub(super) dhidden: Vec<Vec<f32>>,
    /// The base's products that DoRA scales, and gradients through the scales.
    pub(super) bases: Vec<Vec<f32>>,
    pub(super) scaled: Vec<f32>,
    pub(super) dbases: Vec<PackedRows>,
    /// Dropout masks of the current updates, `(N, in)`.
    pub(super) masks: Vec<Vec<f32>>,
    pub(super) through: Vec<f32>,
    pub(super) transposed: Vec<f32>,
    pub(super) factors: Vec<PackedRows>,
    pub(super) products: Vec<Vec<f32>>,
}
