//! What a layer keeps for the backward pass, and the bytes of that and of the buffers that layers share.

use super::attention::AttentionTape;
use super::feed_forward::FeedForwardTape;
use crate::model::config::{Config, NormPlacement};
use crate::ops::Compute;
use crate::ops::gemm::PanelType;

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

impl Tape {
    /// Bytes of the buffers that all layers share, without tapes.
    pub fn shared_bytes(
        config: &Config,
        compute: Compute,
        tokens: usize,
        sizes: &AdapterSizes,
    ) -> usize {
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
        let (floats, packed) = Self::shared_width(config, &AdapterSizes::default());
        (floats + 2 * packed) * tokens * size_of::<f32>()
    }

    /// Values per token in the buffers that all layers share, and in packed ones.
    fn shared_width(config: &Config, sizes: &AdapterSizes) -> (usize, usize) {
        let (h, i) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        // The residual stream and its norm, the outputs of attention and gate, the inputs of o
        // and down, and the gradients of all of them.
        let mut floats = 4 * h + 3 * q + 2 * kv + 4 * i;
        if config.family.norms != NormPlacement::Pre {
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
    pub fn bytes(config: &Config, compute: Compute, tokens: usize, sizes: &AdapterSizes) -> usize {
        let halved = compute.precision.forward_panel() != PanelType::F32;
        Self::bytes_as(config, halved, tokens, sizes)
    }

    /// [`Self::bytes`] of a fully trainable layer, which saves nothing in 16 bits.
    pub(in crate::model) fn trainable_bytes(config: &Config, tokens: usize) -> usize {
        Self::bytes_as(config, false, tokens, &AdapterSizes::default())
    }

    fn bytes_as(config: &Config, halved: bool, tokens: usize, sizes: &AdapterSizes) -> usize {
        let (attention, attended) = AttentionTape::width(config);
        let (block, products) = FeedForwardTape::width(config);
        let kept = attended + products + sizes.magnitudes;
        let kept = if halved { kept / 2 } else { kept };
        let mut width = 2 * config.hidden_size + attention + block + kept;
        if config.family.norms != NormPlacement::Pre {
            width += 2 * config.hidden_size;
        }
        (width + sizes.ranks) * tokens * size_of::<f32>()
    }
}

/// Sizes of a layer's updates, which its tape and its buffers depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AdapterSizes {
    /// Ranks of all its updates together.
    pub ranks: usize,
    /// Total outputs of its linear layers with magnitudes (DoRA).
    pub magnitudes: usize,
    /// Whether there are dropout masks.
    pub dropout: bool,
}
