//! Flags for loading a base, shared by `eval`, `generate` and `chat`.

use anyhow::Result;

use super::UsageError;
use crate::model::Decoder;
use crate::ops::{BackendKind, DeviceName};
use crate::quant::BlockType;
use crate::text::Tokenizer;
use crate::train::settings::{ComputeSetting, resolve_compute};
use crate::weights::Checkpoint;

/// Precision, backend and device of a base.
#[derive(Debug, clap::Args)]
pub(super) struct Loading {
    /// Precision of matrix products: int16 (block floating point, nearly twice as fast as f32), int8
    /// (faster, less precise), f32, or portable, which means --backend reference [default: int16; f32 with
    /// --backend reference]
    #[arg(long)]
    compute: Option<ComputeSetting>,
    /// Backend: cpu (optimized kernels), or reference (candle ops in f32; slow, but the only backend for
    /// other devices) [default: cpu; reference on other devices]
    #[arg(long)]
    backend: Option<BackendKind>,
    /// Device: cpu, cuda, cuda:N or metal; all but cpu require a build with that feature [default: cpu]
    #[arg(long)]
    device: Option<DeviceName>,
    /// Quantize the matrices of a --base folder on load to a GGUF type, such as Q8_0 or Q4_K [default:
    /// as stored]
    #[arg(long, value_name = "TYPE", value_parser = BlockType::written)]
    load_type: Option<BlockType>,
}

impl Loading {
    /// Loads the decoder of a checkpoint, with embedding rows for added tokens.
    pub(super) fn decoder(
        &self,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
    ) -> Result<Decoder> {
        let device = self.device.unwrap_or_default();
        let compute = resolve_compute(device, self.backend, self.compute).map_err(UsageError)?;
        device.check(compute).map_err(|e| UsageError(e.to_string()))?;
        let opened = device.open()?; // fails before anything is read
        let decoder = Decoder::load_as(checkpoint, compute, self.load_type)?;
        let decoder = decoder.with_vocabulary(tokenizer.rows_needed())?;
        match device {
            DeviceName::Cpu => Ok(decoder),
            DeviceName::Cuda(_) | DeviceName::Metal => Ok(decoder.on(&opened)?),
        }
    }
}
