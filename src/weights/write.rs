//! Writers of GGUF version 3 and of safetensors, one tensor at a time.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::gguf::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, tensor_bytes};
use super::{OwnedValue, WeightsError, write_atomically};
use crate::quant::BlockType;

/// Size of ggml's name buffers, including the terminating zero.
const MAX_NAME: usize = 64;

/// A tensor to write.
#[derive(Debug, Clone, Copy)]
pub struct NewTensor<'a> {
    /// Its name, shorter than 64 bytes.
    pub name: &'a str,
    /// Outermost dimension first, like PyTorch.
    pub shape: &'a [usize],
    /// Its block type.
    pub block_type: BlockType,
    /// Its blocks, exactly as many as `shape` needs.
    pub bytes: &'a [u8],
}

/// A tensor whose bytes are produced when it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// Its name, in a GGUF shorter than 64 bytes.
    pub name: String,
    /// Outermost dimension first, like PyTorch.
    pub shape: Vec<usize>,
    /// Its block type.
    pub block_type: BlockType,
}

impl TensorPlan {
    /// Its size in bytes.
    ///
    /// # Errors
    /// If its rows are not whole blocks, or it is too large for memory.
    pub fn bytes(&self) -> Result<usize, String> {
        tensor_bytes(&self.shape, self.block_type)
    }
}

/// Writes a GGUF file, version 3, little endian, in the given order. `general.alignment` among
/// the metadata is used; the default alignment is 32 bytes.
///
/// # Errors
/// If the system reports an error, or a reader would not accept the content: all such faults together,
/// before anything is written.
pub fn write_gguf(
    path: impl AsRef<Path>,
    metadata: &[(String, OwnedValue)],
    tensors: &[NewTensor<'_>],
) -> Result<(), WeightsError> {
    let path = path.as_ref();
    let plan = |tensor: &NewTensor| TensorPlan {
        name: tensor.name.into(),
        shape: tensor.shape.into(),
        block_type: tensor.block_type,
    };
    let plans: Vec<TensorPlan> = tensors.iter().map(plan).collect();
    let mut faults = [metadata_faults(metadata), tensor_faults(&plans)].concat();
    for (tensor, plan) in tensors.iter().zip(&plans) {
        let (name, found) = (tensor.name, tensor.bytes.len());
        if let Ok(needed) = plan.bytes()
            && needed != found
        {
            let (shape, block_type) = (tensor.shape, tensor.block_type);
            faults.push(format!(
                "tensor {name:?}: {shape:?} in {block_type} takes {needed} bytes, found {found}"
            ));
        }
    }
    super::error::all_of(path, &faults)?;
    stream_gguf(path, metadata, &plans, |i, file| file.write_all(tensors[i].bytes))
}

/// [`write_gguf`] of tensors that are produced one after the other: `write` writes the bytes of the `i`-th,
/// exactly as many as in its plan.
///
/// # Errors
/// As [`write_gguf`]; `write` passes its own errors as `io::Error::other`.
pub fn stream_gguf(
    path: impl AsRef<Path>,
    metadata: &[(String, OwnedValue)],
    tensors: &[TensorPlan],
    mut write: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), WeightsError> {
    let path = path.as_ref();
    let faults = [metadata_faults(metadata), tensor_faults(tensors)].concat();
    super::error::all_of(path, &faults)?;
    let alignment = metadata
        .iter()
        .find_map(|(key, value)| match value {
            OwnedValue::U32(v) if key == ALIGNMENT_KEY => Some(*v as usize),
            _ => None,
        })
        .unwrap_or(DEFAULT_ALIGNMENT);

    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_string(&mut header, key.as_bytes());
        header.extend((value.value_type() as u32).to_le_bytes());
        put_value(&mut header, value);
    }
    let sizes: Vec<usize> = tensors.iter().map(|t| t.bytes().expect("checked")).collect();
    let mut offset = 0usize;
    for (tensor, size) in tensors.iter().zip(&sizes) {
        put_string(&mut header, tensor.name.as_bytes());
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for dim in tensor.shape.iter().rev() {
            header.extend((*dim as u64).to_le_bytes());
        }
        header.extend(tensor.block_type.to_ggml().to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        offset = (offset + size).next_multiple_of(alignment);
    }

    write_atomically(path, |file| {
        let pad = |file: &mut dyn Write, len: usize| {
            file.write_all(&vec![0; len.next_multiple_of(alignment) - len])
        };
        file.write_all(&header)?;
        pad(file, header.len())?;
        for (i, size) in sizes.iter().enumerate() {
            exactly(file, *size, &tensors[i].name, |file| write(i, file))?;
            pad(file, *size)?;
        }
        Ok(())
    })
}

/// Writes a safetensors file of tensors that are produced one after the other in the given order, like
/// [`stream_gguf`]. Supported types are F32, F16 and BF16.
///
/// # Errors
/// As [`stream_gguf`].
pub fn stream_safetensors(
    path: impl AsRef<Path>,
    metadata: HashMap<String, String>,
    tensors: &[TensorPlan],
    mut write: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), WeightsError> {
    let path = path.as_ref();
    let mut faults = Vec::new();
    let (mut end, mut infos, mut sizes) = (0, Vec::new(), Vec::new());
    for tensor in tensors {
        let dtype = match tensor.block_type {
            BlockType::F32 => Dtype::F32,
            BlockType::F16 => Dtype::F16,
            BlockType::BF16 => Dtype::BF16,
            other => {
                faults.push(format!("tensor {:?}: {other} is not a safetensors type", tensor.name));
                continue;
            }
        };
        match tensor.bytes() {
            Ok(size) => {
                let (start, shape) = (end, tensor.shape.clone());
                end += size;
                sizes.push(size);
                let info = TensorInfo { dtype, shape, data_offsets: (start, end) };
                infos.push((tensor.name.clone(), info));
            }
            Err(fault) => faults.push(format!("tensor {:?}: {fault}", tensor.name)),
        }
    }
    super::error::all_of(path, &faults)?;
    let bad = |e: String| WeightsError::format(path, e);
    let header = Metadata::new(Some(metadata), infos).map_err(|e| bad(e.to_string()))?;
    let mut header = serde_json::to_vec(&header).map_err(|e| bad(e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (i, size) in sizes.iter().enumerate() {
            exactly(file, *size, &tensors[i].name, |file| write(i, file))?;
        }
        Ok(())
    })
}

/// Checks that `write` writes exactly `size` bytes.
fn exactly(
    file: &mut dyn Write,
    size: usize,
    name: &str,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut counted = CountingWriter { file, bytes: 0 };
    write(&mut counted)?;
    if counted.bytes == size {
        return Ok(());
    }
    let found = counted.bytes;
    Err(io::Error::other(format!("tensor {name:?}: {found} bytes were written, needed {size}")))
}

struct CountingWriter<'a> {
    file: &'a mut dyn Write,
    bytes: usize,
}

impl Write for CountingWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.bytes += written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn metadata_faults(metadata: &[(String, OwnedValue)]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut seen = HashSet::new();
    for (key, value) in metadata {
        if key.is_empty() {
            faults.push("a metadata key is empty".into());
        }
        if !seen.insert(key) {
            faults.push(format!("metadata key {key:?} appears twice"));
        }
        if !of_one_type(value) {
            faults.push(format!("metadata key {key:?} is an array of mixed types"));
        }
        if key == ALIGNMENT_KEY
            && !matches!(value, OwnedValue::U32(v) if *v >= 8 && v.is_power_of_two())
        {
            faults.push(format!("{key:?} must be a u32, a power of two, at least 8"));
        }
    }
    faults
}

fn of_one_type(value: &OwnedValue) -> bool {
    match value {
        OwnedValue::Array(of, items) => {
            items.iter().all(|item| item.value_type() == *of && of_one_type(item))
        }
        _ => true,
    }
}

fn tensor_faults(tensors: &[TensorPlan]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut seen = HashSet::new();
    for tensor in tensors {
        let TensorPlan { name, shape, .. } = tensor;
        let mut fault = |what: String| faults.push(format!("tensor {name:?}: {what}"));
        if name.is_empty() || name.len() >= MAX_NAME {
            fault(format!("its name has {} bytes, needed 1 to {}", name.len(), MAX_NAME - 1));
        }
        if !seen.insert(name) {
            fault("appears twice".into());
        }
        if !(1..=4).contains(&shape.len()) || shape.contains(&0) {
            fault(format!("shape {shape:?}, needed 1 to 4 dimensions, none of them 0"));
        }
        if let Err(e) = tensor.bytes() {
            fault(e);
        }
    }
    faults
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

fn put_value(out: &mut Vec<u8>, value: &OwnedValue) {
    match value {
        OwnedValue::U8(v) => out.extend(v.to_le_bytes()),
        OwnedValue::I8(v) => out.extend(v.to_le_bytes()),
        OwnedValue::U16(v) => out.extend(v.to_le_bytes()),
        OwnedValue::I16(v) => out.extend(v.to_le_bytes()),
        OwnedValue::U32(v) => out.extend(v.to_le_bytes()),
        OwnedValue::I32(v) => out.extend(v.to_le_bytes()),
        OwnedValue::F32(v) => out.extend(v.to_le_bytes()),
        OwnedValue::Bool(v) => out.push(u8::from(*v)),
        OwnedValue::String(v) => put_string(out, v),
        OwnedValue::Array(of, items) => {
            out.extend((*of as u32).to_le_bytes());
            out.extend((items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| put_value(out, item));
        }
        OwnedValue::U64(v) => out.extend(v.to_le_bytes()),
        OwnedValue::I64(v) => out.extend(v.to_le_bytes()),
        OwnedValue::F64(v) => out.extend(v.to_le_bytes()),
    }
}
