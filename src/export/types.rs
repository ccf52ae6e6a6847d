//! Which type each tensor of a file gets: llama.cpp's choices (`src/llama-quant.cpp`).

use std::str::FromStr;

use super::ExportError;
use crate::model::{Config, load};
use crate::quant::BlockType;

/// Type of a whole file: one block type, or a mix of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs)] // llama.cpp's own names
pub enum FileType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K_S,
    Q3_K_M,
    Q3_K_L,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
}

impl FileType {
    /// All file types.
    pub const ALL: &[Self] = &[
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q2_K,
        Self::Q3_K_S,
        Self::Q3_K_M,
        Self::Q3_K_L,
        Self::Q4_K_S,
        Self::Q4_K_M,
        Self::Q5_K_S,
        Self::Q5_K_M,
        Self::Q6_K,
    ];

    /// Its number in `enum llama_ftype`: the value of `general.file_type`.
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            Self::Q2_K => 10,
            Self::Q3_K_S => 11,
            Self::Q3_K_M => 12,
            Self::Q3_K_L => 13,
            Self::Q4_K_S => 14,
            Self::Q4_K_M => 15,
            Self::Q5_K_S => 16,
            Self::Q5_K_M => 17,
            Self::Q6_K => 18,
            Self::BF16 => 32,
        }
    }

    /// The block type of most of its tensors.
    pub fn block_type(self) -> BlockType {
        match self {
            Self::F32 => BlockType::F32,
            Self::F16 => BlockType::F16,
            Self::BF16 => BlockType::BF16,
            Self::Q8_0 => BlockType::Q8_0,
            Self::Q4_0 => BlockType::Q4_0,
            Self::Q4_1 => BlockType::Q4_1,
            Self::Q5_0 => BlockType::Q5_0,
            Self::Q5_1 => BlockType::Q5_1,
            Self::Q2_K => BlockType::Q2_K,
            Self::Q3_K_S | Self::Q3_K_M | Self::Q3_K_L => BlockType::Q3_K,
            Self::Q4_K_S | Self::Q4_K_M => BlockType::Q4_K,
            Self::Q5_K_S | Self::Q5_K_M => BlockType::Q5_K,
            Self::Q6_K => BlockType::Q6_K,
        }
    }

    /// Whether it has fewer bits per value than a 16-bit float.
    pub fn is_quantized(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }
}

impl std::fmt::Display for FileType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl FromStr for FileType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = match text.to_uppercase().as_str() {
            "Q3_K" => "Q3_K_M".into(),
            "Q4_K" => "Q4_K_M".into(),
            "Q5_K" => "Q5_K_M".into(),
            other => other.to_string(),
        };
        let found = Self::ALL.iter().find(|of| of.to_string() == name);
        found.copied().ok_or_else(|| {
            let all: Vec<String> = Self::ALL.iter().map(Self::to_string).collect();
            format!("{text:?} is not a type, needed one of {}", all.join(", "))
        })
    }
}

/// A block type by its name, ignoring case.
pub fn block_type(text: &str) -> Result<BlockType, String> {
    BlockType::written(text)
}

/// A block type for the tensors whose name in a GGUF matches an expression: `PATTERN=TYPE`.
#[derive(Debug, Clone)]
pub struct TypeRule {
    /// The expression in lower case, as in llama-quantize.
    pub pattern: fancy_regex::Regex,
    /// The type.
    pub block_type: BlockType,
}

impl FromStr for TypeRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((pattern, of)) = text.split_once('=').filter(|(p, _)| !p.is_empty()) else {
            return Err(format!("{text:?}, needed PATTERN=TYPE"));
        };
        let pattern =
            fancy_regex::Regex::new(&pattern.to_lowercase()).map_err(|e| e.to_string())?;
        Ok(Self { pattern, block_type: block_type(of)? })
    }
}

/// The types of a file to write: the options of llama-quantize.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The type of the file.
    pub file_type: FileType,
    /// Whether all matrices get the same type (`--pure`).
    pub pure: bool,
    /// The type of the head, and of an embedding that is tied to it.
    pub output_tensor_type: Option<BlockType>,
    /// The type of the embedding.
    pub token_embedding_type: Option<BlockType>,
    /// Rules by tensor name, for quantized files; the first match counts.
    pub tensor_types: Vec<TypeRule>,
}

impl Recipe {
    /// llama.cpp's default types for a file type.
    pub fn new(file_type: FileType) -> Self {
        Self {
            file_type,
            pure: false,
            output_tensor_type: None,
            token_embedding_type: None,
            tensor_types: Vec::new(),
        }
    }

    /// The type of each tensor of a model, in the order of [`load::tensors`].
    ///
    /// # Errors
    /// If a requested type cannot hold the rows of its tensor.
    pub fn types(&self, config: &Config, importance: bool) -> Result<Vec<BlockType>, ExportError> {
        let tensors = load::tensors(config);
        let named: Vec<(String, usize)> = tensors
            .iter()
            .map(|(name, shape)| {
                (load::gguf_name(config.family, name), shape.get(1).copied().unwrap_or(0))
            })
            .collect();
        // llama.cpp goes through a file layer by layer, and counts layers in that order.
        let mut seen = LayerCounts::default();
        let mut types = Vec::new();
        for (name, cols) in &named {
            let of = match *cols {
                0 => BlockType::F32, // norms and biases
                cols => self.of(name, cols, config, importance, &mut seen)?,
            };
            types.push(of);
        }
        Ok(types)
    }

    fn of(
        &self,
        name: &str,
        cols: usize,
        config: &Config,
        importance: bool,
        seen: &mut LayerCounts,
    ) -> Result<BlockType, ExportError> {
        let asked = |of: BlockType| match of.bytes_for(cols) {
            Some(_) => Ok(of),
            None => Err(ExportError::Types(format!(
                "tensor {name:?} cannot be {of}: its rows of {cols} values are not whole blocks of {}",
                of.block_len()
            ))),
        };
        let (embedding, output) = (name == "token_embd.weight", name == "output.weight");
        if let Some(of) = self.token_embedding_type.filter(|_| embedding) {
            return asked(of);
        }
        if let Some(of) = self.output_tensor_type.filter(|_| output) {
            return asked(of);
        }
        let plain = self.file_type.block_type();
        if !self.file_type.is_quantized() {
            return Ok(plain);
        }
        let rule = |rule: &&TypeRule| rule.pattern.is_match(name).unwrap_or(false);
        let wanted = match self.tensor_types.iter().find(rule) {
            Some(rule) => rule.block_type,
            None if self.pure => plain,
            None if output || embedding && config.tie_word_embeddings => {
                match self.output_tensor_type {
                    Some(of) => of,
                    None if !cols.is_multiple_of(plain.block_len()) => BlockType::Q8_0,
                    None if plain == BlockType::Q8_0 => plain,
                    None => BlockType::Q6_K,
                }
            }
            None if embedding => plain,
            None => self.of_layer(name, config, importance, seen),
        };
        Ok(wanted.for_rows_of(cols))
    }

    /// The mixes: more bits where errors hurt most.
    fn of_layer(
        &self,
        name: &str,
        config: &Config,
        importance: bool,
        seen: &mut LayerCounts,
    ) -> BlockType {
        use BlockType::{Q3_K, Q4_1, Q4_K, Q5_1, Q5_K, Q6_K};
        use FileType as F;
        let plain = self.file_type.block_type();
        let layers = config.num_hidden_layers;
        // The first and last eighth, and every third between.
        let (first, last) = (layers / 8, 7 * layers / 8);
        let more_bits = |layer: usize| layer < first || layer >= last || (layer - first) % 3 == 2;
        let gqa = config.num_attention_heads / config.num_key_value_heads;
        if name.contains("attn_v.weight") || name.contains("attn_qkv.weight") {
            let layer = seen.attn_v;
            seen.attn_v += 1;
            let of = match self.file_type {
                F::Q2_K if gqa >= 4 => Q4_K,
                F::Q2_K => Q3_K,
                F::Q3_K_M if layer < 2 => Q5_K,
                F::Q3_K_M => Q4_K,
                F::Q3_K_L => Q5_K,
                F::Q4_K_M | F::Q5_K_M if more_bits(layer) => Q6_K,
                F::Q4_K_S if layer < 4 => Q5_K,
                _ => plain,
            };
            // In Llama 2 70B eight heads share one v, which is small.
            let shared = config.num_attention_heads != config.num_key_value_heads
                || !config.family.llama_cpp_has_65b;
            return match of {
                Q3_K | Q4_K if layers == 80 && shared => Q5_K,
                of => of,
            };
        }
        if name.contains("ffn_down") {
            let layer = seen.ffn_down;
            seen.ffn_down += 1;
            return match self.file_type {
                F::Q2_K => Q3_K,
                F::Q3_K_M if layer < layers / 16 => Q5_K,
                F::Q3_K_M => Q4_K,
                F::Q3_K_L => Q5_K,
                F::Q4_K_M | F::Q5_K_M if more_bits(layer) => Q6_K,
                F::Q4_K_S if layer < first => Q5_K,
                F::Q4_0 if importance && layer < first => Q4_1,
                F::Q5_0 if importance && layer < first => Q5_1,
                _ => plain,
            };
        }
        if name.contains("attn_output") {
            return match self.file_type {
                F::Q2_K => Q3_K,
                F::Q3_K_M => Q4_K,
                F::Q3_K_L => Q5_K,
                _ => plain,
            };
        }
        plain
    }
}

/// Layers processed so far, counted as in llama-quantize: tensors whose type is set by a rule do not count.
#[derive(Default)]
struct LayerCounts {
    attn_v: usize,
    ffn_down: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::gguf::file_type_name;

    #[test]
    fn file_type_numbers_match_llama_cpp() {
        for file_type in FileType::ALL {
            let most = if *file_type == FileType::F32 { "all" } else { "mostly" };
            let name = file_type_name(u64::from(file_type.number()));
            assert_eq!(name, format!("{most} {file_type}"));
        }
    }
}
