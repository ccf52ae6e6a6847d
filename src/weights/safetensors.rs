//! Safetensors files and Hugging Face folders of them, memory-mapped.
//!
//! The header is parsed by the safetensors crate, after its length was checked against the file;
//! where its data ends is checked here, in arithmetic that cannot overflow.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use super::error::all_of;
use super::value::Cursor;
use super::{StoredTensor, WeightsError, map_file};
use crate::quant::{BlockType, Bytes};

/// Maximum size of a header, as in the safetensors crate.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// One mapped safetensors file.
#[derive(Debug, Clone)]
pub struct Safetensors {
    path: PathBuf,
    map: Bytes,
    metadata: BTreeMap<String, String>,
    tensors: Vec<SafetensorsInfo>,
    names: HashMap<Box<str>, usize>,
}

/// Name, shape and type of a tensor in a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsInfo {
    /// Its name.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Its type; F32, F16 and BF16 can be read.
    pub dtype: Dtype,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

impl SafetensorsInfo {
    /// The block type, if it is supported.
    pub fn block_type(&self) -> Option<BlockType> {
        match self.dtype {
            Dtype::F32 => Some(BlockType::F32),
            Dtype::F16 => Some(BlockType::F16),
            Dtype::BF16 => Some(BlockType::BF16),
            _ => None,
        }
    }
}

impl Safetensors {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// If the header is truncated or malformed, or its tensors do not cover exactly the rest of the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, WeightsError> {
        let path = path.as_ref();
        let map = map_file(path)?;
        let bad = |reason: String| WeightsError::format(path, reason);

        let mut cursor = Cursor::new(&map);
        let len = cursor
            .count("bytes of safetensors header", 1)
            .map_err(|e| bad(format!("the safetensors header is cut: {e}")))?;
        if len > MAX_HEADER_BYTES {
            let most = MAX_HEADER_BYTES;
            return Err(bad(format!(
                "a safetensors header of {len} bytes, at most {most} are read"
            )));
        }
        let header = cursor.take(len).map_err(bad)?;
        let header: Metadata = serde_json::from_slice(header)
            .map_err(|e| bad(format!("the safetensors header cannot be read: {e}")))?;
        let (start, data) = (cursor.at(), cursor.left());
        if header.data_len() != data {
            let needed = header.data_len();
            return Err(bad(format!(
                "tensors take {needed} bytes, the file has {data} bytes of data"
            )));
        }

        let mut tensors = Vec::new();
        for name in header.offset_keys() {
            let info = header.info(&name).expect("the key came from this header");
            let (first, last) = info.data_offsets; // Within `data`: they ascend to its length.
            let range = start + first..start + last;
            tensors.push(SafetensorsInfo {
                name,
                shape: info.shape.clone(),
                dtype: info.dtype,
                range,
            });
        }
        let names = tensors.iter().enumerate().map(|(i, info)| (info.name.as_str().into(), i));
        let names = names.collect();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Self { path: path.into(), metadata, tensors, names, map: map.clone() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The free-form strings of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors, in the order of their data.
    pub fn tensors(&self) -> &[SafetensorsInfo] {
        &self.tensors
    }

    /// Name, shape and type of a tensor.
    pub fn tensor_info(&self, name: &str) -> Option<&SafetensorsInfo> {
        Some(&self.tensors[*self.names.get(name)?])
    }

    /// A tensor by name; its bytes stay in the map.
    ///
    /// # Errors
    /// If there is none of that name, or its type is not F32, F16 or BF16.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        let path = || self.path.clone();
        let info = self
            .tensor_info(name)
            .ok_or_else(|| WeightsError::MissingTensor { path: path(), name: name.into() })?;
        let block_type = info.block_type().ok_or_else(|| WeightsError::TensorType {
            path: path(),
            name: name.into(),
            found: info.dtype.to_string(),
            needed: "F32, F16, BF16".into(),
        })?;
        let bytes = self.map.slice(info.range.clone()).expect("the range was checked on opening");
        Ok(StoredTensor { name: name.into(), shape: info.shape.clone(), block_type, bytes })
    }
}

/// A Hugging Face model folder: `config.json` and one or more safetensors files.
#[derive(Debug, Clone)]
pub struct HfFolder {
    path: PathBuf,
    shards: Vec<Safetensors>,
    shard_of: HashMap<String, usize>,
}

/// `model.safetensors.index.json`; its totals are not needed.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl HfFolder {
    /// Maps all weights of a folder that holds `config.json` and either `model.safetensors` or
    /// `model.safetensors.index.json` with its shards.
    ///
    /// # Errors
    /// If one of them is missing or malformed; all differences between index and shards are reported
    /// together.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, WeightsError> {
        let path = path.as_ref();
        if !path.join("config.json").is_file() {
            return Err(WeightsError::format(path, "the folder has no config.json"));
        }
        let single = path.join("model.safetensors");
        let index = path.join("model.safetensors.index.json");
        if single.is_file() {
            let shard = Safetensors::open(single)?;
            let shard_of = shard.tensors().iter().map(|info| (info.name.clone(), 0)).collect();
            return Ok(Self { path: path.into(), shards: vec![shard], shard_of });
        }
        if index.is_file() {
            return Self::open_shards(path, &index);
        }
        let pytorch = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
        Err(WeightsError::format(
            path,
            match pytorch.iter().find(|name| path.join(name).is_file()) {
                Some(name) => format!(
                    "the weights are a PyTorch pickle ({name}), needed safetensors; \
                     `save_pretrained` of a current transformers writes them"
                ),
                None => "the folder has neither model.safetensors nor \
                         model.safetensors.index.json"
                    .into(),
            },
        ))
    }

    fn open_shards(path: &Path, index: &Path) -> Result<Self, WeightsError> {
        let text = std::fs::read(index).map_err(|source| WeightsError::Io {
            action: "open",
            path: index.into(),
            source,
        })?;
        let map: ShardIndex = serde_json::from_slice(&text)
            .map_err(|e| WeightsError::format(index, format!("the index cannot be read: {e}")))?;
        let files: BTreeSet<&str> = map.weight_map.values().map(|file| &**file).collect();
        if files.is_empty() {
            return Err(WeightsError::format(index, "the index names no tensors"));
        }

        let faults: Vec<String> = files
            .iter()
            .filter_map(|file| match plain_name(file) {
                false => Some(format!("shard {file:?} is not a file of this folder")),
                true if !path.join(file).is_file() => Some(format!("shard {file:?} is missing")),
                true => None,
            })
            .collect();
        all_of(index, &faults)?;

        let shards = files.iter().map(|file| Safetensors::open(path.join(file)));
        let shards = shards.collect::<Result<Vec<_>, _>>()?;
        let places: HashMap<&str, usize> =
            files.iter().enumerate().map(|(i, file)| (*file, i)).collect();
        let mut faults = Vec::new();
        let mut shard_of = HashMap::new();
        for (name, file) in &map.weight_map {
            let shard = places[&**file];
            if shards[shard].tensor_info(name).is_none() {
                faults.push(format!("tensor {name:?} is not in shard {file:?}"));
            }
            shard_of.insert(name.clone(), shard);
        }
        all_of(index, &faults)?;
        Ok(Self { path: path.into(), shards, shard_of })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its `config.json`.
    pub fn config_path(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// Its weight files.
    pub fn shards(&self) -> &[Safetensors] {
        &self.shards
    }

    /// All tensors of the folder, file by file in the order of their data.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.shards.iter().enumerate().flat_map(move |(i, shard)| {
            let infos = shard.tensors().iter();
            // Tensors that the index does not assign to this file are skipped.
            infos.map(|info| &*info.name).filter(move |name| self.shard_of.get(*name) == Some(&i))
        })
    }

    /// Whether there is a tensor of that name, of a supported type or not.
    pub fn contains(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }

    /// A tensor by name; its bytes stay in the map.
    ///
    /// # Errors
    /// If there is none of that name, or its type is not F32, F16 or BF16.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        let shard = self.shard_of.get(name).ok_or_else(|| WeightsError::MissingTensor {
            path: self.path.clone(),
            name: name.into(),
        })?;
        self.shards[*shard].tensor(name)
    }
}

/// Whether a shard's name is a plain file name: an index must not name files outside of its folder.
fn plain_name(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}
