//! The buffers of a layer's units: what they keep for the backward pass, and what all layers share.

use half::f16;

use crate::model::decode_linear::DecodeBuffers;
use crate::ops::gemm::{PackedRows, PanelType};
use crate::ops::half_tape;

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
    pub hidden: Vec<Vec<f32>>,
    /// The base's own product `(N, out)`, if DoRA magnitudes train.
    pub base: TapeBuffer,
}

/// Takes a buffer out of the workspace, of that length. Its values are arbitrary.
pub(super) fn take(buffer: &mut Vec<f32>, len: usize) -> Vec<f32> {
    let mut buffer = std::mem::take(buffer);
    buffer.resize(len, 0.0);
    buffer
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
    pub(super) transposed_dys: Vec<PackedRows>,
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
