//! PEFT's adapter folder, in and out: `adapter_config.json` and `adapter_model.safetensors`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use safetensors::tensor::{Metadata, TensorInfo, TensorView, View};
use safetensors::{Dtype, SafeTensors};

use crate::config::{ConfigError, LoraConfig, Modules, SCORE};
use crate::delta::{Adapter, Lora, score_name, tensor_name};
use crate::targets::{LinearSpec, Resolved, Target, TargetError, Unmatched, resolve};

/// PEFT's name of the config.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// PEFT's name of the tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Why an adapter could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// The folder has pickled tensors only.
    #[error("{}: no {TENSORS_FILE}, and adapter_model.bin is a pickle, which is not read: save the adapter as safetensors", .0.display())]
    Pickle(PathBuf),
    /// The config is not usable.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// The config does not fit the base.
    #[error("{}: {source}", path.display())]
    Targets {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        source: TargetError,
    },
    /// The file is no safetensors file.
    #[error("{}: not a whole safetensors file: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What the parser found.
        reason: String,
    },
    /// Tensors that are not those the config and the base ask for.
    #[error("{}: the adapter{} does not fit this base: {}", path.display(), made_for(base), some(problems))]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// `base_model_name_or_path` of the adapter.
        base: Option<String>,
        /// Everything missing, unexpected or of another shape; the message names the first ten.
        problems: Vec<String>,
    },
    /// candle could not make or read a tensor.
    #[error("adapter tensors: {0}")]
    Tensor(#[from] candle_core::Error),
}

fn made_for(base: &Option<String>) -> String {
    base.as_ref().map_or(String::new(), |base| format!(" (made for {base})"))
}

fn some(problems: &[String]) -> String {
    let first = problems.iter().take(10).cloned().collect::<Vec<_>>().join("; ");
    match problems.len().saturating_sub(10) {
        0 => first,
        more => format!("{first}; and {more} more"),
    }
}

/// Reads the config of an adapter folder.
pub fn read_config(folder: &Path) -> Result<LoraConfig, FormatError> {
    let path = folder.join(CONFIG_FILE);
    let text = fs::read_to_string(&path).map_err(|e| at(&path, e))?;
    LoraConfig::from_json(&text).map_err(|source| FormatError::Config { path, source })
}

/// Reads an adapter folder for a base with these linear layers and this output head.
///
/// The tensors must be exactly those the config means on the base, in F32, F16 or BF16; they
/// become F32. Also returns what of the config matched nothing, to be warned of.
pub fn read_folder(
    folder: &Path,
    name: &str,
    linears: &[LinearSpec],
    head: Option<&str>,
    device: &Device,
) -> Result<(Adapter, Vec<Unmatched>), FormatError> {
    let config = read_config(folder)?;
    let path = folder.join(TENSORS_FILE);
    if !path.exists() && folder.join("adapter_model.bin").exists() {
        return Err(FormatError::Pickle(folder.into()));
    }
    let bytes = fs::read(&path).map_err(|e| at(&path, e))?;
    let mut wanted = config.clone();
    if wanted.target_modules.is_none() {
        // PEFT chose by its table of model families; the file says what it chose.
        let tensors = deserialize(&bytes, &path)?;
        let modules = tensors.names().into_iter().filter_map(|n| Some(parse_name(n)?.0.into()));
        let modules: BTreeSet<String> = modules.collect();
        wanted.target_modules = Some(Modules::List(modules.into_iter().collect()));
    }
    let Resolved { targets, unmatched } = resolve(&wanted, linears, head)
        .map_err(|source| FormatError::Targets { path: folder.join(CONFIG_FILE), source })?;
    let adapter = from_bytes(&bytes, &path, name, config, &targets, device)?;
    Ok((adapter, unmatched))
}

/// An adapter from the bytes of an `adapter_model.safetensors`, or of a checkpoint that holds one;
/// `path` is what errors name. `targets` are the modules, ranks and scales it must have.
pub fn from_bytes(
    bytes: &[u8],
    path: &Path,
    name: &str,
    config: LoraConfig,
    targets: &[Target],
    device: &Device,
) -> Result<Adapter, FormatError> {
    let tensors = deserialize(bytes, path)?;
    let mut problems = Vec::new();
    let mut found: BTreeMap<(&str, char), TensorView<'_>> = BTreeMap::new();
    let has_score = config.modules_to_save.iter().any(|module| module == SCORE);
    let mut score = None;
    for (name, view) in tensors.iter() {
        if has_score && name == score_name() {
            score = Some(view);
            continue;
        }
        match parse_name(name) {
            Some((module, factor)) if targets.iter().any(|t| t.spec.name == module) => {
                if found.insert((module, factor), view).is_some() {
                    problems.push(format!("{name} is there twice, under two adapter names"));
                }
            }
            _ => problems.push(format!("{name} is unexpected")),
        }
    }
    problems.sort();
    let mut modules = BTreeMap::new();
    for Target { spec, r, scale } in targets {
        let mut read = |factor, needed: [usize; 2]| {
            let view = found.get(&(spec.name.as_str(), factor));
            let tensor = match view {
                None => Err("is missing".to_string()),
                Some(view) => read_tensor(view, needed),
            };
            tensor.map_err(|e| problems.push(format!("{} {e}", tensor_name(&spec.name, factor))))
        };
        let a = read('A', [*r, spec.in_features]);
        let b = read('B', [spec.out_features, *r]);
        if let (Ok(a), Ok(b)) = (a, b) {
            let a = Var::from_vec(a, (*r, spec.in_features), device)?;
            let b = Var::from_vec(b, (spec.out_features, *r), device)?;
            modules.insert(spec.name.clone(), Lora::new(a, b, *scale));
        }
    }
    let score = match score {
        None if has_score => Err("is missing, though modules_to_save names it".to_string()),
        None => Ok(None),
        Some(view) => match view.shape() {
            &[1, width] => read_tensor(&view, [1, width]).map(|values| Some((values, width))),
            other => Err(format!("is {other:?}, needed [1, hidden_size]: one score a text")),
        },
    };
    let score = score.map_err(|e| problems.push(format!("{} {e}", score_name())));
    if !problems.is_empty() {
        let base = config.base_model_name_or_path;
        return Err(FormatError::Mismatch { path: path.into(), base, problems });
    }
    let score = score.ok().flatten();
    let score = score.map(|(values, width)| Var::from_vec(values, (1, width), device));
    Ok(Adapter {
        name: name.into(),
        config,
        modules,
        score: score.transpose()?,
        saved: BTreeMap::new(),
        tokens: None,
    })
}

/// Writes the adapter as a PEFT folder, which is created. Each file appears whole or not at all, and
/// has the same bytes for the same adapter.
pub fn write_folder(adapter: &Adapter, folder: &Path) -> Result<(), FormatError> {
    let tensor = |(name, var): (String, Var)| {
        let values = var.as_detached_tensor().to_dtype(DType::F32)?.flatten_all()?;
        Ok((name, Parameter { values, shape: var.dims().to_vec() }))
    };
    let tensors = adapter.parameters().into_iter().map(tensor);
    let tensors = tensors.collect::<candle_core::Result<Vec<_>>>()?;
    // transformers and PEFT look for this key.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    fs::create_dir_all(folder).map_err(|e| at(folder, e))?;
    write_whole(&folder.join(TENSORS_FILE), |file| write_tensors(file, Some(metadata), tensors))?;
    let config = adapter.config.to_json();
    write_whole(&folder.join(CONFIG_FILE), |file| file.write_all(config.as_bytes()))
}

/// Writes F32 tensors as a safetensors file, with the bytes that `safetensors::serialize` makes of
/// them but only those of one tensor in memory at a time.
pub fn write_tensors<V: View>(
    file: &mut impl Write,
    metadata: Option<HashMap<String, String>>,
    mut tensors: Vec<(String, V)>,
) -> io::Result<()> {
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut end = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let start = end;
        end += tensor.data_len();
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let metadata = Metadata::new(metadata, infos.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    tensors.iter().try_for_each(|(_, tensor)| file.write_all(&tensor.data()))
}

/// A parameter on its way into a file.
struct Parameter {
    /// Flat F32.
    values: Tensor,
    shape: Vec<usize>,
}

impl View for Parameter {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.values.to_vec1::<f32>().expect("flat and F32 since it was made");
        values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        self.values.elem_count() * size_of::<f32>()
    }
}

/// Writes beside, syncs, renames, and syncs the folder, so that a crash leaves the old file or
/// the new one.
fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<fs::File>) -> io::Result<()>,
) -> Result<(), FormatError> {
    let beside = path.with_extension("partial");
    let written = (|| {
        let mut file = BufWriter::new(fs::File::create(&beside)?);
        write(&mut file)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&beside, path)?;
        match path.parent() {
            Some(folder) if cfg!(unix) => fs::File::open(folder)?.sync_all(),
            _ => Ok(()), // only Unix opens folders
        }
    })();
    written.map_err(|e| {
        let _ = fs::remove_file(&beside); // the first error is the one to tell
        at(path, e)
    })
}

fn deserialize<'a>(bytes: &'a [u8], path: &Path) -> Result<SafeTensors<'a>, FormatError> {
    SafeTensors::deserialize(bytes)
        .map_err(|e| FormatError::Broken { path: path.into(), reason: e.to_string() })
}

/// Module and factor of `base_model.model.<module>.lora_A.weight`, which inside a model also
/// carries an adapter's name: `lora_A.default.weight`.
fn parse_name(name: &str) -> Option<(&str, char)> {
    let inner = name.strip_prefix("base_model.model.")?.strip_suffix(".weight")?;
    for (mark, factor) in [(".lora_A", 'A'), (".lora_B", 'B')] {
        if let Some((module, adapter)) = inner.rsplit_once(mark)
            && (adapter.is_empty() || adapter.starts_with('.'))
        {
            return Some((module, factor));
        }
    }
    None
}

/// The values as `f32`, or what is wrong with them.
fn read_tensor(view: &TensorView<'_>, needed: [usize; 2]) -> Result<Vec<f32>, String> {
    if view.shape() != needed {
        return Err(format!("is {:?}, needed {needed:?}", view.shape()));
    }
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => return Err(format!("is {other:?}, needed F32, F16 or BF16")),
    };
    let values =
        Tensor::from_raw_buffer(view.data(), dtype, &[view.shape().iter().product()], &Device::Cpu)
            .and_then(|t| t.to_dtype(DType::F32)?.to_vec1::<f32>())
            .map_err(|e| format!("cannot be read: {e}"))?;
    if values.iter().all(|v| v.is_finite()) {
        Ok(values)
    } else {
        Err("holds values that are not finite".into())
    }
}

fn at(path: &Path, source: io::Error) -> FormatError {
    FormatError::Io { path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_tensors_are_the_bytes_that_safetensors_makes() {
        let shapes: [(&str, &[usize]); 3] = [("b.A", &[2, 3]), ("a\"B", &[4]), ("b.", &[0, 5])];
        let tensors = || {
            let tensors = shapes.iter().map(|&(name, shape)| {
                let n = shape.iter().product();
                let values: Vec<f32> = (0..n).map(|i| i as f32 * 0.3).collect();
                let values = Tensor::from_vec(values, n, &Device::Cpu).unwrap();
                (name.to_string(), Parameter { values, shape: shape.to_vec() })
            });
            tensors.collect::<Vec<_>>()
        };
        for metadata in [None, Some(HashMap::from([("format".to_string(), "pt".to_string())]))] {
            let mut streamed = Vec::new();
            write_tensors(&mut streamed, metadata.clone(), tensors()).unwrap();
            assert_eq!(streamed, safetensors::serialize(tensors(), metadata).unwrap());
        }
    }
}
