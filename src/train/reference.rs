//! The reference model: its adapters, and its log-probs of rows, computed once.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::TrainError;
use super::lora::read_adapter;
use crate::model::{ActiveAdapter, Decoder};
use crate::monitor::Monitor;
use crate::weights::write_atomically;

/// The active adapters of the reference: the frozen ones below the policy's, and the
/// adapter at `path`, if it is not empty.
pub(super) fn active(
    frozen: &[ActiveAdapter],
    path: &Path,
    decoder: &Decoder,
    monitor: Monitor<'_>,
) -> Result<Vec<ActiveAdapter>, TrainError> {
    let mut active = frozen.to_vec();
    if !path.as_os_str().is_empty() {
        active.push(ActiveAdapter::frozen(Arc::new(read_adapter(path, decoder, monitor)?)));
    }
    Ok(active)
}

/// Summed log-probs under the reference, of the responses of each row.
#[derive(Debug, Default)]
pub(super) struct ReferenceLogps {
    values: Vec<f32>,
    /// The index of the first value of each row.
    starts: Vec<u32>,
}

impl ReferenceLogps {
    /// Zeros for rows with these numbers of responses.
    pub(super) fn new(responses: impl Iterator<Item = usize>) -> Self {
        let (mut all, mut starts) = (0, Vec::new());
        for count in responses {
            starts.push(all);
            all += count as u32;
        }
        Self { values: vec![0.0; all as usize], starts }
    }

    /// The log-probs of a row's responses.
    pub(super) fn of(&self, row: usize) -> &[f32] {
        let end = self.starts.get(row + 1).map_or(self.values.len(), |&end| end as usize);
        &self.values[self.starts[row] as usize..end]
    }

    /// The log-probs of a row's responses, mutable.
    pub(super) fn of_mut(&mut self, row: usize) -> &mut [f32] {
        let end = self.starts.get(row + 1).map_or(self.values.len(), |&end| end as usize);
        &mut self.values[self.starts[row] as usize..end]
    }

    /// Bytes of the log-probs of this many responses and rows.
    pub(super) fn bytes(responses: usize, rows: usize) -> usize {
        responses * size_of::<f32>() + rows * size_of::<u32>()
    }
}

/// Reads the log-probs from a file of the run, or computes and writes them if it does not exist. The
/// fingerprints of the run ensure that base, rows and settings are those it was computed with.
pub(super) fn cached(
    path: &Path,
    logps: &mut ReferenceLogps,
    compute: impl FnOnce(&mut ReferenceLogps) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    const NAME: &str = "logps";
    let broken = |reason: String| TrainError::Broken { path: path.to_path_buf(), reason };
    if path.exists() {
        let io = |source| TrainError::Io { path: path.to_path_buf(), source };
        let bytes = fs::read(path).map_err(io)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| broken(e.to_string()))?;
        let tensor = tensors.tensor(NAME).map_err(|e| broken(e.to_string()))?;
        let responses = logps.values.len();
        if tensor.dtype() != Dtype::F32 || tensor.shape() != [responses] {
            return Err(broken(format!("does not contain {responses} log-probs")));
        }
        let (values, _) = tensor.data().as_chunks::<4>();
        for (value, bytes) in logps.values.iter_mut().zip(values) {
            *value = f32::from_le_bytes(*bytes);
        }
        return Ok(());
    }
    compute(logps)?;
    let values: Vec<u8> = logps.values.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![values.len() / 4], &values);
    let view = view.map_err(|e| broken(e.to_string()))?;
    let bytes = safetensors::serialize([(NAME, view)], None).map_err(|e| broken(e.to_string()))?;
    write_atomically(path, |file| std::io::Write::write_all(file, &bytes))?;
    Ok(())
}
