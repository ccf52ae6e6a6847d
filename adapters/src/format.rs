//! PEFT's adapter folder, read and written: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Names in the file, after `base_model.model.`:
//!
//! | tensor | name | shape |
//! |---|---|---|
//! | factors of a linear layer | `<module>.lora_A.weight`, `<module>.lora_B.weight` | `(r, in)`, `(out, r)` |
//! | factors of the embedding | `<module>.lora_embedding_A`, `<module>.lora_embedding_B` | `(r, vocab_size)`, `(hidden_size, r)` |
//! | DoRA's magnitudes | `<module>.lora_magnitude_vector` | `(out)` |
//! | modules trained as a whole | `lm_head.weight`, `model.embed_tokens.weight` | `(vocab_size, hidden_size)` |
//! | token rows | `model.embed_tokens.token_adapter.trainable_tokens_delta`, also of `lm_head` | `(tokens, hidden_size)` |
//! | score head | `score.weight` | `(1, hidden_size)` |
//!
//! Beside an update of embedding or head PEFT also writes the base's weight (`base_layer`): its shape is
//! checked, its values are ignored, and it is not written here. An update that was trained before tokens
//! were added at the end of the vocabulary does not change these tokens.
//!
//! With a resized vocabulary PEFT also writes the whole embedding and head, whatever of them is trained:
//! beside token rows as `token_adapter.base_layer`, beside modules trained as a whole under three names,
//! and where nothing of them is trained under the module's name: the latter is read as a module trained
//! as a whole, as PEFT does. With a tied head, the head's token rows repeat those of the embedding.
//!
//! An update with frozen ranks (see [`crate::initialize`]) is written as a plain one of all its ranks,
//! which is what PEFT's conversion of PiSSA and OLoRA writes. A folder that PEFT wrote without that
//! conversion requires a base changed by the initialization. The base never changes here, so reading
//! such a folder is an error.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use safetensors::tensor::{Metadata, TensorInfo, TensorView, View};
use safetensors::{Dtype, SafeTensors};

use crate::config::{ConfigError, EMBEDDING, HEAD, InitLoraWeights, LoraConfig, Modules, SCORE};
use crate::delta::{
    Adapter, Lora, Magnitude, TokenRows, magnitude_name, saved_name, score_name, tensor_name,
    token_rows_name,
};
use crate::targets::{LinearSpec, Resolved, Target, TargetError, Unmatched, resolve};

/// PEFT's name of the config.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// PEFT's name of the tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Why an adapter could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file system reported an error.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The folder has pickled tensors only.
    #[error("{}: no {TENSORS_FILE}, and adapter_model.bin is a pickle, which is not read: save the adapter as safetensors", .0.display())]
    Pickle(PathBuf),
    /// The config is invalid.
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
    /// The file is not a valid safetensors file.
    #[error("{}: not a whole safetensors file: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What the parser found.
        reason: String,
    },
    /// The tensors differ from those that the config and the base require.
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
///
/// # Errors
/// If it cannot be read, or [`LoraConfig::from_json`] fails.
pub fn read_config(folder: &Path) -> Result<LoraConfig, FormatError> {
    let path = folder.join(CONFIG_FILE);
    let text = fs::read_to_string(&path).map_err(|e| at(&path, e))?;
    LoraConfig::from_json(&text).map_err(|source| FormatError::Config { path, source })
}

/// Reads an adapter folder for a base with these linear layers and this output head.
///
/// The tensors must be exactly those that the config means on the base, in F32, F16 or BF16; they become
/// F32. Also returns the names and patterns of the config that match no module, for warnings.
///
/// # Errors
/// If a file cannot be read, the config is invalid or does not fit the base, or tensors are missing,
/// unexpected, of another shape ([`Adapter::mismatches`]), or not finite.
pub fn read_folder(
    folder: &Path,
    name: &str,
    linears: &[LinearSpec],
    head: Option<&str>,
    device: &Device,
) -> Result<(Adapter, Vec<Unmatched>), FormatError> {
    let config = read_config(folder)?;
    if let Some(problem) = changes_base(&config.init_lora_weights) {
        let source = ConfigError::Keys(vec![problem]);
        return Err(FormatError::Config { path: folder.join(CONFIG_FILE), source });
    }
    let path = folder.join(TENSORS_FILE);
    if !path.exists() && folder.join("adapter_model.bin").exists() {
        return Err(FormatError::Pickle(folder.into()));
    }
    let bytes = fs::read(&path).map_err(|e| at(&path, e))?;
    let tensors = deserialize(&bytes, &path)?;
    let mut config = config;
    for module in [EMBEDDING, HEAD] {
        let openly = tensors.names().contains(&&*saved_name(module));
        if openly && !config.saved_modules().any(|saved| saved == module) {
            config.modules_to_save.push(module.into());
        }
    }
    let mut wanted = config.clone();
    if wanted.target_modules.is_none() {
        // PEFT chose modules by its table of model families; the tensors show which.
        let factors = tensors.names().into_iter().filter_map(|name| match parse_name(name)? {
            (module, TensorRole::A | TensorRole::B) => Some(module.to_string()),
            _ => None,
        });
        let modules: BTreeSet<String> = factors.collect();
        wanted.target_modules = Some(Modules::List(modules.into_iter().collect()));
    }
    let resolved = resolve(&wanted, linears, head)
        .map_err(|source| FormatError::Targets { path: folder.join(CONFIG_FILE), source })?;
    let adapter = from_bytes(&bytes, &path, name, config, &resolved, device)?;
    let problems = adapter.mismatches(linears);
    if !problems.is_empty() {
        let base = adapter.config.base_model_name_or_path;
        return Err(FormatError::Mismatch { path, base, problems });
    }
    Ok((adapter, resolved.unmatched))
}

/// Why an adapter with this initialization cannot be read without PEFT's conversion.
fn changes_base(init: &InitLoraWeights) -> Option<String> {
    let why = match init {
        InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora => {
            "PEFT takes the adapter's start off the base whenever it loads this, and the base is \
             never changed here; needed a plain adapter, as save_pretrained writes it with \
             path_initial_model_for_weight_conversion"
        }
        InitLoraWeights::Loftq => {
            "its base is one that LoftQ quantized anew, not the one it names; needed a plain adapter \
             (init_lora_weights true) and that base beside it"
        }
        _ => return None,
    };
    Some(format!("init_lora_weights: found \"{init}\": {why}"))
}

/// An adapter from the bytes of an `adapter_model.safetensors`; errors name `path`. `resolved` gives the
/// modules, ranks and scales it must have.
///
/// # Errors
/// If tensors are missing, unexpected, of another shape, or not finite.
pub fn from_bytes(
    bytes: &[u8],
    path: &Path,
    name: &str,
    mut config: LoraConfig,
    resolved: &Resolved,
    device: &Device,
) -> Result<Adapter, FormatError> {
    let mut tensors = FileTensors::new(deserialize(bytes, path)?);
    let mut modules = BTreeMap::new();
    for Target { spec, r, scale } in &resolved.targets {
        let (of_in, out) = (spec.in_features, spec.out_features);
        let a = tensors.take_factor(spec, TensorRole::A, [*r, of_in], device)?;
        let b = tensors.take_factor(spec, TensorRole::B, [out, *r], device)?;
        let magnitude = if config.use_dora {
            tensors.take(&spec.name, TensorRole::Magnitude, &[out], device)?
        } else {
            None
        };
        if spec.embedding || spec.name == HEAD {
            let shape = if spec.embedding { [of_in, out] } else { [out, of_in] };
            tensors.skip(spec, TensorRole::Base, shape);
        }
        if let (Some(a), Some(b)) = (a, b) {
            let magnitude = magnitude.map(Magnitude::new);
            modules.insert(spec.name.clone(), Lora { magnitude, ..Lora::new(a, b, *scale) });
        }
    }
    let mut saved = BTreeMap::new();
    for spec in &resolved.saved {
        let shape = if spec.embedding {
            [spec.in_features, spec.out_features]
        } else {
            [spec.out_features, spec.in_features]
        };
        if let Some(weight) = tensors.take_whole(spec, shape, device)? {
            saved.insert(spec.name.clone(), weight);
        }
        tensors.skip(spec, TensorRole::Base, shape);
    }
    // One list for both, and no other rows of the head: the head is tied.
    let tied = config.trainable_token_indices == config.head_token_indices
        && tensors.same(TensorRole::Tokens, [EMBEDDING, HEAD]);
    if tied {
        config.head_token_indices.clear();
    }
    let mut rows_of = |spec: &Option<LinearSpec>, indices: &mut Vec<u32>| match spec {
        Some(spec) if !indices.is_empty() => {
            let width = if spec.embedding { spec.out_features } else { spec.in_features };
            let shape = [indices.len(), width];
            let rows = tensors.take(&spec.name, TensorRole::Tokens, &shape, device)?;
            rows.map(|rows| in_order(indices, rows)).transpose()
        }
        _ => Ok(None),
    };
    let tokens = rows_of(&resolved.tokens, &mut config.trainable_token_indices)?;
    let head_tokens = rows_of(&resolved.head_tokens, &mut config.head_token_indices)?;
    if head_tokens.is_none() && tokens.is_some() {
        tensors.drop_copy(TensorRole::Tokens, HEAD);
    }
    for module in [EMBEDDING, HEAD] {
        tensors.drop_copy(TensorRole::Base, &format!("{module}.token_adapter"));
    }
    let score = if config.has_score() { tensors.take_score(device)? } else { None };
    let problems = tensors.problems();
    if !problems.is_empty() {
        let base = config.base_model_name_or_path;
        return Err(FormatError::Mismatch { path: path.into(), base, problems });
    }
    Ok(Adapter { name: name.into(), config, modules, score, saved, tokens, head_tokens })
}

/// Token rows sorted by token; PEFT's may be in any order.
fn in_order(indices: &mut [u32], rows: Var) -> candle_core::Result<TokenRows> {
    let mut order: Vec<u32> = (0..indices.len() as u32).collect();
    order.sort_by_key(|&place| indices[place as usize]);
    indices.sort_unstable();
    let order = Tensor::from_vec(order, indices.len(), rows.device())?;
    let rows = Var::from_tensor(&rows.as_detached_tensor().index_select(&order, 0)?)?;
    Ok(TokenRows { indices: indices.to_vec(), rows })
}

/// The role of a file's tensor in its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum TensorRole {
    A,
    B,
    Magnitude,
    /// The base's weight.
    Base,
    /// The module, trained as a whole.
    Whole,
    Tokens,
}

impl TensorRole {
    /// PEFT's name of the tensor.
    fn name(self, module: &str) -> String {
        match self {
            Self::A => tensor_name(module, 'A'),
            Self::B => tensor_name(module, 'B'),
            Self::Magnitude => magnitude_name(module),
            Self::Base => base_weight_name(module),
            Self::Whole => saved_name(module),
            Self::Tokens => token_rows_name(&format!("{module}.token_adapter")),
        }
    }
}

/// PEFT's name of the base's weight of a module with an update. PEFT writes it where it has other rows
/// than the base's files.
pub fn base_weight_name(module: &str) -> String {
    saved_name(&format!("{module}.base_layer"))
}

/// The tensors of a file that have not been read yet, and the problems of those read.
struct FileTensors<'a> {
    tensors: BTreeMap<(String, TensorRole), (String, TensorView<'a>)>,
    unexpected: Vec<String>,
    problems: Vec<String>,
}

impl<'a> FileTensors<'a> {
    fn new(file: SafeTensors<'a>) -> Self {
        let mut found =
            Self { tensors: BTreeMap::new(), unexpected: Vec::new(), problems: Vec::new() };
        for (name, view) in file.tensors() {
            let Some((module, part)) = parse_name(&name) else {
                found.unexpected.push(format!("{name} is unexpected"));
                continue;
            };
            let key = (module.to_string(), part);
            let trained = name.contains(".modules_to_save.");
            if let Some((other, view)) = found.tensors.insert(key.clone(), (name, view)) {
                // Modules trained as a whole are also written under the module's name.
                match (part, trained, other.contains(".modules_to_save.")) {
                    (TensorRole::Whole, true, false) => continue,
                    (TensorRole::Whole, false, true) => {
                        found.tensors.insert(key, (other, view));
                        continue;
                    }
                    _ => {}
                }
                let name = other;
                let problem = format!("{name} appears twice, under two adapter names");
                found.unexpected.push(problem);
            }
        }
        found
    }

    /// The tensor as F32; `None`, with a problem recorded, where it is missing or of another shape.
    fn take(
        &mut self,
        module: &str,
        part: TensorRole,
        shape: &[usize],
        device: &Device,
    ) -> candle_core::Result<Option<Var>> {
        let values = match self.tensors.remove(&(module.to_string(), part)) {
            None => Err("is missing".to_string()),
            Some((_, view)) => read_tensor(&view, shape),
        };
        match values {
            Ok(values) => Var::from_vec(values, shape, device).map(Some),
            Err(problem) => {
                self.problems.push(format!("{} {problem}", part.name(module)));
                Ok(None)
            }
        }
    }

    /// A factor of an update. One with a value for each token of the vocabulary may have been trained
    /// before tokens were added: it is padded with zeros for these.
    fn take_factor(
        &mut self,
        spec: &LinearSpec,
        part: TensorRole,
        shape: [usize; 2],
        device: &Device,
    ) -> candle_core::Result<Option<Var>> {
        let tokens = match part {
            TensorRole::A if spec.embedding => Some(1),
            TensorRole::B if spec.name == HEAD => Some(0),
            _ => None,
        };
        let without_added_tokens = tokens.and_then(|along| {
            let found = self.without_added_tokens(spec, part, shape, along)?;
            Some((along, found))
        });
        let Some((along, found)) = without_added_tokens else {
            return self.take(&spec.name, part, &shape, device);
        };
        let Some(factor) = self.take(&spec.name, part, &found, device)? else { return Ok(None) };
        let more = shape[along] - found[along];
        let factor = factor.as_detached_tensor().pad_with_zeros(along, 0, more)?.contiguous()?;
        Var::from_tensor(&factor).map(Some)
    }

    /// A module trained as a whole, which must have a row for each token.
    fn take_whole(
        &mut self,
        spec: &LinearSpec,
        shape: [usize; 2],
        device: &Device,
    ) -> candle_core::Result<Option<Var>> {
        let Some(found) = self.without_added_tokens(spec, TensorRole::Whole, shape, 0) else {
            return self.take(&spec.name, TensorRole::Whole, &shape, device);
        };
        self.tensors.remove(&(spec.name.clone(), TensorRole::Whole));
        let name = TensorRole::Whole.name(&spec.name);
        self.problems.push(format!(
            "{name} is {found:?}, needed {shape:?}: tokens were added to the vocabulary since it was \
             trained, and a whole matrix has no rows for them (merge it into a base of its own and add \
             the tokens to that)"
        ));
        Ok(None)
    }

    /// The shape of a tensor that differs from the one needed only by lacking some or all of the added
    /// tokens.
    fn without_added_tokens(
        &self,
        spec: &LinearSpec,
        part: TensorRole,
        needed: [usize; 2],
        along: usize,
    ) -> Option<[usize; 2]> {
        let (_, view) = self.tensors.get(&(spec.name.clone(), part))?;
        let found: [usize; 2] = view.shape().try_into().ok()?;
        let own = needed[along] - spec.added_tokens;
        let same = found[1 - along] == needed[1 - along];
        (same && (own..needed[along]).contains(&found[along])).then_some(found)
    }

    /// Whether the second of two modules has the same values as the first, or none.
    fn same(&self, part: TensorRole, [one, other]: [&str; 2]) -> bool {
        let of = |module: &str| self.tensors.get(&(module.to_string(), part)).map(|(_, v)| v);
        match (of(one), of(other)) {
            (Some(one), Some(other)) => one.data() == other.data(),
            (one, None) => one.is_some(),
            (None, Some(_)) => false,
        }
    }

    /// Ignores a tensor that repeats another.
    fn drop_copy(&mut self, part: TensorRole, module: &str) {
        self.tensors.remove(&(module.to_string(), part));
    }

    /// Checks the shape of an optional matrix with a row for each token, and ignores its values.
    fn skip(&mut self, spec: &LinearSpec, part: TensorRole, shape: [usize; 2]) {
        let without_added_tokens = self.without_added_tokens(spec, part, shape, 0).is_some();
        if let Some((name, view)) = self.tensors.remove(&(spec.name.clone(), part))
            && view.shape() != shape
            && !without_added_tokens
        {
            self.problems.push(format!("{name} is {:?}, needed {shape:?}", view.shape()));
        }
    }

    fn take_score(&mut self, device: &Device) -> candle_core::Result<Option<Var>> {
        let score = self.tensors.get(&(SCORE.to_string(), TensorRole::Whole));
        let width = match score.map(|(_, view)| view.shape()) {
            None => Err("is missing, though modules_to_save names it".to_string()),
            Some(&[1, width]) => Ok(width),
            Some(other) => Err(format!("is {other:?}, needed [1, hidden_size]: one score a text")),
        };
        match width {
            Ok(width) => self.take(SCORE, TensorRole::Whole, &[1, width], device),
            Err(problem) => {
                self.tensors.remove(&(SCORE.to_string(), TensorRole::Whole));
                self.problems.push(format!("{} {problem}", score_name()));
                Ok(None)
            }
        }
    }

    /// All problems, unexpected tensors first.
    fn problems(self) -> Vec<String> {
        let left = self.tensors.into_values().map(|(name, _)| format!("{name} is unexpected"));
        let mut unexpected: Vec<String> = self.unexpected.into_iter().chain(left).collect();
        unexpected.sort();
        unexpected.extend(self.problems);
        unexpected
    }
}

/// Writes the adapter as a PEFT folder, which is created if needed. Files are replaced atomically and are
/// deterministic. Tensors are F32.
///
/// # Errors
/// If the system reports an error.
pub fn write_folder(adapter: &Adapter, folder: &Path) -> Result<(), FormatError> {
    let tensor = |(name, var): (String, Var)| {
        let values = var.as_detached_tensor().to_dtype(DType::F32)?.flatten_all()?;
        Ok((name, FileParameter { values, shape: var.dims().to_vec() }))
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

/// Writes tensors as a safetensors file with the same bytes as `safetensors::serialize`, but with only one
/// tensor's bytes in memory at a time.
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

/// A parameter that is being written.
struct FileParameter {
    /// Flat F32.
    values: Tensor,
    shape: Vec<usize>,
}

impl View for FileParameter {
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

/// Writes a temporary file, syncs, renames, and syncs the folder, so that a crash leaves the old file or
/// the new one.
fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<fs::File>) -> io::Result<()>,
) -> Result<(), FormatError> {
    let partial = path.with_extension("partial");
    let written = (|| {
        let mut file = BufWriter::new(fs::File::create(&partial)?);
        write(&mut file)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&partial, path)?;
        match path.parent() {
            Some(folder) if cfg!(unix) => fs::File::open(folder)?.sync_all(),
            _ => Ok(()), // only Unix opens folders
        }
    })();
    written.map_err(|e| {
        let _ = fs::remove_file(&partial); // the first error is returned
        at(path, e)
    })
}

fn deserialize<'a>(bytes: &'a [u8], path: &Path) -> Result<SafeTensors<'a>, FormatError> {
    SafeTensors::deserialize(bytes)
        .map_err(|e| FormatError::Broken { path: path.into(), reason: e.to_string() })
}

/// Module and role of `base_model.model.<module>.lora_A.weight` and its like, which inside a model
/// also carry an adapter's name: `lora_A.default.weight`.
fn parse_name(name: &str) -> Option<(&str, TensorRole)> {
    let inner = name.strip_prefix("base_model.model.")?;
    let (inner, has_weight) = match inner.strip_suffix(".weight") {
        Some(inner) => (inner, true),
        None => (inner, false),
    };
    // What follows the module, before an optional adapter's name.
    let marks = [
        (".lora_A", TensorRole::A, true),
        (".lora_B", TensorRole::B, true),
        (".lora_embedding_A", TensorRole::A, false),
        (".lora_embedding_B", TensorRole::B, false),
        (".lora_magnitude_vector", TensorRole::Magnitude, false),
        (".token_adapter.trainable_tokens_delta", TensorRole::Tokens, false),
        (".modules_to_save", TensorRole::Whole, true),
    ];
    for (mark, part, needs_weight) in marks {
        if let Some((module, adapter)) = inner.rsplit_once(mark)
            && (adapter.is_empty() || adapter.starts_with('.'))
        {
            // In memory, magnitudes are a separate layer with a weight.
            let fits = has_weight == needs_weight || part == TensorRole::Magnitude;
            return fits.then_some((module, part));
        }
    }
    for base in [".base_layer", ".original_module"] {
        if let Some(module) = inner.strip_suffix(base).filter(|_| has_weight) {
            return Some((module, TensorRole::Base));
        }
    }
    (has_weight && [EMBEDDING, HEAD, SCORE].contains(&inner)).then_some((inner, TensorRole::Whole))
}

/// The values as `f32`, or what is wrong with them.
fn read_tensor(view: &TensorView<'_>, needed: &[usize]) -> Result<Vec<f32>, String> {
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
    fn streamed_bytes_match_safetensors_serialize() {
        let shapes: [(&str, &[usize]); 3] = [("b.A", &[2, 3]), ("a\"B", &[4]), ("b.", &[0, 5])];
        let tensors = || {
            let tensors = shapes.iter().map(|&(name, shape)| {
                let n = shape.iter().product();
                let values: Vec<f32> = (0..n).map(|i| i as f32 * 0.3).collect();
                let values = Tensor::from_vec(values, n, &Device::Cpu).unwrap();
                (name.to_string(), FileParameter { values, shape: shape.to_vec() })
            });
            tensors.collect::<Vec<_>>()
        };
        for metadata in [None, Some(HashMap::from([("format".to_string(), "pt".to_string())]))] {
            let mut streamed = Vec::new();
            write_tensors(&mut streamed, metadata.clone(), tensors()).unwrap();
            assert_eq!(streamed, safetensors::serialize(tensors(), metadata).unwrap());
        }
    }

    fn spec(name: &str, of_in: usize, out: usize) -> LinearSpec {
        let (embedding, added_tokens) = (name == EMBEDDING, 0);
        LinearSpec {
            name: name.into(),
            in_features: of_in,
            out_features: out,
            embedding,
            added_tokens,
        }
    }

    /// A vocabulary of 7, hidden states of 4.
    fn base() -> Vec<LinearSpec> {
        vec![spec("q_proj", 4, 6), spec("v_proj", 4, 2), spec(EMBEDDING, 7, 4), spec(HEAD, 4, 7)]
    }

    /// An adapter with distinct values in all tensors.
    fn everything(targets: &[&str], saved: &[&str], tokens: &[u32], use_dora: bool) -> Adapter {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        let config = LoraConfig {
            r: 3,
            target_modules: Some(Modules::List(names(targets))),
            modules_to_save: names(saved),
            trainable_token_indices: tokens.to_vec(),
            init_lora_weights: InitLoraWeights::Random,
            ..LoraConfig::default()
        };
        let resolved = resolve(&config, &base(), Some(HEAD)).unwrap();
        let targets = &resolved.targets;
        let mut adapter = Adapter::new("test", config, targets, 1, &Device::Cpu).unwrap();
        let var = |rows: usize, cols: usize| {
            let values = (0..rows * cols).map(|i| i as f32 + 0.5).collect();
            Var::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
        };
        adapter.config.use_dora = use_dora;
        for lora in adapter.modules.values_mut().filter(|_| use_dora) {
            let vector = var(1, lora.out_features()).flatten_all().unwrap();
            lora.magnitude = Some(Magnitude::new(Var::from_tensor(&vector).unwrap()));
        }
        for module in resolved.saved {
            adapter.saved.insert(module.name, var(7, 4));
        }
        if !tokens.is_empty() {
            adapter.tokens = Some(TokenRows { indices: tokens.into(), rows: var(tokens.len(), 4) });
            if !saved.contains(&HEAD) {
                let rows = Var::from_tensor(&(var(2, 4).as_tensor() * 2.0).unwrap()).unwrap();
                adapter.head_tokens = Some(TokenRows { indices: vec![1, 6], rows });
                adapter.config.head_token_indices = vec![1, 6];
            }
        }
        if saved.contains(&SCORE) {
            adapter.score = Some(var(1, 4));
        }
        adapter
    }

    #[test]
    fn every_kind_of_tensor_reads_back() {
        let check = |targets: &[&str], saved: &[&str], tokens: &[u32], use_dora, names: &[&str]| {
            let adapter = everything(targets, saved, tokens, use_dora);
            let folder = tempfile::tempdir().unwrap();
            write_folder(&adapter, folder.path()).unwrap();
            let read = read_folder(folder.path(), "test", &base(), Some(HEAD), &Device::Cpu);
            let (again, _) = read.unwrap();
            assert_eq!(again.config, adapter.config);
            let flat = |adapter: &Adapter| -> Vec<(String, Vec<usize>, Vec<f32>)> {
                let parameters = adapter.parameters().into_iter();
                let flat = parameters.map(|(name, var)| {
                    let values = var.flatten_all().unwrap().to_vec1().unwrap();
                    (name, var.dims().to_vec(), values)
                });
                flat.collect()
            };
            assert_eq!(flat(&again), flat(&adapter));
            let found: Vec<_> = flat(&again).into_iter().map(|(name, ..)| name).collect();
            for name in names {
                assert!(found.contains(&format!("base_model.model.{name}")), "{name}: {found:?}");
            }
        };
        check(&["q_proj", "v_proj"], &[], &[], true, &["v_proj.lora_magnitude_vector"]);
        let embedding = "model.embed_tokens.lora_embedding_A";
        let both = [embedding, "model.embed_tokens.lora_embedding_B", "lm_head.lora_B.weight"];
        check(&["q_proj", "embed_tokens", "lm_head"], &[], &[], false, &both);
        let whole = ["model.embed_tokens.weight", "lm_head.weight", "score.weight"];
        check(&["q_proj"], &["score", "embed_tokens", "lm_head"], &[], false, &whole);
        let rows = ["model.embed_tokens.token_adapter.trainable_tokens_delta", "lm_head.weight"];
        check(&["v_proj"], &["lm_head"], &[1, 4, 5], true, &rows);
        let rows = [rows[0], "lm_head.token_adapter.trainable_tokens_delta"];
        check(&["v_proj"], &[], &[1, 4, 5], false, &rows);
    }

    /// Over a vocabulary extended from 7 to 9, updates of embedding and head add nothing to the
    /// new tokens; a whole matrix is an error, and so is an update for fewer tokens than the base's own.
    #[test]
    fn older_updates_are_zero_for_added_tokens() {
        let grown = |from: usize, to: usize| {
            let mut linears = base();
            for spec in &mut linears[2..] {
                let size =
                    if spec.embedding { &mut spec.in_features } else { &mut spec.out_features };
                *size = to;
                spec.added_tokens = to - from;
            }
            linears
        };
        let read = |adapter: &Adapter, linears: &[LinearSpec]| {
            let folder = tempfile::tempdir().unwrap();
            write_folder(adapter, folder.path()).unwrap();
            let read = read_folder(folder.path(), "test", linears, Some(HEAD), &Device::Cpu);
            read.map(|(adapter, _)| adapter).map_err(|error| error.to_string())
        };
        let updates = everything(&["q_proj", "embed_tokens", "lm_head"], &[], &[], false);
        let again = read(&updates, &grown(7, 9)).unwrap();
        let values = |adapter: &Adapter, module: &str, a: bool| {
            let lora = &adapter.modules[module];
            if a { &lora.a } else { &lora.b }.to_vec2::<f32>().unwrap()
        };
        let a = values(&again, EMBEDDING, true);
        for (found, own) in a.iter().zip(values(&updates, EMBEDDING, true)) {
            assert_eq!(found[..], [&own[..], &[0.0, 0.0]].concat());
        }
        let b = values(&again, HEAD, false);
        assert_eq!(b[..7], values(&updates, HEAD, false));
        assert_eq!(b[7..], [[0.0; 3], [0.0; 3]]);
        for (module, a) in [(EMBEDDING, false), (HEAD, true), ("q_proj", true), ("q_proj", false)] {
            assert_eq!(values(&again, module, a), values(&updates, module, a), "{module}");
        }
        let error = read(&updates, &grown(8, 9)).unwrap_err();
        assert!(error.contains("lm_head.lora_B.weight is [7, 3], needed [9, 3]"), "{error}");
        let error = read(&updates, &grown(9, 9)).unwrap_err();
        assert!(error.contains("lm_head.lora_B.weight is [7, 3], needed [9, 3]"), "{error}");

        let whole = everything(&["q_proj"], &["lm_head"], &[], false);
        let error = read(&whole, &grown(7, 9)).unwrap_err();
        let needed =
            "lm_head.weight is [7, 4], needed [9, 4]: tokens were added to the vocabulary since";
        assert!(error.contains(needed) && error.contains("merge it"), "{error}");
    }

    #[test]
    fn token_rows_are_sorted_by_token() {
        let mut adapter = everything(&["q_proj"], &[], &[1, 2, 5], false);
        adapter.config.trainable_token_indices = vec![5, 1, 2]; // as a file of PEFT's may have them
        let folder = tempfile::tempdir().unwrap();
        write_folder(&adapter, folder.path()).unwrap();
        let (again, _) =
            read_folder(folder.path(), "test", &base(), Some(HEAD), &Device::Cpu).unwrap();
        let tokens = again.tokens.unwrap();
        assert_eq!(tokens.indices, [1, 2, 5]);
        assert_eq!(again.config.trainable_token_indices, [1, 2, 5]);
        let rows = tokens.rows.to_vec2::<f32>().unwrap();
        assert_eq!([rows[0][0], rows[1][0], rows[2][0]], [4.5, 8.5, 0.5]);
    }

    #[test]
    fn mismatches_of_every_kind_are_reported() {
        let adapter = everything(&["q_proj"], &["lm_head"], &[1], true);
        let check = |change: &dyn Fn(&mut Adapter), needed: &[&str]| {
            let mut changed = adapter.copy("changed").unwrap();
            change(&mut changed);
            let folder = tempfile::tempdir().unwrap();
            write_folder(&changed, folder.path()).unwrap();
            let read = read_folder(folder.path(), "test", &base(), Some(HEAD), &Device::Cpu);
            let error = read.unwrap_err().to_string();
            for part in needed {
                assert!(error.contains(part), "{error:?} should say {part:?}");
            }
        };
        let bare = |adapter: &mut Adapter| {
            adapter.tokens = None;
            adapter.saved.clear();
            adapter.modules.get_mut("q_proj").unwrap().magnitude = None;
        };
        check(
            &bare,
            &[
                "q_proj.lora_magnitude_vector is missing",
                "lm_head.weight is missing",
                "trainable_tokens_delta is missing",
            ],
        );
        check(
            &|adapter| {
                adapter.config.use_dora = false;
                adapter.config.modules_to_save.clear();
                adapter.config.trainable_token_indices.clear();
            },
            &["q_proj.lora_magnitude_vector is unexpected", "trainable_tokens_delta is unexpected"],
        );
        let two = |adapter: &mut Adapter| adapter.config.trainable_token_indices = vec![1, 2];
        check(&two, &["trainable_tokens_delta is [1, 4], needed [2, 4]"]);
        let far = |adapter: &mut Adapter| adapter.config.trainable_token_indices = vec![7];
        check(&far, &["found 7, needed less than 7"]);
        let targets = |names: [&'static str; 2]| {
            move |adapter: &mut Adapter| {
                let names = names.map(String::from).to_vec();
                adapter.config.target_modules = Some(Modules::List(names));
            }
        };
        check(&targets(["q_proj", "embed_tokens"]), &["use_dora with target model.embed_tokens"]);
        check(&targets(["q_proj", "lm_head"]), &["use_dora with target lm_head"]);
        check(
            &|adapter| {
                bare(adapter);
                adapter.config.use_dora = false;
                targets(["q_proj", "lm_head"])(adapter);
            },
            &["lm_head is a target and in modules_to_save too"],
        );
    }
}
