//! Contents of a weights file, as text and for `--json`.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{self, UnwindSafe};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde::Serialize;

#[cfg(feature = "cli")]
use super::gguf::file_type_name;
use super::gguf::{Gguf, type_name};
use super::value::short_text;
use super::{HfFolder, Safetensors, WeightsError};

/// Contents of a file or folder of weights.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The file or folder.
    pub path: String,
    /// `gguf`, `safetensors` or `huggingface`.
    pub format: &'static str,
    /// GGUF's version.
    pub version: Option<u32>,
    /// Alignment of tensors in a GGUF, in bytes.
    pub alignment: Option<usize>,
    /// Summary of a GGUF by the gguf-rs crate, as a second opinion.
    pub summary: Option<InspectionSummary>,
    /// Values of all tensors.
    pub values: u64,
    /// Bytes of all tensors whose type is known.
    pub bytes: u64,
    /// Metadata in the order of the file, values cut to a line.
    pub metadata: Vec<MetadataLine>,
    /// Totals by type of tensor.
    pub types: Vec<TypeTotal>,
    /// The tensors in the order of the file.
    pub tensors: Vec<TensorLine>,
}

/// Summary of a GGUF by the gguf-rs crate.
#[derive(Debug, Clone, Serialize)]
pub struct InspectionSummary {
    /// `general.architecture`.
    pub family: String,
    /// Number of parameters in short form: `135M`.
    pub parameters: String,
    /// `general.file_type` in words.
    pub file_type: String,
}

/// A metadata key.
#[derive(Debug, Clone, Serialize)]
pub struct MetadataLine {
    /// The key.
    pub key: String,
    /// The type of its value.
    pub r#type: String,
    /// Its value, cut to a line.
    pub value: String,
}

/// All tensors of one type.
#[derive(Debug, Clone, Serialize)]
pub struct TypeTotal {
    /// The type's name.
    pub r#type: String,
    /// How many tensors have it.
    pub tensors: usize,
    /// Their values.
    pub values: u64,
    /// Their bytes, 0 if the type is unknown.
    pub bytes: u64,
}

/// A tensor.
#[derive(Debug, Clone, Serialize)]
pub struct TensorLine {
    /// Its name.
    pub name: String,
    /// Its type's name.
    pub r#type: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Its bytes; `None` if its type is unknown.
    pub bytes: Option<u64>,
}

/// Reads what a GGUF file, a safetensors file, or a folder of safetensors (a model's or an
/// adapter's) holds, without reading tensors.
///
/// # Errors
/// If it is none of those, or malformed.
pub fn inspect(path: impl AsRef<Path>) -> Result<Inspection, WeightsError> {
    let path = path.as_ref();
    let adapter = path.join("adapter_model.safetensors");
    if adapter.is_file() && !path.join("config.json").is_file() {
        let config = config_lines(&path.join("adapter_config.json"))?;
        let file = Safetensors::open(adapter)?;
        return Ok(of_safetensors(path, "safetensors", config, &[file]));
    }
    if path.is_dir() {
        let folder = HfFolder::open(path)?;
        let config = config_lines(&folder.config_path())?;
        return Ok(of_safetensors(path, "huggingface", config, folder.shards()));
    }
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        let file = Safetensors::open(path)?;
        return Ok(of_safetensors(path, "safetensors", Vec::new(), &[file]));
    }
    Ok(of_gguf(&Gguf::open(path)?))
}

fn of_gguf(gguf: &Gguf) -> Inspection {
    let metadata = gguf.metadata().map(|(key, value)| MetadataLine {
        key: key.into(),
        r#type: value.value_type().to_string(),
        value: value.to_string(),
    });
    let tensors = gguf.tensors().iter().map(|info| TensorLine {
        name: info.name.clone(),
        r#type: type_name(info.type_id),
        shape: info.shape.clone(),
        bytes: info.range.as_ref().map(|range| range.len() as u64),
    });
    Inspection {
        version: Some(gguf.version()),
        alignment: Some(gguf.alignment()),
        summary: gguf_rs_summary(gguf),
        ..with_totals(gguf.path(), "gguf", metadata.collect(), tensors.collect())
    }
}

/// The summary by gguf-rs of a file that was validated already. gguf-rs panics on tensor types from 40 on
/// and on a `general.file_type` that is not an integer, and takes 60 times the memory of a header, so such
/// files get no summary.
#[cfg(feature = "cli")]
fn gguf_rs_summary(gguf: &Gguf) -> Option<InspectionSummary> {
    if gguf.tensors().iter().any(|info| info.type_id >= 40)
        || gguf.u64("general.file_type").is_err()
        || gguf.data_offset() > 64 << 20
    {
        return None;
    }
    // Its list of file types differs from llama.cpp's: it reads Q4_K_M as IQ2_XXS.
    let file_type = gguf.u64("general.file_type").ok()?;
    let file_type = file_type.map_or("of no file type".into(), file_type_name);
    let path = gguf.path().to_str()?;
    // It truncates the tokenizer's arrays to three items, which saves their memory.
    let read = || {
        let model = gguf_rs::get_gguf_container(path).ok()?.decode().ok()?;
        Some(InspectionSummary {
            family: model.model_family(),
            parameters: model.model_parameters(),
            file_type: file_type.clone(),
        })
    };
    without_panic(read).flatten()
}

/// Only the command line depends on gguf-rs, which itself depends on clap.
#[cfg(not(feature = "cli"))]
fn gguf_rs_summary(_: &Gguf) -> Option<InspectionSummary> {
    None
}

/// The result of `read`; `None`, without a printed message, if it panics. Panics of other threads are
/// printed as usual, and the panic hook is restored afterwards.
pub(crate) fn without_panic<T>(read: impl FnOnce() -> T + UnwindSafe) -> Option<T> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(()); // the hook is the process's
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let before = Arc::new(panic::take_hook());
    let (others, this) = (before.clone(), thread::current().id());
    panic::set_hook(Box::new(move |info| {
        if thread::current().id() != this {
            others(info);
        }
    }));
    let read = panic::catch_unwind(read);
    drop(panic::take_hook()); // waits for a hook that is running: nobody else holds `before` now
    if let Some(before) = Arc::into_inner(before) {
        panic::set_hook(before);
    }
    read.ok()
}

fn of_safetensors(
    path: &Path,
    format: &'static str,
    mut metadata: Vec<MetadataLine>,
    files: &[Safetensors],
) -> Inspection {
    let mut tensors = Vec::new();
    for file in files {
        metadata.extend(file.metadata().iter().map(|(key, value)| MetadataLine {
            key: key.clone(),
            r#type: "string".into(),
            value: short_text(value.as_bytes()),
        }));
        tensors.extend(file.tensors().iter().map(|info| TensorLine {
            name: info.name.clone(),
            r#type: info.dtype.to_string(),
            shape: info.shape.clone(),
            bytes: Some(info.range.len() as u64),
        }));
    }
    with_totals(path, format, metadata, tensors)
}

/// The keys of a JSON config; empty if there is no such file.
fn config_lines(path: &Path) -> Result<Vec<MetadataLine>, WeightsError> {
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let text = std::fs::read(path).map_err(|source| WeightsError::Io {
        action: "open",
        path: path.into(),
        source,
    })?;
    let config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&text)
        .map_err(|e| WeightsError::format(path, format!("not a JSON object: {e}")))?;
    let line = |(key, value): (String, serde_json::Value)| {
        let (r#type, value) = match value {
            serde_json::Value::String(text) => ("string", short_text(text.as_bytes())),
            serde_json::Value::Array(_) => ("array", short_json(&value)),
            serde_json::Value::Object(_) => ("object", short_json(&value)),
            serde_json::Value::Null => ("null", value.to_string()),
            serde_json::Value::Bool(_) => ("bool", value.to_string()),
            serde_json::Value::Number(_) => ("number", value.to_string()),
        };
        MetadataLine { key, r#type: r#type.into(), value }
    };
    Ok(config.into_iter().map(line).collect())
}

fn short_json(value: &serde_json::Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn with_totals(
    path: &Path,
    format: &'static str,
    metadata: Vec<MetadataLine>,
    tensors: Vec<TensorLine>,
) -> Inspection {
    let mut types: BTreeMap<&str, TypeTotal> = BTreeMap::new();
    for tensor in &tensors {
        let total = types.entry(&tensor.r#type).or_insert_with(|| TypeTotal {
            r#type: tensor.r#type.clone(),
            tensors: 0,
            values: 0,
            bytes: 0,
        });
        // The readers checked each product; sums over tensors of unknown types saturate.
        let values = tensor.shape.iter().product::<usize>() as u64;
        total.tensors += 1;
        total.values = total.values.saturating_add(values);
        total.bytes += tensor.bytes.unwrap_or(0);
    }
    let types: Vec<TypeTotal> = types.into_values().collect();
    Inspection {
        path: path.display().to_string(),
        format,
        version: None,
        alignment: None,
        summary: None,
        values: types.iter().fold(0, |sum, total| sum.saturating_add(total.values)),
        bytes: types.iter().map(|total| total.bytes).sum(),
        metadata,
        types,
        tensors,
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.format)?;
        if let (Some(version), Some(alignment)) = (self.version, self.alignment) {
            write!(f, " version {version}, alignment {alignment}")?;
        }
        let tensors = self.tensors.len();
        writeln!(f, ", {tensors} tensors, {} values, {} bytes", self.values, self.bytes)?;
        if let Some(InspectionSummary { family, parameters, file_type }) = &self.summary {
            writeln!(f, "{family}, {parameters} parameters, {file_type}")?;
        }

        if !self.metadata.is_empty() {
            let keys = width(self.metadata.iter().map(|line| &line.key));
            writeln!(f, "\nmetadata")?;
            for MetadataLine { key, r#type, value } in &self.metadata {
                writeln!(f, "  {key:keys$}  {:7} {value}", r#type)?;
            }
        }

        writeln!(f, "\ntypes")?;
        for TypeTotal { r#type, tensors, values, bytes } in &self.types {
            writeln!(f, "  {:8} {tensors:6} tensors {values:14} values {bytes:14} bytes", r#type)?;
        }

        let names = width(self.tensors.iter().map(|line| &line.name));
        writeln!(f, "\ntensors")?;
        for TensorLine { name, r#type, shape, bytes } in &self.tensors {
            let shape = format!("{shape:?}");
            let bytes = bytes.map_or("?".into(), |bytes| bytes.to_string());
            writeln!(f, "  {name:names$}  {:8} {shape:16} {bytes:>12} bytes", r#type)?;
        }
        Ok(())
    }
}

/// The width of a column, up to a limit.
fn width<'a>(texts: impl Iterator<Item = &'a String>) -> usize {
    texts.map(|text| text.chars().count()).max().unwrap_or(0).min(64)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn caught_panics_are_silent_and_others_are_printed() {
        // Counts the panics of this test's threads; other tests of this process are not affected.
        static TOLD: AtomicUsize = AtomicUsize::new(0);
        const WORDS: &str = "a panic of this test";
        let ours = |info: &panic::PanicHookInfo| {
            let text = info.payload().downcast_ref::<&str>().copied();
            text.or(info.payload().downcast_ref::<String>().map(String::as_str)) == Some(WORDS)
        };
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if ours(info) {
                TOLD.fetch_add(1, Ordering::Relaxed);
            } else {
                before(info);
            }
        }));

        assert_eq!(without_panic(|| 7), Some(7));
        assert_eq!(without_panic(|| panic!("{WORDS}")), None::<()>);
        assert_eq!(TOLD.load(Ordering::Relaxed), 0);
        let elsewhere = without_panic(|| thread::spawn(|| panic!("{WORDS}")).join().is_err());
        assert_eq!((elsewhere, TOLD.load(Ordering::Relaxed)), (Some(true), 1));
        assert!(panic::catch_unwind(|| panic!("{WORDS}")).is_err());
        assert_eq!(TOLD.load(Ordering::Relaxed), 2, "the hook is back");
    }
}
