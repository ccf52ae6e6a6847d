//! Writes a model as a Hugging Face folder.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::chunk::StoredForm;
use super::source::ModelOrigin;
use super::{ExportError, ExportSource, ExportTensor, Written, chunk, config};
use crate::quant::{BlockType, RowOrder};
use crate::text::convert;
use crate::weights::{TensorPlan, stream_safetensors, write_atomically};

/// Maximum size of a file, as in transformers.
const SHARD_BYTES: usize = 5_000_000_000;

/// Writes a model as a Hugging Face folder in F32, F16 or BF16, in files of at most 5 GB.
///
/// The folder is replaced atomically; an existing one only if it holds nothing but files of a model.
///
/// ```
/// use std::path::Path;
/// use std::sync::Arc;
///
/// use quantune::export::{ExportSource, write_folder};
/// use quantune::model::adapter_files::open_adapter;
/// use quantune::model::{ActiveAdapter, Decoder};
/// use quantune::ops::Compute;
/// use quantune::quant::BlockType;
/// use quantune::weights::Checkpoint;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = Checkpoint::open("tests/golden/model/llama-tiny")?;
/// let decoder = Decoder::load(&base, Compute::F32)?;
/// let folder = Path::new("tests/golden/train/llama-tiny/final");
/// let (adapter, _unmatched) = open_adapter(folder, "final", &decoder)?;
/// let source = ExportSource::open(&base, &[ActiveAdapter::frozen(Arc::new(adapter))])?;
/// let out = std::env::temp_dir().join(format!("quantune-doc-merge-{}", std::process::id()));
/// write_folder(&source, BlockType::F16, &out)?;
/// assert!(out.join("model.safetensors").exists());
/// # std::fs::remove_dir_all(&out)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// If a `config.json` cannot describe the model, the type cannot hold a value, or the system reports an
/// error.
pub fn write_folder(
    source: &ExportSource,
    dtype: BlockType,
    out: &Path,
) -> Result<Written, ExportError> {
    write_shards(source, dtype, SHARD_BYTES, out)
}

fn write_shards(
    source: &ExportSource,
    dtype: BlockType,
    shard_bytes: usize,
    out: &Path,
) -> Result<Written, ExportError> {
    let files = small_files(source, dtype)?;
    check_replaceable(out)?;
    let (partial, old) = (sibling_path(out, "partial")?, sibling_path(out, "old")?);
    let io = |action, path: &Path| {
        let path = path.to_path_buf();
        move |source| ExportError::Io { action, path, source }
    };
    for leftover in [&partial, &old] {
        if leftover.exists() {
            fs::remove_dir_all(leftover).map_err(io("remove", leftover))?;
        }
    }
    fs::create_dir_all(&partial).map_err(io("create", &partial))?;
    let written = write_into(source, dtype, shard_bytes, &files, &partial);
    if written.is_err() {
        let _ = fs::remove_dir_all(&partial); // the first error is returned
    }
    let written = written?;
    if out.exists() {
        fs::rename(out, &old).map_err(io("replace", out))?;
    }
    fs::rename(&partial, out).map_err(io("write", out))?;
    if cfg!(unix) {
        // The rename itself survives a power cut only once the parent is synced.
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        fs::File::open(parent).and_then(|folder| folder.sync_all()).map_err(io("sync", parent))?;
    }
    if old.exists() {
        fs::remove_dir_all(&old).map_err(io("remove", &old))?;
    }
    Ok(written)
}

/// The path `.{name}.{what}` next to a folder.
fn sibling_path(out: &Path, what: &str) -> Result<PathBuf, ExportError> {
    let name = out.file_name().ok_or_else(|| ExportError::Io {
        action: "write",
        path: out.into(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidInput, "it names no folder"),
    })?;
    Ok(out.with_file_name(format!(".{}.{what}", name.to_string_lossy())))
}

/// Checks that an existing folder holds only files of a model, so that it may be replaced.
fn check_replaceable(out: &Path) -> Result<(), ExportError> {
    if !out.exists() {
        return Ok(());
    }
    let io = |source| ExportError::Io { action: "read", path: out.into(), source };
    for entry in fs::read_dir(out).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        let ours = name == "config.json"
            || name == "generation_config.json"
            || name == "model.safetensors.index.json"
            || name.starts_with("model") && name.ends_with(".safetensors")
            || convert::FILES.iter().any(|file| file.split('/').next() == Some(&name));
        if !ours {
            let reason = format!("it exists and contains {name:?}, which is not part of a model");
            let source = std::io::Error::other(reason);
            return Err(ExportError::Io { action: "replace", path: out.into(), source });
        }
    }
    Ok(())
}

fn write_into(
    source: &ExportSource,
    dtype: BlockType,
    shard_bytes: usize,
    files: &[(String, String)],
    folder: &Path,
) -> Result<Written, ExportError> {
    for (name, text) in files {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|source| ExportError::Io {
                action: "create",
                path: parent.into(),
                source,
            })?;
        }
        write_atomically(&path, |file| file.write_all(text.as_bytes()))?;
    }
    let shards = shards(&source.tensors, dtype, shard_bytes);
    let name = |shard: usize| match shards.len() {
        1 => "model.safetensors".to_string(),
        all => format!("model-{:05}-of-{all:05}.safetensors", shard + 1),
    };
    let mut tensors = Vec::new();
    let (mut weight_map, mut bytes) = (Map::new(), 0);
    for (i, shard) in shards.iter().enumerate() {
        let plan = |tensor: &&ExportTensor| TensorPlan {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            block_type: dtype,
        };
        let plans: Vec<TensorPlan> = shard.iter().map(plan).collect();
        let path = folder.join(name(i));
        let mut failed = None;
        // transformers requires this key.
        let about = HashMap::from([("format".to_string(), "pt".to_string())]);
        let done = stream_safetensors(&path, about, &plans, |t, file| {
            let form = StoredForm { block_type: dtype, order: RowOrder::Straight, offset: 0.0 };
            let tensor = shard[t];
            tensors.push(chunk::write(tensor, &tensor.name, form, None, file, &mut failed)?);
            Ok(())
        });
        match (done, failed) {
            (Err(_), Some(error)) => return Err(error),
            (Err(error), None) => return Err(error.into()),
            (Ok(()), _) => {}
        }
        for tensor in shard {
            weight_map.insert(tensor.name.clone(), name(i).into());
        }
        let io = |source| ExportError::Io { action: "read", path: path.clone(), source };
        bytes += fs::metadata(&path).map_err(io)?.len();
    }
    if shards.len() > 1 {
        let values: usize = source.tensors.iter().map(|t| t.rows() * t.cols()).sum();
        let total = values * dtype.block_bytes();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        let path = folder.join("model.safetensors.index.json");
        write_atomically(&path, |file| file.write_all(format!("{index:#}\n").as_bytes()))?;
    }
    Ok(Written { bytes, tensors })
}

/// The tensors in their order, split into files of at most `most` bytes.
fn shards<'s, 'a>(
    tensors: &'s [ExportTensor<'a>],
    dtype: BlockType,
    most: usize,
) -> Vec<Vec<&'s ExportTensor<'a>>> {
    let mut shards: Vec<Vec<&ExportTensor>> = Vec::new();
    let mut held = 0;
    for tensor in tensors {
        let bytes = tensor.rows() * tensor.cols() * dtype.block_bytes();
        match shards.last_mut() {
            Some(shard) if held + bytes <= most => {
                held += bytes;
                shard.push(tensor);
            }
            _ => {
                held = bytes;
                shards.push(vec![tensor]);
            }
        }
    }
    shards
}

/// All files but the weights.
fn small_files(
    source: &ExportSource,
    dtype: BlockType,
) -> Result<Vec<(String, String)>, ExportError> {
    let owned = |(name, text): (&str, String)| (name.to_string(), text);
    let generation = "generation_config.json";
    let mut files: Vec<(String, String)> = match &source.origin {
        ModelOrigin::Gguf(gguf) => {
            convert::to_folder(gguf, &source.added)?.into_iter().map(owned).collect()
        }
        ModelOrigin::Folder(folder) | ModelOrigin::Fresh(folder) => {
            let mut files: Vec<(String, String)> =
                convert::files_with_added_tokens(folder, &source.added)?
                    .into_iter()
                    .map(owned)
                    .collect();
            if let Some(text) = read(&folder.join(generation))? {
                files.push((generation.into(), text));
            }
            files
        }
    };
    let config = match &source.origin {
        ModelOrigin::Folder(folder) => {
            let path = folder.join("config.json");
            let text = read(&path)?.unwrap_or_default();
            let mut json: Value = serde_json::from_str(&text).map_err(|e| bad(&path, &e))?;
            // Only the keys of the weights and their storage change.
            let name = config::dtype_name(dtype)?;
            let key = if json.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
            json[key] = name.into();
            if !source.added.is_empty() {
                let holder = match json["text_config"].get("vocab_size") {
                    Some(_) => &mut json["text_config"],
                    None => &mut json,
                };
                holder["vocab_size"] = source.config.vocab_size.into();
            }
            if !source.config.tie_word_embeddings {
                // An adapter may have untied the head.
                json["tie_word_embeddings"] = false.into();
            }
            if let Some(object) = json.as_object_mut() {
                object.shift_remove("quantization_config");
            }
            json
        }
        ModelOrigin::Fresh(folder) => {
            let ids = match files.iter().find(|(name, _)| name == generation) {
                Some((_, text)) => {
                    let path = folder.join(generation);
                    serde_json::from_str(text).map_err(|e| bad(&path, &e))?
                }
                None => special_ids(folder)?,
            };
            if !files.iter().any(|(name, _)| name == generation) {
                files.push((generation.into(), format!("{:#}\n", Value::from(ids.clone()))));
            }
            config::to_json(&source.config, dtype, &ids)?
        }
        ModelOrigin::Gguf(gguf) => {
            let made = files.iter().find(|(name, _)| name == generation);
            let text = made.map_or("{}", |(_, text)| text);
            let ids = serde_json::from_str(text).map_err(|e| bad(gguf.path(), &e))?;
            config::to_json(&source.config, dtype, &ids)?
        }
    };
    files.push(("config.json".into(), format!("{config:#}\n")));
    Ok(files)
}

/// The special tokens of a folder's tokenizer with the keys of a `generation_config.json`.
fn special_ids(folder: &Path) -> Result<Map<String, Value>, ExportError> {
    let tokenizer = crate::text::Tokenizer::from_folder(folder)?;
    let roles = [
        ("bos_token_id", tokenizer.bos()),
        ("eos_token_id", tokenizer.eos()),
        ("pad_token_id", tokenizer.pad()),
    ];
    let known = roles.into_iter().filter_map(|(role, id)| Some((role.to_string(), id?.into())));
    let mut ids: Map<String, Value> = known.collect();
    // Chat turns may end with another token than documents.
    let all = 0..tokenizer.vocab_size() as u32;
    let ends: Vec<u32> = all.filter(|&id| tokenizer.is_end_of_generation(id)).collect();
    if ends.len() > 1 {
        ids.insert("eos_token_id".into(), json!(ends));
    }
    Ok(ids)
}

fn read(path: &Path) -> Result<Option<String>, ExportError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ExportError::Io { action: "read", path: path.into(), source }),
    }
}

fn bad(path: &Path, error: &serde_json::Error) -> ExportError {
    let source = std::io::Error::new(std::io::ErrorKind::InvalidData, error.to_string());
    ExportError::Io { action: "read", path: path.into(), source }
}
