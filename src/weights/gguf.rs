//! A checked reader of GGUF, versions 2 and 3, little endian.
//!
//! The layout is that of ggml's `docs/gguf.md`; validation follows `gguf.cpp`, except that tensors of
//! unknown types are listed, and are errors only when used. Opening the first file of a model that was
//! split by llama.cpp's `gguf-split` opens all of its files.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::error::all_of;
use super::value::{Cursor, GgufArray, GgufValue, ValueType};
use super::{StoredTensor, WeightsError, map_file};
use crate::quant::{BlockType, Bytes};

/// The first four bytes of every GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// Default alignment of tensors, in bytes.
pub const DEFAULT_ALIGNMENT: usize = 32;

/// The key of the alignment.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// An open GGUF file: its map, and offsets into it.
#[derive(Debug, Clone)]
pub struct Gguf {
    path: PathBuf,
    map: Bytes,
    version: u32,
    alignment: usize,
    data_offset: usize,
    metadata: Vec<Entry>,
    keys: HashMap<Box<str>, usize>,
    tensors: Vec<TensorInfo>,
    names: HashMap<Box<str>, usize>,
    /// The other files of a split model, each with the index of its first tensor.
    others: Vec<(usize, Bytes)>,
}

/// A metadata key and the offset of its value.
#[derive(Debug, Clone)]
struct Entry {
    key: Box<str>,
    of: ValueType,
    value: Range<usize>,
}

/// Name, shape, type and offset of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Outermost dimension first, like PyTorch: the file's own order reversed.
    pub shape: Vec<usize>,
    /// Its number in `enum ggml_type`.
    pub type_id: u32,
    /// Its first byte, counted from the start of the data.
    pub offset: u64,
    /// Its bytes in the file; `None` if its type is unknown.
    pub range: Option<Range<usize>>,
}

impl TensorInfo {
    /// The block type, if it is supported.
    pub fn block_type(&self) -> Option<BlockType> {
        BlockType::from_ggml(self.type_id)
    }
}

impl Gguf {
    /// Maps and checks a file. Only the header is read; values and tensors stay in the map.
    ///
    /// # Errors
    /// If the file cannot be read, is not a little-endian GGUF of version 2 or 3, or is malformed: one
    /// sentence with the position, and all faults of its tensors together.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, WeightsError> {
        let path = path.as_ref();
        let mut gguf = Self::read(path, map_file(path)?)?;
        gguf.open_others()?;
        Ok(gguf)
    }

    /// Opens the other files of a split model, by the numbers in their names.
    fn open_others(&mut self) -> Result<(), WeightsError> {
        let Some((0, count)) = self.split_position()? else { return Ok(()) };
        let bad = |reason: String| WeightsError::format(&self.path, reason);
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let of_part = |part: u64| format!("-{:05}-of-{count:05}.gguf", part + 1);
        let Some(stem) = name.strip_suffix(&of_part(0)) else {
            let needed = of_part(0);
            return Err(bad(format!(
                "the first of {count} files, whose name must end in {needed:?}"
            )));
        };
        for part in 1..count {
            let path = self.path.with_file_name(format!("{stem}{}", of_part(part)));
            let other = Self::read(&path, map_file(&path)?)?;
            if other.split_position_from_keys()? != Some((part, count)) {
                let reason = format!("its keys do not name it file {} of {count}", part + 1);
                return Err(WeightsError::format(&path, reason));
            }
            self.others.push((self.tensors.len(), other.map));
            for tensor in other.tensors {
                if self.names.insert(tensor.name.as_str().into(), self.tensors.len()).is_some() {
                    let name = tensor.name;
                    return Err(WeightsError::format(
                        &path,
                        format!("tensor {name:?} appears twice"),
                    ));
                }
                self.tensors.push(tensor);
            }
        }
        let needed = self.u64("split.tensors.count")?;
        match needed.filter(|&needed| needed != self.tensors.len() as u64) {
            Some(needed) => {
                let (path, found) = (&self.path, self.tensors.len());
                let reason = format!("{found} tensors in all {count} files, needed {needed}");
                Err(WeightsError::format(path, reason))
            }
            None => Ok(()),
        }
    }

    /// Number of files of a split model whose first file this is; an error if it is a later one.
    fn split_position(&self) -> Result<Option<(u64, u64)>, WeightsError> {
        match self.split_position_from_keys()? {
            Some((part, count)) if part > 0 => {
                let part = part + 1;
                let reason = format!("file {part} of {count} of a split model, needed the first");
                Err(WeightsError::format(&self.path, reason))
            }
            place => Ok(place),
        }
    }

    fn split_position_from_keys(&self) -> Result<Option<(u64, u64)>, WeightsError> {
        let Some(count) = self.u64("split.count")?.filter(|&count| count > 1) else {
            return Ok(None);
        };
        if count > 99_999 {
            return Err(WeightsError::format(&self.path, format!("split.count is {count}")));
        }
        Ok(Some((self.u64("split.no")?.unwrap_or(0), count)))
    }

    fn read(path: &Path, map: Bytes) -> Result<Self, WeightsError> {
        let mut cursor = Cursor::new(&map);
        let bad = |reason: String| WeightsError::format(path, reason);
        let header = |e: String| bad(format!("the GGUF header is cut: {e}"));

        check_magic(cursor.take(4).map_err(header)?).map_err(bad)?;
        let version = cursor.u32().map_err(header)?;
        check_version(version).map_err(bad)?;
        // The minimum size of a tensor: name length, one dimension with its count, type, offset. And of
        // a key: its length and one byte, a type, one byte of value.
        let tensor_count = cursor.count("tensors", 8 + 4 + 8 + 4 + 8).map_err(bad)?;
        let key_count = cursor.count("metadata keys", 8 + 1 + 4 + 1).map_err(bad)?;

        let mut metadata: Vec<Entry> = Vec::new();
        let mut keys = HashMap::new();
        for i in 0..key_count {
            let entry = read_entry(&mut cursor).map_err(|e| {
                let after = metadata.last().map_or("the header", |entry| &entry.key);
                bad(format!("metadata key {i} (after {after:?}): {e}"))
            })?;
            if keys.insert(entry.key.clone(), i).is_some() {
                return Err(bad(format!("metadata key {:?} appears twice", entry.key)));
            }
            metadata.push(entry);
        }

        let mut tensors: Vec<TensorInfo> = Vec::new();
        for i in 0..tensor_count {
            tensors.push(read_tensor(&mut cursor).map_err(|e| {
                let after = tensors.last().map_or("the metadata", |tensor| &tensor.name);
                bad(format!("tensor {i} of the list (after {after:?}): {e}"))
            })?);
        }

        let list_end = cursor.at();
        let mut gguf = Self {
            path: path.into(),
            version,
            alignment: DEFAULT_ALIGNMENT,
            data_offset: list_end,
            metadata,
            keys,
            tensors,
            names: HashMap::new(),
            others: Vec::new(),
            map: map.clone(),
        };
        gguf.alignment = gguf.read_alignment()?;
        gguf.data_offset = list_end
            .checked_next_multiple_of(gguf.alignment)
            .ok_or_else(|| bad(format!("alignment {} is too large", gguf.alignment)))?;
        gguf.place_tensors()?;
        Ok(gguf)
    }

    fn read_alignment(&self) -> Result<usize, WeightsError> {
        match self.get(ALIGNMENT_KEY) {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(GgufValue::U32(v)) if v >= 8 && v.is_power_of_two() => Ok(v as usize),
            Some(other) => {
                Err(self.key_type(ALIGNMENT_KEY, other, "a u32, a power of two, at least 8"))
            }
        }
    }

    /// Finds every tensor's bytes and checks that they are inside the file and do not overlap.
    fn place_tensors(&mut self) -> Result<(), WeightsError> {
        let mut faults = Vec::new();
        for (i, tensor) in self.tensors.iter_mut().enumerate() {
            match place(tensor, self.data_offset, self.alignment, self.map.len()) {
                Ok(range) => tensor.range = range,
                Err(e) => faults.push(format!("tensor {:?}: {e}", tensor.name)),
            }
            if self.names.insert(tensor.name.as_str().into(), i).is_some() {
                faults.push(format!("tensor {:?} appears twice", tensor.name));
            }
        }
        if faults.is_empty() {
            faults = overlaps(&self.tensors);
        }
        all_of(&self.path, &faults)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format's version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What tensors are aligned to, in bytes.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Where the data of tensors starts, in bytes from the start of the file.
    pub fn data_offset(&self) -> usize {
        self.data_offset
    }

    /// All keys and values, in the order of the file.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&str, GgufValue<'_>)> {
        self.metadata.iter().map(|entry| (&*entry.key, self.value(entry)))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<GgufValue<'_>> {
        Some(self.value(&self.metadata[*self.keys.get(key)?]))
    }

    fn value(&self, entry: &Entry) -> GgufValue<'_> {
        Cursor::new(&self.map[entry.value.clone()])
            .value(entry.of, 0)
            .expect("the value was read when the file was opened")
    }

    /// The string of a key; `None` if it is missing.
    ///
    /// # Errors
    /// If the value has another type, as in the methods below.
    pub fn str(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        self.typed(key, "text in UTF-8", |value| value.as_str())
    }

    /// The integer of a key, of any width and not negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        self.typed(key, "an integer that is not negative", |value| value.as_u64())
    }

    /// The float of a key, of either width.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        self.typed(key, "a float", |value| value.as_f64())
    }

    /// The boolean of a key.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        self.typed(key, "a bool", |value| value.as_bool())
    }

    /// The array of a key, with items of any type.
    pub fn array(&self, key: &str) -> Result<Option<GgufArray<'_>>, WeightsError> {
        self.typed(key, "an array", |value| value.as_array())
    }

    /// The strings of a key, read one by one from the map, as bytes: tokens of some vocabularies are not
    /// UTF-8.
    pub fn strings(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = &[u8]> + Clone>, WeightsError> {
        let array = self.typed(key, "an array of strings", |value| {
            value.as_array().filter(|array| array.of() == ValueType::String)
        })?;
        Ok(array.map(|array| {
            array.iter().map(|item| match item {
                GgufValue::String(bytes) => bytes,
                _ => unreachable!("the items are strings"),
            })
        }))
    }

    /// The 32-bit integers of a key.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, WeightsError> {
        self.typed(key, "an array of integers of 32 bits", |value| {
            value.as_array()?.iter().map(|item| item.as_i64()?.try_into().ok()).collect()
        })
    }

    /// The floats of a key, narrowed to `f32`.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, WeightsError> {
        self.typed(key, "an array of floats", |value| {
            value.as_array()?.iter().map(|item| Some(item.as_f64()? as f32)).collect()
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        needed: &'static str,
        read: impl Fn(GgufValue<'a>) -> Option<T>,
    ) -> Result<Option<T>, WeightsError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.key_type(key, value, needed))
    }

    fn key_type(&self, key: &str, found: GgufValue<'_>, needed: &'static str) -> WeightsError {
        let found = match found {
            GgufValue::Array(_) => format!("{found}"),
            _ => format!("{} {found}", found.value_type()),
        };
        WeightsError::KeyType { path: self.path.clone(), key: key.into(), found, needed }
    }

    /// The error of a required key that is missing: `gguf.u64(k)?.ok_or_else(|| ..)`.
    pub fn missing_key(&self, key: &str) -> WeightsError {
        WeightsError::MissingKey { path: self.path.clone(), key: key.into() }
    }

    /// All tensors of any type, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Name, shape, type and offset of a tensor.
    pub fn tensor_info(&self, name: &str) -> Option<&TensorInfo> {
        Some(&self.tensors[*self.names.get(name)?])
    }

    /// The map that contains a tensor.
    fn map_of(&self, index: usize) -> &Bytes {
        let other = self.others.iter().rev().find(|(first, _)| *first <= index);
        other.map_or(&self.map, |(_, map)| map)
    }

    /// A tensor by name; its bytes stay in the map.
    ///
    /// # Errors
    /// If there is none of that name, or its type is not supported.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        let path = || self.path.clone();
        let info = self
            .tensor_info(name)
            .ok_or_else(|| WeightsError::MissingTensor { path: path(), name: name.into() })?;
        let known = info.block_type().zip(info.range.clone());
        let (block_type, range) = known.ok_or_else(|| WeightsError::TensorType {
            path: path(),
            name: name.into(),
            found: type_name(info.type_id),
            needed: readable_types(),
        })?;
        let map = self.map_of(self.names[name]);
        let bytes = map.slice(range).expect("the range was checked on opening");
        Ok(StoredTensor { name: name.into(), shape: info.shape.clone(), block_type, bytes })
    }
}

fn check_magic(magic: &[u8]) -> Result<(), String> {
    match magic {
        magic if magic == MAGIC => Ok(()),
        b"FUGG" => Err("a big-endian GGUF file, needed little endian".into()),
        b"tjgg" | b"fmgg" | b"lmgg" | b"algg" => {
            Err("a GGML file from before GGUF, needed GGUF version 2 or 3".into())
        }
        other => {
            Err(format!("starts with {:?}, needed \"GGUF\"", other.escape_ascii().to_string()))
        }
    }
}

fn check_version(version: u32) -> Result<(), String> {
    match version {
        2 | 3 => Ok(()),
        // Versions are small numbers: if the byte-swapped one is small, the file is big-endian.
        1.. if version.swap_bytes() < 0x1_0000 => {
            let version = version.swap_bytes();
            Err(format!("a big-endian GGUF file (version {version}), needed little endian"))
        }
        _ => Err(format!("GGUF version {version}, needed version 2 or 3")),
    }
}

fn read_entry(cursor: &mut Cursor<'_>) -> Result<Entry, String> {
    let key = read_name(cursor)?;
    let in_key = |e| format!("{key:?}: {e}");
    let of = cursor.value_type().map_err(in_key)?;
    let start = cursor.at();
    cursor.value(of, 0).map_err(in_key)?;
    Ok(Entry { key: key.into(), of, value: start..cursor.at() })
}

fn read_tensor(cursor: &mut Cursor<'_>) -> Result<TensorInfo, String> {
    let name = read_name(cursor)?;
    let in_tensor = |e| format!("{name:?}: {e}");
    let dims = cursor.u32().map_err(in_tensor)?;
    if !(1..=4).contains(&dims) {
        return Err(in_tensor(format!("{dims} dimensions, needed 1 to 4")));
    }
    let mut shape = Vec::new();
    for _ in 0..dims {
        let dim = cursor.u64().map_err(in_tensor)?;
        let dim = usize::try_from(dim)
            .map_err(|_| in_tensor(format!("a dimension of {dim} is more than memory")))?;
        shape.push(dim);
    }
    shape.reverse();
    let type_id = cursor.u32().map_err(in_tensor)?;
    let offset = cursor.u64().map_err(in_tensor)?;
    Ok(TensorInfo { name: name.into(), shape, type_id, offset, range: None })
}

fn read_name<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str, String> {
    let at = cursor.at();
    let name = str::from_utf8(cursor.string()?)
        .map_err(|_| format!("the name at byte {at} is not UTF-8"))?;
    if name.is_empty() {
        return Err(format!("the name at byte {at} is empty"));
    }
    Ok(name)
}

/// The bytes of a tensor in the file; `Ok(None)` if its type is unknown.
fn place(
    tensor: &TensorInfo,
    data_offset: usize,
    alignment: usize,
    file_len: usize,
) -> Result<Option<Range<usize>>, String> {
    let shape = &tensor.shape;
    let values = shape
        .iter()
        .try_fold(1usize, |product, dim| product.checked_mul(*dim))
        .ok_or_else(|| format!("shape {shape:?} has more values than fit in memory"))?;
    if values == 0 {
        return Err(format!("shape {shape:?} holds no values"));
    }
    let offset = tensor.offset;
    if !offset.is_multiple_of(alignment as u64) {
        return Err(format!("offset {offset} is not a multiple of the alignment {alignment}"));
    }
    let data = file_len.saturating_sub(data_offset);
    // A tensor of an unknown type takes at least one byte.
    let size = match tensor.block_type() {
        Some(block_type) => tensor_bytes(shape, block_type)?,
        None => 1,
    };
    let end = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(size));
    if end.is_none_or(|end| end > data) {
        return Err(format!("{size} bytes at offset {offset}, the file has {data} bytes of data"));
    }
    let start = data_offset + offset as usize;
    Ok(tensor.block_type().map(|_| start..start + size))
}

/// The bytes of a tensor, if its rows are whole blocks.
pub(super) fn tensor_bytes(shape: &[usize], block_type: BlockType) -> Result<usize, String> {
    let row = shape.last().copied().unwrap_or(1);
    let rows = shape[..shape.len().saturating_sub(1)]
        .iter()
        .try_fold(1usize, |product, dim| product.checked_mul(*dim));
    let block_len = block_type.block_len();
    let row_bytes = block_type.bytes_for(row).ok_or_else(|| {
        format!("rows of {row} values are not whole {block_type} blocks of {block_len}")
    })?;
    rows.and_then(|rows| rows.checked_mul(row_bytes))
        .ok_or_else(|| format!("shape {shape:?} has more values than fit in memory"))
}

fn overlaps(tensors: &[TensorInfo]) -> Vec<String> {
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.offset);
    let pairs = order.iter().zip(order.iter().skip(1));
    pairs
        .filter(|(one, next)| {
            let size = one.range.as_ref().map_or(1, |range| range.len() as u64);
            one.offset + size > next.offset
        })
        .map(|(one, next)| format!("tensors {:?} and {:?} share bytes", one.name, next.name))
        .collect()
}

/// The supported types, for messages.
fn readable_types() -> String {
    let names: Vec<_> = BlockType::ALL.iter().map(|block_type| block_type.to_string()).collect();
    names.join(", ")
}

/// The name of a number in `enum ggml_type`.
pub fn type_name(type_id: u32) -> String {
    if let Some(block_type) = BlockType::from_ggml(type_id) {
        return block_type.to_string();
    }
    let name = match type_id {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        41 => "Q1_0",
        42 => "Q2_0",
        _ => return format!("type {type_id}"),
    };
    name.into()
}

/// The name of a number in `enum llama_ftype`, the value of `general.file_type`.
pub fn file_type_name(number: u64) -> String {
    let name = match number {
        0 => return "all F32".into(),
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4",
        39 => "NVFP4",
        40 => "Q1_0",
        41 => "Q2_0",
        _ => return format!("file type {number}"),
    };
    format!("mostly {name}")
}
