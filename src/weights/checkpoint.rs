//! The weights of a base model: a GGUF file or a Hugging Face folder.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::{Gguf, HfFolder, WeightsError, gguf};
use crate::quant::{BlockType, Bytes, FrozenMatrix};

/// The weights of a base model.
#[derive(Debug, Clone)]
pub enum Checkpoint {
    /// One GGUF file.
    Gguf(Gguf),
    /// A Hugging Face folder: `config.json` and safetensors.
    HuggingFace(HfFolder),
}

impl Checkpoint {
    /// Opens a GGUF file (detected by its magic, not its name) or a Hugging Face folder.
    ///
    /// # Errors
    /// If it is neither, or malformed.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, WeightsError> {
        let path = path.as_ref();
        let io = |source| WeightsError::Io { action: "open", path: path.into(), source };
        if std::fs::metadata(path).map_err(io)?.is_dir() {
            return HfFolder::open(path).map(Self::HuggingFace);
        }
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Err(WeightsError::format(
                path,
                "a single safetensors file, needed the folder with its config.json, or a GGUF file",
            ));
        }
        let mut magic = Vec::new();
        File::open(path).map_err(io)?.take(4).read_to_end(&mut magic).map_err(io)?;
        // Big-endian files pass here: the reader reports them.
        if magic != gguf::MAGIC && magic != *b"FUGG" {
            return Err(WeightsError::format(
                path,
                "neither a GGUF file (it does not start with \"GGUF\") nor a Hugging Face folder",
            ));
        }
        Gguf::open(path).map(Self::Gguf)
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(gguf) => gguf.path(),
            Self::HuggingFace(folder) => folder.path(),
        }
    }

    /// The names of all tensors, in the order of the files.
    pub fn tensor_names(&self) -> Vec<&str> {
        match self {
            Self::Gguf(gguf) => gguf.tensors().iter().map(|tensor| &*tensor.name).collect(),
            Self::HuggingFace(folder) => folder.tensor_names().collect(),
        }
    }

    /// Whether there is a tensor of that name, of a supported type or not.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Gguf(gguf) => gguf.tensor_info(name).is_some(),
            Self::HuggingFace(folder) => folder.contains(name),
        }
    }

    /// A tensor by name; its bytes stay in the map.
    ///
    /// # Errors
    /// If there is none of that name, or its type is not supported.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        match self {
            Self::Gguf(gguf) => gguf.tensor(name),
            Self::HuggingFace(folder) => folder.tensor(name),
        }
    }
}

/// A named tensor, whose values stay in the map.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Its name in the file.
    pub name: String,
    /// Outermost dimension first, like PyTorch.
    pub shape: Vec<usize>,
    /// Its block type.
    pub block_type: BlockType,
    /// Its blocks: exactly those `shape` needs.
    pub bytes: Bytes,
}

impl StoredTensor {
    /// The tensor as a frozen matrix `(out, in)`, whose bytes stay in the map.
    ///
    /// # Errors
    /// If it does not have two dimensions.
    pub fn matrix(&self) -> Result<FrozenMatrix, WeightsError> {
        let [rows, cols] = self.shape[..] else { return Err(self.dimensions(2)) };
        FrozenMatrix::new(self.bytes.clone(), self.block_type, rows, cols)
            .map_err(|source| WeightsError::Matrix { name: self.name.clone(), source })
    }

    /// The values of a vector as F32, copied.
    ///
    /// # Errors
    /// If it does not have one dimension.
    pub fn vector(&self) -> Result<Vec<f32>, WeightsError> {
        let [len] = self.shape[..] else { return Err(self.dimensions(1)) };
        let mut values = vec![0.0; len];
        self.block_type.dequantize(&self.bytes, &mut values);
        Ok(values)
    }

    fn dimensions(&self, needed: usize) -> WeightsError {
        WeightsError::Dimensions { name: self.name.clone(), found: self.shape.clone(), needed }
    }
}
