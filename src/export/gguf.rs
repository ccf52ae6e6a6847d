//! Writes a model as a GGUF, with the keys that llama.cpp's converter writes.

use std::path::Path;

use super::chunk::StoredForm;
use super::source::ModelOrigin;
use super::{ExportError, ExportSource, Importance, Recipe, Written, chunk};
use crate::model::config::{RopeScaling, Windows, yarn_attention_factor};
use crate::model::{Config, load};
use crate::quant::BlockType;
use crate::text::convert;
use crate::weights::{OwnedValue, TensorPlan, ValueType, stream_gguf};

/// ggml's `GGML_QNT_VERSION`.
const QUANTIZATION_VERSION: u32 = 2;

/// Writes a model as a GGUF in the types of `recipe`; quantization weights errors by `importance`.
///
/// The file is replaced atomically. Memory holds a chunk of one tensor.
///
/// # Errors
/// If a GGUF cannot describe the model or its tokenizer, a type cannot hold a value, or the system
/// reports an error.
pub fn write_gguf(
    source: &ExportSource,
    recipe: &Recipe,
    importance: Option<&Importance>,
    out: &Path,
) -> Result<Written, ExportError> {
    let config = &source.config;
    if let Some(reason) = inexpressible_property(config, &source.origin) {
        return Err(ExportError::Inexpressible { form: "a GGUF", reason });
    }
    let types = recipe.types(config, importance.is_some())?;
    let mut metadata = metadata(source, recipe, out)?;
    metadata.extend(importance.into_iter().flat_map(importance_keys));

    let plan = |(tensor, of): (&super::ExportTensor, &BlockType)| TensorPlan {
        name: load::gguf_name(config.family, &tensor.name),
        shape: tensor.shape.clone(),
        block_type: *of,
    };
    let mut plans: Vec<TensorPlan> = source.tensors.iter().zip(&types).map(plan).collect();
    if let Some(importance) = importance
        && !plans.iter().any(|plan| importance.columns.contains_key(&plan.name))
    {
        let reason = "the importance matrix has no tensor of this model".to_string();
        return Err(ExportError::Types(reason));
    }
    for plan in &plans {
        let weights = importance.and_then(|importance| importance.columns.get(&plan.name));
        if let (Some(weights), [_, cols]) = (weights, &plan.shape[..])
            && weights.len() != *cols
        {
            let found = weights.len();
            let reason = format!("its importance has {found} columns, needed {cols}");
            return Err(ExportError::tensor(&plan.name, reason));
        }
    }
    let factors = load::rope_tensors(config);
    for (name, factors) in &factors {
        let (name, shape) = (name.to_string(), vec![factors.len()]);
        plans.push(TensorPlan { name, shape, block_type: BlockType::F32 });
    }

    let mut failed = None;
    let mut tensors = Vec::new();
    let written = stream_gguf(out, &metadata, &plans, |i, file| {
        let plan = &plans[i];
        let Some(tensor) = source.tensors.get(i) else {
            let (_, factors) = &factors[i - source.tensors.len()];
            let values = factors.iter().flat_map(|v| v.to_le_bytes());
            return file.write_all(&values.collect::<Vec<u8>>());
        };
        let weights = importance.and_then(|importance| importance.columns.get(&plan.name));
        let weights = weights.map(|weights| &weights[..]);
        let form = StoredForm {
            block_type: plan.block_type,
            order: load::gguf_order(config, &tensor.name),
            offset: load::gguf_offset(config, &tensor.name),
        };
        tensors.push(chunk::write(tensor, &plan.name, form, weights, file, &mut failed)?);
        Ok(())
    });
    match (written, failed) {
        (Err(_), Some(error)) => Err(error), // the first error is returned
        (Err(error), None) => Err(error.into()),
        (Ok(()), _) => {
            let io = |source| ExportError::Io { action: "read", path: out.into(), source };
            let bytes = std::fs::metadata(out).map_err(io)?.len();
            Ok(Written { bytes, tensors })
        }
    }
}

/// The keys of llama-quantize about the importance matrix.
fn importance_keys(importance: &Importance) -> Vec<(String, OwnedValue)> {
    let text = |key: &str, text: &Option<String>| {
        text.as_ref().map(|text| (format!("quantize.imatrix.{key}"), OwnedValue::from(&text[..])))
    };
    let count = |key: &str, count: Option<u32>| {
        count.map(|count| (format!("quantize.imatrix.{key}"), OwnedValue::U32(count)))
    };
    let all = [
        text("file", &importance.file),
        text("dataset", &importance.dataset),
        count("entries_count", Some(importance.columns.len() as u32)),
        count("chunks_count", importance.chunks),
    ];
    all.into_iter().flatten().collect()
}

fn metadata(
    source: &ExportSource,
    recipe: &Recipe,
    out: &Path,
) -> Result<Vec<(String, OwnedValue)>, ExportError> {
    let kind = [
        ("general.file_type", OwnedValue::U32(recipe.file_type.number())),
        ("general.quantization_version", OwnedValue::U32(QUANTIZATION_VERSION)),
    ];
    match &source.origin {
        // All keys of the file but those of its storage types and of split files.
        ModelOrigin::Gguf(gguf) => {
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
                for (key, value) in convert::keys_with_added_tokens(gguf, rows, &source.added)? {
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
        ModelOrigin::Folder(folder) | ModelOrigin::Fresh(folder) => {
            let mut keys = of_config(&source.config, out);
            keys.extend(kind.map(|(key, value)| (key.to_string(), value)));
            keys.extend(convert::to_gguf(folder, source.config.vocab_size, &source.added)?);
            Ok(keys)
        }
    }
}

/// The keys that describe the decoder.
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
    put("rope.dimension_count", size(c.rotary_dim()));
    let number = |value: f64| OwnedValue::F32(value as f32);
    match &c.rope_scaling {
        // These have tensors instead of keys.
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => {}
        RopeScaling::Linear { factor } => {
            put("rope.scaling.type", "linear".into());
            put("rope.scaling.factor", number(*factor));
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate: _,
        } => {
            put("rope.scaling.type", "yarn".into());
            put("rope.scaling.factor", number(*factor));
            put("rope.scaling.original_context_length", size(*original as usize));
            if (*beta_fast, *beta_slow) != (32.0, 1.0) {
                put("rope.scaling.yarn_beta_fast", number(*beta_fast));
                put("rope.scaling.yarn_beta_slow", number(*beta_slow));
            }
            let grown = attention_factor / yarn_attention_factor(*factor);
            if grown != 1.0 {
                // The converter writes the first; llama.cpp multiplies by the second.
                put("rope.scaling.yarn_attn_factor", number(*attention_factor));
                put("rope.scaling.attn_factor", number(grown));
            }
        }
        RopeScaling::LongRope {
            original_max_position_embeddings: original,
            attention_factor,
            ..
        } => {
            put("rope.scaling.original_context_length", size(*original));
            put("rope.scaling.attn_factor", number(*attention_factor));
        }
    }
    let v = &c.variation;
    match v.sliding_window {
        // llama.cpp's Llamas have no sliding window; a Mistral's is read back from this key.
        Some(window) => put("attention.sliding_window", size(window)),
        // llama.cpp recognizes Phi-4 by it.
        None if c.family.fused => put("attention.sliding_window", size(0)),
        None => {}
    }
    if let Some(theta) = v.local_rope_theta {
        put("rope.freq_base_swa", number(theta));
    }
    if let Windows::AllBut(nth) = c.family.windows
        && !v.windowed.is_empty()
        && v.windowed != all_but_every_nth(nth, c.num_hidden_layers)
    {
        let flags = v.windowed.iter().map(|windowed| OwnedValue::Bool(*windowed)).collect();
        put("attention.sliding_window_pattern", OwnedValue::Array(ValueType::Bool, flags));
    }
    if let Some(cap) = v.attn_logit_softcapping {
        put("attn_logit_softcapping", number(cap));
    }
    if let Some(cap) = v.final_logit_softcapping {
        put("final_logit_softcapping", number(cap));
    }
    if c.family.multipliers {
        if let Some(scale) = v.attention_scale {
            put("attention.scale", number(scale));
        }
        put("embedding_scale", number(v.embedding_multiplier));
        put("residual_scale", number(v.residual_multiplier));
        put("logit_scale", number(1.0 / v.logits_multiplier));
    }
    keys
}

/// A property of a decoder that a GGUF has no key or tensor for, if there is one: llama.cpp infers it from
/// the architecture, or does not support it.
fn inexpressible_property(c: &Config, origin: &ModelOrigin) -> Option<String> {
    let (family, v) = (c.family, &c.variation);
    let of = |what: &str| Some(format!("a {} with {what}", family.architecture));
    if family.tied_in_gguf && !c.tie_word_embeddings {
        return of("a head beside its embedding");
    }
    if let ModelOrigin::Gguf(_) = origin {
        return None; // all else is as it was
    }
    if matches!(c.rope_scaling, RopeScaling::Yarn { truncate: false, .. }) {
        return of("a yarn ramp between parts of pairs (truncate is false)");
    }
    if matches!(family.windows, Windows::Upper | Windows::Unrotated) && !v.windowed.is_empty() {
        return of("layers that see a window only");
    }
    if let Some(interval) = family.no_rope_layer_interval
        && v.rotated != all_but_every_nth(interval, c.num_hidden_layers)
    {
        return of("other layers that do not rotate than every fourth");
    }
    if family.query_pre_attn_scalar {
        let width = match family.scale_by_hidden_size_at {
            Some(depth) if depth == c.num_hidden_layers => c.hidden_size / c.num_attention_heads,
            _ => c.head_dim,
        };
        let usual = (width as f64).powf(-0.5);
        if v.attention_scale.is_some_and(|scale| (scale / usual - 1.0).abs() > 1e-6) {
            return of(&format!("a query_pre_attn_scalar that is not {width}"));
        }
        let (attention_cap, logit_softcap) = family.softcaps;
        if attention_cap.is_some() != v.attn_logit_softcapping.is_some()
            || logit_softcap.is_some() && v.final_logit_softcapping.is_none()
        {
            return of("other caps than its family has");
        }
        if v.sliding_window.is_none() && family.softcaps.0.is_some() {
            return of("no windows");
        }
    }
    None
}

/// For each layer, whether it is not the last of a group of `nth`.
fn all_but_every_nth(nth: usize, layers: usize) -> Vec<bool> {
    (0..layers).map(|layer| !(layer + 1).is_multiple_of(nth)).collect()
}
