//! An adapter written as llama.cpp's GGUF LoRA; [`crate::model::adapter_files`] reads it.

use std::collections::HashMap;
use std::path::Path;

use quantune_adapters::config::{EMBEDDING, HEAD};
use quantune_adapters::delta::{Adapter, Lora};

use super::chunk::interleave;
use super::{Distance, ExportError, Written, WrittenTensor, verify};
use crate::model::adapter_files::{ADAPTER_TYPE_KEY, ALPHA_KEY, TYPE_KEY};
use crate::model::{ActiveAdapter, Config, Decoder, load};
use crate::ops::Values;
use crate::quant::{BlockType, RowOrder};
use crate::weights::{OwnedValue, TensorPlan, stream_gguf};

/// Writes an adapter for a base of this config as a GGUF LoRA in F32 or F16, its update times
/// `weight`.
///
/// A GGUF has one `alpha` for all updates, each scaled by `alpha / r`. Where the scales of an adapter
/// differ, as with `alpha_pattern` or rsLoRA, B is multiplied by the ratio.
///
/// # Errors
/// If a GGUF LoRA cannot hold a part of the adapter, or the system reports an error.
pub fn write_gguf_lora(
    adapter: &Adapter,
    weight: f64,
    config: &Config,
    dtype: BlockType,
    out: &Path,
) -> Result<Written, ExportError> {
    let cannot = |reason: String| ExportError::Inexpressible { form: "a GGUF LoRA", reason };
    let name = &adapter.name;
    if let Some(reason) = unsupported_part(adapter, config) {
        return Err(cannot(format!("{name:?} has {reason}")));
    }
    if !matches!(dtype, BlockType::F32 | BlockType::F16) {
        return Err(ExportError::Types(format!("a GGUF LoRA is F32 or F16, not {dtype}")));
    }
    let alpha_of = |lora: &Lora| weight * lora.scale * lora.r() as f64;
    let alphas: Vec<f64> = adapter.modules.values().map(alpha_of).collect();
    let Some(alpha) = alphas.first().copied() else {
        return Err(cannot(format!("{name:?} has no update of any layer")));
    };
    // llama.cpp reads an alpha of 0 as a scale of 1.
    let alpha = if alpha == 0.0 { 1.0 } else { f64::from(alpha as f32) };

    let mut plans = Vec::new();
    let mut values: Vec<Vec<f32>> = Vec::new();
    let known: HashMap<String, Vec<usize>> = load::tensors(config).into_iter().collect();
    for (module, lora) in &adapter.modules {
        let tensor = format!("{module}.weight");
        let needed = [lora.out_features(), lora.in_features()];
        if known.get(&tensor).is_none_or(|shape| shape[..] != needed) {
            return Err(cannot(format!(
                "{module} is not a layer of shape {needed:?} of this base"
            )));
        }
        let (a, b) = (Values::of(lora.a.as_tensor())?, Values::of(lora.b.as_tensor())?);
        let by = alpha_of(lora) / alpha;
        let b: Vec<f32> = match by {
            1.0 => b.to_vec(),
            by => b.iter().map(|v| (f64::from(*v) * by) as f32).collect(),
        };
        let b = match load::gguf_order(config, &tensor) {
            RowOrder::Straight => b,
            RowOrder::Interleaved { head_dim } => {
                let mut turned = Vec::new();
                interleave(&b, lora.r(), head_dim, &mut turned);
                turned
            }
        };
        let stored = load::gguf_name(config.family, &tensor);
        for (factor, shape, found) in [
            ("a", vec![lora.r(), lora.in_features()], a.to_vec()),
            ("b", vec![lora.out_features(), lora.r()], b),
        ] {
            let name = format!("{stored}.lora_{factor}");
            let holds = |v: &f32| v.is_finite() && (dtype == BlockType::F32 || v.abs() <= 65504.0);
            if let Some(v) = found.iter().find(|v| !holds(v)) {
                return Err(ExportError::tensor(&name, format!("holds {v}, {dtype} cannot")));
            }
            plans.push(TensorPlan { name, shape, block_type: dtype });
            values.push(found);
        }
    }
    let text = |key: &str, value: &str| (key.to_string(), OwnedValue::from(value));
    let file_type = if dtype == BlockType::F32 { 0 } else { 1 };
    let metadata = [
        text("general.architecture", config.family.architecture),
        text(TYPE_KEY, "adapter"),
        text(ADAPTER_TYPE_KEY, "lora"),
        ("general.file_type".into(), OwnedValue::U32(file_type)),
        text("general.name", name),
        (ALPHA_KEY.into(), OwnedValue::F32(alpha as f32)),
    ];
    let mut tensors = Vec::new();
    stream_gguf(out, &metadata, &plans, |i, file| {
        let (plan, values) = (&plans[i], &values[i]);
        let mut bytes = vec![0; plan.bytes().expect("checked")];
        plan.block_type.quantize(values, values.len(), None, &mut bytes);
        let mut back = vec![0.0; values.len()];
        plan.block_type.dequantize(&bytes, &mut back);
        let norm = |values: &mut dyn Iterator<Item = f32>| {
            values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
        };
        let off = norm(&mut values.iter().zip(&back).map(|(v, b)| v - b));
        let of = norm(&mut values.iter().copied()).max(f64::MIN_POSITIVE);
        let (name, shape, block_type) = (plan.name.clone(), plan.shape.clone(), plan.block_type);
        tensors.push(WrittenTensor { name, shape, block_type, relative_error: off / of });
        file.write_all(&bytes)
    })?;
    let io = |source| ExportError::Io { action: "read", path: out.into(), source };
    Ok(Written { bytes: std::fs::metadata(out).map_err(io)?.len(), tensors })
}

/// A part of an adapter that a GGUF LoRA for a base of this config cannot hold, if there is one.
fn unsupported_part(adapter: &Adapter, config: &Config) -> Option<String> {
    if adapter.score.is_some() {
        return Some("a score head, as reward models do".into());
    }
    if let Some(module) = adapter.saved.keys().next() {
        return Some(format!("a whole {module} of its own: merge it instead"));
    }
    if adapter.tokens.is_some() || adapter.head_tokens.is_some() {
        return Some("token rows of its own: merge it instead".into());
    }
    if adapter.modules.values().any(|lora| lora.magnitude.is_some()) {
        return Some("DoRA's magnitudes: merge it instead".into());
    }
    if adapter.modules.contains_key(EMBEDDING) {
        let reason = "of the embedding, which llama.cpp stores transposed and by version";
        return Some(format!("an update {reason}: merge it instead"));
    }
    if adapter.modules.contains_key(HEAD) && config.tie_word_embeddings {
        return Some(
            "an update of the head, which is one with the embedding there: merge it instead".into(),
        );
    }
    None
}

/// Distance between the base with the `wanted` adapters and with those read back from a file.
///
/// # Errors
/// If the base cannot be run.
pub fn distance(
    decoder: &Decoder,
    wanted: &[ActiveAdapter],
    found: &[ActiveAdapter],
    tokens: &[u32],
) -> Result<Distance, ExportError> {
    verify::distance((decoder, wanted), decoder, found, tokens)
}
