//! A model as a GGUF, with the keys that llama.cpp's converter writes.

use std::path::Path;

use super::source::Origin;
use super::{ExportError, Importance, Recipe, Source, Written, slab};
use crate::model::config::RopeScaling;
use crate::model::{Config, load};
use crate::quant::BlockType;
use crate::text::convert;
use crate::weights::{OwnedValue, TensorPlan, stream_gguf};

/// ggml's `GGML_QNT_VERSION`.
const QUANTIZATION_VERSION: u32 = 2;

/// Writes a model as a GGUF in the types of `recipe`, errors weighted by `importance`.
///
/// The file appears whole or not at all. Memory holds a slab of a tensor.
///
/// # Errors
/// If the model or its tokenizer cannot be said in a GGUF, a value cannot be held by its type, or
/// the system refuses.
pub fn write_gguf(
    source: &Source,
    recipe: &Recipe,
    importance: Option<&Importance>,
    out: &Path,
) -> Result<Written, ExportError> {
    let config = &source.config;
    let types = recipe.types(config, importance.is_some())?;
    let metadata = metadata(source, recipe, out)?;

    let plan = |(tensor, of): (&super::SourceTensor, &BlockType)| TensorPlan {
        name: load::gguf_name(config.family, &tensor.name),
        shape: tensor.shape.clone(),
        block_type: *of,
    };
    let mut plans: Vec<TensorPlan> = source.tensors.iter().zip(&types).map(plan).collect();
    if let Some(importance) = importance
        && !plans.iter().any(|plan| importance.contains_key(&plan.name))
    {
        let reason = "the importance matrix names none of this model's tensors".to_string();
        return Err(ExportError::Types(reason));
    }
    for plan in &plans {
        let weights = importance.and_then(|importance| importance.get(&plan.name));
        if let (Some(weights), [_, cols]) = (weights, &plan.shape[..])
            && weights.len() != *cols
        {
            let found = weights.len();
            let reason = format!("its importance has {found} columns, needed {cols}");
            return Err(ExportError::tensor(&plan.name, reason));
        }
    }
    let factors = config.rope_factors();
    if let Some(factors) = &factors {
        let (name, shape) = ("rope_freqs.weight".into(), vec![factors.len()]);
        plans.push(TensorPlan { name, shape, block_type: BlockType::F32 });
    }

    let mut failed = None;
    let mut tensors = Vec::new();
    let written = stream_gguf(out, &metadata, &plans, |i, file| {
        let plan = &plans[i];
        let Some(tensor) = source.tensors.get(i) else {
            let values = factors.iter().flatten().flat_map(|v| v.to_le_bytes());
            return file.write_all(&values.collect::<Vec<u8>>());
        };
        let weights = importance.and_then(|importance| importance.get(&plan.name));
        let order = load::gguf_order(config, &tensor.name);
        let weights = weights.map(|weights| &weights[..]);
        let of = plan.block_type;
        tensors.push(slab::write(tensor, &plan.name, of, order, weights, file, &mut failed)?);
        Ok(())
    });
    match (written, failed) {
        (Err(_), Some(error)) => Err(error), // the first error is the one to tell
        (Err(error), None) => Err(error.into()),
        (Ok(()), _) => {
            let io = |source| ExportError::Io { action: "read", path: out.into(), source };
            let bytes = std::fs::metadata(out).map_err(io)?.len();
            Ok(Written { bytes, tensors })
        }
    }
}

fn metadata(
    source: &Source,
    recipe: &Recipe,
    out: &Path,
) -> Result<Vec<(String, OwnedValue)>, ExportError> {
    let kind = [
        ("general.file_type", OwnedValue::U32(recipe.file_type.number())),
        ("general.quantization_version", OwnedValue::U32(QUANTIZATION_VERSION)),
    ];
    match &source.origin {
        // All that the file says but what it is stored as, and the marks of a split file.
        Origin::Gguf(gguf) => {
            let dropped = |key: &str| {
                key.starts_with("split.")
                    || key.starts_with("quantize.imatrix.")
                    || key == crate::weights::gguf::ALIGNMENT_KEY
                    || kind.iter().any(|(name, _)| *name == key)
            };
            let kept = gguf.metadata().filter(|(key, _)| !dropped(key));
            let mut keys: Vec<(String, OwnedValue)> =
                kept.map(|(key, value)| (key.to_string(), value.to_owned())).collect();
            if !source.added.is_empty() {
                let rows = source.config.vocab_size;
                for (key, value) in convert::grown_keys(gguf, rows, &source.added)? {
                    match keys.iter_mut().find(|(known, _)| known == key) {
                        Some((_, known)) => *known = value,
                        None => keys.push((key.into(), value)),
                    }
                }
                let key = format!("{}.vocab_size", source.config.family.architecture);
                if let Some((_, known)) = keys.iter_mut().find(|(known, _)| *known == key) {
                    *known = OwnedValue::U32(rows as u32);
                }
            }
            let at = keys.len().min(1);
            keys.splice(at..at, kind.map(|(key, value)| (key.to_string(), value)));
            Ok(keys)
        }
        Origin::Folder(folder) | Origin::Fresh(folder) => {
            let cannot = |reason| ExportError::Inexpressible { form: "a GGUF of ours", reason };
            if let Some(what) = source.config.beyond_llama() {
                return Err(cannot(format!("{what} keeps the form it came in: folder or GGUF")));
            }
            if let RopeScaling::Yarn { .. } = source.config.rope_scaling {
                return Err(cannot("rope scaling \"yarn\" keeps the form it came in".into()));
            }
            let mut keys = of_config(&source.config, out);
            keys.extend(kind.map(|(key, value)| (key.to_string(), value)));
            keys.extend(convert::to_gguf(folder, source.config.vocab_size, &source.added)?);
            Ok(keys)
        }
    }
}

/// The keys that say what the decoder is.
fn of_config(config: &Config, out: &Path) -> Vec<(String, OwnedValue)> {
    let c = config;
    let architecture = c.family.architecture;
    let name = out.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into());
    let mut keys: Vec<(String, OwnedValue)> = vec![
        ("general.architecture".into(), architecture.into()),
        ("general.type".into(), "model".into()),
        ("general.name".into(), name.as_str().into()),
    ];
    let mut put =
        |key: &str, value: OwnedValue| keys.push((format!("{architecture}.{key}"), value));
    let size = |size: usize| OwnedValue::U32(size as u32);
    put("block_count", size(c.num_hidden_layers));
    put("context_length", size(c.max_position_embeddings));
    put("embedding_length", size(c.hidden_size));
    put("feed_forward_length", size(c.intermediate_size));
    put("attention.head_count", size(c.num_attention_heads));
    put("attention.head_count_kv", size(c.num_key_value_heads));
    put("rope.freq_base", OwnedValue::F32(c.rope_theta as f32));
    put("attention.layer_norm_rms_epsilon", OwnedValue::F32(c.rms_norm_eps as f32));
    put("attention.key_length", size(c.head_dim));
    put("attention.value_length", size(c.head_dim));
    put("vocab_size", size(c.vocab_size));
    put("rope.dimension_count", size(c.head_dim));
    if let RopeScaling::Linear { factor } = c.rope_scaling {
        put("rope.scaling.type", "linear".into());
        put("rope.scaling.factor", OwnedValue::F32(factor as f32));
    }
    keys
}
