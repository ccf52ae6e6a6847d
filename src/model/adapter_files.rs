//! Adapter files: PEFT folders and llama.cpp's GGUF LoRA.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use quantune_adapters::config::{HEAD, LoraConfig, Modules};
use quantune_adapters::delta::{Adapter, Lora};
use quantune_adapters::format::{self, FormatError};
use quantune_adapters::targets::{LinearSpec, Unmatched};

use super::{Config, Decoder, load};
use crate::quant::{FrozenMatrix, RowOrder};
use crate::weights::{Gguf, Safetensors, WeightsError};

/// The GGUF key whose value is "adapter" in a file without a model.
pub(crate) const TYPE_KEY: &str = "general.type";
/// The key of the kind of adapter: "lora".
pub(crate) const ADAPTER_TYPE_KEY: &str = "adapter.type";
/// The key of the `alpha` of all updates, which are scaled by `alpha / r`.
pub(crate) const ALPHA_KEY: &str = "adapter.lora.alpha";

/// Why an adapter could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterFileError {
    /// The file cannot be read, or is not an adapter of this base.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The PEFT folder cannot be read, or does not fit this base.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A tensor of the adapter's base that differs from this base.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// The difference, and what is needed.
        reason: String,
    },
}

/// Reads an adapter for a base from a PEFT folder or a GGUF LoRA (`.gguf`). Also returns the names and
/// patterns of the folder's config that match no module, for warnings.
///
/// ```
/// use std::path::Path;
/// use std::sync::Arc;
///
/// use quantune::model::adapter_files::open_adapter;
/// use quantune::model::{ActiveAdapter, Adapters, Decoder, Rows};
/// use quantune::ops::Compute;
/// use quantune::weights::Checkpoint;
/// use quantune_adapters::registry::{Registry, RegistryLimits};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let checkpoint = Checkpoint::open("tests/golden/model/llama-tiny")?;
/// let decoder = Decoder::load(&checkpoint, Compute::F32)?;
/// // Adapters by name, which other threads may replace while they are used.
/// let registry = Registry::new(&decoder.linears(), RegistryLimits::default());
/// let folder = Path::new("tests/golden/train/llama-tiny/final");
/// let (adapter, _unmatched) = open_adapter(folder, "final", &decoder)?;
/// registry.insert("final", Arc::new(adapter))?;
/// let active = [ActiveAdapter::frozen(registry.get("final")?)];
/// let rows = Rows::new(&[[1u32, 5, 9, 3]]);
/// let hidden = decoder.hidden(&rows, Adapters::Same(&active))?; // (4, hidden_size)
/// assert_eq!(hidden.dims(), [4, decoder.config.hidden_size]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// If it is neither, a tensor has another shape than this base needs
/// ([`Adapter::mismatches`]), or holds numbers that are not finite.
pub fn open_adapter(
    path: &Path,
    name: &str,
    decoder: &Decoder,
) -> Result<(Adapter, Vec<Unmatched>), AdapterFileError> {
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

/// Largest distance between the rows of an added token in two bases, relative to the mean norm of the
/// base's rows: more than the noise of transformers' `mean_resizing` and the rounding to 16 bits.
const ROUNDING: f64 = 0.01;

/// Checks, for updates of embedding and head, that added tokens have the same rows in this base as in
/// the base the adapter was trained on, where PEFT wrote that base's rows into the folder. Rows that the
/// adapter replaces are not compared.
fn check_added_rows(
    folder: &Path,
    adapter: &Adapter,
    decoder: &Decoder,
    linears: &[LinearSpec],
) -> Result<(), AdapterFileError> {
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
            off.partial_cmp(&most).is_none_or(Ordering::is_gt) // true for NaN
        };
        let mut others = (own..theirs.rows()).filter(|token| !brought(*token));
        if let Some(token) = others.find(apart) {
            let reason = format!(
                "{}: the row of token {token}, which was added, is not the mean of all that it begins \
                 as here, needed an adapter that brings its rows (trainable_token_indices or \
                 modules_to_save)",
                folder.display()
            );
            return Err(AdapterFileError::Tensor { name, reason });
        }
    }
    Ok(())
}

/// Reads a GGUF LoRA for a base of this config with these linear layers. A and B become F32.
///
/// # Errors
/// If it is not a GGUF LoRA, is for another architecture, has an update of a layer that the base does
/// not have or of another shape, or holds numbers that are not finite.
pub fn read_gguf_lora(
    gguf: &Gguf,
    name: &str,
    config: &Config,
    linears: &[LinearSpec],
) -> Result<Adapter, AdapterFileError> {
    let bad = |reason: String| -> AdapterFileError {
        WeightsError::Format { path: gguf.path().into(), reason }.into()
    };
    for (key, needed) in [
        (TYPE_KEY, "adapter"),
        (ADAPTER_TYPE_KEY, "lora"),
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
            faults.push(format!("{stored} is not a linear layer of this base"));
            continue;
        };
        let order = load::gguf_order(config, &format!("{}.weight", spec.name));
        match read_lora(gguf, stored, spec, order, alpha) {
            Ok(lora) => drop(modules.insert(spec.name.clone(), lora)),
            Err(fault) => faults.push(fault),
        }
    }
    if modules.is_empty() && faults.is_empty() {
        faults.push("no layer has an update".into());
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
    let adapter = Adapter {
        name: name.into(),
        config,
        modules,
        score: None,
        saved: BTreeMap::new(),
        tokens: None,
        head_tokens: None,
    };
    let problems = adapter.mismatches(linears);
    if !problems.is_empty() {
        return Err(bad(problems.join("; ")));
    }
    Ok(adapter)
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
            return Err(format!("{stored}: an update has the value {v}"));
        }
        values.resize(rows * cols, 0.0);
        let tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu);
        tensor.and_then(|tensor| Var::from_tensor(&tensor)).map_err(|e| text(&e))
    };
    // As in llama.cpp, an alpha of 0 means none.
    let scale = if alpha == 0.0 { 1.0 } else { alpha / r as f64 };
    Ok(Lora::new(var(&a, r)?, var(&b, spec.out_features)?, scale))
}
