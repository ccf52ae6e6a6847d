//! The reference model: what it wears, and what it says of rows, computed once.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::TrainError;
use super::lora::read_adapter;
use crate::data::Comparison;
use crate::model::{Decoder, Worn};
use crate::weights::write_atomically;

/// What the reference wears: what the policy is put on top of, and the adapter at `path`, if one is
/// named.
pub fn worn(below: &[Worn], path: &Path, decoder: &Decoder) -> Result<Vec<Worn>, TrainError> {
    let mut worn = below.to_vec();
    if !path.as_os_str().is_empty() {
        worn.push(Worn::frozen(Arc::new(read_adapter(path, decoder)?)));
    }
    Ok(worn)
}

/// The numbers of a run's file, one a response of each row; computed and written if it is not there.
/// The run's fingerprints vouch that base, rows and settings are those it was made of.
pub fn cached(
    path: &Path,
    rows: &[&Comparison],
    compute: impl FnOnce() -> Result<Vec<Vec<f32>>, TrainError>,
) -> Result<Vec<Vec<f32>>, TrainError> {
    const NAME: &str = "logps";
    let broken = |reason: String| TrainError::Broken { path: path.to_path_buf(), reason };
    if path.exists() {
        let io = |source| TrainError::Io { path: path.to_path_buf(), source };
        let bytes = fs::read(path).map_err(io)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| broken(e.to_string()))?;
        let tensor = tensors.tensor(NAME).map_err(|e| broken(e.to_string()))?;
        let responses: usize = rows.iter().map(|row| row.responses.len()).sum();
        if tensor.dtype() != Dtype::F32 || tensor.shape() != [responses] {
            return Err(broken(format!("does not hold {responses} log-probs")));
        }
        let (values, _) = tensor.data().as_chunks::<4>();
        let mut values = values.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let take = |row: &&Comparison| values.by_ref().take(row.responses.len()).collect();
        return Ok(rows.iter().map(take).collect());
    }
    let logps = compute()?;
    let values: Vec<u8> = logps.iter().flatten().flat_map(|v: &f32| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![values.len() / 4], &values);
    let view = view.map_err(|e| broken(e.to_string()))?;
    let bytes = safetensors::serialize([(NAME, view)], None).map_err(|e| broken(e.to_string()))?;
    write_atomically(path, |file| std::io::Write::write_all(file, &bytes))?;
    Ok(logps)
}
