//! The frozen weights of a layer.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::config::LayerRope;
use crate::ops::{AttentionConfig, DeviceMatrix};
use crate::quant::FrozenMatrix;

#[derive(Debug)]
pub(super) struct Layer {
    /// Before attention.
    pub input_norm: Option<Tensor>,
    pub qkv: Shared<3>,
    /// Of queries and keys, `(head_dim)` or of all heads together.
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
    pub o: Linear,
    /// Behind attention, before it joins the residual stream.
    pub post_attention_norm: Option<Tensor>,
    /// Before the feed-forward layer.
    pub pre_feedforward_norm: Option<Tensor>,
    pub gate_up: Shared<2>,
    pub down: Linear,
    /// Behind the feed-forward layer.
    pub post_feedforward_norm: Option<Tensor>,
    pub scores: AttentionConfig,
    pub rope: LayerRope,
}

impl Layer {
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let (qkv, gate_up) = (self.qkv.linears(), self.gate_up.linears());
        qkv.iter().chain([&self.o]).chain(gate_up).chain([&self.down])
    }

    /// Brings all a pass reads to a device.
    pub fn upload(&mut self, device: &Device) -> Result<()> {
        let (qkv, gate_up) = (self.qkv.linears_mut(), self.gate_up.linears_mut());
        for linear in qkv.iter_mut().chain([&mut self.o]).chain(gate_up).chain([&mut self.down]) {
            linear.uploaded = Some(Arc::new(DeviceMatrix::upload(&linear.weight, device)?));
            if let Some(bias) = &mut linear.bias {
                *bias = bias.to_device(device)?;
            }
        }
        let norms = [
            &mut self.input_norm,
            &mut self.q_norm,
            &mut self.k_norm,
            &mut self.post_attention_norm,
            &mut self.pre_feedforward_norm,
            &mut self.post_feedforward_norm,
        ];
        for norm in norms.into_iter().flatten() {
            *norm = norm.to_device(device)?;
        }
        Ok(())
    }
}

/// `M` linear layers that share their input.
#[derive(Debug)]
pub(super) enum Shared<const M: usize> {
    /// Modules of their own.
    Apart([Linear; M]),
    /// One module, whose outputs lie side by side (Phi-3).
    Whole(Linear),
}

impl<const M: usize> Shared<M> {
    pub fn linears(&self) -> &[Linear] {
        match self {
            Self::Apart(linears) => linears,
            Self::Whole(linear) => std::slice::from_ref(linear),
        }
    }

    pub fn linears_mut(&mut self) -> &mut [Linear] {
        match self {
            Self::Apart(linears) => linears,
            Self::Whole(linear) => std::slice::from_mut(linear),
        }
    }
}

#[derive(Debug)]
pub(super) struct Linear {
    /// The Hugging Face module path, which adapters know it by.
    pub name: String,
    pub weight: Arc<FrozenMatrix>,
    /// The weight on another device.
    pub uploaded: Option<Arc<DeviceMatrix>>,
    pub bias: Option<Tensor>,
}
