//! What a layer keeps for the backward pass, the buffers that layers share, and the bytes of both.

use half::f16;

use super::attention::AttentionTape;
use super::feed_forward::FeedForwardTape;
use crate::model::config::{Config, Norms};
use crate::model::decode_linear::DecodeBuffers;
use crate::ops::gemm::{PackedRows, PanelType};
use crate::ops::{Compute, half_tape};

/// What a layer keeps for the backward pass. No product is computed again from it.
#[derive(Debug, Default)]
pub struct Tape {
    /// Its input `(N, hidden_size)`.
    pub x: Vec<f32>,
    pub(super) attention: AttentionTape,
    /// The residual stream between attention and feed-forward block.
    pub(super) post_attention_residual: Vec<f32>,
    pub(super) feed_forward: FeedForwardTape,
}

/// Values kept for the backward pass: as they are, or in 16 bits where products are rounded anyway.
#[derive(Debug, Default)]
pub(super) struct TapeBuffer {
    exact: Vec<f32>,
    half: Vec<f16>,
}

impl TapeBuffer {
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

/// What a linear layer keeps for the gradients of its adapters.
#[derive(Debug, Default)]
pub(super) struct LoraTape {
    /// `x · Aᵀ (N, r)` of each update.
    pub(super) hidden: Vec<Vec<f32>>,
    /// The base's own product `(N, out)`, if DoRA magnitudes train.
    pub(super) base: TapeBuffer,
}

/// Takes a buffer out of the workspace, of that length. Its values are arbitrary.
pub(super) fn take(buffer: &mut Vec<f32>, len: usize) -> Vec<f32> {
    let mut buffer = std::mem::take(buffer);
    buffer.resize(len, 0.0);
    buffer
}

impl Tape {
    /// Bytes of the buffers that all layers share, beside the tapes.
    pub fn shared_bytes(config: &Config, compute: Compute, tokens: usize, sizes: &Sizes) -> usize {
        let (floats, packed) = Self::shared_width(config, sizes);
        let packed = match compute.precision.backward_panel() {
            PanelType::Int16 | PanelType::Int8 => packed / 2,
            PanelType::F32 => packed,
        };
        // Of the layers that share an input, most of a layer's updates; as they are, packed, and
        // their gradients.
        (floats + packed + 2 * sizes.ranks) * tokens * size_of::<f32>()
    }

    /// [`Self::shared_bytes`] of layers whose weights all train: gradients are packed twice.
    pub(in crate::model) fn trainable_shared_bytes(config: &Config, tokens: usize) -> usize {
        let (floats, packed) = Self::shared_width(config, &Sizes::default());
        (floats + 2 * packed) * tokens * size_of::<f32>()
    }

    /// Values of a token in the buffers that all layers share, and in packed ones.
    fn shared_width(config: &Config, sizes: &Sizes) -> (usize, usize) {
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
        (floats, packed)
    }

    /// Bytes a tape of `tokens` tokens takes.
    pub fn bytes(config: &Config, compute: Compute, tokens: usize, sizes: &Sizes) -> usize {
        let halved = compute.precision.forward_panel() != PanelType::F32;
        Self::bytes_as(config, halved, tokens, sizes)
    }

    /// [`Self::bytes`] of a layer whose weights all train: nothing is kept in 16 bits.
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
    /// Outputs of its linear layers that have magnitudes (DoRA), all together.
    pub magnitudes: usize,
    /// Whether dropout draws masks.
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
    /// Parts of the gradient of a trainable norm.
    pub(in crate::model) norm_shares: Vec<f32>,
    /// Outputs of a fused projection, and their gradient.
    pub(super) side_by_side: Vec<f32>,
    /// The input of linear layers, packed; as updates read it; and behind dropout.
    pub(super) x: PackedRows,
    pub(super) x_of_update: PackedRows,
    pub(super) masked: PackedRows,
    /// Hidden values of LoRA, or their gradients, packed.
    pub(super) lora_hidden: Vec<PackedRows>,
    /// Gradients of outputs, packed; and transposed, for weights that train.
    pub(super) dys: Vec<PackedRows>,
    pub(super) turned_dys: Vec<PackedRows>,
    pub(super) dhidden: Vec<Vec<f32>>,
    /// The base's products that DoRA scales, and gradients that go back through the scales.
    pub(super) bases: Vec<Vec<f32>>,
    pub(super) scaled: Vec<f32>,
    pub(super) dbases: Vec<PackedRows>,
    /// Dropout masks of the present updates, `(N, in)`.
    pub(super) masks: Vec<Vec<f32>>,
    pub(super) through: Vec<f32>,
    pub(super) transposed: Vec<f32>,
    pub(super) factors: Vec<PackedRows>,
    pub(super) products: Vec<Vec<f32>>,
}
