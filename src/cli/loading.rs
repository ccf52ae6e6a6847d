//! How a base is loaded, by flags that `eval`, `generate` and `chat` share.

use anyhow::Result;

use super::Usage;
use crate::model::Decoder;
use crate::ops::{Compute, DeviceName};
use crate::quant::BlockType;
use crate::text::Tokenizer;
use crate::weights::Checkpoint;

/// How and where a base computes.
#[derive(Debug, clap::Args)]
pub struct Loading {
    /// How products are computed: int16 (block-floating, nearly twice f32's speed), int8 (faster
    /// still, rougher), f32 (exact), or portable (the slow reference form, and the only one of other
    /// devices than the CPU) [default: int16; portable on another device]
    #[arg(long)]
    compute: Option<Compute>,
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
        let compute = self.compute.unwrap_or(device.default_compute());
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
