//! An adapter as llama.cpp's GGUF LoRA, and back.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use quantune_adapters::config::{LoraConfig, Modules};
use quantune_adapters::delta::{Adapter, Lora};
use quantune_adapters::format;
use quantune_adapters::targets::{LinearSpec, Unmatched};

use super::chunk::interleave;
use super::{Distance, ExportError, Written, WrittenTensor, verify};
use crate::model::{ActiveAdapter, Config, Decoder, load};
use crate::ops::Values;
use crate::quant::{BlockType, FrozenMatrix, RowOrder};
use crate::weights::{Gguf, OwnedValue, Safetensors, TensorPlan, WeightsError, stream_gguf};
use quantune_adapters::config::{EMBEDDING, HEAD};

const TYPE_KEY: &str = "general.type";
const LORA_KEY: &str = "adapter.type";
const ALPHA_KEY: &str = "adapter.lora.alpha";

/// Writes an adapter for a base of this config as a GGUF LoRA in F32 or F16, its update times
/// `weight`.
///
/// A GGUF has one `alpha`, by which every update is scaled over its rank. Where the adapter has
/// several, or scales by the root of the rank (rsLoRA), what they differ by goes into B.
///
/// # Errors
/// If the adapter has what a GGUF LoRA has no place for, or the system refuses.
pub fn write_gguf_lora(
    adapter: &Adapter,
    weight: f64,
    config: &Config,
    dtype: BlockType,
    out: &Path,
) -> Result<Written, ExportError> {
    let cannot = |reason: String| ExportError::Inexpressible { form: "a GGUF LoRA", reason };
    let name = &adapter.name;
    if adapter.score.is_some() {
        return Err(cannot(format!("{name:?} has a score head, as reward models do")));
    }
    if let Some(module) = adapter.saved.keys().next() {
        return Err(cannot(format!("{name:?} has a whole {module} of its own: merge it instead")));
    }
    if adapter.tokens.is_some() || adapter.head_tokens.is_some() {
        return Err(cannot(format!("{name:?} has token rows of its own: merge it instead")));
    }
    if adapter.modules.values().any(|lora| lora.magnitude.is_some()) {
        return Err(cannot(format!("{name:?} has DoRA's magnitudes: merge it instead")));
    }
    if adapter.modules.contains_key(EMBEDDING) {
        let reason = "of the embedding, which llama.cpp stores transposed and by version";
        return Err(cannot(format!("{name:?} has an update {reason}: merge it instead")));
    }
    if adapter.modules.contains_key(HEAD) && config.tie_word_embeddings {
        let reason = "of the head, which is one with the embedding there";
        return Err(cannot(format!("{name:?} has an update {reason}: merge it instead")));
    }
    if !matches!(dtype, BlockType::F32 | BlockType::F16) {
        return Err(ExportError::Types(format!("a GGUF LoRA is F32 or F16, not {dtype}")));
    }
    let alpha_of = |lora: &Lora| weight * lora.scale * lora.r() as f64;
    let alphas: Vec<f64> = adapter.modules.values().map(alpha_of).collect();
    let Some(alpha) = alphas.first().copied() else {
        return Err(cannot(format!("{name:?} has no update of any layer")));
    };
    // llama.cpp takes an alpha of 0 for a scale of 1.
    let alpha = if alpha == 0.0 { 1.0 } else { f64::from(alpha as f32) };

    let mut plans = Vec::new();
    let mut values: Vec<Vec<f32>> = Vec::new();
    let known: HashMap<String, Vec<usize>> = load::tensors(config).into_iter().collect();
    for (module, lora) in &adapter.modules {
        let tensor = format!("{module}.weight");
        let needed = [lora.out_features(), lora.in_features()];
        if known.get(&tensor).is_none_or(|shape| shape[..] != needed) {
            return Err(cannot(format!("{module} is no layer of {needed:?} of this base")));
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
        text(LORA_KEY, "lora"),
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

/// Reads an adapter for a base, a PEFT folder or a GGUF LoRA; also what of a folder's config matched
/// nothing, to be warned of.
///
/// # Errors
/// If it is neither, or none for this base.
pub fn open_adapter(
    path: &Path,
    name: &str,
    decoder: &Decoder,
) -> Result<(Adapter, Vec<Unmatched>), ExportError> {
    let linears = decoder.linears();
    if path.is_file() {
        if path.extension().is_none_or(|of| !of.eq_ignore_ascii_case("gguf")) {
            let needed = "a file, needed a PEFT folder (adapter_config.json and \
                          adapter_model.safetensors) or a GGUF LoRA (.gguf)";
            let (path, reason) = (path.into(), needed.into());
            return Err(WeightsError::Format { path, reason }.into());
        }
        let gguf = Gguf::open(path)?;
        let adapter = read_gguf_lora(&gguf, name, &decoder.config, &linears)?;
        return Ok((adapter, Vec::new()));
    }
    let read = format::read_folder(path, name, &linears, Some(HEAD), &Device::Cpu)?;
    check_added_rows(path, &read.0, decoder, &linears)?;
    Ok(read)
}

/// How far a row of another's may be from ours, by the size of the base's: more than the noise of
/// transformers' `mean_resizing` and what 16 bits round away.
const ROUNDING: f64 = 0.01;

/// That new tokens had the rows in the base of an update of embedding or head that they have in this
/// one, where PEFT has written its base's. Of rows that the adapter has of its own nothing else counts.
fn check_added_rows(
    folder: &Path,
    adapter: &Adapter,
    decoder: &Decoder,
    linears: &[LinearSpec],
) -> Result<(), ExportError> {
    let updated = |spec: &&LinearSpec| adapter.modules.contains_key(&spec.name);
    for spec in linears.iter().filter(|spec| spec.added_tokens > 0).filter(updated) {
        let file = Safetensors::open(folder.join(format::TENSORS_FILE))?;
        let name = format::base_weight_name(&spec.name);
        let weight = decoder.linear_weight(&spec.name);
        let (Some(_), Some(ours)) = (file.tensor_info(&name), weight) else { continue };
        let theirs = file.tensor(&name)?.matrix()?;
        let (own, cols) = (ours.own_rows(), ours.cols());
        let row = |matrix: &FrozenMatrix, row: usize| {
            let mut values = vec![0f32; cols];
            matrix.read_tile(row..row + 1, 0..cols, &mut values);
            values
        };
        let size = |values: &mut dyn Iterator<Item = f32>| {
            values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
        };
        let some = own.min(64);
        let mean: f64 = (0..some).map(|i| size(&mut row(&ours, i).into_iter())).sum();
        let most = ROUNDING * mean / some.max(1) as f64;
        let rows = match spec.embedding {
            true => adapter.tokens.as_ref(),
            false => adapter.head_rows(decoder.config.tie_word_embeddings).map(|(rows, _)| rows),
        };
        let brought = |token: usize| {
            rows.is_some_and(|rows| rows.indices.binary_search(&(token as u32)).is_ok())
        };
        let apart = |token: &usize| {
            let (ours, theirs) = (row(&ours, *token), row(&theirs, *token));
            let off = size(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b));
            off.partial_cmp(&most).is_none_or(Ordering::is_gt) // NaN is near nothing
        };
        let mut others = (own..theirs.rows()).filter(|token| !brought(*token));
        if let Some(token) = others.find(apart) {
            let reason = format!(
                "{}: the row of token {token}, which was added, is not the mean of all that it begins \
                 as here, needed an adapter that brings its rows (trainable_token_indices or \
                 modules_to_save)",
                folder.display()
            );
            return Err(ExportError::tensor(&name, reason));
        }
    }
    Ok(())
}

/// Reads a GGUF LoRA for a base of this config with these linear layers.
///
/// # Errors
/// If it is none, is for another architecture, or has updates of what the base has not.
pub fn read_gguf_lora(
    gguf: &Gguf,
    name: &str,
    config: &Config,
    linears: &[LinearSpec],
) -> Result<Adapter, ExportError> {
    let bad = |reason: String| -> ExportError {
        WeightsError::Format { path: gguf.path().into(), reason }.into()
    };
    for (key, needed) in [
        (TYPE_KEY, "adapter"),
        (LORA_KEY, "lora"),
        ("general.architecture", config.family.architecture),
    ] {
        let found = gguf.str(key)?;
        if found != Some(needed) {
            let found = found.map_or("missing".into(), |found| format!("{found:?}"));
            return Err(bad(format!(
                "{key} is {found}, needed {needed:?}: no adapter of this base"
            )));
        }
    }
    let alpha = gguf.f64(ALPHA_KEY)?.ok_or_else(|| gguf.missing_key(ALPHA_KEY))?;
    let of_tensor: HashMap<String, &LinearSpec> = linears
        .iter()
        .filter(|spec| !spec.embedding && (spec.name != HEAD || !config.tie_word_embeddings))
        .map(|spec| (load::gguf_name(config.family, &format!("{}.weight", spec.name)), spec))
        .collect();
    let mut faults = Vec::new();
    let mut modules = BTreeMap::new();
    for info in gguf.tensors() {
        if info.name.ends_with(".lora_b") {
            continue;
        }
        let Some(stored) = info.name.strip_suffix(".lora_a") else {
            faults.push(format!("{} is neither A nor B of an update", info.name));
            continue;
        };
        let Some(spec) = of_tensor.get(stored) else {
            faults.push(format!("{stored} is no linear layer of this base"));
            continue;
        };
        let order = load::gguf_order(config, &format!("{}.weight", spec.name));
        match read_lora(gguf, stored, spec, order, alpha) {
            Ok(lora) => drop(modules.insert(spec.name.clone(), lora)),
            Err(fault) => faults.push(fault),
        }
    }
    if modules.is_empty() && faults.is_empty() {
        faults.push("it has no update of any layer".into());
    }
    if !faults.is_empty() {
        faults.truncate(8);
        return Err(bad(faults.join("; ")));
    }
    let r = modules.values().map(Lora::r).max().unwrap_or(1);
    let others = modules.iter().filter(|(_, lora)| lora.r() != r);
    let config = LoraConfig {
        task_type: Some("CAUSAL_LM".into()),
        r,
        lora_alpha: if alpha == 0.0 { r as f64 } else { alpha },
        rank_pattern: others.map(|(module, lora)| (module.clone(), lora.r())).collect(),
        target_modules: Some(Modules::List(modules.keys().cloned().collect())),
        ..LoraConfig::default()
    };
    Ok(Adapter {
        name: name.into(),
        config,
        modules,
        score: None,
        saved: BTreeMap::new(),
        tokens: None,
        head_tokens: None,
    })
}

fn read_lora(
    gguf: &Gguf,
    stored: &str,
    spec: &LinearSpec,
    order: RowOrder,
    alpha: f64,
) -> Result<Lora, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let read = |factor: &str, order: RowOrder| -> Result<(FrozenMatrix, [usize; 2]), String> {
        let name = format!("{stored}.lora_{factor}");
        let tensor = gguf.tensor(&name).map_err(|e| text(&e))?;
        let [rows, cols] = tensor.shape[..] else {
            return Err(format!("{name} is {:?}, needed two dimensions", tensor.shape));
        };
        let matrix = tensor.matrix().map_err(|e| text(&e))?;
        Ok((matrix.with_order(order).map_err(|e| format!("{name}: {e}"))?, [rows, cols]))
    };
    let (a, [r, in_features]) = read("a", RowOrder::Straight)?;
    let (b, [out_features, of_b]) = read("b", order)?;
    // Tokens that were added since get no update.
    let own = spec.out_features - spec.added_tokens;
    let fits = (own..=spec.out_features).contains(&out_features);
    if (r, in_features) != (of_b, spec.in_features) || !fits || r == 0 {
        return Err(format!(
            "{stored}: A is [{r}, {in_features}] and B [{out_features}, {of_b}], needed [r, {}] and \
             [{}, r]",
            spec.in_features, spec.out_features
        ));
    }
    let var = |matrix: &FrozenMatrix, rows: usize| -> Result<Var, String> {
        let (own, cols) = (matrix.rows(), matrix.cols());
        let mut values = vec![0f32; own * cols];
        matrix.read_tile(0..own, 0..cols, &mut values);
        if let Some(v) = values.iter().find(|v| !v.is_finite()) {
            return Err(format!("{stored}: an update holds {v}"));
        }
        values.resize(rows * cols, 0.0);
        let tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu);
        tensor.and_then(|tensor| Var::from_tensor(&tensor)).map_err(|e| text(&e))
    };
    // As llama.cpp: an alpha of 0 is none.
    let scale = if alpha == 0.0 { 1.0 } else { alpha / r as f64 };
    Ok(Lora::new(var(&a, r)?, var(&b, spec.out_features)?, scale))
}

/// How far an adapter that was written is from the one that was to be, on the base.
///
/// # Errors
/// If the base cannot run.
pub fn distance(
    decoder: &Decoder,
    wanted: &[ActiveAdapter],
    found: &[ActiveAdapter],
    tokens: &[u32],
) -> Result<Distance, ExportError> {
    verify::distance((decoder, wanted), decoder, found, tokens)
}
