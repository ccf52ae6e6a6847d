//! Importance matrices: read from llama.cpp's files, and measured.

use std::path::Path;

use super::{ExportError, Importance};
use crate::model::observe::InputSquares;
use crate::model::{ActiveAdapter, Adapters, Decoder, Rows, load};
use crate::weights::{Gguf, WeightsError};

/// Reads an importance matrix of llama.cpp's `llama-imatrix`: a GGUF, or the `.dat` of older versions.
///
/// # Errors
/// If it is neither, or malformed.
pub fn read(path: &Path) -> Result<Importance, ExportError> {
    let io = |source| WeightsError::Io { action: "open", path: path.into(), source };
    let bytes = std::fs::read(path).map_err(io)?;
    let mut found = if bytes.starts_with(b"GGUF") {
        read_gguf(&Gguf::open(path)?)?
    } else {
        read_dat(&bytes).map_err(|reason| bad(path, reason))?
    };
    for (name, weights) in &found.columns {
        if let Some(at) = weights.iter().position(|w| !w.is_finite() || *w < 0.0) {
            let w = weights[at];
            return Err(bad(path, format!("column {at} of {name:?} has the importance {w}")));
        }
    }
    found.file = Some(path.display().to_string());
    if found.columns.is_empty() {
        Err(bad(path, "no importance of any tensor".into()))
    } else {
        Ok(found)
    }
}

fn bad(path: &Path, reason: String) -> ExportError {
    let reason = format!("no importance matrix: {reason}");
    WeightsError::Format { path: path.into(), reason }.into()
}

/// `NAME.in_sum2`, sums of squares, and `NAME.counts`, of how many inputs.
fn read_gguf(gguf: &Gguf) -> Result<Importance, ExportError> {
    // Where there are several, llama-quantize records the first.
    let datasets = gguf.strings("imatrix.datasets")?;
    let first = datasets.and_then(|mut all| all.next());
    let dataset = first.map(|name| String::from_utf8_lossy(name).into_owned());
    let chunks = gguf.u64("imatrix.chunk_count")?.and_then(|n| u32::try_from(n).ok());
    let mut found = Importance { dataset, chunks, ..Default::default() };
    for info in gguf.tensors() {
        let Some(name) = info.name.strip_suffix(".in_sum2") else { continue };
        let read = |name: &str| -> Result<Vec<f32>, ExportError> {
            let tensor = gguf.tensor(name)?;
            let mut values = vec![0.0; tensor.shape.iter().product()];
            tensor.block_type.dequantize(&tensor.bytes, &mut values);
            Ok(values)
        };
        let (sums, counts) = (read(&info.name)?, read(&format!("{name}.counts"))?);
        let [count] = counts[..] else {
            let n = counts.len();
            return Err(bad(gguf.path(), format!("{name:?} has {n} counts, needed one")));
        };
        let count = if count > 0.0 { count } else { 1.0 };
        found.columns.insert(name.into(), sums.iter().map(|sum| sum / count).collect());
    }
    Ok(found)
}

/// Entries of: length and name, calls, length and values that are sums over calls. Newer files end
/// with the number of chunks, and length and name of the text.
fn read_dat(bytes: &[u8]) -> Result<Importance, String> {
    let mut left = bytes;
    let mut take = |n: usize| -> Result<&[u8], String> {
        let cut = left.len();
        let (taken, rest) =
            left.split_at_checked(n).ok_or(format!("needed {n} bytes, {cut} are left"))?;
        left = rest;
        Ok(taken)
    };
    let mut found = Importance::default();
    let int = |bytes: &[u8]| i32::from_le_bytes(bytes.try_into().expect("four bytes"));
    let entries = int(take(4)?);
    if !(1..=1 << 20).contains(&entries) {
        return Err(format!("it has {entries} entries"));
    }
    for entry in 0..entries {
        let size = |n: i32| usize::try_from(n).map_err(|_| format!("entry {entry} has {n} bytes"));
        let len = size(int(take(4)?))?;
        let name = str::from_utf8(take(len)?).map_err(|_| format!("name {entry} is no UTF-8"))?;
        let name = name.to_string();
        let calls = int(take(4)?);
        let count = size(int(take(4)?))?;
        let values = take(count.checked_mul(4).ok_or("a count overflows")?)?;
        let by = if calls > 0 { calls as f32 } else { 1.0 };
        let value = |b: &[u8; 4]| f32::from_le_bytes(*b) / by;
        found.columns.insert(name, values.as_chunks().0.iter().map(value).collect());
    }
    if let Ok(chunks) = take(4) {
        found.chunks = u32::try_from(int(chunks)).ok().filter(|chunks| *chunks > 0);
        let len = take(4).ok().and_then(|len| usize::try_from(int(len)).ok());
        let name = len.and_then(|len| take(len).ok());
        found.dataset = name.and_then(|name| Some(str::from_utf8(name).ok()?.to_string()));
    }
    Ok(found)
}

/// The mean square of each input of each linear layer over a text, in chunks of `n_ctx` tokens; with
/// `bos`, the first token of each chunk is replaced by it.
///
/// # Errors
/// If the text is shorter than a chunk, or `n_ctx` exceeds the model's context.
pub fn measure(
    decoder: &Decoder,
    active: &[ActiveAdapter],
    tokens: &[u32],
    n_ctx: usize,
    bos: Option<u32>,
) -> Result<Importance, ExportError> {
    let most = decoder.config.max_position_embeddings;
    if n_ctx < 1 || n_ctx > most {
        return Err(ExportError::Measure(crate::eval::EvalError::Context { n_ctx, most }));
    }
    if tokens.len() < n_ctx {
        let (tokens, needed) = (tokens.len(), n_ctx);
        return Err(ExportError::Measure(crate::eval::EvalError::TooShort { tokens, needed }));
    }
    let squares = InputSquares::default();
    for chunk in tokens.chunks_exact(n_ctx) {
        let mut chunk = chunk.to_vec();
        if let Some(bos) = bos {
            chunk[0] = bos;
        }
        decoder.observe(&Rows::new(&[chunk]), Adapters::Same(active), &squares)?;
    }
    let named = |(name, means): (String, Vec<f32>)| {
        (load::gguf_name(decoder.config.family, &format!("{name}.weight")), means)
    };
    Ok(Importance {
        columns: squares.means().into_iter().map(named).collect(),
        chunks: Some((tokens.len() / n_ctx) as u32),
        ..Default::default()
    })
}
