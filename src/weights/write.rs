//! A writer of GGUF version 3.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;

use super::gguf::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, tensor_bytes};
use super::{OwnedValue, WeightsError, write_atomically};
use crate::quant::BlockType;

/// ggml keeps names in arrays of this many bytes, the last one zero.
const MAX_NAME: usize = 64;

/// A tensor to write.
#[derive(Debug, Clone, Copy)]
pub struct NewTensor<'a> {
    /// Its name, shorter than 64 bytes.
    pub name: &'a str,
    /// Outermost dimension first, like PyTorch.
    pub shape: &'a [usize],
    /// How its values are stored.
    pub block_type: BlockType,
    /// Its blocks, exactly those `shape` needs.
    pub bytes: &'a [u8],
}

/// Writes a GGUF file, version 3, little endian, in the given order. `general.alignment` among
/// the metadata is honoured; without it tensors lie on multiples of 32 bytes.
///
/// # Errors
/// If the system refuses, or the content is none that a reader would accept: all such faults at
/// once, before anything is written.
pub fn write_gguf(
    path: impl AsRef<Path>,
    metadata: &[(String, OwnedValue)],
    tensors: &[NewTensor<'_>],
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
    let mut offset = 0usize;
    for tensor in tensors {
        put_string(&mut header, tensor.name.as_bytes());
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for dim in tensor.shape.iter().rev() {
            header.extend((*dim as u64).to_le_bytes());
        }
        header.extend(tensor.block_type.to_ggml().to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        offset = (offset + tensor.bytes.len()).next_multiple_of(alignment);
    }

    write_atomically(path, |file| {
        let mut padded = |bytes: &[u8]| -> io::Result<()> {
            file.write_all(bytes)?;
            file.write_all(&vec![0; bytes.len().next_multiple_of(alignment) - bytes.len()])
        };
        padded(&header)?;
        tensors.iter().try_for_each(|tensor| padded(tensor.bytes))
    })
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

fn tensor_faults(tensors: &[NewTensor<'_>]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut seen = HashSet::new();
    for NewTensor { name, shape, block_type, bytes } in tensors {
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
        match tensor_bytes(shape, *block_type) {
            Ok(needed) if needed == bytes.len() => (),
            Ok(needed) => {
                let found = bytes.len();
                fault(format!("{shape:?} in {block_type} takes {needed} bytes, found {found}"));
            }
            Err(e) => fault(e),
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
