//! How a base is loaded, by flags that `eval`, `generate` and `chat` share.

use anyhow::Result;

use super::Usage;
use crate::model::Decoder;
use crate::ops::{BackendKind, DeviceName};
use crate::quant::BlockType;
use crate::text::Tokenizer;
use crate::train::settings::{ComputeSetting, resolve_compute};
use crate::weights::Checkpoint;

/// How and where a base computes.
#[derive(Debug, clap::Args)]
pub struct Loading {
    /// Precision of products: int16 (block-floating, nearly twice f32's speed), int8 (faster still,
    /// rougher), f32 (exact), or portable, which is --backend reference [default: int16; f32 with
    /// --backend reference]
    #[arg(long)]
    compute: Option<ComputeSetting>,
    /// What computes: cpu (kernels for the CPU), or reference (plain candle ops in f32: slow, and the
    /// only backend of other devices than the CPU) [default: cpu; reference on another device]
    #[arg(long)]
    backend: Option<BackendKind>,
    /// Where products are computed: cpu, cuda, cuda:N or metal; the others than cpu are of builds with
    /// the feature of that name [default: cpu]
    #[arg(long)]
    device: Option<DeviceName>,
    /// Quantize the matrices of a --base folder on load, one after the other, to a GGUF's type as
    /// Q8_0 or Q4_K [default: they stay as they are stored]
    #[arg(long, value_name = "TYPE", value_parser = BlockType::written)]
    load_type: Option<BlockType>,
}

impl Loading {
    /// Loads the decoder of a checkpoint, with rows for tokens that were added.
    pub fn decoder(&self, checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Decoder> {
        let device = self.device.unwrap_or_default();
        let compute = resolve_compute(device, self.backend, self.compute).map_err(Usage)?;
        device.check(compute).map_err(|e| Usage(e.to_string()))?;
        let opened = device.open()?; // told before anything is read
        let decoder = Decoder::load_as(checkpoint, compute, self.load_type)?;
        let decoder = decoder.with_vocabulary(tokenizer.rows_needed())?;
        match device {
            DeviceName::Cpu => Ok(decoder),
            DeviceName::Cuda(_) | DeviceName::Metal => Ok(decoder.on(&opened)?),
        }
    }
}
