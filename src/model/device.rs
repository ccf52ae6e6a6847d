//! Models on a device.

use candle_core::{Device, Result};

use super::ModelError;
use super::backend::{Backend, with_backend};
use super::decoder::Decoder;
use super::full::FullModel;
use crate::ops::Compute;
use crate::weights::Checkpoint;

impl Decoder {
    /// The same decoder with its weights on a device, where its passes then compute and their caches of
    /// keys and values lie. The embedding stays in the map, as only rows of it are read; adapters stay
    /// on the CPU, they are small and go up with each use: what trains, saves and merges them is the
    /// same on every device.
    ///
    /// # Errors
    /// If its backend does not compute there, or the device has too little memory.
    pub fn on(self, device: &Device) -> Result<Self> {
        with_backend!(self.compute.backend, B => B::decoder_on(self, device))
    }

    /// Loads another decoder, to run as this one does: in the same form, on the same device.
    pub fn load_beside(&self, checkpoint: &Checkpoint) -> std::result::Result<Self, ModelError> {
        let decoder = Self::load(checkpoint, self.compute)?;
        match self.uploaded_head {
            Some(_) => decoder.on(&self.device).map_err(|e| ModelError::Tensors {
                path: checkpoint.path().display().to_string(),
                reason: e.to_string(),
            }),
            None => Ok(decoder),
        }
    }
}

impl FullModel {
    /// The same model with its parameters on a device, where its micro-batches then compute.
    ///
    /// # Errors
    /// If its backend does not compute there, or the device has too little memory.
    pub fn on(self, device: &Device) -> Result<Self> {
        with_backend!(self.compute.backend, B => B::full_model_on(self, device))
    }

    /// A frozen decoder of the present values, copied, on the device they are on.
    ///
    /// # Errors
    /// If that is not the CPU and the backend of `compute` does not compute there.
    pub fn decoder(&self, compute: Compute) -> Result<Decoder> {
        let decoder = self.frozen_copy(compute)?;
        match self.device() {
            Device::Cpu => Ok(decoder),
            device => decoder.on(device),
        }
    }
}
